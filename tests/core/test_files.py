"""Adapter files whole: the class, peft's config, damaged values."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from adapter_lab.core import files
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, is_finite, read_adapter, read_header, write_adapter
from adapter_lab.core.header import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FLOATS = [d for d in DTYPES.values() if d.is_floating_point or d.is_complex]
INFINITIES = (0x7C00, 0x7F80)  # of float16 and bfloat16
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bytes, but no NaN or infinity."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(0, 2 if dtype is torch.bool else 60, shape, generator=generator)
    return whole.float().to(dtype) if dtype in FLOATS else whole.to(dtype)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    as_bytes = [t.reshape(-1).view(torch.uint8) for t in (one, two)]
    return (one.dtype, one.shape) == (two.dtype, two.shape) and torch.equal(*as_bytes)


@given(
    layout=st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES)),
    metadata=st.dictionaries(NAMES, NAMES, max_size=3),
)
def test_round_trip_and_the_reference_library(layout, metadata, tmp_path_factory):
    path = tmp_path_factory.mktemp("trip") / "a.safetensors"
    layout.pop("__metadata__", None)
    tensors = {n: random_tensor(d, s, i) for i, (n, (d, s)) in enumerate(layout.items())}
    written = write_adapter(path, Adapter(tensors, metadata))
    ours, theirs = read_adapter(path), load_file(path)
    assert ours.keys() == theirs.keys() == tensors.keys()
    assert all(same(ours[n], t) and same(theirs[n], t) for n, t in tensors.items())
    with safe_open(path, "pt") as file:
        assert ours.metadata == written == file.metadata()
    assert read_header(path).data_offset % 8 == 0
    assert {k: v for k, v in written.items() if not k.startswith("sshs_")} == metadata


def test_files_of_the_reference_library(tmp_path):
    path = tmp_path / "theirs.safetensors"
    tensors = {str(d): random_tensor(d, (3, 2)) for d in DTYPES.values()}
    save_file(tensors, path)
    ours = read_adapter(str(path))
    assert ours.metadata == {} and ours.config is None and ours.name == "theirs.safetensors"
    assert ours.keys() == tensors.keys() and all(same(ours[n], t) for n, t in tensors.items())


def test_tensors_out_of_alignment(tmp_path):
    """A foreign writer need not sort by size, nor pad its header."""
    span = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f'{{"a":{span},"b":{{"dtype":"F64","shape":[1],"data_offsets":[1,9]}}}}'.encode()
    number = torch.tensor([1.5], dtype=torch.float64)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\7" + number.numpy().tobytes())
    found = read_adapter(path)["b"]
    assert torch.equal(found, number) and found.data_ptr() % found.itemsize == 0


def test_a_tensor_outlives_and_ignores_its_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100_000), "b": torch.ones(2)}, path)
    adapter = read_adapter(path)
    path.write_bytes(b"")  # a mapped tensor would end the process here
    adapter["b"] += 1
    assert adapter["a"].sum() == 100_000 and adapter["b"].sum() == 4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_finite_looks_at_every_pattern(dtype):
    """All bit patterns of one byte, and those around infinity of the larger formats."""
    size = dtype.itemsize
    if size == 1:
        values = torch.arange(256, dtype=torch.uint8).view(dtype)
    elif size == 2:
        near = [torch.tensor([0, 1, 2**15 - 1])] + [torch.arange(i - 9, i + 9) for i in INFINITIES]
        values = torch.cat([*near, *(n - 2**15 for n in near)]).to(torch.int16).view(dtype)
    else:
        real = torch.float32 if dtype.is_complex else dtype
        edge = torch.finfo(real)
        numbers = [0, -0.0, edge.max, edge.min, edge.tiny, torch.inf, -torch.inf, torch.nan]
        values = torch.tensor(numbers, dtype=real)
        values = torch.cat([values, -values])
    if dtype.is_complex:
        values = torch.cat([torch.complex(values, values * 0 + 1), torch.complex(values, values)])
    wide = values if size >= 4 else values.float()
    expected = wide.isfinite().tolist()
    assert [is_finite(values[i : i + 1]) for i in range(len(values))] == expected
    assert not all(expected) and any(expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_damaged_values_are_named(dtype, value, tmp_path):
    bad = torch.zeros(70, 9)
    bad[69, 8] = value
    path = tmp_path / "a.safetensors"
    save_file({"fine": torch.zeros(2), "mod.lora_up.weight": bad.to(dtype)}, path)
    with pytest.raises(AdapterLabError, match=r"a\.safetensors.*in 'mod\.lora_up\.weight'"):
        read_adapter(path)


@pytest.mark.parametrize("piece", [8, 24, 1 << 20])
def test_every_value_of_every_piece_is_tested(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", piece)
    path = tmp_path / "a.safetensors"
    tensors = {
        "a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(0), "c": torch.zeros(5),
        "d": torch.zeros(7), "e": torch.zeros(3).bfloat16(), "f": torch.zeros(9).bfloat16(),
        "n": torch.full((5,), -1, dtype=torch.int8),
    }  # fmt: skip
    save_file(tensors, path)
    found = read_adapter(path)
    assert found.keys() == tensors.keys() and all(same(found[n], t) for n, t in tensors.items())
    save_file(found, tmp_path / "again.safetensors")  # what native nodes do with it
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    for name in "acdef":
        for i in range(len(tensors[name])):
            tensors[name][i] = torch.nan
            save_file(tensors, path)
            with pytest.raises(AdapterLabError, match=f"in '{name}'"):
                read_adapter(path)
            tensors[name][i] = 0


def test_finite_tensors_without_values_or_fractions():
    for tensor in (torch.zeros(0, 3), torch.tensor([2**31 - 1]), torch.tensor(True)):
        assert is_finite(tensor)
    assert is_finite(torch.zeros(4, 4).t()) and not is_finite(torch.full((2, 2), torch.nan).t())


def test_an_adapter_is_a_dict_and_copies_keep_what_it_knows():
    adapter = Adapter({"a": torch.ones(1)}, {"k": "v"}, dict(CONFIG), "a.safetensors")
    assert isinstance(adapter, dict) and adapter == {"a": torch.ones(1)}
    copies = [adapter.copy(), copy.copy(adapter), copy.deepcopy(adapter), adapter.cast(None)]
    for other in (*copies, pickle.loads(pickle.dumps(adapter))):  # noqa: S301
        assert type(other) is Adapter and other.keys() == adapter.keys()
        assert (other.metadata, other.config) == ({"k": "v"}, CONFIG)
        assert other.name == "a.safetensors"
    changed = adapter.copy()
    changed["b"], changed.metadata["k"] = torch.ones(1), "w"
    assert adapter.keys() == {"a"} and adapter.metadata == {"k": "v"}
    assert Adapter.of(adapter) is adapter and Adapter.of({"a": torch.ones(1)}).metadata == {}


def test_cast_keeps_scalars_and_refuses_overflow():
    big = Adapter({"alpha": torch.tensor(10000.0), "w": torch.ones(2), "n": torch.ones(2).int()})
    half = big.cast(torch.bfloat16)
    assert half["alpha"].item() == 10000 and half["w"].dtype is torch.bfloat16
    assert half["n"].dtype is torch.int32 and big["w"].dtype is torch.float32
    with pytest.raises(AdapterLabError, match="'w' does not fit into torch.float16"):
        Adapter({"w": torch.tensor([1.0, 1e6])}).cast(torch.float16)


def peft_folder(folder: Path, *names: str, config: str = json.dumps(CONFIG)) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(config)
    for name in names:
        save_file({"a": torch.ones(1)}, folder / name)
    return folder / names[0]


def test_peft_config(tmp_path, monkeypatch):
    own = peft_folder(tmp_path / "own", "adapter_model.safetensors")
    assert read_adapter(own).config == CONFIG
    renamed = peft_folder(tmp_path / "renamed", "my_lora.safetensors")
    assert read_adapter(renamed).config == CONFIG
    monkeypatch.chdir(renamed.parent)
    assert read_adapter("my_lora.safetensors").config == CONFIG

    stray = peft_folder(tmp_path / "loras", "x.safetensors", "y.safetensors")
    assert read_adapter(stray).config is None
    assert read_adapter(stray, renamed.parent / "adapter_config.json").config == CONFIG
    assert read_adapter(stray, {"r": 2}).config == {"r": 2}
    assert read_adapter(own, {}).config == {}


def test_bad_peft_config(tmp_path):
    for content, says in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("\xff", "JSON")):
        path = peft_folder(tmp_path / "own", "adapter_model.safetensors", config=content)
        with pytest.raises(AdapterLabError, match=rf"adapter_config\.json.*{says}"):
            read_adapter(path)
    with pytest.raises(AdapterLabError, match="none.json.*No such file"):
        read_adapter(path, tmp_path / "none.json")
