"""Model and text encoder files, chosen from a menu or given by another node."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...core.errors import AdapterLabError
from . import paths

_ENCODERS = "text_encoders"


def listed() -> list[str]:
    """Model files, then text encoders as their folder and name."""
    encoders = folder_paths.get_filename_list(_ENCODERS)
    return [*paths.model_files(), *(f"{_ENCODERS}/{name}" for name in encoders)]


def kind(name: str) -> str:
    """Which of :data:`paths.MODEL_KINDS` a file is of, by its name or full path.

    Raises:
        AdapterLabError: of none of them, or no such file.
    """
    if not Path(name).is_absolute():
        return paths.model_kind(name)
    path = find(name)
    for one in paths.MODEL_KINDS:
        if any(path.is_relative_to(Path(root).resolve()) for root in _roots(one)):
            return one
    raise AdapterLabError(
        f"'{name}' is no model file", expected=f"a file of {' or '.join(paths.MODEL_KINDS)}"
    )


def find(name: str) -> Path:
    """Full path of a listed file, or of one that is given by its full path.

    Raises:
        AdapterLabError: there is none, or it lies outside of ComfyUI's folders, links followed.
    """
    folder, _, rest = name.replace("\\", "/").partition("/")
    found = folder_paths.get_full_path(_ENCODERS, rest) if folder == _ENCODERS else None
    if found is not None:
        return Path(found)
    if not Path(name).is_absolute():
        return paths.model_path(name)
    roots = [root for one in (*paths.MODEL_KINDS, _ENCODERS) for root in _roots(one)]
    path = Path(name).resolve()
    if not any(path.is_relative_to(Path(root).resolve()) for root in (*roots, paths.output())):
        raise AdapterLabError(
            f"'{name}' lies outside of ComfyUI's folders",
            expected="a file in models/diffusion_models, checkpoints, text_encoders or output",
        )
    if not path.is_file():
        raise AdapterLabError(f"There is no model file '{name}'", fix="Choose another")
    return path


def _roots(kind: str) -> list[str]:
    return folder_paths.get_folder_paths(kind)
