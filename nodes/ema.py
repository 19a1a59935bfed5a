"""Post-hoc EMA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.merge.menus import AVERAGES, ORDERS
from ..core.train.checkpoints import TrainRun
from .host import paths
from .host.progress import ticker
from .types import CATEGORY, TrainRunType, lines, panel, report_output

_FAR = 1 << 31  # steps


def _files(run: TrainRun | None, chosen: Sequence[str], profile: str) -> list[Path]:
    """The files to average: of the run those that the profile works on, unless some are chosen."""
    from ..core.merge.order import expand

    if chosen:
        return expand(chosen, _folders(profile) if run is None else [run.folder])
    if run is None:
        raise AdapterLabError(
            "There is nothing to average", found="neither a run nor checkpoints",
            fix="Connect a run, or name files in 'checkpoints', one path or glob a line",
        )  # fmt: skip
    checkpoints = [path for _, path in run.checkpoints()]
    tracked = [path for checkpoint in checkpoints for path in run.averages(checkpoint)]
    if profile == "reconstruct" and checkpoints and not tracked:
        raise AdapterLabError(
            f"The run '{run.name}' tracked no averages",
            found=f"{len(checkpoints)} ordinary checkpoints in '{run.folder}'",
            fix="Train with ema_tracking on, or choose the profile 'power', which takes these",
        )
    return tracked if profile == "reconstruct" else checkpoints


def _folders(profile: str) -> list[Path]:
    """Where relative paths are looked up. Loaders list copies of a run's checkpoints under its
    name, and none of what it tracked."""
    *shelves, runs = paths.adapter_folders()
    return [runs, *shelves] if profile == "reconstruct" else [*shelves, runs]


def _number(name: str, tooltip: str, default: float, step: float) -> io.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=step, tooltip=tooltip)


def _inputs() -> list[Any]:
    return [
        TrainRunType.Input("run", optional=True, tooltip="A run whose files are averaged."),
        io.String.Input(
            "checkpoints",
            default="",
            multiline=True,
            tooltip="Files to average: a path or glob a line, such as 'my_style/*.safetensors', "
            "below output/loras, models/loras or output/adapter_lab/runs. With a run: a choice of "
            "its files, empty for all.",
        ),
        io.Combo.Input(
            "profile",
            options=list(AVERAGES),
            default="reconstruct",
            tooltip="reconstruct: from the two averages that Train Adapter tracks, nearly exact. "
            "power: of ordinary checkpoints by their steps. musubi: the numbers of musubi-tuner.",
        ),
        _number(
            "sigma_rel", "Width of the average relative to the training, above 0 and up to 0.2886: "
            "0.05 is the last part only, 0.2886 the mean of all. Not for musubi beta.",
            0.15, 0.005,
        ),
        _number("beta", "musubi beta: how much of the average each next file keeps.", 0.95, 0.01),
        _number("beta2", "musubi beta: the same for the last file, linear between. 0: off.",
                0.0, 0.01),
        *_range(),
        io.Boolean.Input(
            "products", default=False, optional=True, advanced=True,
            tooltip="Average what the factors do to the weights, not the factors, and factor the "
            "result anew at the rank it has in one file.",
        ),
    ]  # fmt: skip


def _range() -> list[Any]:
    """Which of the files, and in what order."""
    return [
        io.Combo.Input(
            "order", options=list(ORDERS), default="step",
            tooltip="step: by metadata, else by the number in the name.",
        ),
        io.Int.Input(
            "first", default=0, min=-_FAR, max=_FAR,
            tooltip="Leave out what comes before this step. -10: take the last ten. 0: from the "
            "start.",
        ),
        io.Int.Input(
            "last", default=0, min=-_FAR, max=_FAR,
            tooltip="Leave out what comes after this step. -2: leave out the newest. 0: to the "
            "end.",
        ),
    ]  # fmt: skip


class PostHocEMA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabEMA",
            display_name="Post-hoc EMA",
            category=f"{CATEGORY}/tools",
            description="Averages the checkpoints of a training after it has ended.",
            search_aliases=["ema", "average checkpoints", "post hoc ema", "sigma_rel", "musubi"],
            has_intermediate_output=True,
            inputs=_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.LoraModel.Output(display_name="adapter", tooltip="The average."),
                report_output("Which files, their weights, and how near the profile is."),
                io.Image.Output(display_name="plot", tooltip="Weights, decays and widths."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoints: str | None = None, profile: str = "", **_: Any) -> Any:
        # A run that comes over a link is unknown as yet; the node it comes from tells of changes.
        if checkpoints is None:
            return math.nan
        from ..core.merge.order import expand, stamps

        try:
            return stamps(expand(lines(checkpoints), _folders(profile)))
        except AdapterLabError as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        checkpoints: str,
        profile: str,
        sigma_rel: float,
        beta: float,
        beta2: float,
        order: str,
        first: int,
        last: int,
        run: TrainRun | None = None,
        products: bool = False,
    ) -> io.NodeOutput:
        found = _files(run, lines(checkpoints), profile)
        # Imported where it runs: ComfyUI starts faster.
        from ..core.merge.ema import Average, Settings, plan
        from ..core.merge.products import ProductAverage
        from .ema_plot import average_plot

        made = plan(
            found, profile, Settings(sigma_rel, beta, beta2 or None), order=order, first=first,
            last=last,
        )  # fmt: skip
        tick = ticker(cls.hidden.unique_id if cls.hidden else None)
        job = (ProductAverage if products else Average)(made, tick=tick)
        average = job.collect(f"{run.name if run else made.files[-1].path.stem} average")
        text = job.outcome.to_text()
        ui = panel(text, job.outcome.to_dict())
        return io.NodeOutput(average, text, average_plot(made), ui=ui)


NODES = [PostHocEMA]
