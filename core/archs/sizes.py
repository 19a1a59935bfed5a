"""Sizes of published models, which tell apart architectures that call their layers alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from .base import Alias, ArchSpec

Shape = Callable[[str], tuple[int, ...]]  # name of a module in a file -> shape of its delta
Size = tuple[int, int]  # (out, in), 0: any


@dataclass(frozen=True)
class Sizes:
    """Some sizes of one published model.

    Args:
        hidden: the unit of ``Alias.rows``.
        shapes: regex (full match on a module path) -> size of its weight.
        blocks: what stands before the number of a block -> how many there are.
    """

    hidden: int
    shapes: Mapping[str, Size]
    blocks: Mapping[str, int] = field(default_factory=dict[str, int])

    def ratios(self, path: str, alias: Alias | None, shape: tuple[int, ...]) -> set[Fraction]:
        """What the sizes of a delta are to those of the module of this path, as far as known.

        Args:
            alias: what of the module's rows the delta is for; None for all.
        """
        known = (size for pattern, size in self.shapes.items() if re.fullmatch(pattern, path))
        rows, columns = next(known, (0, 0))
        if alias and rows:
            rows = alias.span(rows, self.hidden)[1]
        # One, or one axis alone, is what an algorithm says that does not know the size.
        pairs = zip(shape, (rows, columns), strict=False) if len(shape) > 1 else ()
        return {Fraction(a, b) for a, b in pairs if a > 1 and b}


def evidence(spec: ArchSpec, names: Iterable[str], shape: Shape) -> int:
    """How well a file's modules fit the sizes of a published model of ``spec``.

    0: nothing is known or something contradicts, 1: all fits a model of another width, 2: of that
    very width, 3: and each stack of blocks that the file has is complete.
    """
    found = [(*place, shape(name)) for name in names if (place := _find(spec, name))]
    return max((_grade(one, found) for one in SIZES.get(spec.id, ())), default=0)


def _find(spec: ArchSpec, name: str) -> tuple[str, Alias | None] | None:
    for template, numbers in spec.own.find(name):
        return template.format(*numbers), None
    for alias, numbers in spec.theirs.find(name):
        return alias.own.format(*numbers), alias
    return None


def _grade(sizes: Sizes, found: list[tuple[str, Alias | None, tuple[int, ...]]]) -> int:
    ratios: set[Fraction] = set()
    ratios.update(*(sizes.ratios(*place) for place in found))
    if len(ratios) != 1:
        return 0
    seen: dict[str, set[int]] = {}
    for path, _, _ in found:
        for stack in sizes.blocks:
            number = path[len(stack) :].partition(".")[0]
            if path.startswith(stack) and number.isdecimal():
                seen.setdefault(stack, set()).add(int(number))
    if ratios != {Fraction(1)}:
        return 1
    if any(max(numbers) >= sizes.blocks[stack] for stack, numbers in seen.items()):
        return 0
    complete = all(len(numbers) == sizes.blocks[stack] for stack, numbers in seen.items())
    return 3 if seen and complete else 2


def _streams(hidden: int, double: int = 0, single: int = 0, mlp: int = 4, gates: int = 1) -> Sizes:
    """FLUX' kind; ``gates``: 2 where half of the MLP's rows gate the other."""
    wide, blocks = mlp * hidden, {"double_blocks.": double, "single_blocks.": single}
    return Sizes(
        hidden,
        {
            r"double_blocks\.\d+\.\w+_attn\.qkv": (3 * hidden, hidden),
            r"double_blocks\.\d+\.\w+_attn\.proj": (hidden, hidden),
            r"double_blocks\.\d+\.\w+_mlp\.0": (gates * wide, hidden),
            r"double_blocks\.\d+\.\w+_mlp\.(2|down_proj)": (hidden, wide),
            r"double_blocks\.\d+\.\w+_mod\.lin": (6 * hidden, hidden),
            r"single_blocks\.\d+\.linear1": (3 * hidden + gates * wide, hidden),
            r"single_blocks\.\d+\.linear2": (hidden, hidden + wide),
            r"single_blocks\.\d+\.modulation\.lin": (3 * hidden, hidden),
        },
        {stack: count for stack, count in blocks.items() if count},
    )


def _joint(hidden: int, blocks: int) -> Sizes:
    block = r"joint_blocks\.\d+\.\w+\."
    return Sizes(
        hidden,
        {
            block + r"attn2?\.qkv": (3 * hidden, hidden),
            block + r"attn2?\.proj": (hidden, hidden),
            block + r"mlp\.fc1": (4 * hidden, hidden),
            block + r"mlp\.fc2": (hidden, 4 * hidden),
        },
        {"joint_blocks.": blocks},
    )


def _next_dit(hidden: int, qkv: int, mlp: int, blocks: int = 0) -> Sizes:
    """One stream after Lumina."""
    return Sizes(
        hidden,
        {
            r".*\.attention\.qkv": (qkv, hidden),
            r".*\.(attention|attn)\.(o|out|to_q|to_out\.0)": (hidden, hidden),
            r".*\.feed_forward\.(w|linear_)[13]": (mlp, hidden),
            r".*\.feed_forward\.(w|linear_)2": (hidden, mlp),
        },
        {"layers.": blocks} if blocks else {},
    )


def _cosmos(hidden: int, blocks: int) -> Sizes:
    return Sizes(
        hidden,
        {
            r"blocks\.\d+\.\w+_attn\.(q|output)_proj": (hidden, hidden),
            r"blocks\.\d+\.self_attn\.[kv]_proj": (hidden, hidden),
            r"blocks\.\d+\.mlp\.layer1": (4 * hidden, hidden),
            r"blocks\.block\d+\.blocks\.[01]\.block\.attn\.to_(q|out)\.0": (hidden, hidden),
            r"blocks\.block\d+\.blocks\.0\.block\.attn\.to_[kv]\.0": (hidden, hidden),
            r"blocks\.block\d+\.blocks\.2\.block\.layer1": (4 * hidden, hidden),
        },
        {"blocks.": blocks, "blocks.block": blocks},
    )


def _ltx(hidden: int, blocks: int) -> Sizes:
    block = r"transformer_blocks\.\d+\."
    return Sizes(
        hidden,
        {
            block + r"attn[12]\.to_(q|k|v|out\.0)": (hidden, hidden),
            block + r"ff\.net\.0\.proj": (4 * hidden, hidden),
            block + r"ff\.net\.2": (hidden, 4 * hidden),
        },
        {"transformer_blocks.": blocks},
    )


def _unet(context: int) -> Sizes:
    """``context``: width of the text encoder's states."""
    return Sizes(0, {r".*\.attn2\.to_[kv]": (0, context)})


