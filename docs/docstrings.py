"""Docstrings for the site: roles as Markdown, formulas as MathML, which needs no script."""

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

FORMULA = re.compile(r"^( *)\.\. math::\n((?:\1 +\S.*\n?|\s*\n)+)", re.MULTILINE)
INLINE_FORMULA = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:class|func|meth):`([^`]+)`")


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for everything that it finds."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring in Markdown."""
    text = FORMULA.sub(lambda found: _displayed(found[1], found[2]), text)
    # A span, as <math> at the beginning of a line would be a block of its own.
    text = INLINE_FORMULA.sub(lambda found: f"<span>{convert(found[1])}</span>", text)
    return ROLE.sub(_reference, text)


def _displayed(indent: str, formula: str) -> str:
    aligned = rf"\begin{{align*}}{dedent(formula)}\end{{align*}}"
    return f"{indent}{convert(aligned, display='block')}\n\n"


def _reference(found: re.Match[str]) -> str:
    name = found[1]
    return f"[`{name}`][{name}]" if name.startswith("fastopt.") else f"`{name}`"
