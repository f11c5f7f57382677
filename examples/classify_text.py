"""Tells the language of a text: an LSTM trained five ways and compared with n-grams.

    python examples/classify_text.py                      # about two minutes on two cores
    python examples/classify_text.py --full               # every piece, and n-grams beside the LSTM
    python examples/classify_text.py --data reviews.csv   # your own columns text,label

The data are the message catalogues of Django's wheel; nothing is downloaded. Stock as most people
write it, stock at its best, fastopt's Adam, fastopt's LSTM and both see the same batches in turns.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _command import compete, make_parser, parse, run_command, settings_of
from _contenders import CONTENDERS
from _contest import Batch, Contender, Contest, Recipe, Record, Trainee, chunks
from _corpus import (
    Corpus,
    Example,
    Split,
    label_names,
    largest_labels,
    read_catalogues,
    read_csv,
    split,
)
from _report import corpus_table, quality_table
from numpy.typing import NDArray
from rich.console import Console
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

PADDING, UNKNOWN = "[PAD]", "[UNK]"
PADDING_ID, UNKNOWN_ID = 0, 1
NGRAMS = (1, 2, 3, 4)
WORD_LENGTH = 24
EVALUATION_BATCH = 256
SORTED_TOGETHER = 50  # batches: padding is short, yet an epoch is still shuffled
WIDE_SCALE = 10.0  # Adam's steps do not shrink with the inputs, so this is the wide part's own lr
WIDE_SHARE = 2 / 3  # of the answer; the wide part is the better one alone


@dataclass(frozen=True)
class Settings:
    """One size of the run."""

    recipe: Recipe
    vocabulary: int = 20_000
    max_words: int = 32
    batch_size: int = 64
    embedding_dim: int = 128
    hidden_size: int = 256
    dropout: float = 0.3
    wide: bool = False  # logistic regression on the pieces beside the LSTM
    max_labels: int | None = None


DEFAULT = Settings(Recipe(epochs=2, lr=5e-3, weight_decay=1e-5, patience=3))
FULL = replace(
    DEFAULT,
    recipe=replace(DEFAULT.recipe, epochs=3, ema_decay=0.998),
    vocabulary=200_000,
    dropout=0.5,
    wide=True,
)
SMOKE = replace(
    DEFAULT,
    vocabulary=2_000,
    embedding_dim=32,
    hidden_size=64,
    max_labels=6,
)


class TextClassifier(nn.Module):
    """An LSTM over words, where a word is the sum of its pieces' embeddings.

    The classifier sees the maximum and the mean of the states and the mean of the words. Beside it
    may stand a wide part (Cheng et al. 2016): logistic regression on the tf-idf of the pieces.
    """

    rarity: Tensor

    def __init__(
        self, settings: Settings, rarity: Tensor, labels: int, lstm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        vocabulary, width, hidden = len(rarity), settings.embedding_dim, settings.hidden_size
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PADDING_ID)
        self.lstm = lstm(width, hidden, batch_first=True)
        self.linear = nn.Linear(2 * hidden + width, labels)
        self.dropout = nn.Dropout(settings.dropout)
        self.wide = nn.EmbeddingBag(vocabulary, labels, mode="sum") if settings.wide else None
        self.register_buffer("rarity", rarity)
        with torch.no_grad():
            # A rare piece stays near its start: at torch's unit variance it would be loud noise.
            self.embedding.weight.mul_(0.1)
            if self.wide:
                self.wide.weight.zero_()

    def forward(self, pieces: Tensor) -> Tensor:
        """Maps pieces [batch, words, pieces] to logits [batch, labels]."""
        deep, *wide = self.answers(pieces)
        return deep.lerp(wide[0], WIDE_SHARE) if wide else deep

    def loss(self, pieces: Tensor, targets: Tensor) -> Tensor:
        """Each part learns to answer alone: the wide one learns faster and would leave little."""
        losses = [nn.functional.cross_entropy(logits, targets) for logits in self.answers(pieces)]
        return torch.stack(losses).mean()

    def answers(self, pieces: Tensor) -> list[Tensor]:
        """Returns the logits of each part."""
        deep = self.deep_logits(pieces)
        return [deep, self.wide_logits(self.wide, pieces.flatten(1))] if self.wide else [deep]

    def deep_logits(self, pieces: Tensor) -> Tensor:
        """Padding follows the text and the LSTM reads forwards, so no valid state sees it."""
        valid = pieces[:, :, :1].ne(PADDING_ID)
        words = self.dropout(self.embed(pieces))
        states, _ = self.lstm(words)
        count = valid.sum(1)
        features = (
            states.masked_fill(~valid, -torch.inf).amax(1),
            (states * valid).sum(1) / count,
            (words * valid).sum(1) / count,
        )
        logits: Tensor = self.linear(self.dropout(torch.cat(features, dim=1)))
        return logits

    def wide_logits(self, wide: nn.EmbeddingBag, pieces: Tensor) -> Tensor:
        weights = WIDE_SCALE * nn.functional.normalize(self.rarity[pieces], dim=1)
        logits: Tensor = wide(pieces, per_sample_weights=weights)
        return logits

    def embed(self, pieces: Tensor) -> Tensor:
        count = pieces.ne(PADDING_ID).sum(2, keepdim=True).clamp(min=1)
        summed: Tensor = self.embedding(pieces).sum(2)
        return summed * count.rsqrt().to(summed.dtype)


def words_of(text: str) -> list[str]:
    """Splits at spaces, marks the ends of words and cuts what is too long for a word."""
    return [
        marked[start : start + WORD_LENGTH]
        for marked in (f"<{word}>" for word in text.split())
        for start in range(0, len(marked), WORD_LENGTH)
    ]


def pieces_of(word: str) -> list[str]:
    """Returns the word and its character n-grams."""
    grams = [word[i : i + n] for n in NGRAMS for i in range(len(word) - n + 1)]
    return [word, *grams] if len(word) > max(NGRAMS) else grams


def train_tokenizer(texts: Iterable[str], settings: Settings) -> Tokenizer:
    """Keeps the most frequent pieces of the texts."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=settings.vocabulary,
        min_frequency=2,
        special_tokens=[PADDING, UNKNOWN],
        show_progress=False,
    )
    pieces = (" ".join(chain.from_iterable(map(pieces_of, words_of(text)))) for text in texts)
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


