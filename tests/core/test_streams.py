"""Reading and writing tensor by tensor: order, hashes, memory, contradictions."""

from __future__ import annotations

import gc
import hashlib
import os
import weakref
from pathlib import Path

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import (
    Adapter,
    Reader,
    layout,
    read_adapter,
    read_header,
    stream,
    write_adapter,
    write_stream,
)
from safetensors.torch import load_file, save

TENSORS = {
    "up": torch.arange(6.0).reshape(3, 2),
    "down": torch.arange(8).reshape(2, 4).to(torch.bfloat16),
    "alpha": torch.tensor(2.0),
    "mask": torch.tensor([True, False]),
}
INFOS = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


def sd_scripts_hashes(tensors, metadata) -> dict[str, str]:
    """By the words of sd-scripts, from a whole serialisation in memory."""
    whole = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    window = whole[0x100000:][:0x10000]
    model, legacy = hashlib.sha256(data).hexdigest(), hashlib.sha256(window).hexdigest()[:8]
    return {"sshs_model_hash": model, "sshs_legacy_hash": legacy}


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("order", [list(INFOS), list(INFOS)[::-1], list(layout(INFOS))])
@pytest.mark.parametrize("metadata", [{}, {"ss_a": "1", "modelspec.title": "é"}, {"other": "x"}])
def test_any_order_gives_the_reference_file_and_hashes(order, metadata, tmp_path):
    path = tmp_path / "a.safetensors"
    written = write_stream(path, INFOS, ((n, TENSORS[n]) for n in order), metadata)
    assert written == {**metadata, **sd_scripts_hashes(TENSORS, metadata)}
    assert equal(load_file(path), TENSORS)
    assert read_header(path).metadata == written
    assert list(read_header(path).tensors) == ["alpha", "up", "down", "mask"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0x100000 - 200, 10),  # the window starts behind the end, or just before it
        (0x100000 + 8, 10),
        (0x110000 + 512, 300),
        (0x200000, 10),
        (0x2000, 0x100000),  # one value makes the header longer than 1 MiB
        (0x20000, 0x200000),
    ],
)
def test_the_window_of_the_legacy_hash(size, text, tmp_path):
    tensors = {"a": torch.randint(0, 256, (size,)).to(torch.uint8), "b": torch.ones(3)}
    metadata = {"ss_comment": "x" * text, "modelspec.description": "not counted" * 50}
    written = write_adapter(tmp_path / "a.safetensors", Adapter(tensors, metadata))
    assert written == {**metadata, **sd_scripts_hashes(tensors, metadata)}


def test_a_small_file_has_the_legacy_hash_of_nothing(tmp_path):
    written = write_adapter(tmp_path / "a.safetensors", TENSORS)
    assert written["sshs_legacy_hash"] == "e3b0c442"


def test_hashes_of_another_file_are_not_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    source = {"sshs_model_hash": "old", "sshs_legacy_hash": "old", "k": "v"}
    assert write_stream(path, INFOS, TENSORS.items(), source, hashes=False) == {"k": "v"}
    assert write_adapter(path, Adapter(TENSORS, source))["sshs_model_hash"] != "old"


def test_names_choose_and_the_file_orders(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, TENSORS)
    assert [n for n, _ in stream(path)] == ["alpha", "up", "down", "mask"]
    assert [n for n, _ in stream(path, ["mask", "alpha"])] == ["alpha", "mask"]
    with pytest.raises(AdapterLabError, match=r"a\.safetensors' holds no tensor 'none'"):
        next(stream(path, ["up", "none"]))
    with Reader(path) as reader, pytest.raises(AdapterLabError, match="no tensor 'none'"):
        reader.tensor("none")


def test_a_file_cut_off_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, {"a": torch.ones(50_000), "b": torch.ones(50_000)})
    tensors = stream(path)
    next(tensors)
    os.truncate(path, 300_000)
    with pytest.raises(AdapterLabError, match=r"a\.safetensors.*cut off while"):
        next(tensors)


