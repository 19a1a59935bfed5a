"""A run that was cut anywhere goes on as if it had not been, bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter, write_adapter
from adapter_lab.core.train import snapshot
from adapter_lab.core.train.config import OptimizerConfig
from adapter_lab.core.train.optimizers import OPTIMIZERS
from toy import Run

DROPOUT = {"dropout": 0.1, "rank_dropout": 0.3, "module_dropout": 0.2}
# The state of 8-bit optimizers is in 8 bits from 4,096 numbers of a factor on.
WIDE = {"AdamW8bit", "Lion8bit", "AdEMAMix8bit"}
MORE = {"SOAP": "precondition_frequency = 2", "Prodigy": "d0 = 1e-4"}


def settings(name, **more):
    return OptimizerConfig(
        name, OPTIMIZERS[name].rate, schedule="cosine", warmup=2, arguments=MORE.get(name, ""),
        **more,
    )  # fmt: skip


def make(config, **adapter):
    wide = {"channels": 64, "rank": 64} if config.optimizer in WIDE else {}
    return Run(config, **{**wide, **adapter})


def cut(tmp_path, config, at, until, changed=None, **adapter):
    """A run that ended at ``at`` and went on in another process."""
    path = tmp_path / "run" / "s.safetensors"
    first = make(config, **adapter).train(at, steps=until, accumulation=2)
    snapshot.save(
        path, first.adapters, first.optimizer, first.progress, {}, {}, first.trackers
    )  # fmt: skip
    second = make(changed or config, seed=9, **adapter)
    second.progress, names = snapshot.load(
        path, second.adapters, second.optimizer, {}, {}, second.trackers
    )
    return second, names


def require_same(first, second):
    assert first.progress == second.progress
    pairs = list(zip(first.tensors(), second.tensors(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    config = settings(name)
    whole = make(config, **DROPOUT).train(7, accumulation=2)
    again, changed = cut(tmp_path, config, 3, 7, **DROPOUT)
    assert again.progress.step == 3 and not changed
    require_same(whole, again.train(7, accumulation=2))
    moved = zip(whole.optimizer.factors, make(config).optimizer.factors, strict=True)
    assert not any(torch.equal(a, b) for a, b in moved)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Muon", "ScheduleFreeAdamW", "Prodigy"])
def test_resumed_run_of_bf16_factors(tmp_path, name, rounding):
    config = settings(name, rounding=rounding)
    whole = make(config, precision="bf16", **DROPOUT).train(6, accumulation=2)
    again, _ = cut(tmp_path, config, 4, 6, precision="bf16", **DROPOUT)
    assert {f.dtype for f in again.optimizer.factors} == {torch.bfloat16}
    require_same(whole, again.train(6, accumulation=2))


@pytest.mark.parametrize("at", [1, 2, 5])
def test_rates_by_module_and_rotations_resume(tmp_path, at):
    config = settings("ScheduleFreeAdamW", rates=r".*\.1\.proj = 1e-4", text_encoder_rate=1e-5)
    whole = make(config, algorithm="lokr", factor=2).train(6, accumulation=2)
    again, _ = cut(tmp_path, config, at, 6, algorithm="lokr", factor=2)
    require_same(whole, again.train(6, accumulation=2))


def test_changed_settings_act_at_once_and_are_named(tmp_path):
    """AdamW's moments go on; the next step is that of the new rate, beta and group."""
    old = OptimizerConfig("AdamW", 1e-3, clip=0.0)
    new = OptimizerConfig(
        "AdamW", 1e-2, 0.5, clip=0.0, schedule="linear", betas="0.5, 0.9", lora_plus=4.0
    )
    again, changed = cut(tmp_path, old, 4, 8, new)
    expected = {"learning rate", "weight decay", "schedule", "betas", "lora plus"}
    assert set(changed) == expected
    reference = make(old).train(4, steps=8, accumulation=2)
    before = [f.detach().clone() for f in reference.optimizer.factors]
    again.train(5, steps=8, accumulation=2)
    gradients = taken(make(new), again, before)
    names = [f"{p}|{n}" for p in sorted(again.adapters) for n in again.adapters[p].trained]
    for name, now, was, grad, state in zip(
        names, again.optimizer.factors, before, gradients,
        reference.optimizer.parts[0].state.values(), strict=True,
    ):  # fmt: skip
        rate = 1e-2 * (1 - 4 / 8) * (4.0 if name.endswith("lora_up.weight") else 1.0)
        m = 0.5 * state["exp_avg"] + 0.5 * grad
        v = 0.9 * state["exp_avg_sq"] + 0.1 * grad.square()
        update = (m / (1 - 0.5**5)) / ((v / (1 - 0.9**5)).sqrt() + 1e-8)
        torch.testing.assert_close(now, was * (1 - rate * 0.5) - rate * update)


def taken(probe, run, factors):
    """The gradients of step 5 at ``factors``."""
    with torch.no_grad():
        for mine, value in zip(probe.optimizer.factors, factors, strict=True):
            mine.copy_(value)
    probe.progress.step, probe.progress.scale = 4, 1.0
    found = []
    step = probe.optimizer.step
    probe.optimizer.step = lambda *now: (
        found.extend(f.grad.clone() for f in probe.optimizer.factors), step(*now)
    )  # fmt: skip
    probe.train(5, steps=8, accumulation=2)
    return found


def test_what_an_optimizer_finds_by_itself_is_kept_under_other_settings(tmp_path):
    config, new = settings("Prodigy"), settings("Prodigy", weight_decay=0.5)
    again, changed = cut(tmp_path, config, 5, 9, new)
    group = again.optimizer.parts[0].param_groups[0]
    assert group["d"] > group["d0"] == 1e-4
    assert group["weight_decay"] == 0.5 and changed == ["weight decay"]


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(AdapterLabError, match="state of AdamW, expected Lion"):
        cut(tmp_path, settings("AdamW"), 1, 2, settings("Lion"))


