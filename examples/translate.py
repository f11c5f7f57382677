"""Translates the messages of programs: an LSTM encoder-decoder with attention, five ways.

    python examples/translate.py                       # English to French, minutes on two cores
    python examples/translate.py --language de         # to another language of the catalogues
    python examples/translate.py --packages django     # catalogues of other installed packages
    python examples/translate.py --full                # a larger model, trained for longer

The data are the message catalogues in the wheels of Django, django-allauth and Sphinx; nothing is
downloaded. Stock as most people write it, stock at its best, fastopt's AdamW, fastopt's layers and
both, with fastopt's last layer, see the same batches in turns. Beside them stands a translation
memory: the translation of the most similar message that was trained on.

There are some two thousand messages, which is little: sentences like those it has seen come out
well, a word that none of them has cannot be known, and the memory is ahead by BLEU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _command import compete, make_parser, parse, run_command, settings_of
from _contenders import five_ways
from _contest import Batch, Contender, Contest, Recipe, Record, chunks
from _messages import SLOTS, Messages, Pair, read_messages, restored
from _report import figures_table, scores_table
from _tokenizer import train_byte_pairs
from language_model import stock_loss
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sacrebleu import corpus_bleu, corpus_chrf
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as stock_attention
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastopt import nn as fast_nn
from fastopt.nn.functional import linear_cross_entropy
from fastopt.nn.functional import scaled_dot_product_attention as fast_attention


class Parts(NamedTuple):
    """What a model is made of besides torch's layers."""

    lstm: Callable[..., nn.Module]
    attention: Callable[..., Tensor]
    loss: Callable[..., Tensor]  # of states, weight, targets and label_smoothing


STOCK_PARTS = Parts(nn.LSTM, stock_attention, stock_loss)
LAYERS_ALONE = Parts(fast_nn.LSTM, fast_attention, stock_loss)
FAST_PARTS = Parts(fast_nn.LSTM, fast_attention, linear_cross_entropy)
CONTENDERS = five_ways("AdamW", "layers", STOCK_PARTS, LAYERS_ALONE, FAST_PARTS)
MEMORY = "translation memory"
PADDING, START, END = "[PAD]", "[START]", "[END]"
PADDING_ID, START_ID, END_ID = range(3)
SHOWN = 6  # translations at the end


@dataclass(frozen=True)
class Settings:
    """One size of the run."""

    recipe: Recipe
    packages: tuple[str, ...] = ("django", "allauth", "sphinx")
    language: str = "fr"
    vocabulary: int = 2_000
    batch_size: int = 32
    width: int = 192
    hidden_size: int = 256
    heads: int = 4
    dropout: float = 0.4
    label_smoothing: float = 0.1
    longest: int = 64  # tokens of a message


DEFAULT = Settings(Recipe(epochs=20, lr=3e-3, weight_decay=0.01, patience=6))
FULL = replace(
    DEFAULT,
    recipe=replace(DEFAULT.recipe, epochs=50, lr=2e-3, ema_decay=0.995, patience=12),
    width=256,
    hidden_size=512,
)
SMOKE = replace(
    DEFAULT,
    recipe=replace(DEFAULT.recipe, epochs=2),
    packages=("django",),
    vocabulary=600,
    width=32,
    hidden_size=32,
    heads=2,
)


class Memory(NamedTuple):
    """What the decoder knows of the source."""

    keys: Tensor  # [batch, heads, tokens, features]
    values: Tensor
    mask: Tensor  # [batch, 1, 1, tokens], true where there is a token
    state: tuple[Tensor, Tensor]  # the decoder's first


