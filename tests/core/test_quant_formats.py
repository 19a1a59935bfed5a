"""Formats of quantised weights against their definitions, one number at a time."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import adapter_lab.core.quant.encode as encoding
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.quant.encode import encode, largest
from adapter_lab.core.quant.formats import FORMATS, e4m3
from adapter_lab.core.stored import read_weight, runs, stored
from adapter_lab.core.stored.layouts import LAYOUTS, rotated, tiled, tiled_up
from adapter_lab.core.streams import Reader
from safetensors.torch import save_file

# All sizes of each kind of number, by code: exponents and mantissas written out.
E4M3 = [m / 8 * 2.0**-6 for m in range(8)]
E4M3 += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
E2M1 = [m / 2 for m in range(2)] + [
    (1 + m / 2) * 2.0 ** (e - 1) for e in range(1, 4) for m in (0, 1)
]
INT8 = [float(n) for n in range(128)]


def nearest(number, table):
    """The code of the nearest size; the even one of two."""
    away = [abs(Fraction(abs(number)) - Fraction(size)) for size in table]
    best = min(away)
    return min((code for code, gap in enumerate(away) if gap == best), key=lambda code: code % 2)


def float32(number):
    return float(torch.tensor(number, dtype=torch.float32))


def weights(rows=3, columns=64, seed=0, outliers=True):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng) * 0.02
    if outliers:
        weight[0, 5], weight[1, :32], weight[2, 7] = -0.7, 0.0, -0.0
        weight[2, 16:32] *= 1e-4
    return weight


def ours(name, weight, **more):
    return encode(FORMATS[name], weight, largest(weight), **more)


def back(name, weight):
    """What the quantised weight stands for, as the reading side has it."""
    made, _ = ours(name, weight)
    layout = LAYOUTS[FORMATS[name].native]
    return layout(made["weight"], made["weight_scale"], made, FORMATS[name].options(weight.shape))


def by_hand(weight, scale_of, table, group):
    """[[(number, its scale, code, sign)]]: each number over its scale, rounded."""
    rows = []
    for row in weight.tolist():
        groups = [row[start : start + group] for start in range(0, len(row), group)]
        scales = [scale_of(max(map(abs, one))) for one in groups]
        rows.append([
            (number, scale, nearest(float32(number / scale) if scale else 0.0, table), number < 0)
            for one, scale in zip(groups, scales, strict=True) for number in one
        ])  # fmt: skip
    return rows


def codes(rows):
    return [[code for _, _, code, _ in row] for row in rows]


def test_the_codes():
    assert len(E4M3) == 127 and E4M3[e4m3.END] == e4m3.LARGEST and E4M3[e4m3.NORMAL] == 2.0**-6
    assert E2M1 == [0, 0.5, 1, 1.5, 2, 3, 4, 6] and E2M1[FORMATS["nvfp4"].normal] == 1.0
    assert e4m3.NORMAL == 8 and FORMATS["nvfp4"].end == 7 and FORMATS["int8_row"].end == 127


def test_e4m3_as_float32():
    """All 254 codes that are no NaN, with their signs."""
    stored = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    hand = torch.tensor([E4M3[int(c) & 0x7F] * (-1 if int(c) & 0x80 else 1) for c in stored])
    read = e4m3.numbers(stored.view(torch.float8_e4m3fn), torch.tensor(1.0))
    assert torch.equal(read, hand) and torch.equal(read.signbit(), stored >= 0x80)
    assert torch.equal(e4m3.numbers(stored.view(torch.float8_e4m3fn), torch.tensor(0.5)), hand / 2)


def test_fp8():
    weight = weights()
    made, _ = ours("fp8_e4m3", weight)
    scale = float32(float(weight.abs().max()) / 448)
    assert made["weight_scale"].item() == scale and made["weight_scale"].shape == ()
    inverse = float32(1 / scale)
    hand = [[nearest(float32(w * inverse), E4M3) for w in row] for row in weight.tolist()]
    stored = made["weight"].view(torch.uint8)
    assert (stored & 127).tolist() == hand and torch.equal(stored >= 128, weight.signbit())


def test_int8():
    weight = weights()
    made, _ = ours("int8_row", weight)
    rows = by_hand(weight, lambda peak: float32(peak / 127), INT8, 64)
    assert made["weight_scale"].tolist() == [[row[0][1]] for row in rows]
    assert made["weight"].tolist() == [[-c if down else c for *_, c, down in row] for row in rows]


def test_int8_rotated():
    """Groups of 256, 64 or 16 columns, the largest that divides them; else rows as they are."""
    for columns, group in ((512, 256), (320, 64), (48, 16), (40, None)):
        weight = weights(columns=columns)
        made, quality = ours("int8_convrot", weight)
        turned = weight.clone()
        if group:
            four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1.0]])
            matrix = torch.ones(1, 1)
            while len(matrix) < group:
                matrix = torch.kron(matrix, four)
            parts = weight.double().reshape(3, -1, group)
            turned = (parts @ (matrix.double() / math.sqrt(group))).reshape(3, columns).float()
        plain, _ = ours("int8_row", turned)
        said = FORMATS["int8_convrot"].options((3, columns))
        assert said == ({"convrot": True, "convrot_groupsize": group} if group else {})
        torch.testing.assert_close(made["weight_scale"], plain["weight_scale"])
        # A number next to a tie may fall on its other side.
        assert (made["weight"].int() - plain["weight"].int()).abs().max() <= 1
        assert (made["weight"] != plain["weight"]).float().mean() < 0.01
        lost = float((back("int8_convrot", weight) - weight).norm() / weight.norm())
        assert quality.error == pytest.approx(lost, rel=1e-4)


def test_mxfp8():
    """The least power of two at which a block of 32 fits into 448 (OCP MX 1.0, rounded up)."""
    weight = weights()

    def scale_of(peak):
        return next(2.0**e for e in range(-127, 128) if 2.0**e * 448 >= peak) if peak else 0.0

    rows = by_hand(weight, scale_of, E4M3, 32)
    made, _ = ours("mxfp8", weight)
    assert (made["weight"].view(torch.uint8) & 127).tolist() == codes(rows)
    assert torch.equal(made["weight"].view(torch.uint8) >= 128, weight.signbit())
    scales = tiled(made["weight_scale"].view(torch.uint8), 3, 2).tolist()
    hand = [[row[0][1], row[32][1]] for row in rows]
    assert [[2.0 ** (e - 127) if e else 0.0 for e in row] for row in scales] == hand
    assert made["weight_scale"].shape == (128, 4)
    # The scale of the first row's block is right at its end as well.
    exact = torch.full((1, 32), 448.0)
    assert tiled(ours("mxfp8", exact)[0]["weight_scale"].view(torch.uint8), 1, 1).item() == 127
    above = torch.full((1, 32), 449.0)
    assert tiled(ours("mxfp8", above)[0]["weight_scale"].view(torch.uint8), 1, 1).item() == 128
    # As it is next to it, where a rounded logarithm of another size would be whole.
    for power in (-30, 30):
        end = torch.tensor(448 * 2.0**power)
        for peak, more in ((end, 0), (end.nextafter(end * 2), 1), (end.nextafter(end / 2), 0)):
            scale = ours("mxfp8", peak.expand(1, 32))[0]["weight_scale"].view(torch.uint8)
            assert tiled(scale, 1, 1).item() == 127 + power + more


def test_nvfp4():
    weight = weights()
    whole = float32(float32(float(weight.abs().max())) / (448 * 6))
    made, _ = ours("nvfp4", weight)
    assert made["weight_scale_2"].item() == whole and made["weight_scale_2"].shape == ()
    fine = {}

    def scale_of(peak):
        asked = float32(float32(peak / 6) / whole)
        fine[peak] = E4M3[nearest(asked, E4M3)]
        return float32(fine[peak] * whole)

    rows = by_hand(weight, scale_of, E2M1, 16)
    stored = made["weight"]
    pairs = torch.stack([stored >> 4, stored & 15], -1).flatten(1)
    assert (pairs & 7).tolist() == codes(rows)
    alive = torch.tensor([[scale > 0 for _, scale, *_ in row] for row in rows])
    assert torch.equal(pairs >= 8, weight.signbit() & alive)
    peaks = weight.abs().reshape(3, 4, 16).amax(-1).tolist()
    scales = tiled(made["weight_scale"].float(), 3, 4).tolist()
    assert scales == [[fine[peak] for peak in row] for row in peaks]


def test_ties():
    """Each number halfway between two codes goes to the even one; all scales are 1."""
    made, _ = ours("int8_row", torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0]]))
    assert made["weight"].tolist() == [[127, 0, 2, 2, 0, -2, -2, 0]]
    for name in ("fp8_e4m3", "mxfp8"):
        weight = torch.tensor([[448.0, 17.0, 19.0, -17.0, -19.0, *[0.0] * 27]])
        read = ours(name, weight)[0]["weight"].float()
        assert read[0, :5].tolist() == [448, 16, 20, -16, -20]


def test_ties_of_e2m1():
    """The same, of positive and negative codes."""
    halves = [(a + b) / 2 for a, b in zip(E2M1, E2M1[1:], strict=False)]
    weight = torch.tensor([[6.0 * 448, *[0.0] * 15, 6.0, *halves, *(-h for h in halves), 0.0]])
    made, _ = ours("nvfp4", weight)  # the scales are 1, 448 and 1
    assert made["weight_scale_2"] == 1 and tiled(made["weight_scale"].float(), 1, 2)[0, 1] == 1
    pairs = torch.stack([made["weight"] >> 4, made["weight"] & 15], -1).flatten()[17:31]
    assert pairs.tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_lost(name, dtype):
    """Shares and error over all numbers, against the slow way."""
    form, weight = FORMATS[name], weights(48, 256).to(dtype)
    weight[9:12] = 0.0
    made, quality = ours(name, weight)
    exact = weight.double()
    error = float((back(name, weight).double() - exact).norm() / exact.norm())
    assert quality.error == pytest.approx(error, rel=1e-4)
    stored = made["weight"]
    if name == "nvfp4":
        sizes = torch.stack([stored >> 4, stored & 15], -1).flatten(1) & 7
    else:
        whole = name.startswith("int8")
        sizes = stored.int().abs() if whole else stored.view(torch.uint8) & 127
    assert quality.saturated == pytest.approx(float((sizes == form.end).double().mean()))
    rounded = rotated(weight.float(), 256) if name == "int8_convrot" else weight
    small = (sizes < form.normal) & (rounded != 0)
    assert quality.subnormal == pytest.approx(float(small.double().mean()))
    assert type(quality.saturated) is float and type(quality.subnormal) is float


@pytest.mark.parametrize("name", FORMATS)
def test_in_pieces(name, monkeypatch):
    """A row at a time gives the same bits as all of them, and the weight stays as it is."""
    weight = weights(40, 256).to(torch.bfloat16)
    before = weight.clone()
    whole, quality = ours(name, weight)
    monkeypatch.setattr(encoding, "_PIECE", 600)
    pieces, again = ours(name, weight)
    assert torch.equal(weight, before)
    for key, part in whole.items():
        assert torch.equal(
            part.reshape(-1).view(torch.uint8), pieces[key].reshape(-1).view(torch.uint8)
        )
    assert vars(again) == pytest.approx(vars(quality), rel=1e-5)
    layout = FORMATS[name].layout(tuple(weight.shape))
    assert {key: (part.dtype, tuple(part.shape)) for key, part in whole.items()} == layout


@pytest.mark.parametrize("power", [-83, -56, 0, 56, 100])
@pytest.mark.parametrize("name", FORMATS)
def test_the_error_of_any_size(name, power):
    """Their squares leave float32."""
    weight = weights(outliers=False)
    _, quality = ours(name, weight * 2.0**power)
    assert quality.error == pytest.approx(ours(name, weight)[1].error, rel=1e-4)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest(dtype):
    nan, inf = math.nan, math.inf
    for numbers, wanted in (
        ([0.5, -2.0, 1.0], 2.0), ([0.5, 3.0, -1.0], 3.0), ([-0.0, 0.0], 0.0), ([-0.0], 0.0),
        ([-0.5, -0.25], 0.5), ([2.0**-8], 2.0**-8), ([-(2.0**-9), 0.0], 2.0**-9),
        ([448.0, -416.0], 448.0),
    ):  # fmt: skip
        assert largest(torch.tensor([numbers]).to(dtype)) == wanted
    assert math.isnan(largest(torch.tensor([[1.0, nan, -5.0]]).to(dtype)))
    assert math.isnan(largest(torch.tensor([[1.0, -nan, 5.0]]).to(dtype)))
    if dtype != torch.float8_e4m3fn:
        assert largest(torch.tensor([[1.0, inf]]).to(dtype)) == inf
        assert largest(torch.tensor([[-inf, 1.0]]).to(dtype)) == inf
        assert math.isnan(largest(torch.tensor([[-inf, nan]]).to(dtype)))
    turned = torch.arange(12.0).reshape(3, 4).to(dtype).T
    assert largest(turned) == 11.0 and largest(turned[:, ::2]) == 11.0


def test_what_fits():
    sizes = {"fp8_e4m3": (16, 16), "int8_row": (8, 8), "int8_convrot": (8, 8),
             "mxfp8": (32, 32), "nvfp4": (16, 16)}  # fmt: skip
    assert set(sizes) == set(FORMATS)
    for name, (rows, columns) in sizes.items():
        fits = FORMATS[name].fits
        assert fits((rows, columns)) and fits((3 * rows, 5 * columns))
        assert not fits((rows // 2, columns)) and not fits((rows, columns + columns // 2))
        assert not fits((0, columns)) and not fits((rows, 0)) and not fits(())
        assert not fits((rows,)) and not fits((rows, columns, 1))


def test_marks():
    for name, form in FORMATS.items():
        said = json.loads(bytes(form.marker((32, 512)).tolist()))
        turned = {"convrot": True, "convrot_groupsize": 256} if name == "int8_convrot" else {}
        assert said == {"format": form.native, **turned}
        full = json.loads(bytes(form.marker((32, 512), full_precision=True).tolist()))
        assert full == {**said, "full_precision_matrix_mult": True}


def test_order_of_scales():
    """There and back, in tiles of 128 x 4."""
    scales = torch.arange(256 * 8, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(256, 8)
    ordered = tiled_up(scales)
    assert torch.equal(tiled(ordered, 256, 8), scales)
    # cuBLAS: offset (r % 32) * 16 + (r // 32) * 4 + c within a tile of 512.
    assert ordered.flatten()[512 + 5 * 16 + 2 * 4 + 3] == scales[69, 7]


def test_rotation():
    for size in (4, 16, 64, 256):
        weight = weights(3, 512)
        turned = rotated(weight, size)
        torch.testing.assert_close(rotated(turned, size), weight)
        torch.testing.assert_close(turned.norm(), weight.norm())
    for size in (0, 2, 8, 32, 128, 1024):
        with pytest.raises(AdapterLabError, match="the rotation does not fit"):
            rotated(weights(3, 512), size)


OUTLIERS = {  # of 1 in 1000, 20 times as large
    "none": lambda w, rng: w,
    "numbers": lambda w, rng: w * (1 + 19 * (torch.rand(w.shape, generator=rng) < 0.001)),
    "rows": lambda w, rng: w * (1 + 19 * (torch.arange(len(w)) % 1000 == 7))[:, None],
    "columns": lambda w, rng: w * (1 + 19 * (torch.arange(w.shape[1]) % 1000 == 7)),
}
# Relative errors measured on normal weights of 3072 x 3072 by another program, per cent.
MEASURED = {
    "fp8_e4m3": (2.65, 2.64, 2.63, 2.64),
    "int8_row": (0.85, 5.40, 0.86, 5.68),
    "int8_convrot": (0.85, 0.91, 0.86, None),
    "mxfp8": (2.65, 2.65, 2.65, 2.65),
    "nvfp4": (9.5, 9.3, 9.5, 9.3),
}


@pytest.mark.parametrize("kind", OUTLIERS)
@pytest.mark.parametrize("name", FORMATS)
def test_errors_of_normal_weights(name, kind):
    rng = torch.Generator().manual_seed(0)
    weight = OUTLIERS[kind](torch.randn(768, 3072, generator=rng) * 0.02, rng)
    measured = MEASURED[name][list(OUTLIERS).index(kind)]
    error = 100 * ours(name, weight)[1].error
    if measured is not None:
        assert error == pytest.approx(measured, rel=0.06)
    else:  # a rotation makes them harmless
        assert error < 1.5


Q = torch.ones(8, 32).to(torch.float8_e4m3fn)
I8 = torch.ones(8, 32).to(torch.int8)
MARK = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
ONE, ALL = torch.ones(()), torch.ones(8, 1)


@pytest.mark.parametrize(
    ("tensors", "metadata", "wanted"),
    [
        ({"n.weight": Q, "n.weight_scale": ONE, "n.comfy_quant": MARK}, {}, True),
        ({"n.weight": Q, "n.weight_scale": ALL, "n.comfy_quant": MARK}, {}, False),
        ({"n.weight": Q, "n.scale_weight": ONE, "n.comfy_quant": MARK}, {}, False),
        ({"n.weight": Q, "n.weight_scale": ONE}, {}, False),  # nothing says what it is
        ({"n.weight": Q, "n.weight_scale": ONE}, {"n": "float8_e4m3fn"}, True),
        ({"n.weight": I8, "n.weight_scale": ALL}, {"n": "int8_tensorwise"}, True),
        ({"n.weight": I8, "n.weight_scale": ALL[:, 0]}, {"n": "int8_tensorwise"}, False),
        ({"n.weight": Q, "n.scale_weight": ONE, "scaled_fp8": Q[:0]}, {}, True),
        ({"n.weight": Q, "n.scale_weight": ONE, "n.scaled_fp8": Q[:0]}, {}, True),
        ({"n.weight": Q, "n.scale_weight": ONE, "m.scaled_fp8": Q[:0]}, {}, False),
        ({"n.weight": Q, "n.scale_weight": ALL, "scaled_fp8": Q[:0]}, {}, False),
        # musubi-tuner's: by blocks of columns, by rows, of all; nothing marks them
        ({"n.weight": Q, "n.scale_weight": torch.ones(8, 4, 1)}, {}, False),
        ({"n.weight": Q, "n.scale_weight": ALL}, {}, False),
        ({"n.weight": Q, "n.scale_weight": ONE}, {}, False),
        ({"n.weight": Q, "n.weight_scale_inv": ONE}, {}, False),
    ],
)  # fmt: skip
def test_what_comfyui_runs(tmp_path, tensors, metadata, wanted):
    layers = {name: {"format": form} for name, form in metadata.items()}
    said = {"_quantization_metadata": json.dumps({"layers": layers})} if layers else None
    save_file(tensors, tmp_path / "m.st", said)
    with Reader(tmp_path / "m.st") as reader:
        assert runs(reader.header, stored(reader, "n.weight")) is wanted
        assert torch.equal(read_weight(reader, "n.weight"), torch.ones(8, 32))
