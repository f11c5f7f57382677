"""The language identification example: its split, its errors and a short run."""

from collections import defaultdict
from functools import partial
from itertools import chain

import pytest
import torch

from examples import assert_reports, run_example
from fastopt import optim
from tolerances import assert_matches

import _contest  # isort: skip
import _corpus  # isort: skip
import _report  # isort: skip
import _tail  # isort: skip


@pytest.fixture(scope="module")
def corpus():
    return _corpus.read_catalogues()


@pytest.fixture(scope="module")
def parts(corpus):
    return _corpus.split(corpus.examples, seed=0)


def test_corpus_is_clean(corpus):
    texts = [_corpus.identity(example.text) for example in corpus.examples]
    assert len(texts) == len(set(texts)) > 40_000
    assert len(_corpus.label_names(corpus.examples)) > 90
    assert not any("%(" in text or "%s" in text or "</" in text for text in texts)
    assert corpus.read == len(texts) + sum(corpus.dropped.values())


@pytest.mark.parametrize("shared", ["group", "text"])
def test_split_leaks_nothing(parts, shared):
    parts_of = defaultdict(set)
    for name, examples in parts._asdict().items():
        for example in examples:
            parts_of[_corpus.identity(getattr(example, shared))].add(name)
    assert all(len(names) == 1 for names in parts_of.values())


def test_split_keeps_every_example_and_every_label(corpus, parts):
    assert sorted(chain(*parts)) == sorted(corpus.examples)
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert len(part) == pytest.approx(share * len(corpus.examples), rel=0.1)
        assert _corpus.label_names(part) == _corpus.label_names(corpus.examples)


def test_split_depends_on_the_seed_only(corpus, parts):
    assert _corpus.split(corpus.examples, seed=0) == parts
    assert _corpus.split(corpus.examples, seed=1) != parts


MALFORMED = {
    "missing column": (b"text,language\nhello,en\n", "line 1"),
    "empty file": (b"", "line 1"),
    "empty label": (b"text,label\nhello,en\nworld, \n", "line 3"),
    "too few fields": (b"text,label\nhello,en\n\nworld\n", "line 4"),
    "too many fields": (b"text,label\nhello, you,en\n", "line 2"),
    "after a quoted newline": (b'text,label\n"two\nlines",en\nworld\n', "line 4"),
    "open quote": (b'text,label\nhello,en\n"world,en\n', "line 3"),
    "not UTF-8": (b"text,label\nhello,en\ncaf\xe9,fr\n", "line 3"),
}


@pytest.mark.parametrize(("content", "line"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_csv_names_the_line(tmp_path, content, line):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(_corpus.DataError, match=f"data.csv, {line}:"):
        _corpus.read_csv(path)


def test_csv_is_read_by_its_header(tmp_path):
    path = tmp_path / "data.csv"
    rows = [f'{label},"text {i},\n of {label}"' for label in ("a", "b") for i in range(10)]
    path.write_text("\ufefflabel,text\n" + "\n".join(rows), encoding="utf-8")
    corpus = _corpus.read_csv(path)
    assert corpus.examples[0].text == "text 0, of a"
    assert _corpus.label_names(corpus.examples) == ["a", "b"]
    assert len(corpus.examples) == 20


def test_tails_agree_and_go_on_from_their_state():
    evaluated = []
    for tail_type, optimizer in (
        (_tail.StockTail, torch.optim.Adam),
        (_tail.FusedTail, optim.Adam),
    ):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        make_tail = partial(
            tail_type,
            model,
            partial(optimizer, [*model.parameters()]),
            max_grad_norm=0.1,
            ema_decay=0.5,
        )
        tail = make_tail()
        for _ in range(4):
            model(torch.ones(1, 8)).square().sum().backward()
            tail.step()
            resumed = make_tail()
            resumed.load_state_dict(tail.state_dict())
            tail = resumed
        with tail.evaluated() as averaged:
            evaluated.append(averaged.weight.detach().clone())
        assert not torch.equal(evaluated[-1], model.weight)
    assert_matches(evaluated[1], evaluated[0], op="optimizer", dtype=torch.float32)


def test_epochs_are_held_to_the_fastest_of_stock():
    def record(seconds):
        return _contest.Record([1.0] * 4, [seconds] * 4, [0.1] * 4, [2, 4], [1.0, 1.0])

    records = {"stock": record(3.0), "fused": record(2.0), "ours": record(1.0)}
    table = _report.timing_table(records, ("stock", "fused"))
    (ratios,) = [list(c.cells) for c in table.columns if c.header == "epoch ratio"]
    assert ratios == ["0.67", "1.00", "2.00"]


def test_malformed_csv_ends_the_program_with_2(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\nhello,en\nworld\n")
    result = run_example("classify_text.py", "--data", path)
    assert result.returncode == 2
    assert result.stderr.strip() == f"error: {path}, line 3: expected 2 fields, found 1"


def test_smoke_run_reports_and_draws(tmp_path):
    plot = tmp_path / "plots" / "losses.png"
    result = run_example(
        "classify_text.py", "--smoke", "--plot", plot, "--checkpoint", tmp_path / "checkpoint.pt"
    )
    contenders = ["stock", "stock, fused", "fastopt optimizer", "fastopt LSTM", "fastopt"]
    assert_reports(result, contenders)
    for expected in ("macro F1", "logistic regression", "epoch ratio"):
        assert expected in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoint.pt").stat().st_size > 0
