"""What a file has to be to be quantised: a diffusion model by ComfyUI's names, in plain numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from ..archs import ARCHITECTURES, ArchSpec
from ..errors import AdapterLabError
from ..keys.stems import read_stems
from ..merge.bake_plan import Plan
from ..merge.model_names import DIFFUSION
from ..stored import METADATA, Stored, helpers, runs
from ..streams import Reader

ROOTS = (f"model.{DIFFUSION}", DIFFUSION)
_CONTROL = re.compile(r"(control_model|controlnet_\w+|input_hint_block|zero_convs)\..+")
# What a file is -> how a name of it begins that no diffusion model has.
_OTHERS = {
    "a text encoder": re.compile(
        r"(.+\.)?(text_model\.encoder\.|encoder\.block\.0\.layer\.0\.SelfAttention\.|"
        r"transformer\.resblocks\.0\.|model\.(language_model\.)?layers\.0\.self_attn\.).+"
    ),
    "an image encoder": re.compile(r"(.+\.)?vision_(model|tower)\..+"),
    "a VAE": re.compile(
        r"((first_stage_model|vae)\.)?(encoder|decoder)\.(conv_?(in|1|out)|mid|middle|head|"
        r"(down|up)(samples|_blocks)?)\..+"
    ),
}
# Weights as nunchaku, GPTQ, quanto and torchao name them.
_FOREIGN = re.compile(r".+\.(qweight|weight\._data|_?weight[_:]qdata)")
_SHARD = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.safetensors")
_SHARE = 0.9  # of the layers, called by diffusers' names


class Quantised(AdapterLabError):
    """A file that ComfyUI runs quantised as it is.

    Attributes:
        forms: name of a weight -> the format it has.
    """

    def __init__(self, path: str, forms: Mapping[str, str]) -> None:
        key, form = next(iter(forms.items()))
        super().__init__(
            f"'{path}' is quantised already", found=f"'{key}' in {form}",
            fix="Load it as it is, or take the original file: the errors of both would add up.",
        )  # fmt: skip
        self.forms = forms


def model_keys(plan: Plan) -> set[str]:
    """The tensors of a file that are the diffusion model's."""
    inside = {place.key for name, place in plan.places.items() if name.startswith(DIFFUSION)}
    return inside or set(plan.shapes)


def linear(plan: Plan) -> dict[str, str]:
    """Path of a layer -> name in the file of its weight, of all weights that are matrices."""
    named = ((path, plan.places[module.key]) for path, module in plan.index.part("model").items())
    return {
        path: place.key for path, place in named
        if place.key.endswith(".weight") and place.rows is None and len(place.shape) == 2
    }  # fmt: skip


def settle(plan: Plan, inside: Collection[str]) -> list[tuple[str, str]]:
    """Make plain what ComfyUI can't run.

    Args:
        inside: tensors of the diffusion model; others stay as they are.

    Returns:
        (name, value) of what was to be done.

    Raises:
        Quantised: there is nothing that ComfyUI can't run.
        AdapterLabError: the file is an adapter, another part of a pipeline, one of several files
            of a model, or has diffusers' names, which ComfyUI takes weights apart and joins them
            by; a format that can't be read.
    """
    _refuse_adapter(plan.reader)
    _refuse_part(plan)
    coded = {key: how for key, how in plan.coded.items() if key in inside}
    _refuse_unread(inside, coded)
    if all(runs(plan.reader.header, how) for how in coded.values()):
        _refuse_quantised(plan, inside, coded)
    _refuse_renamed(plan)
    plan.dequantise(coded)
    if len(coded) == len(plan.coded):
        plan.metadata.pop(METADATA, None)  # ComfyUI would mark layers that it lists
    if not coded:
        return []
    first = next(iter(coded.values()))
    value = f"{len(coded)} weights in {first.title} with scales that ComfyUI does not take"
    return [("was quantised before", value)]


def _refuse_adapter(reader: Reader) -> None:
    """Its matrices could pass for layers."""
    infos = reader.header.tensors
    stems = read_stems({key: torch.empty(i.shape, device="meta") for key, i in infos.items()})
    if 2 * sum(bool(stem.tensors) for stem in stems.values()) > len(stems):
        raise AdapterLabError(
            f"'{reader.path}' is an adapter", found=f"'{next(iter(infos))}'",
            expected="a diffusion model", fix="Choose the model that it is for.",
        )  # fmt: skip


def _refuse_part(plan: Plan) -> None:
    if _SHARD.fullmatch(plan.reader.path):
        raise AdapterLabError(
            f"'{plan.reader.path}' is one part of a model", expected="the whole model in one file",
            fix="Choose the model as one file, which is what ComfyUI loads, or join its parts.",
        )  # fmt: skip
    if any(key.startswith(ROOTS) for key in plan.shapes):
        return  # a whole checkpoint
    kinds = {"a ControlNet": _CONTROL} | ({} if plan.index.architecture else _OTHERS)
    for what, marks in kinds.items():
        if marked := next((key for key in plan.shapes if marks.fullmatch(key)), ""):
            raise AdapterLabError(
                f"'{plan.reader.path}' is {what}", found=f"'{marked}'",
                expected="a diffusion model", fix="Choose a file of models/diffusion_models.",
            )  # fmt: skip


def _refuse_unread(inside: Collection[str], coded: dict[str, Stored]) -> None:
    found = [f"'{key}' is stored in {how.title}" for key, how in coded.items() if not how.known]
    foreign = sorted(filter(_FOREIGN.fullmatch, inside))
    found += [f"'{key}' is stored as another tool has it" for key in foreign]
    if found:
        raise AdapterLabError(
            f"{found[0]}, which can't be read",
            fix="Take the original file, or load this one with what it was made for.",
        )


def _refuse_quantised(plan: Plan, inside: Collection[str], coded: dict[str, Stored]) -> None:
    header = plan.reader.header
    forms = {key: how.title for key, how in coded.items()}
    known = helpers(header) | coded.keys()
    forms |= {
        key: info.dtype for key, info in header.tensors.items()
        if info.dtype.startswith("F8_") and len(info.shape) > 1
        and key in inside and key not in known
    }  # fmt: skip
    if forms:
        raise Quantised(plan.reader.path, forms)


def _refuse_renamed(plan: Plan) -> None:
    if plan.index.architecture is not None:
        return
    paths = linear(plan).keys()
    if spec := _renamed(paths):
        raise AdapterLabError(
            f"'{plan.reader.path}' has diffusers' names of the layers of {spec.title}",
            found=f"'{next(iter(paths))}'", expected="ComfyUI's names",
            fix="Take the file that ComfyUI's templates link to, or load this one with Load "
            "Diffusion Model, save it with ModelSave and quantise what that wrote.",
        )  # fmt: skip


def _renamed(paths: Collection[str]) -> ArchSpec | None:
    """The architecture whose layers diffusers calls by these names."""
    models = (spec for spec in ARCHITECTURES.values() if "model" in spec.parts)
    able = [spec for spec in models if _count(spec, paths) >= _SHARE * len(paths) > 0]
    # Of two that have all of the names the one that has fewer others.
    ranked = sorted(able, key=lambda spec: (-sum(map(spec.names, paths)), len(spec.aliases)))
    return next(iter(ranked), None)


def _count(spec: ArchSpec, paths: Collection[str]) -> int:
    """How many of ``paths`` only diffusers calls so."""
    return sum(
        any(alias.family == "diffusers" and alias.own != alias.theirs for alias, _ in found)
        for found in map(spec.theirs.find, paths)
    )
