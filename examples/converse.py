"""Answers as Python's prompt does: the language model on doctest sessions, and a talk with it.

    python examples/converse.py --checkpoint build/converse.pt           # trains, some minutes
    python examples/converse.py --talk build/converse.pt                 # you type, it answers
    python examples/converse.py --talk build/converse.pt < prompts.txt   # or read from a file

The text is a dialogue by nature: what somebody typed after ``>>>``, and what Python answered. It
comes from the docstrings of the standard library and of packages that come with torch; whole files
are held out. The model and the contest are those of language_model.py, whose checkpoints ``--talk``
takes as well. What was said stays in a key-value cache.

It does not compute. It knows what answers look like, and which come often; beside it stands the
answer to the most similar prompt that it was trained on.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import language_model
from _command import compete, make_parser, parse, run_command, settings_of
from _contest import CheckpointError, Recipe, Record, read_checkpoint
from _corpus import DataError
from _dialogue import Dialogue
from _docstrings import CONTINUED, PROMPT, Turn, prompt_of, read_docstrings, turns_of
from _families import split_families
from _library import Document, Library
from _report import figures_table
from language_model import CONTENDERS, FAST_PARTS, LanguageModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sacrebleu import corpus_chrf
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer

SHOWN = 5  # exchanges at the end of training


@dataclass(frozen=True)
class Settings(language_model.Settings):
    """One size of the run."""

    packages: tuple[str, ...] = ("python", "numpy", "networkx")
    asked: int = 100  # prompts of the test part


DEFAULT = Settings(replace(language_model.DEFAULT.recipe, epochs=3))
FULL = replace(
    DEFAULT,
    recipe=replace(language_model.FULL.recipe, epochs=4),
    packages=(*DEFAULT.packages, "sympy", "scipy"),
    vocabulary=2_048,
    width=256,
)
SMOKE = Settings(
    recipe=replace(DEFAULT.recipe, epochs=2),
    packages=("json", "importlib", "numpy.lib"),
    vocabulary=400,
    context=128,
    batch_size=32,
    width=32,
    heads=2,
    layers=1,
    asked=5,
)


class Sessions(NamedTuple):
    """Turns of each session, in parts that share no file."""

    train: list[list[Turn]]
    validation: list[list[Turn]]
    test: list[list[Turn]]


def read_sessions(packages: Sequence[str], seed: int) -> Sessions:
    """Doctests that have an answer.

    Raises:
        DataError: A package is not there, or its files are too few to hold some out.
    """
    files, sessions = [], []
    for file, text in read_docstrings(packages, containing=PROMPT):
        turns = turns_of(text)
        if any(turn.reply for turn in turns):
            files.append(file)
            sessions.append(turns)
    parts = split_families([{file} for file in files], seed)
    if not all(map(len, parts)):
        raise DataError(f"{', '.join(packages)}: doctests in {len(set(files))} files are too few")
    return Sessions(*([sessions[i] for i in part] for part in parts))


def documents_of(sessions: Iterable[Sequence[Turn]]) -> list[Document]:
    return [
        Document(f"session {number}", "".join(turn.prompt + turn.reply for turn in turns))
        for number, turns in enumerate(sessions)
    ]


def load_model(path: Path) -> tuple[LanguageModel, Tokenizer]:
    """The best model of a checkpoint that this program or language_model.py wrote.

    Raises:
        CheckpointError: It is something else.
    """
    origin, states = read_checkpoint(path)
    try:
        values = {field.name: origin[field.name] for field in fields(language_model.Settings)}
        settings = language_model.Settings(**values | {"recipe": Recipe(**values["recipe"])})
        tokenizer = Tokenizer.from_str(origin["tokenizer"])
        state = states["fastopt"]
        model = LanguageModel(settings, tokenizer.get_vocab_size(), FAST_PARTS)
        model.load_state_dict(state["best"] or state["model"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} has no language model") from error
    return model, tokenizer


def questions_of(sessions: Iterable[Sequence[Turn]], count: int) -> list[tuple[list[Turn], Turn]]:
    """The last exchange of a session that has an answer, with those before it."""
    questions = []
    for turns in sessions:
        last = max(number for number, turn in enumerate(turns) if turn.reply)
        questions.append((list(turns[:last]), turns[last]))
    return questions[:count]


def answers_of(
    model: Any, tokenizer: Tokenizer, questions: Sequence[tuple[list[Turn], Turn]]
) -> list[str]:
    """The likeliest answers, where it is known that there is one."""
    dialogue = Dialogue(model, tokenizer, 0.0, None, seed=0)
    answers = []
    for before, turn in questions:
        dialogue.forget()
        for heard in before:
            dialogue.hear(heard)
        answers.append(dialogue.reply(turn.prompt, is_answered=True))
    return answers


def nearest_answers(
    sessions: Iterable[Sequence[Turn]], questions: Sequence[tuple[list[Turn], Turn]]
) -> list[str]:
    """The answers to the prompts that share most character n-grams."""
    known = [turn for turns in sessions for turn in turns if turn.reply]
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
    prompts = vectorizer.fit_transform([turn.prompt for turn in known])
    likeness = vectorizer.transform([turn.prompt for _, turn in questions]) @ prompts.T
    return [known[int(found)].reply for found in likeness.toarray().argmax(1)]


def answers_table(answers: dict[str, list[str]], expected: Sequence[str]) -> Table:
    title = f"{len(expected)} prompts of files held out"
    table = figures_table(title, "model", "exactly right", "chrF")
    for name, replies in answers.items():
        right = sum(a.strip() == b.strip() for a, b in zip(replies, expected, strict=True))
        score = corpus_chrf(replies, [expected]).score
        table.add_row(name, f"{right}/{len(expected)}", f"{score:.1f}")
    return table


def exchanges_table(questions: Sequence[tuple[list[Turn], Turn]], replies: Sequence[str]) -> Table:
    table = Table("prompt", "fastopt", "Python", title="Answers", title_justify="left")
    for (_, turn), reply in list(zip(questions, replies, strict=True))[:SHOWN]:
        table.add_row(*(Text(text.strip()) for text in (turn.prompt, reply, turn.reply)))
        table.add_section()
    return table


def read_prompts(lines: Iterable[str]) -> Iterator[str]:
    """A line is a prompt, an empty line begins anew; what follows ``...`` belongs to the line."""
    source = ""
    for line in lines:
        line = line.rstrip("\n")
        if line.startswith(CONTINUED.strip()):
            source += "\n" + line.removeprefix(CONTINUED.strip()).removeprefix(" ")
            continue
        if source:
            yield source
        source = line.removeprefix(PROMPT)
        if not source:
            yield ""
    if source:
        yield source


def typed_prompts() -> Iterator[str]:
    """As Python's own prompt: a line that ends with a colon goes on until an empty one."""
    try:
        while True:
            lines = [input(PROMPT)]
            while lines[-1] and lines[0].endswith(":"):
                lines.append(input(CONTINUED))
            yield "\n".join(lines).rstrip("\n")
    except EOFError:
        print()


