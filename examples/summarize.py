"""Finds the sentence that sums up a text: an LSTM below a transformer layer, trained five ways.

    python examples/summarize.py                          # some minutes on two cores
    python examples/summarize.py --packages python numpy  # docstrings of other packages
    python examples/summarize.py --full                   # a larger model, more docstrings

The texts are docstrings: of the standard library, and of packages that come with torch; nothing is
downloaded. A docstring begins with a line that sums it up (PEP 257). The program hides that line
among the other sentences, in random order, and the model has to find it: the label is the author's
own first sentence, and nobody else has judged it. Whole files are held out. Beside the model
stand a guess, the shortest sentence, the one most like the whole text, and logistic regression on
the words of each sentence.

Order tells nothing there. So at the end the model also picks from Python's help topics, where
sentences stand in order, and the sentences to find were picked by hand (help_topics.json); there
it stands beside the first sentence, which is hard to beat.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import torch
from _command import compete, make_parser, parse, run_command, settings_of
from _contenders import five_ways
from _contest import Batch, Contender, Contest, Recipe, Record, Trainee, chunks
from _corpus import DataError, identity
from _docstrings import Docstring, read_docstrings, sentences_of
from _families import split_families
from _report import figures_table, scores_table
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastopt import nn as fast_nn


class Layers(NamedTuple):
    """What a model is made of besides embedding and scores."""

    lstm: Callable[..., nn.Module]
    encoder_layer: Callable[..., nn.Module]


STOCK_LAYERS = Layers(nn.LSTM, nn.TransformerEncoderLayer)
FAST_LAYERS = Layers(fast_nn.LSTM, fast_nn.TransformerEncoderLayer)
CONTENDERS = five_ways("AdamW", "layers", STOCK_LAYERS, FAST_LAYERS)
PADDING, UNKNOWN = "[PAD]", "[UNK]"
PADDING_ID = 0
LEAST_SENTENCES = 3  # two of them would make a guess look good
LEAST_DOCSTRINGS = 100
SHOWN = 4
PICKED_BY_HAND = Path(__file__).with_name("help_topics.json")


@dataclass(frozen=True)
class Settings:
    """One size of the run."""

    recipe: Recipe
    packages: tuple[str, ...] = ("python", "numpy", "networkx", "sympy")
    vocabulary: int = 4_000
    max_sentences: int = 8
    max_tokens: int = 24
    batch_size: int = 32
    embedding_dim: int = 96
    hidden_size: int = 64  # in each direction
    heads: int = 4
    dropout: float = 0.3


DEFAULT = Settings(Recipe(epochs=2, lr=2e-3, weight_decay=0.01, patience=3))
FULL = replace(
    DEFAULT,
    recipe=replace(DEFAULT.recipe, epochs=4, ema_decay=0.998),
    packages=(*DEFAULT.packages, "scipy", "sklearn", "torch"),
    vocabulary=8_000,
    embedding_dim=128,
    hidden_size=128,
)
SMOKE = replace(
    DEFAULT,
    packages=("email", "asyncio", "unittest", "http", "multiprocessing", "tkinter"),
    vocabulary=600,
    max_tokens=16,
    batch_size=16,
    embedding_dim=32,
    hidden_size=16,
    heads=2,
)


class Candidates(NamedTuple):
    """Sentences, one of which sums up the others."""

    sentences: list[str]
    summary: int


class Summarizer(nn.Module):
    """Reads each sentence, compares it with the others, and gives it a score.

    Sentences have no positions: their order is random.
    """

    def __init__(self, settings: Settings, vocabulary: int, layers: Layers) -> None:
        super().__init__()
        features = 2 * settings.hidden_size
        self.embedding = nn.Embedding(vocabulary, settings.embedding_dim, padding_idx=PADDING_ID)
        self.lstm = layers.lstm(
            settings.embedding_dim, settings.hidden_size, batch_first=True, bidirectional=True
        )
        # No dropout in there: either attention would draw a pattern of its own.
        self.layer = layers.encoder_layer(
            features, settings.heads, 2 * features, dropout=0.0, batch_first=True, norm_first=True
        )
        self.score = nn.Linear(features, 1)
        self.dropout = nn.Dropout(settings.dropout)
        with torch.no_grad():
            self.embedding.weight.mul_(0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens [texts, sentences, tokens] to logits [texts, sentences]."""
        there = tokens[:, :, 0].ne(PADDING_ID)
        read = self.read(tokens[there])
        sentences = read.new_zeros(*there.shape, read.size(-1)).masked_scatter(
            there[:, :, None], read
        )
        compared = self.layer(self.dropout(sentences), src_key_padding_mask=~there)
        scores: Tensor = self.score(self.dropout(compared)).squeeze(-1)
        return scores.masked_fill(~there, -torch.inf)

    def read(self, tokens: Tensor) -> Tensor:
        """Maps sentences [sentences, tokens] to the largest states, [sentences, features]."""
        valid = tokens.ne(PADDING_ID)
        words = pack_padded_sequence(
            self.dropout(self.embedding(tokens)), valid.sum(1),
            batch_first=True, enforce_sorted=False,
        )  # fmt: skip
        states, _ = self.lstm(words)
        states, _ = pad_packed_sequence(
            states, batch_first=True, padding_value=-torch.inf, total_length=tokens.size(1)
        )
        return states.amax(1)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(tokens), targets)


