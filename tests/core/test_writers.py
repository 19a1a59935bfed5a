"""Files as other libraries write them, read into plain weights: the library itself is the truth.

Every file goes the whole way: written by the library's own save function, keys matched with the
model's names, the scale found, the delta merged.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import peft
import pytest
import torch
from adapter_lab.core.bake import merge_into
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter
from adapter_lab.core.keys import convert, describe
from lycoris import LycorisNetwork, create_lycoris
from torch import Tensor, nn

TOLERANCE, ROUNDING = 1e-5, 5e-7

Weights = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.to_q = nn.Linear(32, 32)
        self.to_k = nn.Linear(32, 16, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(16, 32)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.to_out[0](self.to_k(self.to_q(h)))


class Model(nn.Module):
    """A little of everything: embedding, linear layers with and without bias, convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.conv_out = nn.Conv2d(8, 4, 1)

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x, self.conv_out(self.conv_in(image))


IDS, IMAGE = torch.arange(10)[None], torch.linspace(-1, 1, 400).reshape(1, 4, 10, 10)
LINEAR = ["to_q", "to_k", "to_out.0"]
CONV = ["conv_in", "conv_out"]
PEFT = {
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 3, "target_modules": LINEAR + CONV}),
    "rslora": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": LINEAR},
    ),
    "patterns": (
        peft.LoraConfig,
        {
            "r": 4, "lora_alpha": 3, "target_modules": LINEAR, "rank_pattern": {"to_q": 2},
            "alpha_pattern": {r"blocks\.1\.to_k": 7},
        },
    ),
    "bias": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["to_q", "to_out.0"]},
    ),
    "all biases": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 6, "bias": "lora_only", "target_modules": ["to_q", "to_out.0"]},
    ),
    "embedding": (peft.LoraConfig, {"r": 4, "lora_alpha": 8, "target_modules": ["embed", "to_q"]}),
    "dora": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": LINEAR + CONV},
    ),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 3, "target_modules": LINEAR + CONV}),
    "loha tucker": (
        peft.LoHaConfig,
        {"r": 4, "alpha": 3, "use_effective_conv2d": True, "target_modules": CONV},
    ),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 3, "target_modules": LINEAR + CONV}),
    "lokr both": (
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, "decompose_both": True, "target_modules": LINEAR},
    ),
    "lokr full": (peft.LoKrConfig, {"r": 64, "alpha": 3, "target_modules": LINEAR}),
    "oft": (peft.OFTConfig, {"oft_block_size": 4, "target_modules": LINEAR}),
    "oft exact": (
        peft.OFTConfig,
        {"r": 3, "oft_block_size": 0, "use_cayley_neumann": False, "target_modules": LINEAR},
    ),
    "oft conv": (peft.OFTConfig, {"oft_block_size": 4, "target_modules": CONV}),
    "coft": (
        peft.OFTConfig,
        {"oft_block_size": 4, "coft": True, "eps": 1e-2, "target_modules": LINEAR},
    ),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4, "target_modules": LINEAR}),
    "boft factors": (
        peft.BOFTConfig,
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "target_modules": LINEAR},
    ),
    "hra": (peft.HRAConfig, {"r": 4, "target_modules": LINEAR}),
    "hra orthogonal": (
        peft.HRAConfig,
        {"r": 4, "apply_GS": True, "target_modules": LINEAR},
    ),
    "ia3": (
        peft.IA3Config,
        {"target_modules": ["to_q", "to_out.0", "conv_in"], "feedforward_modules": ["to_out.0"]},
    ),
    "glora": (peft.GloraConfig, {"r": 4, "target_modules": LINEAR}),
    "vera": (
        peft.VeraConfig,
        {"r": 4, "target_modules": ["to_q"], "save_projection": True},
    ),
    "vera regenerated": (
        peft.VeraConfig,
        {"r": 4, "target_modules": LINEAR, "save_projection": False, "projection_prng_key": 7},
    ),
}  # fmt: skip


def randomise(parameters: Weights, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in parameters.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * std)


def check(base: Weights, expected: Weights, path: Path) -> None:
    """What the file changes is what the library changes, and by the same amount."""
    merged, report = merge_into(base, read_adapter(path))
    assert report.matched and not report.unmatched, report.to_text()
    assert not [w for w in report.warnings if w.startswith("Scale assumed")], report.warnings
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, base[name])}
    assert changed, "the library changed nothing"
    assert changed <= set(merged)
    check_weights(base, expected, merged)


def check_weights(base: Weights, expected: Weights, merged: Weights) -> None:
    for name, tensor in merged.items():
        effect = (expected[name] - base[name]).norm()
        error = (tensor - expected[name]).norm()
        assert error <= TOLERANCE * effect + ROUNDING * base[name].norm(), name


def by_peft(kind: str, folder: Path) -> tuple[Weights, peft.PeftModel]:
    """The weights of a model, and peft's adapter on it, which is also saved in ``folder``."""
    torch.manual_seed(0)
    model = Model()
    base = {name: t.detach().clone() for name, t in model.state_dict().items()}
    make, options = PEFT[kind]
    wrapped = peft.get_peft_model(model, make(**options))
    randomise({n: p for n, p in wrapped.named_parameters() if p.requires_grad})
    wrapped.save_pretrained(folder)
    return base, wrapped


