"""Files appear whole or not at all: failures, limits, full disks, concurrent readers."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from adapter_lab.core import atomic
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter, write_adapter, write_stream
from safetensors.torch import load_file

TENSORS = {"up": torch.arange(6.0).reshape(3, 2), "alpha": torch.tensor(2.0)}
INFOS = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, AdapterLabError])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_halfway_leaves_no_trace(error, existing, tmp_path):
    path = tmp_path / "a.safetensors"
    if existing:
        path.write_bytes(b"precious")

    def failing():
        yield "alpha", TENSORS["alpha"]
        raise error("from outside")

    with pytest.raises(error) as caught:
        write_stream(path, INFOS, failing())
    assert str(caught.value).rstrip(".") == "from outside"  # not mistaken for one of writing
    assert leftovers(tmp_path) == ["a.safetensors"] * existing
    assert not existing or path.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_no_trace(name, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")

    def fail(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(atomic.os, name, fail)
    with pytest.raises(AdapterLabError, match=r"a\.safetensors': Permission denied\. Check"):
        write_adapter(path, TENSORS)
    assert leftovers(tmp_path) == ["a.safetensors"] and path.read_bytes() == b"precious"


def test_where_it_writes(tmp_path):
    path = tmp_path / "new" / "deep" / "a.safetensors"
    write_adapter(path, TENSORS, overwrite=False)
    with pytest.raises(AdapterLabError, match="exists already"):
        write_adapter(path, {}, overwrite=False)
    assert equal(load_file(path), TENSORS)
    (tmp_path / "link.safetensors").symlink_to(path)
    write_adapter(tmp_path / "link.safetensors", {"a": torch.ones(1)})
    assert list(load_file(path)) == ["a"] and (tmp_path / "link.safetensors").is_symlink()
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(AdapterLabError, match="it is a folder"):
        write_adapter(tmp_path, TENSORS)
    with pytest.raises(AdapterLabError, match="Not a directory|File exists"):
        write_adapter(path / "below.safetensors", TENSORS)


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path, stop, seen = tmp_path / "a.safetensors", threading.Event(), set()
    write_adapter(path, {"a": torch.zeros(50_000)})

    def read():
        while not stop.is_set():
            values = read_adapter(path)["a"].unique()
            seen.add(tuple(values.tolist()))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_adapter(path, {"a": torch.full((50_000,), float(i))})
    stop.set()
    reader.join()
    assert len(seen) > 1 and all(len(values) == 1 for values in seen)
    assert leftovers(tmp_path) == ["a.safetensors"]


def test_a_limit_on_file_sizes(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        with pytest.raises(AdapterLabError, match=r"a\.safetensors': File too large\. The file"):
            write_adapter(path, {"a": torch.ones(10_000), "b": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert leftovers(tmp_path) == ["a.safetensors"] and path.read_bytes() == b"precious"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where the machine lets us mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk(known, small_disk, monkeypatch):
    if not known:  # another program fills it meanwhile
        usage = namedtuple("usage", "total used free")(1 << 40, 0, 1 << 40)
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    path = small_disk / "a.safetensors"
    write_adapter(path, TENSORS)
    says = r"full: found 1\.0 MB free, expected 2\.0 MB" if known else "No space left on device"
    with pytest.raises(AdapterLabError, match=rf"a\.safetensors.*{says}.* Free some space"):
        write_adapter(path, {"a": torch.ones(500_000)})
    assert leftovers(small_disk) == ["a.safetensors"] and equal(load_file(path), TENSORS)
