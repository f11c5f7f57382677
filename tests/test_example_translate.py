"""The translation example: its placeholders, its split, its model and a short run."""

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch

from examples import assert_goes_on_after_a_kill, assert_reports, run_example
from tolerances import assert_matches

pytest.importorskip("sacrebleu")

import _contest  # isort: skip
import _corpus  # isort: skip
import _families  # isort: skip
import _messages  # isort: skip
import translate  # isort: skip

SETTINGS = replace(translate.SMOKE, dropout=0.0)


@pytest.fixture(scope="module")
def messages():
    return _messages.read_messages(("django",), "fr", seed=0)


@pytest.fixture(scope="module")
def task(messages):
    return translate.prepare(messages, SETTINGS)


def test_items_that_share_a_key_are_of_one_family():
    families = _families.families_of([{"a"}, {"b"}, {"a", "c"}, {"d"}, {"c"}])
    assert families[0] == families[2] == families[4]
    assert len({*families.tolist()}) == 3


def test_parts_share_no_family_and_nothing_is_lost():
    keys = [{str(n // 3)} for n in range(300)]
    parts = _families.split_families(keys, seed=0)
    assert sorted(chain(*parts)) == [*range(300)]
    assert [len(part) for part in parts[1:]] == pytest.approx([30, 30], abs=3)
    for one, other in combinations(parts, 2):
        assert not {n // 3 for n in one} & {n // 3 for n in other}
    again = _families.split_families(keys, seed=0)
    assert all((one == other).all() for one, other in zip(parts, again, strict=True))


def test_no_message_and_no_translation_is_in_two_parts(messages):
    parts = messages.train, messages.validation, messages.test
    assert all(parts)
    for one, other in combinations(parts, 2):
        assert not {*chain(*(p.keys for p in one))} & {*chain(*(p.keys for p in other))}
    assert messages.read == sum(map(len, parts)) + sum(messages.dropped.values())


def test_slots_stand_for_placeholders():
    pair = _messages.pair_of("%(name)s has <b>%d</b> files", "%d fichiers : <b>%(name)s</b>")
    assert pair.source == "<0> has <1><2><3> files"
    assert pair.target == "<2> fichiers : <1><0><3>"
    restored = _messages.restored(pair.target, pair.placeholders)
    assert restored == "%d fichiers : <b>%(name)s</b>"


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("%s", "%s !", "no letters"),
        ("Admin", "admin", "same as the English source"),
        ("A file", "%s fichiers", "placeholder that the source lacks"),
        ("A %s", "%s ou %s", "placeholder that the source lacks"),
        ("A" + " %s" * 9, "Un", "many placeholders"),
    ],
)
def test_useless_pairs_say_why(source, target, reason):
    assert _messages.pair_of(source, target) == reason


@pytest.mark.parametrize(
    ("packages", "language", "text"),
    [(("nonesuch",), "fr", "no such package"), (("django",), "xx", "0 translations to 'xx'")],
)
def test_missing_catalogues_are_named(packages, language, text):
    with pytest.raises(_corpus.DataError, match=text):
        _messages.read_messages(packages, language, seed=0)


def test_slots_are_whole_and_tokens_are_the_text_again(task):
    text = "Ensure that <0> is at most <1>, not élève."
    (tokens,) = translate.encode(task.tokenizer, [text], 99)
    assert task.tokenizer.token_to_id("<0>") in tokens
    assert task.tokenizer.decode(tokens, skip_special_tokens=False).strip() == text


@pytest.mark.parametrize("parts", [translate.STOCK_PARTS, translate.FAST_PARTS])
def test_padding_changes_no_logits(parts, task):
    torch.manual_seed(0)
    model = translate.Translator(SETTINGS, task.tokenizer.get_vocab_size(), parts).eval()
    source, written = [[5, 6, 7], [8]], [[translate.START_ID, 9], [translate.START_ID, 4, 5, 6]]
    with torch.no_grad():
        pair = torch.stack([translate.padded(source, 4), translate.padded(written, 4)])
        together = model(pair).split([2, 4])
        for row in range(2):
            width = max(len(source[row]), len(written[row]))
            alone = [translate.padded([rows[row]], width) for rows in (source, written)]
            expected = model(torch.stack(alone))
            assert_matches(together[row], expected, op="lstm", dtype=torch.float32)


def test_the_model_learns_to_translate(task):
    torch.manual_seed(0)
    settings = replace(SETTINGS, hidden_size=64, width=64, label_smoothing=0.0)
    size = task.tokenizer.get_vocab_size()
    model = translate.Translator(settings, size, translate.FAST_PARTS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch: _contest.Batch = task.train.ordered(4)[0]
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(*batch).backward()
        optimizer.step()
    rows = task.train.by_length[:4].tolist()
    written = model.translate(batch.inputs[0], 20)
    assert written == [task.train.targets[row] for row in rows]


def test_smoke_run_reports_draws_and_resumes(tmp_path):
    plot, whole = tmp_path / "plots" / "losses.png", tmp_path / "whole.pt"
    result = run_example("translate.py", "--smoke", "--plot", plot, "--checkpoint", whole)
    assert_reports(result, [contender.name for contender in translate.CONTENDERS])
    for expected in ("BLEU", "chrF", "translation memory", "all placeholders", "reference"):
        assert expected in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert_goes_on_after_a_kill("translate.py", whole, "--smoke")
