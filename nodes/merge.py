"""Merge Adapters."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.merge.menus import DTYPES, METHODS, SIGNS
from .host.progress import ticker
from .types import CATEGORY, panel, report_output

_MOST = 50  # adapters


def parse_ratios(text: str) -> list[float]:
    """The numbers in ``text``, between commas, spaces or line breaks; nothing is 1.

    Raises:
        AdapterLabError: something else among them.
    """
    ratios: list[float] = []
    for word in text.replace(",", " ").replace(";", " ").split():
        try:
            ratio = float(word)
        except ValueError:
            ratio = math.nan
        if not math.isfinite(ratio):
            raise AdapterLabError(
                "A ratio is not a number", found=f"'{word}'", expected="such as '1, -0.5'"
            )
        ratios.append(ratio)
    return ratios or [1.0]


def _rank(name: str, tooltip: str, **options: Any) -> io.Input:
    return io.Int.Input(name, default=0, min=0, max=1 << 14, tooltip=tooltip, **options)


def _inputs() -> list[Any]:
    adapter = io.LoraModel.Input("adapter", tooltip="An adapter of the same model.")
    return [
        io.Autogrow.Input(
            "adapters",
            template=io.Autogrow.TemplatePrefix(adapter, "adapter", min=1, max=_MOST),
            tooltip="The adapters, of any algorithms, ranks and spellings. A socket more appears "
            "with each.",
        ),
        io.String.Input(
            "ratios",
            default="1",
            tooltip="What each is multiplied by: '1, -0.5', in the order of the sockets. One "
            "number counts for all.",
        ),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default="auto",
            tooltip="auto: the exact sum, cut to 'rank' only if that is set. concatenate: exact, "
            "whatever the rank. svd: the best LoRA of 'rank'. ties and dare let adapters disagree. "
            "kohya: the numbers of sd-scripts.",
        ),
        _rank("rank", "Largest rank of the result. 0: as large as the exact sum takes."),
        *_advanced(),
        io.Model.Input(
            "model", optional=True,
            tooltip="The base model. Only needed to add DoRA, OFT and others that depend on it.",
        ),
        io.Clip.Input(
            "clip", optional=True, tooltip="The same for adapters of its text encoders.",
        ),
    ]  # fmt: skip


def _advanced() -> list[Any]:
    """Settings that most merges leave alone."""
    more: dict[str, Any] = {"optional": True, "advanced": True}
    return [
        _rank("conv_rank", "The same for k x k convolutions. 0: as 'rank'.", **more),
        io.Float.Input(
            "max_error", default=0.0, min=0.0, max=0.99, step=0.001, **more,
            tooltip="Choose of each module the smallest rank with this relative error, such as "
            "0.02, up to 'rank'. 0: off.",
        ),
        io.Float.Input(
            "density", default=0.5, min=0.01, max=1.0, step=0.01, **more,
            tooltip="Share of values that ties and dare keep.",
        ),
        io.Combo.Input(
            "majority", options=list(SIGNS), default="total", **more,
            tooltip="Which sign ties keeps: that of the sum (total) or of most (frequency).",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=0x7FFFFFFF, control_after_generate=False, **more,
            tooltip="Of the random values that dare keeps.",
        ),
        io.Combo.Input(
            "dtype", options=list(DTYPES), default="keep", **more,
            tooltip="Number format of the factors. keep: the widest of the adapters.",
        ),
    ]  # fmt: skip


class MergeAdapters(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabMerge",
            display_name="Merge Adapters",
            category=f"{CATEGORY}/tools",
            description="Makes one adapter of several whose change is the sum of theirs.",
            search_aliases=["merge lora", "combine lora", "add lora", "ties", "dare", "svd merge"],
            has_intermediate_output=True,
            inputs=_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.LoraModel.Output(display_name="adapter", tooltip="The merged adapter."),
                report_output("What each module became, its rank and its error."),
            ],
        )

    @classmethod
    def execute(
        cls,
        adapters: dict[str, Any],
        ratios: str,
        method: str,
        rank: int,
        conv_rank: int = 0,
        max_error: float = 0.0,
        density: float = 0.5,
        majority: Any = "total",
        seed: int = 0,
        dtype: str = "keep",
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        # Imported where it runs: ComfyUI starts faster.
        from ..core.merge.combine import Merge
        from ..core.merge.ranks import RankRule
        from .host.weights import base

        rule = RankRule("error" if max_error else "fixed", max_error, rank, conv_rank)
        job = Merge(
            [adapter for adapter in adapters.values() if adapter is not None], parse_ratios(ratios),
            method=method, rule=rule, density=density, sign=majority, seed=seed,
            dtype=DTYPES[dtype], base=base(model, clip),
            tick=ticker(cls.hidden.unique_id if cls.hidden else None),
        )  # fmt: skip
        merged = job.collect("merged")
        text = job.outcome.to_text()
        return io.NodeOutput(merged, text, ui=panel(text, job.outcome.to_dict()))


NODES = [MergeAdapters]
