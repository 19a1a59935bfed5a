"""A key format as data: prefix, separator and suffix spellings, read and written by one table.

A key is ``<prefix><path of the module><separator><suffix>``: in
"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" the prefix is ``lora_unet_``, the suffix
``lora_up.weight``. The part before the suffix is the stem, the stem without its prefix the body.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import AdapterLabError
from ..registry import Registry

Parts = tuple[str, ...]
Family = Literal["own", "diffusers"]

# Left by torch.compile (in either spelling), by parallel wrappers and by whole checkpoints.
_WRAPPERS = re.compile(r"_orig_mod[._]|^(?:module\.)?model\.(?=diffusion_model\.)|^module\.")


@dataclass(frozen=True, eq=False)
class KeyFormat:
    """How one family of tools spells keys.

    Args:
        id: registry name. title: as users know it.
        prefixes: (prefix, the parts of a model it can mean), the one to write first.
        separator: between the names of a path, "." or "_".
        spellings: canonical suffix -> how this format writes it; the rest is written as it is.
        reads: further spelling -> canonical suffix. ``*`` stands for one name.
        family: whose module names it writes. Reading takes both.
        drops: a name inside paths that stands for no module.
        hint: False for a format whose prefix alone proves nothing.
    """

    id: str
    title: str
    prefixes: tuple[tuple[str, Parts], ...]
    separator: Literal[".", "_"]
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])
    reads: Mapping[str, str] = field(default_factory=dict[str, str])
    family: Family = "own"
    drops: str = ""
    hint: bool = True

    def read(self, stem: str) -> Iterator[tuple[str, str]]:
        """(part, body) for everything ``stem`` can mean; nothing if it isn't of this format."""
        for prefix, parts in self.prefixes:
            if stem.startswith(prefix) and (self.separator == "." or "." not in stem):
                body = unwrap(stem[len(prefix) :])
                if self.drops:
                    body = body.replace(f".{self.drops}.", ".")
                for part in parts:
                    yield part, body

    def write(
        self, path: str, suffix: str, part: str = "model", *, prefix: str | None = None
    ) -> str:
        """The key of one tensor: the inverse of reading.

        Args:
            path: dotted path of the module. suffix: canonical.
            prefix: instead of the format's first one for ``part``.

        Raises:
            AdapterLabError: the format has no prefix for ``part``.
        """
        known = (known for known, parts in self.prefixes if part in parts)
        start = prefix if prefix is not None else next(known, None)
        if start is None:
            raise AdapterLabError(f"{self.title} has no name for '{part}'", found=path)
        return f"{start}{path.replace('.', self.separator)}.{self.spellings.get(suffix, suffix)}"


FORMATS: Registry[KeyFormat] = Registry("key format")


def unwrap(name: str) -> str:
    """``name`` without what wrappers around a model or around its modules put into it."""
    return _WRAPPERS.sub("", name)
