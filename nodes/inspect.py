"""Inspect Adapter."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.files import Adapter
from ..core.keys import Description, Entry, describe, resolve
from ..core.keys.alone import file_entries
from .host import model as host
from .host.norms import norms
from .plots import block_plot
from .types import CATEGORY, adapter_input, panel, report_output


def _facts(found: Description, strange: list[str]) -> list[tuple[str, str]]:
    """What is known, and what is wrong: modules without an algorithm, ``strange`` blocks."""
    broken = [f"{name}: its change is not finite" for name in strange]
    broken += [f"{stem}: {why}" for stem, why in found.broken.items()]
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return [*found.facts, *([("broken", "; ".join(broken[:3]) + more)] if broken else [])]


def _matched(adapter: Adapter, model: Any, spec: Any) -> tuple[list[Entry], dict[str, Any]]:
    """What fits the model and the report; of a broken file, which is described all the same, the
    error in its place."""
    try:
        entries, report = resolve(adapter, host.index(model), spec)
    except AdapterLabError as error:
        return [], {"text": str(error)}
    return entries, {**host.data(report), "text": report.to_text()}


class InspectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabInspect",
            display_name="Inspect Adapter",
            category=f"{CATEGORY}/load",
            description="Says what an adapter holds and, with a model, how it fits.",
            search_aliases=["lora info", "lora metadata", "analyze lora", "keys", "trigger words"],
            is_output_node=True,
            inputs=[
                adapter_input("The adapter to look at."),
                io.Model.Input(
                    "model", optional=True, tooltip="Also match the adapter with this model."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                report_output("Algorithm, ranks, key format, architecture and metadata."),
                io.Image.Output(display_name="plot", tooltip="Norm of the change by block."),
            ],
        )

    @classmethod
    def execute(cls, adapter: dict[str, Any], model: Any = None) -> io.NodeOutput:
        own = Adapter.of(adapter)
        found = describe(own)
        text = found.to_text()
        data: dict[str, Any] = {"text": found.headline}
        entries, spec = file_entries(own)
        if model is not None:
            its = host.architecture(model)
            matched, told = _matched(own, model, its)
            # A file for another model is still drawn, but not measured on this one's weights.
            entries, spec, model = (matched, its, model) if matched else (entries, spec, None)
            data = told
            text = f"{told['text']}\n\n{text}"
        bars = norms(entries, spec, model, cls.hidden.unique_id if cls.hidden else None)
        strange = [block for block, norm in bars if not math.isfinite(norm)]
        bars = [bar for bar in bars if math.isfinite(bar[1])]
        text = "\n".join([text, *(f"{name}: the change is not finite" for name in strange)])
        data |= {"facts": _facts(found, strange), "norms": bars, "metadata": found.metadata}
        return io.NodeOutput(text, block_plot(bars), ui=panel(text, data))


NODES = [InspectAdapter]
