"""Adapters into model files: the numbers, the bytes that stay, the names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_lab.core.bake import merge_into
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter, read_header, write_adapter
from adapter_lab.core.lazy import AdapterFile
from adapter_lab.core.merge.bake import bake
from adapter_lab.core.merge.model_names import places
from adapter_samples import biases, samples
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES = {"linear": (16, 12), "convolution": (16, 12, 3, 3)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(path: str, out: int, width: int, seed: int = 1, alpha: float = 2.0) -> dict[str, Tensor]:
    return {
        f"{path}.lora_up.weight": random(out, 4, seed=seed),
        f"{path}.lora_down.weight": random(4, width, seed=seed + 100),
        f"{path}.alpha": torch.tensor(alpha),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers, a norm, a position table and metadata."""
    state = {
        "model.diffusion_model.a.weight": random(16, 12),
        "model.diffusion_model.a.bias": random(16, seed=1),
        "model.diffusion_model.b.weight": random(8, 8, seed=2).bfloat16(),
        "model.diffusion_model.norm.weight": random(12, seed=3).half(),
        "model.diffusion_model.scale": torch.tensor(10000.1),
        "model.diffusion_model.ids": torch.arange(7),
        "first_stage_model.d.weight": random(4, 4, seed=4),
    }
    path = tmp_path / "model.safetensors"
    stale = {"modelspec.hash_sha256": "0x1", "modelspec.title": "old", "modelspec.author": "me"}
    save_file(state, path, {**stale, "modelspec.date": "2024-01-01", "config": "{}"})
    return path


@pytest.mark.parametrize("source", ["memory", "file"])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_algorithm(tmp_path, kind, source):
    """As in the live model, whether the adapter is in memory or read a module at a time."""
    shape = SHAPES[kind]
    base = {"diffusion_model.a.weight": random(*shape), "diffusion_model.a.bias": random(16)}
    write_adapter(tmp_path / "model.safetensors", base)
    given = {**samples(shape), **biases(16)}
    given.pop("norm")
    given["dora"] = {**given["lora"], "dora_scale": 1 + random(16, *[1] * (len(shape) - 1)).abs()}
    for name, tensors in given.items():
        adapter = Adapter({f"diffusion_model.a.{k}": t for k, t in tensors.items()})
        taken = adapter
        if source == "file":
            write_adapter(taken := tmp_path / "adapter.safetensors", adapter)
        dst = tmp_path / "baked.safetensors"
        bake(tmp_path / "model.safetensors", dst, [(taken, 0.7)], overwrite=True)
        merged, _ = merge_into(base, adapter, 0.7)
        assert merged, name
        found, wanted = load_file(dst), {**base, **merged}
        assert all(torch.equal(found[key], wanted[key]) for key in base), name


def test_as_sd_scripts_merges(tmp_path):
    """Norms and first entries of what its ``networks/flux_merge_lora.py`` (48d368fa) wrote with
    ``--ratios 0.8 -0.5 --precision float --save_precision float`` for these files."""
    rng = torch.Generator().manual_seed(20)
    layers = {"double_blocks.0.img_attn.qkv": (48, 16), "double_blocks.0.txt_mlp.0": (64, 16),
              "single_blocks.0.linear2": (16, 80)}  # fmt: skip
    base = {f"{k}.weight": torch.randn(size, generator=rng) for k, size in layers.items()}
    save_file({**base, "img_in.weight": torch.randn(16, 8, generator=rng)}, tmp_path / "base.st")
    for name, rank, alpha in (("0", 4, 2.0), ("1", 8, 8.0)):
        file: dict[str, Tensor] = {}
        for path, (out, width) in layers.items():
            stem = f"lora_unet_{path.replace('.', '_')}"
            file[f"{stem}.lora_up.weight"] = torch.randn(out, rank, generator=rng)
            file[f"{stem}.lora_down.weight"] = torch.randn(rank, width, generator=rng)
            file[f"{stem}.alpha"] = torch.tensor(alpha)
        save_file(file, tmp_path / name)
    given = [(tmp_path / "0", 0.8), (tmp_path / "1", -0.5)]
    bake(tmp_path / "base.st", tmp_path / "baked.st", given)
    found = load_file(tmp_path / "baked.st")
    theirs = {
        "double_blocks.0.img_attn.qkv": (54.07183711600653, 2.7824618816375732, 0.9085323810577393),
        "double_blocks.0.txt_mlp.0": (58.00913609455695, 3.037111282348633, -1.7429418563842773),
        "single_blocks.0.linear2": (74.90227574722088, 1.8233320713043213, 1.0664594173431396),
    }
    for path, wanted in theirs.items():
        weight = found[f"{path}.weight"].double()
        ours = (weight.norm().item(), weight[0, 0].item(), weight[0, 2].item())
        assert ours == pytest.approx(wanted, rel=1e-6)


