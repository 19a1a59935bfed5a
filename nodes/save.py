"""Save Adapter."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.files import Adapter, read_header
from ..core.merge.menus import DTYPES, INEXACT
from .host import paths
from .host.progress import ticker
from .types import AUTO, CATEGORY, adapter_input, architecture_input, architectures, panel

KEY_FORMATS = (
    "comfyui", "kohya", "diffusers", "lycoris", "musubi", "peft", "aitoolkit", "onetrainer", "bare",
)  # fmt: skip


def _metadata(text: str) -> dict[str, str]:
    """JSON object -> safetensors metadata; values that are no text are written as JSON."""
    try:
        table: Any = json.loads(text) if text.strip() else {}
    except ValueError as err:
        raise AdapterLabError("The metadata is not JSON", found=str(err)) from err
    if not isinstance(table, dict):
        raise AdapterLabError("The metadata is no JSON object", expected='{"name": "value"}')
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in table.items()}


def _inputs() -> list[Any]:
    return [
        adapter_input("The adapter to save."),
        io.String.Input(
            "filename_prefix",
            default="adapter",
            tooltip="File name below output/loras, sub-folders allowed. A number is added; "
            "no file is overwritten.",
        ),
        io.Combo.Input(
            "key_format",
            options=list(KEY_FORMATS),
            default="comfyui",
            tooltip="Spelling of the names in the file. comfyui loads in every ComfyUI, kohya in "
            "A1111, Forge and sd-scripts. The others: for those tools; peft gets a folder with its "
            "config.",
        ),
        io.Combo.Input(
            "dtype",
            options=list(DTYPES),
            default="keep",
            tooltip="Number format of the factors. fp16 and bf16 halve an fp32 file.",
        ),
        io.String.Input(
            "metadata",
            default="",
            multiline=True,
            optional=True,
            advanced=True,
            tooltip='More metadata as JSON, such as {"modelspec.author": "me"}. It is added '
            "to what the adapter has.",
        ),
        *_conversion(),
    ]


def _conversion() -> list[Any]:
    return [
        architecture_input(
            "The model that the adapter is for. auto: by its metadata, names and sizes."
        ),
        io.Combo.Input(
            "inexact",
            options=list(INEXACT),
            default="svd",
            optional=True,
            advanced=True,
            tooltip="For modules that can't be cut or joined exactly for the format. svd: a LoRA "
            "that comes near. keep: they keep their names. error: nothing is saved.",
        ),
        io.Int.Input(
            "rank",
            default=0,
            min=0,
            max=4096,
            optional=True,
            advanced=True,
            tooltip="Rank of such a LoRA. 0: as many as keep its error below 1 %.",
        ),
    ]


class SaveAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabSave",
            display_name="Save Adapter",
            category=f"{CATEGORY}/save",
            description="Writes an adapter to output/loras, where loaders find it.",
            search_aliases=["save lora", "export lora", "convert lora", "kohya"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=_inputs(),
            outputs=[io.String.Output(display_name="path", tooltip="Full path of the file.")],
        )

    @classmethod
    def execute(
        cls,
        adapter: dict[str, Any],
        filename_prefix: str,
        key_format: str,
        dtype: str,
        metadata: str = "",
        architecture: str = AUTO,
        inexact: Any = "svd",
        rank: int = 0,
    ) -> io.NodeOutput:
        more, spec = _metadata(metadata), architectures().get(architecture)
        tick = ticker(cls.hidden.unique_id if cls.hidden else None)
        # Imported where it runs: ComfyUI starts faster.
        from ..core.merge.convert import PEFT_FILE, Convert

        job = Convert(Adapter.of(adapter), key_format, architecture=spec, dtype=DTYPES[dtype],
                      inexact=inexact, rank=rank, tick=tick)  # fmt: skip
        job.metadata.update(more)
        suffix = f"/{PEFT_FILE}" if key_format == "peft" else ".safetensors"
        path = paths.numbered(filename_prefix, "loras", suffix)
        job.write(path)
        shown, count = path.relative_to(paths.output()).as_posix(), len(read_header(path).tensors)
        job.outcome.verdict = f"saved {count} tensors to {shown}\n{job.outcome.verdict}"
        return io.NodeOutput(str(path), ui=panel(job.outcome.to_text(), job.outcome.to_dict()))


NODES = [SaveAdapter]