@pytest.mark.parametrize("kind", PEFT)
def test_peft(kind: str, tmp_path: Path) -> None:
    base, wrapped = by_peft(kind, tmp_path)
    expected = wrapped.merge_and_unload().state_dict()
    check(base, expected, tmp_path / "adapter_model.safetensors")


# Alone, these two have the names of a UNet, which ComfyUI calls otherwise.
AS_UNET = {"diffusion_model.input_blocks.0.0": "conv_in", "diffusion_model.out.2": "conv_out"}


@pytest.mark.parametrize("kind", PEFT)
def test_converted(kind: str, tmp_path: Path) -> None:
    """Without its config a converted file does what it did with it."""
    base, _ = by_peft(kind, tmp_path)
    adapter = read_adapter(tmp_path / "adapter_model.safetensors")
    expected, _ = merge_into(base, adapter)
    if kind == "vera regenerated":
        with pytest.raises(AdapterLabError, match="and the model to make them for"):
            convert(adapter, "comfyui")
        return
    converted = convert(adapter, "comfyui")
    assert converted.config is None
    stems = {key for key in AS_UNET if any(name.startswith(key + ".") for name in converted)}
    merged, report = merge_into(base, converted, targets={key: AS_UNET[key] for key in stems})
    assert not report.unmatched and set(merged) == set(expected)
    check_weights(base, expected, merged)


@pytest.mark.parametrize("kind", PEFT)
def test_described(kind: str, tmp_path: Path) -> None:
    """Every module is of a known algorithm, of the file alone as well."""
    by_peft(kind, tmp_path)
    found = describe(read_adapter(tmp_path / "adapter_model.safetensors"))
    if kind == "vera regenerated":  # takes the model to know
        assert not found.algorithms and len(found.broken) == found.modules
    else:
        assert not found.broken and found.modules <= sum(found.algorithms.values())


LYCORIS = {
    "locon": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 1},
    "tucker": {"algo": "lora", "use_tucker": True, "conv_dim": 2},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha", "linear_alpha": 2, "conv_alpha": 1},
    "loha tucker": {"algo": "loha", "use_tucker": True},
    "doha": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "linear_alpha": 2, "linear_dim": 2, "conv_dim": 1, "factor": 2},
    "lokr full": {"algo": "lokr", "linear_dim": 10000, "conv_dim": 10000},
    "dokr": {"algo": "lokr", "dora_wd": True},
    "glora": {"algo": "glora", "linear_alpha": 2},
    "diag-oft": {"algo": "diag-oft", "linear_alpha": 0, "conv_alpha": 0},
    "coft": {"algo": "diag-oft", "constraint": 1e-3, "linear_alpha": 1e-3, "conv_alpha": 1e-3},
    "oft rescaled": {"algo": "diag-oft", "rescaled": True, "linear_alpha": 0, "conv_alpha": 0},
    "boft": {"algo": "boft", "linear_alpha": 0, "conv_alpha": 0},
    "ia3": {"algo": "ia3"},
    "full": {"algo": "full"},
    "rs": {"algo": "lora", "rs_lora": True, "linear_dim": 4, "linear_alpha": 2},
    "scalar": {"algo": "lokr", "use_scalar": True, "linear_dim": 2, "factor": 2},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    base = {name: t.detach().clone() for name, t in model.state_dict().items()}
    options = {"linear_dim": 4, "linear_alpha": 4, "conv_dim": 4, "conv_alpha": 4} | LYCORIS[kind]
    LycorisNetwork.apply_preset({"target_module": ["Model"], "use_fnmatch": False})
    network = create_lycoris(model, 1.0, **options)
    network.apply_to()
    randomise(dict(network.named_parameters()))
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(str(path), torch.float32, {})
    expected = dict(base)
    for module in network.loras:
        name = next(n for n, m in model.named_modules() if m is module.org_module[0])
        expected[f"{name}.weight"], bias = effective(module)
        if f"{name}.bias" in base:
            expected[f"{name}.bias"] = bias
    check(base, expected, path)


@torch.no_grad()
def effective(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight and bias that LyCORIS trains with: what its forward does to single inputs."""
    layer = module.org_module[0]
    module.train()
    eye = torch.eye(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
    if isinstance(layer, nn.Linear):
        bias = module(torch.zeros_like(eye[:1]))
        return (module(eye) - bias).T, bias[0]
    points = torch.zeros(len(eye), len(eye), 9, 9)
    points[:, :, 4, 4] = eye
    bias = module(torch.zeros_like(points[:1]))
    y = (module(points) - bias).transpose(0, 1)
    reach = layer.padding[0]
    kernel = y[:, :, 4 - reach : 5 + reach, 4 - reach : 5 + reach].flip(2, 3)
    return kernel, bias[0, :, 0, 0]


def test_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    model = diffusers.FluxTransformer2DModel(in_channels=4, axes_dims_rope=(2, 2, 4), **sizes)
    base = {name: t.detach().clone() for name, t in model.state_dict().items()}
    targets = ["to_q", "to_k", "to_out.0", "proj_mlp"]
    model.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=3, target_modules=targets, alpha_pattern={"proj_mlp": 9})
    )
    randomise({name: p for name, p in model.named_parameters() if "lora_" in name})
    model.save_lora_adapter(tmp_path, weight_name="flux.safetensors")
    model.fuse_lora()
    model.unload_lora()
    check(base, model.state_dict(), tmp_path / "flux.safetensors")
