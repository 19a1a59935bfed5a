"""A loaded model made ready for gradients, and put back exactly as it was.

ComfyUI loads models in inference mode, runs fused kernels that have no backward pass and lets
its models add in place to tensors that autograd still needs. :class:`Session` works around each
for its lifetime without copying a weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch
import torch.nn as nn
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...core.adapters import Algorithm
from ...core.archs import ArchSpec
from ...core.errors import AdapterLabError
from ...core.tensors import Op
from .bypass import KEY
from .layers import dims, operation
from .model import DIFFUSION

# More than there is: everything else has to leave the device, activations need the room.
_ALL_MEMORY = 10**20
_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm")


def layers(model: Any) -> dict[str, nn.Module]:
    """Name inside the diffusion model -> every linear and convolution.

    By duck type: quantised linears of ComfyUI are no ``nn.Linear``.
    """
    modules = model.model.diffusion_model.named_modules()
    return {name: module for name, module in modules if dims(module) is not None}


def blocks(model: Any, arch: ArchSpec) -> list[str]:
    """The repeated blocks of the model, in its order."""
    names = [name for name, _ in model.model.diffusion_model.named_modules()]
    return [name for name in names if any(re.fullmatch(block, name) for block in arch.blocks)]


class Session:
    """Context in which ``model`` can be differentiated with respect to adapters on it.

    Args:
        model: ModelPatcher; its patches are applied, so training goes on top of them.
        adapters: module name inside the diffusion model -> trainable algorithm.
        blocks: names of the modules to checkpoint, none for no checkpointing.

    Raises:
        AdapterLabError: the model cannot be loaded as training needs it, or the strength of an
            adapter on it changes while sampling.
    """

    def __init__(self, model: Any, adapters: Mapping[str, Algorithm], blocks: list[str]) -> None:
        # Weights of a dynamic model may be evicted between forward and backward.
        self.patcher = _static(model) if model.is_dynamic() else model
        # Factors beside the layers are models of their own, which only a sampler loads by itself.
        self.held = self.patcher.get_nested_additional_models()
        self.adapters, self.blocks = adapters, blocks
        self._stack = ExitStack()
        acting = self.patcher.get_attachment(KEY)
        if acting and acting.varies:
            raise AdapterLabError(
                "A model whose adapter follows a schedule cannot be trained on",
                fix="Empty 'schedule' on the adapter node before Train Adapter",
            )

    def __enter__(self) -> Session:
        with self._stack as stack:
            # Loading patches weights in place, which inference tensors allow only in their mode.
            comfy.model_management.load_models_gpu(
                [self.patcher, *self.held], memory_required=_ALL_MEMORY, force_full_load=True
            )
            self.model = self.patcher.model
            self._require_loaded()
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for patcher in (self.patcher, *self.held):
                stack.enter_context(_plain_tensors(patcher.model))
            stack.enter_context(_in_training())
            network = self.model.diffusion_model
            for module in network.modules():
                if type(module).__name__ in _NORMS:
                    handle = module.register_forward_pre_hook(_keep_input)
                    stack.callback(handle.remove)
            for name, algorithm in self.adapters.items():
                module = network.get_submodule(name)
                handle = module.register_forward_hook(_bypass(algorithm, operation(module)))
                stack.callback(handle.remove)
            for name in self.blocks:
                stack.enter_context(_checkpointed(network.get_submodule(name)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _require_loaded(self) -> None:
        """Weights that are streamed in are overwritten by the next while autograd needs them."""
        here = self.device.type
        away = [name for name, p in self.model.named_parameters() if p.device.type != here]
        if away:
            raise AdapterLabError(
                "The model is not loaded completely",
                found=f"{len(away)} weights that are not on {self.device}",
                expected="memory for the whole model, and ComfyUI without --novram",
                fix="Use a smaller model or a quantised one",
            )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.patcher.load_device

    def options(self) -> dict[str, Any]:
        """Fresh ``transformer_options`` of the model, on an attention that has a backward pass."""
        options = dict(self.patcher.model_options.get("transformer_options", {}))
        options["optimized_attention_override"] = _attention
        return options


def _static(model: Any) -> Any:
    """The model loaded again without dynamic VRAM."""
    if model.cached_patcher_init is None:
        raise AdapterLabError(
            "This model cannot be trained on while dynamic VRAM is on",
            found="a loader that does not say how to load the model again",
            fix="Load it with Load Diffusion Model or Load Checkpoint, or start ComfyUI with "
            "--disable-dynamic-vram",
        )
    return model.clone(disable_dynamic=True)


def _attention(_chosen: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)


def _keep_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a norm its own copy of the residual stream, to which the blocks of several models add
    in place while the norm's backward pass still needs it."""
    x, *rest = args
    return (x.clone(), *rest) if torch.is_grad_enabled() and x.requires_grad else args


def _bypass(algorithm: Algorithm, op: Op) -> Callable[..., Tensor]:
    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + algorithm.bypass(args[0], op, module.weight)

    return hook


@contextmanager
def _in_training() -> Iterator[None]:
    """ComfyUI's own switch from fused to differentiable kernels."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextmanager
def _plain_tensors(model: nn.Module) -> Iterator[None]:
    """Replace inference tensors by ordinary ones on the same memory."""
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_inference():
                        swapped.append((table, name, tensor))
                        table[name] = _alias(tensor, f"{path}.{name}")
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


def _alias(tensor: Tensor, name: str) -> Tensor:
    if type(tensor.data) is not Tensor and type(tensor) not in (Tensor, nn.Parameter):
        raise AdapterLabError(
            f"Training on this model is not supported: '{name.removeprefix(DIFFUSION)}'",
            found=f"a {type(tensor).__name__} weight",
            expected="bf16, fp16 or fp32 weights",
            fix="Load the unquantised model",
        )
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(plain, requires_grad=False) if is_parameter else plain


@contextmanager
def _checkpointed(module: nn.Module) -> Iterator[None]:
    """Recompute ``module`` in the backward pass instead of keeping its activations."""
    forward: Callable[..., Any] = module.forward

    def fresh(*args: Any, **kwargs: Any) -> Any:
        # The block may add in place to its inputs: the recomputation must start from the originals.
        kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        return forward(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kept)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Some models write into their options as they go; the recomputation must see them as now.
        args = tuple(dict(a) if isinstance(a, dict) else a for a in args)
        kwargs = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}
        return checkpoint(fresh, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    own = "forward" in vars(module)
    module.forward = checkpointed
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward
