"""Adapter files that are read a tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.keys import describe
from adapter_lab.core.lazy import AdapterFile
from safetensors.torch import save_file

BIG = 2000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {"x.lora_up.weight": torch.randn(BIG, 2), "x.lora_down.weight": torch.randn(2, 9),
               "x.alpha": torch.tensor(3.0)}  # fmt: skip
    write_adapter(tmp_path / "a.safetensors", Adapter(tensors, {"k": "v"}))
    return tmp_path / "a.safetensors"


def test_is_what_read_adapter_reads(path: Path) -> None:
    (path.parent / "adapter_config.json").write_text(json.dumps({"r": 2}), "utf-8")
    whole = read_adapter(path)
    with AdapterFile(path) as file:
        assert list(file) == list(whole) and len(file) == len(whole)
        assert all(torch.equal(file[name], tensor) for name, tensor in whole.items())
        assert (file.metadata, file.config, file.name) == (whole.metadata, {"r": 2}, whole.name)
        assert file.path == str(path) and "none" not in file
        with pytest.raises(KeyError):
            file["none"]


def test_shell_has_all_shapes_and_the_values_of_small_tensors(path: Path) -> None:
    with AdapterFile(path) as file:
        shell = file.shell()
        assert shell.metadata == file.metadata and shell.name == file.name
        assert {name: (t.shape, t.dtype) for name, t in shell.items()} == {
            name: (t.shape, t.dtype) for name, t in file.items()
        }
    assert [name for name, t in shell.items() if t.is_meta] == ["x.lora_up.weight"]
    assert float(shell["x.alpha"]) == 3


def test_can_be_described_without_its_values(path: Path) -> None:
    with AdapterFile(path) as file:
        found = describe(file)
        taken = Adapter.of(file)
    whole = describe(read_adapter(path))
    assert found.to_dict() == whole.to_dict()
    assert (taken.metadata, taken.name) == (file.metadata, "a.safetensors") and len(taken) == 3


def test_nan_is_found_when_its_tensor_is_read(tmp_path: Path) -> None:
    bad = torch.ones(BIG, 2)
    bad[7, 1] = torch.nan
    save_file({"good": torch.ones(3), "bad": bad}, tmp_path / "a.safetensors")
    with AdapterFile(tmp_path / "a.safetensors") as file:
        assert torch.equal(file["good"], torch.ones(3))
        with pytest.raises(AdapterLabError, match="damaged.*NaN or infinity in 'bad'"):
            file["bad"]


def test_a_file_cut_off_while_it_is_open(path: Path) -> None:
    with AdapterFile(path) as file:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(AdapterLabError, match="cut off"):
            for name in file:
                file[name]


@pytest.mark.parametrize("spoil", [
    lambda p: p.write_bytes(b""), lambda p: p.write_text("no model"), lambda p: p.unlink(),
])  # fmt: skip
def test_what_is_no_file(path: Path, spoil: Callable[[Path], object]) -> None:
    spoil(path)
    with pytest.raises(AdapterLabError, match=r"Cannot read '.*a\.safetensors'"):
        AdapterFile(path)
