"""What a run with MagCache did, in words: told on the node and in the log at its end."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

import comfy.model_management
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...core.cache.magcache import Rule
from ...core.cache.tally import Cell, Tally
from ...core.cache.trace import BEST
from .cache_settings import Settings
from .ratios import Source

# Why a step is computed -> the same in plain words.
REASONS = {
    "retention": "one of the first steps",
    "high-noise expert": "the high-noise expert is never skipped",
    "always computed": "this model's step that is always computed",
    "last step": "the last step",
    "own ratio": "its own ratio is too far from 1",
    "longest run": "as many as allowed were skipped in a row",
    "threshold": "the error would reach the threshold",
    "nothing known": "nothing is known yet",
    "others of its batch": "others of its batch had to be computed",
    "other ways of it": "guidance compares it with what was computed at this noise level",
    "guard": "its input had changed too much",
    "step back": "the sampler went back to more noise",
    "outside the range": "not between start_percent and end_percent",
    "calibrating": "this run measures the ratios",
}
# Of those that settings decide -> what to do where nothing was skipped.
_WAYS_OUT = {
    "retention": "lower 'retention', or use more steps",
    "threshold": "raise 'threshold', or use more steps",
    "guard": "raise 'guard', or set it to 0",
    "outside the range": "lower 'start_percent' or raise 'end_percent'",
}
_log = logging.getLogger(__name__)
_RUNS = 8  # of one queued graph that a node shows
_LEVELS = {"blocks": "of the blocks", "network": "of the whole network"}


def tell(
    tally: Tally, settings: Settings, source: Source | None, level: str, off: str = "",
    stopped: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What the run did as data; shown on the node, and a line in the log.

    Args:
        level: "blocks" or "network"; "" where nothing was evaluated.
        off: why nothing was to be skipped, "" if something was.
        stopped: before its end, by the user or an error.
    """
    off = off or (source.off if source else "")
    timed = bool(tally.skipped) and not stopped
    if timed:
        comfy.model_management.synchronize()  # a GPU may be at the last step still
    run = {
        "off": off,
        "calibrating": bool(source and source.calibrating and not off),
        "stopped": stopped,
        "facts": [] if off or source is None else _facts(settings, source, level),
        "steps": tally.steps,
        "computed": tally.computed,
        "skipped": tally.skipped,
        "predicted": tally.predicted() if timed else None,
        "measured": tally.measured(time.perf_counter()) if timed else None,
        "schedule": tally.timeline.steps,
        "strip": {b: _strip(tally.cells(b)) for b in sorted(tally.rows) if not off},
    }
    run["notes"] = _notes(tally, settings, source, level, run)
    run["headline"] = _headline(tally, settings, source, run)
    _log.info("MagCache: %s", run["headline"])
    _show(settings, run)
    return run


def _strip(cells: list[Cell]) -> list[list[Any]]:
    return [
        [cell.step, float(f"{cell.sigma:.4g}"), cell.skipped, cell.all,
         REASONS.get(cell.reason, cell.reason)]
        for cell in cells
    ]  # fmt: skip


def _headline(tally: Tally, settings: Settings, source: Source | None, run: dict[str, Any]) -> str:
    if run["off"]:
        return f"Off: {run['off']}"
    # Some samplers evaluate the model between the steps, too.
    between = run["steps"] > tally.timeline.stop - tally.timeline.start
    what = "noise levels" if between else "steps"
    parts = [f"{run['computed']} of {run['steps']} {what} computed"]
    parts += [f"{run[kind]:.2f}x {kind}" for kind in ("predicted", "measured") if run[kind]]
    if source is not None and source.stored and settings.calibrate != "always":
        parts.append("to be used from the next run on")
    ways = {"Stopped": run["stopped"], "Calibrating": run["calibrating"],
            "Nothing skipped": not run["skipped"]}  # fmt: skip
    return ": ".join([*[way for way, holds in ways.items() if holds][:1], ", ".join(parts)])


def _notes(
    tally: Tally, settings: Settings, source: Source | None, level: str, run: dict[str, Any]
) -> list[str]:
    """What the user should know."""
    made = [*source.notes] if source else []
    if level and settings.residual not in ("auto", level):
        wanted = settings.residual
        made.append(f"The {wanted} of this model can't be skipped alone: 'residual' is {level}")
    if source is not None and source.stored and settings.calibrate == "always":
        made.append("To use it, set 'calibrate' to when missing and 'ratios' to auto: with always, "
                    "every run measures anew")  # fmt: skip
    if not any(run[key] for key in ("off", "calibrating", "stopped", "skipped")):
        made += _hint(tally)
    return made


def _hint(tally: Tally) -> list[str]:
    """Why nothing was skipped, and what to do about it."""
    reasons = Counter(why for row in tally.rows.values() for *_, why in row if why in _WAYS_OUT)
    return [
        f"Most often: {REASONS[why]}. To skip more, {_WAYS_OUT[why]}"
        for why, _ in reasons.most_common(1)
    ]


def _facts(settings: Settings, source: Source, level: str) -> list[tuple[str, str]]:
    """What the run went by."""
    facts = [("ratios", source.name), ("residual", _LEVELS.get(level, level))]
    if source.calibrating:
        return facts
    fill = f"{BEST} (auto)" if settings.fill == "auto" else settings.fill
    errors = source.errors + (" (auto)" if settings.errors == "auto" else "")
    guard = f", input changed by at most {settings.guard:g}" if settings.guard else ""
    rule = describe(source.rule) + guard
    return [*facts, ("fill", fill), ("errors", errors), ("settings", rule)]


def describe(rule: Rule) -> str:
    """A rule's settings in words."""
    last = " and the last one" if rule.guard_last else ""
    first = f"the first {100 * rule.retention:.3g} % of the steps{last} computed"
    return f"threshold {rule.threshold:.4g}, at most {rule.k} skipped in a row, {first}"


def as_text(run: dict[str, Any]) -> str:
    """A run in lines."""
    facts = [f"{name}: {value}" for name, value in run["facts"]]
    return "\n".join([run["headline"], *run["notes"], *facts])


def _show(settings: Settings, run: dict[str, Any]) -> None:
    """Put the run into its node's report, and send that as the node's result.

    ComfyUI keeps the report with the node's result: so it is in the history, and it is shown again
    where the node itself need not run again.
    """
    node, report = settings.node_id, settings.report
    if report is None:
        return
    context = get_executing_context()
    prompt = context.prompt_id if context else ""
    # Several samplers of one graph may go by one node.
    before = report.get("runs", []) if prompt and report.get("prompt") == prompt else []
    runs = [*before, run][-_RUNS:]
    report.update(prompt=prompt, runs=runs, text="\n\n".join(map(as_text, runs)))
    server = getattr(PromptServer, "instance", None)
    client = getattr(server, "client_id", None)
    if server is not None and client is not None and prompt:  # no client would mean every client
        # A copy: it is written to the socket later, when the next run may change the report.
        sent = {"text": [report["text"]], "adapter_lab": [dict(report)]}
        data = {"node": node, "display_node": node, "output": sent, "prompt_id": prompt}
        server.send_sync("executed", data, client)