def texts_of(
    docstrings: Iterable[Docstring], settings: Settings
) -> tuple[list[Candidates], list[frozenset[str]]]:
    """Docstrings in random order of their sentences, and keys that related ones share.

    Texts of one file are related, and those that have a sentence in common. A summary is kept
    once: overridden methods repeat those of their bases.
    """
    random = np.random.default_rng(settings.recipe.seed)
    texts, keys, summaries = [], [], set()
    for file, docstring in docstrings:
        sentences = list(dict.fromkeys(sentences_of(docstring)))[: settings.max_sentences]
        if len(sentences) < LEAST_SENTENCES or identity(sentences[0]) in summaries:
            continue
        summaries.add(identity(sentences[0]))
        order = random.permutation(len(sentences)).tolist()
        texts.append(Candidates([sentences[i] for i in order], order.index(0)))
        keys.append(frozenset({file, *map(identity, sentences)}))
    return texts, keys


def picked_texts(settings: Settings) -> list[Candidates]:
    """The beginnings of help topics in their order, with the sentence that was picked by hand."""
    texts = []
    for name, picked in json.loads(PICKED_BY_HAND.read_text(encoding="utf-8")).items():
        sentences = sentences_of(topics[name])[: settings.max_sentences]
        found = [n for n, sentence in enumerate(sentences) if sentence.startswith(picked)]
        if found:  # another version of Python may have other words
            texts.append(Candidates(sentences, found[0]))
    return texts


def train_tokenizer(texts: Iterable[Candidates], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PADDING, UNKNOWN],
        show_progress=False,
    )
    tokenizer.train_from_iterator((s for text in texts for s in text.sentences), trainer)
    return tokenizer


class EncodedTexts:
    """Tokens of one part, [texts, sentences, tokens], handed out in batches."""

    def __init__(
        self, texts: Sequence[Candidates], tokenizer: Tokenizer, settings: Settings
    ) -> None:
        self.texts = texts
        shape = len(texts), settings.max_sentences, settings.max_tokens
        self.tokens = torch.full(shape, PADDING_ID)
        self.targets = torch.tensor([text.summary for text in texts])
        for row, text in enumerate(texts):
            for column, encoding in enumerate(tokenizer.encode_batch(text.sentences)):
                ids = encoding.ids[: settings.max_tokens]
                self.tokens[row, column, : len(ids)] = torch.tensor(ids)

    def batches(self, order: NDArray[np.int64], size: int) -> list[Batch]:
        return [Batch(self.tokens[rows], self.targets[rows]) for rows in chunks(order, size)]

    def ordered(self, size: int) -> list[Batch]:
        return self.batches(np.arange(len(self.texts)), size)


class Task(NamedTuple):
    """Everything the contenders share."""

    tokenizer: Tokenizer
    train: EncodedTexts
    validation: EncodedTexts
    test: EncodedTexts
    picked: EncodedTexts


def prepare(docstrings: Sequence[Docstring], settings: Settings) -> Task:
    """Splits and encodes.

    Raises:
        DataError: There are too few docstrings of some length.
    """
    texts, keys = texts_of(docstrings, settings)
    if len(texts) < LEAST_DOCSTRINGS:
        raise DataError(
            f"{len(texts)} docstrings of {LEAST_SENTENCES} sentences, {LEAST_DOCSTRINGS} are needed"
        )
    parts = [[texts[i] for i in part] for part in split_families(keys, settings.recipe.seed)]
    # The tokenizer is fitted as the weights are: on the training part only.
    tokenizer = train_tokenizer(parts[0], settings.vocabulary)
    parts.append(picked_texts(settings))
    return Task(tokenizer, *(EncodedTexts(part, tokenizer, settings) for part in parts))


