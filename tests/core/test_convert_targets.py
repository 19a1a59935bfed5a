"""Converted files in the libraries they are for: each must change a model as the source says.

What the source says is worked out here from its factors, by the equations of the papers.
"""

from __future__ import annotations

import copy
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.lazy import AdapterFile
from adapter_lab.core.merge.convert import Convert
from lycoris import create_lycoris_from_weights
from torch import Tensor, nn

Deltas = dict[str, Tensor]
D = 16
# Own name -> (shape, diffusers' names of its rows one after the other).
FLUX: dict[str, tuple[tuple[int, int], list[str]]] = {
    "double_blocks.0.img_attn.qkv": (
        (3 * D, D), [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]),
    "double_blocks.0.txt_attn.proj": ((D, D), ["transformer_blocks.0.attn.to_add_out"]),
    "single_blocks.0.linear1": (
        (7 * D, D), [*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
                     "single_transformer_blocks.0.proj_mlp"]),
    "single_blocks.0.linear2": ((D, 5 * D), ["single_transformer_blocks.0.proj_out"]),
}  # fmt: skip
WAN: dict[str, tuple[tuple[int, int], list[str]]] = {
    "blocks.0.self_attn.q": ((D, D), ["blocks.0.attn1.to_q"]),
    "blocks.1.cross_attn.o": ((D, D), ["blocks.1.attn2.to_out.0"]),
    "blocks.0.ffn.2": ((D, 32), ["blocks.0.ffn.net.2"]),
}
# LoKr of fused weights is cut by runs of its inner factor only, which peft does not take.
CASES = [("flux", "lora"), ("flux", "loha"), ("wan", "lora"), ("wan", "loha"), ("wan", "lokr")]
SCALES = {4: 2.0, 3: 6.0, 2: -1.5}  # rank -> alpha: a power of two, 2 again, and a negative one


def flux() -> nn.Module:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    return diffusers.FluxTransformer2DModel(in_channels=4, axes_dims_rope=(2, 2, 4), **sizes)


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


MODELS = {"flux": (flux, FLUX), "wan": (wan, WAN)}


def source(model: str, algorithm: str, factor: int = 2) -> tuple[Adapter, Deltas]:
    """A file with kohya's keys, and what it adds to each of diffusers' modules."""
    file, deltas = Adapter(name="x.safetensors"), {}
    ranks = list(SCALES)
    for n, (name, (shape, theirs)) in enumerate(MODELS[model][1].items()):
        rank = ranks[n % len(ranks)]
        config = AdapterConfig(algorithm, rank, 1.0, factor=factor)
        made = ALGORITHMS[algorithm].init(shape, config, torch.Generator().manual_seed(n)).state()
        tensors = {s: t if s == "alpha" else torch.randn(t.shape) * 0.3 for s, t in made.items()}
        tensors["alpha"] = torch.tensor(SCALES[rank])
        file |= {f"lora_unet_{name.replace('.', '_')}.{s}": t for s, t in tensors.items()}
        whole = by_hand(tensors)
        assert whole.shape == shape
        sizes = [D] * 3 + [4 * D] if len(theirs) == 4 else [len(whole) // len(theirs)] * len(theirs)
        deltas |= dict(zip(theirs, whole.split(sizes), strict=True))
    return file, deltas


def by_hand(t: dict[str, Tensor]) -> Tensor:
    if "lora_up.weight" in t:
        up, down = t["lora_up.weight"], t["lora_down.weight"]
        return t["alpha"] / len(down) * up @ down
    if "hada_w1_a" in t:
        product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        return t["alpha"] / len(t["hada_w1_b"]) * product
    low = "lokr_w2_a" in t
    second = t["lokr_w2_a"] @ t["lokr_w2_b"] if low else t["lokr_w2"]
    scale = t["alpha"] / len(t["lokr_w2_b"]) if low else 1.0
    return scale * torch.kron(t["lokr_w1"], second)


def converted(file: Adapter, form: str, path: Path, model: str, **options: object) -> Convert:
    job = Convert(file, form, architecture=model, **options)
    job.write(path)
    return job


def check(model: nn.Module, before: Deltas, expected: Deltas, tolerance: float = 1e-5) -> None:
    """The model's weights have changed by ``expected``, and no others have."""
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        change = weight - before[name]
        wanted = expected.get(stem, torch.zeros(()))
        assert (change - wanted).norm() <= tolerance * max(1.0, float(wanted.norm())), name


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_peft(name: str, algorithm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file, expected = source(name, algorithm)
    job = converted(file, "peft", tmp_path / "adapter_model.safetensors", name)
    assert not job.outcome.rows and not job.outcome.warnings, job.outcome.to_text()
    model = MODELS[name][0]()
    before = copy.deepcopy(model.state_dict())
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path))
    check(loaded.merge_and_unload(), before, expected)


