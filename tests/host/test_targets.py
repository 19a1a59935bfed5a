"""Training Targets: what the node says of a choice, before anything is trained."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import comfy.ops
import encoders
import pytest
import torch
import torch.nn as nn
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.adapters.training import make
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.targets import Targets
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host import session
from adapter_lab.nodes.host.targets import chosen, trainable, with_bias
from adapter_lab.nodes.targets import ChooseTargets
from comfy.ldm.flux.model import Flux

KINDS = ("flux", "wan", "sd15", "sd3", "hunyuan_video")


def said(model, **options):
    """The node's output, run as ComfyUI does with every input set."""
    given = {
        "preset": "default", "exclude": "", "include": "", "default_excludes": True,
        "convolutions": True, "norms": False, "blocks": "", "train": "model",
    }  # fmt: skip
    with torch.inference_mode():
        return ChooseTargets.execute(model, **given | options)


def counted(text):
    """(modules, of how many, parameters to train)."""
    first, second = text.splitlines()[:2]
    number = second.rpartition(": ")[2].split()[0]
    return int(first.split()[0]), int(first.split()[2]), int(number.replace(",", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_knows_every_layer_of_the_model(load, kind):
    """As the session that trains them, with norms beside."""
    model = load(kind)
    layers = {f"diffusion_model.{name}" for name in session.layers(model)}
    found = trainable(model)
    assert {path for path, shape in found.items() if len(shape) > 1} == layers
    named = dict(model.model.named_parameters())
    assert all(tuple(named[f"{path}.weight"].shape) == shape for path, shape in found.items())
    assert with_bias(found, model) == {path for path in found if f"{path}.bias" in named}


@pytest.mark.parametrize("preset", ["default", "attention only", "everything"])
@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "full"])
def test_counts_what_would_be_trained(load, preset, algorithm):
    model, config = load("sd15"), AdapterConfig(algorithm, 4, bias=True)
    text = said(model, preset=preset, config=config, norms=True)[1]
    modules, of, number = counted(text)
    layers = trainable(model)
    shapes = chosen(Targets(preset, norms=True), model, None, host.architecture(model))
    biased = with_bias(shapes, model)
    made = (
        make(shape, config, torch.Generator(), biased=path in biased)
        for path, shape in shapes.items()
    )
    assert number == sum(t.numel() for a in made for t in a.trained.values())
    assert (modules, of) == (len(shapes), len(layers))
    assert text.splitlines()[1].startswith(algorithm)


def test_names_and_sizes_are_listed(load):
    text = said(load("flux"))[1]
    assert "double_blocks.0.img_attn.qkv  384 x 128" in text
    assert "LoRA of rank 16: " in text
    ranks = [16 * (a + b) for a, b in (
        (384, 128), (128, 128), (512, 128), (128, 512),
    )]  # fmt: skip
    assert counted(text)[2] == 2 * sum(ranks) + 16 * (896 + 128 + 128 + 640)


def test_default_excludes_are_shown_and_switchable(load):
    text = said(load("flux"))[1]
    assert r"Left out by default: 3 modules that match .*(img_mod\.lin" in text
    without = said(load("flux"), default_excludes=False)[1]
    assert "Left out" not in without and counted(without)[0] == counted(text)[0] + 3


def test_what_has_no_effect_is_said(load):
    text = said(load("flux"), exclude="nothing\n.*txt.*", blocks="0, 30")[1]
    notes = [line for line in text.splitlines() if line.startswith("Note")]
    assert notes == ["Note: 'nothing' matches nothing", "Note: '30' matches nothing"]
    (note,) = (line for line in said(load("flux"), config=AdapterConfig("lokr", 64))[1].splitlines()
               if "128, 128" in line and "Note" in line)  # fmt: skip
    assert note.endswith("(2 modules)")


def test_text_encoders_are_listed(load):
    clip = encoders.make("flux")
    alone = said(load("flux"), train="text encoder", clip=clip)[1]
    both = said(load("flux"), train="both", clip=clip)[1]
    model = said(load("flux"), clip=clip)[1]
    assert counted(alone)[0] + counted(model)[0] == counted(both)[0]
    assert "t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo  64 x 128" in alone
    assert "img_attn.qkv" not in alone and "t5xxl" not in model
    with pytest.raises(AdapterLabError, match="Connect 'clip'"):
        said(load("flux"), train="both")


def test_a_model_with_an_adapter_on_counts_as_without(load):
    model = load("flux")
    before = said(model)[1]
    path = "diffusion_model.double_blocks.0.img_attn.qkv"
    adapted = model.clone()
    with torch.inference_mode():
        wide = torch.zeros(384, 256)
        adapted.add_patches({f"{path}.weight": ("diff", (wide, {"pad_weight": True}))}, 1.0)
        comfy.model_management.load_models_gpu([adapted])
        assert adapted.model.get_submodule(path).weight.shape == (384, 256)
        assert said(adapted)[1] == before
        comfy.model_management.unload_all_models()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exclude": "("}, "regular expression"),
        ({"exclude": ".*"}, "No module is left"),
        ({"blocks": "one"}, "No module is left"),
        ({"blocks": "3-1"}, "not understood"),
        ({"config": AdapterConfig("boft", 1)}, "BOFT"),
    ],
)
def test_refusals(load, options, says):
    with pytest.raises(AdapterLabError, match=says):
        said(load("flux"), **options)


@pytest.mark.timeout(60)
def test_twelve_billion_parameters_take_no_time():
    """FLUX.1's own sizes, on the meta device."""
    with torch.device("meta"):
        network = Flux(
            in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
            mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56],
            theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
            operations=comfy.ops.disable_weight_init, dtype=torch.bfloat16, device="meta",
        )  # fmt: skip
    patcher = SimpleNamespace(model=nn.Module(), backup={})
    patcher.model.diffusion_model = network
    text = said(patcher, config=AdapterConfig("full"))[1]
    modules, _, number = counted(text)
    assert modules == 19 * 8 + 38 * 2 and 8e9 < number < 12e9
