"""The scale that peft keeps in adapter_config.json instead of in the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..errors import AdapterLabError


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
    table: Mapping[str, object] = config.get(patterns) or {}
    for pattern, special in table.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
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
