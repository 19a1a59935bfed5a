"""Which modules to train: a preset of the architecture, narrowed by regular expressions.

Full paths are ComfyUI's, "diffusion_model.double_blocks.0.img_attn.qkv" or
"clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"; patterns are matched against what
:func:`pattern_name` makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..archs import ArchSpec, wildcard
from ..checks import require_choice
from ..errors import AdapterLabError
from ..keys import blocks as weights
from .patterns import pattern

PRESETS = {
    "default": "the blocks, without what the architecture leaves out by default",
    "all blocks": "every linear and convolution inside the blocks",
    "everything": "every linear and convolution of the model",
    "attention only": "the attention of the blocks, without layers that hold more than that",
    "MLP only": "the feed-forward layers of the blocks",
}
TRAIN = ("model", "text encoder", "both")
DIFFUSION = "diffusion_model."

Shape = tuple[int, ...]
_ROLES = {"attention only": "attention", "MLP only": "mlp"}  # preset -> group of block weights
_WHOLE = ("all blocks", "everything")
_RANGE = re.compile(r"(?:(?P<path>.+)\.)?(?P<first>\d+)(?:\s*-\s*(?P<last>\d+))?")
# Text encoders of any kind: towers for other than text, and what counts their layers.
_TOWER = re.compile(
    r"(?:.*\.)?(?:visual|vision\w*|image\w*|audio\w*|multi_modal\w*|lm_head)(?:\..*)?"
)
_LAYER = re.compile(r"(.*?\.(?:layers?|block)\.\d+)\..*")
_ATTENTION = re.compile(r"(?i).*attn.*|.*attention.*")


def pattern_name(path: str) -> str:
    """What patterns are matched against: the name inside the diffusion model, a text encoder's
    full path."""
    return path.removeprefix(DIFFUSION)


def file_stem(path: str) -> str:
    """What a trained module is called in a file, as ComfyUI's own loader knows it."""
    return path if in_model(path) else f"text_encoders.{path}"


def layer_of(path: str) -> str:
    """The repeated layer of a text encoder that has the module ``path``, "" where none has."""
    found = _LAYER.fullmatch(path)
    return found[1] if found and not _TOWER.fullmatch(path) else ""


def in_model(path: str) -> bool:
    """Whether a full path is of the diffusion model, and not of a text encoder."""
    return path.startswith(DIFFUSION)


