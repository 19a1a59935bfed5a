"""MagCache with what else people put on a model."""

from __future__ import annotations

import cached
import comfy.hooks
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_context_windows as windows
import comfy_extras.nodes_easycache as rivals
import comfy_extras.nodes_slg as slg
import made
import pytest
import samples
import tiny
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.nodes.host.cache_branches import Branches
from cached import SKIPPED, conditioning, sample, seen
from comfy.controlnet import ControlBase
from comfy_api.torch_helpers import set_torch_compile_wrapper

LAYER = "double_blocks.0.img_attn.qkv"


class Control(ControlBase):
    """The least of a ControlNet: it adds the same to the image after each block."""

    def __init__(self, size):
        super().__init__()
        self.calls, self.size, self.end = 0, size, 99

    def get_control(self, x, t, cond, batched_number, transformer_options):
        self.calls += 1
        sigmas = transformer_options["sample_sigmas"].tolist()
        if sigmas.index(float(t[0])) >= self.end:
            return None
        return {side: [0.3 * torch.ones(self.size)] for side in ("input", "output")}

    def copy(self):
        return self


@pytest.fixture
def branches(monkeypatch):
    """Keys of the states that are asked for."""
    keys, get = set(), Branches._branch

    def asked(self, key):
        keys.add(key)
        return get(self, key)

    monkeypatch.setattr(Branches, "_branch", asked)
    return keys


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_with_an_adapter_on_either_side(model, mode):
    flux = model("flux")
    sizes = samples.shape(flux, LAYER)
    file = made.adapter({LAYER: made.factors("lora", sizes)})
    with seen(flux, "flux") as (watched, watch):
        before = cached.cached(samples.apply(watched, file, mode=mode))
        after = samples.apply(cached.cached(watched), file, mode=mode)
        pictures = [sample(one, "flux") for one in (before, after)]
        assert watch.skipped() == SKIPPED and len(watch.calls) == 2 * cached.STEPS
        bare = sample(cached.cached(watched), "flux")
    assert torch.equal(*pictures) and not torch.equal(pictures[0], bare)
    adapted = samples.apply(flux, file, mode=mode)
    computed = sample(cached.cached(adapted, threshold=1e-9), "flux")
    assert torch.equal(computed, sample(adapted, "flux"))


@pytest.mark.parametrize("level", ["blocks", "network"])
def test_control(model, level):
    """That it acts once is tested with the blocks; here that it comes and goes with its steps."""
    flux, control = model("flux"), Control((1, 16, 128))
    conds = [
        conditioning("flux", seed, control=control, control_apply_to_uncond=True) for seed in (1, 2)
    ]
    with seen(flux, "flux") as (watched, watch):
        made_ = sample(cached.cached(watched, residual=level), "flux", "euler", 3.0, 12, *conds)
        assert watch.skipped() == SKIPPED and control.calls == cached.STEPS
        computed = cached.cached(watched, residual=level, threshold=1e-9)
        plain = sample(watched, "flux", "euler", 3.0, 12, *conds)
        assert torch.equal(sample(computed, "flux", "euler", 3.0, 12, *conds), plain)
        assert not torch.equal(made_, sample(cached.cached(watched, residual=level), "flux"))
        control.end, watch.calls = 6, []
        sample(cached.cached(watched, residual=level), "flux", "euler", 3.0, 12, *conds)
    assert 6 not in watch.skipped() and 7 not in watch.skipped()[:2]


def test_patches_between_the_blocks(model):
    """They are called on every step, and what they add is there once."""
    wan, calls = model("wan").clone(), []

    def patch(args):
        calls.append(args["block_index"])
        return {"img": args["img"] + 0.1}

    wan.set_model_patch(patch, "double_block")
    with seen(wan, "wan") as (watched, watch):
        sample(cached.cached(watched), "wan")
    assert watch.skipped() == SKIPPED and calls == [0, 1] * cached.STEPS
    computed = sample(cached.cached(wan, threshold=1e-9), "wan")
    assert torch.equal(computed, sample(wan, "wan"))


@pytest.mark.parametrize("place", [("double_block", 0), ("single_block", 0)])
def test_other_replacements_of_blocks_are_called(model, place):
    """In their turn on computed steps: the picture is as if they were alone."""
    flux, calls = model("flux"), []

    def replaced(args, extra):
        calls.append(place)
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.5}

    patched = flux.clone()
    patched.set_model_patch_replace(replaced, "dit", *place)
    computed = sample(cached.cached(patched, threshold=1e-9), "flux")
    assert torch.equal(computed, sample(patched, "flux")) and len(calls) == 2 * cached.STEPS
    calls.clear()
    sample(cached.cached(patched), "flux")
    assert len(calls) == cached.STEPS - len(SKIPPED)


def test_a_second_evaluation_without_some_layers(model, branches):
    """Skip-layer guidance evaluates the same conditioning again, at the same noise level."""
    guided = slg.SkipLayerGuidanceDiT.execute(
        model("flux"), scale=3.0, start_percent=0.0, end_percent=1.0, double_layers="0",
        single_layers="",
    ).result[0]  # fmt: skip
    plain = sample(guided, "flux")
    assert torch.equal(sample(cached.cached(guided, threshold=1e-9), "flux"), plain)
    assert len(branches) == 3 and len({key[0] for key in branches}) == 2


