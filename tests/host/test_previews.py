"""Pictures sampled while training."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import pytest
import samples
import torch
from adapter_lab.core.files import read_adapter
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host import paths
from adapter_lab.nodes.host.latents import graph
from adapter_lab.nodes.host.preview import PreviewConfig, empty
from PIL import Image
from test_trainer import output, run, written


def here(name="run"):
    return paths.run(name)


def preview(kind="flux", **options):
    latent, cond = graph(samples.items(kind, 1)[0])
    sizes = {"width": 64, "height": 64, "steps": 2, "every": 2}
    return PreviewConfig(cond, **(sizes | options))


def test_previews_are_what_a_sampler_gives(load):
    """Before training the model's own picture, after it that of the saved adapter; in between
    nothing of training changes, not even the global generators."""
    model = load("flux")
    whole = run(model, "flux", name="whole")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    config = preview(seed=7)
    result = run(model, "flux", preview=config)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.progress.losses == whole.progress.losses
    assert all(torch.equal(result.adapter[k], t) for k, t in whole.adapter.items())
    assert [step for step, _ in result.previews] == [0, 2, 4]
    assert result.previews[1][1] == [
        {
            "filename": "run-step00000002.png", "subfolder": "adapter_lab/runs/run/previews",
            "type": "output",
        }
    ]  # fmt: skip
    stored = read_adapter(here().checkpoint(4))
    adapted = host.apply(model, None, stored, 1.0, 0.0, "error").model
    pictures = [np.asarray(Image.open(p)) for p in sorted(here().previews.iterdir())]
    for wanted, picture in ((model, pictures[0]), (adapted, pictures[-1])):
        assert np.array_equal(picture, sampled(wanted, config))
    assert not np.array_equal(pictures[0], pictures[-1])


def sampled(model, config):
    """What KSampler gives, as the previews of a sampler show latents."""
    import latent_preview

    import nodes

    with torch.inference_mode():
        zeros = nodes.ConditioningZeroOut().zero_out(config.positive)[0]
        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        latent = nodes.common_ksampler(
            model, config.seed, 2, 1.0, "euler", "simple", config.positive, zeros, latent
        )[0]["samples"]
        found = model.get_model_object("latent_format")
        show = latent_preview.Latent2RGBPreviewer(
            found.latent_rgb_factors, found.latent_rgb_factors_bias
        )
        small = show.decode_latent_to_preview(model.model.process_latent_in(latent))
    return np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))


EMPTY = {
    "flux": [1, 16, 8, 16], "sd15": [1, 4, 8, 16], "wan": [1, 16, 2, 8, 16],
    "hunyuan_video": [1, 16, 2, 8, 16], "sd3": [1, 16, 8, 16],
}  # fmt: skip


@pytest.mark.parametrize("kind", EMPTY)
def test_latents_of_previews(load, kind):
    """As the empty latent nodes make them: 128 x 64 pixels, five frames for models of clips."""
    assert list(empty(load(kind), 128, 64, 5).shape) == EMPTY[kind]


def test_a_preview_of_a_clip_is_animated(load):
    config = preview("wan", every=4, frames=5, vae=Colours())
    run(load("wan"), "wan", preview=config)
    assert Image.open(here().previews / "run-step00000004.png").n_frames == 5


class Colours:
    """Stands where a VAE does: the mean of the channels, five frames for two of the latent."""

    def decode(self, latent):
        grey = latent.float().mean(1).sigmoid()[0]
        moving = torch.linspace(0, 0.5, 5).view(5, 1, 1) + grey[:1] / 2
        return moving[None, ..., None].expand(-1, -1, -1, -1, 3)


def test_a_vae_decodes_previews(load):
    state = comfy.utils.load_torch_file(str(next((paths.DEMO / "vae").glob("*.safetensors"))))
    vae = comfy.sd.VAE(sd=state)
    config = preview(vae=vae, every=4)
    model = load("flux")
    run(model, "flux", preview=config)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 8, 8), 0)
        latent = comfy.sample.sample(
            model, noise, 2, 1.0, "euler", "simple", config.positive, config.positive,
            torch.zeros_like(noise), disable_pbar=True,
        )  # fmt: skip
        wanted = (vae.decode(latent)[0].clamp(0, 1) * 255).round().byte().numpy()
    picture = np.asarray(Image.open(here().previews / "run-step00000000.png"))
    assert np.array_equal(picture, wanted) and picture.shape == (64, 64, 3)


def test_an_error_in_a_preview_does_not_end_the_run(load):
    wrong = PreviewConfig([[torch.randn(1, 4, 99), {}]], width=64, height=64, steps=1, every=1)
    result = run(load("flux"), "flux", preview=wrong)
    assert result.progress.step == 4 and not result.previews
    assert "Note: no previews after step 0" in result.report


def test_cancel_during_a_preview(load, monkeypatch):
    model = load("flux")
    whole = run(model, "flux", name="whole")
    real = comfy.sample.sample
    calls = []

    def sample(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing()
        return real(*args, **kwargs)

    before = output(model, "flux")
    monkeypatch.setattr(comfy.sample, "sample", sample)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, "flux", preview=preview(every=3))
    monkeypatch.undo()
    assert written()[-1] == "run-step00000003"
    assert torch.equal(output(model, "flux"), before)
    assert run(model, "flux").progress.losses == whole.progress.losses
