"""Training Objective: noise levels, error and weights of the training loss."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..core.train.losses import LOSSES, SCHEDULES
from ..core.train.objective import BOUNDS, Objective, ObjectiveConfig
from ..core.train.process import Flow, Noise
from ..core.train.random import generator
from ..core.train.timesteps import NAMES, RANGES
from ..core.train.weighting import WEIGHTINGS, weights
from .host.noise import noise
from .plots import level_plot
from .types import CATEGORY, ObjectiveConfigType, panel

_CATEGORY = f"{CATEGORY}/train"
_DRAWS = 4000
_DEFAULTS = ObjectiveConfig()

_SAMPLING = (
    "How noise levels are drawn. auto: for flow models logit_normal with the shift of the model, "
    "5 at most, for others uniform. schedule: as the model samples. shift: sigmoid, moved towards "
    "noise by 'shift'. flux_shift and the like: by the size of the image, as those models sample. "
    "mode: more of the middle. logsnr: normal logarithm of signal to noise."
)
_WEIGHTING = (
    "How much each noise level counts. min_snr: less for nearly clean images of eps and v models; "
    "for flow models less for noisy ones. debiased: eps and v models. sigma_sqrt and cosmap: flow "
    "models; sigma_sqrt is extreme near clean images."
)
_NUMBERS = {
    "mean": "logit_normal: centre, above 0 for more noise. logsnr: centre, above 0 for less noise.",
    "std": "Width of what is drawn: sigmoid_scale of other trainers.",
    "shift": "shift: odds of noise are multiplied by it. 3 for SD3, 3.16 for Flux at 1024 pixels.",
    "mode_scale": "mode: above 0 for more of the middle, below 0 for more of both ends.",
    "min_timestep": "Least noise level, 0 is clean.",
    "max_timestep": "Greatest noise level, 1 is noise.",
    "gamma": "min_snr: the limit; 5 in its paper.",
    "huber_c": "huber, smooth_l1: the error from which on it counts less than squared.",
    "unmasked_weight": "Least weight of a place in items that have a mask.",
    "prior_weight": "Weight of regularisation images.",
    "noise_offset": "Adds noise that is the same everywhere in a channel, for darker darks and "
    "brighter brights. 0.05 to 0.1 for SD1.5 and SDXL.",
    "adaptive_noise_scale": "Adds this times the mean of the channel to noise_offset.",
    "input_perturbation": "Noise that the model is not asked to find. 0.1 in its paper.",
    "guidance": "Told to models distilled with guidance (Flux dev, HunyuanVideo), where the "
    "conditioning does not say. 1 keeps the distillation best.",
}
_CHOICES = {
    "timestep_sampling": (NAMES, _SAMPLING),
    "timestep_range": (
        RANGES,
        "rescale: squeeze all levels into the range. reject: draw levels outside again.",
    ),
    "weighting": (WEIGHTINGS, _WEIGHTING),
    "loss": (LOSSES, "What an error costs. huber, smooth_l1, l1: outliers count less."),
    "huber_schedule": (
        SCHEDULES,
        "huber, smooth_l1: how huber_c grows to 1 towards clean images.",
    ),
}
_PLAIN = ("timestep_sampling", "mean", "std", "shift", "weighting", "loss")


def _input(name: str) -> io.Input:
    more: dict[str, Any] = {"default": getattr(_DEFAULTS, name), "advanced": name not in _PLAIN}
    if name in _CHOICES:
        options, tooltip = _CHOICES[name]
        return io.Combo.Input(name, options=list(options), tooltip=tooltip, **more)
    low, high = BOUNDS[name]
    return io.Float.Input(
        name, min=low, max=high, step=0.01, round=False, tooltip=_NUMBERS[name], **more
    )


def _side(name: str) -> io.Input:
    return io.Int.Input(
        name,
        default=1024,
        min=16,
        max=16384,
        step=8,
        advanced=True,
        tooltip="Size of an image, for the histogram alone: training goes by each image's own.",
    )


class ChooseObjective(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdapterLabObjective",
            display_name="Training Objective",
            category=_CATEGORY,
            description="Which noise levels are trained, what an error costs and how much it "
            "counts. The target is always what the model was trained to predict.",
            search_aliases=["timesteps", "min snr", "huber", "loss weighting", "noise offset"],
            has_intermediate_output=True,
            inputs=[
                *(_input(name) for name in ObjectiveConfig.__dataclass_fields__),
                _side("width"),
                _side("height"),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For the histogram alone: the model that is trained. Without it, a "
                    "flow model without a shift.",
                ),
            ],
            outputs=[
                ObjectiveConfigType.Output(display_name="objective", tooltip="For Train Adapter."),
                io.Image.Output(
                    display_name="histogram", tooltip="The noise levels that training draws."
                ),
            ],
        )

    @classmethod
    def execute(cls, width: int, height: int, model: Any = None, **options: Any) -> io.NodeOutput:
        config = ObjectiveConfig(**options)
        levels: Noise = Flow()
        scale = 16 if config.timestep_sampling == "flux2_shift" else 8
        if model is not None:
            levels = noise(model.get_model_object("model_sampling"))
            scale = model.get_model_object("latent_format").spacial_downscale_ratio
        Objective(config).require(levels)
        size = (height // scale, width // scale)
        t = config.timesteps.draw(levels, size, _DRAWS, generator(0, "histogram"))
        at = torch.linspace(float(t.min()), float(t.max()), 200)
        curve = weights(config.weighting, levels, at, config.gamma)
        text = _text(config, levels, model is not None, t)
        return io.NodeOutput(config, level_plot(t, at, curve), ui=panel(text))


def _text(config: ObjectiveConfig, levels: Noise, known: bool, t: torch.Tensor) -> str:
    """What will be drawn, in words."""
    shift = f", shift {levels.shift:.3g}" if levels.shift != 1 else ""
    low, middle, high = torch.quantile(t, torch.tensor([0.05, 0.5, 0.95])).tolist()
    facts = [
        f"{levels.kind} model{shift}" if known else "no model connected: a flow without a shift",
        f"{config.timestep_sampling}: half of the noise levels below {middle:.2f}, "
        f"nine of ten from {low:.2f} to {high:.2f}",
        f"{config.loss} loss, weighting {config.weighting}",
    ]
    return "\n".join(facts)


NODES = [ChooseObjective]
