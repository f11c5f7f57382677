"""The dialogue example: its memory, its prompts, its checkpoints and a short run."""

from dataclasses import replace
from io import StringIO

import pytest
import torch

from examples import assert_goes_on_after_a_kill, assert_reports, run_example
from tolerances import assert_matches

pytest.importorskip("sacrebleu")

import _docstrings  # isort: skip
import _tokenizer  # isort: skip
import converse  # isort: skip
import language_model  # isort: skip

SETTINGS = replace(language_model.SMOKE, context=48, dropout=0.0, vocabulary=300)


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer.train_byte_pairs([">>> a + b\n3\n" * 50], 300, [language_model.END])


@pytest.fixture
def dialogue(tokenizer):
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    model = language_model.LanguageModel(SETTINGS, size, language_model.FAST_PARTS)
    return converse.Dialogue(model, tokenizer, 1.0, 10, seed=0)


def test_caches_hold_what_was_said(dialogue):
    for source in ("a", "a + b", "b\nc", "a" * 30, "b"):  # more than its context, in all
        dialogue.reply(_docstrings.prompt_of(source))
        tokens = [*dialogue.tokens]
        with torch.no_grad():
            expected = dialogue.model(torch.tensor([tokens]))[0, -1]
            logits = dialogue._read(tokens)  # the last one again, all others from the caches
        assert_matches(logits, expected, op="attention", dtype=torch.float32)


def test_a_dialogue_hangs_on_what_was_said_before(dialogue):
    first = dialogue.reply(">>> a\n")
    dialogue.forget()
    dialogue.generator.manual_seed(0)
    assert dialogue.reply(">>> a\n") == first
    dialogue.forget()
    dialogue.generator.manual_seed(0)
    dialogue.hear(_docstrings.Turn(">>> b\n", "4\n"))
    assert dialogue.reply(">>> a\n") != first


def test_an_answered_prompt_is_not_left_without_answer(dialogue):
    for seed in range(20):
        dialogue.forget()
        dialogue.generator.manual_seed(seed)
        reply = dialogue.reply(">>> a\n", is_answered=True)
        assert reply and not reply.startswith((">", "\n"))


def test_expressions_are_answered():
    assert converse.is_expression("a + b") and converse.is_expression("print(a)")
    assert not converse.is_expression("a = b") and not converse.is_expression("for a in b:\n    a")


def test_top_k_leaves_the_likeliest():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = {language_model.draw(logits, 5.0, generator, 2) for _ in range(50)}
    assert drawn == {1, 3}
    assert language_model.draw(logits, 0.0, generator) == 1


def test_prompts_may_have_several_lines():
    lines = [">>> a", "b", "", "for x in y:", "...     x", "..."]
    assert [*converse.read_prompts(lines)] == ["a", "b", "", "for x in y:\n    x\n"]


def test_the_last_answer_of_a_session_is_asked_for():
    turns = [_docstrings.Turn(*turn) for turn in (("a", "1"), ("b", ""), ("c", "2"), ("d", ""))]
    assert converse.questions_of([turns], 9) == [(turns[:2], turns[2])]


@pytest.mark.parametrize("content", [None, b"text"])
def test_what_is_no_checkpoint_ends_the_program_with_2(tmp_path, capsys, content):
    path = tmp_path / "model.pt"
    if content:
        path.write_bytes(content)
    assert converse.main(["--talk", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}")


def test_smoke_run_reports_draws_resumes_and_talks(tmp_path, monkeypatch, capsys):
    plot, whole = tmp_path / "plots" / "losses.png", tmp_path / "whole.pt"
    result = run_example("converse.py", "--smoke", "--plot", plot, "--checkpoint", whole)
    assert_reports(result, [contender.name for contender in converse.CONTENDERS])
    for expected in ("perplexity", "exactly right", "chrF", "nearest prompt"):
        assert expected in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert_goes_on_after_a_kill("converse.py", whole, "--smoke")

    typed = "a = 1\n>>> a\n"
    monkeypatch.setattr("sys.stdin", StringIO(typed))
    assert converse.main(["--talk", str(whole)]) == 0
    piped = capsys.readouterr().out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(typed)
    assert converse.main(["--talk", str(whole), "--prompts", str(prompts)]) == 0
    assert capsys.readouterr().out == piped
    assert piped.startswith(">>> a = 1\n") and ">>> a\n" in piped
