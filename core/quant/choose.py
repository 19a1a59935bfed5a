"""Which layers of a model can lose digits, and why the others can't."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ..archs import ArchSpec
from ..errors import AdapterLabError
from ..merge.bake_plan import Plan
from ..stored.layouts import PACKED
from ..train.patterns import Pattern, pattern
from .formats import Format
from .source import ROOTS, linear

_WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Numbers of a weight that is not worth it: 16 KiB less in a file of GiB, for a further kernel that
# quantises what comes in. Blocks have none so small but the gates of heads.
_SMALL = 1 << 14
# Of architectures that nobody has described: stacks of blocks that are not the model's own, and
# layers of blocks that are called by what most models keep.
_BESIDE = re.compile(
    r"adapt|audio|byt5|caption|clip|cond|connector|\bdec_|encoder|face|fusion|guidance|inject|llm|"
    r"motion|music|nerf|pool|proj|refiner|te?xt_in|token",
    re.IGNORECASE,
)
_SENSITIVE = re.compile(
    r"norm|adain|emb|(\b|_)mod(?!el|ul)|modul|adaln|time|\bt_|head|final|router|gate\b|logit|scale|"
    r"shift|table|mapper(_|$)|generator",
    re.IGNORECASE,
)
# ComfyUI tells models apart by the columns of these, the size of a U-Net's context and Stage B's
# width; packed weights have half of them.
# Reference: ComfyUI 0.30.0, ``comfy/model_detection.py``, ``calculate_transformer_depth`` and
# ``detect_unet_config``.
_READ = re.compile(r".*transformer_blocks\.0\.attn2\.to_k|down_blocks\.1\.0\.channelwise\.0")
# How files and other tools call a layer.
_SPELLED = ("{}.weight", *(f"{root}{{}}{end}" for root in ROOTS for end in ("", ".weight")))


@dataclass
class Choice:
    """What becomes of the linear layers of a diffusion model.

    Attributes:
        chosen: name of a weight in the file -> path of its layer. kept: path -> why.
        warnings: what the user should know of the choice.
    """

    chosen: dict[str, str] = field(default_factory=dict[str, str])
    kept: dict[str, str] = field(default_factory=dict[str, str])
    warnings: list[str] = field(default_factory=list[str])

    def spend(self, errors: Mapping[str, float], worst: int, most: float) -> None:
        """Take back what loses most.

        Args:
            errors: relative error of every chosen weight, by its name in the file.
            worst: how many to take back, those with the largest errors.
            most: take back all with a larger error as well; 0: whatever it is.

        Raises:
            AdapterLabError: no layer is left.
        """
        ranked = sorted(errors, key=lambda key: -errors[key])  # of equal ones the first in the file
        above = [key for key in ranked if most and errors[key] > most]
        self._keep(above, f"its error would be above {100 * most:.3g} %")
        self._keep(ranked[:worst], "one of the largest errors")
        if not self.chosen:
            raise AdapterLabError(
                "The budget leaves no layer to quantise",
                found=f"errors from {min(errors.values()):.2%} to {max(errors.values()):.2%}",
                fix="Keep fewer layers, or allow a larger error.",
            )

    def _keep(self, keys: Collection[str], why: str) -> None:
        self.kept |= {path: why for key in keys if (path := self.chosen.pop(key, ""))}


def choose(plan: Plan, form: Format, spec: ArchSpec | None, keep: Sequence[str]) -> Choice:
    """The layers that get a format.

    Args:
        plan: of the file, with what adapters do to it. spec: its architecture, if it is known.
        keep: regexes (full match on a layer's path) of layers to leave as they are.

    Raises:
        AdapterLabError: a bad regex; no layer is left.
    """
    asked = [pattern(text) for text in keep if text.strip()]
    paths = linear(plan)
    choice = Choice(warnings=[] if spec else [_UNKNOWN])
    for path, key in paths.items():
        if why := _why_kept(plan, key, path, spec, form, asked):
            choice.kept[path] = why
        else:
            choice.chosen[key] = path
    idle = [one for one in asked if not any(map(one.fullmatch, paths))]
    choice.warnings += [
        f"'{one.text}' in 'keep' matches no linear layer{_hint(one, paths)}" for one in idle
    ]
    if not choice.chosen:
        raise _nothing(plan, choice, spec)
    return choice


_ASKED = "as asked"
_OTHER_FILE = "Choose the file of a diffusion model, or say which architecture it is of."
_UNKNOWN = (
    "The architecture is not known: only layers of repeated blocks are quantised, without those "
    "whose names sound like norms, embeddings, modulation or heads"
)


def _why_kept(
    plan: Plan, key: str, path: str, spec: ArchSpec | None, form: Format, asked: Sequence[Pattern]
) -> str:
    """Why a linear layer stays as it is; empty where it need not."""
    if any(one.fullmatch(path) for one in asked):
        return _ASKED
    if why := _why_sensitive(path, spec):
        return why
    dtype, shape = plan.infos_of(key)
    if not form.fits(shape):
        return f"{' x '.join(map(str, shape))} does not fit the format"
    if math.prod(shape) < _SMALL:
        return "small"
    if form.native in PACKED and _READ.fullmatch(path):
        return "ComfyUI tells the model by its columns"
    return "" if dtype in _WIDE else f"{str(dtype).removeprefix('torch.')} is no plain weight"


def _why_sensitive(path: str, spec: ArchSpec | None) -> str:
    if spec is None:
        stack = _stack(path)
        if not stack or _BESIDE.search(stack):
            return "in none of the model's own repeated blocks"
        return "its name sounds sensitive" if _SENSITIVE.search(path) else ""
    if any(re.fullmatch(listed, path) for listed in spec.keep):
        return f"{spec.title} is sensitive to it"
    return "" if any(True for _ in spec.own.find(path)) else f"no known layer of {spec.title}"


def _stack(path: str) -> str:
    """Where the outermost repeated blocks are that a layer is in; empty where it is in none."""
    names = path.split(".")
    for end, (name, number) in enumerate(pairwise(names[:-1]), 1):
        if ("block" in name or "layer" in name) and number[-1:].isdecimal():
            return ".".join(names[:end])
    return ""


def _hint(one: Pattern, paths: Collection[str]) -> str:
    """What would match, where a name has more around it, or a part of one was given."""
    for name in _SPELLED:
        if found := next((path for path in paths if one.fullmatch(name.format(path))), ""):
            return f"; layers are called as in '{found}', without what is around it in files"
    try:
        loose = pattern(f".*(?:{one.text}).*")
    except AdapterLabError:  # "(?i)" has to stand first, and there are too long ones
        return ""
    found = next((path for path in paths if loose.fullmatch(path)), "")
    return f"; it has to match a whole path, as '.*{one.text}.*' does '{found}'" if found else ""


def _nothing(plan: Plan, choice: Choice, spec: ArchSpec | None) -> AdapterLabError:
    whys = Counter(choice.kept.values())
    most = ", ".join(why for why, _ in whys.most_common(3))
    found = f"{len(choice.kept)} linear layers, all kept ({most})"
    fixes = (
        (_ASKED, "Ask in 'keep' for fewer layers."),
        ("does not fit", "Choose another format."),
    )
    fix = next((fix for part, fix in fixes if any(part in why for why in whys)), _OTHER_FILE)
    if spec not in (None, plan.index.architecture):
        fix = "Choose the architecture that the file is of, or none."
    return AdapterLabError(
        f"'{plan.reader.path}' has no layer to quantise",
        found=found if choice.kept else "no linear layer of a diffusion model",
        fix=fix,
    )
