"""Demo Text Encoder."""

from __future__ import annotations

from comfy_api.latest import io

from .host import words
from .types import CATEGORY


class DemoText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabDemoText",
            display_name="Demo Text Encoder",
            category=f"{CATEGORY}/demo",
            description="The text encoder of the demo model in the shipped workflows, of no use "
            "with any other model. With yours, load its own (Load CLIP, Load Checkpoint).",
            outputs=[io.Clip.Output(tooltip="Knows captions such as 'red star plain'.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(words.load())


NODES = [DemoText]