def talk(dialogue: Dialogue, prompts: Iterable[str], show_prompts: bool) -> None:
    for source in prompts:
        if not source:
            dialogue.forget()
            continue
        prompt = prompt_of(source)
        reply = dialogue.reply(prompt, is_expression(source))
        print(prompt if show_prompts else "", reply, sep="", end="", flush=True)


def is_expression(source: str) -> bool:
    """Python answers most of them, and few other prompts."""
    try:
        ast.parse(source, mode="eval")
    except SyntaxError:
        return False
    return True


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error


def converse(options: argparse.Namespace) -> int:
    """Talks with the model of a checkpoint; what the user can mend ends it with status 2."""
    try:
        model, tokenizer = load_model(options.talk)
        from_file = options.prompts or not sys.stdin.isatty()
        lines = lines_of(options.prompts) if options.prompts else sys.stdin
        prompts = read_prompts(lines) if from_file else typed_prompts()
        dialogue = Dialogue(model, tokenizer, options.temperature, options.top_k, options.seed)
        talk(dialogue, prompts, show_prompts=bool(from_file))
    except (CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, Path("build/converse.png"))
    parser.add_argument("--packages", nargs="+", metavar="NAME", help="whose doctests to learn")
    parser.add_argument("--talk", type=Path, metavar="CHECKPOINT", help="does not train")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="to talk with, one a line")
    parser.add_argument("--temperature", type=float, default=0.5, help="of a talk; 0: no chance")
    parser.add_argument("--top-k", type=int, default=20, help="tokens that a talk draws from")
    options = parse(parser, arguments)
    if options.temperature < 0:
        parser.error(f"--temperature must be >= 0, got {options.temperature}")
    if options.top_k < 1:
        parser.error(f"--top-k must be >= 1, got {options.top_k}")
    if options.prompts and not options.talk:
        parser.error("--prompts needs --talk")
    return options


def run(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    settings: Settings = settings_of(options, DEFAULT, FULL, SMOKE)
    settings = replace(settings, packages=tuple(options.packages or settings.packages))
    sessions = read_sessions(settings.packages, options.seed)
    library = Library(documents_of(sessions.train), documents_of(sessions.validation))
    task = language_model.prepare(library, settings)
    console.print(language_model.data_table(library, task))

    contest = language_model.contest_of(task, settings)
    trainees, records = compete(contest, CONTENDERS, options, console)
    console.print(language_model.quality_table(trainees, task))

    questions = questions_of(sessions.test, settings.asked)
    answers = {}
    for name in ("stock", "fastopt"):
        trainees[name].restore_best()
        answers[name] = answers_of(trainees[name].model, task.tokenizer, questions)
    answers["nearest prompt"] = nearest_answers(sessions.train, questions)
    console.print(answers_table(answers, [turn.reply for _, turn in questions]))
    console.print(exchanges_table(questions, answers["fastopt"]))
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return converse(options) if options.talk else run_command(run, options)


if __name__ == "__main__":
    sys.exit(main())
