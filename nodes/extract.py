"""Extract Adapter."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.merge.menus import DORA_AXES, DTYPES, FITTED, RULES
from .host import modelfile, paths
from .host.progress import ticker
from .types import CATEGORY, file_input, panel, report_output


def _number(name: str, default: float, least: float, most: float, step: float, tip: str) -> Any:
    return io.Float.Input(
        name, default=default, min=least, max=most, step=step, round=False, optional=True,
        advanced=True, tooltip=tip,
    )  # fmt: skip


def _choice(name: str, options: list[str], tip: str) -> Any:
    return io.Combo.Input(
        name, options=options, default=options[0], optional=True, advanced=True, tooltip=tip
    )


def _inputs() -> list[Any]:
    return [
        file_input("base_model", modelfile.listed(), "The model before it was trained."),
        file_input(
            "tuned_model", modelfile.listed(),
            "The fine-tune of it, or the base with adapters baked in.",
        ),
        io.Combo.Input(
            "algorithm", options=list(FITTED), default="lora",
            tooltip="lora: low-rank, loads everywhere. dora: also a length of each output, kept "
            "where that is nearer. lokr: the nearest Kronecker product. full: all of the "
            "difference, as large as the model.",
        ),
        io.Int.Input(
            "rank", default=32, min=1, max=4096,
            tooltip="Rank of every module; with the other rules the largest.",
        ),
        io.Combo.Input(
            "rule", options=list(RULES), default="fixed",
            tooltip="How each module's rank is chosen. fixed: rank. sv_ratio, sv_fro and "
            "sv_cumulative: as in sd-scripts. error: the lowest with at most that relative error.",
        ),
        io.Float.Input(
            "parameter", default=0.0, min=0.0, max=1e6, step=0.01, round=False,
            tooltip="Of the rule: sv_ratio 4, sv_fro 0.95, sv_cumulative 0.9, error 0.1 are usual.",
        ),
        io.Int.Input(
            "conv_rank", default=0, min=-1, max=4096,
            tooltip="Rank of k x k convolutions. 0: as rank, -1: they are left out.",
        ),
        *_advanced(),
    ]  # fmt: skip


def _advanced() -> list[Any]:
    return [
        io.Int.Input(
            "factor", default=-1, min=-1, max=4096, optional=True, advanced=True,
            tooltip="lokr: how a dimension is split. -1: in two that are nearly equal.",
        ),
        _choice("dora_on", list(DORA_AXES),
                "dora: whether inputs or outputs have lengths. ComfyUI's own loaders do the second "
                "wrong, peft knows only the second."),
        _number("clamp_quantile", 1.0, 0.51, 1.0, 0.01,
                "lora: cut off the largest values of the factors, as sd-scripts does at 0.99. It "
                "makes the result worse. 1: off."),
        _number("min_change", 1.0, 0.0, 1e6, 0.5,
                "A module without a number that changed by more than so many rounding steps, and "
                "whose change is mere noise, is left out. 0: every change is kept."),
        _number("min_diff", 0.0, 0.0, 1e3, 0.001,
                "Text encoders are left out unless a weight changed by more. sd-scripts: 0.01."),
        _choice("others", ["keep", "leave out"],
                "Biases, norms, embeddings and other parameters: kept as differences, or not."),
        _choice("quantised", ["refuse", "dequantise"],
                "Models in fp8, int8 and fp4: their rounding becomes part of the difference."),
        _choice("dtype", list(DTYPES), "Number format of the result. keep: that of the models."),
        io.Boolean.Input("exact", default=False, optional=True, advanced=True,
                         tooltip="Whole decompositions: much slower, and hardly better."),
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, optional=True, advanced=True,
                     control_after_generate=False, tooltip="Of the random sketches."),
    ]  # fmt: skip


class ExtractAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabExtract",
            display_name="Extract Adapter",
            category=f"{CATEGORY}/tools",
            description="Makes an adapter of what a fine-tuned model has learned: tuned - base.",
            search_aliases=["extract lora", "difference", "svd", "lora from model", "subtract"],
            is_output_node=True,
            inputs=_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.LoraModel.Output(display_name="adapter", tooltip="The difference."),
                report_output("Rank, error and size of every module, and what was left out."),
            ],
        )

    @classmethod
    def validate_inputs(cls, base_model: str | None, tuned_model: str | None) -> bool | str:
        try:
            for name in filter(None, (base_model, tuned_model)):  # None comes over a link
                modelfile.find(name)
        except AdapterLabError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, base_model: str | None, tuned_model: str | None, **_: Any) -> Any:
        # A node that gives a path tells itself when its file is another one.
        names = filter(None, (base_model, tuned_model))
        return [paths.stamp(modelfile.find(name)) for name in names]

    @classmethod
    def execute(
        cls, base_model: str, tuned_model: str, algorithm: str, rank: int, rule: str,
        parameter: float, conv_rank: int, others: str = "keep", quantised: str = "refuse",
        dtype: str = "keep", clamp_quantile: float = 1.0, **options: Any,
    ) -> io.NodeOutput:  # fmt: skip
        # Imported where it runs: ComfyUI starts faster.
        from ..core.merge.extract import Extract
        from ..core.merge.ranks import RankRule

        job = Extract(
            modelfile.find(base_model), modelfile.find(tuned_model), algorithm=algorithm,
            rule=RankRule(rule, parameter, rank, max(conv_rank, 0)), convolutions=conv_rank >= 0,
            others=others == "keep", dequantise=quantised == "dequantise", dtype=DTYPES[dtype],
            clamp=clamp_quantile, tick=ticker(cls.hidden.unique_id if cls.hidden else None),
            **options,
        )  # fmt: skip
        adapter = job.collect()
        text = job.outcome.to_text()
        return io.NodeOutput(adapter, text, ui=panel(text, job.outcome.to_dict()))


NODES = [ExtractAdapter]