class Translator(nn.Module):
    """Reads both ways, then writes; every written token attends to what was read (Luong 2015).

    One embedding serves source, target and last layer. Attention comes after the decoder, which
    therefore is trained on all tokens in one call.
    """

    def __init__(self, settings: Settings, vocabulary: int, parts: Parts) -> None:
        super().__init__()
        width, hidden = settings.width, settings.hidden_size
        self.heads, self.label_smoothing = settings.heads, settings.label_smoothing
        self.attention, self.loss_of = parts.attention, parts.loss
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = parts.lstm(width, hidden // 2, batch_first=True, bidirectional=True)
        self.decoder = parts.lstm(width, hidden, batch_first=True)
        self.memory = nn.Linear(hidden, 2 * hidden)
        self.query = nn.Linear(hidden, hidden)
        self.combine = nn.Linear(2 * hidden, width)
        self.dropout = nn.Dropout(settings.dropout)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        """At unit variance, as the LSTM's weights expect it; the last layer has it smaller."""
        embedded: Tensor = self.dropout(self.embedding(tokens) * self.embedding.embedding_dim**0.5)
        return embedded

    def read(self, source: Tensor) -> Memory:
        """Maps tokens [batch, tokens], padded at their ends."""
        mask = source.ne(PADDING_ID)
        packed = pack_padded_sequence(
            self.embed(source), mask.sum(1), batch_first=True, enforce_sorted=False
        )
        states, (hidden, cell) = self.encoder(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=source.size(1))
        both = self.memory(self.dropout(states)).unflatten(-1, (2, self.heads, -1))
        keys, values = both.permute(2, 0, 3, 1, 4)
        first = tuple(part.transpose(0, 1).flatten(1)[None] for part in (hidden, cell))
        return Memory(keys, values, mask[:, None, None], first)

    def write(
        self, tokens: Tensor, memory: Memory, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What logits are made of, [batch, tokens, width], after each token, and the next state."""
        states, state = self.decoder(self.embed(tokens), state)
        query = self.query(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended = self.attention(query, memory.keys, memory.values, attn_mask=memory.mask)
        both = torch.cat([states, attended.transpose(1, 2).flatten(2)], -1)
        return self.dropout(torch.tanh(self.combine(both))), state

    def states(self, pair: Tensor) -> Tensor:
        """Maps source and what the decoder reads, [2, batch, tokens], to a row for each target."""
        source, written = pair
        memory = self.read(source)
        states, _ = self.write(written, memory, memory.state)
        return states[written.ne(PADDING_ID)]

    def forward(self, pair: Tensor) -> Tensor:
        """Maps the same to logits [targets, vocabulary]."""
        return nn.functional.linear(self.states(pair), self.embedding.weight)

    def loss(self, pair: Tensor, targets: Tensor) -> Tensor:
        states = self.states(pair)
        return self.loss_of(
            states, self.embedding.weight, targets, label_smoothing=self.label_smoothing
        )

    @torch.no_grad()
    def translate(self, source: Tensor, longest: int) -> list[list[int]]:
        """Writes the likeliest token after token, until all have ended."""
        self.eval()
        memory = self.read(source)
        state, tokens = memory.state, torch.full((len(source), 1), START_ID)
        columns, ended = [], torch.zeros(len(source), 1, dtype=torch.bool)
        while len(columns) < longest and not ended.all():
            states, state = self.write(tokens, memory, state)
            logits = nn.functional.linear(states, self.embedding.weight)
            tokens = logits.argmax(-1)
            ended |= tokens == END_ID
            columns.append(tokens.masked_fill(ended, END_ID))
        self.train()
        return [
            [token for token in row if token != END_ID] for row in torch.cat(columns, 1).tolist()
        ]


def encode(tokenizer: Tokenizer, texts: Sequence[str], longest: int) -> list[list[int]]:
    """The space in front makes a first word the same tokens as a later one."""
    return [e.ids[:longest] for e in tokenizer.encode_batch([f" {text}" for text in texts])]


class EncodedPairs:
    """Tokens of one part of the split, handed out in padded batches."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer, longest: int) -> None:
        self.pairs = pairs
        self.sources = encode(tokenizer, [pair.source for pair in pairs], longest)
        self.targets = encode(tokenizer, [pair.target for pair in pairs], longest)
        self.by_length = np.argsort([len(source) for source in self.sources], kind="stable")

    def ordered(self, size: int) -> list[Batch]:
        return [self._batch(rows) for rows in chunks(self.by_length.tolist(), size)]

    def shuffled(self, size: int, seed: tuple[int, int]) -> list[Batch]:
        """Batches pairs of like length; which of one length come together is left to chance."""
        random = np.random.default_rng(seed)
        lengths = np.array([len(source) for source in self.sources])
        order = np.lexsort((random.random(len(lengths)), lengths))
        batches = [self._batch(rows) for rows in chunks(order.tolist(), size)]
        return [batches[i] for i in random.permutation(len(batches))]

    def _batch(self, rows: Sequence[int]) -> Batch:
        sources = [self.sources[row] for row in rows]
        written = [[START_ID, *self.targets[row]] for row in rows]
        targets = [token for row in rows for token in (*self.targets[row], END_ID)]
        width = max(map(len, [*sources, *written]))
        pair = torch.stack([padded(sources, width), padded(written, width)])
        return Batch(pair, torch.tensor(targets))


def padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[PADDING_ID] * (width - len(row))] for row in rows])


class Task(NamedTuple):
    """Everything the contenders share."""

    tokenizer: Tokenizer
    train: EncodedPairs
    validation: EncodedPairs
    test: EncodedPairs


def prepare(messages: Messages, settings: Settings) -> Task:
    # The tokenizer is fitted as the weights are: on the training part only.
    texts = (f" {text}" for pair in messages.train for text in (pair.source, pair.target))
    tokenizer = train_byte_pairs(texts, settings.vocabulary, [PADDING, START, END, *SLOTS])
    parts = messages.train, messages.validation, messages.test
    return Task(tokenizer, *(EncodedPairs(part, tokenizer, settings.longest) for part in parts))