def test_what_no_adapter_touches_keeps_its_bytes(model, tmp_path):
    dst = tmp_path / "baked.safetensors"
    outcome = bake(model, dst, [(lora("diffusion_model.a", 16, 12), 0.5)])
    before, after = load_file(model), load_file(dst)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"model.diffusion_model.a.weight"}
    assert {k: t.dtype for k, t in before.items()} == {k: t.dtype for k, t in after.items()}
    assert outcome.to_text().startswith("1 of 1 modules baked into 1 of 7 tensors\nmodel: model.")
    assert outcome.rows["diffusion_model.a"].note == "into model.diffusion_model.a.weight"
    again = tmp_path / "again" / dst.name
    bake(model, again, [(lora("diffusion_model.a", 16, 12), 0.5)])
    assert again.read_bytes() == dst.read_bytes()


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32")])
def test_dtype_is_of_all_but_single_numbers_and_integers(model, tmp_path, dtype, kind):
    dst = tmp_path / "baked.safetensors"
    bake(model, dst, [(lora("diffusion_model.a", 16, 12), 1.0)], dtype=dtype)
    infos = read_header(dst).tensors
    assert {i.dtype for k, i in infos.items() if not k.endswith((".scale", ".ids"))} == {kind}
    assert infos["model.diffusion_model.scale"].dtype == "F32"
    assert infos["model.diffusion_model.ids"].dtype == "I64"


def test_precision_rounds_before_and_after_each_adapter(model, tmp_path):
    dst, diff = tmp_path / "baked.safetensors", random(16, 12, seed=5) / 64
    bake(model, dst, [({"diffusion_model.a.diff": diff}, m) for m in (1.0, 0.5)], precision="bf16")
    weight = load_file(model)["model.diffusion_model.a.weight"].bfloat16().float()
    wanted = ((weight + diff).bfloat16().float() + diff / 2).bfloat16().float()
    assert torch.equal(load_file(dst)["model.diffusion_model.a.weight"], wanted)


def test_rows_in_another_order_are_so_from_a_file_too(tmp_path):
    """diffusers has the halves of FLUX.1's last modulation the other way round."""
    base = {"final_layer.adaLN_modulation.1.weight": random(16, 8),
            "double_blocks.0.img_attn.qkv.weight": random(24, 8)}  # fmt: skip
    save_file(base, tmp_path / "model.st")
    write_adapter(tmp_path / "adapter.st", given := lora("transformer.norm_out.linear", 16, 8))
    bake(tmp_path / "model.st", tmp_path / "o.st", [(tmp_path / "adapter.st", 1.0)],
         architecture="flux")  # fmt: skip
    key = "final_layer.adaLN_modulation.1.weight"
    delta = load_file(tmp_path / "o.st")[key] - base[key]
    up, down, _ = given.values()
    torch.testing.assert_close(delta, (up @ down / 2).roll(8, 0))


def test_random_matrices_that_no_file_holds(tmp_path):
    """VeRA's, made from the seed in its config for the widest layer that was trained."""
    base = {f"{name}.weight": random(*size) for name, size in {"a": (6, 20), "b": (9, 5)}.items()}
    save_file(base, tmp_path / "model.st")
    config = {"r": 3, "projection_prng_key": 77, "peft_type": "VERA"}
    adapter = Adapter(config=config)
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        adapter[f"{stem}.vera_lambda_b"] = random(len(weight), seed=6)
        adapter[f"{stem}.vera_lambda_d"] = random(3, seed=7)
    write_adapter(tmp_path / "adapter.st", adapter)
    wanted, _ = merge_into(base, adapter)
    for given in (adapter, AdapterFile(tmp_path / "adapter.st", config)):
        bake(tmp_path / "model.st", tmp_path / "o.st", [(given, 1.0)], overwrite=True)
        found = load_file(tmp_path / "o.st")
        assert all(torch.equal(found[key], wanted[key]) for key in base)


