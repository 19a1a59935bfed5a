"""Model files with quantised weights that ComfyUI loads by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..atomic import telling
from ..errors import AdapterLabError
from ..merge.bake import Given, refuse_inputs
from ..merge.bake_report import QUANTISED, metadata_of
from ..merge.modules import Tick, quiet
from ..merge.outcome import counted
from ..streams import PathLike, Reader, write_stream
from .job import Job, Settings
from .report import Report
from .sha256 import FileHash
from .verify import Sums, verify

_CPU = torch.device("cpu")
_STALE = ("modelspec.hash_sha256", "modelspec.unet_dtype")  # no longer true


def quantize_file(
    src: PathLike, dst: PathLike, *, format: str = "fp8_e4m3", architecture: str | None = None,
    keep: Iterable[str] = (), adapters: Sequence[Given] = (), worst: int = 0, most: float = 0.0,
    full_precision: bool = False, device: torch.device = _CPU, overwrite: bool = False,
    tick: Tick = quiet,
) -> Report:  # fmt: skip
    """Quantise the linear layers of a diffusion model's file, tensor by tensor.

    All else is copied: norms, biases, embeddings, convolutions, the other parts of a checkpoint,
    and the layers that the architecture lists as losing too much. What was written is read back
    before it takes the place of ``dst``.

    Args:
        src, dst: paths of model files (diffusion models or whole checkpoints).
        format, architecture, keep, adapters, worst, most, full_precision, device: as
            :class:`Settings`.
        tick: called before each tensor that is measured, quantised or read back; what it raises
            ends the job and leaves no file.

    Raises:
        AdapterLabError: all that :class:`Settings` and :class:`Job` raise, ``dst`` equal to an
            input or there already, a source that changes meanwhile, a file that does not read
            back as it was written, all that :func:`.streams.write_stream` raises.
    """
    patterns = [keep] if isinstance(keep, str) else tuple(keep)
    settings = Settings(
        format, architecture, patterns, adapters, worst, most, full_precision, device
    )
    refuse_inputs(src, dst, adapters)
    subject = f"Cannot write '{os.fspath(dst)}'"
    if not overwrite and os.path.exists(dst):  # before everything is measured
        raise AdapterLabError(f"{subject}: it exists already", fix="Choose another name.")
    with _one_core_left(), _job(src, settings, tick) as job, FileHash(job.reader) as source:
        sums = Sums()

        def closing(path: str) -> dict[str, str]:
            with telling(subject):
                verify(path, job, sums, tick)
            return _metadata(job, dst, source.hex())

        write_stream(
            dst, job.infos, job.tensors(tick, source.follow),
            _metadata(job, dst, source.placeholder), hashes=False, overwrite=overwrite,
            watch=sums.add, closing=closing,
        )  # fmt: skip
    return job.report


def quantize(
    src: PathLike, settings: Settings, tick: Tick = quiet
) -> tuple[dict[str, Tensor], dict[str, str], Report]:
    """The diffusion model that :func:`quantize_file` writes, its metadata and the report.

    The metadata have the name of the source, and not its hash.
    """
    with _job(src, settings, tick) as job:
        state = dict(job.tensors(tick, model_only=True))
        if others := job.plan.parts.keys() - job.inside:
            lost = f"{counted(len(others), 'weight')} of the checkpoint's other parts"
            job.report.warnings.append(
                f"What the adapters do to {lost} is left out, such as to '{min(others)}': this "
                "makes the diffusion model only"
            )
        return state, _metadata(job, src), job.report


@contextmanager
def _job(src: PathLike, settings: Settings, tick: Tick) -> Generator[Job, None, None]:
    with ExitStack() as stack, torch.no_grad():
        yield Job(stack.enter_context(Reader(src)), settings, stack, tick)


@contextmanager
def _one_core_left() -> Generator[None, None, None]:
    """For reading, hashing and writing.

    torch's threads wait for each other actively: where one has no core, all take many times as
    long.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(max(1, count - 1))
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _metadata(job: Job, dst: PathLike, digest: str = "") -> dict[str, str]:
    """Those of the source that are still true, and what the result was made of."""
    plan, source = job.plan, {"name": os.path.basename(job.reader.path)}
    made = {key: value for key, value in plan.metadata.items() if key not in _STALE}
    if plan.told:
        made = metadata_of(made, plan.told, job.reader.path, os.fspath(dst))
    if digest:
        source["sha256"] = digest
    return {**made, QUANTISED: json.dumps({"format": job.form.id, "source": source})}