def contest_of(task: Task, settings: Settings) -> Contest:
    def make_model(contender: Contender) -> Translator:
        return Translator(settings, task.tokenizer.get_vocab_size(), contender.part)

    def batches_of(epoch: int) -> list[Batch]:
        return task.train.shuffled(settings.batch_size, (settings.recipe.seed, epoch))

    validation = task.validation.ordered(settings.batch_size)
    origin = asdict(settings) | {"tokenizer": task.tokenizer.to_str()}
    steps = -(-len(task.train.pairs) // settings.batch_size)
    return Contest(settings.recipe, make_model, batches_of, steps, validation, origin, "tokens")


def translations(model: Any, task: Task, settings: Settings) -> list[str]:
    """What a model makes of the test part, in its order, with placeholders in their places."""
    texts = [""] * len(task.test.pairs)
    for rows in chunks(task.test.by_length.tolist(), settings.batch_size):
        sources = [task.test.sources[row] for row in rows]
        written = model.translate(padded(sources, max(map(len, sources))), settings.longest)
        for row, tokens in zip(rows, written, strict=True):
            text = task.tokenizer.decode(tokens, skip_special_tokens=False).strip()
            texts[row] = restored(text, task.test.pairs[row].placeholders)
    return texts


def remembered(messages: Messages) -> list[str]:
    """The translation of the trained message that shares most character n-grams."""
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    known = vectorizer.fit_transform([pair.source for pair in messages.train])
    asked = vectorizer.transform([pair.source for pair in messages.test])
    nearest = np.asarray((asked @ known.T).todense()).argmax(1)
    return [
        restored(messages.train[found].target, pair.placeholders)
        for found, pair in zip(nearest, messages.test, strict=True)
    ]


def data_table(messages: Messages, task: Task) -> Table:
    table = figures_table("Data", "messages", "count", "tokens")
    table.add_row("read", f"{messages.read:,}", "")
    for reason, count in messages.dropped.items():
        table.add_row(f"  dropped: {reason}", f"{count:,}", "")
    table.add_section()
    for name in ("train", "validation", "test"):
        part: EncodedPairs = getattr(task, name)
        count = sum(map(len, [*part.sources, *part.targets]))
        table.add_row(name, f"{len(part.pairs):,}", f"{count:,}")
    return table


def quality_table(
    answers: dict[str, list[str]], pairs: Sequence[Pair], records: dict[str, Record]
) -> Table:
    references = references_of(pairs)
    with_placeholders = [i for i, pair in enumerate(pairs) if pair.placeholders]
    scores = {}
    for name, texts in answers.items():
        kept = sum(all(p in texts[i] for p in pairs[i].placeholders) for i in with_placeholders)
        scores[name] = (
            f"{corpus_bleu(texts, [references]).score:.1f}",
            f"{corpus_chrf(texts, [references]).score:.1f}",
            f"{kept}/{len(with_placeholders)}",
        )
    heads = "BLEU", "chrF", "all placeholders"
    return scores_table("Test split, greedy", heads, scores, records)


def references_of(pairs: Sequence[Pair]) -> list[str]:
    return [restored(pair.target, pair.placeholders) for pair in pairs]


def examples_table(texts: Sequence[str], pairs: Sequence[Pair]) -> Table:
    """Evenly spaced over the test part."""
    table = Table("source", "fastopt", "reference", title="Translations", title_justify="left")
    references = references_of(pairs)
    for i in np.linspace(0, len(pairs) - 1, SHOWN).astype(int):
        source = restored(pairs[i].source, pairs[i].placeholders)
        table.add_row(*(Text(text) for text in (source, texts[i], references[i])))
    return table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, Path("build/translate.png"))
    parser.add_argument("--language", help="as the catalogues call it; fr if it is left out")
    parser.add_argument("--packages", nargs="+", metavar="NAME", help="installed, with catalogues")
    return parse(parser, arguments)


def run(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    settings: Settings = settings_of(options, DEFAULT, FULL, SMOKE)
    settings = replace(
        settings,
        language=options.language or settings.language,
        packages=tuple(options.packages or settings.packages),
    )
    messages = read_messages(settings.packages, settings.language, options.seed)
    task = prepare(messages, settings)
    console.print(data_table(messages, task))

    trainees, records = compete(contest_of(task, settings), CONTENDERS, options, console)

    answers = {}
    for name, trainee in trainees.items():
        trainee.restore_best()
        answers[name] = translations(trainee.model, task, settings)
    answers[MEMORY] = remembered(messages)
    console.print(quality_table(answers, messages.test, records))
    console.print(examples_table(answers["fastopt"], messages.test))

    return records


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(run, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
