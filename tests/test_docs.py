"""What README and docs show runs as it stands there, and links lead somewhere.

The blocks of a page run one after the other, in one namespace for each page:

- a ``python`` block runs;
- a ``diff`` block runs twice, as it was and as it is; what follows sees the latter;
- a ``text`` block after one of them is what it prints, with ``...`` for whatever varies;
- a comment ``<!-- run``, code, ``-->`` runs too: what the page takes for granted;
- a block after a comment ``<!-- not run: reason -->`` is left.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastopt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<left><!-- not run: [^>]+-->\n+)?^```(?P<language>python|diff|text)\n(?P<code>.*?)^```$"
    r"|^<!-- run\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    line: int
    language: str
    code: str


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page that are to run, or to be printed."""
    blocks = []
    for found in BLOCK.finditer(text):
        if found["left"]:
            continue
        name = "hidden" if found["hidden"] is not None else "code"
        line = text.count("\n", 0, found.start(name))
        blocks.append(Block(line, found["language"] or "python", found[name]))
    return blocks


def versions(diff: str) -> list[str]:
    """The code before and after."""
    lines = diff.splitlines(keepends=True)
    return ["".join(line[1:] for line in lines if line[0] != sign) for sign in "+-"]


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pages write files, and set what other tests have otherwise."""
    monkeypatch.chdir(tmp_path)
    threads, allow_rnn = torch.get_num_threads(), torch._dynamo.config.allow_rnn
    yield
    torch.set_num_threads(threads)
    torch._dynamo.config.allow_rnn = allow_rnn


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for line, language, code in blocks_of(page.read_text()):
        place = f"{page.name}:{line}"
        if language == "text":
            assert doctest.OutputChecker().check_output(code, printed, OUTPUT), (
                f"{place} prints\n{printed}"
            )
            continue
        for version in versions(code) if language == "diff" else [code]:
            torch.manual_seed(0)
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * line + version, place, "exec"), names)
            printed = output.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_the_reference_has_every_public_name() -> None:
    reference = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    modules = fastopt, fastopt.optim, fastopt.nn, fastopt.nn.utils
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("fastopt"):
                assert re.search(rf"^::: {module.__name__}\.(\w+\.)*{name}$", reference, re.M), name


def test_a_diff_is_two_programs() -> None:
    assert versions("-a = 1\n+a = 2\n b = a\n") == ["a = 1\nb = a\n", "a = 2\nb = a\n"]
