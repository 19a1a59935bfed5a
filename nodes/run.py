"""Training Run."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.files import read_adapter
from ..core.train.checkpoints import TrainRun
from ..core.train.record import flat, read_json, read_metrics
from .host import paths
from .types import CATEGORY, TrainRunType, curve, panel, report_output

_FIRST = 20  # steps whose mean loss is shown
# What the report names, of the settings.
_TOLD = (
    "adapter.algorithm", "adapter.rank", "adapter.alpha", "optimizer.optimizer",
    "optimizer.learning_rate", "dataset_name", "batch_size", "accumulation", "seed",
)  # fmt: skip


class Run(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabRun",
            display_name="Training Run",
            category=f"{CATEGORY}/train",
            description="Takes a run from disk: its newest adapter, and the run itself for "
            "Post-hoc EMA.",
            search_aliases=["checkpoints", "training history", "resume"],
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "run_name",
                    options=paths.runs(),
                    tooltip="A run in output/adapter_lab/runs, the newest first.",
                )
            ],
            outputs=[
                TrainRunType.Output(display_name="run", tooltip="The run and its files."),
                io.LoraModel.Output(display_name="latest", tooltip="Its newest adapter."),
                report_output("Settings, losses and files of the run."),
            ],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None) -> bool | str:
        # Runs are made after the list of the menu was. None comes over a link, unknown as yet.
        known = run_name is None or paths.run(run_name).exists
        return True if known else f"There is no run '{run_name}'"

    @classmethod
    def fingerprint_inputs(cls, run_name: str | None) -> float | list[tuple[int, int]]:
        if run_name is None:
            return math.nan
        return [paths.stamp(path) for _, path in paths.run(run_name).checkpoints()[-1:]]

    @classmethod
    def execute(cls, run_name: str) -> io.NodeOutput:
        run = paths.run(run_name)
        checkpoints = run.checkpoints()
        if not checkpoints:
            raise AdapterLabError(
                f"The run '{run.name}' has no adapter files",
                found=f"none in {run.folder}" if run.folder.is_dir() else "no such run",
                fix="Choose a run that was trained, and refresh the node definitions (R)",
            )
        text, data = _report(run)
        return io.NodeOutput(run, read_adapter(checkpoints[-1][1]), text, ui=panel(text, data))


def _report(run: TrainRun) -> tuple[str, dict[str, Any]]:
    """In words, and the curves as the panel draws them."""
    stored, rows = read_json(run.config), read_metrics(run.metrics)
    settings = flat(stored.get("settings") or {})
    losses = [row["loss"] for row in rows if "loss" in row]
    known = [loss for loss in losses if isinstance(loss, (int, float))]
    checkpoints = run.checkpoints()
    lines = [f"{run.name}: step {checkpoints[-1][0]} of {settings.get('steps', 'unknown')}"]
    lines += [f"{key}: {settings[key]}" for key in _TOLD if settings.get(key) not in (None, "")]
    if known:
        first, last = known[:_FIRST], known[-_FIRST:]
        means = (sum(part) / len(part) for part in (first, last))
        lines.append("training loss {:.4f} -> {:.4f}".format(*means))
    changed = [row for row in stored.get("history") or [] if row.get("changed")]
    lines += [f"changed at step {row['step']}: {', '.join(row['changed'])}" for row in changed]
    lines.append(f"adapter files: {len(checkpoints)}, in {run.folder}")
    lines += [f"  {path.name}" for _, path in checkpoints]
    rates = [row.get("rate") for row in rows if "loss" in row]
    validation = [(row["step"], row["validation"]) for row in rows if "validation" in row]
    return "\n".join(lines), {"losses": losses, "rates": curve(rates), "validation": validation}


NODES = [Run]
