"""Quantised weights as numbers, against formulas written out one number at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.stored import dequantised, helpers, is_quantised, read_weight, stored
from adapter_lab.core.streams import Reader, read_header
from safetensors.torch import save_file

FP8 = torch.float8_e4m3fn
KEY = "m.weight"


def mark(**options):
    return torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)


def read(tmp_path, tensors, metadata=None):
    """What the file of one layer m holds: (W, how it is stored)."""
    save_file({f"m.{name}": t for name, t in tensors.items()}, tmp_path / "m.st", metadata)
    with Reader(tmp_path / "m.st") as reader:
        return read_weight(reader, KEY), stored(reader, KEY)


def integers(*shape):
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0))


SCALES = {
    "one": torch.tensor(0.5),
    "one, (1,)": torch.tensor([0.5]),
    "bf16": torch.tensor(0.5, dtype=torch.bfloat16),
    "rows": torch.rand(8) + 0.1,
    "rows, (out, 1)": torch.rand(8, 1) + 0.1,
    "blocks of columns": torch.rand(8, 3, 1) + 0.1,
    "blocks": torch.rand(4, 2) + 0.1,
}


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight", "weight_scale_inv"])
@pytest.mark.parametrize("scale", SCALES)
def test_scaled_fp8(tmp_path, name, scale):
    q, s = integers(8, 12).to(torch.float32).to(FP8), SCALES[scale]
    weight, how = read(tmp_path, {"weight": q, name: s})
    assert how.format == "float8_e4m3fn" and how.shape == (8, 12)
    counts = [*s.shape[:2]] + [1] * (2 - min(2, s.ndim))
    table = s.float().reshape(counts)
    for i in range(8):
        for j in range(12):
            factor = table[i * counts[0] // 8, j * counts[1] // 12]
            assert weight[i, j] == q[i, j].float() * factor


def test_int8_and_rotation(tmp_path):
    """Four columns turn by the matrix of ones whose other diagonal is -1, halved."""
    q, s = integers(6, 8).to(torch.int8), torch.rand(6, 1)
    plain, how = read(tmp_path, {"weight": q, "weight_scale": s})
    assert how.format == "int8_tensorwise" and torch.equal(plain, q.float() * s)
    options = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4}
    turned, _ = read(tmp_path, {"weight": q, "weight_scale": s, "comfy_quant": mark(**options)})
    row = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    hand = [[sum(float(plain[i, 4 * (j // 4) + k]) * row[j % 4][k] / 2 for k in range(4))
             for j in range(8)] for i in range(6)]  # fmt: skip
    torch.testing.assert_close(turned, torch.tensor(hand))
    # Options below "params", as some writers have them.
    below = mark(format="int8_tensorwise", params={"convrot": True, "convrot_groupsize": 4})
    again, _ = read(tmp_path, {"weight": q, "weight_scale": s, "comfy_quant": below})
    assert torch.equal(again, turned)


def place(row: int, column: int, down: int) -> int:
    """Where cuBLAS has a block's scale: tiles of 128 x 4, within them 32 rows of 4 x 4."""
    tile = (row // 128) * down + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4


def test_mxfp8(tmp_path):
    rows, columns = 160, 192  # two tiles down, two across, both cut
    q = integers(rows, columns).float().to(FP8)
    exponents = torch.randint(120, 134, (2 * 2 * 512,), generator=torch.Generator().manual_seed(1))
    coded = exponents.to(torch.uint8)
    for scale in (coded.view(torch.float8_e8m0fnu), coded):
        tensors = {"weight": q, "weight_scale": scale.reshape(256, 8),
                   "comfy_quant": mark(format="mxfp8")}  # fmt: skip
        weight, how = read(tmp_path, tensors)
        assert how.format == "mxfp8" and how.shape == (rows, columns)
        for i, j in ((0, 0), (33, 40), (127, 191), (128, 130), (159, 100)):
            power = 2.0 ** (int(exponents[place(i, j // 32, 2)]) - 127)
            assert weight[i, j] == q[i, j].float() * power


def test_nvfp4(tmp_path):
    rows, columns = 144, 96
    rng = torch.Generator().manual_seed(2)
    q = torch.randint(0, 256, (rows, columns // 2), generator=rng).to(torch.uint8)
    fine = (torch.rand(256, 8, generator=rng) * 4).to(FP8)
    whole = torch.tensor(0.01)
    tensors = {"weight": q, "weight_scale": fine, "weight_scale_2": whole,
               "comfy_quant": mark(format="nvfp4")}  # fmt: skip
    weight, how = read(tmp_path, tensors)
    assert how.shape == tuple(weight.shape) == (rows, columns)
    sizes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for i, j in ((0, 0), (0, 1), (35, 17), (127, 95), (128, 64), (143, 50)):
        byte = int(q[i, j // 2])
        code = byte & 15 if j % 2 else byte >> 4
        number = sizes[code & 7] * (-1 if code & 8 else 1)
        scale = float(fine.flatten()[place(i, j // 16, 2)]) * 0.01
        assert float(weight[i, j]) == pytest.approx(number * scale, rel=1e-6)
    smooth = torch.rand(columns, generator=rng)
    turned, _ = read(tmp_path, {**tensors, "pre_quant_scale": smooth})
    torch.testing.assert_close(turned, weight * smooth)


def test_convrot_w4a4(tmp_path):
    q = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(4, 64)
    s = torch.tensor([0.5, 1, 2, 4])
    options = mark(format="convrot_w4a4", convrot_groupsize=64)
    weight, how = read(tmp_path, {"weight": q, "weight_scale": s, "comfy_quant": options})
    assert how.shape == tuple(weight.shape) == (4, 128)
    codes = [[(int(v) >> shift) & 15 for v in row for shift in (0, 4)] for row in q]
    signed = torch.tensor([[c - 16 if c > 7 else c for c in row] for row in codes]) * s[:, None]
    # A rotation keeps lengths.
    groups = signed.reshape(4, 2, 64)
    torch.testing.assert_close(weight.reshape(4, 2, 64).norm(dim=-1), groups.norm(dim=-1))
    # Each row of the matrix sums to 8, the root of its size.
    torch.testing.assert_close(weight.reshape(4, 2, 64).sum(-1), groups.sum(-1))
    assert math.isclose(float(weight[0, 0]), float(sum(
        v * sign for v, sign in zip(groups[0, 0].tolist(), first_row(), strict=True)
    ) / 8), rel_tol=1e-5)  # fmt: skip


def first_row():
    four = [1, 1, 1, -1]
    return [a * b * c for a in four for b in four for c in four]


def test_what_is_plain_and_what_is_not(tmp_path):
    tensors = {
        "a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 2, dtype=FP8),
        "c.weight": torch.zeros(2, 2, dtype=torch.int8),
        "d.weight": torch.zeros(3, dtype=torch.int8),
        "e.weight": torch.zeros(8, 1, dtype=torch.uint8), "e.weight.absmax": torch.zeros(1),
        "f.weight": torch.zeros(2, 2, dtype=FP8), "f.scale_weight": torch.ones(()),
        "ids": torch.zeros(2, 2, dtype=torch.int64), "f.scale_input": torch.ones(()),
        "scaled_fp8": torch.zeros(0, dtype=FP8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "m.st")
    header = read_header(tmp_path / "m.st")
    assert [k for k in sorted(header.tensors) if is_quantised(header, k)] == [
        "c.weight", "e.weight", "f.weight",
    ]  # fmt: skip
    assert helpers(header) == {"e.weight.absmax", "f.scale_weight", "f.scale_input", "scaled_fp8"}
    with Reader(tmp_path / "m.st") as reader:
        assert stored(reader, "a.weight") is None
        assert torch.equal(read_weight(reader, "b.weight"), torch.zeros(2, 2))
        for key, message in (("c", "an unknown format"), ("e", "bitsandbytes")):
            with pytest.raises(AdapterLabError, match=f"'{key}.weight' is stored in {message}"):
                read_weight(reader, f"{key}.weight")
    gone, _ = dequantised(header, ["f.weight"])
    assert gone == {"f.scale_weight", "f.scale_input", "scaled_fp8"}
    assert dequantised(header, [])[0] == set()
    assert dequantised(header, ["e.weight"])[0] == {"e.weight.absmax"}


def test_layers_listed_in_the_metadata(tmp_path):
    """With and without the prefix that the model has in the file."""
    table = {"format_version": "1.0", "layers": {
        "net.a": {"format": "float8_e4m3fn"}, "b": {"format": "nvfp9"},
    }}  # fmt: skip
    tensors = {}
    for name in ("net.a", "net.b"):
        tensors |= {
            f"{name}.weight": torch.ones(4, 4).to(FP8),
            f"{name}.weight_scale": torch.ones(()),
        }
    metadata = {"_quantization_metadata": json.dumps(table), "title": "x"}
    save_file(tensors, tmp_path / "m.st", metadata)
    with Reader(tmp_path / "m.st") as reader:
        assert stored(reader, "net.b.weight").format == "nvfp9"
        with pytest.raises(AdapterLabError, match="'net.b.weight' is stored in nvfp9"):
            read_weight(reader, "net.b.weight")
        _, left = dequantised(reader.header, ["net.b.weight"])
        assert json.loads(left["_quantization_metadata"])["layers"].keys() == {"net.a"}
        _, left = dequantised(reader.header, ["net.a.weight", "net.b.weight"])
        assert left == {"title": "x"}


@pytest.mark.timeout(20)
def test_time_grows_with_the_layers(tmp_path):
    """A moment for 4000; going through all tensors for each layer would take half a minute."""
    names = [f"blocks.{i}.q" for i in range(4000)]
    q, one = torch.zeros(2, 2, dtype=FP8), torch.ones(())
    tensors = {f"{n}.weight": q.clone() for n in names}
    tensors |= {f"{n}.weight_scale": one.clone() for n in names}
    table = {"layers": dict.fromkeys(names, {"format": "float8_e4m3fn"})}
    save_file(tensors, tmp_path / "m.st", {"_quantization_metadata": json.dumps(table)})
    with Reader(tmp_path / "m.st") as reader:
        assert all(stored(reader, f"{n}.weight").known for n in names)
        gone, left = dequantised(reader.header, [f"{n}.weight" for n in names])
    assert len(gone) == 4000 and not left


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weight_scale": torch.ones(5)}, "the scales do not fit the weight"),
        ({"weight_scale": torch.ones(()), "comfy_quant": mark()[:1]}, "is not JSON"),
        ({"comfy_quant": mark(format="float8_e4m3fn")}, "has no scale beside it"),
        ({"weight_scale": torch.ones(7), "comfy_quant": mark(format="mxfp8")}, "do not fit"),
        ({"weight_scale": torch.ones(()), "comfy_quant": mark(format="nvfp4")},
         "the scale of the whole weight is missing"),
        ({"weight_scale": torch.ones(()), "comfy_quant":
          mark(format="int8_tensorwise", convrot=True, convrot_groupsize=8)},
         "the rotation does not fit the weight"),
        ({"weight_scale": torch.ones(()), "comfy_quant":
          mark(format="int8_tensorwise", convrot=True, convrot_groupsize="4")},
         "the size of the rotation is no number"),
    ],
)  # fmt: skip
def test_malformed(tmp_path, more, message):
    with pytest.raises(AdapterLabError, match=message):
        read(tmp_path, {"weight": torch.ones(8, 32).to(FP8), **more})
