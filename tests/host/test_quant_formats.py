"""Formats of quantised weights against ComfyUI's own layouts (comfy-kitchen), bit for bit."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from adapter_lab.core.quant.encode import encode, largest
from adapter_lab.core.quant.formats import FORMATS, MARKER
from adapter_lab.core.stored import read_weight, runs, stored
from adapter_lab.core.streams import Reader
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor, get_layout_class
from safetensors.torch import save_file

ASKED = {
    "fp8_e4m3": {"scale": "recalculate"},
    "int8_row": {"per_channel": True},
    "int8_convrot": {"per_channel": True, "convrot": True},
    "mxfp8": {},
    "nvfp4": {},
}
ROWS, COLUMNS = 96, 256
HUGE = 2.9e38  # float32 ends at 3.4e38; int8 times its scale may end up beyond


def normal(rows=ROWS, columns=COLUMNS, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=rng) * 0.02


def changed(where, value):
    weight = normal()
    weight[where] = value
    return weight


def signed_zeros():
    weight = normal()
    weight[::2, 1::2] = 0.0
    weight[1::2, ::2] = -0.0
    return weight


def ties():
    """Numbers halfway between codes of each format, at scales that are powers of two."""
    halves = torch.arange(-(2 * COLUMNS), 2 * COLUMNS) / 4
    weight = halves.reshape(-1, COLUMNS).repeat(ROWS // 4, 1)
    weight[:, ::16] = torch.tensor([448.0, 127.0, 6.0, 96.0]).repeat(ROWS // 4)[:, None]
    weight[2::4] /= 16  # 6 is the largest of a block: e2m1 itself
    return weight.clamp(-448, 448)


BLOCK = (slice(3, 9), slice(32, 96))
WEIGHTS = {
    "normal": normal,
    "one outlier": lambda: changed((5, 7), 3.0),
    "outliers": lambda: normal() * (1 + 19 * (torch.rand(ROWS, COLUMNS) < 0.001)),
    "rows of outliers": lambda: changed(slice(4, 6), normal(2, seed=1) * 20),
    "columns of outliers": lambda: changed((slice(None), 9), 0.5),
    "rows of zeros": lambda: changed(slice(10, 20), 0.0),
    "blocks of zeros": lambda: changed(BLOCK, 0.0),
    "blocks of little": lambda: changed(BLOCK, 1e-9),
    "signed zeros": signed_zeros,
    "ties": ties,
    "integers": lambda: torch.arange(-128.0, 128.0).repeat(ROWS, 1),
    "huge": lambda: normal() * 1e30,
    "little": lambda: normal() * 1e-20,
    "odd tiles": lambda: normal(160, 288),
}


def kitchen(name, weight, **more):
    """What ComfyUI makes of a weight: (tensors by their name below the layer, numbers)."""
    layout = QUANT_ALGOS[FORMATS[name].native]["comfy_tensor_layout"]
    made = QuantizedTensor.from_float(weight, layout, **ASKED[name], **more)
    return {key: part.detach() for key, part in made.state_dict("weight").items()}, made


def ours(name, weight):
    return encode(FORMATS[name], weight, largest(weight))


def same(a, b):
    """Whether tensors have the same dtype, shape and bits."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def options(name, weight):
    """The group of a rotation where it is not 256."""
    size = FORMATS[name].options(tuple(weight.shape)).get("convrot_groupsize")
    return {"convrot_groupsize": size} if size else {}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", FORMATS)
def test_bits(name, kind):
    weight = WEIGHTS[kind]()
    before = weight.clone()
    made, quality = ours(name, weight)
    wanted, theirs = kitchen(name, weight, **options(name, weight))
    assert made.keys() == wanted.keys()
    assert [key for key in made if not same(made[key], wanted[key])] == []
    assert torch.equal(weight, before)
    exact, back = weight.double(), theirs.dequantize().double()
    assert quality.error == pytest.approx(float((back - exact).norm() / exact.norm()), rel=1e-4)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(32, 32), (16, 16), (48, 80), (16, 1040), (272, 48), (8, 24)])
