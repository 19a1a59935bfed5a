"""The loop on a toy process: what it optimises, what it leaves alone, what it reports."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.loop import HALF_SCALE, Diverged, validate
from adapter_lab.core.train.objective import Objective, ObjectiveConfig
from adapter_lab.core.train.optimizers import OPTIMIZERS
from adapter_lab.core.train.random import generator
from toy import PATHS, Run, Toy, copies, dataset, fresh

PLAIN = Objective(ObjectiveConfig(timestep_sampling="uniform"))


def using(toy, run=None):
    """A run over another process."""
    run = run or Run()
    run.process = toy(run.adapters)
    return run


def test_it_learns():
    run = Run(OptimizerConfig(learning_rate=0.03), rank=4)
    before = validate(run.process, run.data, Objective(), 0)
    run.train(150)
    assert validate(run.process, run.data, Objective(), 0) < 0.95 * before
    assert len(run.progress.losses) == run.progress.step == 150


def test_same_seed_same_bits_other_seed_others():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second, other = (Run(rank_dropout=0.2).train(5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.tensors(), second.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("clip", [0.0, 0.1, 100.0])
def test_accumulation_is_the_mean_of_its_batches(clip):
    """Two passes give the gradient of the mean of their two means, computed here by hand."""
    run = Run(OptimizerConfig("SGD", 1.0, 0.0, clip, arguments="momentum = 0.0"))
    before, toy, total, levels = copies(run.optimizer.factors), run.process, 0.0, []
    probe = Run()
    probe.process = toy = Toy(probe.adapters)
    for number in range(2):
        items = run.data.draw(number, 2, 0)
        rng = generator(0, "noise", number)
        u = PLAIN.config.timesteps.draw(toy.noise, (4, 4), len(items), rng)
        x0 = toy.latents(items)
        noise = torch.randn(x0.shape, generator=rng)
        prediction = toy.predict(toy.corrupt(x0, noise, u), u, items, u)
        total = total + F.mse_loss(prediction, noise - x0) / 2
        levels += u.tolist()
    gradients = torch.autograd.grad(total, probe.optimizer.factors)
    norm = sum(g.square().sum() for g in gradients).sqrt()
    run.train(1, accumulation=2, objective=PLAIN)
    share = min(1.0, clip / norm) if clip else 1.0
    for now, was, grad in zip(run.optimizer.factors, before, gradients, strict=True):
        torch.testing.assert_close(now, was - share * grad, rtol=1e-4, atol=1e-6)
    (step,) = run.steps
    assert step.loss == pytest.approx(total.item(), rel=1e-5) == run.progress.losses[0]
    assert step.norm == pytest.approx(norm.item(), rel=1e-5) and norm > 0.1
    assert step.t == pytest.approx(levels)
    assert step.rate == 1.0 and step.step == 1 and step.seconds > 0 and step.idle == ()


def test_rates_of_the_steps():
    run, used = Run(OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup=2)), []
    run.train(6, lambda _: used.append(run.optimizer.parts[0].param_groups[0]["lr"]))
    rates = [1e-3 * share for share in (0.5, 1.0, 1.0, 0.75, 0.5, 0.25)]
    assert [step.rate for step in run.steps] == pytest.approx(rates) == used
    assert [step.step for step in run.steps] == [1, 2, 3, 4, 5, 6]


def test_mask_and_weight_scale_the_loss():
    toy = Toy(fresh())
    plain = loss_of(toy, dataset())
    assert loss_of(toy, dataset(weight=0.25)) == pytest.approx(0.25 * plain, rel=1e-6)
    half = torch.zeros(16, 20)
    half[:8] = 1
    both = [loss_of(toy, dataset(mask=mask)) for mask in (half, 1 - half)]
    assert sum(both) == pytest.approx(plain, rel=1e-5)
    assert both[0] != pytest.approx(plain / 2, rel=1e-3)


def loss_of(toy, data):
    return validate(toy, data, Objective(), 0)


class Cancel(BaseException):
    """As ComfyUI's, not an Exception."""


def test_cancel_keeps_the_last_completed_step():
    run, kept = Run(), []

    def on_step(step):
        kept.append(copies(run.tensors()))
        if step.step == 3:
            raise Cancel

    with pytest.raises(Cancel):
        run.train(10, on_step)
    assert run.progress.step == len(run.progress.losses) == 3
    assert all(map(torch.equal, run.tensors(), kept[-1]))


