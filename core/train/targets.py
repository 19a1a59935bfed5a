"""Which modules to train: a preset of the architecture, narrowed by regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..archs import ArchSpec
from ..errors import AdapterLabError

PRESETS = {
    "default": "the blocks, without what the architecture leaves out by default",
    "all blocks": "every linear and convolution inside the blocks",
    "everything": "every linear and convolution of the model",
}


@dataclass(frozen=True)
class Targets:
    """A choice of modules.

    A module of the preset is skipped if one of ``exclude`` matches its whole name and none of
    ``include`` does (musubi-tuner's rule), so ``exclude=(".*",)`` with an ``include`` trains the
    included ones only.

    Args:
        preset: a key of ``PRESETS``.
        exclude, include: regular expressions over names inside the diffusion model
            ("double_blocks.0.img_attn.qkv").
    """

    preset: str = "default"
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise AdapterLabError(
                f"Unknown preset '{self.preset}'", expected=f"one of {', '.join(PRESETS)}"
            )
        for pattern in (*self.exclude, *self.include):
            _compile(pattern)

    def idle(self, names: Iterable[str]) -> list[str]:
        """The patterns that match none of ``names``."""
        names = list(names)
        patterns = [*self.exclude, *self.include]
        return [p for p in patterns if not any(_compile(p).fullmatch(name) for name in names)]

    def select(self, names: Iterable[str], arch: ArchSpec | None) -> list[str]:
        """The chosen ones of ``names``, in their order.

        Raises:
            AdapterLabError: nothing is left.
        """
        names = list(names)
        excludes = [_compile(p) for p in self.exclude]
        if arch is not None and self.preset == "default":
            excludes += [_compile(p) for p in arch.excludes]
        includes = [_compile(p) for p in self.include]
        if arch is not None and self.preset != "everything":
            blocks = [_compile(rf"(?:{block})\..+") for block in arch.blocks]
            pool = [name for name in names if any(b.fullmatch(name) for b in blocks)]
        else:
            pool = names
        chosen = [
            name
            for name in pool
            if not any(p.fullmatch(name) for p in excludes)
            or any(p.fullmatch(name) for p in includes)
        ]
        if not chosen:
            raise AdapterLabError(
                "No module is left to train",
                found=f"{len(pool)} modules in preset '{self.preset}', all excluded",
                expected="at least one",
                fix=f"Patterns must match whole names such as '{names[0] if names else '...'}'",
            )
        return chosen


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as err:
        raise AdapterLabError(
            f"The pattern '{pattern}' is not a regular expression", found=str(err)
        ) from None
