"""Quantising that is cancelled, fails or can't be meant: nothing is half written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.quant import Settings, quantize, quantize_file
from adapter_lab.core.quant.formats import FORMATS
from quant_files import (
    WORST,
    fp8,
    lora,
    metadata,
    random,
    refused,
    same,
    saved,
    weights,
)
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "small.safetensors"


@pytest.mark.parametrize("worst", [0, 1])
def test_cancelling_leaves_nothing(model, out, worst):
    """At each of its steps, and what was there stays."""
    out.parent.mkdir()
    out.write_bytes(b"precious")
    steps: list[tuple[int, int, str]] = []
    threads = threading.active_count()
    quantize_file(model, out.with_name("all"), worst=worst, tick=lambda *step: steps.append(step))
    said = [what.split()[0].strip(",") for _, _, what in steps]
    count = len(load_file(model))
    assert said[: -len(load_file(out.with_name("all")))] == (
        ["measuring"] * 5 * worst + ["quantising"] * count
    )
    assert set(said[-3:]) == {"checking"}
    size = sum(tensor.nbytes for tensor in load_file(model).values()) / 1e3
    shown = [float(what.split()[1]) for _, _, what in steps if what.startswith("quantising")]
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] > 0.7 * size
    done = [done for done, _, _ in steps]
    assert done == sorted(done) and {total for _, total, _ in steps} == {count + 5 * worst}
    for at in range(len(steps)):
        left = iter(range(at))

        def tick(*_: object, left=left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_file(model, out, worst=worst, tick=tick, overwrite=True)
        assert sorted(f.name for f in out.parent.iterdir()) == ["all", out.name]
        assert out.read_bytes() == b"precious" and threading.active_count() == threads


@pytest.mark.parametrize("where", [-1, -4000, 200_000])
def test_a_disk_that_loses_a_bit(model, out, where):
    seen: list[str] = []

    def tick(done: int, total: int, what: str) -> None:
        if what.startswith("checking") and not seen:
            seen.append(what)
            (file,) = out.parent.glob(".adapter_lab-*.tmp")
            with open(file, "r+b") as under_way:
                under_way.seek(where, os.SEEK_END if where < 0 else os.SEEK_SET)
                byte = under_way.read(1)[0]
                under_way.seek(-1, os.SEEK_CUR)
                under_way.write(bytes([byte | 64 if byte < 64 else byte & 63]))

    refused("small.safetensors': '.+' does not read back as it was", model, out, tick=tick)


@pytest.mark.parametrize("form", ["mxfp8", "nvfp4"])
def test_numbers_in_another_order_than_files_have(model, out, monkeypatch, form):
    """Every byte is as it was written, and means something else."""
    monkeypatch.setattr(type(FORMATS[form]), "ordered", lambda self, name, tensor: tensor)
    refused("small.safetensors': '.+weight' does not read back as it was", model, out, format=form)


def test_a_source_that_changes_while_it_is_read(model, out):
    def longer(done: int, total: int, what: str) -> None:
        if what.startswith("checking"):
            with open(model, "ab") as file:
                file.write(b"0")

    refused("model.safetensors': the file was changed while it was read", model, out, tick=longer)

    def shorter(done: int, total: int, what: str) -> None:
        os.truncate(model, 4000)

    save_file(weights(), model)
    refused("model.safetensors': the file was cut off while it was read", model, out, tick=shorter)


def test_a_source_that_is_replaced_while_it_is_read(model, tmp_path, out):
    digest, before = hashlib.sha256(model.read_bytes()).hexdigest(), load_file(model)

    def tick(done: int, total: int, what: str) -> None:
        if done == 3:
            (tmp_path / "other").write_bytes(b"other")
            os.replace(tmp_path / "other", model)

    quantize_file(model, out, tick=tick)
    assert json.loads(metadata(out)["adapter_lab.quantised"])["source"]["sha256"] == digest
    assert all(same(load_file(out)[n], before[n]) for n in before if n.endswith("bias"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [f"{WORST}.weight", "double_blocks.0.img_mod.lin.weight",
                                  "img_in.bias"])  # fmt: skip
def test_weights_that_are_no_numbers_are_named(tmp_path, out, name, value):
    state = weights()
    state[name].view(-1)[3] = value
    save_file(state, path := tmp_path / "m.safetensors")
    refused(f"m.safetensors' is damaged: found NaN or infinity in '{name}'", path, out)
    for more in ({}, {"adapters": [(lora(WORST), 1.0)]}, {"worst": 1}):
        with pytest.raises(AdapterLabError, match=f"NaN or infinity in '{name}'"):
            quantize(path, Settings(**more))


@pytest.mark.parametrize(("content", "message"), [
    (b"", "the file is empty"),
    (b"\x80\x02}q\x00.", "a Python pickle"),
    (b"PK\x03\x04" + bytes(100), "a zip archive or PyTorch checkpoint"),
])  # fmt: skip
def test_files_that_are_no_safetensors(tmp_path, out, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(message, path, out)
    refused("m.safetensors", tmp_path / "none" / "m.safetensors", out)
    refused("it is a folder", tmp_path, out)


def test_files_that_are_no_model(model, tmp_path, out):
    whole = model.read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-1000])
    refused("cut", tmp_path / "cut", out)
    peft = {f"transformer.single_transformer_blocks.0.attn.to_{n}.lora_{x}.weight": random(256, 256)
            for n in "qkv" for x in "AB"}  # fmt: skip
    for given in (lora(WORST, 128), peft):
        save_file(given, tmp_path / "lora")
        refused("lora' is an adapter: .* Choose the model", tmp_path / "lora", out)
    q, scale = fp8(random(256, 256))
    path = "text_model.encoder.layers.0.mlp.fc1"
    text = {f"{path}.weight": q, f"{path}.scale_weight": scale, "scaled_fp8": q[:0]}
    save_file(text, tmp_path / "text")
    for more in ({}, {"adapters": [(lora(WORST), 1.0)]}):
        refused("text' is a text encoder", tmp_path / "text", out, **more)
    save_file({"a": random(300, 300)}, tmp_path / "a")
    refused("no layer to quantise", tmp_path / "a", out)
    shutil.copy(model, shard := tmp_path / "flux-00002-of-00003.safetensors")
    refused("is one part of a model: .* in one file", shard, out)
    shutil.copy(model, tmp_path / "flux-00001-of-00001.safetensors")
    quantize_file(tmp_path / "flux-00001-of-00001.safetensors", out)


@pytest.mark.parametrize("name", [  # nunchaku 1.0, optimum-quanto 0.2, torchao 0.14
    "single_blocks.0.linear2.qweight", "single_blocks.0.linear2.weight._data",
    "single_blocks.0.linear2._weight_qdata",
])  # fmt: skip
def test_layouts_of_other_tools(model, tmp_path, out, name):
    kept = {key: tensor for key, tensor in load_file(model).items() if "linear2" not in key}
    for codes in (random(128, 320).to(torch.int8), random(128, 640).to(torch.float8_e4m3fn)):
        save_file(kept | {name: codes}, tmp_path / "other")
        refused("linear2.* as another tool has it, .* was made for", tmp_path / "other", out)


def test_outputs_that_can_not_be(model, tmp_path, out):
    save_file(lora(WORST), tmp_path / "a.safetensors")
    os.symlink(model, link := tmp_path / "link")
    os.link(model, hard := tmp_path / "hard")
    for path in (model, link, hard, tmp_path / "out" / ".." / "model.safetensors"):
        out.parent.mkdir(exist_ok=True)
        refused("is an input", model, path, overwrite=True)
    adapters = [(tmp_path / "a.safetensors", 1.0)]
    refused("is an input", model, tmp_path / "a.safetensors", adapters=adapters, overwrite=True)
    out.write_bytes(b"precious")
    steps: list[str] = []
    refused("exists already", model, out, worst=1, tick=lambda *step: steps.append(step[2]))
    assert not steps
    with pytest.raises(AdapterLabError, match="folder"):
        quantize_file(model, out.parent, overwrite=True)


def test_a_full_disk(model, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path / "disk"]
    (tmp_path / "disk").mkdir()
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        refused("the disk is full", model, tmp_path / "disk" / "o.safetensors")
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.parametrize("short", [1, 3000, 200_000])
def test_a_file_that_can_not_grow(model, tmp_path, out, short):
    """Found out by the write that fails: the last one, one before it, one in the middle."""
    resource = pytest.importorskip("resource")
    quantize_file(model, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "whole").stat().st_size - short, hard))
    try:
        refused("^Cannot write '.*small.safetensors': [^']*limits the size", model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("settings", "message"), [
    ({"format": "fp7"}, "Unknown format 'fp7'"),
    ({"architecture": "flax"}, "Unknown architecture 'flax'"),
    ({"worst": -1}, "'keep_worst' is out of range"),
    ({"most": math.nan}, "'max_error' is out of range"),
    ({"most": -0.1}, "'max_error' is out of range"),
    ({"keep": ["("]}, "is not a regular expression"),
    ({"adapters": [({}, math.nan)]}, "A strength is not a number"),
])  # fmt: skip
def test_settings_that_can_not_be_meant(model, out, settings, message):
    refused(message, model, out, **settings)
