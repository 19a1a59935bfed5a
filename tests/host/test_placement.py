"""Where parts of an adapter go that no layer takes, and how strengths and modes are chosen."""

from __future__ import annotations

from contextlib import contextmanager

import comfy.model_management
import comfy.sd
import made
import pytest
import torch
import torch.nn.functional as F
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.nodes.host import model as host
from samples import apply, close, differs, prediction, run, shape

LAYERS = [
    "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1",
]  # fmt: skip
NORMS = {
    "flux": "double_blocks.0.img_attn.norm.query_norm",
    "wan": "blocks.0.norm3",
    "sd15": "input_blocks.1.0.in_layers.0",
    "sd3": "joint_blocks.0.x_block.attn.ln_q",  # which ComfyUI does not cast
}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


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


def test_larger_weight_cannot_follow_a_schedule(model):
    base = model("flux")
    tensors = {"lora_up.weight": torch.ones(128, 4), "lora_down.weight": torch.ones(4, 128)}
    file = made.adapter({"img_in": {**tensors, "reshape_weight": torch.tensor([128, 128])}})
    with pytest.raises(AdapterLabError, match=r"img_in.*schedule"):
        host.apply(base, None, file, schedule="0@0, 1@1")
    assert host.apply(base, None, file, schedule="0.5").mode.chosen == "merge"


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_bias_of_the_models_own_weight(model, mode):
    """A bias that depends on the weight beside it, whatever is merged there for another clone."""
    base, path = model("flux"), LAYERS[0]
    out, width = shape(base, path)
    rng = torch.Generator().manual_seed(3)
    left, right = torch.randn(width, 4, generator=rng), torch.randn(4, 1, generator=rng)
    more = {"glora_C.Xd": left * 0.3, "glora_C.Xu": right * 0.3}
    file = made.adapter({path: {**made.factors("glora_peft", (out, width)), **more}})
    other = apply(base, made.adapter({path: {"diff": torch.ones(out, width)}}), mode="merge")
    run(base, "flux")
    expected = run(apply(base, file, mode=mode), "flux")
    run(other, "flux")
    assert torch.equal(run(apply(base, file, mode=mode), "flux"), expected)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "own"])
def test_padding_that_is_changed_later(model, mode):
    """Seamless tiling: the layer's mode, or, along one axis, its own way to convolve."""
    base, path = model("sd15"), "input_blocks.1.0.in_layers.2"
    layer = base.model.get_submodule(f"diffusion_model.{path}")
    file = made.adapter({path: made.factors("lora", shape(base, path))})
    adapted = [apply(base, file, mode=how) for how in ("merge", "bypass")]
    x = torch.randn(1, layer.in_channels, 5, 6, generator=torch.Generator().manual_seed(0))

    def along_x(x, weight, bias):
        x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return F.conv2d(x, weight, bias, layer.stride)

    def outputs():
        for loaded in (base, *adapted):
            comfy.model_management.load_models_gpu([loaded])
            yield layer(x).clone()

    before = list(outputs())
    if mode == "own":
        layer._conv_forward = along_x
    else:
        layer.padding_mode = mode
    try:
        bare, merged, beside = outputs()
        close(beside - bare, merged - bare)
    finally:
        layer.padding_mode = "zeros"
        vars(layer).pop("_conv_forward", None)
    changes = merged - bare, before[1] - before[0]
    assert mode == "zeros" or float((changes[0] - changes[1]).norm() / changes[1].norm()) > 0.1
    assert all(map(torch.equal, outputs(), before))


def test_stand_ins_are_no_part_of_the_model(model):
    """What ModelMerge reads of a model while a clone of it has an adapter on."""
    base, key = model("wan"), "diffusion_model.blocks.0.modulation"
    file = made.adapter({"blocks.0.modulation": {"diff": torch.ones(1, 6, 128)}})
    own = base.get_key_patches()[key][0][0]
    live = base.model.diffusion_model.blocks[0]
    once = apply(base, file)
    twice = apply(once, file, 0.5)
    for adapted, change in ((once, 1.0), (twice, 1.5), (once, 1.0)):
        run(adapted, "wan")
        close(live.modulation - own, torch.full_like(own, change))
        for reader in (base, once, twice):
            assert reader.get_key_patches()[key][0][0] is own
    comfy.model_management.unload_all_models()
    assert live.modulation is own and key not in base.backup


@pytest.mark.parametrize(
    ("strengths", "how", "said"),
    [
        ((1.0, 0.5), {}, None),
        ((0.3, 1.0), {}, "Strength: 0.3"),
        ((0.3, 1.0), {"schedule": "0.5"}, "Strength: 0.3 x 0.5 (schedule)"),
        ((0.3, 1.0), {"schedule": "0@0, 1@1"}, "Strength: 0.3 x the schedule"),
        ((1.0, 1.0), {"schedule": "0@0, 1@1"}, "Strength: that of the schedule"),
    ],
)
def test_report_says_the_strength(model, strengths, how, said):
    base, path = model("flux"), LAYERS[0]
    file = made.adapter({path: made.factors("lora", shape(base, path))})
    done = host.apply(base, None, file, *strengths, **how)
    lines = [line for line in done.to_text().split("\n") if line.startswith("Strength")]
    assert lines == ([said] if said else [])
    (row,) = done.to_dict()["matched"].values()
    assert row["title"] == "LoRA"


def test_a_widened_weight_of_another_clone_is_not_seen(load):
    """ComfyUI leaves what it merged for one clone in the modules that all share."""
    model = load("flux")
    name = "diffusion_model.img_in"
    before = host.index(model)["img_in"]
    wider = {f"{name}.lora_up.weight": torch.ones(before[0], 2),
             f"{name}.lora_down.weight": torch.ones(2, 2 * before[1]),
             f"{name}.reshape_weight": torch.tensor([before[0], 2 * before[1]])}  # fmt: skip
    other = host.apply(model, None, Adapter(wider)).model
    other.patch_model()
    try:
        assert model.model.diffusion_model.img_in.weight.shape[1] == 2 * before[1]
        assert host.index(model)["img_in"] == before
    finally:
        other.unpatch_model()
