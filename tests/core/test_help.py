"""The help pages quote the messages that people see, letter by letter."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "web" / "docs").glob("*/en.md"))
QUOTED = re.compile(r"^- (\*[^*]+\*(?:(?:, |, or the note )\*[^*]+\*)*)", re.M)
LEAST = 12  # letters that a message has of its own


def spelled(node: ast.expr) -> str:
    """A literal as its reader sees it, with ... for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(spelled, node.values))
    return "..."


@cache
def messages() -> list[str]:
    """Every text in the pack's code, parts of longer ones included."""
    files = [p for folder in ("core", "nodes") for p in (ROOT / folder).rglob("*.py")]
    return [spelled(node) for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.JoinedStr) or
            isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip


def quotes(page: Path) -> Iterator[str]:
    """What begins a line of the common mistakes in italics."""
    mistakes = page.read_text("utf-8").partition("\n## Common mistakes\n")[2]
    for line in QUOTED.findall(mistakes):
        yield from re.findall(r"\*([^*]+)\*", line)


@cache
def filled() -> list[re.Pattern[str]]:
    """The messages that have something to fill in, as patterns of what is shown."""
    parts = [message.split("...") for message in messages() if "..." in message]
    return [re.compile(".+".join(map(re.escape, fixed))) for fixed in parts
            if sum(map(len, fixed)) >= LEAST]  # fmt: skip


def said(quote: str) -> bool:
    """Whether ``quote`` is a part of a message, or one with some things filled in."""
    return any(quote in message for message in messages()) or any(
        pattern.fullmatch(quote) for pattern in filled()
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_quoted_messages_are_said(page: Path) -> None:
    assert [quote for quote in quotes(page) if not said(quote)] == []


def test_pages_quote_messages() -> None:
    assert sum(len([*quotes(page)]) for page in PAGES) > 30
