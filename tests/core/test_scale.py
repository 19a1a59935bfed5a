"""Where the scale of a module comes from, when alpha is not beside it."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter
from adapter_lab.core.keys import convert, resolve
from adapter_lab.core.keys.scale import config_scale
from lycoris.modules.lokr import LokrModule
from torch import Tensor

H = 16
SHAPES = {
    "img_in": (H, 4),
    "vector_in.in_layer": (H, 4),
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.0.img_attn.proj": (H, H),
}
MODEL = {f"diffusion_model.{path}.weight": shape for path, shape in SHAPES.items()}
QKV, PROJ = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"


def lora(stem: str, rows: int = H, rank: int = 4, alpha: float | None = None) -> dict[str, Tensor]:
    file = {f"{stem}.lora_up.weight": torch.ones(rows, rank),
            f"{stem}.lora_down.weight": torch.ones(rank, H)}  # fmt: skip
    return file if alpha is None else {**file, f"{stem}.alpha": torch.tensor(alpha)}


def scale(file: dict[str, Tensor], metadata: dict[str, str] | None = None, **options) -> float:
    """The scale of the only module, and whether it had to be assumed."""
    (match,) = resolve(Adapter(file, metadata), MODEL, **options)[1].matched.values()
    return match.scale


def test_nothing_tells_the_scale():
    _, report = resolve(lora(PROJ) | lora(QKV, 3 * H, alpha=8.0), MODEL)
    assert report.matched[PROJ].scale == 1 and report.matched[QKV].scale == 2
    (warning,) = report.warnings
    assert warning.startswith("Scale assumed: 1 (alpha = rank) for 1 module,")


def test_alpha_may_be_given_for_what_nothing_tells():
    entries, report = resolve(lora(PROJ) | lora(QKV, 3 * H, alpha=8.0), MODEL, alpha=12)
    assert [entry.algorithm.scale for entry in entries] == [3.0, 2.0]
    assert not report.warnings


def test_no_scale_is_assumed_where_there_is_none():
    """Two full LoKr factors and differences are whole as they are."""
    file = {f"{PROJ}.lokr_w1": torch.ones(4, 4), f"{PROJ}.lokr_w2": torch.ones(4, 4)}
    file |= {f"{QKV}.diff": torch.ones(3 * H, H)}
    for alpha in (None, 8):
        entries, report = resolve(file, MODEL, alpha=alpha)
        assert not report.warnings
        assert [entry.algorithm.scale for entry in entries] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("dim", "alpha", "found"),
    [
        ("4", "2", 0.5), ("4", "2.0", 0.5), ("Dynamic", "2", 1.0), ("4", "None", 1.0),
        ("8", "2", 1.0),  # of another rank than the module's: resized since
    ],
)
def test_network_metadata(dim, alpha, found):
    metadata = {"ss_network_dim": dim, "ss_network_alpha": alpha}
    assert scale(lora(PROJ), metadata) == found
    assert scale(lora(PROJ, alpha=12.0), metadata) == 3
    _, report = resolve(Adapter(lora(PROJ), metadata), MODEL)
    assert len(report.warnings) == (found == 1.0)


def test_converters_fold_alpha_in_and_keep_the_metadata():
    """musubi-tuner's convert_lora and sd-scripts' convert_flux_lora write peft's names so."""
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "1"}
    names = {"lora_up": "lora_B", "lora_down": "lora_A"}
    converted = {
        key.replace(ours, theirs): tensor
        for key, tensor in lora(PROJ).items()
        for ours, theirs in names.items()
        if ours in key
    }
    assert len(converted) == 2 and scale(converted, metadata) == 1


@pytest.mark.timeout(60)
def test_many_patterns_cost_no_minutes():
    """As many as modules, more than ``re`` keeps compiled."""
    paths = [f"blocks.{n}.attn.to_q" for n in range(750)]
    config = {"r": 4, "lora_alpha": 4, "rank_pattern": dict.fromkeys(paths, 2),
              "alpha_pattern": {path: n for n, path in enumerate(paths)}}  # fmt: skip
    assert [config_scale(config, path) for path in paths] == [n / 2 for n in range(750)]


def test_network_metadata_of_convolutions():
    args = json.dumps({"conv_dim": "2", "conv_alpha": "6"})
    metadata = {"ss_network_dim": "8", "ss_network_alpha": "4", "ss_network_args": args}
    file = {
        "c.lora_up.weight": torch.ones(8, 2, 1, 1),
        "c.lora_down.weight": torch.ones(2, 4, 3, 3),
    }
    file |= {
        "p.lora_up.weight": torch.ones(8, 8, 1, 1),
        "p.lora_down.weight": torch.ones(8, 4, 1, 1),
    }
    index = {"c.weight": (8, 4, 3, 3), "p.weight": (8, 4, 1, 1)}
    entries, _ = resolve(Adapter(file, metadata), index)
    assert [entry.algorithm.scale for entry in entries] == [3.0, 0.5]


def split_qkv(alpha: float) -> tuple[dict[str, Tensor], Tensor]:
    """A fused module as sd-scripts joins three of rank 4, and the delta that was trained."""
    ups, downs = torch.randn(3, H, 4), torch.randn(3, 4, H)
    up, down = torch.block_diag(*ups), downs.flatten(0, 1)
    file = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
    file = {f"{QKV}.{suffix}": tensor for suffix, tensor in file.items()}
    return file, torch.cat([up @ down * 2.0 / 4 for up, down in zip(ups, downs, strict=True)])


