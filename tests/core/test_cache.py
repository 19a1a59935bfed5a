"""Encodings on disk: made once, made again when damaged, and used by a saved dataset."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.cache import Cache, first_bad
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.packing import Mapper
from adapter_lab.core.train.storage import (
    load_dataset,
    require_origin,
    save_dataset,
    save_folder_dataset,
)
from safetensors.torch import save_file

KEY = "0123456789abcdef"


def value(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {"latent": torch.randn(16, 64, 64, generator=rng),
            "extra": {"pooled_output": torch.randn(8, generator=rng).bfloat16(), "text": "ö"},
            "ids": torch.arange(3), "nothing": None}  # fmt: skip


def refuse():
    raise AssertionError("made a second time")


def test_made_once(tmp_path):
    first = Cache(tmp_path).get(KEY, value)
    cache = Cache(tmp_path)
    again = cache.get(KEY, refuse)
    assert (cache.hits, cache.made) == (1, 0) and cache.get(KEY, refuse) is again
    for found in (first, again):
        assert torch.equal(found["latent"], value()["latent"])
        assert torch.equal(found["extra"]["pooled_output"], value()["extra"]["pooled_output"])
        assert found["extra"]["text"] == "ö" and found["nothing"] is None
        assert found["ids"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("at", ["header", "data", "end", "empty"])
def test_damaged_entries_are_made_again(tmp_path, at):
    Cache(tmp_path).get(KEY, value)
    path = tmp_path / f"{KEY}.safetensors"
    data = bytearray(path.read_bytes())
    place = {"header": 20, "data": len(data) - 1000}.get(at)
    if place:
        data[place] ^= 0x40
    path.write_bytes({"end": data[:-10], "empty": b""}.get(at, data))
    cache = Cache(tmp_path)
    assert torch.equal(cache.get(KEY, value)["latent"], value()["latent"])
    assert cache.made == 1
    assert Cache(tmp_path).get(KEY, refuse)["extra"]["text"] == "ö"


def test_nothing_is_left_of_what_failed(tmp_path):
    with pytest.raises(AssertionError):
        Cache(tmp_path).get(KEY, refuse)
    assert not list(tmp_path.iterdir())


def test_old_entries_go(tmp_path):
    for key in ("aa", "bb", "cc"):
        Cache(tmp_path).get(key, value)
    for key in ("aa", "bb"):
        os.utime(tmp_path / f"{key}.safetensors", (0, time.time() - 40 * 24 * 3600))
    cache = Cache(tmp_path)
    cache.get("aa", refuse)
    assert cache.prune() == 1 and Cache(tmp_path).prune() == 0  # using one makes it young
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["aa", "cc"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_tensors_stay_on_disk(tmp_path):
    """Reading 400 MB takes none of the process's own memory, and writing reaches no file."""
    big = torch.zeros(100_000_000)
    save_file({"x": big, "y": torch.ones(3)}, tmp_path / "big.safetensors")
    del big
    before = _anonymous()
    found, _ = Mapper().open(tmp_path / "big.safetensors")
    assert float(found["x"].sum()) == 0 and found["y"].tolist() == [1, 1, 1]
    assert _anonymous() - before < 50e6
    found["y"][0] = 5
    assert Mapper().open(tmp_path / "big.safetensors")[0]["y"].tolist() == [1, 1, 1]


def _anonymous() -> float:
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return float(line.split()[1]) * 1e3


def test_more_files_than_can_be_mapped(tmp_path, monkeypatch):
    """Linux refuses a process its 65,531st mapping; such files are read."""

    def full(*_):
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

    Cache(tmp_path).get(KEY, value)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", full)
    assert torch.equal(Cache(tmp_path).get(KEY, refuse)["latent"], value()["latent"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux")
def test_mappings_are_left_for_others(tmp_path):
    """A dataset never takes all that a process may have: nothing could be allocated any more."""
    save_file({"x": torch.arange(20_000)}, tmp_path / "a.safetensors")
    mapper = Mapper()
    assert 1000 < mapper.left <= int(Path("/proc/sys/vm/max_map_count").read_text()) / 2
    mapper.left = 2
    found = [mapper.open(tmp_path / "a.safetensors")[0]["x"] for _ in range(4)]
    assert Path("/proc/self/maps").read_text().count("a.safetensors") == 2
    assert all(torch.equal(x, torch.arange(20_000)) for x in found)


def test_tensors_can_be_trained_on(tmp_path):
    with torch.inference_mode():
        got = Cache(tmp_path).get(KEY, value)
    weight = torch.ones(64, requires_grad=True)
    (got["latent"] * weight).sum().backward()
    assert weight.grad is not None and not got["latent"].is_inference()


def dataset(folder, captions=("a", "b")):
    cache = Cache(folder / "cache")
    items = [TrainItem(cache.get(f"{i}a", lambda i=i: value(i))["latent"],
                       cache.get("cc", value)["extra"]["pooled_output"], caption=caption)
             for i, caption in enumerate(captions)]  # fmt: skip
    return TrainDataset(items), cache.names


def test_dataset_of_a_folder(tmp_path):
    folder = tmp_path / "d"
    made, names = dataset(folder)
    save_folder_dataset(folder, made, "pictures", names)
    loaded = load_dataset(folder)
    assert loaded.fingerprint == made.fingerprint
    assert sorted(p.name for p in folder.iterdir()) == ["cache", "dataset.json"]
    changed, names = dataset(folder, ("a", "c"))
    save_folder_dataset(folder, changed, "pictures", names)
    assert [i.caption for i in load_dataset(folder)] == ["a", "c"]
    with pytest.raises(AdapterLabError, match="'pictures'.*'others'"):
        save_folder_dataset(folder, made, "others", names)


def test_other_datasets_are_not_replaced(tmp_path):
    save_dataset(tmp_path / "d", TrainDataset([TrainItem(torch.randn(4, 8, 8), None)]))
    with pytest.raises(AdapterLabError, match="put together"):
        require_origin(tmp_path / "d", "pictures")
    require_origin(tmp_path / "new", "pictures")


@pytest.mark.parametrize("name", ["cache/../../x.safetensors|latent", "cache/ff.safetensors|x"])
def test_names_that_lead_elsewhere(tmp_path, name):
    folder = tmp_path / "d"
    made, names = dataset(folder)
    save_folder_dataset(folder, made, "pictures", names)
    save_file({"latent": torch.ones(1, 2, 2)}, tmp_path / "x.safetensors")
    table = json.loads((folder / "dataset.json").read_text())
    table["items"][0]["latent"] = name
    (folder / "dataset.json").write_text(json.dumps(table))
    with pytest.raises(AdapterLabError):
        load_dataset(folder)


def test_first_bad():
    assert first_bad({"a": torch.ones(2), "b": {"c": torch.tensor([1, torch.nan])}}) == "c"
    assert first_bad(value()) is None
