"""The modules of an adapter file: its keys split into stem and suffix, once for all formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ..adapters import suffixes
from ..adapters.base import numbered
from ..errors import AdapterLabError
from .base import FORMATS, KeyFormat, unwrap

# Of algorithms that have no entry: known so that the stem in front of them is.
_FOREIGN = (
    "lora_down.bias", "lora_A.bias", "scale", "bm.weight", "randlora_lambda", "randlora_gamma",
    "fourierft_spectrum", "vblora_logits_A", "vblora_logits_B", "poly_lora_A", "poly_lora_B",
)  # fmt: skip
# A module's own name ends so as well: of an adapter only beside another tensor of it.
_WEAK = {"weight": "on_input", "bias": "on_input"}
# In LightX2V's files, the difference of the parameter ``modulation`` of Wan's blocks and head.
_RAW = "diff_m"
EMBEDDING = "bundle_emb."  # sd-webui: textual inversion embeddings beside the adapter


@dataclass
class Stem:
    """One adapter module of a file.

    Attributes:
        name: as the file spells it. clean: without wrappers.
        tensors: canonical suffix -> tensor. keys: canonical suffix -> key in the file.
        unknown: suffixes that no format knows.
        joint: whether "_lora" between stem and suffix was taken for part of the suffix.
    """

    name: str
    clean: str
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    keys: dict[str, str] = field(default_factory=dict[str, str])
    unknown: list[str] = field(default_factory=list[str])
    joint: bool = False

    @property
    def foreign(self) -> list[str]:
        """Its suffixes that no algorithm has."""
        return [*(s for s in self.tensors if not is_known(s)), *self.unknown]

    @property
    def embedding(self) -> bool:
        """Whether it is no module but a bundled textual inversion embedding."""
        return self.name.startswith(EMBEDDING)


def read_stems(adapter: Mapping[str, Tensor]) -> dict[str, Stem]:
    """The modules of a file by stem, in file order.

    The suffix is the longest known spelling from the right. A key without one goes to the stem
    that it extends, else its last name is taken for the suffix.

    Raises:
        AdapterLabError: a key that is not text, a value that is no tensor, or two keys that mean
            the same tensor.
    """
    stems: dict[str, Stem] = {}
    strange: list[str] = []
    for key, tensor in adapter.items():
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterLabError("A key in the adapter is not text", found=repr(key))
        if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterLabError(f"'{key}' is not a tensor", found=type(tensor).__name__)
        head, *names = key.rsplit(".", 3)
        split = _tail(".".join(names)) if names else None
        if split is None or key.startswith(EMBEDDING):
            strange.append(key)
            continue
        extra, suffix, joint = split
        name = head + extra
        if suffix == _RAW:
            name, suffix = f"{name}{'.' if '.' in name else '_'}modulation", "diff"
        stem = stems.get(name)
        if stem is None:
            stem = stems[name] = Stem(name, unwrap(name), joint=joint)
        _put(stem, suffix, key, tensor)
    for key in strange:
        _place(key, adapter[key], stems)
    return _completed(stems)


def _put(stem: Stem, suffix: str, key: str, tensor: Tensor) -> None:
    if suffix == "scale" and tensor.ndim:
        suffix = "set_weight"  # of a norm, in Black Forest Labs' files
    else:
        form = _private(stem.name)
        suffix = form.reads.get(suffix) or _respell(suffix, form) if form else suffix
    if suffix in stem.tensors:
        found = f"'{stem.keys[suffix]}' and '{key}'"
        raise AdapterLabError(f"{suffix} of '{stem.name}' is given twice", found=found)
    stem.tensors[suffix], stem.keys[suffix] = tensor, key


def _place(key: str, tensor: Tensor, stems: dict[str, Stem]) -> None:
    """Put a key without a known suffix to the module that it extends."""
    head, _, last = key.rpartition(".")
    if head in stems and _WEAK.get(last) in stems[head].tensors:
        return _put(stems[head], last, key, tensor)
    if key.startswith(EMBEDDING):
        name, _, suffix = key[len(EMBEDDING) :].partition(".")
        name = EMBEDDING + name
    else:
        name, suffix = _extends(key, stems)
    stems.setdefault(name, Stem(name, unwrap(name))).unknown.append(suffix)
    return None


def _extends(key: str, stems: Mapping[str, Stem]) -> tuple[str, str]:
    head = key
    while "." in head:
        head = head.rpartition(".")[0]
        if head in stems:
            return head, key[len(head) + 1 :]
    # Underscored stems hold no dot, so whatever follows the first one is the suffix.
    head, _, suffix = key.partition(".") if key.startswith(_underscored()) else key.rpartition(".")
    return head or key, suffix


def _completed(stems: dict[str, Stem]) -> dict[str, Stem]:
    """With what a file leaves to be understood."""
    # The control adapters of Black Forest Labs widen the layer that takes the image in; their
    # norms, which they set, tell them from others.
    wider = stems.get("img_in")
    norms = stems.get("single_blocks.0.norm.key_norm")
    if wider and norms and "set_weight" in norms.tensors and "lora_up.weight" in wider.tensors:
        down = wider.tensors.get("lora_down.weight")
        if down is not None and "reshape_weight" not in wider.tensors:
            size = [len(wider.tensors["lora_up.weight"]), down.shape[1]]
            wider.tensors["reshape_weight"] = torch.tensor(size)
    return stems


@lru_cache(1)
def _spellings() -> dict[str, str]:
    """Every known spelling of a suffix -> canonical."""
    known = (s for s in (*_FOREIGN, _RAW, *suffixes()) if s not in _WEAK)
    table = {suffix: suffix for suffix in known}
    for form in FORMATS.values():
        if not form.private:
            table |= {**form.reads, **{theirs: ours for ours, theirs in form.spellings.items()}}
        else:
            table |= {theirs: theirs for theirs in form.spellings.values() if theirs not in table}
    return table


@lru_cache(1 << 14)
def _tail(tail: str) -> tuple[str, str, bool] | None:
    """(what of ``tail`` belongs to the stem, canonical suffix, whether "_lora" was split off).

    None where no suffix is known. The ends of keys repeat, so that most are looked up here.
    """
    table, names = _spellings(), tail.split(".")
    for n in range(len(names), 0, -1):
        rest, last = names[:-n], names[-n:]
        if rest:
            # Some join the first half of the suffix to the path: "to_q_lora.down.weight".
            path, _, word = rest[-1].rpartition("_")
            suffix = table.get(f"_{word}.{'.'.join(last)}")
            if path and suffix:
                return "".join(f".{name}" for name in (*rest[:-1], path)), suffix, True
        general = [last[0], "*", *last[2:]] if n > 1 else last
        suffix = table.get(".".join(last)) or table.get(".".join(general))
        if suffix is not None:
            filled = suffix.replace("*", last[-1]) if suffix.endswith("*") else suffix
            return "".join(f".{name}" for name in rest), filled, False
    return None


@lru_cache(1)
def _known() -> frozenset[str]:
    return frozenset(suffixes())


@lru_cache(1 << 10)
def is_known(suffix: str) -> bool:
    """Whether some algorithm or wrapper has a tensor of this canonical name."""
    return suffix in _known() or numbered(suffix) in _known()


@lru_cache(1)
def _privates() -> tuple[tuple[str, KeyFormat], ...]:
    return tuple((p, form) for form in FORMATS.values() if form.private for p, _ in form.prefixes)


def _private(name: str) -> KeyFormat | None:
    return next((form for prefix, form in _privates() if name.startswith(prefix)), None)


def _respell(suffix: str, form: KeyFormat) -> str:
    for ours, theirs in form.spellings.items():
        if theirs in (suffix, numbered(suffix)):
            return ours.replace("*", suffix.rpartition(".")[2])
    return suffix


@lru_cache(1)
def _underscored() -> tuple[str, ...]:
    return tuple(p for f in FORMATS.values() if f.separator == "_" for p, _ in f.prefixes)
