"""``python -m bench``: measures, writes results, renders them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import report, run
from bench.cases import OPTIMIZER_CASES


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose names contain this text")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes for each case")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rounds")
    parser.add_argument("--output", type=Path, help="JSON file to write, say bench/results/x.json")
    parser.add_argument("--render", action="store_true", help="results to README's table and SVG")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        (case,) = [case for case in OPTIMIZER_CASES if case.name == arguments.case]
        arguments.json.write_text(json.dumps(run.run_case(case, arguments.quick)))
    elif arguments.render:
        report.render()
    else:
        cases = run.run_processes(arguments.only, arguments.processes, arguments.quick)
        result = {"machine": run.machine(), "processes": arguments.processes, "cases": cases}
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(report.table(result))


main()