def test_random_matrices_of_a_text_encoder_alone(tmp_path):
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    key = f"cond_stage_model.transformer.{layer}.weight"
    base = {key: random(6, 20), "model.diffusion_model.a.weight": random(4, 4)}
    save_file(base, tmp_path / "model.st")
    config = {"r": 3, "projection_prng_key": 77, "peft_type": "VERA"}
    stem = f"text_encoders.clip_l.transformer.{layer}"
    vectors = {f"{stem}.vera_lambda_b": random(6), f"{stem}.vera_lambda_d": random(3)}
    adapter = Adapter(vectors, config=config)
    write_adapter(tmp_path / "adapter.st", adapter)
    file = AdapterFile(tmp_path / "adapter.st", config)
    bake(tmp_path / "model.st", tmp_path / "o.st", [(file, 1.0)])
    wanted, _ = merge_into(base, adapter)
    assert torch.equal(load_file(tmp_path / "o.st")[key], wanted[key])


@pytest.mark.parametrize("size", [(8,), ()])
def test_parameters_that_are_called_bias_and_single_numbers(tmp_path, size):
    """A bias without a weight beside it is a parameter of its own."""
    base = {"a.weight": random(4, 4), "head.bias": random(*size), "scale": random()}
    save_file(base, tmp_path / "model.st")
    adapter = {f"diffusion_model.{k}.diff": random(*t.shape, seed=9) for k, t in base.items()
               if k != "a.weight"}  # fmt: skip
    save_file(adapter, tmp_path / "adapter.st")
    bake(tmp_path / "model.st", tmp_path / "o.st", [(tmp_path / "adapter.st", 1.0)])
    found = load_file(tmp_path / "o.st")
    for key in ("head.bias", "scale"):
        assert torch.equal(found[key], base[key] + adapter[f"diffusion_model.{key}.diff"])


def test_metadata(model, tmp_path):
    dst, second = tmp_path / "new_name_00001_.safetensors", tmp_path / "second.safetensors"
    bake(model, dst, [(Adapter(lora("diffusion_model.a", 16, 12), name="x.safetensors"), 0.5)])
    metadata = read_header(dst).metadata
    assert metadata == {
        "modelspec.title": "new_name_00001", "modelspec.merged_from": "model, x",
        "modelspec.author": "me", "config": "{}",
        "adapter_lab.baked": '[{"name": "x.safetensors", "strength": 0.5}]',
    }  # fmt: skip
    bake(dst, second, [(Adapter(lora("diffusion_model.b", 8, 8), name="y.safetensors"), 1.0)])
    baked = json.loads(read_header(second).metadata["adapter_lab.baked"])
    assert [row["name"] for row in baked] == ["x.safetensors", "y.safetensors"]


def test_an_adapter_that_enlarges_a_weight(tmp_path):
    """Zeros around W, as FLUX.1's control files ask for."""
    base = {"img_in.weight": random(16, 8), "double_blocks.0.img_attn.qkv.weight": random(48, 16)}
    save_file(base, tmp_path / "model.st")
    adapter = {**lora("diffusion_model.img_in", 16, 20),
               "diffusion_model.img_in.reshape_weight": torch.tensor([16, 20])}  # fmt: skip
    write_adapter(tmp_path / "adapter.st", adapter)
    bake(tmp_path / "model.st", tmp_path / "baked.st", [(tmp_path / "adapter.st", 1.0)])
    found, delta = load_file(tmp_path / "baked.st"), torch.zeros(16, 20)
    delta[:, :8] = base["img_in.weight"]
    path = "diffusion_model.img_in"
    delta += adapter[f"{path}.lora_up.weight"] @ adapter[f"{path}.lora_down.weight"] / 2
    torch.testing.assert_close(found["img_in.weight"], delta)


