"""Tags words with their parts of speech: a bidirectional LSTM trained five ways.

    python examples/tag_words.py           # some minutes on two cores
    python examples/tag_words.py --full    # a larger LSTM for longer

The sentences are the simplified Chinese messages of Django's wheel; nothing is downloaded. Nobody
tagged them by hand: words and tags are those of jieba's tagger, so the labels are silver. What is
measured is how well the LSTM learns jieba from 600 messages, not how well it knows Chinese. A tag
is the first letter of jieba's, which names the family: n for nouns, v for verbs.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jieba
import numpy as np
import torch
from _command import compete, make_parser, parse, run_command, settings_of
from _contenders import CONTENDERS
from _contest import Batch, Contender, Contest, Recipe, Record, Trainee, chunks
from _corpus import FOLDS, Corpus, Example, Split, read_catalogues, split_by
from _report import corpus_table, quality_table
from jieba import posseg
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence, unpack_sequence

LANGUAGE = "zh_Hans"
FOREIGN = "eng"  # the only tag of jieba's whose first letter names no family
PADDING_ID, UNKNOWN_ID = 0, 1
LEAST = 2  # times that a piece occurs, else it is unknown
EVALUATION_BATCH = 256
SHOWN = 5  # sentences


@dataclass(frozen=True)
class Settings:
    """One size of the run."""

    recipe: Recipe
    batch_size: int = 16
    embedding_dim: int = 128
    hidden_size: int = 128
    dropout: float = 0.5


DEFAULT = Settings(Recipe(epochs=20, lr=3e-3, weight_decay=1e-5, patience=20))
FULL = replace(
    DEFAULT,
    recipe=replace(DEFAULT.recipe, epochs=40, lr=1e-3),
    hidden_size=256,
)
SMOKE = replace(
    DEFAULT,
    recipe=replace(DEFAULT.recipe, epochs=2),
    batch_size=32,
    embedding_dim=32,
    hidden_size=32,
)


class Sentence(NamedTuple):
    words: list[str]
    tags: list[str]


def tagged(examples: Iterable[Example]) -> list[Sentence]:
    """The words and tags that jieba sees; spaces are no words."""
    jieba.setLogLevel(logging.WARNING)
    sentences = []
    for example in examples:
        found = [(word, flag) for word, flag in posseg.cut(example.text) if word.strip()]
        tags = [flag if flag == FOREIGN else flag[0] for _, flag in found]
        sentences.append(Sentence([word for word, _ in found], tags))
    return sentences


def split(corpus: Corpus, seed: int) -> Split:
    """80/10/10; translations of one source are in one part only."""
    groups = [example.group for example in corpus.examples]
    folder = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    return split_by(corpus.examples, [fold for _, fold in folder.split(groups, groups=groups)])


class Tagger(nn.Module):
    """A bidirectional LSTM over words, where a word is the mean of its pieces' embeddings."""

    def __init__(
        self, settings: Settings, pieces: int, tags: int, lstm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        width, hidden = settings.embedding_dim, settings.hidden_size
        self.embedding = nn.EmbeddingBag(pieces, width, mode="mean", padding_idx=PADDING_ID)
        self.lstm = lstm(width, hidden, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, tags)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, sentences: PackedSequence) -> Tensor:
        """Maps packed pieces [words, pieces] to logits [words, tags], packed alike."""
        words = self.dropout(self.embedding(sentences.data))
        states, _ = self.lstm(sentences._replace(data=words))
        logits: Tensor = self.linear(self.dropout(states.data))
        return logits

    def loss(self, sentences: PackedSequence, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(sentences), targets)


def pieces_of(word: str) -> list[str]:
    """The word itself, its characters, and once more those at its ends."""
    return [f"<{word}>", f"<{word[0]}", f"{word[-1]}>", *word]


class TaggedPart:
    """Pieces and tags of one part of the split as numbers, handed out in packed batches."""

    def __init__(
        self, sentences: Sequence[Sentence], pieces: Mapping[str, int], tags: Sequence[str]
    ) -> None:
        self.sentences = sentences
        words = sorted({word for s in sentences for word in s.words})
        ids = pad_sequence([ids_of(word, pieces) for word in words], True, PADDING_ID)
        rows = {word: row for row, word in enumerate(words)}
        numbers = {tag: number for number, tag in enumerate(tags)}
        self.words = [ids[[rows[word] for word in s.words]] for s in sentences]
        self.tags = [torch.tensor([numbers[tag] for tag in s.tags]) for s in sentences]

    def batches(self, order: Iterable[int], size: int) -> list[Batch]:
        return [
            Batch(
                pack_sequence([self.words[i] for i in rows], enforce_sorted=False),
                pack_sequence([self.tags[i] for i in rows], enforce_sorted=False).data,
            )
            for rows in chunks(order, size)
        ]

    def ordered(self) -> list[Batch]:
        return self.batches(range(len(self.sentences)), EVALUATION_BATCH)


def ids_of(word: str, pieces: Mapping[str, int]) -> Tensor:
    known = [pieces[piece] for piece in pieces_of(word) if piece in pieces]
    return torch.tensor(known or [UNKNOWN_ID])


class Task(NamedTuple):
    """Everything the contenders share."""

    pieces: dict[str, int]
    tags: list[str]
    train: TaggedPart
    validation: TaggedPart
    test: TaggedPart


