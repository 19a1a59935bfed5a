"""The average of a training's checkpoints, made after it has ended.

    theta = sum_i w_i theta_i

of the factors, with weights that follow a power function of the step, are solved for from two
averages that training tracked, or are those of musubi-tuner's script.

Reference: Karras et al. 2023 (EDM2), arXiv 2312.02696, section 3; kohya-ss/musubi-tuner 30c658c,
``lora_post_hoc_ema.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..files import Reader
from ..lazy import AdapterFile
from ..power import Floats, musubi_betas, musubi_weights, profile_error, solve, weights
from ..streams import PathLike, write_stream
from .agree import require_one_training, require_same_scales, require_same_tensors
from .job import Job
from .mean import Mean
from .metadata import merged_from
from .modules import Source, Tick, quiet
from .order import AVERAGED, WIDTH, Checkpoint, ordered, read, stamp
from .outcome import Row
from .profiles import Plan, Settings, facts, plan

__all__ = [
    "Average", "Plan", "Settings", "merge_files", "musubi_betas", "musubi_weights",
    "plan", "profile_error", "require_other", "require_unchanged", "solve", "weights",
]  # fmt: skip

_MERGED = "modelspec.merged_from"


class Average(Job):
    """The average that ``made`` plans.

    Args:
        metadata_from: index of the file whose metadata the result has.

    Attributes:
        infos: key -> (dtype, shape) of the result.
        alphas: those that no tensor of the files tells, by key.

    Raises:
        AdapterLabError: files of other tensors, scales, algorithms or models, all of them listed.
    """

    def __init__(self, made: Plan, *, metadata_from: int = -1, tick: Tick = quiet) -> None:
        super().__init__(tick=tick)
        self.plan, files = made, made.files
        require_same_tensors(files)
        with self.opened() as mean:
            require_same_scales(files, mean.readers)
            shapes = {key: info.shape for key, info in files[0].header.tensors.items()}
            self.infos = {key: (mean.dtype(key), shape) for key, shape in shapes.items()}
        self.alphas = _untold_alphas(files[0])
        self.infos |= {key: (t.dtype, tuple(t.shape)) for key, t in self.alphas.items()}
        self.metadata = _metadata(made, files[metadata_from])
        strict = made.profile == "reconstruct"
        self.outcome.warnings += made.course.warnings + require_one_training(files, strict=strict)
        self.outcome.left_out |= made.course.left_out
        self.outcome.facts += facts(made)
        unit = made.course.unit
        for one, time, weight in zip(files, made.course.times, made.weights, strict=True):
            self.outcome.rows[one.name] = Row(f"weight {weight:.6f}", note=f"{unit} {time}")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of the result, in the order of the first file."""
        files = self.plan.files
        with self.opened() as mean:
            keys = list(files[0].header.tensors)
            for done, key in enumerate(keys):
                self.tick(done, len(keys), f"averaging {key}")
                yield key, mean.tensor(key)
        yield from self.alphas.items()
        require_unchanged(files)
        self.outcome.verdict = (
            f"{len(keys)} tensors are the average of {len(files)} files, {self.plan.course.unit} "
            f"{self.plan.course.times[0]} to {self.plan.end}"
        )

    @contextmanager
    def opened(self) -> Generator[Mean, None, None]:
        """The files, open, and how they are averaged."""
        betas = self.plan.betas if self.plan.recursion else None
        with ExitStack() as stack:
            readers = [stack.enter_context(Reader(c.path, c.header)) for c in self.plan.files]
            given = self.plan.profile == "weights"
            yield Mean(readers, self.plan.weights, betas, normal=not given)

    def write(self, path: PathLike, *, overwrite: bool = False) -> dict[str, str]:
        """The result as a file, without waiting on disk for its size; returns the metadata.

        Raises:
            AdapterLabError: as :func:`write_stream`; ``path`` is one of the averaged files.
        """
        require_other(path, self.plan.files)
        return write_stream(path, self.infos, self.tensors(), self.metadata, overwrite=overwrite)


def merge_files(
    paths: Sequence[PathLike],
    weights: Sequence[float] | Floats,
    out: PathLike,
    *,
    metadata_from: int = -1,
    overwrite: bool = False,
    tick: Tick = quiet,
) -> dict[str, str]:
    """Write sum_i weights_i theta_i of the files ``paths``, streaming; returns the metadata.

    Args:
        metadata_from: index of the file whose metadata the result has.

    Raises:
        AdapterLabError: as many weights as files are needed, all of them finite; as
            :class:`Average` and :meth:`Average.write`.
    """
    found = np.asarray(weights, np.float64)
    if found.shape != (len(paths),) or not bool(np.isfinite(found).all()):
        raise AdapterLabError(
            "These weights do not fit the files", found=f"{found.tolist()} for {len(paths)} files",
            expected="a finite number for each",
        )  # fmt: skip
    if not -len(paths) <= metadata_from < len(paths):
        raise AdapterLabError(
            f"There is no file {metadata_from} to take the metadata from",
            found=f"{len(paths)} files",
        )
    course = ordered(read(paths), "as given")
    made = Plan("weights", Settings(), course, found)
    job = Average(made, metadata_from=metadata_from, tick=tick)
    return job.write(out, overwrite=overwrite)


def require_unchanged(files: Sequence[Checkpoint]) -> None:
    """No file was changed since its header was read.

    Raises:
        AdapterLabError: one was, or is gone.
    """
    for one in files:
        if not one.path.exists() or stamp(one.path) != one.stamp:
            raise AdapterLabError(
                f"'{one.path}' was changed or removed while it was read",
                fix="Wait until nothing writes it any more, and try again",
            )


def require_other(path: PathLike, files: Sequence[Checkpoint]) -> None:
    """``path`` is none of ``files``; raises AdapterLabError if it is."""
    for one in files:
        if os.path.exists(path) and os.path.samefile(path, one.path):
            raise AdapterLabError(
                f"Cannot write '{os.fspath(path)}': it is one of the averaged files",
                fix="Choose another name",
            )


def _untold_alphas(one: Checkpoint) -> dict[str, Tensor]:
    """The alphas of a file whose scale only a config beside it tells, which no result has."""
    if one.config is None:
        return {}
    with AdapterFile(one.path) as file:
        source = Source(file)
        loaded = ((m.name, m.stem, m.weight) for m in source.modules())
        return {
            source.key(name, "alpha"): torch.tensor(float(algorithm.alpha))
            for name, stem, algorithm in loaded
            if algorithm is not None and algorithm.scaled and "alpha" not in stem.tensors
        }


def _metadata(made: Plan, last: Checkpoint) -> dict[str, str]:
    """That of the last file; what it is an average of; and what beyond scales its config says."""
    settings = made.settings
    found = {key: value for key, value in last.header.metadata.items() if key != WIDTH}
    found |= {_MERGED: merged_from(c.name for c in made.files), AVERAGED: made.profile}
    if made.profile in ("reconstruct", "power", "musubi power"):
        found[WIDTH] = str(settings.sigma_rel)
    if last.config is not None:
        found["lora_adapter_metadata"] = json.dumps(last.config)
    return found
