"""Training Preview."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host.preview import SAMPLERS, SCHEDULERS, PreviewConfig
from .types import CATEGORY, TrainPreviewType

_LARGEST = 16384


def _number(name: str, default: int, least: int, most: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=default, min=least, max=most, tooltip=tooltip)


def _sizes() -> list[Any]:
    return [
        io.Int.Input(
            "width", default=512, min=16, max=_LARGEST, step=8, tooltip="Of the picture, in pixels."
        ),
        io.Int.Input(
            "height",
            default=512,
            min=16,
            max=_LARGEST,
            step=8,
            tooltip="Of the picture, in pixels.",
        ),
        _number("steps", 20, 1, 1000, "Sampling steps."),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Strength of the prompt over 'negative'; 1 does without it and takes half the "
            "time.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Of the noise: the same for all previews, so that only training shows.",
        ),
        _number("every", 100, 1, 10_000_000, "Training steps between two previews."),
    ]


class Preview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabPreview",
            display_name="Training Preview",
            category=f"{CATEGORY}/train",
            description="Samples a picture before training and every so many steps, to see what is "
            "learned. The pictures appear on Train Adapter and in the run's folder.",
            search_aliases=["sample images", "sample prompts", "training samples"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The encoded prompt to sample."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What not to show; nothing without."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the pictures. Without it, rough colours of the latent show.",
                ),
                *_sizes(),
                io.Combo.Input(
                    "sampler", options=SAMPLERS, default="euler", advanced=True,
                    tooltip="As in a sampler node.",
                ),
                io.Combo.Input(
                    "scheduler", options=SCHEDULERS, default="simple", advanced=True,
                    tooltip="As in a sampler node.",
                ),
                io.Int.Input(
                    "frames", default=1, min=1, max=_LARGEST, advanced=True,
                    tooltip="Length of the clip, for models of clips; saved as animated PNG.",
                ),
            ],
            outputs=[
                TrainPreviewType.Output(display_name="preview", tooltip="For Train Adapter.")
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(PreviewConfig(**options))


NODES = [Preview]
