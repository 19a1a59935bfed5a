"""What a run with MagCache holds, and that nothing of it stays."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import cached
import pytest
import torch
from adapter_lab.core.cache.trace import Trace
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.nodes.host import cache_session
from adapter_lab.nodes.host.cache_branches import Branches
from cached import KINDS, SKIPPED, conditioning, sample, seen, sizes
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP


@pytest.mark.parametrize(("fill", "most"), [("reuse", 1), ("scaled", 1), ("first order", 2)])
def test_memory(model, fill, most, monkeypatch):
    """Residuals that a branch holds once the ratios are known."""
    counts = sizes(monkeypatch)
    sample(cached.cached(model("flux"), fill=fill), "flux")
    assert max(counts) == most


@pytest.mark.parametrize("level", ["blocks", "network"])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("end", [None, InterruptProcessingException, ZeroDivisionError])
def test_nothing_is_left(model, end, within, level, monkeypatch):
    """However a run ends, between the evaluations or within one: no residual is alive, nothing is
    on the network, and the next run is as if there had been none."""
    flux, put, residuals, calls = model("flux"), Trace.put, [], []
    plain = sample(flux, "flux")

    def kept(self, sigma, parts):
        residuals.extend(weakref.ref(part) for part in parts)
        put(self, sigma, parts)

    monkeypatch.setattr(Trace, "put", kept)

    def stop(*_):
        calls.append(1)
        if len(calls) == 5:
            raise end

    before = dict(flux.model_options["transformer_options"])
    block = flux.model.diffusion_model.get_submodule(KINDS["flux"][0])
    hook = block.register_forward_hook(stop) if end and within else None
    try:
        with pytest.raises(end) if end else nullcontext():
            callback = stop if end and not within else None
            sample(cached.cached(flux, residual=level), "flux", callback=callback)
    finally:
        if hook is not None:
            hook.remove()
    gc.collect()
    assert residuals and not any(residual() is not None for residual in residuals)
    assert flux.model_options["transformer_options"] == before
    assert not [name for name in vars(flux.model.diffusion_model) if name.startswith("forward")]
    sessions = [o for o in gc.get_objects() if type(o) is cache_session.Session]
    assert not sessions and torch.equal(sample(flux, "flux"), plain)


def test_what_is_no_longer_evaluated_is_dropped(model, monkeypatch):
    """After as many noise levels as a run of skips may have, and one."""
    held = []
    drop = Branches._drop
    monkeypatch.setattr(Branches, "_drop", lambda self: (drop(self), held.append(len(self.of)))[0])
    early = conditioning("flux", 6, end_percent=0.3)
    positive = conditioning("flux", 1) + early
    sample(cached.cached(model("flux"), k=2), "flux", positive=positive)
    assert max(held) == 3 and held[-1] == 2


def test_two_samplers_in_one_graph_and_one_within_another(model):
    """Each run has its own state, also where one samples while the other does."""
    flux, wan = model("flux"), model("wan")
    alone = sample(cached.cached(flux), "flux"), sample(cached.cached(wan), "wan")
    inner = []

    def nested(step, *_):
        if step == 6:
            inner.append(sample(cached.cached(wan), "wan"))

    outer = sample(cached.cached(flux), "flux", callback=nested)
    assert torch.equal(outer, alone[0]) and torch.equal(inner[0], alone[1])


def test_of_two_nodes_the_last_holds(model):
    with seen(model("flux"), "flux") as (watched, watch):
        sample(cached.cached(cached.cached(watched, k=1)), "flux")
    assert watch.skipped() == SKIPPED
    twice = cached.cached(cached.cached(watched))
    wrappers = twice.get_wrappers(WrappersMP.OUTER_SAMPLE, "adapter_lab_magcache")
    assert len(wrappers) == 1


def test_settings_out_of_range_are_refused(model):
    with pytest.raises(AdapterLabError, match="fill"):
        sample(cached.cached(model("flux"), fill="guess"), "flux")
