"""Magnitude ratios as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import AdapterLabError

_LEAST = 2  # numbers; the first is no ratio of anything
_MOST = 10_000  # the longest schedules have 1000 steps
_SHOWN = 20  # letters of a bad number in a message
_LABEL = re.compile(r"\b(cond|uncond)\s*[:=]", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,;\[\](){}]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.I | re.A)


def parse_ratios(text: str) -> dict[str, tuple[float, ...]]:
    """The ratios of "cond" and "uncond", each with its leading 1, one number a step.

    Numbers are separated by commas, blanks or new lines; brackets are allowed. One list is for both
    branches; two are told apart by "cond:" and "uncond:" in front of them.

    Raises:
        AdapterLabError: something that is no number above 0, or lists that don't fit together.
    """
    made: dict[str, tuple[float, ...]] = {}
    for branch, body in _lists(text):
        if branch in made:
            raise AdapterLabError(f"'{branch}:' is in the ratios twice")
        made[branch] = _numbers(body, branch)
    _require_pair(made)
    cond = made.get("cond", made.get("uncond", ()))
    return {"cond": cond, "uncond": made.get("uncond", cond)}


def _lists(text: str) -> Iterator[tuple[str, str]]:
    """Branch and body of each list."""
    start, *rest = _LABEL.split(text)
    if _BETWEEN.sub("", start) or not rest:
        if rest:
            raise AdapterLabError(
                "There are ratios in front of 'cond:' or 'uncond:'",
                found=f"'{start.strip()[:_SHOWN]}'",
                fix="Name both lists or give one without a name",
            )
        yield "cond", start
    for label, body in zip(rest[::2], rest[1::2], strict=True):
        yield label.lower(), body


def _numbers(body: str, branch: str) -> tuple[float, ...]:
    words = [word for word in _BETWEEN.split(body) if word]
    if len(words) > _MOST or not words:
        raise _miscounted("too long" if words else "empty", branch, len(words))
    made = tuple(_number(word, place, branch) for place, word in enumerate(words, 1))
    if len(made) < _LEAST:
        raise _miscounted("too short", branch, len(made))
    return made


def _miscounted(what: str, branch: str, count: int) -> AdapterLabError:
    return AdapterLabError(
        f"The list of ratios for {branch} is {what}",
        found=f"{count} number{'s' if count > 1 else ''}" if count else "",
        expected=f"one number a step, {_LEAST} to {_MOST}",
    )


def _number(word: str, place: int, branch: str) -> float:
    value = float(word) if _NUMBER.fullmatch(word) else float("nan")
    if 0 < value < float("inf"):
        return value
    raise AdapterLabError(
        f"Number {place} of the ratios for {branch} is no ratio",
        found=f"'{word if len(word) <= _SHOWN else f'{word[:_SHOWN]}...'}'",
        expected="a number above 0, such as 0.98",
    )


def _require_pair(made: dict[str, tuple[float, ...]]) -> None:
    counts = {branch: len(ratios) for branch, ratios in made.items()}
    if len(set(counts.values())) > 1:
        raise AdapterLabError(
            "The two lists of ratios have not the same length",
            found=", ".join(f"{count} for {branch}" for branch, count in counts.items()),
            expected="one number a step in both",
        )
