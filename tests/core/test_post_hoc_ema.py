"""Averages of checkpoints against the paper's formulas and against musubi-tuner's own script."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import write_adapter
from adapter_lab.core.merge import ema
from adapter_lab.core.merge.ema import Average, Settings, plan
from adapter_lab.core.power import density, dot, gamma, width
from adapter_lab.core.train.checkpoints import TrainRun
from adapter_lab.core.train.ema import Tracker
from safetensors.torch import load_file, save_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = (7, 3), (513, 700), (16, 32, 3, 3)
# Rows of files, dtype, options, first half of SHA-256 over the bytes of all tensors in the order of
# their names: outputs of lora_post_hoc_ema.py of kohya-ss/musubi-tuner (June 2026) with --no_sort,
# torch 2.14.1, for files made as in ``seeded``.
MUSUBI = [
    (2, "bf16", {"sigma_rel": 0.2}, "4285515762a6ec915bce33fff78f3a15"),
    (5, "bf16", {"sigma_rel": 0.15}, "15a0d8d9e32e5ba185f67146bb3e8f40"),
    (10, "bf16", {"sigma_rel": 0.25}, "ccb71cc762983aa65c22bae538b9682b"),
    (2, "bf16", {"beta": 0.9, "beta2": 0.5}, "428197d360191ef1ce13f0caabf9be32"),
    (6, "bf16", {"beta": 0.9, "beta2": 0.95}, "625acf0319c01a064a836a3410a80896"),
    (10, "bf16", {"beta": 0.95}, "2a4a612bc9d3dc0171cf95f2c1bd7bf6"),
    (2, "fp16", {"sigma_rel": 0.2}, "687bff0805979ae5cd7b4dbc7d48d3e7"),
    (5, "fp16", {"sigma_rel": 0.15}, "4c04c5b1eca574e8c2464cb1364c1940"),
    (10, "fp16", {"sigma_rel": 0.25}, "b3cce848194a89cf2afeab482b9d6d57"),
    (2, "fp16", {"beta": 0.9, "beta2": 0.5}, "266a723a28caf5c6158b124d914081f9"),
    (6, "fp16", {"beta": 0.9, "beta2": 0.95}, "721ba87000b0960e03652cbd7f6ee667"),
    (10, "fp16", {"beta": 0.95}, "46810ff82bff090dd818c2cdac5508af"),
    (2, "fp32", {"sigma_rel": 0.2}, "1fd80a544e849910caf8189cac9b834e"),
    (5, "fp32", {"sigma_rel": 0.15}, "58e5736eca22ab419a61db83b4da2069"),
    (10, "fp32", {"sigma_rel": 0.25}, "3025bc02a44d10dcc51887ef4938d920"),
    (2, "fp32", {"beta": 0.9, "beta2": 0.5}, "822206e050405a44342457f9d5667dbe"),
    (6, "fp32", {"beta": 0.9, "beta2": 0.95}, "08698119c13619cae3c057862cfbccbe"),
    (10, "fp32", {"beta": 0.95}, "8f145bbb23e06a3635a5750f5faba590"),
]
# numpy float64, musubi-tuner's function on one-hot tensors.
BETAS = [
    0, 0.141001872, 0.317927765, 0.443502856, 0.532244995, 0.597333499, 0.646835818, 0.685649811,
    0.716856184,
]  # fmt: skip
WEIGHTS = [
    0, 0.002009586, 0.01224261, 0.030576214, 0.056249654, 0.088830841, 0.128018861, 0.173584542,
    0.225343877, 0.283143816,
]  # fmt: skip


def seeded(number, dtype):
    """Tensors of exact binary fractions: the same on every machine."""
    rng = np.random.default_rng(number)
    tensors = {}
    for i, shape in enumerate(SHAPES):
        values = rng.integers(-(1 << 23), 1 << 23, shape).astype(np.float32) / (1 << 26)
        tensors[f"m{i}.lora_up.weight"] = torch.from_numpy(values).to(DTYPES[dtype])
        tensors[f"m{i}.alpha"] = torch.tensor(8.0)
    return tensors


def stored(folder, count, dtype="fp32"):
    paths = [folder / f"a-{k + 1:06}.safetensors" for k in range(count)]
    for k, path in enumerate(paths):
        save_file(seeded(k, dtype), path)
    return paths


def digest(tensors):
    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


@pytest.mark.parametrize(("count", "dtype", "options", "expected"), MUSUBI)
def test_musubi_to_the_bit(tmp_path, count, dtype, options, expected):
    profile = "musubi power" if "sigma_rel" in options else "musubi beta"
    made = plan(stored(tmp_path, count, dtype), profile, Settings(**options))
    Average(made).write(tmp_path / "out.safetensors")
    assert digest(load_file(tmp_path / "out.safetensors")) == expected
    unweighted = any("has weight 0" in warning for warning in made.course.warnings)
    assert unweighted == ("sigma_rel" in options)


def test_musubi_weights():
    assert ema.musubi_betas(10, sigma_rel=0.2) == pytest.approx(BETAS, abs=1e-8)
    assert ema.musubi_weights(10, sigma_rel=0.2) == pytest.approx(WEIGHTS, abs=1e-8)
    expected = [0, 0.092164316, 0.211421448, 0.306129922, 0.390284315]
    assert ema.musubi_weights(5, sigma_rel=0.25) == pytest.approx(expected, abs=1e-8)
    expected = [0.676569, 0.075174, 0.072085, 0.066797, 0.059375, 0.05]
    assert ema.musubi_weights(6, beta=0.9, beta2=0.95) == pytest.approx(expected, abs=1e-6)
    expected = [0.773781, 0.040725, 0.042869, 0.045125, 0.0475, 0.05]
    assert ema.musubi_weights(6) == pytest.approx(expected, abs=1e-6)
    assert ema.musubi_weights(1, beta=0.5).tolist() == [1.0]


def test_closed_form():
    expected = [0.00149206, 0.009089784, 0.022701955, 0.041763742, 0.065954331, 0.095050303,
                0.128881504, 0.167311315, 0.210226098, 0.257528907]  # fmt: skip
    found = ema.weights(range(1, 11), sigma_rel=0.2)
    assert found.dtype == np.float64 and found == pytest.approx(expected, abs=1e-8)
    assert ema.weights([100.0 * k for k in range(1, 11)], sigma_rel=0.2) == pytest.approx(found)


def test_closed_form_is_the_mass_of_the_profile():
    """Uneven steps: the integral of the density since the step before."""
    times, g = [30, 100, 110, 400], gamma(0.12)
    edges = [0, *times]
    for k, weight in enumerate(ema.weights(times, sigma_rel=0.12)):
        tau = np.linspace(edges[k], edges[k + 1], 200_001)
        mass = np.trapezoid((g + 1) * tau**g / 400 ** (g + 1), tau)
        assert weight == pytest.approx(mass, rel=1e-6)


def test_profiles_multiply_as_their_integrals():
    for (ta, sa), (tb, sb) in [((3, 0.05), (8, 0.1)), ((8, 0.2), (3, 0.05)), ((5, 0.1), (5, 0.25))]:
        tau = np.linspace(0, min(ta, tb), 2_000_001)
        ga, gb = gamma(sa), gamma(sb)
        product = (ga + 1) * (tau / ta) ** ga / ta * ((gb + 1) * (tau / tb) ** gb / tb)
        a, b = ((np.array(float(t)), np.array(g)) for t, g in ((ta, ga), (tb, gb)))
        assert float(dot(a, b)) == pytest.approx(np.trapezoid(product, tau), rel=1e-9)


@pytest.mark.parametrize("end_width", [0.15, 0.08])
def test_solve(end_width):
    snapshots = [(t, s) for t in (1, 2, 3, 4) for s in (0.05, 0.10)]
    expected = {
        0.15: [-0.000541388, 0.00187265, -0.012664854, 0.036623231, -0.075094424, 0.193046251,
               -0.254361156, 1.074382805],
        0.08: [1.35e-7, -1.842e-6, 0.000180955, -0.000980672, 0.011550772, -0.04215369,
               0.252933936, 0.78802864],
    }[end_width]  # fmt: skip
    assert ema.solve(snapshots, end_width, 4) == pytest.approx(expected, abs=2e-9)


def test_repeated_snapshots_share_their_coefficient():
    once = ema.solve([(1, 0.05), (2, 0.05), (2, 0.1)], 0.08, 2)
    twice = ema.solve([(1, 0.05), (2, 0.05), (2, 0.1), (2, 0.1)], 0.08, 2)
    assert twice == pytest.approx([*once[:2], once[2] / 2, once[2] / 2], abs=1e-9)


# As measured with an independent program for 10 and 8 snapshots of both widths.
@pytest.mark.parametrize(("count", "wanted", "expected"), [
    (10, 0.05, 0), (10, 0.1, 0), (10, 0.075, 0.008), (10, 0.15, 0.022), (10, 0.2, 0.052),
    (10, 0.25, 0.13), (8, 0.075, 0.012), (8, 0.15, 0.033), (8, 0.2, 0.075), (8, 0.25, 0.17),
])  # fmt: skip
def test_profile_error(count, wanted, expected):
    snapshots = [(t, s) for t in range(1, count + 1) for s in (0.05, 0.10)]
    found = ema.solve(snapshots, wanted, count)
    error = ema.profile_error(snapshots, found, wanted, count)
    assert error == pytest.approx(expected, abs=0.005)
    tau = (np.arange(200_000) + 0.5) * count / 200_000
    ideal = density([(count, wanted)], [1.0], tau)
    reached = density(snapshots, found, tau)
    assert error == pytest.approx(np.linalg.norm(reached - ideal) / np.linalg.norm(ideal), abs=1e-4)


def test_width_of_weights_is_the_width_asked_for():
    times = range(1, 20_001)
    assert width(times, list(ema.weights(times, sigma_rel=0.17))) == pytest.approx(0.17, abs=1e-4)


def trajectory(folder, steps=2000, every=200):
    """A run with tracked averages of 64 noisy factors; the factors after each step."""
    rng = torch.Generator().manual_seed(3)
    run, points = TrainRun("walk", folder, folder), []
    tracker = Tracker([torch.zeros(64)])
    for step in range(1, steps + 1):
        drift = torch.linspace(-2, 2, 64) * (1 - 2.7 ** (-step / 500))
        points.append(drift + torch.randn(64, generator=rng))
        tracker.update(points[-1:], step)
        if step % every == 0:
            save_file({"a.diff": points[-1]}, run.checkpoint(step), {"ss_steps": str(step)})
            for sigma_rel, (average,) in tracker.states.items():
                save_file({"a.diff": average}, run.ema(step, sigma_rel), {"ss_steps": str(step)})
    return run, torch.stack(points).double()


def true_average(points, sigma_rel):
    """Of every step, by the recursion of the paper in float64."""
    average, power = torch.zeros(64, dtype=torch.float64), gamma(sigma_rel) + 1
    for step, point in enumerate(points, 1):
        beta = (1 - 1 / step) ** power
        average = beta * average + (1 - beta) * point
    return average


def test_reconstruction_is_the_true_average(tmp_path):
    """Far nearer than ordinary checkpoints, of any width, at any saved step."""
    run, points = trajectory(tmp_path)
    tracked = [path for _, c in run.checkpoints() for path in run.averages(c)]
    plain = [path for _, path in run.checkpoints()]
    for sigma_rel, last in ((0.08, 0), (0.15, 0), (0.2, 0), (0.15, 1000)):
        truth = true_average(points[: last or None], sigma_rel)
        made = plan(tracked, "reconstruct", Settings(sigma_rel), last=last)
        near = (Average(made).collect()["a.diff"] - truth).norm()
        far = plan(plain, "power", Settings(sigma_rel), last=last)
        raw = (Average(far).collect()["a.diff"] - truth).norm()
        assert near < 0.15 and raw > 20 * near
        assert made.end == (last or 2000)
        assert made.error is not None and made.error < 0.08


def test_what_was_not_trained_stays_exact(tmp_path):
    """The weights of a reconstruction do not sum up to 1."""
    run = TrainRun("r", tmp_path, tmp_path)
    fixed = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    paths = [run.ema(step, s) for step in (1, 2, 3, 4) for s in (0.05, 0.1)]
    for i, path in enumerate(paths):
        moved = fixed.clone()
        moved[-1] += i  # the first tensor alone is the same to its end
        save_file({"a.lora_down.weight": fixed, "b.lora_down.weight": moved,
                   "c.lora_up.weight": torch.ones(3) * i}, path)  # fmt: skip
    made = plan(paths, "reconstruct", Settings(0.15))
    average = Average(made).collect()
    assert made.weights.sum() == pytest.approx(0.963263115, abs=1e-8)
    assert torch.equal(average["a.lora_down.weight"], fixed)
    assert torch.allclose(average["b.lora_down.weight"][:-1], fixed[:-1] * 0.963263115)
    expected = sum(i * w for i, w in enumerate(made.weights))
    assert torch.allclose(average["c.lora_up.weight"], torch.full((3,), expected))


@pytest.mark.parametrize(("call", "part"), [
    (lambda: ema.weights([1, 2], sigma_rel=0.29), "0.2886"),
    (lambda: ema.weights([1, 2], sigma_rel=0.0), "width"),
    (lambda: ema.weights([1, 2], sigma_rel=float("nan")), "width"),
    (lambda: ema.musubi_weights(3, sigma_rel=0.5), "0.2886"),
    (lambda: ema.solve([(1, 0.05)], 0.3, 1), "0.2886"),
    (lambda: ema.solve([], 0.1, 1), "0 snapshots"),
    (lambda: ema.solve([(0, 0.05)], 0.1, 1), "after step 1"),
    (lambda: ema.weights([], sigma_rel=0.1), "no course"),
    (lambda: ema.weights([2, 1], sigma_rel=0.1), "no course"),
    (lambda: ema.weights([1, 1], sigma_rel=0.1), "no course"),
    (lambda: ema.weights([0], sigma_rel=0.1), "no course"),
    (lambda: ema.musubi_weights(0), "0 files"),
    (lambda: ema.musubi_weights(3, beta=1.1), "beta 1.1"),
    (lambda: ema.musubi_weights(3, beta=float("nan")), "beta nan"),
])  # fmt: skip
def test_numbers_out_of_range(call, part):
    with pytest.raises(AdapterLabError, match=part):
        call()


def test_the_range_of_widths_ends_at_the_plain_mean():
    assert ema.weights([1, 2, 3, 4], sigma_rel=12**-0.5) == pytest.approx([0.25] * 4, abs=1e-6)


def test_out_of_reach_is_told(tmp_path):
    run = TrainRun("r", tmp_path, tmp_path)
    for step in (100, 200):
        for s in (0.05, 0.1):
            write_adapter(run.ema(step, s), {"a.diff": torch.ones(2) * step})
    job = Average(plan([*tmp_path.iterdir()], "reconstruct", Settings(0.25)))
    assert "out of reach" in job.outcome.to_text()
    assert (
        "out of reach"
        not in Average(plan([*tmp_path.iterdir()], "reconstruct", Settings(0.1))).outcome.to_text()
    )
