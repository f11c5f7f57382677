"""A small causal transformer that learns Python's own documentation and code, five ways.

    python examples/language_model.py                    # some minutes on two cores
    python examples/language_model.py --full             # a larger model on more text
    python examples/language_model.py --data *.txt       # your own files, UTF-8

The data are the standard library's help topics and modules; nothing is downloaded. Stock as most
people write it, stock at its best, fastopt's AdamW, fastopt's attention, and both with fastopt's
last layer see the same batches in turns. At the end the model writes, with a key-value cache,
through either attention.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from _command import compete, make_parser, parse, run_command, settings_of
from _contenders import five_ways
from _contest import Batch, Contender, Contest, Recipe, Record, Trainee
from _corpus import DataError
from _library import Library, hold_out, read_files, read_library
from _report import figures_table
from _tokenizer import train_byte_pairs
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as stock_attention

from fastopt.nn.functional import linear_cross_entropy
from fastopt.nn.functional import scaled_dot_product_attention as fast_attention

Attention = Callable[..., Tensor]


def stock_loss(
    states: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Torch 2.13 calls it linear_cross_entropy, too."""
    logits = nn.functional.linear(states, weight)
    return nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)


class Parts(NamedTuple):
    """What a model is made of besides torch's layers."""

    attention: Attention
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # of states, weight and targets


STOCK_PARTS = Parts(stock_attention, stock_loss)
ATTENTION_ALONE = Parts(fast_attention, stock_loss)
FAST_PARTS = Parts(fast_attention, linear_cross_entropy)
CONTENDERS = five_ways("AdamW", "attention", STOCK_PARTS, ATTENTION_ALONE, FAST_PARTS)
END = "<|end|>"  # of a document


@dataclass(frozen=True)
class Settings:
    """One size of the run."""

    recipe: Recipe
    modules: int = 20  # of the standard library, beside its help topics
    vocabulary: int = 1_024
    context: int = 512
    batch_size: int = 2
    width: int = 128
    heads: int = 4
    layers: int = 4
    dropout: float = 0.1
    prompt: str = "The with statement"
    sampled: int = 200  # tokens that are written at the end
    temperature: float = 0.8


DEFAULT = Settings(Recipe(epochs=2, lr=2e-3, weight_decay=0.1, patience=3))
FULL = replace(
    DEFAULT,
    recipe=replace(DEFAULT.recipe, lr=1e-3),
    modules=60,
    vocabulary=2_048,
    width=256,
)
SMOKE = replace(
    DEFAULT,
    modules=0,
    vocabulary=400,
    context=64,
    batch_size=64,
    width=32,
    heads=2,
    layers=2,
    sampled=30,
)


