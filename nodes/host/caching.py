"""MagCache in a sampling run: state that begins and ends with the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...core.cache.tally import Tally
from ...core.cache.timeline import Timeline
from .cache_report import tell
from .cache_session import About, Session, nothing_allowed
from .cache_settings import Settings
from .cacheable import refuse_rivals
from .whole_schedule import whole

KEY = "adapter_lab_magcache"
FEWEST = 8  # steps of which any can be skipped


def attach(model: Any, settings: Settings) -> Any:
    """A clone of MODEL that skips steps when it is sampled from; of two nodes the last holds."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _sampler(settings))
    return clone


def _sampler(settings: Settings) -> Callable[..., Any]:
    def sample(executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor,
               denoise_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        guider = executor.class_obj
        refuse_rivals(guider.model_options)  # again: the other node may come after this one
        run = partial(executor, noise, latent, sampler, sigmas, denoise_mask, *args, **kwargs)
        sampling = guider.model_patcher.get_model_object("model_sampling")
        timeline = whole([float(s) for s in sigmas], sampling, sampler)
        off = _useless(settings, timeline)
        if off:
            tell(Tally(timeline), settings, None, "", off)
            return run()
        # Several latents, of video and audio, are packed into one of another shape.
        shape = (kwargs.get("latent_shapes") or [noise.shape])[0]
        about = About.of(guider.conds, shape, denoise_mask is not None)
        with _Attached(guider, Session(settings, guider, timeline, about)):
            return run()

    return sample


class _Attached:
    """A session that sees every evaluation of a guider's model for as long as the run lasts."""

    def __init__(self, guider: Any, session: Session) -> None:
        self.guider, self.session, self.before = guider, session, guider.model_options

    def __enter__(self) -> None:
        options = create_model_options_clone(self.before)
        wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {})
        of_kind = wrappers.setdefault(WrappersMP.APPLY_MODEL, {})
        # Last, that is innermost: what another wrapper puts in the network's place is seen.
        of_kind.pop(KEY, None)
        of_kind[KEY] = [self.session]
        self.guider.model_options = options

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.guider.model_options = self.before
        self.session.close(complete=kind is None)


def _useless(settings: Settings, timeline: Timeline) -> str:
    """Why nothing can be skipped, whatever the model; "" if something may be."""
    if timeline.off:
        return timeline.off
    if timeline.steps < FEWEST:
        steps = "1 step" if timeline.steps == 1 else f"{timeline.steps} steps"
        return f"{steps}, fewer than {FEWEST}: too far apart to skip any"
    if settings.calibrate != "always":
        return nothing_allowed(settings.threshold, settings.k)
    return ""
