"""The names and shapes of a loaded model, by part and by module path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, cast

from ..errors import AdapterLabError
from .base import unwrap

# How names of a part begin: in ComfyUI's models, then in checkpoint files.
ROOTS = (
    ("diffusion_model.", "model"),
    ("clip_l.transformer.", "clip_l"),
    ("clip_g.transformer.", "clip_g"),
    ("cond_stage_model.transformer.", "clip_l"),
    ("conditioner.embedders.0.transformer.", "clip_l"),
)


class Module(NamedTuple):
    """Where a module's weight is: its name in the given index, and its shape."""

    key: str
    shape: tuple[int, ...]


class ModelIndex(Mapping[str, tuple[int, ...]]):
    """What a model calls its weights: built from a state dict, or any name -> tensor or shape.

    Names may carry ComfyUI's prefixes (``diffusion_model.``, ``clip_l.transformer.``), a
    checkpoint's, or none at all. As a mapping it is path -> weight shape of the diffusion model,
    or of the only part there is; ``index.part("clip_l")`` gives another part.
    A path is a module's name ("double_blocks.0.img_attn.qkv"), or a parameter's own where its
    module has no weight ("blocks.0.modulation").
    """

    def __init__(self, names: Mapping[str, object]) -> None:
        self.parts: dict[str, dict[str, Module]] = {"model": {}}
        self._underscored: dict[str, dict[str, list[str]]] = {}
        self._keys: dict[str, tuple[str, str, Module]] | None = None
        rooted = [(key, *_root(key)) for key in names]
        # Next to a diffusion model or text encoder, a name without a root is of something else.
        rest = "other" if any(part for _, part, _ in rooted) else "model"
        for key, part, name in rooted:
            path = name.removesuffix(".weight")
            if path != name or f"{key.rpartition('.')[0]}.weight" not in names:
                modules = self.parts.setdefault(part or rest, {})
                # What looks like a wrapper is a real name where stripping it hits another's.
                path = key.removesuffix(".weight") if path in modules else path
                modules[path] = Module(key, _shape(names[key]))

    def part(self, part: str) -> Mapping[str, Module]:
        """Path -> module of one part; empty where the model has no such part."""
        return self.parts.get(part, {})

    def underscored(self, part: str) -> Mapping[str, list[str]]:
        """Paths of one part by their underscored spelling; two under one name is a collision."""
        if part not in self._underscored:
            table = self._underscored[part] = {}
            for path in self.part(part):
                table.setdefault(path.replace(".", "_"), []).append(path)
        return self._underscored[part]

    def locate(self, name: str) -> tuple[str, str, Module] | None:
        """(part, path, module) of the weight or module called ``name`` in the given index."""
        if self._keys is None:
            self._keys = {
                module.key: (part, path, module)
                for part, modules in self.parts.items()
                for path, module in modules.items()
            }
        return self._keys.get(f"{name}.weight") or self._keys.get(name)

    def __getitem__(self, path: str) -> tuple[int, ...]:
        return self.parts["model"][path].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts["model"])

    def __len__(self) -> int:
        return len(self.parts["model"])


def _root(key: object) -> tuple[str, str]:
    """(part, name below its root); the part is empty where no root is known."""
    if not isinstance(key, str):
        raise AdapterLabError("A name in the model is not text", found=repr(key))
    name = unwrap(key)
    for root, part in ROOTS:
        if name.startswith(root):
            return part, name[len(root) :]
    return "", name


def _shape(value: object) -> tuple[int, ...]:
    return tuple(cast("Iterable[int]", getattr(value, "shape", value)))
