"""The modules of an adapter file: its keys split into stem and suffix, once for all formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..adapters import ALGORITHMS
from ..errors import AdapterLabError
from .base import FORMATS, unwrap

# Of algorithms that have no entry (yet): known so that the stem in front of them is.
_FOREIGN = (
    "dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude",
    "lora_A.bias", "lora_B.bias", "lora_down.bias", "lora_up.bias",
    "lora_embedding_A", "lora_embedding_B", "reshape_weight", "scalar", "scale",
    "diff", "diff_b", "diff_m", "set_weight", "w_norm", "b_norm", "on_input", "ia3_l",
    "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight",
    "oft_blocks", "oft_blocks.*", "oft_diag", "oft_R.weight", "boft_R", "boft_s", "rescale",
    "vera_lambda_b", "vera_lambda_d", "q_layer.weight", "p_layer.weight", "lambda_layer",
)  # fmt: skip


@dataclass
class Stem:
    """One adapter module of a file.

    Attributes:
        name: as the file spells it. clean: without wrappers.
        tensors: canonical suffix -> tensor. keys: canonical suffix -> key in the file.
        unknown: suffixes that no format or algorithm knows.
    """

    name: str
    clean: str
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    keys: dict[str, str] = field(default_factory=dict[str, str])
    unknown: list[str] = field(default_factory=list[str])


def read_stems(adapter: Mapping[str, Tensor]) -> dict[str, Stem]:
    """The modules of a file by stem, in file order.

    The suffix is the longest known spelling from the right. A key without one goes to the stem
    that it extends, else its last name is taken for the suffix.

    Raises:
        AdapterLabError: a key that is not text, a value that is no tensor, or two keys that mean
            the same tensor.
    """
    table = _spellings()
    stems: dict[str, Stem] = {}
    strange: list[str] = []
    for key in adapter:
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterLabError("A key in the adapter is not text", found=repr(key))
        if not isinstance(adapter[key], Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterLabError(f"'{key}' is not a tensor", found=type(adapter[key]).__name__)
        split = _split(key, table)
        if split is None:
            strange.append(key)
            continue
        name, suffix = split
        stem = stems.get(name) or stems.setdefault(name, Stem(name, unwrap(name)))
        if suffix in stem.tensors:
            found = f"'{stem.keys[suffix]}' and '{key}'"
            raise AdapterLabError(f"{suffix} of '{name}' is given twice", found=found)
        stem.tensors[suffix], stem.keys[suffix] = adapter[key], key
    for key in strange:
        name, suffix = _extends(key, stems)
        stems.setdefault(name, Stem(name, unwrap(name))).unknown.append(suffix)
    return stems


def _spellings() -> dict[str, str]:
    """Every known spelling of a suffix -> canonical."""
    table = {suffix: suffix for suffix in _FOREIGN} | {"alpha": "alpha"}
    for algorithm in ALGORITHMS.values():
        table |= {s: s for s in algorithm.suffixes}
    for form in FORMATS.values():
        table |= {**form.reads, **{theirs: ours for ours, theirs in form.spellings.items()}}
    return table


def _split(key: str, table: Mapping[str, str]) -> tuple[str, str] | None:
    """(stem, canonical suffix) of ``key``, None where no suffix is known."""
    names = key.rsplit(".", 3)
    for n in range(len(names) - 1, 0, -1):
        head, tail = ".".join(names[:-n]), names[-n:]
        for spelled in (tail, [tail[0], "*", *tail[2:]] if n > 1 else tail):
            suffix = table.get(".".join(spelled))
            if suffix is not None:
                return head, suffix
        # Some join the first half of the suffix to the path: "to_q_lora.down.weight".
        joint = head.rpartition("_")
        suffix = table.get(f"_{joint[2]}.{'.'.join(tail)}")
        if suffix is not None:
            return joint[0], suffix
    return None


def _extends(key: str, stems: Mapping[str, Stem]) -> tuple[str, str]:
    head = key
    while "." in head:
        head = head.rpartition(".")[0]
        if head in stems:
            return head, key[len(head) + 1 :]
    # Underscored stems hold no dot, so whatever follows the first one is the suffix.
    underscored = any(
        key.startswith(p) for f in FORMATS.values() if f.separator == "_" for p, _ in f.prefixes
    )
    head, _, suffix = key.partition(".") if underscored else key.rpartition(".")
    return head or key, suffix
