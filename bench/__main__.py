"""``python -m bench``: measures, writes results, renders them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import command, report, results, run


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose names contain this text")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes for each case")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rounds")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file to write, say bench/results/x.json; with --only, its other rows are kept",
    )
    parser.add_argument("--render", action="store_true", help="results to README, docs and SVGs")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(run.run_memory(arguments.case, arguments.memory))
    elif arguments.case:
        arguments.json.write_text(json.dumps(run.run_case(arguments.case, arguments.quick)))
    elif arguments.render:
        report.render()
    else:
        kept = command.to_extend(arguments.output if arguments.only else None, parser)
        cases = run.run_processes(arguments.only, arguments.processes, arguments.quick)
        if arguments.output:
            merged = kept.copy()
            merged["cases"] = {**kept["cases"], **cases}
            results.save(merged, arguments.output)
        print(report.text(results.Result(machine=kept["machine"], cases=cases)))


main()