def test_names_of_hunyuan_videos_own_files(tmp_path):
    """Their names are not those of ComfyUI's modules, which adapters may be spelled after."""
    path = "double_blocks.0.img_attn_qkv"
    base = {
        f"{path}.weight": random(24, 8),
        "single_blocks.0.modulation.linear.weight": random(24, 8),
    }
    save_file(base, tmp_path / "model.st")
    adapter = {**lora("diffusion_model.double_blocks.0.img_attn.qkv", 24, 8),
               **lora("diffusion_model.single_blocks.0.modulation.lin", 24, 8)}  # fmt: skip
    outcome = bake(tmp_path / "model.st", tmp_path / "baked.st", [(adapter, 1.0)])
    assert [row.note for row in outcome.rows.values()] == [f"into {key}" for key in base]
    found = load_file(tmp_path / "baked.st")
    assert not any(torch.equal(found[key], weight) for key, weight in base.items())


def test_places_of_fused_and_renamed_weights():
    block = "conditioner.embedders.1.model.transformer.resblocks.3."
    shapes = {f"{block}attn.in_proj_weight": (48, 16), f"{block}attn.in_proj_bias": (48,)}
    shapes |= {f"net.blocks.{i}.mlp.weight": (8, 8) for i in range(6)}
    shapes |= {"net.blocks.0.attn.in_proj_weight": (24, 8), "vae.a.weight": (4, 4)}
    shapes["net.blocks.0.q_norm.scale"] = (8,)
    found = places(shapes)
    head = "clip_g.transformer.text_model.encoder.layers.3.self_attn."
    assert found[f"{head}k_proj.weight"] == (f"{block}attn.in_proj_weight", (16, 16), (0, 16, 16))
    assert found[f"{head}v_proj.bias"] == (f"{block}attn.in_proj_bias", (16,), (0, 32, 16))
    assert found["diffusion_model.blocks.5.mlp.weight"] == ("net.blocks.5.mlp.weight", (8, 8), None)
    fused = "net.blocks.0.attn.in_proj_weight"
    assert found["diffusion_model.blocks.0.attn.to_k.weight"] == (fused, (8, 8), (0, 8, 8))
    assert found["diffusion_model.blocks.0.q_norm.weight"].key == "net.blocks.0.q_norm.scale"
    assert found["vae.a.weight"] == ("vae.a.weight", (4, 4), None)


def test_the_same_adapter_twice_and_what_did_not_fit(model, tmp_path):
    adapter = Adapter({**lora("diffusion_model.a", 16, 12), **lora("diffusion_model.c", 4, 4)})
    adapter.name = "twice.safetensors"
    outcome = bake(model, tmp_path / "baked.st", [(adapter, 1.0), (adapter, 1.0), (adapter, 0.0)])
    again = "diffusion_model.a (twice.safetensors, adapter 2)"
    assert list(outcome.rows) == ["diffusion_model.a", again]
    assert len(outcome.left_out) == 2
    assert "'twice.safetensors' is baked more than once" in outcome.warnings
    delta = 2 * adapter["diffusion_model.a.lora_up.weight"] @ adapter[
        "diffusion_model.a.lora_down.weight"] / 2  # fmt: skip
    key = "model.diffusion_model.a.weight"
    found = load_file(tmp_path / "baked.st")[key]
    torch.testing.assert_close(found, load_file(model)[key] + delta)


def test_other_adapters_of_one_name_are_told_apart(model, tmp_path):
    """What nodes make is named after the node."""
    given = [Adapter(lora("diffusion_model.a", 16, 12), name="merged") for _ in range(3)]
    outcome = bake(model, tmp_path / "baked.st", [(adapter, 1.0) for adapter in given])
    assert len(outcome.rows) == 3 and not outcome.warnings


