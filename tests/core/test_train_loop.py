"""The loop on a toy process: what it optimises, what it leaves alone, how it resumes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import write_adapter
from adapter_lab.core.train import snapshot
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.loop import (
    HALF_SCALE,
    Progress,
    make_optimizer,
    parameters,
    train,
    validate,
)
from adapter_lab.core.train.random import generator


class Toy:
    """A velocity model: one linear layer over channels, plus the item's conditioning."""

    half = False

    def __init__(self, adapters):
        rng = torch.Generator().manual_seed(1)
        self.weight, self.adapters = torch.randn(4, 4, generator=rng), adapters

    def latents(self, items):
        return torch.stack([item.latent for item in items])

    def sigmas(self, u):
        return u

    def corrupt(self, x0, noise, sigma):
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * noise

    def target(self, x0, x_t, sigma):
        return (x_t - x0) / sigma.view(-1, 1, 1, 1)

    def predict(self, x_t, sigma, items):
        weight = self.weight + self.adapters["layer"].delta(self.weight)
        cond = torch.stack([item.cond.mean(0) for item in items])[:, :, None, None]
        return F.conv2d(x_t, weight[:, :, None, None]) + cond


def dataset(count=5, **more):
    rng = torch.Generator().manual_seed(2)
    shapes = ((4, 4, 4), (3, 4))
    made = [[torch.randn(s, generator=rng) for s in shapes] for _ in range(count)]
    return TrainDataset([TrainItem(latent, cond, **more) for latent, cond in made])


def fresh(seed=0):
    config = AdapterConfig(rank=2, alpha=2)
    adapter = ALGORITHMS["lora"].init((4, 4), config, generator(seed, "init"))
    adapter.tensors = {k: t.requires_grad_() for k, t in adapter.tensors.items()}
    return {"layer": adapter}


SETTINGS = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)


def run(
    steps, adapters=None, progress=None, optimizer=None, on_step=None, data=None, toy=Toy, **config
):
    adapters = adapters or fresh()
    optimizer = optimizer or make_optimizer(adapters, SETTINGS)
    progress = progress or Progress()
    settings = TrainConfig(steps, **{"batch_size": 2, **config})
    train(
        toy(adapters), adapters, data or dataset(), settings, optimizer, SETTINGS, progress,
        on_step or (lambda _: None),
    )  # fmt: skip
    return adapters, optimizer, progress


def test_it_learns():
    data = dataset(8)
    adapters = fresh()
    before = validate(Toy(adapters), data, 0)
    adapters, _, progress = run(150, adapters, data=data)
    assert validate(Toy(adapters), data, 0) < 0.8 * before
    assert len(progress.losses) == progress.step == 150


def test_same_seed_same_bits_other_seed_others():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second, other = run(5)[0], run(5)[0], run(5, seed=1)[0]
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(parameters(first), parameters(second), parameters(other), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_accumulation_is_the_mean_of_its_batches():
    """Two passes of 2 items give the gradient of the 4 losses' mean, computed here by hand."""
    adapters, data, taken = fresh(), dataset(4), []

    class Capture(torch.optim.SGD):
        def step(self):
            taken.extend(p.grad.clone() for p in self.param_groups[0]["params"])

    optimizer = Capture(parameters(adapters), lr=1.0)
    run(1, adapters, optimizer=optimizer, accumulation=2, data=data)
    toy, total = Toy(adapters), 0.0
    for number in range(2):
        items = [data[i] for i in data.batch(number, 2, 0)]
        rng = generator(0, "noise", number)
        u = torch.rand(2, generator=rng)
        x0 = toy.latents(items)
        noise = torch.randn(x0.shape, generator=rng)
        prediction = toy.predict(toy.corrupt(x0, noise, u), u, items)
        total = total + F.mse_loss(prediction, noise - x0) / 2
    expected = torch.autograd.grad(total, parameters(adapters))
    norm = sum(g.square().sum() for g in expected).sqrt()
    for grad, wanted in zip(taken, expected, strict=True):
        torch.testing.assert_close(grad, wanted / norm.clamp(min=1.0), rtol=1e-4, atol=1e-6)


def test_mask_and_weight_scale_the_loss():
    data, toy = dataset(), Toy(fresh())
    plain = validate(toy, data, 0)
    weighted = TrainDataset([_with(i, weight=0.25) for i in data])
    assert validate(toy, weighted, 0) == pytest.approx(0.25 * plain, rel=1e-6)
    half = torch.zeros(16, 16)
    half[:, :8] = 1
    masked = TrainDataset([_with(i, mask=half) for i in data])
    other = TrainDataset([_with(i, mask=1 - half) for i in data])
    both = validate(toy, masked, 0) + validate(toy, other, 0)
    assert both == pytest.approx(plain, rel=1e-5)
    assert validate(toy, masked, 0) != pytest.approx(plain / 2, rel=1e-3)


def _with(item, **changes):
    return TrainItem(**{**vars(item), **changes})


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, _, progress = run(6)
    adapters, optimizer, part = run(3)
    told = {"seed": 0, "data": "a"}
    snapshot.save(tmp_path / "s.safetensors", adapters, optimizer, part, {"rank": 2}, told)
    restored = fresh(seed=9)
    again = make_optimizer(restored, SETTINGS)
    now = {"seed": 0, "data": "b"}
    part, changed = snapshot.load(tmp_path / "s.safetensors", restored, again, {"rank": 2}, now)
    assert part.step == 3 and changed == ["data"]
    run(6, restored, part, again)
    assert part.losses == progress.losses
    for a, b in zip(parameters(whole), parameters(restored), strict=True):
        assert torch.equal(a, b)


def test_snapshot_of_other_settings_is_refused(tmp_path):
    adapters, optimizer, progress = run(1)
    path, identity = tmp_path / "s.safetensors", {"modules": {"a": [1, 2], "b": [1, 2]}}
    snapshot.save(path, adapters, optimizer, progress, identity, {})
    with pytest.raises(AdapterLabError, match=r"found modules b \[1, 2\], expected \[1, 3\]"):
        other = {"modules": {"a": [1, 2], "b": [1, 3]}}
        snapshot.load(path, adapters, optimizer, other, {})
    with pytest.raises(AdapterLabError, match="modules b .*expected none"):
        snapshot.load(path, adapters, optimizer, {"modules": {"a": [1, 2]}}, {})


def test_snapshot_that_is_none(tmp_path):
    write_adapter(tmp_path / "s.safetensors", {"x": torch.zeros(1)})
    adapters = fresh()
    with pytest.raises(AdapterLabError, match="not the state of a training run"):
        optimizer = make_optimizer(adapters, SETTINGS)
        snapshot.load(tmp_path / "s.safetensors", adapters, optimizer, {}, {})


class Cancel(BaseException):
    """As ComfyUI's, not an Exception."""


def test_cancel_keeps_the_last_completed_step():
    adapters, progress, kept = fresh(), Progress(), []

    def on_step(state):
        kept.append([p.clone() for p in parameters(adapters)])
        if state.step == 3:
            raise Cancel

    with pytest.raises(Cancel):
        run(10, adapters, progress, on_step=on_step)
    assert progress.step == len(progress.losses) == 3
    for now, then in zip(parameters(adapters), kept[-1], strict=True):
        assert torch.equal(now, then)


def test_cancel_within_a_pass_changes_nothing():
    adapters, optimizer, progress = run(2)
    before = [p.clone() for p in parameters(adapters)]

    class Broken(Toy):
        def predict(self, x_t, sigma, items):
            raise Cancel

    with pytest.raises(Cancel):
        train(
            Broken(adapters), adapters, dataset(), TrainConfig(5), optimizer, SETTINGS, progress,
            lambda _: None,
        )  # fmt: skip
    assert progress.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(adapters), strict=True))


