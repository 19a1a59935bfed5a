"""Fresh adapters of a configuration, ready to be trained."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..errors import AdapterLabError
from ..tensors import factorization
from . import ALGORITHMS
from .base import Algorithm, Shape
from .beside import Biased
from .boft import widest
from .config import DORA_AXES, VARIANTS, AdapterConfig
from .dora import SCALE, DoRA
from .dropout import Dropout, Rates
from .lora import FROZEN, LoRA, check_unit
from .oft import DIAG
from .scalar import SCALAR, Scalar
from .tlora import TLoRA
from .wrapper import Wrapper

# What sd-scripts takes for ``networks.oft``.
COFT = 1e-3

_KRON = ("lokr", "glokr")
_ROTATIONS = ("oft", "boft")
_UNREAD = ("ia3", "glokr", "tlora")  # by ComfyUI's own loader
# option -> the algorithms and variants that know it; every one knows those that are not here.
_KNOWN = {
    "rank": ("lora", "loha", "glora", "tlora", *_KRON, *_ROTATIONS),
    "alpha": ("lora", "loha", "glora", "tlora", *_KRON),
    "factor": _KRON,
    "decompose_both": _KRON,
    "full_matrix": _KRON,
    "tucker": ("lora", "loha", *_KRON),
    "conv_rank": ("lora", "loha", "glora", *_KRON, *_ROTATIONS),
    "conv_alpha": ("lora", "loha", "glora", *_KRON),
    "unit": ("dylora",),
    "constraint": _ROTATIONS,
    "rescale": _ROTATIONS,
    "rs_lora": ("lora", "loha", "glora", "tlora", *_KRON),
    "on_input": ("ia3",),
}


def choices() -> dict[str, str]:
    """Everything that can be trained, name -> what it is for; variants after their algorithm."""
    found: dict[str, str] = {}
    for name, algorithm in ALGORITHMS.items():
        if algorithm.trainable:
            found[name] = f"{algorithm.title}: {algorithm.purpose}"
            kin = {n: v for n, v in VARIANTS.items() if v.algorithm == name}
            found |= {n: f"{v.title}: {v.purpose}" for n, v in kin.items()}
    return found


def make(
    shape: Shape, config: AdapterConfig, generator: torch.Generator, *, biased: bool = False
) -> Algorithm:
    """A fresh adapter of a weight of ``shape``, which leaves the layer as it is, bit by bit.

    One that ``needs_weight_to_start`` does so once it is ``started``. A norm, whose weight is a
    vector, is trained whole under every configuration.

    Args:
        shape: (out, in / groups, *k), of a norm (n,).
        generator: of the factors that are random.
        biased: whether the layer has a bias.

    Raises:
        AdapterLabError: options that mean nothing together, or an algorithm that this layer is not
            made for.
    """
    check(config)
    norm = len(shape) == 1
    name = "norm" if norm else base_of(config.algorithm)
    if name == "norm" and not norm:
        raise AdapterLabError(
            "Only norms are trained as norms", found=f"a weight of {tuple(shape)}",
            fix="Choose another algorithm, or leave only norms in Training Targets: 'norms' on, "
            "'exclude' .* and 'include' .*norm.*",
        )  # fmt: skip
    config = _for_shape(shape, config)
    made = ALGORITHMS[name].init(shape, config, generator)
    if not norm:
        made = _varied(made, config, generator)
    made = with_dropout(made, config)
    zero = torch.zeros((), device=generator.device, dtype=torch.float32)
    if config.scalar and not norm:
        made = Scalar(made, {SCALAR: zero})
    if config.dora and not norm:
        axis = DORA_AXES.index(config.dora_on)
        units = [n if i == axis else 1 for i, n in enumerate(shape)]
        made = DoRA(made, {SCALE: zero.new_zeros(units)}, axis)
    if biased and (norm or config.bias):
        made = Biased(made, {"b_norm" if norm else "diff_b": zero.new_zeros(shape[0])})
    return made


def go_on(algorithm: Algorithm, config: AdapterConfig) -> Algorithm:
    """An adapter that was read, to be trained further under ``config``: its dropouts, and what of
    LoRA-FA and DyLoRA is not in a file. Algorithm, sizes and scale stay as they are.

    Raises:
        AdapterLabError: as it is read, not trained, or a block of DyLoRA that does not fit.
    """
    if isinstance(algorithm, DoRA):
        inner = go_on(algorithm.inner, config)
        return DoRA(inner, {SCALE: algorithm.tensors[SCALE]}, algorithm.axis)
    if not algorithm.trainable or (isinstance(algorithm, Wrapper) and algorithm.own_names):
        raise AdapterLabError(
            f"{algorithm.title} is read, not trained",
            found=algorithm.untrained or ", ".join(algorithm.traits),
        )
    if DIAG in algorithm.tensors:
        raise AdapterLabError(
            f"{algorithm.title} is trained by what its rotations are made of",
            found=f"{DIAG}, the rotations themselves",
        )
    if algorithm.bias is not None:
        raise AdapterLabError(
            "Training cannot go on from an adapter that changes a bias by factors of its weight"
        )
    made = algorithm
    if isinstance(made, LoRA) and config.algorithm == "lora_fa":
        made = made.on(made.tensors)
        made.frozen = FROZEN
    elif isinstance(made, LoRA) and config.algorithm == "dylora":
        made = made.in_units(config.unit)
    elif isinstance(made, TLoRA):
        made = made.unstarted()
    return with_dropout(made, config)


def is_made_by(algorithm: Algorithm, shape: Shape, config: AdapterConfig) -> bool:
    """Whether ``algorithm``, of a weight of ``shape``, is one that ``config`` makes: of its kind
    and, where that has ranks, of the rank that it takes on such a weight."""
    name = "norm" if len(shape) == 1 else base_of(config.algorithm)
    if algorithm.name != name:
        return False
    if name not in _KNOWN["rank"]:
        return True
    bare = AdapterConfig(
        name, factor=config.factor, rank=config.rank, conv_rank=config.conv_rank,
        decompose_both=config.decompose_both, full_matrix=config.full_matrix, tucker=config.tucker,
    )  # fmt: skip
    try:
        return algorithm.rank == make(shape, bare, torch.Generator()).rank
    except AdapterLabError:  # it makes none of such a weight
        return False


def with_dropout(algorithm: Algorithm, config: AdapterConfig) -> Algorithm:
    """``algorithm`` under the dropouts of ``config``; itself without any."""
    rates = Rates(config.dropout, config.rank_dropout, config.module_dropout)
    return Dropout(algorithm, rates) if rates != Rates() else algorithm


def with_leaves(algorithm: Algorithm, device: torch.device, precision: str = "fp32") -> Algorithm:
    """The same on ``device``, its trained tensors as leaves of autograd, in memory of their own.

    Args:
        precision: of the trained tensors that need not be in float32, "fp32" or "bf16".
    """
    found: dict[str, Tensor] = {}
    trained = algorithm.trained.keys()
    for name, t in algorithm.tensors.items():
        half = precision == "bf16" and name not in algorithm.precise
        dtype = torch.bfloat16 if half else torch.float32
        leaf = t.detach().to(device, dtype if t.is_floating_point() else t.dtype, copy=True)
        found[name] = leaf.requires_grad_(name in trained)
    return algorithm.on(found)


def check(config: AdapterConfig) -> None:
    """Raise AdapterLabError for options that mean nothing together."""
    name = base_of(config.algorithm)
    algorithm = ALGORITHMS[name]
    if not algorithm.trainable:
        raise AdapterLabError(f"{algorithm.title} is read, not trained", found=algorithm.untrained)
    if config.dora and not algorithm.additive:
        raise AdapterLabError(
            f"DoRA means nothing on {algorithm.title}", found="dora",
            expected="an algorithm that adds a delta to the weight",
        )  # fmt: skip
    if config.scalar and not algorithm.folds:
        raise AdapterLabError(
            f"{algorithm.title} has no factor that could carry a scalar", found="scalar"
        )
    if config.algorithm == "dylora" and config.tucker:
        raise AdapterLabError("DyLoRA has no ranks to cut in a Tucker core", found="tucker")
    if config.algorithm == "dylora":
        for rank in (config.rank, config.conv_rank):
            check_unit(rank, config.unit)


def base_of(name: str) -> str:
    """The registry name of an algorithm or variant; raises AdapterLabError for neither."""
    if name not in VARIANTS and name not in ALGORITHMS:
        raise AdapterLabError(
            f"Unknown algorithm '{name}'", expected=f"one of {', '.join(choices())}"
        )
    return VARIANTS[name].algorithm if name in VARIANTS else name


def config_notes(config: AdapterConfig) -> tuple[str, ...]:
    """What of ``config`` is without effect, here or in ComfyUI's own loader, whatever the layer."""
    names = {config.algorithm, base_of(config.algorithm)}
    idle = [
        f.name
        for f in fields(config)
        if f.name in _KNOWN and not names & {*_KNOWN[f.name]}
        and getattr(config, f.name) != f.default
    ]  # fmt: skip
    if config.full_matrix and not names.isdisjoint(_KRON):
        idle += [n for n in ("decompose_both", "rs_lora") if getattr(config, n)]
    if config.dora_on != "output" and not config.dora:
        idle.append("dora_on")
    title = choices().get(config.algorithm, config.algorithm).partition(":")[0]
    notes = [f"{title} does not use {', '.join(idle)}"] if idle else []
    if config.precision == "bf16" and config.algorithm == "tlora":
        notes.append("T-LoRA keeps its factors in fp32")
    name = base_of(config.algorithm)
    other = [what for what, applies in (
        (title, name in _UNREAD),
        ("DoRA on outputs", config.dora and config.dora_on == "output"),
        ("the constraint", name in _ROTATIONS and config.constraint > 0),
        ("the constraint", config.algorithm == "coft" and not config.constraint),
        ("rescale", name == "oft" and config.rescale),
    ) if applies]  # fmt: skip
    if other:
        notes.append(
            f"ComfyUI's own LoRA loader does not read {', '.join(other)} as trained; use Load "
            "Adapter"
        )
    return tuple(notes)


