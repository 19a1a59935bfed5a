"""Whether checkpoints are of one training: the same tensors, scales, algorithm and model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..files import Reader, TensorInfo
from ..header import DTYPES
from .order import Checkpoint, some

ALPHA = ".alpha"
# What differs between trainings whose factors have nothing to do with each other.
_KIND = ("ss_network_module", "ss_base_model_version", "modelspec.architecture")
_RUN = ("ss_output_name", "ss_session_id", "ss_seed", "ss_network_args", "ss_sd_model_name")
_SCALE = ("ss_network_dim", "ss_network_alpha", "lora_adapter_metadata")
_SETTINGS = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def require_same_tensors(files: Sequence[Checkpoint]) -> None:
    """All files hold tensors of the same names and shapes.

    Raises:
        AdapterLabError: lists what is missing, or the tensors whose shapes differ.
    """
    keys = dict.fromkeys(key for c in files for key in c.header.tensors)
    missing = [(c, [k for k in keys if k not in c.header.tensors]) for c in files]
    if lacking := [(c, names) for c, names in missing if names]:
        raise AdapterLabError(
            "These files do not hold the same tensors, so they are not of one training",
            found="; ".join(f"'{c.name}' lacks {some(names)}" for c, names in lacking),
            fix="Average checkpoints of one run only",
        )
    shapes = {key: {c.header.tensors[key].shape for c in files} for key in keys}
    if other := [key for key, found in shapes.items() if len(found) > 1]:
        one, key = files[0], other[0]
        strange = next(
            c for c in files if c.header.tensors[key].shape != one.header.tensors[key].shape
        )
        raise AdapterLabError(
            f"{len(other)} tensors have other shapes in other files, so they are not of one "
            "training",
            found=f"{some(other)}; {key} is {_shape(one, key)} in '{one.name}' and "
            f"{_shape(strange, key)} in '{strange.name}'",
            fix="Average checkpoints of one run, of one rank, only",
        )


def require_same_scales(files: Sequence[Checkpoint], readers: Sequence[Reader]) -> None:
    """The alphas agree, and where there are none, what else tells the scale.

    Raises:
        AdapterLabError: lists those that do not.
    """
    alphas = [key for key in files[0].header.tensors if key.endswith(ALPHA)]
    other = [key for key in alphas if len({_bytes(reader, key) for reader in readers}) > 1]
    values = {key: [reader.tensor(key) for reader in readers] for key in other}
    if differing := {key: found for key, found in values.items() if not _close(found)}:
        told = [f"{key} ({_numbers(found)})" for key, found in differing.items()]
        raise AdapterLabError(
            f"The alphas of {len(told)} modules differ between the files", found=some(told),
            fix="Factors of other scales have no average: use files of one training",
        )  # fmt: skip
    places: list[tuple[str, Callable[[Checkpoint], object]]] = [
        ("adapter_config.json", lambda c: [(c.config or {}).get(name) for name in _SETTINGS])
    ]
    if not alphas:
        places += [(key, _entry(key)) for key in _SCALE]
    for place, of in places:
        if strange := _other(files, of):
            raise AdapterLabError(
                f"The scale in {place} differs between the files",
                found=f"{_text(of(files[0]))} in '{files[0].name}', "
                f"{_text(of(strange))} in '{strange.name}'",
                fix="Factors of other scales have no average: use files of one training",
            )


def require_one_training(files: Sequence[Checkpoint], *, strict: bool = False) -> list[str]:
    """Warnings of metadata that tell trainings apart.

    Args:
        strict: coefficients have been solved for one trajectory, and mean nothing for two.

    Raises:
        AdapterLabError: another algorithm or model; if ``strict``, another training.
    """
    warnings: list[str] = []
    for key in (*_KIND, *_RUN):
        other = _other(files, _entry(key))
        if other is None:
            continue
        values = dict.fromkeys(str(c.header.metadata.get(key)) for c in files)
        told = f"{key} differs between the files: {some(values)}"
        if key in _KIND or (strict and key == _RUN[0]):
            raise AdapterLabError(
                "These files are not of one training", found=told,
                fix="Average checkpoints of one run only",
            )  # fmt: skip
        warnings.append(told)
    return warnings


def out_dtype(infos: Iterable[TensorInfo]) -> torch.dtype:
    """The dtype of all, or the narrowest that holds the values of each."""
    found = [DTYPES[info.dtype] for info in infos]
    result = found[0]
    for dtype in found[1:]:
        if dtype != result:
            result = torch.promote_types(_loose(result), _loose(dtype))
    return result


def _loose(dtype: torch.dtype) -> torch.dtype:
    """Torch promotes no fp8; every value of one is a bfloat16 and a float16."""
    small = dtype.is_floating_point and dtype.itemsize == 1
    return torch.float16 if small else dtype


def _close(found: Sequence[Tensor]) -> bool:
    first, *others = (value.to(torch.float32) for value in found)
    return all(torch.allclose(first, value) for value in others)


def _bytes(reader: Reader, key: str) -> bytes:
    info = reader.header.tensors[key]
    memory = bytearray(info.end - info.start)
    reader.fill(memoryview(memory), info.start)
    return bytes(memory)


def _numbers(found: Sequence[Tensor]) -> str:
    values = dict.fromkeys(f"{value.flatten()[0].item():g}" for value in found if value.numel())
    return some(values)


def _other(files: Sequence[Checkpoint], of: Callable[[Checkpoint], object]) -> Checkpoint | None:
    """The first for which ``of`` says something else than for the first of all."""
    return next((c for c in files if of(c) != of(files[0])), None)


def _entry(key: str) -> Callable[[Checkpoint], object]:
    return lambda one: one.header.metadata.get(key)


def _shape(one: Checkpoint, key: str) -> str:
    return str(list(one.header.tensors[key].shape))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
