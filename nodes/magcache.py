"""MagCache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..core.cache.known import AUTO as OPEN
from ..core.cache.known import DEFAULTS
from ..core.cache.published import names
from ..core.cache.trace import FILLS
from ..core.checks import require_choice, require_range
from ..core.errors import AdapterLabError
from .types import AUTO, CATEGORY, panel

MANUAL = "manual"
CALIBRATE = ("when missing", "always", "never")
_FILLS = (AUTO, *FILLS)
ERRORS = (AUTO, *DEFAULTS)
_RESIDUALS = (AUTO, "blocks", "network")
_BOUNDS = {"threshold": 100, "k": 1000, "retention": 1}  # what they are at most
_GENERAL, _OF_LINE = DEFAULTS["magnitude"], DEFAULTS["extrapolation"]
_WAYS = {
    AUTO: "a stored calibration of the model, else the published ratios of its kind",
    MANUAL: "those of 'manual_ratios'",
}
_MISSING = {
    "when missing": "; if there is neither, the next run calibrates and skips nothing",
    "never": "; if there is neither, nothing is skipped",
}


def menu(*first: str) -> list[str]:
    """What the menu of ratios offers: ``first``, the stored calibrations, the published lists."""
    from .host.ratios import calibration_names

    return [*first, *calibration_names(), *names()]


def rule_inputs() -> list[Any]:
    """Threshold, k and retention; -1 for what the ratios come with."""
    return [
        io.Float.Input(
            "threshold", default=-1.0, min=-1.0, max=_BOUNDS["threshold"], step=0.01,
            round=False,
            tooltip="How large the error of a run of skipped steps may become. Higher is faster "
            "and less exact. 0: nothing is skipped. -1: as published with the ratios, else "
            f"{_GENERAL.threshold:g}, or {_OF_LINE.threshold:g} for errors of extrapolation.",
        ),
        io.Int.Input(
            "k", default=-1, min=-1, max=_BOUNDS["k"],
            tooltip="How many steps in a row may be skipped. -1: as published with the ratios, "
            f"else {_GENERAL.k}.",
        ),
        io.Float.Input(
            "retention", default=-1.0, min=-1.0, max=1.0, step=0.05, round=False,
            tooltip="Share of the steps, from the first, that are always computed. -1: as "
            f"published with the ratios, else {_GENERAL.retention:g}.",
        ),
    ]  # fmt: skip


def manual_input() -> Any:
    return io.String.Input(
        "manual_ratios", default="", multiline=True,
        tooltip="For 'manual': the ratio of each step to the one before, starting with 1, for any "
        "number of steps. Two lists: 'cond:' and 'uncond:' in front of them.",
    )  # fmt: skip


def guard_last_input() -> Any:
    return io.Boolean.Input(
        "guard_last", default=True, optional=True, advanced=True,
        tooltip="Always compute the last step, which sets the finest detail.",
    )  # fmt: skip


def _inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="Any diffusion model, with anything already on it."),
        io.Combo.Input(
            "ratios", options=menu(AUTO, MANUAL), default=AUTO,
            tooltip="How the residual's size changes from step to step. auto: a calibration of "
            "this model, else the published ratios of its kind, else this run calibrates.",
        ),
        manual_input(),
        *rule_inputs(),
        _share("start_percent", 0.0, "Where in sampling skipping may begin; 0 is its start."),
        _share("end_percent", 1.0, "Where in sampling skipping ends; 1 is its end."),
        io.Combo.Input(
            "calibrate", options=list(CALIBRATE), default=CALIBRATE[0],
            tooltip="A run that calibrates computes every step and stores the ratios of this "
            "model for the next ones. when missing: if 'auto' finds none. always: every run does, "
            "and none skips.",
        ),
        io.Combo.Input(
            "fill", options=list(_FILLS), default=AUTO,
            tooltip="What stands in for a skipped step. reuse: the last residual, as in the paper. "
            "scaled: at the size expected. first order: the line through the last two. auto: "
            "first order.",
        ),
        *_advanced(),
    ]  # fmt: skip


def errors_input() -> Any:
    return io.Combo.Input(
        "errors", options=list(ERRORS), default=ERRORS[0], optional=True, advanced=True,
        tooltip="What the threshold is for. magnitude: the error of the residual's size, as in "
        "the paper. extrapolation: that of the line of first order; needs a calibration. auto: "
        "extrapolation where it is known.",
    )  # fmt: skip


def _share(name: str, default: float, tooltip: str) -> Any:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def _advanced() -> list[Any]:
    return [
        errors_input(),
        io.Float.Input(
            "guard", default=0.0, min=0.0, max=100.0, step=0.01, round=False, optional=True,
            advanced=True,
            tooltip="Compute a step whose input differs by more than this share from that of the "
            "last computed one. 0: off.",
        ),
        guard_last_input(),
        io.Combo.Input(
            "residual", options=list(_RESIDUALS), default=AUTO, optional=True, advanced=True,
            tooltip="What is kept of a computed step. blocks: what the transformer's blocks add. "
            "network: output minus input. auto: blocks where the model lets them be skipped.",
        ),
    ]  # fmt: skip


def require_known(ratios: str) -> None:
    """Refuse ratios that are in no menu."""
    if ratios not in menu(AUTO, MANUAL):
        raise AdapterLabError(
            f"There are no ratios '{ratios}'",
            expected="auto, manual, or a name in the menu",
            fix="Choose another; a calibration may have been deleted or renamed: press R to "
            "refresh the menu",
        )


def setting(name: str, value: float) -> Any:
    """A value of ``rule_inputs``, None where it is left to the ratios."""
    if value == OPEN:
        return None
    require_range(name, value, 0, _BOUNDS[name])
    return value


def _settings(
    ratios: str, manual_ratios: str = "", start_percent: float = 0.0, end_percent: float = 1.0,
    **values: Any,
) -> Any:  # fmt: skip
    """Of the host, from the inputs, all of which are checked here."""
    from ..core.cache.text import parse_ratios
    from .host.cache_settings import Settings

    require_known(ratios)
    values |= {name: setting(name, values[name]) for name in _BOUNDS}
    manual = parse_ratios(manual_ratios) if ratios == MANUAL else {}
    made = Settings(ratios, manual, start=start_percent, end=end_percent, **values)
    for name, known in (("calibrate", CALIBRATE), ("fill", _FILLS), ("errors", ERRORS),
                        ("residual", _RESIDUALS)):  # fmt: skip
        require_choice(name, getattr(made, name), known)
    require_range("start_percent", start_percent, 0, 1)
    require_range("end_percent", end_percent, 0, 1)
    if start_percent >= end_percent:
        raise AdapterLabError(
            "'start_percent' is not below 'end_percent'",
            found=f"{start_percent:g} and {end_percent:g}",
            fix="Lower the first or raise the second; 0 and 1 are the whole of sampling",
        )
    require_range("guard", made.guard, 0)
    return made


def _promise(settings: Any) -> str:
    """What the node will do, told before it has done it."""
    way = _WAYS.get(settings.ratios, f"'{settings.ratios}'")
    if settings.calibrate == "always":
        return "Every run calibrates: it computes every step and stores the ratios."
    if 0 in (settings.threshold, settings.k):
        return "Off: with a threshold or k of 0 no step can be skipped."
    missing = _MISSING[settings.calibrate] if settings.ratios == AUTO else ""
    return f"Goes by {way}{missing}. What was skipped is told here after sampling."


class MagCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabMagCache",
            display_name="MagCache",
            category=f"{CATEGORY}/speed",
            description="Skips the network on sampling steps whose result can be told from the "
            "last ones. Measures by itself which steps these are.",
            search_aliases=["cache", "skip steps", "faster sampling", "teacache", "easycache",
                            "speed up"],
            has_intermediate_output=True,
            not_idempotent=True,  # two nodes that are alike would share one result and its report
            inputs=_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, skipping steps."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, ratios: str | None) -> bool | str:
        try:
            if ratios is not None:  # None comes over a link
                require_known(ratios)
        except AdapterLabError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: Any, **values: Any) -> io.NodeOutput:
        # Imported where it runs: ComfyUI starts faster.
        from .host.cacheable import require_cacheable
        from .host.caching import attach

        require_cacheable(model)
        settings = _settings(**values)
        ui = panel(_promise(settings))
        node_id = cls.hidden.unique_id if cls.hidden else None
        report = ui["adapter_lab"][0] if node_id else None
        told = replace(settings, node_id=node_id, report=report)
        return io.NodeOutput(attach(model, told), ui=ui)


NODES = [MagCache]
