"""Batches of an epoch, and datasets on disk."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.random import generator
from adapter_lab.core.train.storage import load_dataset, save_dataset
from hypothesis import given, settings
from hypothesis import strategies as st


def item(size=8, caption="", **more) -> TrainItem:
    return TrainItem(torch.randn(4, size, size), torch.randn(3, 8), caption=caption, **more)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 3))
def test_every_epoch_visits_every_item_once(counts, batch_size, seed):
    items = [item(4 * (i + 1)) for i, count in enumerate(counts) for _ in range(count)]
    dataset = TrainDataset(items)
    per_epoch = sum(-(-count // batch_size) for count in counts)
    for epoch in range(2):
        seen = Counter()
        for number in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            batch = dataset.batch(number, batch_size, seed)
            assert 1 <= len(batch) <= batch_size
            assert len({items[i].latent.shape for i in batch}) == 1
            seen.update(batch)
        assert seen == Counter(range(len(items)))


def test_epochs_and_seeds_differ():
    dataset = TrainDataset([item() for _ in range(16)])
    orders = {tuple(dataset.batch(n, 16, seed)) for n in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_no_item_has_a_batch_to_itself():
    dataset = TrainDataset([item() for _ in range(17)])
    assert sorted(len(dataset.batch(n, 16, 0)) for n in range(2)) == [8, 9]


def test_streams_are_apart():
    draws = {
        torch.rand(1, generator=generator(seed, purpose, step)).item()
        for seed in (0, 1, 2**64 - 1)
        for purpose in ("noise", "init a")
        for step in range(4)
    }
    assert len(draws) == 3 * 2 * 4


def test_dataset_survives_the_disk(tmp_path):
    mask = torch.rand(16, 16)
    extra = {"pooled_output": torch.randn(8), "guidance": 3.5, "refs": [torch.randn(2), "text"]}
    first = TrainItem(torch.randn(4, 8, 8), torch.randn(3, 8), extra, "a cat", mask, 0.5)
    shared = TrainItem(torch.randn(4, 2, 8, 8), first.cond, caption="ein Löwe")
    save_dataset(tmp_path / "cats", TrainDataset([first, shared, TrainItem(first.latent, None)]))
    loaded = load_dataset(tmp_path / "cats")
    assert [i.caption for i in loaded] == ["a cat", "ein Löwe", ""]
    assert [i.weight for i in loaded] == [0.5, 1.0, 1.0]
    assert torch.equal(loaded[0].latent, first.latent)
    assert torch.equal(loaded[0].mask, mask) and loaded[1].mask is None
    assert torch.equal(loaded[1].cond, first.cond) and loaded[2].cond is None
    assert torch.equal(loaded[0].extra["pooled_output"], extra["pooled_output"])
    assert loaded[0].extra["guidance"] == 3.5
    assert torch.equal(loaded[0].extra["refs"][0], extra["refs"][0])
    assert loaded[0].extra["refs"][1] == "text"
    rows = json.loads((tmp_path / "cats" / "dataset.json").read_text())["items"]
    assert rows[0]["cond"] == rows[1]["cond"] and rows[0]["latent"] == rows[2]["latent"]


def test_names_of_tensors_do_not_collide(tmp_path):
    ones, twos, threes = (torch.full((2,), float(n)) for n in (1, 2, 3))
    extra = {"latent": ones, "x.y": twos, "x": {"y": threes}}
    save_dataset(tmp_path / "d", TrainDataset([item(extra=extra)]))
    loaded = load_dataset(tmp_path / "d")[0].extra
    assert torch.equal(loaded["latent"], ones)
    assert torch.equal(loaded["x.y"], twos) and torch.equal(loaded["x"]["y"], threes)


def test_dataset_is_never_replaced(tmp_path):
    cats, dogs = TrainDataset([item(caption="cat")]), TrainDataset([item(caption="dog")])
    save_dataset(tmp_path / "pets", cats)
    save_dataset(tmp_path / "pets", cats)
    with pytest.raises(AdapterLabError, match="exists already"):
        save_dataset(tmp_path / "pets", dogs)
    assert load_dataset(tmp_path / "pets")[0].caption == "cat"
    assert [p.name for p in tmp_path.iterdir()] == ["pets"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrainDataset([]), "empty"),
        (lambda: TrainItem(torch.randn(4, 8), None), "shape"),
        (lambda: item(mask=torch.zeros(8, 8)), "black everywhere"),
        (lambda: item(weight=float("nan")), "weight"),
        (lambda: TrainItem(torch.full((4, 2, 2), torch.nan), None), "in its latent"),
        (lambda: item(extra={"y": [torch.full((3,), torch.inf)]}, caption="cat"), "'cat'.* y.0"),
    ],
)
def test_unusable_items(make, says):
    with pytest.raises(AdapterLabError, match=says):
        make()


def test_conditioning_that_cannot_be_stored(tmp_path):
    broken = TrainItem(torch.randn(4, 8, 8), None, {"control": object()})
    with pytest.raises(AdapterLabError, match="control"):
        save_dataset(tmp_path / "x", TrainDataset([broken]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "dataset.json").unlink(), "no dataset"),
        (lambda f: (f / "dataset.json").write_text("{"), "not JSON"),
        (lambda f: (f / "dataset.json").write_text('{"format": "x"}'), "not a dataset"),
        (lambda f: _edit(f, lambda row: row.pop("caption")), "damaged"),
        (lambda f: _edit(f, lambda row: row.update(latent="nope")), "nope"),
    ],
)
def test_damaged_dataset(tmp_path, damage, says):
    save_dataset(tmp_path / "d", TrainDataset([item()]))
    damage(tmp_path / "d")
    with pytest.raises(AdapterLabError, match=says):
        load_dataset(tmp_path / "d")


def _edit(folder, change):
    listing = json.loads((folder / "dataset.json").read_text())
    change(listing["items"][0])
    (folder / "dataset.json").write_text(json.dumps(listing))