class Half(Toy):
    """Computes in float16 what is then scaled by ``factor``, so that gradients leave its range."""

    half, factor = True, 1e-7

    def predict(self, x_t, sigma, items):
        weight = (self.weight + self.adapters["layer"].delta(self.weight))[:, :, None, None]
        return F.conv2d(x_t.half(), weight.half()).float() * self.factor


class Unscaled(Half):
    half = False


class Loud(Half):
    factor = 30.0


def test_float16_gradients_do_not_vanish():
    """Half the factors are zero at the start, so the other half has the gradient."""
    moved = [run(1, toy=toy)[0]["layer"].tensors["lora_up.weight"] for toy in (Half, Unscaled)]
    assert moved[0].abs().min() > 0
    assert (moved[1] == 0).any()


def test_float16_gradients_that_overflow_lower_the_scale():
    adapters, _, progress = run(3, toy=Loud)
    assert 1 <= progress.scale < HALF_SCALE and progress.step == len(progress.losses) == 3
    assert all(p.isfinite().all() for p in parameters(adapters))


def test_a_loss_that_is_no_number_stops_before_the_update():
    adapters = fresh()
    before = [p.clone() for p in parameters(adapters)]

    class Broken(Toy):
        def predict(self, x_t, sigma, items):
            return super().predict(x_t, sigma, items) * float("nan")

    with pytest.raises(AdapterLabError, match="step 1.*belong together"):
        run(5, adapters, toy=Broken)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(adapters), strict=True))


def test_a_gradient_that_is_no_number_stops_before_the_update():
    adapters, progress, kept = fresh(), Progress(), []

    def on_step(_):
        kept[:] = [p.detach().clone() for p in parameters(adapters)]
        if progress.step == 2:
            parameters(adapters)[0].register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(AdapterLabError, match="step 3.*learning rate"):
        run(5, adapters, progress, on_step=on_step)
    assert progress.step == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, parameters(adapters), strict=True))


def test_modules_without_effect_are_an_error():
    class Deaf(Toy):
        def predict(self, x_t, sigma, items):
            return x_t

    with pytest.raises(AdapterLabError, match="takes part"):
        run(1, toy=Deaf)


def test_masks_may_be_missing():
    data, toy = dataset(2), Toy(fresh())
    whole = TrainDataset([_with(data[0], mask=torch.ones(7, 5)), data[1]])
    plain, masked = (run(1, data=d)[2].losses[0] for d in (data, whole))
    assert masked == pytest.approx(plain, rel=1e-6)
    assert validate(toy, whole, 0) == pytest.approx(validate(toy, data, 0), rel=1e-6)


def test_warmup():
    rates = [OptimizerConfig(learning_rate=1.0, warmup=4).rate(i) for i in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("field", ["steps", "batch_size", "accumulation"])
def test_unusable_numbers(field):
    with pytest.raises(AdapterLabError, match=field):
        TrainConfig(**{field: 0})


def test_saves_at():
    config = TrainConfig(steps=25, save_every=10)
    assert [i for i in range(1, 26) if config.saves_at(i)] == [10, 20, 25]
    assert [i for i in range(1, 26) if TrainConfig(steps=25, save_every=0).saves_at(i)] == [25]
