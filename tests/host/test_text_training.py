"""Training of text encoders: gradients through captions, and files that give the same text."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import encoders
import pytest
import samples
import torch
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.adapters.training import make, with_leaves
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.random import generator
from adapter_lab.core.train.targets import Targets, file_stem
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host import paths, trainer
from adapter_lab.nodes.host.job import Job
from adapter_lab.nodes.host.layers import dims, submodules
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import Session
from adapter_lab.nodes.host.targets import chosen, trainable, with_bias
from adapter_lab.nodes.host.text import TextEncoder, require_captions, static
from sessions import BLOCKS, OFF, check_same, factors

CAPTION = "a (red:1.3) cat, photo"
KINDS = tuple(encoders.KINDS)


@pytest.fixture(scope="module")
def clip():
    """Kind -> a text encoder, the same for all tests: what one leaves behind the next one finds."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = encoders.make(kind)
        return made[kind]

    return get


def adapters(model, clip, targets, noise=0.1, **config):
    """Fresh ones with some noise added: a delta that is not zero."""
    made = {}
    shapes = chosen(targets, model, clip, host.architecture(model))
    biased = with_bias(shapes, model, clip)
    for path, shape in shapes.items():
        rng = generator(0, path)
        settings = AdapterConfig(**{"rank": 2, "alpha": 2.0, **config})
        made[path] = with_leaves(
            make(shape, settings, rng, biased=path in biased), torch.device("cpu")
        )
        with torch.no_grad():
            for tensor in made[path].trained.values():
                tensor += noise * torch.randn(tensor.shape, generator=rng)
    return made


def item(caption=CAPTION, kind="flux", **extra):
    latent = samples.items(kind, 1)[0].latent
    return TrainItem(latent, None, extra, caption=caption)


def encoded(model, clip, made, options=OFF, caption=CAPTION):
    """(cond, extra, gradient by factor) of the squares of all that the text encoder gives."""
    with (
        torch.inference_mode(),
        Session(model, made, options, clip) as session,
        TextEncoder(clip, session) as encoder,
    ):
        cond, extra = encoder.encode(item(caption))
        value = sum(t.float().square().mean() for t in (cond, *extra.values()))
        grads = torch.autograd.grad(value, factors(made), allow_unused=True) if made else ()
    return cond.detach(), extra, grads


