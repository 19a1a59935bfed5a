"""A loaded model made ready for gradients, and put back exactly as it was.

ComfyUI loads models in inference mode, keeps them quantised or in the memory of the CPU, runs
fused kernels that have no backward pass and lets its models add in place to tensors that autograd
still needs. :class:`Session` works around each for its lifetime without copying a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from ...core.adapters import Algorithm
from ...core.errors import AdapterLabError
from ...core.train.layer import Mode
from .adapting import adapting
from .batch import Batch
from .blocks import blocks
from .bypass import KEY
from .checkpointing import checkpointed, standing_in
from .compiled import Compiled
from .kernels import attention_override, differentiable
from .layers import dims, submodules
from .memory import keeps_too_much, load
from .model import DIFFUSION, architecture
from .plain import plain_tensors
from .precision import computing_in

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SessionOptions:
    """How to trade time for memory; nothing here changes what is computed, but ``compute``.

    Args:
        checkpointing: "blocks" computes activations again in the backward pass; "auto": on a GPU,
            and on a CPU whose memory they would fill.
        offload: the inputs of checkpointed blocks wait in the memory of the CPU.
        streaming: weights come from the memory of the CPU layer by layer: "on", "off", or "auto",
            where the model does not fit.
        compile: compile each block; ``backend`` as ``torch.compile`` takes it.
        seed: of what adapters draw at random.
        forward: how adapted layers compute, see :func:`core.train.layer.adapted`.
        compute: dtype of activations, "auto" for the model's own.
        latent: (b, c, *space) of the largest batch, for estimates of memory; empty: unknown.
    """

    checkpointing: Literal["auto", "off", "blocks"] = "auto"
    offload: bool = False
    streaming: Literal["auto", "off", "on"] = "auto"
    compile: bool = False
    seed: int = 0
    forward: Mode = "auto"
    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    latent: tuple[int, ...] = ()
    backend: str = "inductor"


def layers(model: Any) -> dict[str, nn.Module]:
    """Name inside the diffusion model -> every linear and convolution.

    By duck type: quantised linears of ComfyUI are no ``nn.Linear``.
    """
    modules = submodules(model.model.diffusion_model).items()
    return {name: module for name, module in modules if dims(module) is not None}


class Session:
    """Context in which ``model`` can be differentiated with respect to adapters on it.

    Args:
        model: ModelPatcher; its patches are applied, so training goes on top of them.
        adapters: path as :func:`nodes.host.model.index` has it -> trainable algorithm.
        clip: CLIP, where adapters are on its text encoders.

    Raises:
        AdapterLabError: the model cannot be loaded as training needs it, an adapter has no place in
            it, or the strength of an adapter on it changes while sampling.
    """

    def __init__(
        self, model: Any, adapters: Mapping[str, Algorithm],
        options: SessionOptions = SessionOptions(), clip: Any = None,
    ) -> None:  # fmt: skip
        self.settings, self.adapters, self.clip = options, adapters, clip
        whole = model.is_dynamic() and options.streaming == "off"
        self.patcher = _static(model) if whole else model
        self.model = self.patcher.model
        # Factors beside the layers are models of their own, which only a sampler loads by itself.
        self.held = self.patcher.get_nested_additional_models()
        self.batch = Batch(adapters, options.seed)
        self._compiled = Compiled(options.backend)
        # A compiler would see through the copy, and keep the original after all.
        self._keep: Any = torch.compiler.disable(_keep_input) if options.compile else _keep_input
        self._stack = ExitStack()
        encoder = [path for path in adapters if not path.startswith(DIFFUSION)]
        if encoder and clip is None:
            raise AdapterLabError(
                "Adapters of the text encoder need it", found=encoder[0], fix="Connect 'clip'"
            )
        acting = self.patcher.get_attachment(KEY)
        if acting and acting.varies:
            raise AdapterLabError(
                "A model whose adapter follows a schedule cannot be trained on",
                fix="Empty 'schedule' on the adapter node before Train Adapter",
            )

    def __enter__(self) -> Session:
        options = self.settings
        encoders = [self.clip.patcher] if self.clip is not None else []
        with ExitStack() as stack:
            # Loading patches weights in place, which inference tensors allow only in their mode.
            with torch.inference_mode():
                patchers = [self.patcher, *self.held, *encoders]
                load(patchers, self.patcher, options.streaming, options.latent)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for patcher in (self.patcher, *self.held, *encoders):
                stack.enter_context(plain_tensors(patcher.model, patcher.load_device))
            stack.enter_context(differentiable())
            if options.compute != "auto":
                stack.enter_context(computing_in(COMPUTE[options.compute], self.model))
            for patcher in (self.patcher, *encoders):
                self._prepare(patcher, stack)
            self._wrap_blocks(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it was before, for a preview; in training again afterwards."""
        self._stack.close()
        try:
            yield
        finally:
            self.__enter__()

    def begin_batch(self, number: int, t: Tensor, part: int = 0) -> None:
        """Tell adapters that draw at random, or act by noise level, what the next pass is of.

        Args:
            number: of the batch in the run. t: (b,) noise levels in (0, 1).
            part: of the batch, which may take several forward passes.
        """
        self.batch.begin(number, t, part)

    def end_batch(self) -> None:
        """Adapters act as they are, without chance, as in validation."""
        self.batch.end()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.patcher.load_device

    def options(self) -> dict[str, Any]:
        """Fresh ``transformer_options`` of the model, on an attention that has a backward pass."""
        options = dict(self.patcher.model_options.get("transformer_options", {}))
        options["optimized_attention_override"] = attention_override
        return options

    def _prepare(self, patcher: Any, stack: ExitStack) -> None:
        """Norms that keep their inputs, and adapters on their modules."""
        modules = submodules(patcher.model)
        for module in {id(m): m for m in modules.values()}.values():
            if type(module).__name__.endswith("Norm"):
                handle = module.register_forward_pre_hook(self._keep)
                stack.callback(handle.remove)
        inside = patcher is self.patcher
        adapters = {p: a for p, a in self.adapters.items() if p.startswith(DIFFUSION) == inside}
        current, options = self.batch.current, self.settings
        how = (patcher.load_device, options.forward, options.compile)
        stack.enter_context(adapting(modules, adapters, current, *how))

    def _wrap_blocks(self, stack: ExitStack) -> None:
        options = self.settings
        if options.checkpointing == "off" and not options.compile:
            return
        names = blocks(self.patcher, architecture(self.patcher))
        recomputes = self._recomputes(names)
        if options.compile:
            self._compiled.require(self.device)
            stack.enter_context(self._compiled.limits(len(names)))
        for name in names:
            module = self.model.diffusion_model.get_submodule(name)
            run = self._compiled.run(name, module.forward) if options.compile else None
            if recomputes:
                bound = self.batch.bound
                stack.enter_context(checkpointed(module, bound, run, options.offload))
            elif run is not None:
                stack.enter_context(standing_in(module, run))

    def _recomputes(self, names: list[str]) -> bool:
        options = self.settings
        if options.checkpointing != "auto":
            if options.checkpointing == "blocks" and not names:
                raise AdapterLabError(
                    "Checkpointing needs blocks that repeat, and the model has none",
                    fix="Set 'checkpointing' to off",
                )
            return options.checkpointing == "blocks"
        on_cpu = self.device.type == "cpu"
        return not on_cpu or keeps_too_much(self.patcher, len(names), options.latent)


def _static(model: Any) -> Any:
    """The model loaded again without dynamic VRAM."""
    if model.cached_patcher_init is None:
        raise AdapterLabError(
            "This model cannot be kept whole in memory while dynamic VRAM is on",
            found="a loader that does not say how to load the model again",
            fix="Set 'streaming' to auto, or start ComfyUI with --disable-dynamic-vram",
        )
    return model.clone(disable_dynamic=True)


def _keep_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a norm its own copy of the residual stream, to which the blocks of several models add
    in place while the norm's backward pass still needs it."""
    if not args or not isinstance(args[0], Tensor):
        return args
    x, *rest = args
    # Also what needs no gradient itself: a norm in training needs its input for that of its weight.
    return (x.clone(), *rest) if torch.is_grad_enabled() else args
