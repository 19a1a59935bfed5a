"""Statistics of residuals against the definitions, worked out in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from adapter_lab.core.cache import measure
from adapter_lab.core.cache.measure import Measure
from adapter_lab.core.cache.trace import Trace
from adapter_lab.core.errors import AdapterLabError

SIGMAS = [1.0, 0.8, 0.55, 0.2, 0.05]


def residuals(*shape, seed=0, dtype=torch.float32, steps=5):
    """A drift that bends, so that neither ratio nor error is trivial."""
    rng = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(shape, generator=rng) for _ in range(3))
    return [(a + b * s + 0.7 * c * s * s).to(dtype) for s in SIGMAS[:steps]]


def measured(runs, axis, sigmas=SIGMAS, branch="cond"):
    """``runs``: of each conditioning, its residuals (tuples of streams) at ``sigmas``."""
    made = Measure(axis)
    traces = [Trace() for _ in runs]
    for i, sigma in enumerate(sigmas):
        for run, trace in zip(runs, traces, strict=True):
            parts = run[i] if isinstance(run[i], tuple) else (run[i],)
            made.add(branch, sigma, trace, parts)
            trace.put(sigma, parts)
    return made.finish()


def tokens(parts, axis):
    """(tokens, channels) of all streams, float64."""
    parts = parts if isinstance(parts, tuple) else (parts,)
    arrays = [part.double().numpy() for part in parts]
    return [np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis]) for a in arrays]


def by_definition(run, axis, sigmas=SIGMAS):
    """Rows (ratio, std, cosine distance, bend or None) of the steps after the first."""
    rows = []
    for t in range(1, len(run)):
        now, last = tokens(run[t], axis), tokens(run[t - 1], axis)
        norm, before = (
            np.concatenate([np.sqrt((a * a).sum(-1)) for a in each]) for each in (now, last)
        )
        dots = np.concatenate([(a * b).sum(-1) for a, b in zip(now, last, strict=True)])
        some = before > 0
        q = norm[some] / before[some]
        cosine = 1 - dots[some] / np.maximum(norm * before, 1e-16)[some]
        bend = None
        if t > 1:
            s_a, s_b, s = sigmas[t - 2], sigmas[t - 1], sigmas[t]
            older = tokens(run[t - 2], axis)
            off = [
                n - (b + (b - a) * (s - s_b) / (s_b - s_a))
                for n, b, a in zip(now, last, older, strict=True)
            ]
            error = np.concatenate([np.sqrt((e * e).sum(-1)) for e in off])
            bend = (error[norm > 0] / norm[norm > 0]).mean() / (abs(s - s_a) * abs(s - s_b))
        rows.append((q.mean(), q.std(ddof=1), cosine.mean(), bend))
    return rows


def require_equal(curve, rows, rel=1e-5):
    assert curve.ratios[0] == 1
    for t, (ratio, spread, cosine, bend) in enumerate(rows, 1):
        assert curve.ratios[t] == pytest.approx(ratio, rel=rel)
        assert curve.spread[t] == pytest.approx(spread, rel=20 * rel, abs=1e-6)
        assert curve.cosine[t] == pytest.approx(cosine, rel=20 * rel, abs=1e-6)
        if bend is not None:
            assert curve.bends[t] == pytest.approx(bend, rel=20 * rel)


@pytest.mark.parametrize("chunk", [1 << 23, 50, 1])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 13, 8), -1), ((1, 5, 40), -1), ((2, 4, 6, 5), 1), ((1, 3, 4, 6, 5), 1), ((1, 4, 9), 1)],
    ids=["tokens", "few tokens", "picture", "video", "sound"],
)
def test_against_the_definitions(shape, axis, chunk, monkeypatch):
    monkeypatch.setattr(measure, "_CHUNK", chunk)
    run = residuals(*shape)
    found = measured([run], axis)
    assert found.level == ("blocks" if axis < 0 else "network") and found.steps == len(SIGMAS)
    assert found.curves["cond"].sigmas == tuple(SIGMAS)
    require_equal(found.curves["cond"], by_definition(run, axis))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_as_stored(dtype):
    run = residuals(1, 40, 16, dtype=dtype)
    require_equal(measured([run], -1).curves["cond"], by_definition(run, -1))


def test_streams_count_by_their_tokens():
    run = list(zip(residuals(1, 30, 8), residuals(1, 5, 4, seed=1), strict=True))
    require_equal(measured([run], -1).curves["cond"], by_definition(run, -1))


def test_tokens_without_a_residual_do_not_count():
    run = residuals(1, 20, 8)
    run[1][:, :5] = 0  # before step 2
    run[3][:, 10:12] = 0  # at step 3, before step 4
    require_equal(measured([run], -1).curves["cond"], by_definition(run, -1))


def test_nothing_but_zeros_is_as_if_not_measured():
    run = residuals(1, 20, 8)
    run[1].zero_()
    curve = measured([run], -1).curves["cond"]
    assert curve.sigmas == (1.0, 0.8, 0.2, 0.05)  # at 0.55 there is no ratio to anything
    assert curve.ratios[1] == 1e-6  # the least that a ratio is
    assert all(map(math.isfinite, curve.ratios + curve.bends))


def test_conditionings_of_a_branch_are_averaged():
    runs = [residuals(1, 20, 8, seed=seed) for seed in range(3)]
    rows = [by_definition(run, -1) for run in runs]
    mean = [
        tuple(None if None in each else sum(each) / 3 for each in zip(*row, strict=True))
        for row in zip(*rows, strict=True)
    ]
    require_equal(measured(runs, -1).curves["cond"], mean)


def test_branches_are_apart():
    made = Measure(-1)
    runs = {"cond": residuals(1, 9, 4), "uncond": residuals(1, 9, 4, seed=5)}
    traces = {branch: Trace() for branch in runs}
    for i, sigma in enumerate(SIGMAS):
        for branch, run in runs.items():
            made.add(branch, sigma, traces[branch], (run[i],))
            traces[branch].put(sigma, (run[i],))
    found = made.finish("f1", "blocks", "flux", 30, sampler="euler")
    assert (found.fingerprint, found.level, found.architecture) == ("f1", "blocks", "flux")
    assert found.steps == 30 and found.about == {"sampler": "euler"}
    for branch, run in runs.items():
        require_equal(found.curves[branch], by_definition(run, -1))


def test_a_level_visited_twice_is_averaged():
    # Heun: at each level but the first, once from the step before and once again.
    first, again = residuals(1, 20, 8), residuals(1, 20, 8, seed=3)
    made, trace = Measure(-1), Trace()
    for t, sigma in enumerate(SIGMAS):
        for run in (first, again)[: 1 if t == 0 else 2]:
            made.add("cond", sigma, trace, (run[t],))
            trace.put(sigma, (run[t],))
    curve = made.finish().curves["cond"]
    assert curve.sigmas == tuple(SIGMAS)
    for t in range(1, len(SIGMAS)):
        before = first[0] if t == 1 else again[t - 1]
        rows = [by_definition([before, run[t]], -1)[0] for run in (first, again)]
        assert curve.ratios[t] == pytest.approx((rows[0][0] + rows[1][0]) / 2, rel=1e-5)


def test_a_conditioning_that_comes_later_or_misses_levels():
    # Residuals that fall by e^-sigma everywhere: whatever was missed, the ratios are the same.
    base = torch.randn(1, 6, 4)
    made = Measure(-1)
    early, late = Trace(), Trace()
    for t, sigma in enumerate(SIGMAS):
        parts = (base * math.exp(-sigma),)
        for trace in [early] * (t not in (1, 3)) + [late] * (t > 0):
            made.add("cond", sigma, trace, parts)
            trace.put(sigma, parts)
    curve = made.finish().curves["cond"]
    expected = [math.exp(a - b) for a, b in zip(curve.sigmas, curve.sigmas[1:], strict=False)]
    assert curve.sigmas == (1.0, 0.55, 0.2, 0.05)  # at 0.8 nothing was before the late one
    assert curve.ratios[1:] == pytest.approx(expected, rel=1e-5)


def test_other_shapes_are_no_predecessors():
    made, trace = Measure(-1), Trace()
    trace.put(1.0, (torch.ones(1, 5, 4),))
    made.add("cond", 1.0, Trace(), (torch.ones(1, 5, 4),))
    made.add("cond", 0.5, trace, (torch.ones(1, 6, 4),))
    with pytest.raises(AdapterLabError, match="1 noise levels, expected 2 or more"):
        made.finish()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_residuals_that_are_no_numbers(bad):
    run = residuals(1, 20, 8)
    run[2][0, 3, 1] = bad
    with pytest.raises(AdapterLabError, match="This run can't be calibrated: found (nan|inf)"):
        measured([run], -1)


def test_nothing_measured():
    with pytest.raises(AdapterLabError, match="This run can't be calibrated"):
        Measure(-1).finish()


def test_what_is_told_fits_into_the_file():
    run = residuals(1, 6, 4)
    made, trace = Measure(-1), Trace()
    for sigma, part in zip(SIGMAS, run, strict=True):
        made.add("cond", sigma, trace, (part,))
        trace.put(sigma, (part,))
    assert made.finish(model="a\nb" + "x" * 500).about == {"model": "a b" + "x" * 197}


def test_a_large_residual_is_not_copied_whole(monkeypatch):
    monkeypatch.setattr(measure, "_CHUNK", 1 << 16)
    sizes: list[int] = []
    original = torch.Tensor.float

    def watched(tensor):
        sizes.append(tensor.numel())
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "float", watched)
    run = residuals(1, 4000, 256, dtype=torch.bfloat16, steps=3)
    measured([run], -1, SIGMAS[:3])
    assert max(sizes) <= 1 << 16 and sum(sizes) >= 5 * run[0].numel()