class Cache:
    """Keys and values of the tokens so far, of one layer and one text."""

    def __init__(self, heads: int, context: int, features: int) -> None:
        self.keys, self.values = torch.empty(2, 1, heads, context, features)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [1, heads, tokens, features]; returns all that there are."""
        end = self.length + keys.size(2)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Block(nn.Module):
    """Attention and a layer of two steps, each after its norm and beside a shortcut."""

    def __init__(self, settings: Settings, attention: Attention) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.projections = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, states: Tensor, cache: Cache | None = None) -> Tensor:
        """Maps [batch, tokens, width] to the same; a cache that is not empty takes one token."""
        projected = self.projections(self.norms[0](states)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        if cache:
            key, value = cache.extend(key, value)
        attended = self.attention(query, key, value, is_causal=query.size(2) > 1)
        states = states + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return states + self.dropout(self.feed_forward(self.norms[1](states)))


class LanguageModel(nn.Module):
    """A transformer that guesses the next token, its embedding used at both ends."""

    def __init__(self, settings: Settings, vocabulary: int, parts: Parts) -> None:
        super().__init__()
        self.settings = settings
        self.loss_of = parts.loss
        self.embedding = nn.Embedding(vocabulary, settings.width)
        self.positions = nn.Embedding(settings.context, settings.width)
        self.blocks = nn.ModuleList(
            Block(settings, parts.attention) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def states(self, tokens: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Maps tokens [batch, tokens] to what logits are made of, [batch, tokens, width]."""
        first = caches[0].length if caches else 0
        places = torch.arange(first, first + tokens.size(1))
        states = self.dropout(self.embedding(tokens) + self.positions(places))
        for number, block in enumerate(self.blocks):
            states = block(states, caches[number] if caches else None)
        normed: Tensor = self.norm(states)
        return normed

    def forward(self, tokens: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Maps tokens [batch, tokens] to logits [batch, tokens, vocabulary]."""
        return nn.functional.linear(self.states(tokens, caches), self.embedding.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        states = self.states(tokens).flatten(0, 1)
        return self.loss_of(states, self.embedding.weight, targets.flatten())

    def use(self, attention: Attention) -> None:
        for block in self.blocks:
            block.attention = attention

    def caches(self) -> list[Cache]:
        s = self.settings
        return [Cache(s.heads, s.context, s.width // s.heads) for _ in self.blocks]

    @torch.no_grad()
    def write(self, prompt: Sequence[int], count: int, temperature: float, seed: int) -> list[int]:
        """Samples ``count`` tokens after the prompt, each from one pass over one token."""
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        caches, written = self.caches(), list(prompt)
        tokens = torch.tensor([written])
        for _ in range(min(count, self.settings.context - len(prompt))):
            written.append(draw(self(tokens, caches)[0, -1], temperature, generator))
            tokens = torch.tensor([written[-1:]])
        self.train()
        return written


def draw(
    logits: Tensor, temperature: float, generator: torch.Generator, top_k: int | None = None
) -> int:
    """A token by chance, of the ``top_k`` likeliest if given; at temperature 0 the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(
            logits < logits.topk(min(top_k, len(logits)))[0][-1], -torch.inf
        )
    return int(torch.softmax(logits / temperature, 0).multinomial(1, generator=generator))


class Task(NamedTuple):
    """The data as tokens; documents lie behind each other."""

    tokenizer: Tokenizer
    train: Tensor
    validation: Tensor
    validation_bytes: int


def prepare(library: Library, settings: Settings) -> Task:
    """Tokens of both parts.

    Raises:
        DataError: A part has fewer tokens than a batch needs.
    """
    texts = (document.text for document in library.train)
    tokenizer = train_byte_pairs(texts, settings.vocabulary, [END])
    end = tokenizer.token_to_id(END)
    parts = []
    least = {"train": settings.batch_size * settings.context, "validation": settings.context}
    for name, documents in zip(least, (library.train, library.validation), strict=True):
        encodings = tokenizer.encode_batch([document.text for document in documents])
        tokens = torch.tensor([token for one in encodings for token in (*one.ids, end)])
        if len(tokens) <= least[name]:
            raise DataError(f"{name}: {len(tokens)} tokens, more than {least[name]} are needed")
        parts.append(tokens)
    size = sum(len(document.text.encode()) for document in library.validation)
    return Task(tokenizer, *parts, size)


def windows(tokens: Tensor, context: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets [windows, context], one token apart."""
    count = (len(tokens) - 1 - first) // context
    inputs = tokens[first : first + count * context].view(count, context)
    targets = tokens[first + 1 : first + 1 + count * context].view(count, context)
    return inputs, targets


def contest_of(task: Task, settings: Settings) -> Contest:
    def make_model(contender: Contender) -> LanguageModel:
        return LanguageModel(settings, task.tokenizer.get_vocab_size(), contender.part)

    def batches_of(epoch: int) -> list[Batch]:
        """Windows begin elsewhere in every epoch."""
        random = np.random.default_rng((settings.recipe.seed, epoch))
        spare = (len(task.train) - 1) % settings.context
        inputs, targets = windows(task.train, settings.context, int(random.integers(spare + 1)))
        order = torch.from_numpy(random.permutation(len(inputs)))
        whole = len(order) // settings.batch_size * settings.batch_size
        return [
            Batch(inputs[rows], targets[rows]) for rows in order[:whole].split(settings.batch_size)
        ]

    held_out = windows(task.validation, settings.context)
    validation = [Batch(*part) for part in zip(*(t.split(8) for t in held_out), strict=True)]
    origin = asdict(settings) | {"tokenizer": task.tokenizer.to_str()}
    steps = (len(task.train) - 1) // settings.context // settings.batch_size
    return Contest(settings.recipe, make_model, batches_of, steps, validation, origin, "tokens")


def data_table(library: Library, task: Task) -> Table:
    table = figures_table("Data", "part", "documents", "tokens")
    table.add_row("train", f"{len(library.train):,}", f"{len(task.train):,}")
    table.add_row("validation", f"{len(library.validation):,}", f"{len(task.validation):,}")
    return table


def quality_table(trainees: dict[str, Trainee], task: Task) -> Table:
    heads = "model", "validation loss", "perplexity", "bits per byte"
    table = figures_table("Documents that were held out", *heads)
    bytes_per_token = task.validation_bytes / len(task.validation)
    for name, trainee in trainees.items():
        loss = min(trainee.record.validation_losses)
        bits = loss / math.log(2) / bytes_per_token
        table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):.1f}", f"{bits:.3f}")
    return table


def write_both_ways(
    model: LanguageModel, task: Task, settings: Settings
) -> tuple[Table, dict[str, str]]:
    """The same model writes through stock's attention and through fastopt's."""
    prompt = task.tokenizer.encode(settings.prompt).ids
    arguments = prompt, settings.sampled, settings.temperature, settings.recipe.seed
    texts, seconds = {}, {}
    for name, attention in {"stock": stock_attention, "fastopt": fast_attention}.items():
        model.use(attention)
        model.write(*arguments)  # to warm up
        start = perf_counter()
        tokens = model.write(*arguments)
        seconds[name] = (perf_counter() - start) / (len(tokens) - len(prompt))
        texts[name] = task.tokenizer.decode(tokens)
    table = Table(
        "attention", "ms per token", "ratio", "same text",
        title="Writing with a key-value cache", title_justify="left",
    )  # fmt: skip
    for name, own in seconds.items():
        verdict = "[green]PASS[/]" if texts[name] == texts["stock"] else "[bold red]FAIL[/]"
        ratio = f"{seconds['stock'] / own:.2f}"
        table.add_row(name, f"{own * 1e3:.2f}", ratio, "" if name == "stock" else verdict)
    return table, texts


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, Path("build/language_model.png"))
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="UTF-8, two or more")
    parser.add_argument("--prompt", help="what the model goes on from")
    return parse(parser, arguments)


def run(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    settings: Settings = settings_of(options, DEFAULT, FULL, SMOKE)
    if options.prompt:
        settings = replace(settings, prompt=options.prompt)
    documents = read_files(options.data) if options.data else read_library(settings.modules)
    library = hold_out(documents, options.seed)
    task = prepare(library, settings)
    console.print(data_table(library, task))

    trainees, records = compete(contest_of(task, settings), CONTENDERS, options, console)
    console.print(quality_table(trainees, task))

    best = trainees["fastopt"]
    best.restore_best()
    model: Any = best.model
    table, texts = write_both_ways(model, task, settings)
    console.print(table, Panel(Text(texts["fastopt"]), title="fastopt writes", title_align="left"))

    return records


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(run, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