SIZES: Mapping[str, tuple[Sizes, ...]] = {
    "flux": (_streams(3072, 19, 38),),
    "longcat_image": (_streams(3072, 10, 20),),
    "ovis_image": (_streams(3072, 6, 27, 4, 2),),
    "chroma": (_streams(3072, 19, 38),),
    "flux2": (
        _streams(6144, 8, 48, 3, 2),  # dev
        _streams(3072, 5, 20, 3, 2),  # klein 4B
        _streams(4096, 8, 24, 3, 2),  # klein 9B
    ),
    "hunyuan_video": (_streams(3072, 20, 40),),
    "hunyuan_video_15": (_streams(2048, 54),),
    "hunyuan_image": (_streams(3584, 20, 40), _streams(3328)),  # the second one refines
    "sd3": (_joint(1536, 24), _joint(2432, 38)),
    "z_image": (_next_dit(3840, 3 * 3840, 10240, 30),),
    "ideogram4": (_next_dit(4608, 3 * 4608, 12288),),
    "lumina2": (_next_dit(2304, 3840, 9216, 26),),
    "omnigen2": (_next_dit(2520, 0, 10240),),
    "anima": (_cosmos(2048, 28),),
    "cosmos_predict2": (_cosmos(2048, 28), _cosmos(5120, 36)),
    "cosmos": (_cosmos(4096, 28), _cosmos(5120, 36)),
    "ltxv": (_ltx(2048, 28), _ltx(4096, 48)),
    "ltx2": (_ltx(4096, 48),),
    "sd15": (_unet(768),),
    "sd2": (_unet(1024),),
    "sdxl": (_unet(2048),),
}
