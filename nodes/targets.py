"""Training Targets."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.adapters import AdapterConfig
from ..core.train.counts import count
from ..core.train.targets import PRESETS, TRAIN, Targets, pattern_name
from .host import model as host
from .host.targets import chosen, encoder_notes, trainable, with_bias
from .types import CATEGORY, AdapterConfigType, TrainTargetsType, lines, panel

_NAME = "such as double_blocks.0.img_attn.qkv"
_SWITCHES = {
    "default_excludes": (
        True,
        "Leave out what the architecture leaves out by default; the node lists it. Without effect "
        "on the presets all blocks and everything.",
    ),
    "convolutions": (True, "Train convolutions too, where the preset has any."),
    "norms": (False, "Train the weights and biases of norms too, whole."),
}
_TRAIN = (
    "What to train. A text encoder learns from the captions of the dataset, which are encoded anew "
    "at each step, at the 'text_encoder_rate' of Optimizer."
)


def _patterns(name: str, what: str) -> io.Input:
    return io.String.Input(
        name,
        default="",
        multiline=True,
        tooltip=f"One regular expression a line, matched against whole names {_NAME} or "
        f"clip_l.transformer.text_model.encoder.layers.0.mlp.fc1: {what}",
    )


def _inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model to train on."),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            tooltip=" ".join(f"{name}: {what}." for name, what in PRESETS.items()),
        ),
        _patterns("exclude", "modules to leave out."),
        _patterns("include", "modules to keep although excluded. Exclude .* to train only these."),
        *(
            io.Boolean.Input(name, default=default, optional=True, tooltip=tooltip)
            for name, (default, tooltip) in _SWITCHES.items()
        ),
        io.String.Input(
            "blocks",
            default="",
            optional=True,
            tooltip="Blocks of the model to train: 0-11, or double_blocks.0-5, single_blocks.3. A "
            "number by itself is that of a block in each stack. Empty for all.",
        ),
        io.Combo.Input("train", options=list(TRAIN), optional=True, tooltip=_TRAIN),
        io.Clip.Input("clip", optional=True, tooltip="The text encoder, to train it."),
        AdapterConfigType.Input(
            "config", optional=True, tooltip="To count what it trains, instead of LoRA of rank 16."
        ),
    ]


class ChooseTargets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabTargets",
            display_name="Training Targets",
            category=f"{CATEGORY}/train",
            description="Which modules of the model to train. The node lists them before training.",
            search_aliases=["lora modules", "exclude patterns", "include patterns", "blocks"],
            has_intermediate_output=True,
            inputs=_inputs(),
            outputs=[
                TrainTargetsType.Output(display_name="targets", tooltip="For Train Adapter."),
                io.String.Output(display_name="modules", tooltip="The chosen modules."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, exclude: str = "", include: str = "", clip: Any = None,
        config: AdapterConfig | None = None, **options: Any,
    ) -> io.NodeOutput:  # fmt: skip
        targets = Targets(exclude=lines(exclude), include=lines(include), **options)
        text = resolved(targets, model, clip, config)
        return io.NodeOutput(targets, text, ui=panel(text))


def resolved(targets: Targets, model: Any, clip: Any, config: AdapterConfig | None) -> str:
    """The choice in words: how many modules and numbers, what is left out, and every name."""
    arch = host.architecture(model)
    shapes, layers = chosen(targets, model, clip, arch), trainable(model, clip)
    biased = with_bias(shapes, model, clip)
    found = count(((s, path in biased) for path, s in shapes.items()), config or AdapterConfig())
    told = f"{config.algorithm} as connected" if config else "LoRA of rank 16"
    notes = [f"'{text}' matches nothing" for text in targets.idle(layers)]
    notes += [*encoder_notes(targets, shapes), *(found.notes if config else ())]
    left = targets.left_out(layers, arch).items()
    text = [
        f"{len(shapes)} of {len(layers)} modules, {found.weights:,} parameters in their weights",
        f"{told}: {found.trained:,} parameters to train",
        *(f"Left out by default: {number} modules that match {p}" for p, number in left),
        *(f"Note: {note}" for note in notes),
        *(f"{pattern_name(path)}  {' x '.join(map(str, s))}" for path, s in shapes.items()),
    ]
    return "\n".join(text)


NODES = [ChooseTargets]
