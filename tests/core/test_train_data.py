"""Batches of an epoch, and datasets on disk."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train import data, storage
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.lock import locked
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


def test_repeats_and_shapes():
    """Each item as often as it repeats, a batch never of two shapes."""
    dataset = TrainDataset([item(4, repeats=3), item(4), item(8, repeats=2), item(8, repeats=4)])
    assert {shape: len(members) for shape, members in dataset.buckets.items()} == {
        (4, 4, 4): 4, (4, 8, 8): 6,
    }  # fmt: skip
    seen = Counter(i for number in range(5) for i in dataset.batch(number, 2, 0))
    assert seen == {0: 3, 1: 1, 2: 2, 3: 4}


def formed(**shares) -> TrainItem:
    first, *rest = [item(caption=name, share=share) for name, share in shares.items()]
    return dataclasses.replace(first, variants=tuple(rest))


def test_variants_are_drawn_by_their_shares():
    dataset = TrainDataset([formed(a=0.6, b=0.3, c=0.1), formed(x=1.0, y=0.0), item(caption="p")])
    drawn = Counter(form.caption for n in range(3000) for form in dataset.draw(n, 1, 5))
    assert {name: count / 1000 for name, count in drawn.items()} == pytest.approx(
        {"a": 0.6, "b": 0.3, "c": 0.1, "x": 1, "p": 1}, abs=0.05
    )
    assert drawn["x"] == drawn["p"] == 1000


def test_draw_is_a_pure_function():
    dataset = TrainDataset([formed(a=1, b=1, c=1, d=1) for _ in range(8)])

    def captions(number, seed):
        return [form.caption for form in dataset.draw(number, 8, seed)]

    assert captions(7, 0) == captions(7, 0)
    assert len({tuple(captions(n, seed)) for n in range(4) for seed in range(4)}) == 16
    batch = [dataset[i] for i in dataset.batch(7, 8, 0)]
    for form, whole in zip(dataset.draw(7, 8, 0), batch, strict=True):
        assert any(form is one for one in (whole, *whole.variants))


def test_fingerprint_sees_every_change():
    latent, cond = torch.randn(4, 8, 8), torch.randn(300, 8)

    def told(latent=latent, cond=cond, variant="v", **more):
        extra = {"pooled_output": cond[0], **more.pop("extra", {})}
        form = TrainItem(latent, cond, extra, variant)
        return TrainDataset([TrainItem(latent, cond, extra, variants=(form,), **more)]).fingerprint

    middle = cond.clone()
    middle[150, 3] += 1e-6
    turned = latent.flatten().roll(2).reshape(latent.shape)
    changes = [
        told(), told(latent.double()), told(latent.reshape(4, 4, 16)), told(turned),
        told(cond=middle), told(variant="w"), told(caption="c"), told(weight=0.5),
        told(mask=torch.ones(2, 2)), told(repeats=2), told(regularisation=True), told(share=0.5),
        told(extra={"guidance": 3.5}), told(extra={"guidance": 4.5}),
    ]  # fmt: skip
    assert len(set(changes)) == len(changes)
    assert told(latent.clone(), cond.clone()) == changes[0]


def test_epochs_and_seeds_differ():
    dataset = TrainDataset([item() for _ in range(16)])
    orders = {tuple(dataset.batch(n, 16, seed)) for n in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_any_batch_at_any_time():
    """What was asked before does not matter: a resumed run asks from the middle of an epoch."""
    items = [item(4 * (1 + i % 3)) for i in range(50)]
    dataset, numbers = TrainDataset(items), [(n, seed) for n in range(60) for seed in (0, 1)]
    found = {(n, seed): dataset.batch(n, 3, seed) for n, seed in numbers}
    for n, seed in reversed(numbers):
        assert dataset.batch(n, 3, seed) == TrainDataset(items).batch(n, 3, seed) == found[n, seed]
    assert dataset.batch(5, 4, 0) == TrainDataset(items).batch(5, 4, 0)


def test_a_step_does_not_shuffle_everything(monkeypatch):
    dataset, drawn = TrainDataset([item(4)] * 100), []
    real = data.permutation
    monkeypatch.setattr(data, "permutation", lambda *a: drawn.append(a) or real(*a))
    seen = Counter(i for n in range(200) for i in dataset.batch(n, 1, 0))
    assert set(seen.values()) == {2} and len(seen) == 100 and len(drawn) == 4


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


def test_forms_and_counts_survive_the_disk(tmp_path):
    first = dataclasses.replace(formed(a=0.25, b=0.75), repeats=3, regularisation=True)
    save_dataset(tmp_path / "d", TrainDataset([first, item()]))
    loaded = load_dataset(tmp_path / "d")
    assert loaded.fingerprint == TrainDataset([first, loaded[1]]).fingerprint
    assert [form.share for form in (loaded[0], *loaded[0].variants)] == [0.25, 0.75]
    assert (loaded[0].repeats, loaded[0].regularisation) == (3, True)
    rows = json.loads((tmp_path / "d" / "dataset.json").read_text())["items"]
    assert not {"variants", "repeats", "regularisation", "share"} & rows[1].keys()


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


def big(value, caption="", dtype=torch.float32):
    latent = torch.zeros(4, 8, 8, dtype=dtype)
    latent[1, 2, 3] = -value
    return TrainItem(latent, None, caption=caption)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrainDataset([]), "empty"),
        (lambda: TrainItem(torch.randn(4, 8), None), "shape"),
        (lambda: item(mask=torch.zeros(8, 8)), "black everywhere"),
        (lambda: item(weight=float("nan")), "weight"),
        (lambda: item(repeats=0), "repeats 0"),
        (lambda: item(share=-1.0), "impossible"),
        (lambda: item(8, variants=(item(4),)), "one shape"),
        (lambda: item(variants=(formed(a=1, b=1),)), "no variants of variants"),
        (lambda: TrainItem(torch.full((4, 2, 2), torch.nan), None), "in its latent"),
        (lambda: big(1e38), "A training item holds absurd.*1e.38 in its latent"),
        (lambda: big(6e4, "cat", torch.float16), "'cat' holds absurd.*in its latent"),
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


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path, monkeypatch):
    """Of that name, and not while its process lives."""
    for name in ("pets", "pets.1"):
        if (child := os.fork()) == 0:
            monkeypatch.setattr(storage, "write_all", lambda *_: os._exit(9))
            save_dataset(tmp_path / name, TrainDataset([item()]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert len(left) == 2 and not (tmp_path / "pets").exists()
    with locked(tmp_path / ".pets.lock", "it"), pytest.raises(AdapterLabError, match="saved alre"):
        save_dataset(tmp_path / "pets", TrainDataset([item()]))
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == left
    save_dataset(tmp_path / "pets", TrainDataset([item()]))
    assert len(load_dataset(tmp_path / "pets")) == 1
    kept = {p.name for p in tmp_path.iterdir() if p.is_dir()} - {"pets"}
    assert len(kept) == 1 and kept < left and kept.pop().startswith(".pets.1.")


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
