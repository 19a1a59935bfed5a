"""Adapter Config: what Train Adapter is to train."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.adapters import AdapterConfig
from ..core.adapters.config import DORA_AXES, FORWARDS, PRECISIONS
from ..core.adapters.training import COFT, check, choices, config_notes
from .types import CATEGORY, AdapterConfigType, panel

_CATEGORY = f"{CATEGORY}/train"


# Rows of the node: name, default, least, most, step, tooltip. A whole number where the default is
# one, a switch where it is False; a tuple of choices instead of the range makes a menu.
_MORE: tuple[tuple[Any, ...], ...] = (
    ("conv_rank", 0, 0, 4096, 1, "Rank of k x k convolutions; 0 for the same as of the rest."),
    ("conv_alpha", 0.0, 0.0, 4096.0, 0.5,
     "Alpha of k x k convolutions; 0 for the same as of the rest."),
    ("unit", 1, 1, 4096, 1,
     "dylora: ranks that are trained together; the rank is a multiple of it."),
    ("constraint", 0.0, 0.0, 1.0, 1e-5,
     "oft, boft, coft: how far rotations may go together, as a share of the output rows; 0 for no "
     f"bound, which coft takes as {COFT}."),
    ("rescale", False, "oft, boft, coft: a learned factor of each output row as well."),
    ("dora", False, "DoRA: learned lengths of rows or columns beside the delta, which then only "
     "turns them. lora and its kin, loha, lokr, glora, glokr, tlora, full."),
    ("dora_on", DORA_AXES, "dora: which axis has the lengths. output: what LyCORIS and peft train "
     "today. input: the one of LyCORIS before 3.2 and OneTrainer."),
    ("rs_lora", False, "rs-LoRA: scale by alpha / sqrt(rank), for high ranks. Needs no support of "
     "what reads the file. Whatever has an alpha."),
    ("scalar", False, "A learned factor of the delta that starts at 0, in the place of a factor "
     "that starts at 0. lora and its kin, loha, lokr, glora, glokr."),
    ("on_input", False, "ia3: scale input channels and not output channels."),
    ("dropout", 0.0, 0.0, 0.99, 0.01,
     "Share of activations that are dropped: of the rank activations of lora and its kin, of the "
     "adapter's output elsewhere."),
    ("rank_dropout", 0.0, 0.0, 0.99, 0.01,
     "Share that is dropped of rank channels (lora and its kin, by item), of blocks (oft, boft) or "
     "of output rows of the delta (the rest)."),
    ("module_dropout", 0.0, 0.0, 0.99, 0.01,
     "How often the whole adapter of a layer is left out of a batch."),
    ("bias", False, "Train the biases of the layers too."),
    ("precision", PRECISIONS, "Of the factors. bf16 halves their memory and needs the optimizer's "
     "rounding; fp32 is safe."),
    ("forward", FORWARDS, "bypass: beside the layer, always for quantised models. rebuild: in its "
     "weight. auto: the cheaper one of each layer."),
)  # fmt: skip

_SWITCHES = {
    "decompose_both": "lokr, glokr: low rank in the first factor as well.",
    "full_matrix": "lokr, glokr: no low rank at all; rank and alpha are then without effect.",
    "tucker": "lora, loha, lokr, glokr: Tucker decomposition of k x k convolutions: smaller, for "
    "models with convolutions.",
}


def _switch(name: str, tooltip: str, **more: Any) -> io.Input:
    return io.Boolean.Input(name, default=False, advanced=True, tooltip=tooltip, **more)


def _row(name: str, default: Any, *row: Any) -> io.Input:
    """The input of a row of ``_MORE``; left out of workflows that were saved without it."""
    *limits, tooltip = row
    rare: dict[str, Any] = {"tooltip": tooltip, "optional": True, "advanced": True}
    if isinstance(default, tuple):
        return io.Combo.Input(name, options=list(default), default=default[0], **rare)
    if default is False:
        return io.Boolean.Input(name, default=False, **rare)
    least, most, step = limits
    if isinstance(default, int):
        return io.Int.Input(name, default=default, min=least, max=most, **rare)
    limits = {"min": least, "max": most, "step": step}
    return io.Float.Input(name, default=default, round=False, **limits, **rare)


def _adapter_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "algorithm",
            options=list(choices()),
            tooltip="\n".join(f"{name}: {purpose}." for name, purpose in choices().items()),
        ),
        io.Int.Input(
            "rank",
            default=16,
            min=1,
            max=4096,
            tooltip="Capacity: more rank learns more detail, makes a larger file and "
            "memorises sooner. 8 to 32 for most. oft, boft: the block size that is aimed at. "
            "Without effect on ia3, full and norm.",
        ),
        io.Float.Input(
            "alpha",
            default=16.0,
            min=0.0,
            max=4096.0,
            step=0.5,
            tooltip="The delta is scaled by alpha / rank. Equal to the rank is neutral; 0 "
            "means equal to the rank. Without effect on oft, boft, ia3, full and norm.",
        ),
        io.Int.Input(
            "factor",
            default=-1,
            min=-1,
            max=4096,
            advanced=True,
            tooltip="lokr, glokr: size of the first factor; -1 takes the most balanced split, "
            "small numbers make larger files.",
        ),
        *(_switch(name, tooltip) for name, tooltip in _SWITCHES.items()),
        *(_row(*row) for row in _MORE),
    ]


class Config(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabConfig",
            display_name="Adapter Config",
            category=_CATEGORY,
            description="Which algorithm to train, how large and how. Shows what of it is without "
            "effect.",
            search_aliases=["rank", "alpha", "dora", "locon", "dropout", *choices()],
            has_intermediate_output=True,
            inputs=_adapter_inputs(),
            outputs=[AdapterConfigType.Output(display_name="config", tooltip="For Train Adapter.")],
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        config = AdapterConfig(**options)
        check(config)
        said = [choices()[config.algorithm], *(f"Note: {n}" for n in config_notes(config))]
        return io.NodeOutput(config, ui=panel("\n".join(said)))


NODES = [Config]
