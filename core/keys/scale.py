"""The scale of a module that its own tensors do not tell, from every place that may tell it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import ALGORITHMS, Algorithm, load_parts
from ..errors import AdapterLabError
from ..files import Adapter
from .stems import Stem

UP, DOWN = "lora_up.weight", "lora_down.weight"
_FOLDED = ".lora_A.weight"
# peft takes what these start from out of the model's weights, unless it converts on saving.
_MOVED = ("pissa", "olora", "corda", "loftq")
_TRUE = ("true", "1")


class Scales:
    """Loads the modules of one file with the scale that is known of them.

    In this order: the module's ``alpha``; peft's config beside the file; diffusers'
    ``lora_adapter_metadata``; sd-scripts' ``ss_network_dim`` and ``ss_network_alpha``; ``alpha``,
    to be divided by each module's rank. Where none of them says anything, alpha is the rank and
    ``warnings`` tells so.

    Args:
        source: the file. alpha: for modules whose scale nothing else tells.

    Attributes:
        configured: whether there is a config of peft's, which may hold more than scales.
    """

    def __init__(self, source: Adapter, alpha: float | None = None) -> None:
        self.alpha = alpha
        self._configs: dict[str, Mapping[str, Any]] = _components(source.metadata)
        if source.config:
            self._configs = {"": source.config}
        self.configured = bool(source.config)
        self._network = Network(source.metadata)
        self._assumed: Counter[str] = Counter()
        self._matters: dict[tuple[str, ...], bool] = {}
        self._split: list[str] = []
        self._inert: list[str] = []

    def load(self, stem: Stem, path: str) -> dict[str, Algorithm]:
        """What the tensors of ``stem`` do, by parameter; ``path``: of the module, as peft sees it.

        Raises:
            AdapterLabError: malformed tensors or an unusable config.
        """
        config, path = self._config(stem, path)
        scale = self._outside(stem, config, path)
        parts = load_parts(stem.tensors, scale)
        algorithm = parts.get("weight")
        if algorithm is None:
            return parts
        if algorithm.scaled and algorithm.scale == 0:
            self._inert.append(stem.name)
        if config:
            return _configured(parts, algorithm, stem, {**config, "module": path})
        if scale is None and "alpha" in stem.tensors:
            again = self._network.rank_stabilised(algorithm, stem.tensors)
            parts = parts if again is None else load_parts(stem.tensors, again)
        elif scale is None and self._open(stem.tensors, algorithm):
            if self.alpha is None:
                self._assumed[algorithm.title] += 1
            else:
                given = {**stem.tensors, "alpha": torch.tensor(float(self.alpha))}
                parts = load_parts(given, None)
        return parts

    def config(self, stem: Stem) -> Mapping[str, Any] | None:
        """peft's config of the module, from beside the file or from its metadata."""
        return self._config(stem, "")[0]

    @property
    def warnings(self) -> list[str]:
        """What had to be assumed or put right."""
        said: list[str] = []
        if self._assumed:
            count = sum(self._assumed.values())
            said.append(
                f"Scale assumed: 1 (alpha = rank) for {count} module{'s' * (count != 1)}, since "
                "neither the file nor a config tells their alpha"
            )
        moved = {str(c.get("init_lora_weights", "")) for c in self._configs.values()}
        for start in sorted(s for s in moved if s.startswith(_MOVED)):
            said.append(
                f"Trained on a changed model (init_lora_weights: {start}), which the file does not "
                "hold: the result is right only there"
            )
        if self._inert:
            said.append(
                f"alpha is 0 in {len(self._inert)} modules, which change nothing: "
                f"'{self._inert[0]}' for one"
            )
        if self._split:
            said.append(
                f"{len(self._split)} fused modules were trained in parts (split_qkv) and hold the "
                f"alpha of one part: their scale is put right, '{self._split[0]}' for one"
            )
        return said

    def _config(self, stem: Stem, path: str) -> tuple[Mapping[str, Any] | None, str]:
        for component, config in self._configs.items():
            if not component:
                return config, path
            if stem.clean.startswith(component + "."):
                return config, stem.clean[len(component) + 1 :]
        return None, path

    def _outside(self, stem: Stem, config: Mapping[str, Any] | None, path: str) -> float | None:
        if "alpha" in stem.tensors:
            scale = self._network.split_scale(stem.tensors)
            if scale is not None:
                self._split.append(stem.name)
            return scale
        if config:
            return config_scale(config, path)
        # sd-scripts and musubi-tuner always write alpha. Their converters to peft's names multiply
        # it into the factors and keep the metadata.
        folded = stem.keys.get(DOWN, "").endswith(_FOLDED)
        return None if folded else self._network.scale(stem.tensors)

    def _open(self, tensors: Mapping[str, Tensor], algorithm: Algorithm) -> bool:
        """Whether an alpha would have changed what these tensors do."""
        names = tuple(tensors)
        if names not in self._matters:
            other = {**tensors, "alpha": torch.tensor(2.0 * algorithm.rank)}
            again = load_parts(other)["weight"] if algorithm.scaled else algorithm
            self._matters[names] = again.scale != algorithm.scale
        return self._matters[names]


def _configured(
    parts: dict[str, Algorithm], algorithm: Algorithm, stem: Stem, config: Mapping[str, Any]
) -> dict[str, Algorithm]:
    """``parts`` with what peft's config says of the algorithm, scale apart."""
    weight = algorithm.configured(config)
    if weight is algorithm:
        return parts
    biases = [a for a in ALGORITHMS.values() if a.parameter == "bias"]
    if any(a.owns(suffix) for suffix in stem.tensors for a in biases):
        return {**parts, "weight": weight}
    bias = weight.bias
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