def comfyui(clip, caption=CAPTION):
    """What ComfyUI's own nodes get."""
    with torch.inference_mode():
        ((cond, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    return cond[0], extra


def value_of(model, kind, clip, made, options=OFF, captions=(CAPTION, "")):
    """Squared output of the model for two captions, so that every layer matters; gradients."""
    items = [item(caption, kind) for caption in captions]
    rng = torch.Generator().manual_seed(1)
    with (
        torch.inference_mode(),
        Session(model, made, options, clip) as session,
        TextEncoder(clip, session) as encoder,
    ):
        process = HostProcess(session, encode=encoder.encode)
        x0 = process.latents(items)
        t = process.noise.scheduled(torch.tensor([0.3, 0.6]))
        sigma = process.noise.sigma(t)
        x_t = process.corrupt(x0, torch.randn(x0.shape, generator=rng), sigma)
        value = process.predict(x_t, sigma, items, t).float().square().mean()
        grads = torch.autograd.grad(value, factors(made))
    return value.item(), grads


def check_slope(evaluate, made, step=1e-2, rel=1e-2):
    """Gradients against a central difference, which knows nothing of autograd."""
    _, grads = evaluate()
    norm = sum(g.square().sum() for g in grads).sqrt()
    assert norm > 0
    values = []
    for sign in (step, -step):
        with torch.no_grad():
            for factor, grad in zip(factors(made), grads, strict=True):
                factor += sign * grad / norm
            values.append(evaluate()[0])
            for factor, grad in zip(factors(made), grads, strict=True):
                factor -= sign * grad / norm
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm.item(), rel=rel)


@pytest.mark.parametrize("caption", [CAPTION, "", "word " * 100])
@pytest.mark.parametrize("kind", KINDS)
def test_encodes_as_comfyui_does(load, clip, kind, caption):
    cond, extra, _ = encoded(load("flux"), clip(kind), {}, caption=caption)
    wanted, rest = comfyui(clip(kind), caption)
    assert torch.equal(cond, wanted)
    assert extra.keys() == {name for name, value in rest.items() if value is not None}
    assert all(torch.equal(extra[name], rest[name][0]) for name in extra)


def test_clip_skip_counts(load, clip):
    skipping = clip("sd15").clone()
    skipping.clip_layer(-2)
    cond, *_ = encoded(load("flux"), skipping, {})
    assert torch.equal(cond, comfyui(skipping)[0])
    assert not torch.equal(cond, comfyui(clip("sd15"))[0])


def test_what_the_text_encoder_does_not_give_stays(load, clip):
    with torch.inference_mode(), Session(load("flux"), {}, OFF, clip("flux")) as session:
        _, extra = TextEncoder(clip("flux"), session).encode(item(guidance=2.5))
    assert extra["guidance"] == 2.5 and extra.keys() == {"guidance", "pooled_output"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_chosen_module_has_a_gradient(load, clip, kind):
    made = adapters(load("flux"), clip(kind), Targets(train="text encoder", norms=True))
    *_, grads = encoded(load("flux"), clip(kind), made)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_has_no_gradient(load, clip, kind):
    """Layers behind the one whose states are taken, and outputs that nobody takes."""
    text, made = clip(kind), {}
    for path, module in submodules(text.patcher.model).items():
        if dims(module) is not None and "visual" not in path and "lm_head" not in path:
            rng = generator(0, path)
            fresh = make(tuple(module.weight.shape), AdapterConfig(rank=2), rng)
            made[path] = with_leaves(fresh, torch.device("cpu"))
    *_, grads = encoded(load("flux"), text, made)
    suffixes = [path for path, adapter in made.items() for _ in adapter.tensors]
    idle = {path for path, grad in zip(suffixes, grads, strict=True) if grad is None}
    assert idle == made.keys() - trainable(load("flux"), text).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(load, clip, kind):
    made = adapters(load("flux"), clip(kind), Targets(train="text encoder"))
    *_, kept = encoded(load("flux"), clip(kind), made)
    *_, again = encoded(load("flux"), clip(kind), made, BLOCKS)
    check_same(again, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(load, dtype):
    """Frozen weights are in it; activations and factors are not, nor is what they come to."""
    half, wide = encoders.make("flux", dtype), encoders.make("flux")
    with torch.inference_mode():
        for a, b in zip(
            half.patcher.model.parameters(), wide.patcher.model.parameters(), strict=True
        ):
            assert a.dtype == dtype or a.ndim == 0
            b.copy_(a)
    made = adapters(load("flux"), half, Targets(train="text encoder"))
    *_, found = encoded(load("flux"), half, made)
    *_, wanted = encoded(load("flux"), wide, made)
    check_same(found, wanted)


@pytest.mark.parametrize("train", ["text encoder", "both"])
@pytest.mark.parametrize("kind", ["flux", "sd15"])
def test_gradient_is_the_slope_of_the_loss(load, clip, kind, train):
    model, text = load(kind), clip(kind)
    made = adapters(model, text, Targets("default", train=train))
    assert any(p.startswith("clip_l") for p in made)
    assert (train == "both") == any(p.startswith("diffusion_model") for p in made)
    check_slope(lambda: value_of(model, kind, text, made), made)


def test_checkpointing_changes_no_gradient_through_the_model(load, clip):
    made = adapters(load("flux"), clip("flux"), Targets(train="both"))
    value, kept = value_of(load("flux"), "flux", clip("flux"), made)
    again, grads = value_of(load("flux"), "flux", clip("flux"), made, BLOCKS)
    assert again == pytest.approx(value, rel=1e-5)
    check_same(grads, kept, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "oft", "full"])
def test_saved_file_gives_the_trained_text(load, clip, algorithm, tmp_path):
    """Through our loader, and through ComfyUI's own."""
    model, text = load("flux"), clip("flux")
    made = adapters(model, text, Targets(train="text encoder"), algorithm=algorithm, alpha=1.0)
    cond, extra, _ = encoded(model, text, made)
    tensors = {
        f"{file_stem(path)}.{suffix}": tensor.detach()
        for path, adapter in made.items()
        for suffix, tensor in adapter.state().items()
    }
    write_adapter(tmp_path / "a.safetensors", Adapter(tensors))
    with torch.inference_mode():
        stored = comfy.utils.load_torch_file(str(tmp_path / "a.safetensors"))
        ours = host.apply(model, text, Adapter(stored), on_unmatched="error").clip
        theirs = comfy.sd.load_lora_for_models(model, text, stored, 1.0, 1.0)[1]
    assert not torch.allclose(comfyui(text)[0], cond, atol=1e-3)
    for loaded in (ours, theirs):
        found, rest = comfyui(loaded)
        torch.testing.assert_close(found, cond, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            rest["pooled_output"][0], extra["pooled_output"], rtol=1e-4, atol=1e-4
        )


def test_leaves_no_trace(load, clip):
    text = clip("flux")
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([text.patcher])
    before = {n: (p, p.clone()) for n, p in text.patcher.model.named_parameters()}
    attributes = {p: set(vars(m)) for p, m in submodules(text.patcher.model).items()}
    made = adapters(load("flux"), text, Targets(train="text encoder"))
    with (
        pytest.raises(ZeroDivisionError),
        torch.inference_mode(),
        Session(load("flux"), made, BLOCKS, text) as session,
        TextEncoder(text, session),
    ):
        assert not any(p.is_inference() for p in text.patcher.model.parameters())
        raise ZeroDivisionError
    for name, parameter in text.patcher.model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert attributes == {p: set(vars(m)) for p, m in submodules(text.patcher.model).items()}


def test_training_goes_on_top_of_an_adapter(load, clip):
    """As ComfyUI merges it into the text encoder."""
    text, path = clip("flux"), "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1"
    file = Adapter({
        f"text_encoders.{path}.lora_up.weight": torch.randn(64, 2),
        f"text_encoders.{path}.lora_down.weight": torch.randn(2, 32),
    })  # fmt: skip
    for mode in ("merge", "bypass"):
        beside = host.apply(load("flux"), text, file, mode=mode).clip
        _, extra, _ = encoded(load("flux"), beside, {})
        torch.testing.assert_close(extra["pooled_output"], comfyui(beside)[1]["pooled_output"][0])
        assert not torch.allclose(extra["pooled_output"], comfyui(text)[1]["pooled_output"][0])


@pytest.mark.parametrize(
    ("kind", "model", "skip", "without"),
    [
        ("sd15", "sd15", None, ["text_projection"]),
        ("sd15", "sd15", -2, ["text_projection", "layers.2"]),
        ("sd15", "flux", -2, ["text_projection"]),
        ("sdxl", "flux", None, ["clip_l.transformer.text_projection", "clip_l*layers.2"]),
        ("flux", "flux", None, ["text_projection"]),
        ("omnigen2", "flux", None, []),
        ("omnigen2", "flux", -2, ["layers.1"]),
    ],
)  # fmt: skip
def test_layers_that_the_text_does_not_depend_on(load, clip, kind, model, skip, without):
    text = clip(kind).clone()
    text.clip_layer(skip)
    found = {p for p in trainable(load(model), text) if not p.startswith("diffusion_model")}
    linears = [
        p for p in submodules(text.patcher.model) if p.endswith(("_proj", "fc1", "projection"))
    ]
    missing = {p for p in linears if p not in found}
    parts = [name.split("*") for name in without]
    assert missing == {p for p in linears if any(all(x in p for x in part) for part in parts)}


def test_captions_are_required():
    plain = [TrainItem(torch.zeros(4, 8, 8), torch.zeros(2, 4))]
    with pytest.raises(AdapterLabError, match="Training Dataset from Folder"):
        require_captions(TrainDataset(plain))
    require_captions(TrainDataset([*plain, item("a cat", "sd15")]))


def test_no_text_encoder_to_train(load):
    with pytest.raises(AdapterLabError, match="Connect 'clip'"):
        chosen(Targets(train="both"), load("flux"), None, None)


def test_a_text_encoder_that_stays_in_memory_is_taken_as_it_is(clip):
    assert static(clip("flux")) is clip("flux")


def run(model, clip, kind="flux", steps=3, name="run", targets=None, validates=False, **more):
    """A small run on captions of two items."""
    latents = [samples.items(kind, 2)[i].latent for i in range(2)]
    captions = ("a red star", "a blue circle")
    data = [TrainItem(x, None, {}, c) for x, c in zip(latents, captions, strict=True)]
    options = {
        "adapter": AdapterConfig("lora", 2, 2.0),
        "targets": targets or Targets("attention only", train="both"),
        "optimizer": OptimizerConfig(learning_rate=1e-3, text_encoder_rate=2e-2, clip=0.0),
    }
    job = Job(
        model, TrainDataset(data), paths.run(name), TrainConfig(steps, batch_size=2, seed=3),
        clip=clip, validation=TrainDataset(data) if validates else None, **(options | more),
    )  # fmt: skip
    with torch.inference_mode():
        return trainer.Trainer(job).run()


@pytest.mark.parametrize("checkpointing", ["off", "blocks"])
def test_run_trains_model_and_text_encoder(load, clip, checkpointing):
    text = clip("flux")
    result = run(load("flux"), text, checkpointing=checkpointing)
    for start in ("diffusion_model.", "text_encoders.clip_l.", "text_encoders.t5xxl."):
        assert any(key.startswith(start) for key in result.adapter)
    stored = read_adapter(paths.run("run").folder / "run-step00000003.safetensors")
    adapted = host.apply(load("flux"), text, stored, on_unmatched="error").clip
    assert not torch.allclose(comfyui(adapted)[0], comfyui(text)[0], atol=1e-3)
    # AdamW's first steps are as long as the rate, whatever the gradient.
    ups = {key: t.abs().max() for key, t in result.adapter.items() if "lora_up" in key}
    model, encoder = (
        max(t for key, t in ups.items() if key.startswith(start))
        for start in ("diffusion_model", "text_encoders")
    )
    assert encoder > 5 * model > 0


def test_text_encoder_alone_lowers_the_loss(load, clip):
    targets = Targets(train="text encoder")
    result = run(load("flux"), clip("flux"), steps=10, targets=targets, validates=True)
    assert all(key.startswith("text_encoders.") for key in result.adapter)
    (_, first), *_, (_, last) = result.progress.validation
    assert last < first


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(load, clip):
    whole = run(load("flux"), clip("flux"), steps=4)
    run(load("flux"), clip("flux"), steps=2, name="parts")
    parts = run(load("flux"), clip("flux"), steps=4, name="parts")
    assert whole.adapter.keys() == parts.adapter.keys()
    assert all(torch.equal(whole.adapter[key], parts.adapter[key]) for key in whole.adapter)


def test_a_dataset_without_captions_is_refused(load, clip):
    data = TrainDataset([TrainItem(i.latent, i.cond, i.extra) for i in samples.items("flux", 2)])
    job = Job(
        load("flux"), data, paths.run("plain"), TrainConfig(1), clip=clip("flux"),
        targets=Targets(train="both"),
    )  # fmt: skip
    with pytest.raises(AdapterLabError, match="captions"), torch.inference_mode():
        trainer.Trainer(job).run()
