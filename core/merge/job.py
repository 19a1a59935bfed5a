"""One run of a tool: tensors as they are made, and what became of each module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..files import Adapter
from ..spool import write_spooled
from ..streams import PathLike
from .metadata import signed
from .modules import Tick, quiet
from .outcome import Outcome

_SCALE_METADATA = ("lora_adapter_metadata",)  # of peft's; the tensors tell their scale now


class Job(ABC):
    """Settings checked, inputs opened; the work is done while :meth:`tensors` is walked.

    Attributes:
        outcome: complete once all tensors have come. metadata: of the result, likewise.
        config: peft's, of a result that needs one, likewise.
        tick: called before each module; what it raises ends the job.
        signs: whether the tensors are this program's work, which the metadata then says.
    """

    signs: ClassVar[bool] = True

    def __init__(self, metadata: Mapping[str, str] | None = None, tick: Tick = quiet) -> None:
        self.outcome = Outcome()
        self.config: dict[str, Any] | None = None
        kept = {k: v for k, v in (metadata or {}).items() if k not in _SCALE_METADATA}
        self.metadata = signed(kept) if self.signs else kept
        self.tick = tick

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of the result, one module's tensors in memory at a time."""

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Make ``metadata`` the result's, in place: whoever writes it has it already."""
        made = dict(metadata)
        self.metadata.clear()
        self.metadata.update(made)

    def collect(self, name: str = "") -> Adapter:
        """The result in memory."""
        tensors = dict(self.tensors())
        return Adapter(tensors, self.metadata, self.config, name)

    def write(self, path: PathLike, *, overwrite: bool = False) -> dict[str, str]:
        """The result as a file; returns the metadata written. Raises as :func:`write_spooled`."""
        return write_spooled(path, self.tensors(), self.metadata, overwrite=overwrite)
