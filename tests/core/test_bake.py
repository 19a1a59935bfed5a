"""Whole files into weights, against the models that wrote them."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from adapter_lab.core.bake import merge_into
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter
from torch import Tensor, nn
from torch.func import functional_call

H = 16


class Net(nn.Module):
    """Linear layers and convolutions under names that patterns can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.net = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.conv(x)).mean((2, 3))
        for block in self.blocks:
            x = x + block["q"](x) * block["k"](x)
        return self.net(x)


EVERY = ["conv", "point", "q", "k", "net.0", "net.2"]
PATTERNS = {"rank_pattern": {r"blocks\.1\.q": 6}, "alpha_pattern": {"k": 1, "^net.0": 9}}
# "lokr full": a rank that leaves LoKr's factors full, where peft still scales by alpha / r.
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=EVERY),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=EVERY),
    "patterns": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=EVERY, **PATTERNS),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=EVERY, **PATTERNS),
    "loha tucker": lambda: peft.LoHaConfig(
        r=4, alpha=6, use_effective_conv2d=True, target_modules=EVERY
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=EVERY, **PATTERNS),
    "lokr full": lambda: peft.LoKrConfig(r=8, alpha=6, target_modules=EVERY),
    "lokr both": lambda: peft.LoKrConfig(
        r=1, alpha=6, decompose_both=True, use_effective_conv2d=True, target_modules=EVERY
    ),
}


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_saves_gives_what_peft_computes(kind, strength, tmp_path: Path):
    torch.manual_seed(0)
    net = Net()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tuned = peft.get_peft_model(net, CONFIGS[kind](), adapter_name="default")
    randomise(tuned)
    tuned.save_pretrained(tmp_path)
    for module in tuned.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(strength)
    x = torch.randn(2, 3, 6, 6)
    expected = tuned(x)

    adapter = read_adapter(tmp_path / "adapter_model.safetensors")
    assert (kind == "lokr full") == ({name[-8:] for name in adapter} == {".lokr_w1", ".lokr_w2"})
    merged, report = merge_into(weights, adapter, strength)
    assert not report.unmatched and not report.warnings
    assert report.format == "peft"
    assert set(merged) == {
        f"{name}.weight"
        for name in [
            "conv",
            "point",
            "net.0",
            "net.2",
            *(f"blocks.{i}.{x}" for i in (0, 1) for x in "qk"),
        ]
    }
    actual = functional_call(Net(), weights | merged, (x,))
    assert distance(functional_call(Net(), weights, (x,)), expected) > 0.01
    assert distance(actual, expected) < 1e-5
    theirs = tuned.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert distance(tensor, theirs[name]) < 1e-5, name


def test_an_adapter_that_peft_holds_in_memory():
    torch.manual_seed(0)
    net = Net()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    config = CONFIGS["lora"]()
    tuned = peft.get_peft_model(net, config, adapter_name="my style")
    randomise(tuned)
    held = {name: tensor for name, tensor in tuned.state_dict().items() if "lora_" in name}
    assert any("lora_A.my style.weight" in name for name in held)
    merged, report = merge_into(weights, Adapter(held, config=config.to_dict()))
    assert len(merged) == 8 and not report.unmatched
    theirs = tuned.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


# --- rows of fused weights

QKV = "double_blocks.0.img_attn.qkv.weight"
LINEAR1 = "single_blocks.0.linear1.weight"
FLUX = {
    "img_in.weight": (H, 4),
    "vector_in.in_layer.weight": (H, 4),
    QKV: (3 * H, H),
    LINEAR1: (7 * H, H),
}


def flux() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"model.diffusion_model.{name}": torch.randn(shape) for name, shape in FLUX.items()}


def lora(
    stem: str, rows: int, columns: int = H, alpha: float = 3.0
) -> tuple[dict[str, Tensor], Tensor]:
    """A file of one module in peft's factor names with an alpha, and its delta."""
    a, b = torch.randn(4, columns), torch.randn(rows, 4)
    file = {
        f"{stem}.lora_A.weight": a,
        f"{stem}.lora_B.weight": b,
        f"{stem}.alpha": torch.tensor(alpha),
    }
    return file, b @ a * alpha / 4


def test_separate_q_k_v_land_on_their_rows():
    weights, adapter = flux(), {}
    expected = {key: weights[f"model.diffusion_model.{key}"].clone() for key in (QKV, LINEAR1)}
    rows = {
        "transformer_blocks.0.attn.to_q": (QKV, 0, 1),
        "transformer_blocks.0.attn.to_v": (QKV, 2, 1),
        "single_transformer_blocks.0.attn.to_k": (LINEAR1, 1, 1),
        "single_transformer_blocks.0.proj_mlp": (LINEAR1, 3, 4),
    }
    for name, (key, first, count) in rows.items():
        file, delta = lora(f"transformer.{name}", count * H)
        adapter |= file
        expected[key][first * H : (first + count) * H] += 0.6 * delta
    merged, report = merge_into(weights, adapter, 0.6)
    assert report.architecture == "flux" and report.format == "diffusers"
    assert set(merged) == {f"model.diffusion_model.{key}" for key in expected}
    for key, tensor in expected.items():
        torch.testing.assert_close(
            merged[f"model.diffusion_model.{key}"], tensor, rtol=1e-5, atol=1e-5
        )
    untouched = merged[f"model.diffusion_model.{QKV}"][H : 2 * H]
    assert torch.equal(untouched, weights[f"model.diffusion_model.{QKV}"][H : 2 * H])


