"""Settings of a run by the names that sd-scripts, musubi-tuner and LyCORIS have for them.

Reference: kohya-ss/sd-scripts 48d368fa, ``train_network.py``; kohya-ss/musubi-tuner 30c658c,
``hv_train_network.py``; LyCORIS 4.1, ``kohya.py`` (network arguments).
"""

from __future__ import annotations

from ..adapters import AdapterConfig
from .objective import ObjectiveConfig

# Algorithm or variant -> LyCORIS' name, where it is another. LoCon is its "lora".
_LYCORIS = {"oft": "diag-oft", "coft": "diag-oft", "lora_fa": "lora"}
# Field -> name of the network argument; left out where the field is at its default.
_ARGUMENTS = {
    "conv_rank": "conv_dim", "conv_alpha": "conv_alpha", "dropout": "dropout",
    "rank_dropout": "rank_dropout", "module_dropout": "module_dropout",
}  # fmt: skip
_LYCORIS_ARGUMENTS = {
    "factor": "factor", "decompose_both": "decompose_both", "full_matrix": "full_matrix",
    "tucker": "use_tucker", "unit": "block_size", "constraint": "constraint",
    "rescale": "rescaled", "dora": "dora_wd", "rs_lora": "rs_lora", "scalar": "use_scalar",
    "on_input": "train_on_input",
}  # fmt: skip
_FAMILY = {"factor": ("lokr", "glokr"), "on_input": ("ia3",)}  # who else has no use for it
_PLAIN = ("tucker", "dora", "rs_lora", "scalar")  # what makes a LoRA one of LyCORIS
_LOSSES = {"mse": "l2"}
_DEFAULTS = AdapterConfig()


def network(
    config: AdapterConfig, name: str, *, dora: bool = False
) -> tuple[str, dict[str, object]]:
    """``ss_network_module`` and ``ss_network_args`` of an adapter.

    Args:
        name: of the algorithm its modules are of, as a file has them.
        dora: whether they hold DoRA's lengths.
    """
    set_ = {field for field in (*_ARGUMENTS, *_LYCORIS_ARGUMENTS) if _counts(config, field, name)}
    set_ |= {"dora"} if dora else set()
    arguments = {_ARGUMENTS[f]: getattr(config, f) for f in _ARGUMENTS if f in set_}
    if name == "lora" and not set_ & set(_PLAIN):
        if config.algorithm == "dylora":
            return "networks.dylora", {**arguments, "unit": config.unit}
        if config.algorithm == "lora_fa":
            return "networks.lora_fa", arguments
        return "networks.lora", arguments
    more = {_LYCORIS_ARGUMENTS[f]: getattr(config, f) for f in _LYCORIS_ARGUMENTS if f in set_}
    if "dora" in set_:
        more |= {"dora_wd": True, "wd_on_output": config.dora_on == "output"}
    kind = config.algorithm if config.algorithm in _LYCORIS else name
    return "lycoris.kohya", {"algo": _LYCORIS.get(kind, kind), **arguments, **more}


def _counts(config: AdapterConfig, field: str, name: str) -> bool:
    changed = getattr(config, field) != getattr(_DEFAULTS, field)
    return changed and name in _FAMILY.get(field, (name,))


def objective_entries(config: ObjectiveConfig) -> dict[str, object]:
    """``ss_*`` entries of what was minimised; "" for what was not used."""
    huber = config.loss in ("huber", "smooth_l1")
    is_logit = config.timestep_sampling == "logit_normal"
    return {
        "ss_loss_type": _LOSSES.get(config.loss, config.loss),
        "ss_huber_schedule": config.huber_schedule if huber else "",
        "ss_huber_c": config.huber_c if huber else "",
        "ss_min_snr_gamma": config.gamma if config.weighting == "min_snr" else "",
        "ss_debiased_estimation": config.weighting == "debiased",
        "ss_weighting_scheme": config.weighting,
        "ss_timestep_sampling": config.timestep_sampling,
        "ss_logit_mean": config.mean if is_logit else "",
        "ss_logit_std": config.std if is_logit else "",
        "ss_sigmoid_scale": config.std if config.timestep_sampling == "sigmoid" else "",
        "ss_mode_scale": config.mode_scale if config.timestep_sampling == "mode" else "",
        "ss_discrete_flow_shift": config.shift if config.timestep_sampling == "shift" else "",
        "ss_min_timestep": round(1000 * config.min_timestep) if config.min_timestep else "",
        "ss_max_timestep": round(1000 * config.max_timestep) if config.max_timestep < 1 else "",
        "ss_noise_offset": config.noise_offset or "",
        "ss_adaptive_noise_scale": config.adaptive_noise_scale or "",
        "ss_ip_noise_gamma": config.input_perturbation or "",
        "ss_prior_loss_weight": config.prior_weight,
        "ss_guidance_scale": config.guidance,
    }
