"""Hugging Face transformers: our attention in its models, our optimizers in its Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from fastopt import optim
from tolerances import assert_matches

transformers = pytest.importorskip("transformers")

import fastopt.integrations.transformers  # noqa: E402  # registers the attention

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 3}
T5 = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}

# Model, configuration, and the attention of theirs that can do the same.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}, "sdpa"),
    "BERT": ("BertForMaskedLM", {**SMALL, **NO_DROPOUT}, "sdpa"),
    "Mistral, sliding window": ("MistralForCausalLM", {**SMALL, **GROUPED, "sliding_window": 3},
                                "sdpa"),
    "Gemma 2, softcap": ("Gemma2ForCausalLM", {**SMALL, **GROUPED, "sliding_window": 3}, "eager"),
    "GPT-OSS, sinks": ("GptOssForCausalLM", {**SMALL, **GROUPED, **EXPERTS}, "eager"),
    "T5, learned bias": ("T5ForConditionalGeneration", T5, "sdpa"),
}  # fmt: skip


def build(name: str, attention: str) -> Any:
    cls, options, _ = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, cls).config_class(**options, pad_token_id=0)
    config._attn_implementation = attention
    return getattr(transformers, cls)(config)


def batch(padded: bool, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (3, 11), generator=generator)
    seen = torch.ones_like(tokens)
    if padded:
        seen[0, 7:] = 0
        seen[1, 5:] = 0
    return {"input_ids": tokens, "labels": tokens.masked_fill(seen == 0, -100),
            "attention_mask": seen}  # fmt: skip


def losses(model: Any, optimizer: torch.optim.Optimizer, padded: bool) -> list[Tensor]:
    found = []
    for _ in range(4):
        loss = model(**batch(padded)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_trains_to_the_same_losses(name: str, padded: bool) -> None:
    ours, theirs = build(name, "fastopt"), build(name, MODELS[name][2])
    assert ours.config._attn_implementation == "fastopt"
    actual = losses(ours, optim.AdamW(ours.parameters(), lr=1e-3), padded)
    expected = losses(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-3), padded)
    assert expected[-1] < expected[0]
    for mine, other in zip(actual, expected, strict=True):
        assert_matches(mine, other, op="attention gradients", dtype=torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_our_kernels_run(name: str) -> None:
    calls = fastopt.explain(build(name, "fastopt"), **batch(padded=True)).calls
    assert len(calls) >= 2 and {call.backend for call in calls} == {"cpu"}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("BERT",)])
def test_generates_the_same(name: str, cache: str) -> None:
    """Decoding: one query over a cache, which may have room for more keys than there are."""
    if cache == "static" and name.startswith("T5"):
        cache = "dynamic"
    prompt = batch(padded=False)["input_ids"][:, :6]
    written = []
    for attention in ("fastopt", MODELS[name][2]):
        model = build(name, attention).eval()
        written.append(
            model.generate(
                prompt, max_new_tokens=8, do_sample=False, cache_implementation=cache,
                disable_compile=True, return_dict_in_generate=True, output_logits=True,
                attention_mask=torch.ones_like(prompt),
            )
        )  # fmt: skip
    assert torch.equal(written[0].sequences, written[1].sequences)
    for actual, expected in zip(written[0].logits, written[1].logits, strict=True):
        assert_matches(actual, expected, op="attention", dtype=torch.float32)


def test_an_implementation_may_be_changed_on_a_model() -> None:
    model = build("Llama", "sdpa")
    inputs = batch(padded=True)
    expected = model(**inputs).logits
    model.set_attn_implementation("fastopt")
    assert fastopt.explain(model, **inputs).calls
    assert_matches(model(**inputs).logits, expected, op="attention", dtype=torch.float32)


def test_compiles_without_a_break() -> None:
    model = build("Llama", "fastopt")
    inputs = batch(padded=True)
    expected = model(**inputs).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**inputs).loss
    assert_matches(loss, expected, op="attention", dtype=torch.float32)
    loss.backward()
    torch._dynamo.reset()


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Of random tokens."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: rows[0] for key, rows in batch(padded=True, seed=index).items()}


def trainer(folder: Path, optimizer: Any, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, save_steps=3, logging_steps=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=5,
        warmup_steps=2, max_grad_norm=0.5, **options,
    )  # fmt: skip
    return transformers.Trainer(
        build("Llama", "fastopt"), arguments, train_dataset=Sentences(),
        optimizer_cls_and_kwargs=(optimizer, {"lr": 1e-2, "weight_decay": 0.1}),
    )  # fmt: skip


def logged(run: Any) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def test_trainer_with_our_optimizer_and_resume(tmp_path: Path) -> None:
    stock = trainer(tmp_path / "stock", torch.optim.AdamW)
    stock.train()
    run = trainer(tmp_path / "ours", optim.AdamW)
    run.train()
    assert isinstance(run.optimizer.optimizer, optim.AdamW)
    assert len(logged(run)) == 6
    for actual, expected in zip(logged(run), logged(stock), strict=True):
        assert_matches(
            torch.tensor(actual), torch.tensor(expected), op="mixed", dtype=torch.float32
        )
    again = trainer(tmp_path / "ours", optim.AdamW)
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    assert logged(again) == logged(run)
    for param, twin in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(param, twin)


def test_a_checkpoint_of_stocks_optimizer_resumes_with_ours(tmp_path: Path) -> None:
    trainer(tmp_path, torch.optim.AdamW).train()
    run = trainer(tmp_path, optim.AdamW)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert run.state.global_step == 6


def test_trainer_clips_inside_the_step(tmp_path: Path) -> None:
    """Its own clipping is switched off, ours does it in the same pass."""
    outside = trainer(tmp_path / "outside", optim.AdamW)
    outside.train()
    inside = trainer(tmp_path / "inside", optim.AdamW)
    inside.args.max_grad_norm = 0.0
    inside.optimizer_cls_and_kwargs[1]["max_grad_norm"] = 0.5
    inside.train()
    for param, twin in zip(inside.model.parameters(), outside.model.parameters(), strict=True):
        assert_matches(param.detach(), twin.detach(), op="mixed", dtype=torch.float32)
