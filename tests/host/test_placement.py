"""Where parts of an adapter go that no layer takes, and how strengths and modes are chosen."""

from __future__ import annotations

from contextlib import contextmanager

import comfy.model_management
import comfy.sd
import made
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.nodes.host import model as host
from samples import close, differs, prediction, run

LAYERS = [
    "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1",
]  # fmt: skip
NORMS = {
    "flux": "double_blocks.0.img_attn.norm.query_norm",
    "wan": "blocks.0.norm3",
    "sd15": "input_blocks.1.0.in_layers.0",
    "sd3": "joint_blocks.0.x_block.attn.ln_q",  # which ComfyUI does not cast
}


@pytest.fixture(scope="module")
def model(checkpoints):
    """Kind -> a model, the same for all tests: what one leaves behind the next one finds."""
    loaded = {}

    def get(kind):
        if kind not in loaded:
            with torch.inference_mode():
                loaded[kind] = comfy.sd.load_diffusion_model(str(checkpoints(kind)))
        return loaded[kind]

    return get


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def apply(model, file, strength=1.0, **how):
    return host.apply(model, None, file, strength, 1.0, "error", **how).model


def shape(model, path):
    return host.shapes(model.model)[f"diffusion_model.{path}.weight"]


@contextmanager
def assigned(changes):
    """Parameters changed by hand: (module, name) -> what is added."""
    for (module, name), change in changes.items():
        getattr(module, name).data.add_(change)
    yield
    for (module, name), change in changes.items():
        getattr(module, name).data.sub_(change)


@pytest.mark.parametrize("mode", ["merge", "bypass"])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(model, kind, mode):
    base, path = model(kind), NORMS[kind]
    module = base.model.get_submodule(f"diffusion_model.{path}")
    change = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
    names = {"weight": "w_norm", "bias": "b_norm"}
    names = {n: suffix for n, suffix in names.items() if getattr(module, n, None) is not None}
    file, before = made.adapter({path: dict.fromkeys(names.values(), change)}), run(base, kind)
    with_it = run(apply(base, file, 0.5, mode=mode), kind)
    assert torch.equal(run(base, kind), before)
    with assigned({(module, name): change * 0.5 for name in names}):
        close(with_it, prediction(base, kind))
    differs(with_it, before)


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_parameters_beside_modules(model, mode):
    """ComfyUI takes patches for them and never applies them; stacked ones add up."""
    base, before = model("wan"), run(model("wan"), "wan")
    rng = torch.Generator().manual_seed(0)
    sizes = {"blocks.0": (1, 6, 128), "head": (1, 2, 128)}
    changes = {path: torch.randn(size, generator=rng) for path, size in sizes.items()}
    file = made.adapter({f"{path}.modulation": {"diff": c} for path, c in changes.items()})
    once = apply(base, file, 0.5, mode=mode)
    twice = apply(once, file, 0.25, mode=mode)
    results = {0.5: run(once, "wan"), 0.75: run(twice, "wan")}
    assert torch.equal(run(base, "wan"), before)
    network = base.model.diffusion_model
    for strength, result in results.items():
        by_hand = {
            (network.get_submodule(path), "modulation"): c * strength for path, c in changes.items()
        }
        with assigned(by_hand):
            close(result, prediction(base, "wan"))
        differs(result, before)


def test_auto_merges_what_is_not_quantised(model):
    base, path = model("flux"), LAYERS[0]
    done = host.apply(base, None, made.adapter({path: made.factors("lora", shape(base, path))}))
    assert done.mode.chosen == "merge" and done.model.patches
    assert "merge" in done.to_text().split("\n")[1]
    assert done.to_dict()["mode"] == {"chosen": "merge", "why": done.mode.why, "merged": 0}


def test_report_counts_what_is_merged_even_so(model):
    base, path = model("flux"), LAYERS[0]
    file = made.adapter({
        path: made.factors("lora", shape(base, path)), NORMS["flux"]: {"w_norm": torch.ones(128)},
    })  # fmt: skip
    done = host.apply(base, None, file, mode="bypass")
    assert done.mode.merged == 1 and "1 norm or other parameter merged even so" in done.to_text()


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_weight_that_grows(model, mode):
    """A control adapter of FLUX.1 makes img_in larger, which only merging can."""
    base, rng = model("flux"), torch.Generator().manual_seed(0)
    up, down = torch.randn(128, 4, generator=rng), torch.randn(4, 128, generator=rng)
    tensors = {"lora_up.weight": up, "lora_down.weight": down}
    file = made.adapter({"img_in": {**tensors, "reshape_weight": torch.tensor([128, 128])}})
    adapted, layer = apply(base, file, mode=mode), base.model.diffusion_model.img_in
    (patch,) = adapted.patches["diffusion_model.img_in.weight"]
    assert patch[1].calculate_shape("img_in") == (128, 128)
    comfy.model_management.load_models_gpu([base])
    expected = up @ down
    expected[:, :64] += layer.weight
    comfy.model_management.load_models_gpu([adapted])
    close(layer.weight, expected, 1e-6)
    run(base, "flux")
    assert layer.weight.shape == (128, 64)


def test_block_weights(model):
    base = model("flux")
    paths = LAYERS
    tensors = {path: made.factors("lora", shape(base, path)) for path in paths}
    text = "double_blocks.*.img_attn = 0.5\n*.txt_mlp = 0\nnothing.here = 2"
    done = host.apply(base, None, made.adapter(tensors), 0.8, block_weights=text)
    chain = apply(base, made.adapter({paths[0]: tensors[paths[0]]}), 0.4)
    chain = apply(chain, made.adapter({paths[2]: tensors[paths[2]]}), 0.8)
    expected = run(chain, "flux")
    close(run(done.model, "flux"), expected, 1e-6)
    beside = host.apply(base, None, made.adapter(tensors), 0.8, block_weights=text, mode="bypass")
    close(run(beside.model, "flux"), expected)
    assert done.report.strengths == {
        f"diffusion_model.{paths[0]}": 0.5, f"diffusion_model.{paths[1]}": 0.0,
    }  # fmt: skip
    assert any("nothing.here" in warning for warning in done.report.warnings)


def test_schedule_cannot_be_merged(model):
    base, path = model("flux"), LAYERS[0]
    file = made.adapter({path: made.factors("lora", shape(base, path))})
    with pytest.raises(AdapterLabError, match="schedule"):
        host.apply(base, None, file, mode="merge", schedule="0@0, 1@1")
    assert host.apply(base, None, file, mode="merge", schedule="0.5@0").mode.chosen == "merge"
