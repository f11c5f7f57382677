"""The summary example: its sentences, its split, its model and a short run."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from examples import assert_goes_on_after_a_kill, assert_reports, run_example
from tolerances import assert_matches

import _corpus  # isort: skip
import _docstrings  # isort: skip
import summarize  # isort: skip

DOCSTRING = """Sum numbers up.

They are added in order. Nothing is rounded in
between, e.g. to integers.

    an_indented(paragraph)

>>> add(1, 2)
3
>>> for n in range(2):
...     print(n)
0
1

Returns
-------
The sum of the numbers.
"""


def test_sentences_are_the_prose():
    assert _docstrings.sentences_of(DOCSTRING) == [
        "Sum numbers up",
        "They are added in order",
        "Nothing is rounded in between, e.g. to integers",
    ]


def test_turns_are_what_python_shows():
    assert _docstrings.turns_of(DOCSTRING) == [
        (">>> add(1, 2)\n", "3\n"),
        (">>> for n in range(2):\n...     print(n)\n", "0\n1\n"),
    ]
    assert _docstrings.turns_of(">>> a\n  >>>b") == []


def test_docstrings_are_read_once_and_without_tests():
    found = _docstrings.read_docstrings(("json", "email", "json"))
    assert len({docstring.text for docstring in found}) == len(found) > 50
    assert any(docstring.text.startswith("Serialize ``obj``") for docstring in found)
    sessions = _docstrings.read_docstrings(("json",), containing=">>> ")
    assert 0 < len(sessions) < len(found) and all(">>> " in d.text for d in sessions)
    with pytest.raises(_corpus.DataError, match="nonesuch: no such package"):
        _docstrings.read_docstrings(("nonesuch",))


@pytest.fixture(scope="module")
def task():
    return summarize.prepare(_docstrings.read_docstrings(summarize.SMOKE.packages), summarize.SMOKE)


def test_no_summary_and_no_sentence_is_in_two_parts(task):
    parts = [
        {_corpus.identity(s) for text in part.texts for s in text.sentences}
        for part in (task.train, task.validation, task.test)
    ]
    assert all(parts)
    assert not any(one & other for one, other in combinations(parts, 2))


def test_order_tells_nothing(task):
    places = torch.bincount(task.train.targets)
    assert len(places) > 3 and places.max() < 0.5 * places.sum()


def test_hand_picked_sentences_are_found():
    texts = summarize.picked_texts(summarize.DEFAULT)
    assert all(0 <= text.summary < len(text.sentences) <= 8 for text in texts)


@pytest.mark.parametrize("layers", [summarize.STOCK_LAYERS, summarize.FAST_LAYERS])
def test_neither_padding_nor_order_changes_scores(layers):
    torch.manual_seed(0)
    settings = replace(summarize.SMOKE, dropout=0.0)
    model = summarize.Summarizer(settings, 50, layers).eval()
    tokens = torch.zeros(2, 4, 6, dtype=torch.int64)
    tokens[0, :3, :5] = torch.randint(2, 50, (3, 5))
    tokens[1, :4, :6] = torch.randint(2, 50, (4, 6))
    with torch.no_grad():
        scores = model(tokens)
        alone = model(tokens[:1, [2, 0, 1], :5])
    assert scores[0, 3] == -torch.inf
    assert_matches(alone[0], scores[0, [2, 0, 1]], op="lstm", dtype=torch.float32)


def test_f1_of_sentences_and_of_words():
    texts = [summarize.Candidates(["one two", "two three"], 0), summarize.Candidates(["a b"], 0)]
    assert summarize.sentence_f1([0, 0], texts) == summarize.word_f1([0, 0], texts) == 1
    assert summarize.sentence_f1([1, 0], texts) == 0.5
    assert summarize.word_f1([1, 0], texts) == pytest.approx(0.75)


def test_too_few_docstrings_are_refused():
    with pytest.raises(_corpus.DataError, match="docstrings of 3 sentences, 100 are needed"):
        summarize.prepare([_docstrings.Docstring("file", DOCSTRING)], summarize.SMOKE)


def test_smoke_run_reports_draws_and_resumes(tmp_path):
    plot, whole = tmp_path / "plots" / "losses.png", tmp_path / "whole.pt"
    result = run_example("summarize.py", "--smoke", "--plot", plot, "--checkpoint", whole)
    assert_reports(result, [contender.name for contender in summarize.CONTENDERS])
    for expected in ("sentence F1", "word F1", "shortest sentence", "logistic regression"):
        assert expected in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert_goes_on_after_a_kill("summarize.py", whole, "--smoke")