def contest_of(task: Task, settings: Settings) -> Contest:
    def make_model(contender: Contender) -> Summarizer:
        return Summarizer(settings, task.tokenizer.get_vocab_size(), contender.part)

    def batches_of(epoch: int) -> list[Batch]:
        random = np.random.default_rng((settings.recipe.seed, epoch))
        return task.train.batches(random.permutation(len(task.train.texts)), settings.batch_size)

    validation = task.validation.ordered(settings.batch_size)
    origin = asdict(settings) | {"tokenizer": task.tokenizer.to_str()}
    steps = -(-len(task.train.texts) // settings.batch_size)
    return Contest(settings.recipe, make_model, batches_of, steps, validation, origin, "texts")


def chosen_by_model(trainee: Trainee, texts: EncodedTexts, settings: Settings) -> list[int]:
    logits = trainee.predict(texts.ordered(settings.batch_size))
    chosen: list[int] = logits.argmax(1).tolist()
    return chosen


def other_choices(train: Sequence[Candidates]) -> dict[str, Callable[[Candidates], int]]:
    """What takes no neural network."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    words = vectorizer.fit_transform([s for text in train for s in text.sentences])
    labels = [n == text.summary for text in train for n in range(len(text.sentences))]
    regression = LogisticRegression(C=3.0, max_iter=300).fit(words, labels)

    def most_central(text: Candidates) -> int:
        own = vectorizer.transform(text.sentences)
        return int(np.asarray(own @ own.sum(0).T).argmax())

    def likeliest(text: Candidates) -> int:
        scores = regression.decision_function(vectorizer.transform(text.sentences))
        return int(scores.argmax())

    return {
        "first sentence": lambda text: 0,
        "shortest sentence": lambda text: int(np.argmin([*map(len, text.sentences)])),
        "most like the text, tf-idf": most_central,
        "logistic regression, tf-idf": likeliest,
    }


def sentence_f1(chosen: Sequence[int], texts: Sequence[Candidates]) -> float:
    """One sentence is chosen and one is right, so that F1 is the share of texts got right."""
    return float(f1_score([text.summary for text in texts], chosen, average="micro"))


def word_f1(chosen: Sequence[int], texts: Sequence[Candidates]) -> float:
    """The mean F1 of the words of what is chosen, against those of the summary."""
    gold = [text.sentences[text.summary] for text in texts]
    own = [text.sentences[n] for text, n in zip(texts, chosen, strict=True)]
    words = CountVectorizer(binary=True, token_pattern=r"\w+").fit(gold + own)
    return float(f1_score(words.transform(gold), words.transform(own), average="samples"))


def quality_table(
    title: str,
    chosen: dict[str, list[int]],
    texts: Sequence[Candidates],
    records: dict[str, Record],
) -> Table:
    scores = {
        name: (f"{sentence_f1(numbers, texts):.3f}", f"{word_f1(numbers, texts):.3f}")
        for name, numbers in chosen.items()
    }
    return scores_table(title, ("sentence F1", "word F1"), scores, records)


def data_table(task: Task) -> Table:
    table = figures_table("Data", "texts", "count", "sentences")
    for name in ("train", "validation", "test", "picked"):
        texts = getattr(task, name).texts
        table.add_row(name, f"{len(texts):,}", f"{sum(len(t.sentences) for t in texts):,}")
    return table


def examples_table(chosen: Sequence[int], texts: Sequence[Candidates]) -> Table:
    """Evenly spaced over the test part."""
    table = Table("sentences", "", title="Summaries in the test split", title_justify="left")
    for i in np.linspace(0, len(texts) - 1, SHOWN).astype(int):
        for number, sentence in enumerate(texts[i].sentences):
            roles = [
                *(["chosen"] if number == chosen[i] else []),
                *(["summary"] if number == texts[i].summary else []),
            ]
            table.add_row(Text(sentence), ", ".join(roles))
        table.add_section()
    return table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, Path("build/summarize.png"))
    parser.add_argument(
        "--packages", nargs="+", metavar="NAME", help="installed; python is the standard library"
    )
    return parse(parser, arguments)


def run(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    settings: Settings = settings_of(options, DEFAULT, FULL, SMOKE)
    settings = replace(settings, packages=tuple(options.packages or settings.packages))
    task = prepare(read_docstrings(settings.packages), settings)
    console.print(data_table(task))

    trainees, records = compete(contest_of(task, settings), CONTENDERS, options, console)

    others = other_choices(task.train.texts)
    for title, part in (
        ("Test split: which sentence was the summary?", task.test),
        ("Help topics, picked by hand", task.picked),
    ):
        chosen = {name: chosen_by_model(t, part, settings) for name, t in trainees.items()}
        chosen |= {name: [*map(choose, part.texts)] for name, choose in others.items()}
        console.print(quality_table(title, chosen, part.texts, records))
        if part is task.test:
            console.print(examples_table(chosen["fastopt"], part.texts))

    return records


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(run, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