class EncodedTexts:
    """Piece ids and targets of one part of the split, handed out in padded batches."""

    def __init__(
        self,
        examples: Sequence[Example],
        labels: Sequence[str],
        tokenizer: Tokenizer,
        max_words: int,
    ) -> None:
        numbers = {label: number for number, label in enumerate(labels)}
        texts = [words_of(example.text)[:max_words] for example in examples]
        words = sorted({word for text in texts for word in text})
        encodings = tokenizer.encode_batch([pieces_of(w) for w in words], is_pretokenized=True)
        known = ([i for i in encoding.ids if i != UNKNOWN_ID] for encoding in encodings)
        ids = {word: found or [UNKNOWN_ID] for word, found in zip(words, known, strict=True)}
        self.texts = [[ids[word] for word in text] for text in texts]
        self.targets = torch.tensor([numbers[example.label] for example in examples])
        self.lengths = np.array([len(text) for text in texts])
        self.by_length = np.argsort(self.lengths, kind="stable")

    def ordered(self, size: int) -> list[Batch]:
        return self._batches(self.by_length, size)

    def shuffled(self, size: int, seed: tuple[int, int]) -> list[Batch]:
        """Batches texts of like length, so that little time goes into padding."""
        random = np.random.default_rng(seed)
        order = random.permutation(len(self.texts))
        window = size * SORTED_TOGETHER
        windows = [order[i : i + window] for i in range(0, len(order), window)]
        by_length = [w[np.argsort(self.lengths[w], kind="stable")] for w in windows]
        batches = self._batches(np.concatenate(by_length), size)
        return [batches[i] for i in random.permutation(len(batches))]

    def _batches(self, order: NDArray[np.int64], size: int) -> list[Batch]:
        return [
            Batch(padded([self.texts[i] for i in chunk]), self.targets[chunk])
            for chunk in chunks(order.tolist(), size)
        ]


