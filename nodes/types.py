"""Socket types, and inputs and outputs that several nodes share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..core.archs import ARCHITECTURES

CATEGORY = "adapter lab"
_POINTS = 400  # of a curve

TrainDatasetType = io.Custom("TRAIN_DATASET")
TrainTargetsType = io.Custom("TRAIN_TARGETS")
AdapterConfigType = io.Custom("ADAPTER_CONFIG")
OptimizerConfigType = io.Custom("OPTIMIZER_CONFIG")
ObjectiveConfigType = io.Custom("OBJECTIVE_CONFIG")
TrainPreviewType = io.Custom("TRAIN_PREVIEW")
TrainRunType = io.Custom("TRAIN_RUN")


def strength_input(name: str, tooltip: str, **options: Any) -> io.Input:
    """A strength widget; ``options`` of any Float."""
    return io.Float.Input(
        name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip, **options
    )


def adapter_input(tooltip: str) -> io.Input:
    """A LORA_MODEL socket."""
    return io.LoraModel.Input("adapter", tooltip=tooltip)


def file_input(name: str, files: list[str], tooltip: str) -> io.Input:
    """A menu of ``files`` that also takes a full path which another node has written."""
    menu = io.Combo.Input(name, options=files, tooltip=tooltip)
    return io.MultiType.Input(menu, types=[io.String])


AUTO = "auto"


def architectures() -> dict[str, str]:
    """Title -> id of every diffusion model."""
    return {spec.title: spec.id for spec in ARCHITECTURES.values() if "model" in spec.parts}


def architecture_input(tooltip: str) -> io.Input:
    """A menu of their titles, and auto."""
    return io.Combo.Input(
        "architecture", options=[AUTO, *architectures()], default=AUTO, optional=True,
        advanced=True, tooltip=tooltip,
    )  # fmt: skip


def report_output(tooltip: str = "What matched, what did not and why, as text.") -> io.Output:
    """The STRING output that every reporting node has."""
    return io.String.Output(display_name="report", tooltip=tooltip)


def panel(text: str, data: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """UI output: ``text`` for any client, ``data`` for the panel drawn on the node."""
    return {"text": [text], "adapter_lab": [{"text": text, **_plain(data or {})}], **more}


def curve(values: Sequence[float | None]) -> list[tuple[int, float]]:
    """(step, value) of as many of the steps 1, 2, .. as a picture shows, the last among them."""
    every = max(1, math.ceil(len(values) / _POINTS))
    points = [(i, v) for i, v in enumerate(values, 1) if v is not None]
    return [(i, v) for i, v in points if (len(values) - i) % every == 0]


def _plain(data: Any) -> Any:
    """``data`` with None for what is no finite number, which JSON has no word for."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, (list, tuple)) else data


def lines(text: str) -> tuple[str, ...]:
    """The non-empty lines of a multi-line text widget."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