def test_guidance_compares_like_with_like(model):
    """What cond is compared with is computed where cond is, also where uncond alone asks for it."""
    guided = slg.SkipLayerGuidanceDiT.execute(
        model("flux"), scale=3.0, start_percent=0.0, end_percent=1.0, double_layers="",
        single_layers="0",
    ).result[0]  # fmt: skip
    lists = {"cond": (1.0, *(0.97,) * 11), "uncond": (1.0, *(0.5,) * 11)}
    with seen(guided, "flux") as (watched, watch):
        sample(cached.cached(watched, manual=lists), "flux")
    pair, alone = ([ran for _, who, ran in watch.calls if len(who) == n] for n in (2, 1))
    assert pair == alone == [True] * cached.STEPS


def test_a_function_around_the_model(model):
    flux = model("flux").clone()
    calls = []

    def around(apply_model, args):
        calls.append(1)
        return apply_model(args["input"], args["timestep"], **args["c"]) * 0.9

    flux.set_model_unet_function_wrapper(around)
    with seen(flux, "flux") as (watched, watch):
        sample(cached.cached(watched), "flux")
    assert watch.skipped() == SKIPPED and len(calls) == cached.STEPS
    computed = sample(cached.cached(flux, threshold=1e-9), "flux")
    assert torch.equal(computed, sample(flux, "flux"))


@pytest.mark.parametrize(
    ("node", "name"),
    [(rivals.EasyCacheNode, "EasyCache"), (rivals.LazyCacheNode, "LazyCache")],
)
@pytest.mark.parametrize("first", [True, False])
def test_other_caches_are_refused(model, node, name, first):
    def rival(given):
        return node.execute(
            given, reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False
        ).result[0]

    flux = model("flux")
    both = cached.cached(rival(flux)) if first else rival(cached.cached(flux))
    with pytest.raises(AdapterLabError, match=name):
        sample(both, "flux")


class Layer(torch.nn.Module):
    """The least of a network: what compiles in no time."""

    def __init__(self):
        super().__init__()
        self.dtype = torch.float32
        self.mix = torch.nn.Linear(16, 16)

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **_):
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled(load, in_place):
    """Skipped steps call nothing compiled, and neither skips nor steps compile anything anew."""
    torch.manual_seed(0)
    flux, network, compiled, calls = load("flux"), Layer(), [], []
    flux.add_object_patch("diffusion_model", network)
    plain = sample(flux, "flux")

    def backend(graph, inputs):
        compiled.append(graph)
        return lambda *args: (calls.append(len(compiled)), graph(*args))[1]

    torch._dynamo.reset()
    if in_place:
        network.compile(backend=backend)
    else:
        set_torch_compile_wrapper(flux, backend=backend, keys=["diffusion_model"])
    assert torch.allclose(sample(cached.cached(flux, threshold=1e-9), "flux"), plain, atol=1e-4)
    graphs, each = len(compiled), len(calls) // cached.STEPS
    calls.clear()
    sample(cached.cached(flux), "flux")
    torch._dynamo.reset()
    assert len(compiled) == graphs and len(calls) == each * (cached.STEPS - len(SKIPPED)) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision(tmp_path, dtype):
    path = tiny.write("flux", tmp_path / "half.safetensors", dtype)
    with torch.inference_mode():
        flux = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})
    with seen(flux, "flux") as (watched, watch):
        made_ = sample(cached.cached(watched), "flux")
        assert watch.skipped() == SKIPPED and made_.isfinite().all()
    assert torch.equal(sample(cached.cached(flux, threshold=1e-9), "flux"), sample(flux, "flux"))


def test_context_windows(model, branches):
    """Each window has residuals of its own."""
    node = windows.ContextWindowsManualNode.execute(
        model("wan"), context_length=4, context_overlap=2, context_schedule="standard_static",
        context_stride=1, closed_loop=False, fuse_method="pyramid", dim=4, freenoise=False,
    ).result[0]  # fmt: skip
    with seen(node, "wan") as (watched, watch):
        made_ = sample(cached.cached(watched), "wan")
    count = len(watch.calls) // cached.STEPS
    assert watch.skipped() == SKIPPED and count > 1 and made_.isfinite().all()
    assert len(branches) == 2 * count
    plain = sample(node, "wan")
    assert torch.equal(sample(cached.cached(node, threshold=1e-9), "wan"), plain)


def test_conditionings_with_weights_of_their_own(model, checkpoints):
    """A LoRA that is on for one of them: it is evaluated apart, with a residual of its own."""
    flux = model("flux")
    lora = {
        f"diffusion_model.{LAYER}.lora_{side}.weight": torch.randn(*size)
        for side, size in (("down", (4, 128)), ("up", (384, 4)))
    }
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    assert hooks is not None
    positive = conditioning("flux", 1, hooks=hooks)
    plain = sample(flux, "flux", positive=positive)
    assert not torch.equal(plain, sample(flux, "flux"))
    assert torch.equal(
        sample(cached.cached(flux, threshold=1e-9), "flux", positive=positive), plain
    )
    with seen(flux, "flux") as (watched, watch):
        sample(cached.cached(watched), "flux", positive=positive)
    assert {told for _, told, _ in watch.calls} == {(0,), (1,)} and watch.skipped() == SKIPPED
