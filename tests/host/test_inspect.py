"""Inspect Adapter measures what LyCORIS adds to the weights."""

from __future__ import annotations

import json

import comfy.model_management
import made
import pytest
import torch
import torch.nn as nn
from adapter_lab.core.files import Adapter
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host.session import layers
from adapter_lab.nodes.inspect import InspectAdapter
from adapter_lab.nodes.plots import block_plot, loss_plot
from adapter_lab.nodes.types import panel
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule

BLOCKS = {
    "double_blocks.0": ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0"],
    "single_blocks.0": ["single_blocks.0.linear2"],
}
PATH = "double_blocks.0.img_attn.qkv"


def written(model, build, **options):
    """A file of LyCORIS modules with random factors, and the norm of their change by block."""
    torch.manual_seed(0)
    file, norms = Adapter(name="a.safetensors"), {}
    for block, names in BLOCKS.items():
        square = 0.0
        for name in names:
            weight = layers(model)[name].weight.detach().float().clone()
            base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            base.weight.data.copy_(weight)
            stem = "lora_unet_" + name.replace(".", "_")
            module = build(stem, base, 1.0, lora_dim=4, **{"alpha": 2, **options})
            for parameter in module.parameters():
                if parameter is not base.weight:
                    nn.init.normal_(parameter, std=0.2)
            file |= {f"{stem}.{k}": v.clone() for k, v in module.state_dict().items()}
            square += float((module.get_merged_weight()[0] - weight).detach().norm() ** 2)
        norms[block] = square**0.5
    return file, norms


def inspect(file, model=None):
    """What the node shows, and its picture."""
    done = InspectAdapter.execute(file, model)
    text, plot = done.args
    return text, plot, done.ui["adapter_lab"][0]


@pytest.mark.parametrize(
    ("build", "options"),
    # LyCORIS' merged weight has the scale of a LoKr twice, unlike its forward pass.
    [
        (LoConModule, {}),
        (LokrModule, {"factor": 4, "alpha": 4}),
        (LoConModule, {"weight_decompose": True}),
    ],
    ids=["lora", "lokr", "dora"],
)
def test_norms_are_those_of_lycoris(load, build, options):
    model = load("flux")
    file, wanted = written(model, build, **options)
    _, _, shown = inspect(file, model)
    assert dict(shown["norms"]) == pytest.approx(wanted, rel=1e-4)
    assert [block for block, _ in shown["norms"]] == list(BLOCKS)
    assert len(shown["matched"]) == 3 and not shown["unmatched"]
    alone = inspect(file)[2]
    # What depends on the weights can't be told without them.
    known = {} if options.get("weight_decompose") else wanted
    assert dict(alone["norms"]) == pytest.approx(known, rel=1e-4)
    assert "matched" not in alone


def test_file_for_another_model_is_described_all_the_same(load):
    file, wanted = written(load("flux"), LoConModule)
    text, _, shown = inspect(file, load("sd15"))
    assert dict(shown["norms"]) == pytest.approx(wanted, rel=1e-4)
    assert not shown["matched"] and "FLUX.1" in text


def test_says_what_the_trainer_left(load):
    file, _ = written(load("flux"), LoConModule)
    file.metadata["ss_tag_frequency"] = '{"1_x": {"ohwx": 7, "hat": 2}, "2_y": {"hat": 6}}'
    file.metadata["modelspec.trigger_phrase"] = "ohwx woman"
    text, _, shown = inspect(file)
    facts = dict(shown["facts"])
    assert facts["top tags"] == "hat (8), ohwx (7)" and facts["trigger words"] == "ohwx woman"
    assert "rank 4 alpha 2" in text and "ohwx woman" in text


def test_plot_has_a_bar_for_each_block():
    """Their areas are as the norms: 1, 3 and, of another kind, 2."""
    plot = block_plot([("a.0", 1.0), ("a.1", 3.0), ("b.0", 2.0)])
    assert plot.shape[0] == 1 and plot.shape[3] == 3 and plot.min() >= 0 and plot.max() <= 1
    # The lower part, without captions: of the rows that bars can be in.
    picture = (plot[0] * 255).round().int()
    colours = [tuple(c) for c in picture[:, 60:].reshape(-1, 3).tolist()]
    counts = {c: colours.count(c) for c in set(colours)}
    background, first, second = sorted(counts, key=counts.get, reverse=True)[:3]
    assert counts[first] / counts[second] == pytest.approx((1 + 3) / 2, rel=0.05)
    assert counts[background] > counts[first]


def test_nothing_to_draw_is_an_empty_plot():
    assert block_plot([]).shape == block_plot([("a", 1.0)]).shape


def random_adapter(model, algorithm="oft"):
    size = tuple(layers(model)[PATH].weight.shape)
    return made.adapter({PATH: made.factors(algorithm, size)})


def test_measures_the_models_own_weights(load):
    """Whatever is merged into them at the moment, for another clone."""
    model = load("flux")
    file, size = random_adapter(model), tuple(layers(model)[PATH].weight.shape)
    with torch.inference_mode():
        before = inspect(file, model)[2]["norms"]
        other = made.adapter({PATH: {"diff": torch.ones(size)}})
        comfy.model_management.load_models_gpu([host.apply(model, None, other).model])
        assert float(layers(model)[PATH].weight.mean()) > 0.9
        assert inspect(file, model)[2]["norms"] == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_says_which_blocks_are_broken(load, bad):
    """JSON has no word for these, and a browser reads none that has."""
    model = load("flux")
    file, _ = written(model, LoConModule)
    broken = "lora_unet_single_blocks_0_linear2.lora_up.weight"
    file[broken][0, 0] = bad
    text, plot, shown = inspect(file, model)
    assert [block for block, _ in shown["norms"]] == ["double_blocks.0"]
    assert "single_blocks.0" in dict(shown["facts"])["broken"] and "not finite" in text
    assert plot.isfinite().all()
    json.dumps(shown, allow_nan=False)


def test_can_be_cancelled(load):
    model = load("flux")
    file = random_adapter(model)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        inspect(file, model)


def test_loss_that_is_not_finite_is_left_out():
    bad = [1.0, 0.5, float("nan"), float("inf"), 0.25]
    plot = loss_plot(bad, [(2, 0.5), (4, float("nan"))])
    assert plot.isfinite().all() and loss_plot([float("nan")], []).shape == plot.shape
    assert plot.unique().numel() > loss_plot([], []).unique().numel()
    shown = panel("", {"losses": bad, "validation": [(4, float("-inf"))]})["adapter_lab"][0]
    assert shown["losses"] == [1.0, 0.5, None, None, 0.25] and shown["validation"] == [[4, None]]


def test_broken_file_is_described_beside_a_model(load):
    file = Adapter({f"diffusion_model.{PATH}.lora_up.weight": torch.ones(4, 2)}, name="half")
    text, _, data = inspect(file, load("flux"))
    assert "lora_down.weight" in data["text"] and "half: 1 modules" in text


def test_any_name_can_be_drawn():
    assert block_plot([("a\nb\0c", 1.0), ("x" * 500, 2.0)]).shape == block_plot([]).shape
