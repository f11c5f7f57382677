"""What state in fewer bytes does to training: losses of the examples' models, and peak memory.

    python -m bench.training --output bench/results/x.json    # half an hour on two cores

The demo's classifier and the language model are trained with each way to store parameters and
state, over several seeds, on the same batches. Memory is what training a wider language model adds
to a process at its highest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn

from bench import command, probes, results
from bench.results import ROOT, Losses, Memory
from fastopt import nn as fast_nn
from fastopt import optim

SEEDS = (0, 1, 2)


class Way(NamedTuple):
    """How parameters and state are stored."""

    options: dict[str, Any]
    dtype: torch.dtype = torch.float32


EXACT = "fp32"
WAYS = {
    EXACT: Way({}),
    "bf16 moments": Way({"state_storage": "bf16"}),
    "8-bit moments": Way({"state_storage": "8bit"}),
    "bf16 with masters": Way({"param_precision": "master"}, torch.bfloat16),
    "bf16 with masters, 8-bit moments": Way(
        {"param_precision": "master", "state_storage": "8bit"}, torch.bfloat16
    ),
    "bf16, Kahan, 8-bit moments": Way(
        {"param_precision": "kahan", "state_storage": "8bit"}, torch.bfloat16
    ),
    "bf16, stochastic, 8-bit moments": Way(
        {"param_precision": "stochastic", "state_storage": "8bit"}, torch.bfloat16
    ),
    "bf16 alone": Way({}, torch.bfloat16),
}


def example(name: str) -> Any:
    """A module of the examples, which are programs and no package."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


class Program(NamedTuple):
    """What the ways compete in, and with what they all train."""

    contest: Any
    optimizer: Callable[..., Any]
    part: Any


def _classifier(seed: int, quick: bool) -> Program:
    program = example("classify_text")
    size = program.SMOKE if quick else program.DEFAULT
    settings = replace(size, recipe=replace(size.recipe, seed=seed))
    parts = example("_corpus").split(program.load(None, settings).examples, seed)
    contest = program.contest_of(program.prepare(parts, settings), settings)
    return Program(contest, optim.Adam, fast_nn.LSTM)


def _language_model(seed: int, quick: bool) -> Program:
    program, library = example("language_model"), example("_library")
    size = program.SMOKE if quick else program.DEFAULT
    settings = replace(size, recipe=replace(size.recipe, seed=seed))
    documents = library.hold_out(library.read_library(settings.modules), seed)
    contest = program.contest_of(program.prepare(documents, settings), settings)
    return Program(contest, optim.AdamW, program.FAST_PARTS)


PROGRAMS = {"classifier": _classifier, "language model": _language_model}


def validation_losses(program: str, seed: int, quick: bool) -> dict[str, float]:
    """The best validation loss of each way."""
    contest, optimizer, part = PROGRAMS[program](seed, quick)
    contender, tail = example("_contest").Contender, example("_tail").FusedTail

    def make_model(way: Any) -> nn.Module:
        model: nn.Module = contest.make_model(way)
        return model.to(WAYS[way.name].dtype)

    ways = [contender(name, optimizer, way.options, tail, part) for name, way in WAYS.items()]
    trainees = replace(contest, make_model=make_model).run(ways, None, resume=False)
    return {name: min(trainee.record.validation_losses) for name, trainee in trainees.items()}


MEMORY_SHAPE = {"width": 1024, "layers": 6, "heads": 16, "context": 128, "batch_size": 1}
MEMORY_STEPS = 3
STOCK = "torch"


def _release(**options: Any) -> Callable[[Any], Any]:
    def make(params: Any) -> Any:
        optimizer = optim.AdamW(params, **options)
        return optimizer, optim.GradientRelease(optimizer)

    return make


MEMORY_WAYS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    STOCK: (torch.optim.AdamW, torch.float32),
    "torch fused": (partial(torch.optim.AdamW, fused=True), torch.float32),
    "fastopt": (optim.AdamW, torch.float32),
    "gradient release": (_release(), torch.float32),
    "8-bit moments": (partial(optim.AdamW, state_storage="8bit"), torch.float32),
    "gradient release, 8-bit moments": (_release(state_storage="8bit"), torch.float32),
    "gradient release, bf16, stochastic, 8-bit moments": (
        _release(state_storage="8bit", param_precision="stochastic"),
        torch.bfloat16,
    ),
}


