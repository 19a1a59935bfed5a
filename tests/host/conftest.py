"""ComfyUI in this process, on the CPU, with folders of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMFYUI = os.environ["ADAPTER_LAB_COMFYUI"]

# ComfyUI reads its command line while it is imported.
_argv, sys.argv = sys.argv, ["main.py", "--cpu"]
sys.path.insert(0, COMFYUI)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402

sys.argv = _argv

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of architecture -> a tiny checkpoint of it, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def path(kind: str) -> Path:
        file = folder / f"{kind}.safetensors"
        return file if file.exists() else tiny.write(kind, file)

    return path


@pytest.fixture
def load(checkpoints: Callable[[str], Path]) -> Callable[[str], Any]:
    """Load a tiny model as ComfyUI's executor does: in inference mode."""

    def loader(kind: str) -> Any:
        with torch.inference_mode():
            return comfy.sd.load_diffusion_model(str(checkpoints(kind)))

    return loader


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path]) -> Callable[[str], Any]:
    """Kind -> a model, the same for all tests: what one leaves behind the next one finds."""
    loaded: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in loaded:
            with torch.inference_mode():
                loaded[kind] = comfy.sd.load_diffusion_model(str(checkpoints(kind)))
        return loaded[kind]

    return get


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> Path:
    """An output folder and one for users for each test."""
    before = folder_paths.get_output_directory(), folder_paths.get_user_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    folder_paths.set_user_directory(str(tmp_path / "user"))
    yield tmp_path / "output"
    folder_paths.set_output_directory(before[0])
    folder_paths.set_user_directory(before[1])
