"""MagCache Plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..core.cache.known import Found, Lists, advice, listed, rule_for
from ..core.cache.planned import Numbers, Plan, faster, numbers_for, planned
from ..core.cache.published import Special, names, published, special_of
from ..core.checks import require_choice, require_range
from ..core.errors import AdapterLabError
from .magcache import (
    ERRORS,
    MANUAL,
    errors_input,
    guard_last_input,
    manual_input,
    menu,
    require_known,
    rule_inputs,
    setting,
)
from .types import AUTO, CATEGORY, panel, report_output

_FIRST = "wan2.1_t2v_1.3B"  # what the menu begins with
_LONGEST = 1000  # steps
_FASTEST = 100.0


def _found(ratios: str, manual: str) -> tuple[Found, list[str]]:
    """The ratios that the node was given by name or as text, and what to tell of them."""
    from ..core.cache.text import parse_ratios

    if ratios == AUTO:
        raise AdapterLabError(
            "A plan has no model to find ratios for", found="'auto'",
            expected="a published list, a calibration, or manual",
            fix="Sample once with MagCache set to auto, then choose the calibration it has stored",
        )  # fmt: skip
    require_known(ratios)
    if ratios == MANUAL:
        lists = parse_ratios(manual)
        special = special_of(lists["cond"])
        return Found(MANUAL, Lists(lists), special), _special(special)
    if ratios in names():
        one = published(ratios)
        source = f"for {len(one.cond)} steps, from {one.source}"
        return listed(one), [source, *(_special(one.special) or filter(None, [one.note]))]
    made = _calibration(ratios)
    return Found(ratios, made), [
        f"calibrated with {made.steps} steps, on the level of the {made.level}; planned for noise "
        "levels spread like those",
    ]


def _numbers(found: Found, steps: int, errors: str, notes: list[str]) -> Numbers:
    """As in sampling: errors of extrapolation where they are known and not refused."""
    require_choice("errors", errors, ERRORS)
    numbers = numbers_for(found.known, steps, bends=errors != "magnitude")
    if errors not in (AUTO, numbers.errors):
        notes.append("Nothing is known of errors of extrapolation: 'errors' is magnitude")
    return numbers


def _calibration(name: str) -> Any:
    from ..core.cache.calibration import read_calibration
    from .host import paths
    from .host.ratios import CALIBRATED

    return read_calibration(paths.calibrations() / f"{name.removeprefix(CALIBRATED)}.json")


def _special(special: Special) -> list[str]:
    """What holds for one model only, in words."""
    made: list[str] = []
    if special.forced is not None:
        step, of = special.forced
        made.append(f"step {step + 1} of {of}, or what maps to it, is always computed")
    if special.closest != math.inf:
        made.append(
            f"a step whose own ratio is further than {special.closest:g} from 1 is computed"
        )
    if special.boundary is not None:
        high = "" if special.high else ", and the first is never skipped"
        made.append(
            "two experts: in sampling the retention holds for the steps of each"
            f"{high}. Where the second begins depends on the scheduler, so it is not planned"
        )
    return made


def text(plan: Plan, notes: Sequence[str] = (), wanted: float = 0) -> str:
    """The schedule in lines: the verdict first."""
    from ..core.cache.speedup import speedup
    from .host.cache_report import describe

    count, steps = len(plan.together), plan.steps
    verdict = f"{steps - count} of {steps} steps computed, {speedup(count, steps):.2f}x at best"
    lines = [verdict, *_hints(plan, wanted)]
    own = {
        b: [t for t, s in enumerate(found) if not s.reason] for b, found in plan.branches.items()
    }
    if all(found == plan.together for found in own.values()):
        own = {" and ".join(own): plan.together}
    else:
        own["both, where one batch has them"] = plan.together
    lines += [f"{name}: {len(found)} skipped{_listed(found)}" for name, found in own.items()]
    return "\n".join([*lines, f"settings: {describe(plan.rule)}", f"ratios: {plan.name}",
                      f"errors: {plan.errors}", *notes])  # fmt: skip


def _listed(steps: Sequence[int]) -> str:
    """Numbers of steps, counted from 1, with those that follow each other as ranges."""
    runs: list[list[int]] = []
    for t in steps:
        if runs and runs[-1][1] == t:
            runs[-1][1] = t + 1
        else:
            runs.append([t + 1, t + 1])
    parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return f": steps {', '.join(parts)}" if parts else ""


def _hints(plan: Plan, wanted: float) -> list[str]:
    """What to do where nothing is skipped."""
    from .host.caching import FEWEST

    if plan.steps < FEWEST:
        return [f"Too few steps: below {FEWEST} they are too far apart, and MagCache stays off"]
    if plan.together or wanted == 1:
        return []
    if wanted:
        return [f"Nothing is skipped: any step less is more than {wanted:g}x, so raise 'speed_up'"]
    if plan.rule.threshold == 0 or plan.rule.k == 0:
        return ["Nothing is skipped: the threshold or k is 0"]
    refused = [step.error for found in plan.branches.values() for step in found
               if step.reason == "threshold"]  # fmt: skip
    if not refused:
        return ["Nothing is skipped: every step is one that is always computed"]
    return [f"Nothing is skipped: the least error of a step is {min(refused):.3g}, "
            "so the threshold has to be above"]  # fmt: skip


class MagCachePlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabMagCachePlan",
            display_name="MagCache Plan",
            category=f"{CATEGORY}/speed",
            description="Which steps MagCache will skip and how much faster sampling can get, "
            "before anything is sampled.",
            search_aliases=["magcache schedule", "skip steps", "mag ratios", "speed up"],
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "ratios", options=menu(MANUAL), default=_FIRST,
                    tooltip="Published for a model, measured on yours, or your own.",
                ),
                manual_input(),
                io.Int.Input("steps", default=30, min=1, max=_LONGEST, tooltip="Of the sampler."),
                *rule_inputs(),
                guard_last_input(),
                io.Float.Input(
                    "speed_up", default=0.0, min=0.0, max=_FASTEST, step=0.1, round=False,
                    optional=True,
                    tooltip="Look for the threshold that comes closest to this from below; "
                    "'threshold' is then of no effect. 0: off.",
                ),
                errors_input(),
            ],
            outputs=[
                report_output("Which steps are skipped, the speed-up, and the settings."),
                io.Image.Output(display_name="plot", tooltip="Steps, ratios and errors."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, ratios: str | None) -> bool | str:
        try:
            if ratios not in (None, AUTO):  # None comes over a link, auto is told of with a reason
                require_known(ratios)
        except AdapterLabError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, ratios: str, manual_ratios: str, steps: int, threshold: float, k: int,
        retention: float, guard_last: bool = True, speed_up: float = 0.0, errors: str = AUTO,
    ) -> io.NodeOutput:  # fmt: skip
        from .cache_plot import plan_plot

        require_range("steps", steps, 1, _LONGEST)
        require_range("speed_up", speed_up, 0, _FASTEST)
        found, notes = _found(ratios, manual_ratios)
        given = {"threshold": setting("threshold", threshold), "k": setting("k", k),
                 "retention": setting("retention", retention)}  # fmt: skip
        numbers = _numbers(found, steps, errors, notes)
        rule = rule_for(given, found, numbers.errors, guard_last=guard_last)
        if speed_up:
            rule = faster(numbers, rule, speed_up)
        plan = planned(found.name, numbers, rule)
        report = text(plan, [*notes, *filter(None, [advice(given, found)])], speed_up)
        return io.NodeOutput(report, plan_plot(plan), ui=panel(report))


NODES = [MagCachePlan]
