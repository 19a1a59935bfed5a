"""Inspect Adapter."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.files import Adapter
from ..core.keys import describe, resolve
from .host import model as host
from .types import CATEGORY, adapter_input, panel, report_output


class InspectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabInspect",
            display_name="Inspect Adapter",
            category=f"{CATEGORY}/load",
            description="Says what an adapter holds and, with a model, how it fits.",
            search_aliases=["lora info", "lora metadata", "analyze lora", "keys"],
            is_output_node=True,
            inputs=[
                adapter_input("The adapter to look at."),
                io.Model.Input(
                    "model", optional=True, tooltip="Also match the adapter with this model."
                ),
            ],
            outputs=[report_output("Algorithm, ranks, key format, architecture and metadata.")],
        )

    @classmethod
    def execute(cls, adapter: dict[str, Any], model: Any = None) -> io.NodeOutput:
        own = Adapter.of(adapter)
        text = describe(own)
        if model is None:
            return io.NodeOutput(text, ui=panel(text))
        _, report = resolve(own, host.index(model), host.architecture(model))
        text = f"{report.to_text()}\n\n{text}"
        return io.NodeOutput(text, ui=panel(text, report.to_dict()))


NODES = [InspectAdapter]