def test_modules_on_the_same_rows_add_up():
    fused, whole = lora("diffusion_model.double_blocks.0.img_attn.qkv", 3 * H)
    split, part = lora("transformer.transformer_blocks.0.attn.to_k", H)
    weights = flux()
    merged, report = merge_into(weights, fused | split)
    expected = weights[f"model.diffusion_model.{QKV}"] + whole
    expected[H : 2 * H] += part
    torch.testing.assert_close(
        merged[f"model.diffusion_model.{QKV}"], expected, rtol=1e-5, atol=1e-5
    )
    assert len(report.warnings) == 2  # two formats, shared rows


def test_targets_choose_rows_by_hand():
    file, delta = lora("anything.at.all", 4, 2)
    weights = {"net.0.weight": torch.randn(6, 5)}
    merged, report = merge_into(weights, file, targets={"anything.at.all": ("net.0", 0, 1, 4)})
    assert not merged and "does not fit" in report.unmatched["anything.at.all"]
    file, delta = lora("anything.at.all", 6, 2)
    merged, _ = merge_into(weights, file, -1.0, targets={"anything.at.all": ("net.0", 1, 3, 2)})
    expected = weights["net.0.weight"].clone()
    expected[:, 3:] -= delta
    torch.testing.assert_close(merged["net.0.weight"], expected)


def test_inputs_stay_and_results_are_float32():
    file, delta = lora("net.0", 6, 5)
    weights = {"net.0.weight": torch.randn(6, 5).bfloat16(), "net.1.weight": torch.randn(2, 2)}
    before = {name: tensor.clone() for name, tensor in (weights | file).items()}
    merged, _ = merge_into(weights, file)
    assert list(merged) == ["net.0.weight"] and merged["net.0.weight"].dtype == torch.float32
    torch.testing.assert_close(merged["net.0.weight"], weights["net.0.weight"].float() + delta)
    assert all(torch.equal(tensor, before[name]) for name, tensor in (weights | file).items())


def test_float32_inputs_are_copied():
    file, _ = lora("net.0", 6, 5)
    weights = {"net.0.weight": nn.Parameter(torch.randn(6, 5))}
    before = weights["net.0.weight"].detach().clone()
    merged, _ = merge_into(weights, file)
    assert torch.equal(weights["net.0.weight"], before)
    assert not merged["net.0.weight"].requires_grad


def test_strength_zero_gives_the_weight_bit_by_bit():
    file, _ = lora("net.0", 2, 3)
    weight = torch.tensor([[-0.0, 1.0, -1.0], [0.0, 3.0, 1e-30]])
    merged, _ = merge_into({"net.0.weight": weight}, file, 0.0)
    assert torch.equal(merged["net.0.weight"].view(torch.int32), weight.view(torch.int32))


def test_nothing_that_fits_changes_nothing_and_says_so():
    merged, report = merge_into(flux(), lora("lora_unet_blocks_0_self_attn_q", H)[0])
    assert merged == {}
    with pytest.raises(AdapterLabError, match=r"Wan.*FLUX\.1"):
        raise report.error()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integers_are_refused(dtype: torch.dtype):
    file, _ = lora("net.0", 6, 5)
    with pytest.raises(AdapterLabError, match=r"net\.0\.weight' is quantised.*found u?int8"):
        merge_into({"net.0.weight": torch.ones(6, 5, dtype=dtype)}, file)


@pytest.mark.parametrize("first", ["plain", "control"])
def test_a_plain_adapter_beside_one_that_enlarges_the_weight(first: str):
    """FLUX.1's img_in under a control file and a style: in either order the same."""
    key, stems = "model.diffusion_model.img_in.weight", {
        "plain": "diffusion_model.img_in", "control": "transformer.x_embedder",
    }  # fmt: skip
    weights = flux()
    plain, small = lora(stems["plain"], H, 4)
    control, large = lora(stems["control"], H, 8)
    control[f"{stems['control']}.reshape_weight"] = torch.tensor([H, 8])
    file = plain | control if first == "plain" else control | plain
    expected = 0.5 * large
    expected[:, :4] += weights[key] + 0.5 * small
    merged, report = merge_into(weights, file, 0.5)
    assert not report.unmatched
    torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-5)
    if first == "control":
        turned = {k: t for k, t in file.items() if stems["plain"] not in k}
        turned[f"{stems['plain']}.set_weight"] = torch.ones(H, 4)
        with pytest.raises(AdapterLabError, match="that another adapter has enlarged"):
            merge_into(weights, turned)


def test_scaled_weights_are_refused():
    """Their numbers are not the weights: merging would add a delta of another size."""
    factors = {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 4)}
    adapter = {f"layer.{suffix}": tensor for suffix, tensor in factors.items()}
    weights = {"layer.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    assert merge_into(weights, adapter)[0]["layer.weight"].max() == 3
    with pytest.raises(AdapterLabError, match="quantised.*float8_e4m3fn.*weight_scale"):
        merge_into(weights | {"layer.weight_scale": torch.tensor(0.01)}, adapter)