def test_sizes(name, shape):
    """Those that fit give what ComfyUI's padding leaves as it is; rotations have other groups."""
    form, weight = FORMATS[name], normal(*shape)
    if not form.fits(shape):
        padded = get_layout_class(QUANT_ALGOS[form.native]["comfy_tensor_layout"])
        steps = form.multiple if name == "fp8_e4m3" else padded.get_padded_shape((1, 1))
        assert any(n % step for n, step in zip(shape, steps, strict=True))
        return
    made, _ = ours(name, weight)
    rotated = form.options(shape).get("convrot", False)
    assert rotated == (name == "int8_convrot" and shape[1] % 16 == 0)
    wanted, _ = kitchen("int8_row" if name == "int8_convrot" and not rotated else name, weight,
                        **options(name, weight))  # fmt: skip
    assert [key for key in made if not same(made[key], wanted[key])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_of_other_dtypes(name, dtype):
    """As of float32: ComfyUI calculates in the dtype of the weight, which costs digits."""
    weight = normal().to(dtype)
    made, quality = ours(name, weight)
    wanted, _ = kitchen(name, weight.float())
    assert [key for key in made if not same(made[key], wanted[key])] == []
    if dtype == torch.bfloat16:
        back = kitchen(name, weight)[1].dequantize().float()
        assert quality.error <= float((back - weight.float()).norm() / weight.float().norm())


@pytest.mark.parametrize("name", FORMATS)
def test_all_zeros(name):
    """comfy-kitchen divides by the scale of a weight, 0 here, and gives fp8 weights of NaN."""
    made, quality = ours(name, torch.zeros(ROWS, COLUMNS))
    assert vars(quality) == {"error": 0.0, "saturated": 0.0, "subnormal": 0.0}
    assert not made["weight"].view(torch.uint8).any()
    if name == "fp8_e4m3":
        assert kitchen(name, torch.zeros(ROWS, COLUMNS))[0]["weight"].float().isnan().all()
    assert not layer(FORMATS[name], made, (ROWS, COLUMNS)).weight.dequantize().any()


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-38, 1e-40, 1e-44])
@pytest.mark.parametrize("name", FORMATS)
def test_next_to_nothing(name, size):
    """Scales that float32 or e8m0 has no inverse of: finite, and never further off than 0."""
    weight = normal() * size / 0.02
    made, quality = ours(name, weight)
    back = layer(FORMATS[name], made, (ROWS, COLUMNS)).weight.dequantize()
    assert back.isfinite().all() and 0 <= quality.error < 1.01
    exact = weight.double()
    measured = float((back.double() - exact).norm() / exact.norm())
    assert measured < 1.01 and (size < 1e-35 or measured == pytest.approx(quality.error, abs=0.01))


@pytest.mark.parametrize("name", FORMATS)
def test_next_to_overflow(name):
    weight = normal() / 0.12 * HUGE
    weight[3, 5] = -HUGE
    made, quality = ours(name, weight)
    assert 0 < quality.error < 0.2
    assert all(part.float().isfinite().all() for key, part in made.items() if name != "mxfp8"
               or key == "weight")  # fmt: skip
    wanted, _ = kitchen(name, weight)
    assert [key for key in made if not same(made[key], wanted[key])] == []


def layer(form, tensors, shape, **more):
    """ComfyUI's linear layer with quantised weights."""
    ops = comfy.ops.mixed_precision_ops({}, compute_dtype=torch.float32)
    linear = ops.Linear(shape[1], shape[0], bias=False, device="cpu", dtype=torch.float32)
    mark = {MARKER: form.marker(shape, **more)} if form else {}
    linear.load_state_dict({**tensors, **mark})
    return linear


@pytest.mark.parametrize("columns", [256, 320, 96])
@pytest.mark.parametrize("name", FORMATS)
def test_read_and_run(tmp_path, name, columns):
    """A file's layer: what ``read_weight`` reads is what ComfyUI reads, and multiplies with."""
    form, shape = FORMATS[name], (ROWS, columns)
    made, quality = ours(name, normal(*shape))
    marked = {**made, MARKER: form.marker(shape, full_precision=True)}
    save_file({f"m.{key}": part for key, part in marked.items()}, tmp_path / "m.st")
    with Reader(tmp_path / "m.st") as reader:
        how = stored(reader, "m.weight")
        assert how.format == form.native and how.shape == shape and runs(reader.header, how)
        read = read_weight(reader, "m.weight")
    linear = layer(form, made, shape, full_precision=True)
    torch.testing.assert_close(read, linear.weight.dequantize(), rtol=1e-6, atol=1e-9)
    assert float((read - normal(*shape)).norm() / normal(*shape).norm()) == pytest.approx(
        quality.error, rel=1e-4
    )
    x = normal(7, columns, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ read.T, rtol=1e-2, atol=2e-4)
        exact = torch.allclose(linear(x), x @ read.T, rtol=1e-5, atol=1e-7)
    assert exact == form.dequantises


SHAPES = ((), (1,), (1, 1), (32,), (32, 1), (32, 2, 1), None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("native", ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise"])
def test_what_runs(tmp_path, native, shape):
    """``runs`` says whether ComfyUI's layer both multiplies and dequantises."""
    dtype = QUANT_ALGOS[native]["storage_t"]
    q = (normal(32, 64) * 2000).to(dtype)
    said = torch.tensor(list(f'{{"format": "{native}"}}'.encode()), dtype=torch.uint8)
    scale = {} if shape is None else {"weight_scale": torch.rand(shape) + 0.1}
    tensors = {"weight": q, "comfy_quant": said, **scale}
    save_file({f"m.{key}": part for key, part in tensors.items()}, tmp_path / "m.st")
    with Reader(tmp_path / "m.st") as reader:
        claimed = runs(reader.header, stored(reader, "m.weight"))
        read = read_weight(reader, "m.weight") if shape is not None else None
    x = normal(5, 64, seed=3)
    try:
        with torch.no_grad():
            linear = layer(None, tensors, (32, 64))
            y, back = linear(x), linear.weight.dequantize()
    except (ValueError, RuntimeError, AttributeError):
        assert not claimed
        return
    assert claimed and torch.equal(back, read)
    assert float((y - x @ read.T).norm() / y.norm()) < 0.1