def prepare(parts: Split) -> Task:
    """Pieces are those of the training part only."""
    in_parts = [tagged(part) for part in parts]
    counts = Counter(p for s in in_parts[0] for word in s.words for p in pieces_of(word))
    frequent = sorted(piece for piece, count in counts.items() if count >= LEAST)
    pieces = {piece: number for number, piece in enumerate(frequent, start=UNKNOWN_ID + 1)}
    tags = sorted({tag for sentences in in_parts for s in sentences for tag in s.tags})
    return Task(pieces, tags, *(TaggedPart(sentences, pieces, tags) for sentences in in_parts))


def contest_of(task: Task, settings: Settings) -> Contest:
    def make_model(contender: Contender) -> Tagger:
        pieces = UNKNOWN_ID + 1 + len(task.pieces)
        return Tagger(settings, pieces, len(task.tags), contender.part)

    def batches_of(epoch: int) -> list[Batch]:
        random = np.random.default_rng((settings.recipe.seed, epoch))
        order = random.permutation(len(task.train.sentences))
        return task.train.batches(order.tolist(), settings.batch_size)

    return Contest(
        settings.recipe,
        make_model,
        batches_of,
        steps_per_epoch=math.ceil(len(task.train.sentences) / settings.batch_size),
        validation=task.validation.ordered(),
        origin=asdict(settings) | {"pieces": task.pieces, "tags": task.tags},
        unit="words",
    )


def predicted_tags(trainee: Trainee, part: TaggedPart) -> list[list[int]]:
    """What the best model of a contender says of each sentence."""
    sentences: list[list[int]] = []
    for batch in part.ordered():
        tags = trainee.predict([batch]).argmax(1)
        sentences += [one.tolist() for one in unpack_sequence(batch.inputs._replace(data=tags))]
    return sentences


def most_frequent_tags(task: Task) -> list[list[int]]:
    """The tag that a word has most often, else the one that most words have."""
    tags_of: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for sentence, tags in zip(task.train.sentences, task.train.tags, strict=True):
        for word, number in zip(sentence.words, tags.tolist(), strict=True):
            tags_of[word][number] += 1
    usual = sum(tags_of.values(), Counter())
    return [
        [tags_of.get(word, usual).most_common(1)[0][0] for word in sentence.words]
        for sentence in task.test.sentences
    ]


def linear_tags(task: Task) -> list[list[int]]:
    """What logistic regression on the pieces of a word and of its neighbours says."""

    def features(part: TaggedPart) -> list[dict[str, int]]:
        return [
            {f"{distance} {piece}": 1 for distance, near in around(s.words, i)
             for piece in pieces_of(near)}
            for s in part.sentences
            for i in range(len(s.words))
        ]  # fmt: skip

    regression = make_pipeline(DictVectorizer(), LogisticRegression(C=10.0, max_iter=300))
    regression.fit(features(task.train), np.concatenate(task.train.tags))
    answers = iter(regression.predict(features(task.test)).tolist())
    return [list(islice(answers, len(s.words))) for s in task.test.sentences]


def around(words: Sequence[str], place: int) -> Iterator[tuple[int, str]]:
    for distance in (-1, 0, 1):
        if 0 <= place + distance < len(words):
            yield distance, words[place + distance]


BASELINES = {
    "most frequent tag of each word": most_frequent_tags,
    "logistic regression on words and neighbours": linear_tags,
}


def tagged_table(task: Task, answers: Sequence[Sequence[int]]) -> Table:
    """The first sentences of some length; a tag that jieba gives another way is red."""
    table = Table(title="fastopt tags (red: jieba's tag is in brackets)", title_justify="left")
    table.add_column("sentence", overflow="fold")
    both = zip(task.test.sentences, answers, strict=True)
    long = ((sentence, tags) for sentence, tags in both if 6 <= len(sentence.words) <= 16)
    for sentence, tags in islice(long, SHOWN):
        line = Text()
        for word, label, number in zip(*sentence, tags, strict=True):
            given = task.tags[number]
            line.append(word)
            if given == label:
                line.append(f"/{given} ", style="green")
            else:
                line.append(f"/{given} ({label}) ", style="bold red")
        table.add_row(line)
    return table


def run(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    settings = settings_of(options, DEFAULT, FULL, SMOKE)
    corpus = read_catalogues(LANGUAGE)
    parts = split(corpus, options.seed)
    task = prepare(parts)
    console.print(corpus_table(corpus, parts))
    words = sum(map(len, task.train.tags))
    console.print(f"{words:,} words to train on; silver labels: {len(task.tags)} tags by jieba")

    trainees, records = compete(contest_of(task, settings), CONTENDERS, options, console)

    answers = {name: predicted_tags(trainee, task.test) for name, trainee in trainees.items()}
    answers |= {name: baseline(task) for name, baseline in BASELINES.items()}
    flat = {name: np.concatenate(sentences) for name, sentences in answers.items()}
    console.print(
        quality_table(flat, np.concatenate(task.test.tags), records),
        tagged_table(task, answers["fastopt"]),
    )

    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, Path("build/tag_words.png"))
    return run_command(run, parse(parser, arguments))


if __name__ == "__main__":
    sys.exit(main())
