"""A strength that follows sampling is, at each step, that strength."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import made
import pytest
import samples
import torch
from adapter_lab.core.schedule import parse
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host.bypass import KEY
from adapter_lab.nodes.host.schedule import progress
from comfy.patcher_extension import WrappersMP

TEXT = "0@0, 1@0.3, 0.2@0.9"
LAYERS = {
    "flux": ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"),
    "sd3": ("joint_blocks.0.x_block.attn.qkv", "x_embedder.proj"),
    "sd15": ("input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in"),
    "wan": ("blocks.0.self_attn.q", "patch_embedding"),
}
# Of parameters that no layer takes: a norm that ComfyUI casts, one that it does not, a raw one.
OTHERS = {
    "flux": {"single_blocks.0.norm.query_norm": ("w_norm", (128,))},
    "sd3": {"joint_blocks.0.x_block.attn.ln_q": ("w_norm", (64,))},
    "sd15": {"input_blocks.1.0.in_layers.0": ("b_norm", (320,))},
    "wan": {"blocks.1.modulation": ("diff", (1, 6, 128)), "blocks.0.norm3": ("w_norm", (128,))},
}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def adapter(model, kind):
    sizes = host.shapes(model.model)
    modules = {
        path: made.factors("lora", sizes[f"diffusion_model.{path}.weight"]) for path in LAYERS[kind]
    }
    rng = torch.Generator().manual_seed(0)
    biased = next(p for p in LAYERS[kind] if f"diffusion_model.{p}.bias" in sizes)
    size = sizes[f"diffusion_model.{biased}.bias"]
    modules[biased] |= {"diff_b": torch.randn(size, generator=rng)}
    for path, (suffix, size) in OTHERS[kind].items():
        modules[path] = {suffix: torch.randn(size, generator=rng)}
    return made.adapter(modules)


def conditioning(kind, seed):
    (item,) = samples.items(kind, 1, seed=seed)
    pooled = {n: t[None] for n, t in item.extra.items()}
    return [[item.cond[None], pooled]]


def sample(model, kind, sampler="euler", steps=4, cfg=3.0, scheduler="simple", wrap=None):
    """One picture by ComfyUI's own sampling; ``wrap`` sees each call of the model."""
    if wrap:
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", wrap)
    latent = torch.zeros(1, *samples.SHAPES[kind])
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, conditioning(kind, 1), conditioning(kind, 2),
        latent, disable_pbar=True, seed=0,
    )  # fmt: skip


def percent(model, sigma):
    """By trying them all."""
    sampling = model.model.model_sampling
    grid = [i / 20000 for i in range(20001)]
    return min(grid, key=lambda p: abs(float(sampling.percent_to_sigma(p)) - sigma))


@pytest.mark.parametrize("kind", LAYERS)
def test_each_step_has_its_strength(load, kind):
    """Every call of the model, of two samplers, against the same call at that strength alone."""
    model = load(kind)
    file, curve = adapter(model, kind), parse(TEXT)
    adapted = host.apply(model, None, file, 0.8, mode="auto", schedule=TEXT)
    assert adapted.mode.chosen == "bypass"
    assert adapted.to_dict()["schedule"] == [[0.0, 0.0], [0.3, 1.0], [0.9, 0.2]]
    calls = []

    def record(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        calls.append(([a.clone() if torch.is_tensor(a) else a for a in args], kwargs, out.clone()))
        return out

    for sampler in ("euler", "heun"):
        sample(adapted.model, kind, sampler, wrap=record)
    strengths = set()
    for args, kwargs, expected in calls:
        sigma = float(args[1][0])
        strength = 0.8 * curve.at(percent(model, sigma))
        strengths.add(round(strength, 2))
        constant = host.apply(model, None, file, strength, mode="merge").model
        comfy.model_management.load_models_gpu([constant])
        x = args[0]
        ours, theirs = x - expected, x - constant.model._apply_model(*args, **kwargs)
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-4
    assert len(strengths) >= 4


@pytest.mark.parametrize("scheduler", ["simple", "karras"])
@pytest.mark.parametrize("kind", ["flux", "sd15", "sd3"])
def test_progress_is_that_of_comfyui(load, kind, scheduler):
    sampling = load(kind).model.model_sampling
    for sigma in comfy.samplers.calculate_sigmas(sampling, scheduler, 7):
        found = progress(sampling, float(sigma))
        assert 0 <= found <= 1
        if 0 < found < 0.999:
            assert float(sampling.percent_to_sigma(found)) == pytest.approx(float(sigma), rel=1e-3)
    assert progress(sampling, float(sampling.sigma_max)) < 0.01
    assert progress(sampling, 0.0) == pytest.approx(1.0, abs=1e-5)


def test_leaves_nothing_behind(load):
    """After sampling, and after one that was cancelled between two steps."""
    model = load("wan")
    file = adapter(model, "wan")
    adapted = host.apply(model, None, file, schedule=TEXT).model
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    base, expected = sample(model, "wan"), sample(adapted, "wan")
    unscheduled = host.apply(model, None, file, strength_model=1.0, schedule="0").model
    comfy.model_management.load_models_gpu([unscheduled])
    start = samples.prediction(unscheduled, "wan")
    comfy.model_management.load_models_gpu([adapted])
    assert torch.equal(samples.prediction(adapted, "wan"), start)  # progress is 0 again
    calls = []

    def cancel(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing()
        return executor(*args, **kwargs)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(adapted, "wan", wrap=cancel)
    assert torch.equal(sample(model, "wan"), base)
    assert torch.equal(sample(adapted, "wan"), expected)
    comfy.model_management.unload_all_models()
    state = model.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    for module in model.model.modules():
        assert "forward" not in vars(module) and not getattr(module, "weight_function", None)


def test_stacked_schedules_keep_apart(load):
    """One fades in, one out; both at the strength of the moment, against merging both there."""
    model = load("flux")
    one = adapter(model, "flux")
    two = made.adapter({LAYERS["flux"][0]: made.factors("lokr", (384, 128), 7)})
    stacked = host.apply(model, None, one, schedule="0@0, 1@1").model
    stacked = host.apply(stacked, None, two, schedule="1@0, 0@1").model
    assert len(stacked.get_wrappers(WrappersMP.APPLY_MODEL, KEY)) == 1
    results = []

    def record(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        results.append(([a.clone() if torch.is_tensor(a) else a for a in args], kwargs, out))
        return out

    sample(stacked, "flux", steps=3, cfg=1.0, wrap=record)
    for args, kwargs, out in results:
        p = percent(model, float(args[1][0]))
        merged = host.apply(model, None, one, p, mode="merge").model
        merged = host.apply(merged, None, two, 1 - p, mode="merge").model
        comfy.model_management.load_models_gpu([merged])
        expected = args[0] - merged.model._apply_model(*args, **kwargs)
        assert float((args[0] - out - expected).norm() / expected.norm()) < 2e-4


def test_costs_nothing_where_it_is_constant(load):
    model = load("flux")
    file = adapter(model, "flux")
    done = host.apply(model, None, file, schedule="0.5@0", mode="bypass")
    assert not done.model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    assert "schedule" not in done.to_dict()
    results = []
    for adapted in (
        host.apply(model, None, file, schedule="0.5"),
        host.apply(model, None, file, 0.5),
    ):
        assert adapted.mode.chosen == "merge"
        comfy.model_management.load_models_gpu([adapted.model])
        results.append(samples.prediction(adapted.model, "flux"))
    assert torch.equal(*results)