@pytest.mark.parametrize(
    ("name", "algorithm"), [case for case in CASES if case[1] != "loha"]
)  # fmt: skip
def test_diffusers(name: str, algorithm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file, expected = source(name, algorithm)
    converted(file, "diffusers", tmp_path / "x.safetensors", name)
    pipeline = diffusers.FluxPipeline if name == "flux" else diffusers.WanPipeline
    options = {"return_alphas": True} if name == "flux" else {}
    read = pipeline.lora_state_dict(
        str(tmp_path), weight_name="x.safetensors", return_lora_metadata=True, **options
    )
    state, metadata = read[0], read[-1]
    model = MODELS[name][0]()
    before = copy.deepcopy(model.state_dict())
    for given in (metadata, None):  # readers before 0.35 do not look for metadata
        model.load_lora_adapter(dict(state), prefix="transformer", metadata=given)
        merged = copy.deepcopy(model)
        for layer in merged.modules():
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                layer.merge()
        plain = {n.replace(".base_layer", ""): t for n, t in merged.state_dict().items()}
        for key, tensor in before.items():
            wanted = expected.get(key.removesuffix(".weight"), torch.zeros(()))
            torch.testing.assert_close(plain[key] - tensor, wanted.expand(tensor.shape),
                                       rtol=1e-4, atol=1e-5)  # fmt: skip
        model.unload_lora()


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_lycoris(name: str, algorithm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file, expected = source(name, algorithm)
    converted(file, "lycoris", tmp_path / "x.safetensors", name)
    model = MODELS[name][0]()
    before = copy.deepcopy(model.state_dict())
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), model)
    assert len(network.loras) == len(expected)
    for module in network.loras:  # what training with it does; merge_to scales LoHa twice
        layer = module.train().org_module[0]
        stem = next(n for n, m in model.named_modules() if m is layer)
        eye = torch.eye(layer.in_features)
        weight = (module(eye) - module(torch.zeros_like(eye))).T
        change = weight - before[f"{stem}.weight"]
        torch.testing.assert_close(change, expected[stem], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_lokr_that_takes_other_rows_becomes_lora(form: str, tmp_path: Path) -> None:
    """Blocks of 12 rows do not cut into ranges of 16, and both load one algorithm a file."""
    torch.manual_seed(0)
    file, expected = source("flux", "lokr", factor=4)
    path = tmp_path / "adapter_model.safetensors"
    job = converted(file, form, path, "flux", rank=D)
    assert len(job.outcome.rows) == len(expected) and job.outcome.error < 1e-5
    assert "became LoRA" in job.outcome.to_text()
    model = flux()
    before = copy.deepcopy(model.state_dict())
    if form == "peft":
        model = peft.PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload()
    else:
        model.load_lora_adapter(dict(read_adapter(path)), prefix="transformer")
        model.fuse_lora()
        model.unload_lora()
    check(model, before, expected, 1e-4)


def test_dora_keeps_its_lengths_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own, theirs = "double_blocks.0.txt_attn.proj", "transformer_blocks.0.attn.to_add_out"
    up, down, lengths = torch.randn(D, 2), torch.randn(2, D), torch.rand(D, 1) + 0.5
    stem = f"lora_unet_{own.replace('.', '_')}"
    file = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down,
            f"{stem}.alpha": torch.tensor(3.0), f"{stem}.dora_scale": lengths}  # fmt: skip
    job = converted(Adapter(file), "peft", tmp_path / "adapter_model.safetensors", "flux")
    assert not job.outcome.warnings
    model = flux()
    weight = model.state_dict()[f"{theirs}.weight"].clone()
    turned = weight + 1.5 * up @ down
    expected = turned * lengths / turned.norm(dim=1, keepdim=True)
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload()
    torch.testing.assert_close(merged.state_dict()[f"{theirs}.weight"], expected)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("form", ["comfyui", "diffusers", "lycoris", "musubi", "peft", "aitoolkit",
                                  "onetrainer", "bare"])  # fmt: skip
def test_there_and_back_without_a_scale_is_the_same_file(
    form: str, algorithm: str, tmp_path: Path
) -> None:
    """Bit by bit, by memory and by file, where no scale has to go into the factors."""
    torch.manual_seed(0)
    model = "wan" if algorithm == "lokr" else "flux"
    file, _ = source(model, algorithm)
    for name, tensor in list(file.items()):
        stem = name.rpartition(".")[0]
        known = [file.get(f"{stem}.{s}") for s in ("lora_down.weight", "hada_w1_b", "lokr_w2_b")]
        rank = next((len(t) for t in known if t is not None), int(tensor.reshape(-1)[0]))
        if name.endswith("alpha"):
            file[name] = torch.tensor(float(rank))
    write_adapter(tmp_path / "a.safetensors", file)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    with AdapterFile(tmp_path / "a.safetensors") as opened:
        Convert(opened, form, architecture=model, inexact="error").write(there)
    with AdapterFile(there) as opened:
        Convert(opened, "kohya", architecture=model, inexact="error").write(back)
    again = read_adapter(back)
    assert set(again) == set(file)
    for name, tensor in file.items():
        if not name.endswith("alpha") or algorithm != "lokr":
            assert torch.equal(again[name], tensor), name
