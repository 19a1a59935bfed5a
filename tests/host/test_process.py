"""Noise, targets and conditioning of ComfyUI's models, as ComfyUI itself has them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import comfy.model_base
import comfy.model_management
import comfy.samplers
import pytest
import samples
import tiny
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.data import TrainItem
from adapter_lab.nodes.host.conditioning import Conditioner, stacks
from adapter_lab.nodes.host.latents import graph
from adapter_lab.nodes.host.noise import noise as noise_of
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import Session
from comfy.conds import CONDCrossAttn, CONDRegular
from comfy.model_base import ModelType
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete

SETTINGS = {
    "shift": 2.0, "sigma_min": 0.05, "sigma_max": 40.0, "sigma_data": 0.5, "zsnr": False,
}  # fmt: skip
TRAINED = [t for t in ModelType if not t.name.startswith("IMG_TO_IMG")]
KINDS = ("flux", "wan", "sd15", "sd3", "hunyuan_video")
T = torch.tensor([0.08, 0.4, 0.73, 0.95])


def sampling(kind, **settings):
    """ComfyUI's own object for a kind of model."""
    config = SimpleNamespace(sampling_settings=SETTINGS | settings)
    return comfy.model_base.model_sampling(config, kind)


@pytest.fixture
def process(model):
    """Makes the process of a small model whose sampling is another."""

    def make(kind):
        patched = model("sd15").clone()
        patched.add_object_patch("model_sampling", sampling(kind))
        return HostProcess(Session(patched, {}))

    return make


def textbook(kind, x0, n, sigma):
    """What networks are trained to say, from the papers: x = x0 + sigma n, alpha^2 + s^2 = 1."""
    alpha, s = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    data = SETTINGS["sigma_data"]
    root = (sigma**2 + data**2) ** 0.5
    preconditioned = (x0 - (x0 + sigma * n) * data**2 / root**2) * root / (sigma * data)
    return {
        "EPS": n,
        "STABLE_CASCADE": n,
        "V_PREDICTION": alpha * n - s * x0,  # Salimans and Ho 2022, appendix D
        "V_PREDICTION_DDPM": alpha * n - s * x0,
        "EDM": preconditioned,  # Karras et al. 2022, equation 8 and table 1
        "V_PREDICTION_EDM": -preconditioned,
        "V_PREDICTION_CONTINUOUS": -preconditioned,
        "FLOW": n - x0,
        "FLUX": n - x0,
        "FLOW_COSMOS": n - x0,
    }[kind.name]


