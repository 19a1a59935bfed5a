"""Load Adapter, Adapter File, Apply Adapter."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.files import Adapter, read_adapter
from ..core.keys import describe
from .host import model as host
from .host import paths
from .host.mode import MODES
from .types import CATEGORY, adapter_input, panel, report_output, strength_input

_CATEGORY = f"{CATEGORY}/load"
_ALIASES = ["lora", "locon", "loha", "lokr", "lycoris", "load lora", "adapter"]


def _file_input() -> io.Input:
    return io.Combo.Input(
        "adapter_name",
        options=paths.adapters(),
        tooltip="A file in models/loras or output/loras.",
    )


def _model_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The diffusion model to adapt. It is not changed itself."),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="The text encoder, for adapters that hold text encoder weights as well.",
        ),
    ]


def _strength_inputs() -> list[Any]:
    return [
        strength_input(
            "strength_model",
            "m in W + m * delta for the diffusion model. 0 leaves it as it is, negative "
            "values push the other way.",
        ),
        strength_input("strength_clip", "The same for the text encoder."),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default="auto",
            tooltip="merge: add the adapter to the weights when the model is loaded, no cost once "
            "they are on the GPU. bypass: leave the weights as they are and add its effect to what "
            "the layers give, exact on quantised models. auto: bypass where the model is quantised "
            "or the schedule changes, else merge; the report says which.",
        ),
        io.Combo.Input(
            "on_unmatched",
            options=["report", "error"],
            default="report",
            tooltip="What to do when a part of the file does not fit the model: report it on the "
            "node and load the rest, or stop. A file of which nothing fits is always an error.",
        ),
        *_detail_inputs(),
    ]


def _detail_inputs() -> list[Any]:
    # Optional, for prompts of before they existed do not send them.
    return [
        io.String.Input(
            "block_weights",
            optional=True,
            default="",
            multiline=True,
            placeholder="double_blocks.3 = 0.5\n*.txt_* = 0\n@attention = 0.8",
            tooltip="Factors on the strength by part of the model, one 'pattern = weight' a line. "
            "Patterns are names of blocks or modules with * for anything, or @group. The last "
            "line that hits a module counts; what none hits has 1. Text encoders: clip_l.*",
        ),
        io.String.Input(
            "schedule",
            optional=True,
            default="",
            placeholder="0@0, 1@0.3, 0.2@1",
            tooltip="Factor on strength_model over sampling: strength@progress, linear between "
            "the points, 0 the start and 1 the end, measured as ComfyUI's start_percent. Empty: 1 "
            "throughout. The text encoder runs before sampling and is not affected.",
        ),
        io.Float.Input(
            "alpha",
            optional=True,
            default=0.0,
            min=0.0,
            max=65536.0,
            step=0.5,
            tooltip="Alpha to assume where neither the file nor a config beside it tells the "
            "scale; the report says so where that is the case. 0: the rank, a scale of 1.",
        ),
    ]


def _outputs() -> list[Any]:
    return [
        io.Model.Output(tooltip="The model with the adapter on it."),
        io.Clip.Output(tooltip="The text encoder with the adapter on it."),
        report_output(),
    ]


def _apply(model: Any, clip: Any, adapter: Adapter, *given: Any) -> io.NodeOutput:
    strength_model, strength_clip, mode, on_unmatched, block_weights, schedule, alpha = given
    done = host.apply(
        model, clip, adapter, strength_model, strength_clip, on_unmatched, mode=mode,
        block_weights=block_weights, schedule=schedule, alpha=alpha,
    )  # fmt: skip
    text = done.to_text()
    return io.NodeOutput(done.model, done.clip, text, ui=panel(text, done.to_dict()))


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabLoader",
            display_name="Load Adapter",
            category=_CATEGORY,
            description="Loads an adapter file of any trainer into a model. The key format is "
            "found by itself; the node shows what matched, what did not and why.",
            search_aliases=_ALIASES,
            has_intermediate_output=True,
            inputs=[
                *_model_inputs(),
                _file_input(),
                *_strength_inputs(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, **_: Any) -> tuple[int, ...]:
        return paths.adapter_stamp(adapter_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter_name: str,
        strength_model: float,
        strength_clip: float,
        mode: str,
        on_unmatched: str,
        block_weights: str = "",
        schedule: str = "",
        alpha: float = 0.0,
        clip: Any = None,
    ) -> io.NodeOutput:
        adapter = read_adapter(paths.adapter_path(adapter_name))
        given = strength_model, strength_clip, mode, on_unmatched, block_weights, schedule, alpha
        return _apply(model, clip, adapter, *given)


class AdapterFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabFile",
            display_name="Adapter File",
            category=_CATEGORY,
            description="Reads an adapter file for nodes that work on adapters.",
            search_aliases=_ALIASES,
            has_intermediate_output=True,
            inputs=[_file_input()],
            outputs=[
                io.LoraModel.Output(display_name="adapter", tooltip="The adapter's tensors."),
                report_output("Algorithm, rank, key format and architecture of the file."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> tuple[int, ...]:
        return paths.adapter_stamp(adapter_name)

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        adapter = read_adapter(paths.adapter_path(adapter_name))
        found = describe(adapter)
        text = found.to_text()
        shown = {"text": found.headline, "facts": found.facts, "metadata": found.metadata}
        return io.NodeOutput(adapter, text, ui=panel(text, shown))


class ApplyAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabApply",
            display_name="Apply Adapter",
            category=_CATEGORY,
            description="Applies an adapter of the graph (trained, merged, read) to a model.",
            search_aliases=_ALIASES,
            has_intermediate_output=True,
            inputs=[
                *_model_inputs(),
                adapter_input("The adapter: from training, a file or another adapter node."),
                *_strength_inputs(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: dict[str, Any],
        strength_model: float,
        strength_clip: float,
        mode: str,
        on_unmatched: str,
        block_weights: str = "",
        schedule: str = "",
        alpha: float = 0.0,
        clip: Any = None,
    ) -> io.NodeOutput:
        own = Adapter.of(adapter)
        given = strength_model, strength_clip, mode, on_unmatched, block_weights, schedule, alpha
        return _apply(model, clip, own, *given)


NODES = [LoadAdapter, AdapterFile, ApplyAdapter]
