"""Load Quantized Model, Quantize Model File."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.merge.menus import NUMBERS
from .host import modelfile, paths
from .host.progress import ticker
from .types import (
    AUTO,
    CATEGORY,
    architecture_input,
    architectures,
    file_input,
    lines,
    panel,
    report_output,
    strength_input,
)

_ALIASES = ["fp8", "int8", "nvfp4", "mxfp8", "quantize", "quantization", "scaled fp8"]


def _inputs(*after_keep: Any) -> list[Any]:
    return [
        file_input(
            "unet_name", paths.model_files(),
            "A file in models/diffusion_models or models/checkpoints, in bf16, fp16 or fp32.",
        ),
        io.Combo.Input(
            "format", options=list(NUMBERS), default="fp8_e4m3",
            tooltip="fp8_e4m3: layers of half the size, fast on RTX 40 and newer. int8_convrot, "
            "int8_row: the same size, a third of the error, fast on RTX 20 and newer. nvfp4: under "
            "a third, clearly less exact, for RTX 50. mxfp8: no better than fp8_e4m3. On older "
            "hardware all save memory, but not time.",
        ),
        io.String.Input(
            "keep", default="", multiline=True, placeholder=r"double_blocks\.0\..*",
            tooltip="More layers to leave as they are: regular expressions on whole names, one a "
            "line. What the architecture is sensitive in is left alone anyway.",
        ),
        *after_keep,
    ]  # fmt: skip


def _limits() -> list[Any]:
    return [
        io.Int.Input(
            "keep_worst", default=0, min=0, max=10000, optional=True,
            tooltip="Leave the so many layers as they are that would lose most. All are measured "
            "first, which takes as long again.",
        ),
        io.Float.Input(
            "max_error", default=0.0, min=0.0, max=100.0, step=0.1, optional=True,
            tooltip="Leave layers as they are that would lose more, in percent of their weights' "
            "norm. fp8 loses 2.6 % of nearly any layer. 0: no limit.",
        ),
        io.Boolean.Input(
            "full_precision", default=False, optional=True, advanced=True,
            tooltip="Have fp8, mxfp8 and nvfp4 weights dequantised for each use, also where the "
            "GPU multiplies in the format: slower, but activations are not rounded. No effect on "
            "int8.",
        ),
    ]  # fmt: skip


def _architecture() -> Any:
    return architecture_input("What the model is. auto: by its names and sizes.")


def _adapter() -> Any:
    return io.LoraModel.Input(
        "adapter", optional=True,
        tooltip="Merged into the weights before they are quantised, which loses least of it. Its "
        "part for text encoders counts in whole checkpoints only.",
    )  # fmt: skip


def _strength(**options: Any) -> Any:
    return strength_input("strength", "What the adapter's change is multiplied by.", **options)


def _report() -> Any:
    return report_output("What each layer lost, what was kept, what this machine does.")


def _settings(
    format: str, keep: str, adapter: Any, strength: float, *, keep_worst: int = 0,
    max_error: float = 0.0, full_precision: bool = False, architecture: str = AUTO,
) -> Any:  # fmt: skip
    from ..core.quant import Settings  # when it runs: ComfyUI starts faster
    from .host.hardware import quantising

    return Settings(
        format, architectures().get(architecture), lines(keep),
        [] if adapter is None else [(adapter, strength)], keep_worst, max_error / 100,
        full_precision, quantising(),
    )  # fmt: skip


class _Quantizing(io.ComfyNode):
    @classmethod
    def validate_inputs(cls, unet_name: str | None) -> bool | str:
        # Files are made after the list of the menu was. None comes over a link, unknown as yet.
        try:
            return unet_name is None or modelfile.find(unet_name).is_file()
        except AdapterLabError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, **_: Any) -> Any:
        # A node that gives the path tells itself when its file is another one.
        return None if unet_name is None else paths.stamp(modelfile.find(unet_name))


class QuantLoader(_Quantizing):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabQuantLoader",
            display_name="Load Quantized Model",
            category=f"{CATEGORY}/load",
            description="Loads a diffusion model with weights of 8 or 4 bits, made while it loads.",
            search_aliases=[*_ALIASES, "unet loader", "load diffusion model"],
            has_intermediate_output=True,
            inputs=_inputs(_adapter(), _strength(), *_limits(), _architecture()),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(tooltip="The model, as Load Diffusion Model gives it."),
                _report(),
            ],
        )

    @classmethod
    def execute(
        cls, unet_name: str, format: str, keep: str, strength: float, adapter: Any = None,
        **limits: Any,
    ) -> io.NodeOutput:  # fmt: skip
        from .host.quantised import load

        settings = _settings(format, keep, adapter, strength, **limits)
        tick = ticker(cls.hidden.unique_id if cls.hidden else None)
        model, report = load(modelfile.find(unet_name), settings, tick)
        text = report.to_text()
        return io.NodeOutput(model, text, ui=panel(text, report.to_dict()))


class QuantizeFile(_Quantizing):
    @classmethod
    def define_schema(cls) -> io.Schema:
        prefix = io.String.Input(
            "filename_prefix",
            default="quantized",
            tooltip="File name below output/diffusion_models or output/checkpoints, as the model "
            "file has it; sub-folders allowed. A number is added; no file is overwritten.",
        )
        after = (prefix, *_limits(), _architecture(), _adapter(), _strength(optional=True))
        return io.Schema(
            node_id="AdapterLabQuantize",
            display_name="Quantize Model File",
            category=f"{CATEGORY}/tools",
            description="Writes a model file with weights of 8 or 4 bits that ComfyUI's own "
            "loaders take.",
            search_aliases=[*_ALIASES, "convert fp8", "save quantized model"],
            is_output_node=True,
            inputs=_inputs(*after),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.String.Output(display_name="path", tooltip="Full path of the file."),
                _report(),
                io.Image.Output(display_name="plot", tooltip="The error of each layer."),
            ],
        )

    @classmethod
    def execute(
        cls, unet_name: str, format: str, keep: str, filename_prefix: str, adapter: Any = None,
        strength: float = 1.0, **limits: Any,
    ) -> io.NodeOutput:  # fmt: skip
        from .host.quantised import write
        from .quant_plot import quant_plot

        settings = _settings(format, keep, adapter, strength, **limits)
        path = paths.numbered(filename_prefix, modelfile.kind(unet_name))
        tick = ticker(cls.hidden.unique_id if cls.hidden else None)
        report = write(modelfile.find(unet_name), path, settings, tick)
        text = report.to_text()
        return io.NodeOutput(str(path), text, quant_plot(report), ui=panel(text, report.to_dict()))


NODES = [QuantLoader, QuantizeFile]
