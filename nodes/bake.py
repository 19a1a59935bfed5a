"""Bake Adapter into Model File."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.merge.menus import DTYPES, PRECISIONS, QUANTISED
from .host import modelfile, paths
from .host.progress import ticker
from .types import (
    AUTO,
    CATEGORY,
    adapter_input,
    architecture_input,
    architectures,
    file_input,
    panel,
    report_output,
    strength_input,
)

_MOST = 20  # further adapters


def _inputs() -> list[Any]:
    return [
        file_input(
            "model_file",
            paths.model_files(),
            "A file in models/diffusion_models or models/checkpoints. It stays as it is.",
        ),
        adapter_input("The adapter to merge into the weights."),
        strength_input("strength", "What the adapter's change is multiplied by."),
        io.String.Input(
            "filename_prefix",
            default="baked",
            tooltip="File name below output/diffusion_models or output/checkpoints, as the model "
            "file has it; sub-folders allowed. A number is added; no file is overwritten.",
        ),
        io.Combo.Input(
            "dtype",
            options=list(DTYPES),
            default="keep",
            tooltip="Number format of the file. keep: every tensor in its own.",
        ),
        *_options(),
    ]


def _options() -> list[Any]:
    more = io.LoraModel.Input("adapter", tooltip="Another adapter, merged after those before.")
    return [
        io.Combo.Input(
            "quantised",
            options=list(QUANTISED),
            default="refuse",
            optional=True,
            tooltip="What to do where quantised weights would change: refuse, or dequantise them.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="fp32",
            optional=True,
            advanced=True,
            tooltip="Number format to add in. Less than fp32 only to repeat what other tools do.",
        ),
        architecture_input("What the model file is. auto: by its names and sizes."),
        io.Autogrow.Input(
            "more_adapters",
            template=io.Autogrow.TemplatePrefix(more, prefix="adapter", min=0, max=_MOST),
            optional=True,
            tooltip="Further adapters, merged one after another.",
        ),
        io.String.Input(
            "more_strengths",
            default="",
            optional=True,
            tooltip="Strengths of the further adapters in order, such as 0.8, 0.5. Empty: 1 each.",
        ),
    ]


def _strengths(text: str, count: int) -> list[float]:
    """One number for each of ``count`` adapters; none at all means 1 each."""
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        numbers = [float(word) for word in words] or [1.0] * count
    except ValueError as error:
        raise AdapterLabError("The strengths are no numbers", found=text, fix=_FIX) from error
    if len(numbers) != count:
        found = f"{len(numbers)} strengths for {count} adapters"
        raise AdapterLabError("The strengths do not fit the adapters", found=found, fix=_FIX)
    return numbers


_FIX = "Write one number for each further adapter, such as 0.8, 0.5"


class BakeAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabBake",
            display_name="Bake Adapter into Model File",
            category=f"{CATEGORY}/tools",
            description="Writes a model file with adapters merged into its weights.",
            search_aliases=["merge lora into checkpoint", "fuse lora", "bake lora"],
            is_output_node=True,
            inputs=_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.String.Output(display_name="path", tooltip="Full path of the file."),
                report_output("What went where, what did not fit and why."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_file: str | None, more_adapters: Any = None) -> bool | str:
        # Files are made after the list of the menu was. None comes over a link, unknown as yet.
        # The sockets that grow are handed over whether or not they are asked for.
        try:
            return model_file is None or modelfile.find(model_file).is_file()
        except AdapterLabError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, model_file: str | None, **_: Any) -> Any:
        # A node that gives the path tells itself when its file is another one.
        return None if model_file is None else paths.stamp(modelfile.find(model_file))

    @classmethod
    def execute(
        cls, model_file: str, adapter: dict[str, Any], strength: float, filename_prefix: str,
        dtype: str, quantised: str = "refuse", precision: str = "fp32", architecture: str = AUTO,
        more_adapters: dict[str, Any] | None = None, more_strengths: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        more = [given for given in (more_adapters or {}).values() if given is not None]
        strengths = [strength, *_strengths(more_strengths, len(more))]
        path = paths.numbered(filename_prefix, modelfile.kind(model_file))
        # Imported where it runs: ComfyUI starts faster.
        from ..core.merge.bake import bake

        outcome = bake(
            modelfile.find(model_file), path, list(zip([adapter, *more], strengths, strict=True)),
            dtype=dtype, precision=precision, quantised=quantised,
            architecture=architectures().get(architecture),
            tick=ticker(cls.hidden.unique_id if cls.hidden else None),
        )  # fmt: skip
        outcome.facts.append(("file", path.relative_to(paths.output()).as_posix()))
        text = outcome.to_text()
        return io.NodeOutput(str(path), text, ui=panel(text, outcome.to_dict()))


NODES = [BakeAdapter]
