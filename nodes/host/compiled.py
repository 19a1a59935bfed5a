"""Blocks of a model compiled one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...core.errors import AdapterLabError


class Compiled:
    """Compiled forwards by module, which outlive a pause of the training.

    Args:
        backend: of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._runs: dict[str, Callable[..., Any]] = {}

    def require(self, device: torch.device) -> None:
        """Raise AdapterLabError where nothing can be compiled for ``device``."""
        try:
            trial = torch.compile(_trial, backend=self.backend)
            trial(torch.ones(2, device=device, requires_grad=True)).sum().backward()
        except (RuntimeError, ImportError, OSError) as err:
            raise AdapterLabError(
                "This machine cannot compile the model",
                found=_first_line(err),
                expected="a C++ compiler for the CPU, Triton for a GPU",
                fix="Set 'compile' to false, or install what is missing",
            ) from err

    def run(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of the module ``path``, compiled at its first call.

        Raises:
            AdapterLabError: when called, it cannot be compiled.
        """
        # Takes seconds to import.
        from torch._dynamo.exc import TorchDynamoException

        if path not in self._runs:
            self._runs[path] = torch.compile(_call, backend=self.backend)
        compiled = self._runs[path]

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(forward, args, kwargs)
            except TorchDynamoException as err:
                raise AdapterLabError(
                    f"The block '{path}' cannot be compiled",
                    found=_first_line(err),
                    fix="Set 'compile' to false",
                ) from err

        return run

    @contextmanager
    def limits(self, blocks: int) -> Iterator[None]:
        """Room for one graph for each block, of which most classes have many; what cannot be
        compiled for the backward pass fails in the forward pass, where it is told."""
        import torch._functorch.config as functorch

        with (
            torch._dynamo.config.patch(
                recompile_limit=max(8, 4 * blocks), accumulated_recompile_limit=max(256, 8 * blocks)
            ),
            functorch.patch(force_non_lazy_backward_lowering=True),
        ):
            yield


def _call(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _first_line(err: BaseException) -> str:
    err = getattr(err, "inner_exception", err)  # what a backend raised
    return str(err).strip().partition("\n")[0][:200]


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * 2