def padded(texts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Returns ids [texts, words, pieces]."""
    words = max(map(len, texts))
    pieces = max(len(word) for text in texts for word in text)
    ids = np.full((len(texts), words, pieces), PADDING_ID)
    for i, text in enumerate(texts):
        for j, word in enumerate(text):
            ids[i, j, : len(word)] = word
    return torch.from_numpy(ids)


def rarity_of(texts: EncodedTexts, vocabulary: int) -> Tensor:
    """Returns the smoothed inverse document frequency of every piece, 0 for padding."""
    frequency = np.zeros(vocabulary)
    for text in texts.texts:
        frequency[list(set(chain.from_iterable(text)))] += 1
    rarity = 1 + np.log((1 + len(texts.texts)) / (1 + frequency))
    rarity[PADDING_ID] = 0
    return torch.tensor(rarity, dtype=torch.float32)


class Task(NamedTuple):
    """Everything the contenders share."""

    labels: list[str]
    tokenizer: Tokenizer
    rarity: Tensor  # [vocabulary]
    train: EncodedTexts
    validation: EncodedTexts
    test: EncodedTexts


def prepare(parts: Split, settings: Settings) -> Task:
    labels = label_names(parts.train)
    # The tokenizer and the rarity are fitted as the weights are: on the training part only.
    tokenizer = train_tokenizer([example.text for example in parts.train], settings)
    train, validation, test = (
        EncodedTexts(part, labels, tokenizer, settings.max_words) for part in parts
    )
    rarity = rarity_of(train, tokenizer.get_vocab_size())
    return Task(labels, tokenizer, rarity, train, validation, test)


def contest_of(task: Task, settings: Settings) -> Contest:
    def make_model(contender: Contender) -> TextClassifier:
        return TextClassifier(settings, task.rarity, len(task.labels), contender.part)

    def batches_of(epoch: int) -> list[Batch]:
        return task.train.shuffled(settings.batch_size, (settings.recipe.seed, epoch))

    validation = task.validation.ordered(EVALUATION_BATCH)
    origin = asdict(settings) | {"labels": task.labels, "tokenizer": task.tokenizer.to_str()}
    steps = math.ceil(len(task.train.texts) / settings.batch_size)
    return Contest(settings.recipe, make_model, batches_of, steps, validation, origin)


def predicted_targets(trainee: Trainee, texts: EncodedTexts) -> NDArray[np.int64]:
    """Returns what the best model of a contender answers, in the order of the texts."""
    logits = trainee.predict(texts.ordered(EVALUATION_BATCH))
    answers = np.empty_like(texts.by_length)
    answers[texts.by_length] = logits.argmax(1).numpy()
    return answers


def baseline_targets(parts: Split, labels: list[str]) -> NDArray[np.int64]:
    """Returns what logistic regression on character n-grams answers."""
    pipeline = make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=2, sublinear_tf=True),
        SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=5, tol=None, random_state=0, n_jobs=2),
    )
    pipeline.fit([e.text for e in parts.train], [labels.index(e.label) for e in parts.train])
    return np.asarray(pipeline.predict([e.text for e in parts.test]))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, Path("build/classify_text.png"))
    parser.add_argument("--data", type=Path, metavar="CSV", help="UTF-8, columns text and label")
    return parse(parser, arguments)


def load(path: Path | None, settings: Settings) -> Corpus:
    corpus = read_csv(path) if path else read_catalogues()
    return largest_labels(corpus, settings.max_labels) if settings.max_labels else corpus


def run(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    settings = settings_of(options, DEFAULT, FULL, SMOKE)
    corpus = load(options.data, settings)
    parts = split(corpus.examples, options.seed)
    console.print(corpus_table(corpus, parts))

    task = prepare(parts, settings)
    trainees, records = compete(contest_of(task, settings), CONTENDERS, options, console)

    answers = {name: predicted_targets(t, task.test) for name, t in trainees.items()}
    answers["character n-grams, logistic regression"] = baseline_targets(parts, task.labels)
    console.print(quality_table(answers, task.test.targets.numpy(), records))

    return records


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(run, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
