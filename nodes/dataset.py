"""Training Dataset, Load Training Dataset, Training Dataset Item."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..core.errors import AdapterLabError
from ..core.train.data import TrainDataset
from ..core.train.storage import load_dataset, save_dataset
from .host import latents as host
from .host import paths
from .types import CATEGORY, TrainDatasetType, panel, report_output

_CATEGORY = f"{CATEGORY}/train"
_ALIASES = ["lora training", "training data", "dataset", "cached latents"]


def _outputs() -> list[Any]:
    return [
        TrainDatasetType.Output(display_name="dataset", tooltip="For Train Adapter."),
        report_output("How many items of which sizes."),
    ]


def _output(dataset: TrainDataset) -> io.NodeOutput:
    text = dataset.to_text()
    return io.NodeOutput(dataset, text, ui=panel(text))


class Dataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabDataset",
            display_name="Training Dataset",
            category=_CATEGORY,
            description="Pairs encoded images or clips with their captions' conditioning. Each "
            "latent is trained on its own caption.",
            search_aliases=_ALIASES,
            is_input_list=True,
            has_intermediate_output=True,
            inputs=[
                io.Latent.Input("latents", tooltip="Encoded images or clips, a batch or a list."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="Encoded captions: one for each latent, one for each batch, or one "
                    "for all.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the loss counts: white fully, black not at all.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="If given, the dataset is also saved under this name in "
                    "output/adapter_lab/datasets.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="The texts of the conditioning, for training a text encoder: one for "
                    "each latent, one for each batch, or one for all.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        latents: list[Any],
        conditioning: list[Any],
        name: list[str],
        mask: list[Any] | None = None,
        captions: list[str] | None = None,
    ) -> io.NodeOutput:
        dataset = host.dataset(latents, conditioning, mask or [], name[0].strip(), captions or ())
        if dataset.name:
            save_dataset(paths.new_dataset(dataset.name), dataset)
        return _output(dataset)


class DatasetLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabDatasetLoad",
            display_name="Load Training Dataset",
            category=_CATEGORY,
            description="Loads a saved training dataset.",
            search_aliases=_ALIASES,
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "name",
                    options=paths.datasets(),
                    tooltip="A dataset in output/adapter_lab/datasets, or one of the demo's.",
                )
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> tuple[int, int]:
        return paths.stamp(paths.find_dataset(name) / "dataset.json")

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        # Tensors made in inference mode can't be trained on.
        with torch.inference_mode(False):
            return _output(load_dataset(paths.find_dataset(name)))


class DatasetItem(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabDatasetItem",
            display_name="Training Dataset Item",
            category=_CATEGORY,
            description="Takes one item out of a dataset, to look at it or to sample with its "
            "prompt.",
            search_aliases=_ALIASES,
            has_intermediate_output=True,
            inputs=[
                TrainDatasetType.Input("dataset", tooltip="The dataset."),
                io.Int.Input(
                    "index",
                    default=0,
                    min=-1_000_000,
                    max=1_000_000,
                    tooltip="Which item, counted from 0; negative counts from the end.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="Its latent."),
                io.Conditioning.Output(tooltip="Its prompt."),
            ],
        )

    @classmethod
    def execute(cls, dataset: TrainDataset, index: int) -> io.NodeOutput:
        if not -len(dataset) <= index < len(dataset):
            raise AdapterLabError(
                "There is no such item",
                found=f"index {index}",
                expected=f"{-len(dataset)} to {len(dataset) - 1}",
            )
        item = dataset[index]
        latent, conditioning = host.graph(item)
        return io.NodeOutput(latent, conditioning, ui=panel(item.caption or "(no caption)"))


NODES = [Dataset, DatasetLoad, DatasetItem]
