"""A key format as data: prefix, separator and suffix spellings, read and written by one table.

A key is ``<prefix><path of the module><separator><suffix>``: in
"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" the prefix is ``lora_unet_``, the suffix
``lora_up.weight``. The part before the suffix is the stem, the stem without its prefix the body.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from ..adapters.base import numbered
from ..errors import AdapterLabError
from ..registry import Registry

Parts = tuple[str, ...]
Family = Literal["own", "diffusers", "original"]

# Parts of a model: "model" is the diffusion model, others are text encoders by ComfyUI's names.
ANY_ENCODER = "*"  # whichever text encoders there are
OTHER = "other"  # by their whole name in the given index
PART = "{part}"  # in a prefix: the name of a text encoder

_LETTERS = 4  # that tell most prefixes apart
# Of these a name that "{part}" would also take.
_NO_PART = r"(?!(?:diffusion_model|text_encoders|transformer|unet|base_model|model|module)\.)"
# Left by torch.compile (in either spelling), by parallel wrappers and by whole checkpoints.
_WRAPPERS = re.compile(
    r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]"
    r"|(?:^|(?<=^base_model\.model\.))(?:module\.)?model\.(?=diffusion_model\.)|^module\."
)


class Reading(NamedTuple):
    """One meaning of a stem: the parts of a model it can be in, best first, and the body."""

    form: KeyFormat
    parts: Parts
    body: str


@dataclass(frozen=True, eq=False)
class KeyFormat:
    """How one family of tools spells keys.

    Args:
        id: registry name. title: as users know it.
        prefixes: (prefix, the parts of a model it can mean, best first), the one to write first.
        separator: between the names of a path, "." or "_".
        spellings: canonical suffix -> how this format writes it; the rest is written as it is.
            ``*`` in both stands for one name.
        reads: further spelling -> canonical suffix.
        private: its spellings hold below its own prefixes only, where they mean something else
            elsewhere.
        family: whose module names it writes. Reading takes all.
        drops: a name inside paths that stands for no module.
        like: id of the format that reads what this one writes; "" where that is itself.
        instead: canonical suffix -> id of the format that such modules are written in.
        folds: names of the algorithms of which its readers know no ``alpha``, so that the scale
            goes into the factors.
        mixed: ids of architectures of which its readers take the other family's names as well.
        loads: names of the algorithms that its own tool loads; () for all. single: only one of
            them in a file.
    """

    id: str
    title: str
    prefixes: tuple[tuple[str, Parts], ...]
    separator: Literal[".", "_"]
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])
    reads: Mapping[str, str] = field(default_factory=dict[str, str])
    private: bool = False
    family: Family = "own"
    drops: str = ""
    like: str = ""
    instead: Mapping[str, str] = field(default_factory=dict[str, str])
    folds: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    loads: tuple[str, ...] = ()
    single: bool = False

    @property
    def hint(self) -> bool:
        """Whether having its prefix says anything."""
        return all(prefix for prefix, _ in self.prefixes)

    def read(self, stem: str) -> Iterator[Reading]:
        """Everything ``stem`` can mean; nothing if it isn't of this format."""
        if self.separator == "_" and "." in stem:
            return
        for pattern in self._patterns:
            found = pattern.match(stem)
            if found:
                yield Reading(self, (found[1],), self._body(stem[found.end() :]))
        for prefix, parts in self._literal:
            if stem.startswith(prefix):
                yield Reading(self, parts, self._body(stem[len(prefix) :]))

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
        start = self.prefix(part) if prefix is None else prefix
        if start is None:
            raise AdapterLabError(f"{self.title} has no name for '{part}'", found=path)
        return f"{start}{path.replace('.', self.separator)}.{self.spell(suffix)}"

    def prefix(self, part: str) -> str | None:
        """The prefix to write for ``part``: its own, else one for any text encoder, else None."""
        any_part = part if part == "model" else ANY_ENCODER
        for wanted, end in ((part, 1), (part, None), (any_part, 1), (any_part, None)):
            for prefix, parts in self.prefixes:
                if wanted in parts[:end] and (part != ANY_ENCODER or PART not in prefix):
                    return prefix.replace(PART, part)
        return None

    def may_begin(self, letters: str) -> bool:
        """Whether a stem with these first letters can be of this format."""
        starts = (prefix.partition(PART)[0][:_LETTERS] for prefix, _ in self.prefixes)
        return any(letters.startswith(start) for start in starts)

    def spell(self, suffix: str) -> str:
        """A canonical suffix as this format writes it."""
        general = numbered(suffix)
        if general in self.spellings:
            return self.spellings[general].replace("*", suffix.rpartition(".")[2])
        return self.spellings.get(suffix, suffix)

    def _body(self, rest: str) -> str:
        body = unwrap(rest)
        return body.replace(f".{self.drops}.", ".") if self.drops else body

    @cached_property
    def _literal(self) -> list[tuple[str, Parts]]:
        return [(prefix, parts) for prefix, parts in self.prefixes if PART not in prefix]

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        group = _NO_PART + "([a-z0-9_]+)"
        templates = [prefix for prefix, _ in self.prefixes if PART in prefix]
        return [re.compile(re.escape(t).replace(r"\{part\}", group)) for t in templates]


FORMATS: Registry[KeyFormat] = Registry("key format")


@lru_cache(1)
def readers() -> tuple[KeyFormat, ...]:
    """The formats that are told apart when reading, those whose prefix proves nothing last."""
    formats = [form for form in FORMATS.values() if not form.like]
    return tuple(sorted(formats, key=lambda form: not form.hint))


def candidates(stem: str) -> tuple[KeyFormat, ...]:
    """The formats that ``stem`` may be of by its first letters; each is to be asked itself."""
    return _candidates(stem[:_LETTERS])


@lru_cache(1 << 10)
def _candidates(letters: str) -> tuple[KeyFormat, ...]:
    return tuple(form for form in readers() if form.may_begin(letters))


def guess(stems: Sequence[str]) -> KeyFormat | None:
    """The format with most prefixes among ``stems``; None where none has any."""
    hinted = [form for form in readers() if form.hint]
    seen = {form: sum(any(True for _ in form.read(stem)) for stem in stems) for form in hinted}
    first = max(hinted, key=lambda form: seen[form])
    return first if seen[first] else None


def unwrap(name: str) -> str:
    """``name`` without what wrappers around a model or around its modules put into it."""
    return _WRAPPERS.sub("", name) if "mod" in name else name
