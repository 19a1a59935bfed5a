"""Resize Adapter."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.files import Adapter
from ..core.merge.menus import DTYPES, NESTED, RULES
from .host.progress import ticker
from .types import CATEGORY, adapter_input, panel, report_output


def _inputs() -> list[Any]:
    return [
        adapter_input("The adapter to resize."),
        io.Int.Input(
            "rank", default=16, min=0, max=1 << 14,
            tooltip="The rank; of the rules that choose one for each module the largest. 0: as "
            "many as the rule takes.",
        ),
        io.Combo.Input(
            "rule", options=[*RULES, NESTED], default="fixed",
            tooltip="fixed: 'rank' everywhere. sv_ratio, sv_fro, sv_cumulative: by each module's "
            "singular values, as sd-scripts does. error: the fewest ranks within an error. first "
            "ranks: of a DyLoRA.",
        ),
        io.Float.Input(
            "parameter", default=0.9, min=0.0, max=1e6, step=0.01,
            tooltip="sv_ratio: largest singular value by the smallest kept (4). sv_fro, "
            "sv_cumulative: share of their norm or sum kept (0.9). error: relative error (0.05).",
        ),
        *_advanced(),
        io.Model.Input(
            "model", optional=True,
            tooltip="The base model. Only needed for OFT, (IA)^3 and others that depend on it.",
        ),
        io.Clip.Input(
            "clip", optional=True, tooltip="The same for adapters of its text encoders.",
        ),
    ]  # fmt: skip


def _advanced() -> list[Any]:
    more: dict[str, Any] = {"optional": True, "advanced": True}
    return [
        io.Int.Input(
            "conv_rank", default=0, min=0, max=1 << 14, **more,
            tooltip="'rank' for convolutions. 0: the same.",
        ),
        io.Combo.Input(
            "dtype", options=list(DTYPES), default="keep", **more,
            tooltip="Number format of the factors. fp16 and bf16 halve an fp32 file.",
        ),
        io.Boolean.Input(
            "exact", default=False, **more,
            tooltip="Decompose large dense changes exactly, not by random sketches: slower, and "
            "better by less than 0.1 %.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=0x7FFFFFFF, control_after_generate=False, **more,
            tooltip="Of the random sketches.",
        ),
    ]  # fmt: skip


class ResizeAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabResize",
            display_name="Resize Adapter",
            category=f"{CATEGORY}/tools",
            description="Makes every module of an adapter a LoRA of a smaller rank.",
            search_aliases=["resize lora", "shrink lora", "reduce rank", "dynamic rank", "dylora"],
            has_intermediate_output=True,
            inputs=_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.LoraModel.Output(display_name="adapter", tooltip="The resized adapter."),
                report_output("Rank, error and what was kept, for each module and for all."),
            ],
        )

    @classmethod
    def execute(
        cls,
        adapter: dict[str, Any],
        rank: int,
        rule: str,
        parameter: float,
        conv_rank: int = 0,
        dtype: str = "keep",
        exact: bool = False,
        seed: int = 0,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        nested = rule == NESTED
        # Imported where it runs: ComfyUI starts faster.
        from ..core.merge.ranks import RankRule
        from ..core.merge.resize import Resize
        from .host.weights import base

        job = Resize(
            adapter, RankRule("fixed" if nested else rule, parameter, rank, conv_rank),
            nested=nested, dtype=DTYPES[dtype], base=base(model, clip), exact=exact, seed=seed,
            tick=ticker(cls.hidden.unique_id if cls.hidden else None),
        )  # fmt: skip
        resized = job.collect(Adapter.of(adapter).name)
        text = job.outcome.to_text()
        return io.NodeOutput(resized, text, ui=panel(text, job.outcome.to_dict()))


NODES = [ResizeAdapter]