def training_notes(shape: Shape, config: AdapterConfig) -> tuple[str, ...]:
    """What the user should know of ``config`` on a weight of ``shape`` (out, in, *k)."""
    if len(shape) < 2:
        return ()
    config = _for_shape(shape, config)
    name, (out, width) = base_of(config.algorithm), shape[:2]
    notes: list[str] = []
    if name in _KRON and not config.full_matrix:
        inner = [factorization(n, config.factor)[1] for n in (out, width)]
        if config.rank >= max(inner) / 2:
            notes.append(
                f"{ALGORITHMS[name].title}: rank {config.rank} is no less than half of {max(inner)}"
                f", the second factor of a weight {tuple(shape)} is a full matrix"
            )
    block, span = widest(out, config.rank) if name == "boft" else (0, out)
    if 0 < span < out:
        notes.append(
            f"BOFT: blocks of {block} mix {span} rows of a weight {tuple(shape)} with each other, "
            "not all; LyCORIS does not load such files, ComfyUI does"
        )
    limit = min(out, width * math.prod(shape[2:]))
    if name in ("lora", "tlora") and config.rank > limit:
        spare = "is taken as" if name == "tlora" else "can do no more than"
        notes.append(f"rank {config.rank} {spare} {limit} on a weight {tuple(shape)}")
    return tuple(notes)


def _for_shape(shape: Shape, config: AdapterConfig) -> AdapterConfig:
    """``config`` with the rank and alpha that a weight of ``shape`` gets, and its variant's own."""
    if math.prod(shape[2:]) != 1:
        rank, alpha = config.conv_rank or config.rank, config.conv_alpha or config.alpha
        config = replace(config, rank=rank, alpha=alpha)
    if config.algorithm == "coft" and not config.constraint:
        config = replace(config, constraint=COFT)
    return config


def _varied(made: Algorithm, config: AdapterConfig, generator: torch.Generator) -> Algorithm:
    if isinstance(made, LoRA) and config.algorithm == "lora_fa":
        return made.with_frozen_down(generator)
    if isinstance(made, LoRA) and config.algorithm == "dylora":
        return made.in_units(config.unit)
    return made