def test_cancel_within_a_pass_changes_nothing():
    class Broken(Toy):
        def predict(self, x_t, sigma, items, t, number=None):
            raise Cancel

    run = Run().train(2, steps=5)
    before = copies(run.tensors())
    with pytest.raises(Cancel):
        using(Broken, run).train(5)
    assert run.progress.step == 2
    assert all(map(torch.equal, before, run.tensors()))


class Half(Toy):
    """Computes in float16 what is then scaled by ``factor``, so that gradients leave its range."""

    half, factor = True, 1e-7

    def predict(self, x_t, sigma, items, t, number=None):
        weight = self.weights[PATHS[0]] + self.adapters[PATHS[0]].delta(self.weights[PATHS[0]])
        return F.conv2d(x_t.half(), weight[:, :, None, None].half()).float() * self.factor


class Unscaled(Half):
    half = False


class Loud(Half):
    factor = 30.0


def run_half(toy, steps):
    return using(toy, Run(paths=PATHS[:1])).train(steps)


def test_float16_gradients_do_not_vanish():
    """Half the factors are zero at the start, so the other half has the gradient."""
    run = run_half(Half, 1)
    assert run.adapters[PATHS[0]].tensors["lora_up.weight"].abs().min() > 0
    assert 0 < run.steps[0].norm < 1e-5  # of the loss, which is not scaled
    with pytest.raises(AdapterLabError, match="all gradients of the first step are zero"):
        run_half(Unscaled, 1)


def test_float16_gradients_that_overflow_lower_the_scale():
    run = run_half(Loud, 3)
    assert 1 <= run.progress.scale < HALF_SCALE
    assert run.progress.step == len(run.progress.losses) == 3
    assert all(f.isfinite().all() for f in run.optimizer.factors)


def test_a_loss_that_is_no_number_stops_before_the_update():
    class Broken(Toy):
        def predict(self, x_t, sigma, items, t, number=None):
            return super().predict(x_t, sigma, items, t, number) * float("nan")

    run = using(Broken)
    before = copies(run.tensors())
    with pytest.raises(Diverged, match="step 1.*belong together"):
        run.train(5)
    assert all(map(torch.equal, before, run.tensors()))


def test_a_gradient_that_is_no_number_stops_before_the_update():
    run, kept = Run(), []

    def on_step(step):
        kept[:] = copies(run.tensors())
        if step.step == 2:
            factor = run.adapters[PATHS[1]].tensors["lora_up.weight"]
            factor.register_hook(lambda grad: grad * float("inf"))

    with pytest.raises(Diverged, match=f"step 3.*not finite in {PATHS[1]}.*learning rate"):
        run.train(5, on_step)
    assert run.progress.step == 2
    assert all(map(torch.equal, kept, run.tensors()))


class Growing(Toy):
    """An output without bound, unlike that of the other toy."""

    def predict(self, x_t, sigma, items, t, number=None):
        weight = self.weights[PATHS[0]] + self.adapters[PATHS[0]].delta(self.weights[PATHS[0]])
        return F.conv2d(x_t, weight[:, :, None, None])


def test_a_learning_rate_that_is_far_too_high():
    """The loss grows and grows but stays finite."""
    settings = OptimizerConfig("AdamW", 30.0, 0.0)
    run = using(Growing, Run(settings, paths=PATHS[:1]))
    with pytest.raises(Diverged, match="times what it was.*Lower the learning rate"):
        run.train(400)
    assert math.isfinite(run.progress.losses[-1]) and run.progress.step < 100


def test_rare_levels_of_great_weight_are_no_divergence():
    """sigma_sqrt weighs a level of 0.001 a million times as much as noise."""
    objective = Objective(ObjectiveConfig("uniform", weighting="sigma_sqrt"))
    run = Run(OptimizerConfig("SGD", 1e-8, 0.0)).train(300, objective=objective, batch_size=1)
    losses = run.progress.losses
    means = [sum(losses[i : i + 20]) / 20 for i in range(0, 300, 20)]
    assert max(means) > 1000 * losses[0]  # else this proves nothing


def test_modules_without_effect_are_an_error():
    class Deaf(Toy):
        def predict(self, x_t, sigma, items, t, number=None):
            return x_t

    with pytest.raises(AdapterLabError, match="takes part"):
        using(Deaf).train(1)


class Detached(Toy):
    """One layer stands behind an operation without a backward pass."""

    def predict(self, x_t, sigma, items, t, number=None):
        with torch.no_grad():
            first = Growing.predict(self, x_t, sigma, items, t)
        second = self.weights[PATHS[1]] + self.adapters[PATHS[1]].delta(self.weights[PATHS[1]])
        return F.conv2d(first, second[:, :, None, None])


