"""Files of tensors whose sizes are known only when the last one is made."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapter_lab.core import spool
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter, write_adapter
from adapter_lab.core.spool import write_spooled
from torch import Tensor

TENSORS = {
    "b": torch.randn(3, 5), "a": torch.randn(4).bfloat16(), "alpha": torch.tensor(2.0),
    "view": torch.randn(6, 4).T, "none": torch.zeros(0, 3), "count": torch.tensor([1, 2]),
}  # fmt: skip


def test_is_the_file_that_write_adapter_writes(tmp_path: Path) -> None:
    told = write_spooled(tmp_path / "a.safetensors", TENSORS.items(), {"k": "v"})
    whole = dict(TENSORS)
    adapter = read_adapter(tmp_path / "a.safetensors")
    for name, tensor in whole.items():
        assert adapter[name].dtype == tensor.dtype and torch.equal(adapter[name], tensor)
    direct = write_adapter(tmp_path / "b.safetensors", whole)
    assert told["sshs_model_hash"] == direct["sshs_model_hash"]
    assert adapter.metadata == told and told["k"] == "v"


def test_metadata_may_be_filled_in_by_the_last_tensor(tmp_path: Path) -> None:
    metadata: dict[str, str] = {}

    def make() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(3)
        metadata["rank"] = "3"

    assert write_spooled(tmp_path / "a.safetensors", make(), metadata)["rank"] == "3"


def test_one_tensor_lives_at_a_time(tmp_path: Path) -> None:
    living: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def make() -> Iterator[tuple[str, Tensor]]:
        for name in "abcdef":
            alive.append(sum(ref() is not None for ref in living))
            tensor = torch.ones(1000)
            living.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    gc.disable()
    write_spooled(tmp_path / "a.safetensors", make())
    gc.enable()
    assert alive == [0] * 6


def test_a_file_that_is_there_stays_unless_asked(tmp_path: Path) -> None:
    path, made = tmp_path / "a.safetensors", []
    path.write_bytes(b"mine")

    def make() -> Iterator[tuple[str, Tensor]]:
        made.append(1)
        yield "a", torch.ones(3)

    with pytest.raises(AdapterLabError, match="exists already"):
        write_spooled(path, make())
    assert path.read_bytes() == b"mine" and not made, "the work was done in vain"
    write_spooled(path, make(), overwrite=True)
    assert torch.equal(read_adapter(path)["a"], torch.ones(3))


@pytest.mark.parametrize("error", [AdapterLabError("stopped"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"mine")

    def make() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(3)
        raise error

    with pytest.raises(type(error)):
        write_spooled(path, make(), overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == b"mine"


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool, "write_all", full)
    with pytest.raises(AdapterLabError, match=r"Cannot write '.*': No space left.*Free some space"):
        write_spooled(tmp_path / "a.safetensors", TENSORS.items())
    assert not list(tmp_path.iterdir())


def test_two_of_a_name_are_refused(tmp_path: Path) -> None:
    twice = [("a", torch.ones(1)), ("a", torch.zeros(1))]
    with pytest.raises(AdapterLabError, match="'a' came twice"):
        write_spooled(tmp_path / "a.safetensors", twice)
