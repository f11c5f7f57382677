"""The tagging example: its parts, its baselines, and a short run that is killed and goes on."""

import pytest
import torch
from torch.nn.utils.rnn import unpack_sequence

from examples import assert_goes_on_after_a_kill, assert_reports, run_example

pytest.importorskip("jieba")

import tag_words  # isort: skip


@pytest.fixture(scope="module")
def parts():
    return tag_words.split(tag_words.read_catalogues(tag_words.LANGUAGE), seed=0)


@pytest.fixture(scope="module")
def task(parts):
    return tag_words.prepare(parts)


def test_no_source_is_in_two_parts(parts):
    groups = [{example.group for example in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_words_have_a_tag_each_and_are_the_text_without_spaces(parts, task):
    for example, sentence in zip(parts.test, task.test.sentences, strict=True):
        assert len(sentence.words) == len(sentence.tags)
        assert "".join(sentence.words) == "".join(example.text.split())


def test_a_batch_keeps_words_and_tags_together(task):
    (batch,) = task.test.batches(range(40), 40)
    tags = unpack_sequence(batch.inputs._replace(data=batch.targets))
    assert all(map(torch.equal, tags, task.test.tags[:40]))
    assert all(map(torch.equal, unpack_sequence(batch.inputs), task.test.words[:40]))


def test_a_word_has_the_tag_that_it_had_most_often(task):
    answers = tag_words.most_frequent_tags(task)
    named = {
        word: task.tags[number]
        for sentence, numbers in zip(task.test.sentences, answers, strict=True)
        for word, number in zip(sentence.words, numbers, strict=True)
    }
    assert named["的"] == "u" and named["。"] == "x"


def test_smoke_run_reports_draws_and_goes_on_after_a_kill(tmp_path):
    plot, checkpoint = tmp_path / "losses.png", tmp_path / "whole.pt"
    result = run_example("tag_words.py", "--smoke", "--plot", plot, "--checkpoint", checkpoint)
    contenders = ["stock", "stock, fused", "fastopt optimizer", "fastopt LSTM", "fastopt"]
    assert_reports(result, contenders)
    for expected in ("silver labels", "macro F1", *tag_words.BASELINES):
        assert expected in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert_goes_on_after_a_kill("tag_words.py", checkpoint, "--smoke")