@dataclass(frozen=True)
class Targets:
    """A choice of modules.

    A module of the preset is skipped if one of ``exclude`` matches its whole name and none of
    ``include`` does (musubi-tuner's rule), so ``exclude=(".*",)`` with an ``include`` trains the
    included ones only.

    Args:
        preset: a key of ``PRESETS``.
        exclude, include: regular expressions, full match on :func:`pattern_name`.
        default_excludes: whether the architecture's own excludes count, in the presets other than
            "all blocks" and "everything". One that contradicts the preset does not.
        convolutions: whether to train them. norms: whether to train the weights of norms too.
        blocks: "0-11, single_blocks.3": those blocks of the diffusion model alone; a number by
            itself is that of a block in its own stack. Empty: all.
        train: one of ``TRAIN``.

    Raises:
        AdapterLabError: an unknown preset, a pattern or a range of blocks that is none.
    """

    preset: str = "default"
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    default_excludes: bool = True
    convolutions: bool = True
    norms: bool = False
    blocks: str = ""
    train: str = "model"

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS)
        require_choice("train", self.train, TRAIN)
        for text in (*self.exclude, *self.include):
            pattern(text)
        _block_choices(self.blocks)

    def choose(self, layers: Mapping[str, Shape], arch: ArchSpec | None) -> list[str]:
        """The chosen ones of ``layers`` (full path -> shape of its weight), in their order.

        Raises:
            AdapterLabError: nothing is left.
        """
        pool = self.pool(layers, arch)
        usual = self._excludes(layers, pool, arch)

        def excludes(path: str) -> tuple[str, ...]:
            # Of norms "norm" would leave nothing.
            return usual if in_model(path) and len(layers[path]) > 1 else ()

        chosen = [
            path
            for path in pool
            if _matches(self.include, path) or not _matches((*self.exclude, *excludes(path)), path)
        ]
        if not chosen:
            raise self._nothing(layers, pool)
        return chosen

    def pool(self, layers: Mapping[str, Shape], arch: ArchSpec | None) -> list[str]:
        """What the patterns choose from: the preset, by kind of layer and by block."""
        takes = {True: self._takes_model(arch), False: self._takes_encoder()}
        return [
            path
            for path, shape in layers.items()
            if self._takes_shape(shape) and takes[in_model(path)](pattern_name(path))
        ]

    def left_out(self, layers: Mapping[str, Shape], arch: ArchSpec | None) -> dict[str, int]:
        """Default exclude -> how many modules it leaves out that would be chosen without it."""
        pool = self.pool(layers, arch)
        own = (*self.exclude, *self.include)  # what includes keep is not left out either
        excludable = [
            path
            for path in pool
            if in_model(path) and len(layers[path]) > 1 and not _matches(own, path)
        ]
        counts = {
            text: sum(_matches((text,), path) for path in excludable)
            for text in self._excludes(layers, pool, arch)
        }
        return {text: count for text, count in counts.items() if count}

    def idle(self, layers: Iterable[str]) -> list[str]:
        """The patterns and blocks that match none of ``layers``, full paths or names."""
        names = [pattern_name(path) for path in layers]
        texts = (*self.exclude, *self.include)
        idle = [text for text in texts if not any(map(pattern(text).fullmatch, names))]
        choices = _block_choices(self.blocks) if self.train != "text encoder" else {}
        return idle + [text for text, hits in choices.items() if not any(map(hits, names))]

    def _takes_shape(self, shape: Shape) -> bool:
        return self.norms if len(shape) == 1 else self.convolutions or len(shape) == 2

    def _takes_model(self, arch: ArchSpec | None) -> Callable[[str], bool]:
        if self.train == "text encoder":
            return lambda name: False
        tests: list[Callable[[str], object]] = []
        if arch is not None and (self.preset != "everything" or self.blocks):
            also = arch.also if self.preset == "default" and not self.blocks else ()
            inside = "|".join((*(rf"(?:{block})\..+" for block in arch.blocks), *also))
            tests.append(re.compile(inside).fullmatch)
        if self.preset in _ROLES:
            tests.append(_hits(f"@{_ROLES[self.preset]}", arch))
        if choices := _block_choices(self.blocks):
            tests.append(lambda name: any(hits(name) for hits in choices.values()))
        return lambda name: all(test(name) for test in tests)

    def _takes_encoder(self) -> Callable[[str], bool]:
        if self.train == "model":
            return lambda name: False
        wanted = {"attention only": True, "MLP only": False}.get(self.preset)

        def takes(name: str) -> bool:
            role = wanted is None or wanted == bool(_ATTENTION.fullmatch(name))
            layer = self.preset == "everything" or bool(_LAYER.fullmatch(name))
            return role and layer and not _TOWER.fullmatch(name)

        return takes

    def _excludes(
        self, layers: Mapping[str, Shape], pool: Iterable[str], arch: ArchSpec | None
    ) -> tuple[str, ...]:
        """The default excludes that count."""
        if arch is None or not self.default_excludes or self.preset in _WHOLE:
            return ()
        if self.preset not in _ROLES:
            return arch.excludes
        inside = [path for path in pool if in_model(path) and len(layers[path]) > 1]
        return tuple(e for e in arch.excludes if not all(_matches((e,), path) for path in inside))

    def _nothing(self, layers: Mapping[str, Shape], pool: list[str]) -> AdapterLabError:
        encoder = [path for path in layers if not in_model(path)]
        if self.train == "text encoder" and not encoder:
            return AdapterLabError(
                "No module is left to train",
                found="a text encoder without layers that this model depends on",
                fix="Set 'train' to model, or connect the text encoder of this model",
            )
        known = encoder if self.train == "text encoder" else layers
        names = map(pattern_name, pool or known)
        found = f"{len(pool)} modules in preset '{self.preset}', all excluded"
        if not pool:
            found = f"no module in preset '{self.preset}' of {len(known)} layers"
            found += f" in blocks '{self.blocks}'" if self.blocks else ""
        return AdapterLabError(
            "No module is left to train",
            found=found,
            expected="at least one",
            fix=f"Patterns must match whole names such as '{next(iter(names), '...')}'",
        )


def _matches(texts: Iterable[str], path: str) -> bool:
    return any(pattern(text).fullmatch(pattern_name(path)) for text in texts)


def _hits(glob: str, arch: ArchSpec | None) -> Callable[[str], bool]:
    """Whether block weights under ``glob`` hit a name; those of the general groups for an
    architecture that is not known."""
    found = weights.parse(f"{glob} = 0", arch)
    return lambda name: found.weight_of(name) == 0


def _block_choices(text: str) -> dict[str, Callable[[str], bool]]:
    """Each item of "0-11, single_blocks.3, middle_block" -> the test of a name."""
    items = [item.strip() for item in re.split(r"[,\n]", text)]
    return {item: _block_choice(item) for item in items if item}


def _block_choice(item: str) -> Callable[[str], bool]:
    found = _RANGE.fullmatch(item)
    if not found:
        if "*" in item or not re.fullmatch(r"[\w.]+", item):
            raise _no_blocks(item)
        return _hits(item, None)
    first, last = int(found["first"]), int(found["last"] or found["first"])
    if not first <= last <= 9999:
        raise _no_blocks(item)
    if found["path"]:
        return _hits(f"{found['path']}.{{{first}-{last}}}", None)

    def counted(name: str) -> bool:
        numbers = wildcard(name)[1]
        return bool(numbers) and first <= int(numbers[0]) <= last

    return counted


def _no_blocks(item: str) -> AdapterLabError:
    return AdapterLabError(
        "These blocks are not understood",
        found=f"'{item}'",
        expected="numbers and names such as '0-11' or 'double_blocks.0-5, single_blocks.3'",
    )