@pytest.mark.parametrize(("alpha", "warned"), [(2.0, True), (6.0, False)])
def test_parts_that_were_trained_apart(alpha, warned):
    """sd-scripts leaves the alpha of one part; converters multiply it by the number of parts."""
    args = json.dumps({"split_qkv": "True"})
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_args": args}
    file, trained = split_qkv(alpha)
    (entry,), report = resolve(Adapter(file, metadata), MODEL)
    torch.testing.assert_close(entry.algorithm.delta(torch.zeros(3 * H, H)), trained)
    assert any("split_qkv" in text for text in report.warnings) == warned
    # One that was trained whole has the same alpha and means it.
    whole = lora(PROJ, rank=4, alpha=2.0)
    assert scale(whole, metadata) == 0.5
    # Written again it says so itself.
    again = convert(Adapter(file, metadata), "comfyui", "flux")
    (entry,), report = resolve(again, MODEL)
    torch.testing.assert_close(entry.algorithm.delta(torch.zeros(3 * H, H)), trained)
    assert not report.warnings


def test_rank_stabilised_glora_of_lycoris():
    """It stores alpha itself, while LoRA, LoHa and LoKr store alpha sqrt(r)."""
    glora = {f"{PROJ}.{name}.weight": torch.ones(shape) for name, shape in {
        "a1": (H, 4), "a2": (4, H), "b1": (H, 4), "b2": (4, H)}.items()}  # fmt: skip
    glora[f"{PROJ}.alpha"] = torch.tensor(6.0)
    metadata = {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": "True"})}
    assert scale(glora, metadata) == 3
    assert scale(glora) == 1.5
    assert scale(lora(PROJ, alpha=6.0), metadata) == 1.5
    again = convert(Adapter(glora, metadata), "kohya", "flux")
    assert scale(again, again.metadata) == 3


def test_rank_stabilised_full_lokr_of_lycoris():
    """Two full factors are trained with sqrt(r), of which the file itself tells nothing."""
    layer = torch.nn.Linear(H, H, bias=False)
    module = LokrModule("x", layer, lora_dim=64, alpha=64, rs_lora=True, full_matrix=True)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    state = {f"{PROJ}.{name}": t for name, t in module.state_dict().items() if "lokr" in name}
    state[f"{PROJ}.alpha"] = module.state_dict()["alpha"]
    args = json.dumps({"algo": "lokr", "rs_lora": "True"})
    metadata = {"ss_network_args": args, "ss_network_dim": "64", "ss_network_alpha": "64"}
    assert scale(state, metadata) == pytest.approx(module.scale)
    assert module.scale == 8 and scale(state) == 1
    again = convert(Adapter(state, metadata), "comfyui", "flux")
    (one,), (two,) = (resolve(file, MODEL)[0] for file in (Adapter(state, metadata), again))
    weight = torch.zeros(H, H)
    torch.testing.assert_close(one.algorithm.delta(weight), two.algorithm.delta(weight))


def test_diffusers_metadata(tmp_path: Path):
    """By component, as diffusers' own pipelines write it."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 0, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 4}
    model = diffusers.FluxTransformer2DModel(in_channels=4, axes_dims_rope=(2, 2, 4), **sizes)
    patterns = {"alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_v": 8}}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v"], **patterns)
    model.add_adapter(config)
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    adapter = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert "lora_adapter_metadata" in adapter.metadata and adapter.config is None
    folded, kohya = (convert(adapter, form, "flux") for form in ("diffusers", "kohya"))
    for file, scales in ((adapter, (0.5, 1.5, 0.75)), (folded, (1, 1, 1)), (kohya, None)):
        _, report = resolve(file, MODEL)
        found = {stem.rpartition("to_")[2]: match.scale for stem, match in report.matched.items()}
        assert scales is None or found == dict(zip("qkv", scales, strict=True))
        assert found and not report.warnings and not report.unmatched


@pytest.mark.parametrize(
    ("config", "path", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, "a", 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, "a", 4.0),
        ({"r": 4, "alpha": 2}, "a", 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q": 4}}, "x.q", 1.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q": 4}}, "x.qq", 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^q": 4}}, "x.q", 2.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {r"blocks\.\d+\.q": 16}}, "m.blocks.12.q", 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"x.q": 4, "q": 12}}, "x.q", 1.0),
        ({"peft_type": "IA3"}, "a", None),
    ],
)
def test_scale_of_a_peft_config(config, path, scale):
    assert config_scale(config, path) == scale


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0, "lora_alpha": 1},
        {"r": "4", "lora_alpha": 1},
        {"r": 4, "lora_alpha": float("nan")},
        {"r": 4, "lora_alpha": 1, "alpha_pattern": {"(": 1}},
    ],
)
def test_a_broken_peft_config_is_an_error(config):
    file = lora("base_model.model.double_blocks.0.img_attn.proj")
    with pytest.raises(AdapterLabError, match="adapter_config.json"):
        resolve(Adapter(file, config=config), MODEL)


def test_alpha_in_the_file_goes_before_a_config_beside_it():
    """Many adapters may share a folder with one config; a stored alpha is the module's own."""
    config = {"r": 2, "lora_alpha": 20}
    entries, _ = resolve(Adapter(lora(PROJ, alpha=4.0), config=config), MODEL)
    assert entries[0].algorithm.scale == 1.0
