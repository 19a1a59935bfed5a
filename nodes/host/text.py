"""Text encoders in training: captions to conditioning, with gradients for adapters on the way."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...core.errors import AdapterLabError
from ...core.train.data import TrainDataset, TrainItem
from ...core.train.targets import in_model, layer_of
from .checkpointing import checkpointed
from .layers import submodules
from .session import Session

Conditioning = tuple[Tensor | None, dict[str, Any]]


def is_trained(paths: Iterable[str]) -> bool:
    """Whether one of the full ``paths`` is of a text encoder."""
    return not all(map(in_model, paths))


class TextEncoder:
    """Conditioning from captions, inside a :class:`Session` that has adapters on the CLIP.

    As a context it keeps of each layer of the text encoder only the input for the backward pass,
    where the session does so with the blocks of the model.

    Args:
        clip: CLIP, the session's own. session: the running one.
    """

    def __init__(self, clip: Any, session: Session) -> None:
        self.clip, self.session = clip, session
        self._stack = ExitStack()

    def __enter__(self) -> TextEncoder:
        choice = self.session.settings.checkpointing
        on_cpu = self.device.type == "cpu"
        if choice == "blocks" or (choice == "auto" and not on_cpu):
            modules = submodules(self.clip.patcher.model)
            with ExitStack() as stack:
                for path in layers(modules):
                    stack.enter_context(checkpointed(modules[path], self.session.batch.bound))
                self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def device(self) -> torch.device:
        """Where the text encoder computes."""
        return self.clip.patcher.load_device

    def encode(self, item: TrainItem) -> Conditioning:
        """Text (tokens, dim) and the rest, with gradients for the adapters on the text encoder.

        As ``CLIP.encode_from_tokens`` gives them, which would load the text encoder each time.
        What the item's conditioning holds beside what the text encoder gives (guidance, sizes)
        stays.
        """
        clip, model = self.clip, self.clip.patcher.model
        tokens = clip.tokenize(item.caption)
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})
        model.set_clip_options({"execution_device": self.device})
        with comfy.model_management.cuda_device_context(self.device):
            cond, pooled, *more = model.encode_token_weights(tokens)
        extra = {"pooled_output": pooled} | (more[0] if more else {})
        found = {name: _single(value) for name, value in extra.items() if value is not None}
        return _single(cond), {**item.extra, **found}


def layers(paths: Iterable[str]) -> list[str]:
    """The repeated layers of text encoders, in order, from the paths of all modules."""
    return [path for path in dict.fromkeys(map(layer_of, paths)) if path]


def static(clip: Any) -> Any:
    """CLIP without dynamic VRAM, which may evict a weight between forward and backward.

    Raises:
        AdapterLabError: its loader does not say how to load it again.
    """
    if not clip.patcher.is_dynamic():
        return clip
    if clip.patcher.cached_patcher_init is None:
        raise AdapterLabError(
            "This text encoder cannot be trained on while dynamic VRAM is on",
            found="a loader that does not say how to load it again",
            fix="Load it with Load CLIP or Load Checkpoint, or start ComfyUI with "
            "--disable-dynamic-vram",
        )
    return clip.clone(disable_dynamic=True)


def require_captions(dataset: TrainDataset, what: str = "dataset") -> None:
    """A text encoder learns from captions, and conditioning does not tell what it was made of.

    Args:
        what: to call the dataset in the error.

    Raises:
        AdapterLabError: no item has a caption; empty ones beside others are fine.
    """
    forms = [form for item in dataset for form in (item, *item.variants)]
    if not any(form.caption for form in forms):
        raise AdapterLabError(
            f"The {what} has no captions to train the text encoder on",
            found=f"conditioning alone, of {len(forms)} items",
            expected="the captions that it was encoded from",
            fix="Make the dataset with Training Dataset from Folder, which keeps them, or set "
            "'train' of Training Targets to model",
        )


def _single(value: Any) -> Any:
    """Without the batch axis, which is 1."""
    return value[0] if isinstance(value, Tensor) and value.ndim else value