def test_one_tensor_lives_at_a_time(tmp_path):
    """Neither reading nor writing holds a tensor while the next one is made."""
    path, names = tmp_path / "a.safetensors", "abcd"
    living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    alive: list[int] = []

    def tracked(tensor: torch.Tensor) -> torch.Tensor:
        living.add(tensor)
        return tensor

    def make():
        for name in names:
            alive.append(len(living))
            yield name, tracked(torch.ones(1000))

    gc.disable()
    write_stream(path, dict.fromkeys(names, (torch.float32, (1000,))), make())
    tensors = stream(path)
    for _ in names:
        tracked(next(tensors)[1])
        alive.append(len(living))
    gc.enable()
    assert alive == [0] * 8


def test_metadata_that_are_known_when_all_is_written(tmp_path):
    """Taken from the file itself, before it is in its place."""
    path, early, hashed = tmp_path / "a.safetensors", {"hash": "0" * 64, "b": "c"}, []

    def closing(written: str) -> dict[str, str]:
        assert not path.exists()
        found = load_file(written)
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
        hashed.append(hashlib.sha256(found["up"].numpy().tobytes()).hexdigest())
        return {"hash": hashed[0]}

    told = write_stream(path, INFOS, TENSORS.items(), early, hashes=False, closing=closing)
    assert told == read_header(path).metadata == {"hash": hashed[0], "b": "c"}
    assert load_file(path).keys() == TENSORS.keys()
    before = path.read_bytes()

    def failing(written: str) -> dict[str, str]:
        raise KeyboardInterrupt

    for wrong, error in ((failing, KeyboardInterrupt), (lambda _: {"hash": "0"}, AdapterLabError)):
        with pytest.raises(error):
            write_stream(path, INFOS, TENSORS.items(), early, hashes=False, closing=wrong)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_views_and_shared_memory(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.t(), "part": base[1:3, ::2], "again": base, "same": base,
        "wide": base[:1].expand(3, 6), "parameter": torch.nn.Parameter(base),
        "conj": torch.view_as_complex(base.reshape(-1, 2)).conj(),
        "neg": torch.view_as_complex(torch.ones(2)).conj().imag,
    }  # fmt: skip
    write_adapter(tmp_path / "a.safetensors", tensors)
    assert equal(read_adapter(tmp_path / "a.safetensors"), tensors)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            [("up", TENSORS["up"])],
            "3 announced tensors did not come: found none for 'alpha'",
        ),
        ([*TENSORS.items(), ("more", torch.ones(1))], "'more' was not announced"),
        ([("up", TENSORS["up"]), ("up", TENSORS["up"])], "'up' came twice"),
        ([("up", TENSORS["up"].half())], r"found F16 \[3, 2\], expected F32 \[3, 2\]"),
        ([("up", TENSORS["up"].t())], r"found F32 \[2, 3\], expected F32 \[3, 2\]"),
    ],
)
def test_what_comes_must_be_what_was_announced(tensors, says, tmp_path):
    with pytest.raises(AdapterLabError, match=rf"a\.safetensors.*{says}"):
        write_stream(tmp_path / "a.safetensors", INFOS, tensors)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({7: torch.ones(1)}, "not a name"),
        ({"__metadata__": torch.ones(1)}, "not a name"),
        ({"a": [1.0]}, "'a' of type list"),
        ({"a": torch.ones(2, device="meta")}, "'a' of type Tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' of type Tensor"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128"),
        (Adapter({}, {"k": 1}), "'k': 1"),
        (Adapter({}, {1: "v"}), "1: 'v'"),
    ],
)
def test_adapters_that_no_file_can_hold(adapter, says, tmp_path):
    with pytest.raises(AdapterLabError, match=rf"a\.safetensors.*{says}"):
        write_adapter(tmp_path / "a.safetensors", adapter)
    assert leftovers(tmp_path) == []
