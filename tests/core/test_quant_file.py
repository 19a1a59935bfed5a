"""Model files to quantised ones: what is in them, and what stays."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_lab.core.files import Adapter
from adapter_lab.core.merge.bake import bake
from adapter_lab.core.quant import Quantised, Settings, quantize, quantize_file
from quant_files import (
    LAYERS,
    TEXT,
    WIDTH,
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
from torch import Tensor


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "small.safetensors"


@pytest.mark.parametrize("full_precision", [False, True])
def test_what_a_file_holds(model, out, full_precision):
    report = quantize_file(model, out, full_precision=full_precision)
    before, after = load_file(model), load_file(out)
    assert set(report.layers) == set(LAYERS)
    more = {"full_precision_matrix_mult": True} if full_precision else {}
    said = {"format": "float8_e4m3fn", **more}
    for path in LAYERS:
        q, scale = fp8(before.pop(f"{path}.weight"))
        assert same(after.pop(f"{path}.weight"), q), path
        assert same(after.pop(f"{path}.weight_scale"), scale), path
        mark, layer = after.pop(f"{path}.comfy_quant"), report.layers[path]
        assert json.loads(bytes(mark.tolist())) == said
        assert (layer.before, layer.after) == (2 * q.numel(), q.numel() + 4 + mark.numel())
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)
    assert report.before == sum(t.nbytes for t in load_file(model).values())
    assert report.after == sum(t.nbytes for t in load_file(out).values())


def test_metadata(model, out):
    quantize_file(model, out)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    source = {"name": "model.safetensors", "sha256": digest}
    found = metadata(out)
    assert json.loads(found.pop("adapter_lab.quantised")) == {"format": "fp8_e4m3",
                                                              "source": source}  # fmt: skip
    assert found == {"modelspec.title": "mine", "ss_steps": "10"}
    given = Adapter(lora(WORST), name="cat.safetensors")
    report = quantize_file(model, out, adapters=[(given, 0.5)], overwrite=True, architecture="flux")
    assert "FLUX.1" in dict(report.facts)["cat.safetensors"]
    found = metadata(out)
    assert found["modelspec.merged_from"] == "model, cat"
    assert json.loads(found["adapter_lab.baked"]) == [{"name": "cat.safetensors", "strength": 0.5}]


@pytest.mark.parametrize("form", ["fp8_e4m3", "nvfp4"])
def test_in_memory_it_is_the_model_of_the_file(tmp_path, out, form):
    """Under the names of the file, without the other parts of a checkpoint."""
    state = {f"model.diffusion_model.{name}": t for name, t in weights().items()}
    save_file({**state, "vae.decoder.conv_in.weight": random(4, 4)}, tmp_path / "m.safetensors")
    report = quantize_file(tmp_path / "m.safetensors", out, format=form)
    made, told, other = quantize(tmp_path / "m.safetensors", Settings(form))
    written = load_file(out)
    assert written.keys() - made.keys() == {"vae.decoder.conv_in.weight"}
    assert all(same(tensor, written[name]) for name, tensor in made.items())
    assert other.layers == report.layers
    assert told.keys() == metadata(out).keys()


def test_other_parts_of_a_checkpoint_stay_as_they_are(tmp_path, out):
    """A text encoder that is quantised too: ComfyUI runs both."""
    state = {f"model.diffusion_model.{name}": t for name, t in weights().items()}
    q, scale = fp8(random(WIDTH, WIDTH))
    other = {
        f"{TEXT}.weight": q, f"{TEXT}.scale_weight": scale, "text_encoders.t5xxl.scaled_fp8": q[:0],
        "vae.decoder.conv_in.weight": random(16, 4, 3, 3), "vae.ids": torch.arange(7),
        "vae.encoder.big.weight": random(256, 256).to(torch.float8_e5m2),
    }  # fmt: skip
    save_file(state | other, tmp_path / "m.safetensors")
    report = quantize_file(tmp_path / "m.safetensors", out, format="mxfp8")
    assert set(report.layers) == set(LAYERS)
    found = load_file(out)
    assert all(same(found[name], tensor) for name, tensor in other.items())


def test_adapters_of_text_encoders_count_in_files_only(tmp_path, out):
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in weights().items()}
    save_file(state | {f"{TEXT}.weight": random(WIDTH, WIDTH)}, tmp_path / "m.safetensors")
    name = TEXT.replace("text_encoders.t5xxl.transformer.", "lora_te3_").replace(".", "_")
    up, down = random(WIDTH, 4), random(4, WIDTH)
    given = lora(WORST) | {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    whole = quantize_file(tmp_path / "m.safetensors", out, adapters=[(given, 1.0)])
    part = quantize(tmp_path / "m.safetensors", Settings(adapters=[(given, 1.0)]))[2]
    assert not same(load_file(out)[f"{TEXT}.weight"], random(WIDTH, WIDTH))
    assert set(part.warnings) - set(whole.warnings) == {
        "What the adapters do to 1 weight of the checkpoint's other parts is left out, such as to "
        f"'{TEXT}.weight': this makes the diffusion model only"
    }


def test_the_text_names_the_blocks_that_stay_and_how_much_does(tmp_path, out):
    mods = {f"double_blocks.{n}.img_mod.lin.weight": random(256, 128) for n in range(6)}
    save_file(weights() | mods, tmp_path / "m.safetensors")
    text = quantize_file(tmp_path / "m.safetensors", out).to_text()
    assert text.endswith("sensitive to it: double_blocks.*.img_mod.lin (6), img_in")
    parts = ("weight", "weight_scale", "comfy_quant")
    ours = {f"{path}.{part}" for path in LAYERS for part in parts}
    rest = sum(t.nbytes for key, t in load_file(out).items() if key not in ours) / 1e3
    assert f"7 linear layers as they are; all that is not quantised is {rest:.1f} kB" in text


def test_single_numbers_empty_and_odd_tensors(tmp_path, out):
    odd = {"scale": torch.tensor(2.5), "empty": torch.zeros(0, 7), "flag": torch.tensor(True),
           "double_blocks.0.txt_mlp.0.weight": random(301, 67), "ids": torch.arange(5)}  # fmt: skip
    save_file(weights() | odd, tmp_path / "m.safetensors")
    report = quantize_file(tmp_path / "m.safetensors", out)
    assert report.kept["double_blocks.0.txt_mlp.0"] == "301 x 67 does not fit the format"
    found = load_file(out)
    assert all(same(found[name], tensor) for name, tensor in odd.items())


def test_the_budget_keeps_what_loses_most(model, out):
    """Errors by the bytes of a file without one."""
    quantize_file(model, out, format="int8_row")
    before, after, errors = load_file(model), load_file(out), dict[str, float]()
    for path in LAYERS:
        exact = before[f"{path}.weight"].float()
        back = after[f"{path}.weight"].float() * after[f"{path}.weight_scale"]
        errors[path] = float((back - exact).norm() / exact.norm())
    ranked = sorted(errors, key=lambda path: -errors[path])
    whole = quantize_file(model, out, format="int8_row", overwrite=True)
    assert [path for path, _ in whole.worst] == ranked
    assert all(abs(whole.layers[path].error - errors[path]) < 1e-6 for path in LAYERS)
    sizes = {path: math.prod(shape) for path, shape in LAYERS.items()}
    mean = sum(errors[path] * sizes[path] for path in LAYERS) / sum(sizes.values())
    assert whole.error == pytest.approx(mean, rel=1e-4)
    most = (errors[ranked[0]] + errors[ranked[1]]) / 2
    for more, kept in (({"worst": 2}, 2), ({"most": most}, 1), ({"worst": 2, "most": most}, 2)):
        report = quantize_file(model, out, format="int8_row", overwrite=True, **more)
        assert set(LAYERS) & set(report.kept) == set(ranked[:kept]), more
        assert set(report.layers) == set(ranked[kept:]), more
    refused("budget leaves no layer", model, out, worst=5, overwrite=True)


def test_adapters_are_merged_before(model, tmp_path, out):
    """In float32, kept layers, biases and all: as a file baked in float32 and quantised then."""
    path, kept = "double_blocks.0.img_mlp.0", "double_blocks.0.img_mod.lin"
    bias = {f"diffusion_model.{path}.diff_b": random(4 * WIDTH, seed=7)}
    save_file(first := {**lora(path), **lora(kept, seed=95), **bias}, tmp_path / "a.safetensors")
    given = [(tmp_path / "a.safetensors", 0.7), (lora(path, seed=99), -0.5)]
    report = quantize_file(model, out, adapters=given)
    before, found = load_file(model), load_file(out)
    up, down, _ = (t.double() for t in lora(path).values())
    up2, down2, _ = (t.double() for t in lora(path, seed=99).values())
    exact = before[f"{path}.weight"].double() + 0.35 * up @ down - 0.25 * up2 @ down2
    q, scale = fp8(exact)
    torch.testing.assert_close(found[f"{path}.weight_scale"], scale)
    # Next to a tie the last digit of float32 decides; rounded to bf16 before, 3 % would differ.
    assert (found[f"{path}.weight"].float() != q.float()).float().mean() < 1e-3
    wanted = before[f"{path}.bias"].float() + 0.7 * first[f"diffusion_model.{path}.diff_b"]
    assert same(found[f"{path}.bias"], wanted.bfloat16())
    assert not same(found[f"{kept}.weight"], before[f"{kept}.weight"])
    assert found[f"{kept}.weight"].dtype == torch.bfloat16
    bake(model, tmp_path / "wide.safetensors", given, dtype="fp32")
    quantize_file(tmp_path / "wide.safetensors", tmp_path / "twice.safetensors")
    twice = load_file(tmp_path / "twice.safetensors")
    assert all(same(found[f"{n}.weight"], twice[f"{n}.weight"]) for n in LAYERS)
    assert "a.safetensors: strength 0.7, " in report.to_text()


def test_a_strength_of_0_merges_nothing(model, tmp_path, out):
    report = quantize_file(model, out, adapters=[(Adapter(lora(WORST), name="cat"), 0.0)])
    assert ("cat", "strength 0, not merged") in report.facts
    plain = tmp_path / "plain.safetensors"
    quantize_file(model, plain)
    assert out.read_bytes() == plain.read_bytes()


def test_an_adapter_that_enlarges_a_layer(model, out):
    path = "double_blocks.0.img_mlp.0"
    up, down = random(4 * WIDTH, 4) * 0.1, random(4, 2 * WIDTH, seed=1) * 0.1
    parts = {"lora_up.weight": up, "lora_down.weight": down,
             "reshape_weight": torch.tensor([4 * WIDTH, 2 * WIDTH])}  # fmt: skip
    adapter = {f"diffusion_model.{path}.{name}": tensor for name, tensor in parts.items()}
    report = quantize_file(model, out, adapters=[(adapter, 1.0)])
    wide = torch.nn.functional.pad(load_file(model)[f"{path}.weight"].float(), (0, WIDTH))
    q, scale = fp8(wide + up @ down)
    found = load_file(out)
    assert found[f"{path}.weight"].shape == q.shape
    back = found[f"{path}.weight"].float() * found[f"{path}.weight_scale"]
    torch.testing.assert_close(back, q.float() * scale, rtol=0.13, atol=1e-6)
    assert report.layers[path].numbers == q.numel()


def test_adapters_that_do_not_fit(model, out):
    other = {f"diffusion_model.blocks.0.ffn.0.{n}": torch.ones(8, 8) for n in
             ("lora_up.weight", "lora_down.weight")}  # fmt: skip
    refused("Nothing in the adapter fits", model, out, adapters=[(other, 1.0)])
    partly = {**lora(WORST), **other}
    report = quantize_file(model, out, adapters=[(partly, 1.0)])
    assert any("1 module of the adapters left out, such as" in w for w in report.warnings)
    for path in (WORST, "double_blocks.0.img_mod.lin"):
        huge = {name: t * 1e25 for name, t in lora(path).items()}
        refused(f"adapters make '{path}.weight' larger", model, out, adapters=[(huge, 1.0)],
                overwrite=True)  # fmt: skip


def musubi(path: Path) -> dict[str, Tensor]:
    """Scales of one a row, which musubi-tuner calls ``scale_weight``, in bf16."""
    state = weights()
    for name in LAYERS:
        weight = state.pop(f"{name}.weight").float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        state[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{name}.scale_weight"] = scale.bfloat16()
    listed = {n: {"format": "float8_e4m3fn"} for n in (*LAYERS, "img_in")}  # the last in vain
    table = {"format_version": "1.0", "layers": listed}
    save_file(state, path, {"_quantization_metadata": json.dumps(table)})
    return state


def test_layouts_that_comfyui_can_not_run_are_made_anew(tmp_path, out):
    before = musubi(tmp_path / "m.safetensors")
    path = "double_blocks.0.img_mlp.0"
    report = quantize_file(tmp_path / "m.safetensors", out, format="int8_row",
                           keep=[WORST], adapters=[(lora(path), 1.0)])  # fmt: skip
    assert any(name == "was quantised before" for name, _ in report.facts)
    found = load_file(out)
    assert not [key for key in found if key.endswith("scale_weight")]
    assert "_quantization_metadata" not in metadata(out)
    plain = {n: before[f"{n}.weight"].float() * before[f"{n}.scale_weight"].float() for n in LAYERS}
    assert same(found[f"{WORST}.weight"], plain[WORST].bfloat16())
    up, down, _ = lora(path).values()
    exact = plain[path] + up @ down / 2
    scale = found[f"{path}.weight_scale"]
    torch.testing.assert_close(scale, exact.abs().amax(1, keepdim=True) / 127)
    back = found[f"{path}.weight"].float() * scale
    assert bool((back - exact).abs().le(scale * 0.501).all())


def test_one_layer_that_comfyui_can_not_run_is_enough(tmp_path, out):
    """The file is one of ``scaled_fp8``, a scale of which is one a row."""
    state = weights()
    for name in LAYERS:
        state[f"{name}.weight"], state[f"{name}.scale_weight"] = fp8(state[f"{name}.weight"])
    state[f"{WORST}.scale_weight"] = state[f"{WORST}.scale_weight"].expand(WIDTH, 1).contiguous()
    state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(state, tmp_path / "m.safetensors")
    report = quantize_file(tmp_path / "m.safetensors", out, keep=[WORST, ".*img_attn.*"])
    found = load_file(out)
    for name in LAYERS:  # numbers that fp8 has are these again
        scale = found.get(f"{name}.weight_scale", 1.0)
        exact = state[f"{name}.weight"].float() * state[f"{name}.scale_weight"]
        rtol = 0 if f"{name}.comfy_quant" in found else 2.0**-8
        torch.testing.assert_close(found[f"{name}.weight"].float() * scale, exact, rtol=rtol,
                                   atol=1e-6)  # fmt: skip
    assert not [key for key in found if key.endswith(("scale_weight", "scaled_fp8"))]
    # Three of five layers stay, in bf16 now.
    before, after = (sum(t.nbytes for t in made.values()) for made in (state, found))
    assert (report.before, report.after) == (before, after) and after > before
    assert dict(report.totals())["grown"].startswith(f"{(after - before) / 1e3:.1f} kB, ")


def test_what_comfyui_runs_quantised_is_refused(model, tmp_path, out):
    quantize_file(model, tmp_path / "small.safetensors")
    with pytest.raises(Quantised, match=r"is quantised already: found '.+' in float8_e4m3fn"):
        quantize_file(tmp_path / "small.safetensors", out)
    cast = {n: t.to(torch.float8_e4m3fn) for n, t in weights().items()}
    save_file(cast, tmp_path / "cast.safetensors")
    refused("is quantised already: found '.+' in F8_E4M3", tmp_path / "cast.safetensors", out)


def test_the_report_is_short_and_plain(model, out):
    report = quantize_file(model, out, format="nvfp4", architecture="flux")
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    lines = report.to_text().splitlines()
    assert re.fullmatch(r"FLUX\.1.*: 5 layers to nvfp4, [\d.]+ kB -> [\d.]+ kB", lines[0])
    assert len(lines) < 20
    # 4 bits and 8 bits every 16 numbers; marks and the scale of the whole come on top.
    assert 4.5 < report.bits < 4.6
    errors = [layer["error"] for layer in report.to_dict()["layers"].values()]
    assert errors == sorted(errors, reverse=True) and len(errors) == len(LAYERS)
    totals = dict(report.totals())
    assert f"at most {errors[0]:.2%} ({report.worst[0][0]})" in totals["error"]
    before, after = (sum(t.nbytes for t in load_file(path).values()) for path in (model, out))
    share = f"{1 - after / before:.0%} of the file"
    assert totals["saved"] == f"{(before - after) / 1e3:.1f} kB, {share}"


MEMORY = """
import sys, threading
from adapter_lab.core.quant import quantize_file
def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024
src, small, out, *adapters = sys.argv[1:]
given = [(path, 1.0) for path in adapters]
quantize_file(small, out, overwrite=True)
before, highest, done = private(), 0.0, threading.Event()
def look():
    global highest
    while not done.wait(0.001):
        highest = max(highest, private())
thread = threading.Thread(target=look)
thread.start()
quantize_file(src, out, adapters=given, worst=1, overwrite=True)
done.set()
thread.join()
print(highest - before)
"""


def test_memory_is_that_of_two_tensors(model, tmp_path, out):
    """Of a file of 12 layers of 8 MiB in bf16, which are merged in float32."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs the memory of a process")
    side, layers = 2048, [f"double_blocks.{i}.img_attn.proj" for i in range(12)]
    one = (random(side, side) * 0.02).bfloat16()
    save_file({f"{n}.weight": one.clone() for n in layers}, tmp_path / "big.safetensors")
    adapter = {f"diffusion_model.{n}.{x}.weight": random(*s) * 0.01 for n in layers
               for x, s in (("lora_up", (side, 4)), ("lora_down", (4, side)))}  # fmt: skip
    save_file(adapter, tmp_path / "lora.safetensors")
    words = [tmp_path / "big.safetensors", model, out, tmp_path / "lora.safetensors"]
    direct = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back
    done = subprocess.run([sys.executable, "-c", MEMORY, *words], env=direct, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Beside these two the result of the layer before, which is being written.
    assert float(done.stdout) < (2 * 4 + 1) * side * side / 2**20 + 16
