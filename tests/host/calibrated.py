"""Runs of tiny models and calibrations of them."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import made
import samples
import torch
from adapter_lab.core.cache.calibration import Calibration, Curve, write_calibration
from adapter_lab.core.cache.timeline import Timeline
from adapter_lab.nodes.host import caching, calibrations, paths, ratios

STEPS = 10
QKV = {
    "flux": "double_blocks.0.img_attn.qkv",
    "wan": "blocks.0.self_attn.q",
    "sd15": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
}


def sample(model, kind="flux", steps=STEPS, cfg=3.0, sampler="euler", **part):
    """A latent sampled by ComfyUI itself from fixed noise."""
    items = samples.items(kind, 2, seed=3)
    conds = [
        [[item.cond[None], {name: value[None] for name, value in item.extra.items()}]]
        for item in items
    ]
    latent = torch.zeros(1, *samples.SHAPES[kind])
    noise = comfy.sample.prepare_noise(latent, 5)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", *conds, latent, seed=5, disable_pbar=True,
        **part,
    )  # fmt: skip


def schedule(model):
    sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "simple", STEPS).tolist()


def files():
    return sorted(path.name for path in paths.calibrations().glob("*"))


def adapted(model, kind, mode):
    sizes = samples.shape(model, QKV[kind])
    return samples.apply(model, made.adapter({QKV[kind]: made.factors("lora", sizes)}), mode=mode)


def steps(count=STEPS, start=0, stop=None):
    """A run of steps ``start`` to ``stop`` of a schedule of ``count``."""
    sigmas = tuple(1 - i / count for i in range(count))
    return Timeline(sigmas, start, count if stop is None else stop)


def ask(model, settings=None, level="blocks", timeline=None, **more):
    axis = -1 if level == "blocks" else 1
    return ratios.choose(
        settings or caching.Settings(), level, axis, timeline or steps(), model, **more
    )


def store(model, level="blocks", name="", first=1.0, last=0.1, bends=(0.5,)):
    """A made-up calibration of ``model``: every ratio is 0.9."""
    of = calibrations.subject(model, level)
    count = round((first - last) * STEPS) + 1
    sigmas = tuple(round(first - i / STEPS, 9) for i in range(count))
    some = (0.0,) * count
    curve = Curve(sigmas, (1.0, *(0.9,) * (count - 1)), some, some, bends * count)
    made = Calibration(of.fingerprint, level, of.architecture, count, {"cond": curve})
    path = paths.calibrations() / f"{name or of.name}.json"
    write_calibration(path, made)
    return path