def test_modules_without_gradient_are_named():
    """At the first step, before it is taken; what drops out by itself is no error."""
    run = using(Detached, Run(paths=PATHS[:2]))
    before = copies(run.tensors())
    with pytest.raises(AdapterLabError, match=f"1 modules take no part.*{PATHS[0]}"):
        run.train(1)
    assert all(map(torch.equal, before, run.tensors()))
    assert run.progress.step == 0


@pytest.mark.parametrize("name", ["AdamW", "Muon", "Prodigy", "ScheduleFreeAdamW", "AdamW8bit"])
def test_steps_from_which_every_module_dropped_out(name):
    run = Run(OptimizerConfig(name, OPTIMIZERS[name].rate, 0.0), module_dropout=0.9).train(25)
    lengths = [step.norm for step in run.steps]
    assert lengths.count(0.0) > 10 and max(lengths) > 0
    assert all(math.isfinite(loss) and loss > 0 for loss in run.progress.losses)


class Silent(Toy):
    """Its first layer sees zeros."""

    def predict(self, x_t, sigma, items, t, number=None):
        nothing = Growing.predict(self, x_t * 0, sigma, items, t)
        second = self.weights[PATHS[1]] + self.adapters[PATHS[1]].delta(self.weights[PATHS[1]])
        return F.conv2d(x_t + nothing, second[:, :, None, None])


def test_modules_that_one_step_teaches_nothing_are_told():
    run = using(Silent, Run(paths=PATHS[:2])).train(2)
    assert [step.idle for step in run.steps] == [(PATHS[0],), ()]


def test_gradients_that_are_all_zero_are_an_error():
    class Zero(Toy):
        def predict(self, x_t, sigma, items, t, number=None):
            return super().predict(x_t, sigma, items, t, number) * 0

    with pytest.raises(AdapterLabError, match="No module learns anything"):
        using(Zero).train(1)


def test_items_without_weight_tell_nothing():
    """Whichever comes first; a dataset of nothing else is an error, after it was seen once."""
    run = Run()
    first = run.data.draw(0, 1, 0)[0]
    run.data = TrainDataset([replace(i, weight=float(i is not first)) for i in run.data])
    run.train(3, batch_size=1)
    assert run.progress.losses[0] == 0 < run.progress.losses[1]
    run = Run()
    run.data = dataset(3, weight=0.0)
    with pytest.raises(AdapterLabError, match="No module learns anything.*weights and masks"):
        run.train(9, batch_size=1)
    assert run.progress.step == 2


def test_masks_may_be_missing():
    toy, plain = Toy(fresh()), dataset(2)
    first = TrainItem(**{**vars(plain[0]), "mask": torch.ones(7, 5)})
    whole = TrainDataset([first, plain[1]])
    assert loss_of(toy, whole) == pytest.approx(loss_of(toy, plain), rel=1e-6)


def test_variants_are_drawn():
    """The loop takes what the dataset draws, not the items themselves."""
    run, seen = Run(), []
    items = [TrainItem(**{**vars(i), "variants": (i, i)}) for i in run.data]
    run.data = TrainDataset(items)

    class Watching(Toy):
        def predict(self, x_t, sigma, items, t, number=None):
            seen.append(([id(item) for item in items], number))
            return super().predict(x_t, sigma, items, t, number)

    using(Watching, run).train(3, accumulation=2)
    drawn = [[id(i) for i in run.data.draw(n, 2, 0)] for n in range(6)]
    assert seen == [(ids, number) for number, ids in enumerate(drawn)]


def test_only_what_is_trained_is_a_parameter():
    run = Run(algorithm="lora_fa")
    assert len(run.optimizer.factors) == 3
    before = {p: a.tensors["lora_down.weight"].clone() for p, a in run.adapters.items()}
    run.train(3)
    for path, adapter in run.adapters.items():
        assert torch.equal(adapter.tensors["lora_down.weight"], before[path])
        assert adapter.tensors["lora_up.weight"].any()


@pytest.mark.parametrize("field", ["steps", "batch_size", "accumulation"])
def test_unusable_numbers(field):
    with pytest.raises(AdapterLabError, match=field):
        TrainConfig(**{field: 0})


def test_seeds():
    assert TrainConfig(seed=2**64 - 1).seed
    with pytest.raises(AdapterLabError, match="seed"):
        TrainConfig(seed=-1)


def test_saves_at():
    config = TrainConfig(steps=25, save_every=10)
    assert [i for i in range(1, 26) if config.saves_at(i)] == [10, 20, 25]
    assert [i for i in range(1, 26) if TrainConfig(steps=25, save_every=0).saves_at(i)] == [25]
