"""The names and shapes of a loaded model, by part and by module path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple, cast

from ..archs import Alias, ArchSpec, Templates, detect
from ..errors import AdapterLabError
from .base import OTHER, unwrap

# How names of a part begin: in ComfyUI's models, then in checkpoint files. ComfyUI calls a text
# encoder <name>.transformer.<path>, whatever its name.
_ROOT = re.compile(
    r"(?P<model>diffusion_model)\."
    r"|(?:text_encoders\.)?(?P<encoder>(?!text_encoders\b)\w+)\.transformer\."
    r"|(?P<clip_l>cond_stage_model|conditioner\.embedders\.0)\.transformer\."
)
_ENCODER = re.compile(r"clip|t5|llama|gemma|qwen|mistral|ministral|bert|gpt|jina|sam3|hydit")
_WRAPPED = re.compile(r"(?m)_(?:orig_mod|\w+_wrapped_module)[._]|^(?:module|model)\.")

# What transformers' classes have in front of the layers of a text encoder, or leave out.
_HEADS = (
    "model.language_model.", "language_model.model.", "language_model.", "model.", "text_model.",
    "bert.",
)  # fmt: skip


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
        self._biases: dict[str, Module] = {}
        self._underscored: dict[str, dict[str, str]] = {}
        self._alike: dict[tuple[str, str], list[str]] = {}
        self._aliases: dict[str, Templates[Alias]] = {}
        rooted = [(key, *_root(key)) for key in _unwrapped(names)]
        # Next to a diffusion model or text encoder, a name without a root is of something else.
        rest = OTHER if any(part for _, part, _ in rooted) else "model"
        for (_, part, name), key in zip(rooted, names, strict=True):
            if name.endswith(".weight"):
                modules, path = self.parts.setdefault(part or rest, {}), name[:-7]
                # What looks like a wrapper is a real name where stripping it hits another's.
                path = key[:-7] if path in modules else path
                modules[path] = Module(key, _shape(names[key]))
            elif f"{key.rpartition('.')[0]}.weight" in names:
                self._biases[f"{key.rpartition('.')[0]}.weight"] = Module(key, _shape(names[key]))
            else:
                modules = self.parts.setdefault(part or rest, {})
                modules[key if name in modules else name] = Module(key, _shape(names[key]))

    @cached_property
    def architecture(self) -> ArchSpec | None:
        """The entry that recognises these names and shapes."""
        return detect(self)

    @cached_property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders, CLIP-L first."""
        found = [part for part in self.parts if part not in ("model", OTHER)]
        return tuple(sorted(found, key=lambda part: part != "clip_l"))

    def aliases(self, spec: ArchSpec) -> Templates[Alias]:
        """Other names of the modules of this very model."""
        if spec.id not in self._aliases:
            self._aliases[spec.id] = spec.theirs_in(self)
        return self._aliases[spec.id]

    def part(self, part: str) -> Mapping[str, Module]:
        """Path -> module of one part; empty where the model has no such part."""
        return self.parts.get(part, {})

    def find(self, part: str, body: str, separator: str) -> tuple[str, ...]:
        """The paths of one part that ``body`` spells: underscored, two can be spelled alike."""
        found = self._spelled(part, body, separator)
        if found or part in ("model", OTHER):
            return found
        heads = [head.replace(".", separator) for head in _HEADS]
        bare = next((body[len(head) :] for head in heads if body.startswith(head)), body)
        for name in (bare, *(head + bare for head in heads)):
            found = self._spelled(part, name, separator)
            if found:
                return found
        return ()

    def bias(self, key: str) -> Module | None:
        """The bias beside the weight called ``key`` in the given index; None where it has none."""
        found = self._biases.get(key)
        return found if found and found.key.endswith(".bias") else None

    def underscored(self, part: str) -> Mapping[str, str]:
        """Paths of one part by their underscored spelling; of two spelled alike the last."""
        if part not in self._underscored:
            paths = self.part(part)
            table = self._underscored[part] = {path.replace(".", "_"): path for path in paths}
            for path in paths if len(table) < len(paths) else ():
                name = path.replace(".", "_")
                if table[name] != path:
                    self._alike.setdefault((part, name), []).append(path)
        return self._underscored[part]

    def _spelled(self, part: str, name: str, separator: str) -> tuple[str, ...]:
        if separator == ".":
            return (name,) if name in self.part(part) else ()
        path = self.underscored(part).get(name)
        return () if path is None else (*self._alike.get((part, name), ()), path)

    def locate(self, name: str) -> tuple[str, str, Module] | None:
        """(part, path, module) of the weight or module called ``name`` in the given index."""
        return self._keys.get(f"{name}.weight") or self._keys.get(name)

    @cached_property
    def _keys(self) -> dict[str, tuple[str, str, Module]]:
        return {
            module.key: (part, path, module)
            for part, modules in self.parts.items()
            for path, module in modules.items()
        }

    def __getitem__(self, path: str) -> tuple[int, ...]:
        return self.parts["model"][path].shape

    def __contains__(self, path: object) -> bool:
        return path in self.parts["model"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts["model"])

    def __len__(self) -> int:
        return len(self.parts["model"])


def _unwrapped(names: Mapping[str, object]) -> Iterable[str]:
    strange = [key for key in cast("Iterable[object]", names) if not isinstance(key, str)]
    if strange:
        raise AdapterLabError("A name in the model is not text", found=repr(strange[0]))
    return map(unwrap, names) if _WRAPPED.search("\n".join(names)) else names


def _root(name: str) -> tuple[str, str]:
    """(part, name below its root); the part is empty where no root is known."""
    found = _ROOT.match(name)
    if not found or not found.lastgroup:
        return "", name
    part = found.lastgroup
    if part == "encoder":
        part = found["encoder"]
        if part == "cond_stage_model":
            part = "clip_l"
        elif not _ENCODER.search(part):
            return "", name  # a module of some model that happens to be called so
    return part, name[found.end() :]


def _shape(value: object) -> tuple[int, ...]:
    if type(value) is tuple:
        return cast("tuple[int, ...]", value)
    return tuple(cast("Iterable[int]", getattr(value, "shape", value)))