def test_plain_fp8_is_a_dtype(tmp_path):
    base = {"diffusion_model.a.weight": random(16, 12).to(torch.float8_e4m3fn)}
    save_file(base, tmp_path / "model.st")
    given = [(lora("diffusion_model.a", 16, 12), 1.0)]
    outcome = bake(tmp_path / "model.st", tmp_path / "low.st", given)
    assert any("saved in 8 bits" in warning for warning in outcome.warnings)
    assert read_header(tmp_path / "low.st").tensors["diffusion_model.a.weight"].dtype == "F8_E4M3"
    outcome = bake(tmp_path / "model.st", tmp_path / "wide.st", given, dtype="fp32")
    wanted, _ = merge_into(base, given[0][0])
    assert outcome.warnings == []
    assert torch.equal(read_adapter(tmp_path / "wide.st")["diffusion_model.a.weight"],
                       wanted["diffusion_model.a.weight"])  # fmt: skip


def test_a_value_that_does_not_fit(model, tmp_path):
    given = [(lora("diffusion_model.a", 16, 12), 1e5)]
    with pytest.raises(AdapterLabError, match="does not fit into float16"):
        bake(model, tmp_path / "baked.st", given, dtype="fp16")
    assert not (tmp_path / "baked.st").exists()


def test_a_damaged_model(tmp_path):
    base = {"diffusion_model.a.weight": random(16, 12)}
    base["diffusion_model.a.weight"][3, 3] = torch.nan
    save_file(base, tmp_path / "model.st")
    with pytest.raises(AdapterLabError, match="NaN or infinity in 'diffusion_model.a.weight'"):
        bake(tmp_path / "model.st", tmp_path / "o.st", [(lora("diffusion_model.a", 16, 12), 1.0)])


def test_cancelling_in_the_middle_leaves_nothing(model, tmp_path):
    told: list[tuple[int, int, str]] = []

    def tick(done: int, total: int, what: str) -> None:
        told.append((done, total, what))
        if done == 3:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        bake(model, tmp_path / "o.st", [(lora("diffusion_model.a", 16, 12), 1.0)], tick=tick)
    assert sorted(tmp_path.iterdir()) == before
    assert [done for done, _, _ in told] == [0, 1, 2, 3] and {n for _, n, _ in told} == {7}


FITTING = lora("diffusion_model.a", 16, 12)


@pytest.mark.parametrize(
    ("adapters", "more", "message"),
    [
        ([], {}, "There is no adapter to bake"),
        ([(FITTING, 0.0)], {}, "Nothing would change"),
        ([(FITTING, float("nan"))], {}, "A strength is not a number"),
        ([(FITTING, float("inf"))], {}, "A strength is not a number"),
        ([(lora("diffusion_model.zz", 3, 3), 1.0)], {}, "Nothing in the adapter"),
        ([({}, 1.0)], {}, "Nothing in the adapter"),
        ([("none.safetensors", 1.0)], {}, "Cannot read 'none.safetensors'"),
        ([(FITTING, 1.0)], {"dtype": "fp12"}, "Unknown dtype 'fp12'"),
        ([(FITTING, 1.0)], {"precision": "keep"}, "Unknown precision 'keep'"),
        ([(FITTING, 1.0)], {"quantised": "maybe"}, "Unknown quantised 'maybe'"),
        ([(FITTING, 1.0)], {"architecture": "none"}, "architecture"),
    ],
)
def test_what_can_not_be_meant(model, tmp_path, adapters, more, message):
    with pytest.raises(AdapterLabError, match=message):
        bake(model, tmp_path / "o.st", adapters, **more)
    assert not (tmp_path / "o.st").exists()


def test_inputs_are_never_overwritten(model, tmp_path):
    adapter = tmp_path / "adapter.st"
    write_adapter(adapter, FITTING)
    for dst in (model, adapter):
        with pytest.raises(AdapterLabError, match="is an input"):
            bake(model, dst, [(adapter, 1.0)], overwrite=True)
    (tmp_path / "there.st").write_bytes(b"x")
    with pytest.raises(AdapterLabError, match="it exists already"):
        bake(model, tmp_path / "there.st", [(adapter, 1.0)])
    assert (tmp_path / "there.st").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("head", "message"), [(b"GGUF" + b"\3" * 60, "GGUF"), (b"\x80\x02" + b"}" * 60, "pickle")]
)
def test_other_kinds_of_files(tmp_path, head, message):
    (tmp_path / "model.bin").write_bytes(head)
    with pytest.raises(AdapterLabError, match=message):
        bake(tmp_path / "model.bin", tmp_path / "o.st", [(FITTING, 1.0)])