def test_other_factors_are_refused_and_nothing_is_restored(tmp_path):
    path, first = tmp_path / "run" / "s.safetensors", Run().train(2)
    save(path, first)
    for other, says in (
        (Run(rank=3), r"run 'run' .*lora_\w+.weight \(.*float32, expected \(.*"),
        (Run(precision="bf16"), "float32, expected .*bfloat16"),
        (Run(seed=4, algorithm="lokr"), "none, expected"),
    ):
        before = [t.detach().clone() for t in other.tensors()]
        with pytest.raises(AdapterLabError, match=says):
            snapshot.load(path, other.adapters, other.optimizer, {}, {})
        assert all(map(torch.equal, before, other.tensors()))
        assert not other.optimizer.parts[0].state


def test_other_circumstances_are_named(tmp_path):
    path, run = tmp_path / "s.safetensors", Run().train(1)
    told = {"seed": 0, "data": "a"}
    snapshot.save(path, run.adapters, run.optimizer, run.progress, {"rank": 2}, told)
    now = {"seed": 0, "data": "b", "new": 1}
    _, changed = snapshot.load(path, run.adapters, run.optimizer, {"rank": 2}, now)
    assert changed == ["data", "new"]


def test_another_identity_is_refused(tmp_path):
    path, run = tmp_path / "s.safetensors", Run().train(1)
    identity = {"modules": {"a": [1, 2], "b": [1, 2]}}
    snapshot.save(path, run.adapters, run.optimizer, run.progress, identity, {})
    for other, says in (
        ({"modules": {"a": [1, 2], "b": [1, 3]}}, r"found modules b \[1, 2\], expected \[1, 3\]"),
        ({"modules": {"a": [1, 2]}}, "modules b .*expected none"),
    ):
        with pytest.raises(AdapterLabError, match=says):
            snapshot.load(path, run.adapters, run.optimizer, other, {})


def test_averages_that_begin_with_a_resumed_run(tmp_path):
    """Without averages in the file they start from the factors, not from the fresh ones."""
    path, first, again = tmp_path / "s.safetensors", Run().train(2), Run(seed=5)
    save(path, first)
    snapshot.load(path, again.adapters, again.optimizer, {}, {}, again.trackers)
    for averages in again.trackers.states.values():
        assert all(map(torch.equal, averages, first.optimizer.factors))


def save(path, run):
    snapshot.save(path, run.adapters, run.optimizer, run.progress, {}, {})


def test_numbers_survive_to_the_bit(tmp_path):
    run = Run().train(1)
    losses = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308]
    run.progress.losses, run.progress.validation = losses, [(0, 1 / 7)]
    state = {"a": (1, 2.5, None), "b": [torch.ones(()), {"c": float("inf"), "d": True}]}
    run.optimizer.parts[0].param_groups[0]["extra"] = state
    save(tmp_path / "s.safetensors", run)
    again = Run()
    progress, _ = snapshot.load(tmp_path / "s.safetensors", again.adapters, again.optimizer, {}, {})
    assert progress == run.progress
    found = again.optimizer.parts[0].param_groups[0]["extra"]
    stored = read_adapter(tmp_path / "s.safetensors")
    assert "losses" not in stored.metadata["progress"]  # a list of all steps would be megabytes
    # As states were written before.
    stored.metadata["progress"] = json.dumps(vars(run.progress))
    del stored["progress|losses"]
    write_adapter(tmp_path / "old.safetensors", stored)
    old, _ = snapshot.load(tmp_path / "old.safetensors", again.adapters, again.optimizer, {}, {})
    assert old == run.progress
    assert found == state and type(found["a"]) is tuple and found["b"][1]["d"] is True


def test_a_file_that_is_none(tmp_path):
    path, run = tmp_path / "s.safetensors", Run()
    write_adapter(path, {"x": torch.zeros(1)})
    with pytest.raises(AdapterLabError, match="not the state of a training run"):
        snapshot.load(path, run.adapters, run.optimizer, {}, {})
    path.write_bytes(b"x")
    with pytest.raises(AdapterLabError, match="on_existing"):
        snapshot.load(path, run.adapters, run.optimizer, {}, {})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda a: a.metadata.update(progress="{"), "damaged"),
        (lambda a: a.metadata.update(progress="{}"), "damaged.*validation"),
        (lambda a: a.pop("progress|losses"), "damaged.*losses"),
        (lambda a: a.update({"progress|losses": torch.zeros(1, 1)}), "damaged"),
        (lambda a: a.pop(next(k for k in a if k.startswith("optimizer"))), "damaged"),
        (lambda a: a.pop(next(k for k in a if k.startswith("factor"))), "none"),
        (lambda a: a.metadata.update(optimizer=json.dumps({"optimizer": "AdamW"})), "damaged"),
    ],
)
def test_damaged_state(tmp_path, damage, says):
    path, run = tmp_path / "s.safetensors", Run().train(1)
    save(path, run)
    stored = read_adapter(path)
    damage(stored)
    write_adapter(path, stored)
    with pytest.raises(AdapterLabError, match=says):
        snapshot.load(path, run.adapters, run.optimizer, {}, {})


def test_a_state_of_averaged_factors_is_never_saved(tmp_path):
    run = make(settings("ScheduleFreeAdamW")).train(3)
    with run.optimizer.evaluated(), pytest.raises(RuntimeError):
        save(tmp_path / "s.safetensors", run)
    assert not list(tmp_path.iterdir())