@pytest.mark.parametrize("kind", TRAINED, ids=lambda k: k.name)
def test_target_of_every_kind_of_model(process, kind):
    made = process(kind)
    rng = torch.Generator().manual_seed(0)
    x0, n = torch.randn(2, 4, 4, 4, 4, generator=rng)
    sigma = made.noise.sigma(T)
    target = made.target(x0, made.corrupt(x0, n, sigma), sigma)
    expected = textbook(kind, x0, n, sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(target, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", TRAINED, ids=lambda k: k.name)
def test_signal_to_noise_and_gain_of_every_kind_of_model(process, kind):
    """Read off what ComfyUI makes of pure signal, pure noise and an output that is 1 more."""
    made = process(kind)
    sigma = made.noise.sigma(T)
    one, zero = torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    signal, noise = made.corrupt(one, zero, sigma), made.corrupt(zero, one, sigma)
    ratio = (signal / noise).flatten().square()
    torch.testing.assert_close(made.noise.snr(T), ratio, rtol=1e-3, atol=0)
    more = made.sampling.calculate_denoised(sigma, one, zero).flatten().abs()
    torch.testing.assert_close(made.noise.gain(T), more, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", TRAINED, ids=lambda k: k.name)
def test_schedule_is_that_of_the_sampler(kind):
    given = sampling(kind)
    made = noise_of(given)
    sigma = made.sigma(made.scheduled(T))
    expected = torch.tensor([float(given.percent_to_sigma(1 - float(u))) for u in T])
    # One of a thousand rows of a table.
    torch.testing.assert_close(sigma, expected, rtol=0.01, atol=0)


def test_shifts_of_flows():
    assert noise_of(sampling(ModelType.FLOW)).shift == 2.0
    assert noise_of(sampling(ModelType.FLUX)).shift == pytest.approx(math.exp(2.0))
    assert noise_of(sampling(ModelType.FLOW, noise_scale=3.0)).scale == 3.0


@pytest.mark.parametrize("kind", [ModelType.IMG_TO_IMG, ModelType.IMG_TO_IMG_FLOW])
def test_models_that_remove_no_noise_are_refused(kind):
    with pytest.raises(AdapterLabError, match=rf"cannot be trained: found .*{kind.name}"):
        noise_of(sampling(kind))


@pytest.mark.parametrize(
    "name", ["eps", "v_prediction", "edm", "edm_playground_v2.5", "cosmos_rflow"]
)
def test_models_patched_to_continuous_sigmas(model, name):
    patched = ModelSamplingContinuousEDM().patch(model("sd15"), name, 80.0, 0.02)[0]
    made = noise_of(patched.get_model_object("model_sampling"))
    sigma = made.sigma(torch.tensor([0.001, 0.5, 0.999]))
    assert (sigma.diff() > 0).all() and made.kind in ("eps", "v", "edm", "flow")


@pytest.mark.parametrize(
    ("name", "kind"), [("eps", "eps"), ("v_prediction", "v"), ("lcm", "eps"), ("x0", "x0")]
)
def test_models_patched_to_another_output(model, name, kind):
    patched = ModelSamplingDiscrete().patch(model("sd15"), name, False)[0]
    made = HostProcess(Session(patched, {}))
    assert made.noise.kind == kind
    x0, n = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = made.noise.sigma(T)
    x_t = made.corrupt(x0, n, sigma)
    back = made.sampling.calculate_denoised(sigma, made.target(x0, x_t, sigma), x_t)
    torch.testing.assert_close(back, x0, rtol=1e-3, atol=1e-3)


def denoised(model, item, x, sigma):
    """By ComfyUI's own guider, without guidance."""
    _, cond = graph(item)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(cond, cond)
    guider.set_cfg(1.0)
    seen = {}

    class Once(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra, callback, noise, *_, **__):
            seen["x0"] = wrap(x, sigma, **extra)
            return noise

    with torch.inference_mode():
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), Once(), torch.tensor([1.0, 0.0]))
    return seen["x0"].clone()


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_that_of_the_sampler(load, kind):
    model = load(kind)
    items = samples.items(kind, 2, seed=5)
    if kind == "hunyuan_video":
        items = [with_extra(item, guidance=3.0) for item in items]
    check_denoised(model, items)


def check_denoised(model, items):
    """A batch of two is predicted as the sampler does each of them alone."""
    with torch.inference_mode(), Session(model, {}) as session:
        process = HostProcess(session)
        process.check(items)
        t = torch.tensor([0.3, 0.8])
        x0, sigma = process.latents(items), process.noise.sigma(t)
        x = process.corrupt(x0, x0.flip(0).roll(1, -1), sigma)
        with torch.no_grad():
            said = process.predict(x, sigma, items, t)
        found = process.sampling.calculate_denoised(sigma, said, x)
    for i, item in enumerate(items):
        one = slice(i, i + 1)
        samples.close(found[one], denoised(model, item, x[one], sigma[one]))


def with_extra(item, **more):
    return TrainItem(item.latent, item.cond, {**item.extra, **more})


def predict(process, items, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x0 = process.latents(items)
    t = torch.full((len(items),), 0.5)
    x = torch.randn(x0.shape, generator=rng)
    with torch.no_grad():
        return process.predict(x, process.noise.sigma(t), items, t)


def test_cancel_is_heard_within_a_step(load, monkeypatch):
    """A step of many batches, and validation, are minutes of a large model."""
    (item,) = samples.items("flux", 1)
    with torch.inference_mode(), Session(load("flux"), {}) as session:
        process = HostProcess(session)
        monkeypatch.setattr(process.model, "apply_model", None)
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            predict(process, [item])


def test_guidance_is_told_where_the_conditioning_does_not(load):
    (plain,) = samples.items("hunyuan_video", 1)
    said = [with_extra(plain, guidance=g) for g in (1.0, 4.0)]
    with torch.inference_mode(), Session(load("hunyuan_video"), {}) as session:
        process, other = HostProcess(session), HostProcess(session, guidance=4.0)
        one, four = (predict(process, [item]) for item in said)
        samples.differs(one, four)
        assert torch.equal(predict(process, [plain]), one)
        assert torch.equal(predict(other, [plain]), four)
        assert torch.equal(predict(other, [said[0]]), one)


def test_guidance_is_not_told_to_models_without_it(model):
    flux = model("flux")
    assert Conditioner(flux.model, flux.load_device, 3.0).defaults == {}


def counted(process, monkeypatch):
    """How often the model is asked what it makes of a conditioning."""
    calls, real = [], process.model.extra_conds
    monkeypatch.setattr(
        process.model, "extra_conds", lambda **kwargs: (calls.append(1), real(**kwargs))[1]
    )
    return calls


def test_conditioning_is_encoded_once(load, monkeypatch):
    items = samples.items("flux", 2)
    wide = TrainItem(torch.zeros(16, 8, 10), items[0].cond, items[0].extra)
    with torch.inference_mode(), Session(load("flux"), {}) as session:
        process = HostProcess(session)
        calls = counted(process, monkeypatch)
        first = predict(process, items)
        assert torch.equal(predict(process, items), first) and len(calls) == 2
        predict(process, [wide])
        assert len(calls) == 3


def test_room_for_conditioning_is_bounded(load, monkeypatch):
    items = samples.items("flux", 3)
    with torch.inference_mode(), Session(load("flux"), {}) as session:
        process = HostProcess(session)
        size = sum(t.nbytes for t in (items[0].cond, items[0].extra["pooled_output"]))
        process.conditioner.room = 2 * size + 64  # and guidance
        calls = counted(process, monkeypatch)
        for item in (*items, items[1], items[2]):
            predict(process, [item])
        assert len(calls) == 3
        predict(process, [items[0]])
        assert len(calls) == 4 and process.conditioner._used <= process.conditioner.room


def test_texts_are_stacked_without_padding():
    """ComfyUI would repeat 4 tokens to have 8."""
    made = [{"c_crossattn": CONDCrossAttn(torch.zeros(1, n, 3))} for n in (4, 8, 4)]
    made.append({**made[0], "y": CONDRegular(torch.zeros(1, 3))})
    assert stacks(made) == [[0, 2], [1], [3]]


def test_conditioning_with_gradients_is_encoded_every_time(load):
    """As from a text encoder in training, also when validation came first."""
    (item,) = samples.items("flux", 1)
    scale = torch.ones((), requires_grad=True)
    with torch.inference_mode(), Session(load("flux"), {}) as session:
        process = HostProcess(session, encode=lambda i: (i.cond * scale, i.extra))
        predict(process, [item])
        x, t = process.latents([item]), torch.tensor([0.5])
        for _ in range(2):
            loss = process.predict(x, t, [item], t, 0).square().mean()
            (slope,) = torch.autograd.grad(loss, scale)
            assert slope.abs() > 0


def test_adapters_draw_for_batches_and_not_for_validation(load):
    (item,) = samples.items("flux", 1)
    with torch.inference_mode(), Session(load("flux"), {}) as session:
        process, told = HostProcess(session), []
        session.begin_batch = lambda *args, **kwargs: told.append((*args, kwargs))
        session.end_batch = lambda: told.append("end")
        x, t = process.latents([item] * 3), torch.tensor([0.2, 0.5, 0.7])
        longer = TrainItem(item.latent, torch.zeros(9, 64), item.extra)
        process.predict(x, t, [item, longer, item], t, 11)
        passes, told[:] = list(told), []
        process.predict(x[:1], t[:1], [item], t[:1])
    assert set(told) == {"end"}
    # Each conditioning, then the two lengths of text: none draws what another does.
    levels = [at.tolist() for _, at, _ in passes]
    assert levels == [t[i].tolist() for i in ([0], [1], [2], [0, 2], [1])]
    assert {number for number, *_ in passes} == {11}
    assert len({options["part"] for *_, options in passes}) == 5


def test_conditioning_through_an_adapter_is_not_kept(load, monkeypatch):
    """Some models pass the text through layers of their own, which module dropout may spare."""
    (item,) = samples.items("flux", 1)
    with torch.inference_mode(), Session(load("flux"), {}) as session:
        process, scale = HostProcess(session), torch.ones((), requires_grad=True)
        real = process.model.extra_conds

        def extra_conds(*, cross_attn, **kwargs):
            return real(cross_attn=cross_attn * scale, **kwargs)

        monkeypatch.setattr(process.model, "extra_conds", extra_conds)
        predict(process, [item])
        calls = counted(process, monkeypatch)
        scale.requires_grad_(False)
        predict(process, [item])
        predict(process, [item])
    assert len(calls) == 2


I2V = dict(tiny.WAN, model_type="i2v", in_dim=36)
INPAINT = dict(tiny.SD15, in_channels=9)


@pytest.mark.parametrize(
    ("base", "options"), [("wan", I2V), ("sd15", INPAINT)], ids=["image to video", "inpainting"]
)
def test_models_with_more_inputs_are_given_what_the_host_gives(load, monkeypatch, base, options):
    monkeypatch.setitem(tiny.BUILDERS, f"wider {base}", (tiny.BUILDERS[base][0], options))
    model = load(f"wider {base}")
    check_denoised(model, samples.items(base, 2))


def test_missing_parts_of_a_conditioning_are_said(load):
    (item,) = samples.items("sd3", 1)
    says = pytest.raises(AdapterLabError, match="conditioning.*pooled_output")
    with torch.inference_mode(), Session(load("sd3"), {}) as session, says:
        HostProcess(session).check([TrainItem(item.latent, item.cond)])


def test_global_randomness_is_untouched(load):
    state = torch.get_rng_state()
    with torch.inference_mode(), Session(load("sd15"), {}) as session:
        process = HostProcess(session)
        process.check(samples.items("sd15", 1))
        predict(process, samples.items("sd15", 2))
    assert torch.equal(torch.get_rng_state(), state)
