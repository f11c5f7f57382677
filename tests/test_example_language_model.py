"""The language model example: its data, its cache, its errors and a short run."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as stock_attention

from examples import assert_reports, run_example
from fastopt.nn.functional import scaled_dot_product_attention
from tolerances import assert_matches

import _corpus  # isort: skip
import _library  # isort: skip
import language_model  # isort: skip

SETTINGS = replace(language_model.SMOKE, context=24, dropout=0.0)


@pytest.fixture(scope="module")
def library():
    return _library.hold_out(_library.read_library(2), seed=0)


@pytest.mark.parametrize("attention", [stock_attention, scaled_dot_product_attention])
def test_a_cache_changes_no_logits(attention):
    model = language_model.LanguageModel(SETTINGS, 50, language_model.Parts(attention, None)).eval()
    tokens = torch.randint(50, (1, 24))
    with torch.no_grad():
        expected = model(tokens)
        caches = model.caches()
        parts = [model(tokens[:, :9], caches)]
        parts += [model(tokens[:, i : i + 1], caches) for i in range(9, 24)]
    assert_matches(torch.cat(parts, 1), expected, op="attention", dtype=torch.float32)


def test_writing_stops_at_the_context_and_hangs_on_the_seed():
    model = language_model.LanguageModel(SETTINGS, 50, language_model.STOCK_PARTS)
    written = model.write([1, 2, 3], 100, 1.0, seed=0)
    assert len(written) == SETTINGS.context and written[:3] == [1, 2, 3]
    assert model.write([1, 2, 3], 100, 1.0, seed=0) == written
    assert model.write([1, 2, 3], 100, 1.0, seed=1) != written


def test_documents_are_held_out_whole(library):
    names = [document.name for part in (library.train, library.validation) for document in part]
    assert len(set(names)) == len(names) == len(_library.read_library(2))
    assert len(library.validation) == round(0.1 * len(names))
    assert library == _library.hold_out(_library.read_library(2), seed=0)


def test_targets_are_the_next_tokens():
    inputs, targets = language_model.windows(torch.arange(20), context=4, first=1)
    assert torch.equal(inputs.flatten(), torch.arange(1, 17))
    assert torch.equal(targets, inputs + 1)


def test_tokens_are_the_text_again(library):
    task = language_model.prepare(library, SETTINGS)
    text = library.validation[0].text
    encoded = task.tokenizer.encode(text).ids
    assert task.tokenizer.decode(encoded) == text
    assert task.validation[: len(encoded)].tolist() == encoded


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "empty"), (b"caf\xe9", "byte 3: not UTF-8"), (None, "No such file or directory")],
)
def test_unusable_files_end_the_program_with_2(tmp_path, content, text):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("A text.\n" * 10_000)
    if content is not None:
        bad.write_bytes(content)
    result = run_example("language_model.py", "--smoke", "--data", good, bad)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {bad}") and text in result.stderr


def test_too_little_text_is_refused():
    documents = [_library.Document(str(i), "A text.") for i in range(2)]
    with pytest.raises(_corpus.DataError, match=r"train: .* tokens, more than 1536 are needed"):
        language_model.prepare(_library.hold_out(documents, seed=0), SETTINGS)


def test_smoke_run_reports_writes_and_draws(tmp_path):
    plot = tmp_path / "plots" / "losses.png"
    result = run_example(
        "language_model.py", "--smoke", "--epochs", 1, "--plot", plot,
        "--checkpoint", tmp_path / "checkpoint.pt",
    )  # fmt: skip
    contenders = ["stock", "stock, fused", "fastopt optimizer", "fastopt attention", "fastopt"]
    assert_reports(result, contenders)
    for expected in ("perplexity", "ms per token", "same text", "The with statement"):
        assert expected in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoint.pt").stat().st_size > 0
