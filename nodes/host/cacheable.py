"""Whether MagCache can act on a MODEL."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP, get_wrappers_with_key

from ...core.errors import AdapterLabError

RIVALS = {"easycache": "EasyCache", "lazycache": "LazyCache"}  # wrapper key: node


def require_cacheable(model: Any) -> None:
    """Refuse a MODEL without a network, and one that another node makes skip steps."""
    inner = getattr(model, "model", model)
    if getattr(inner, "diffusion_model", None) is None:
        raise AdapterLabError(
            "There is nothing to skip in this MODEL",
            found=f"{type(inner).__name__} without a diffusion model",
            expected="the MODEL of a loader of checkpoints or diffusion models",
        )
    refuse_rivals({"transformer_options": {"wrappers": model.wrappers}})


def refuse_rivals(options: dict[str, Any]) -> None:
    """Refuse the options of a model, or of a run with it, on which another node skips steps."""
    for key, name in RIVALS.items():
        if get_wrappers_with_key(WrappersMP.OUTER_SAMPLE, key, options, is_model_options=True):
            raise AdapterLabError(
                f"MagCache and {name} are on the same model",
                found="two nodes that skip steps: each takes the other's for computed ones",
                expected="one of them",
                fix=f"Remove {name} or MagCache",
            )