class Network:
    """What sd-scripts wrote about the network of a file: ``ss_network_*`` metadata."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._args = network_args(metadata)
        self._dim, self._alpha = (_number(metadata.get(f"ss_network_{x}")) for x in _SIZES)
        self._conv = tuple(_number(self._args.get(f"conv_{x}")) for x in _SIZES)

    def scale(self, tensors: Mapping[str, Tensor]) -> float | None:
        """alpha / dim as trained; of k x k convolutions the values given for them apart."""
        down = tensors.get(DOWN)
        dim, alpha = self._dim, self._alpha
        if down is not None and math.prod(down.shape[2:]) > 1 and self._conv[0]:
            dim, alpha = self._conv[0], self._conv[1] or 1.0  # sd-scripts' default of conv_alpha
        if not dim or alpha is None or (down is not None and len(down) != dim):
            return None
        return alpha / dim

    def split_scale(self, tensors: Mapping[str, Tensor]) -> float | None:
        """The scale of a fused module whose parts sd-scripts trained apart; None for any other.

        It joins n modules of rank r into one of rank n r, whose up factor is block-diagonal, and
        leaves alpha as it was: the strength of a part was alpha / r. Converters that multiplied
        alpha by n are told by the value of alpha.
        """
        up, down, alpha = tensors.get(UP), tensors.get(DOWN), tensors["alpha"]
        if self._args.get("split_qkv", "").lower() not in _TRUE or up is None or down is None:
            return None
        if not self._dim or self._alpha is None or alpha.numel() != 1:
            return None
        parts = len(down) / self._dim
        same = math.isclose(float(alpha.item()), self._alpha, rel_tol=1e-3)
        if parts < 2 or parts != int(parts) or not same:
            return None
        # Without its values, what all else says is believed.
        blocks = up.is_meta or int(torch.count_nonzero(up)) * parts <= up.numel() * 1.5
        return self._alpha / self._dim if blocks else None

    def rank_stabilised(self, algorithm: Algorithm, tensors: Mapping[str, Tensor]) -> float | None:
        """The scale where LyCORIS trained with alpha / sqrt(r) and its alpha does not say so.

        Its LoRA, LoHa and LoKr store alpha sqrt(r), which alpha / r undoes; GLoRA stores alpha,
        and two full LoKr factors have no r to divide by.
        """
        if self._args.get("rs_lora", "").lower() not in _TRUE or tensors["alpha"].numel() != 1:
            return None
        if algorithm.name == "glora":
            return float(tensors["alpha"].item()) / math.sqrt(algorithm.rank)
        if algorithm.name == "lokr" and getattr(algorithm, "full", False) and self._dim:
            return math.sqrt(self._dim)
        return None


_SIZES = ("dim", "alpha")


def network_args(metadata: Mapping[str, str]) -> dict[str, str]:
    """The options of the network, ``ss_network_args``, as text; none where that is no table."""
    args = _json(metadata.get("ss_network_args", ""))
    return {name: str(value) for name, value in args.items()}


def config_scale(config: Mapping[str, Any], path: str) -> float | None:
    """alpha / r of the module ``path`` (of the model peft wrapped), with rs-LoRA alpha / sqrt(r).

    ``alpha_pattern`` and ``rank_pattern`` hold regexes that must match the end of the path, from
    a dot on; the first that does wins. None where the config fixes no scale.

    Raises:
        AdapterLabError: r or alpha is not a number, r is below 1, or a pattern is no regex.
    """
    rank = _value(config, "rank_pattern", "r", path)
    name = "lora_alpha" if "lora_alpha" in config else "alpha"
    alpha = _value(config, "alpha_pattern", name, path)
    if rank is None or alpha is None:
        return None
    if rank < 1:
        raise AdapterLabError("The rank in adapter_config.json is below 1", found=f"r = {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _value(config: Mapping[str, Any], patterns: str, default: str, path: str) -> float | None:
    value: object = config.get(default)
    table: object = config.get(patterns) or {}
    if not isinstance(table, Mapping):
        raise AdapterLabError(f"'{patterns}' in adapter_config.json is no table", found=repr(table))
    for pattern, special in cast("Mapping[str, object]", table).items():
        try:
            found = _ending(pattern).match(path)
        except re.error as error:
            raise AdapterLabError(
                f"{patterns} in adapter_config.json holds no regex", found=f"'{pattern}' ({error})"
            ) from error
        if found:
            value = special
            break
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterLabError(
            f"'{default}' in adapter_config.json is not a number", found=repr(value)
        )
    return float(value)


@lru_cache(1 << 14)
def _ending(pattern: str) -> re.Pattern[str]:
    """Of the end of a path, from a dot on; a file can bring more patterns than ``re`` keeps."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _components(metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """peft's configs by component ("transformer", "text_encoder_2"; "" for the whole file).

    diffusers packs them into one table, each name behind its component and a dot.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in _json(metadata.get("lora_adapter_metadata", "")).items():
        component, _, field = name.rpartition(".")
        found.setdefault(component, {})[field] = value
    return {component: found[component] for component in sorted(found, key=len, reverse=True)}


def _json(text: str) -> dict[str, Any]:
    try:
        table: object = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        table = {}
    return cast("dict[str, Any]", table) if isinstance(table, dict) else {}


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