def peak_memory(way: str) -> tuple[int, int]:
    """Bytes that training adds to this process, which has done little else, and parameters."""
    language_model = example("language_model")
    make, dtype = MEMORY_WAYS[way]
    settings = replace(language_model.DEFAULT, **MEMORY_SHAPE)
    tokens = torch.randint(0, settings.vocabulary, (settings.batch_size, settings.context + 1))

    def train(shape: Any, steps: int) -> int:
        parts = language_model.STOCK_PARTS if way.startswith(STOCK) else language_model.FAST_PARTS
        model = language_model.LanguageModel(shape, shape.vocabulary, parts).to(dtype)
        kept = make(model.parameters())
        optimizer = kept[0] if isinstance(kept, tuple) else kept
        for _ in range(steps):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return sum(parameter.numel() for parameter in model.parameters())

    train(replace(settings, width=64, layers=1), 2)  # loads libraries and starts threads
    return probes.growth_of(partial(train, settings, MEMORY_STEPS))


def _memory_in_process(way: str) -> tuple[int, int]:
    arguments = [sys.executable, "-m", "bench.training", "--memory", way]
    output = subprocess.run(arguments, cwd=ROOT, check=True, timeout=900, stdout=subprocess.PIPE)
    growth, parameters = json.loads(output.stdout)
    return growth, parameters


def measure_losses(quick: bool) -> Losses:
    """Trains all programs, with all seeds."""
    programs: dict[str, list[dict[str, float]]] = {}
    for program in PROGRAMS:
        for seed in SEEDS[:1] if quick else SEEDS:
            print(f"{program}, seed {seed}", file=sys.stderr, flush=True)
            programs.setdefault(program, []).append(validation_losses(program, seed, quick))
    return {**results.provenance(), "programs": programs}


def measure_memory() -> Memory:
    """Each way in a process of its own."""
    found = {way: _memory_in_process(way) for way in MEMORY_WAYS}
    peaks = {way: growth for way, (growth, _) in found.items()}
    _, parameters = found[STOCK]
    return {**results.provenance(), "parameters": parameters, "peaks": peaks}


def loss_table(losses: Losses) -> str:
    """Mean validation losses, and how far each way is from fp32 at its worst seed."""
    programs = list(losses["programs"])
    seeds = len(losses["programs"][programs[0]])
    heads = [f"{program}: loss | against fp32" for program in programs]
    lines = [
        f"Validation losses, means of {seeds} seeds; in brackets the seed that is furthest from "
        "fp32's own.",
        "",
        "| stored as | " + " | ".join(heads) + " |",
        "|---|" + "---:|---:|" * len(programs),
    ]
    for way in WAYS:
        cells = [way]
        for runs in losses["programs"].values():
            changes = [run[way] / run[EXACT] - 1 for run in runs]
            furthest = max(changes, key=abs)
            cells.append(f"{fmean(run[way] for run in runs):.4f}")
            cells.append(f"{fmean(changes):+.2%} ({furthest:+.2%})" if way != EXACT else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(memory: Memory) -> str:
    """Peak memory, and how far it is under stock's."""
    stock = memory["peaks"][STOCK]
    shape = MEMORY_SHAPE
    lines = [
        f"What three steps add to a process at its highest; the language model with a width of "
        f"{shape['width']} and {shape['layers']} layers, {memory['parameters'] / 1e6:.1f} "
        f"million parameters, {shape['batch_size']} x {shape['context']} tokens.",
        "",
        "| AdamW | peak, MiB | bytes per parameter | under stock |",
        "|---|---:|---:|---:|",
    ]
    for way, growth in memory["peaks"].items():
        each = growth / memory["parameters"]
        lines.append(f"| {way} | {growth / 2**20:.0f} | {each:.1f} | {1 - growth / stock:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = command.make_parser("training", __doc__, quick="the examples' smallest sizes")
    parser.add_argument("--part", choices=["losses", "memory"], help="instead of both")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(peak_memory(arguments.memory)))
        return
    parts: dict[str, command.Part] = {
        "losses": (partial(measure_losses, arguments.quick), loss_table),
        "memory": (measure_memory, memory_table),
    }
    chosen = {arguments.part: parts[arguments.part]} if arguments.part else parts
    command.add(chosen, arguments.output, parser)


if __name__ == "__main__":
    main()
