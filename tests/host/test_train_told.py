"""What a training run says where something is not as it was meant."""

from __future__ import annotations

import re
import shutil

import encoders
import pytest
import samples
import torch
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.adapters.training import choices
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.config import OptimizerConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.targets import Targets
from adapter_lab.nodes.host import effects, keep, paths
from adapter_lab.nodes.host.job import Job
from adapter_lab.nodes.host.preview import PreviewConfig
from test_previews import preview
from test_text_training import run as run_text
from test_train_bad_input import at_pass, no_more_than
from test_trainer import job, run, written

WRONG = TrainDataset([TrainItem(torch.randn(16, 8, 8), torch.randn(4, 63))])
OTHER_LATENTS = TrainDataset([TrainItem(torch.randn(4, 8, 8), torch.randn(4, 64))])


def here():
    return paths.run("run")


def everything(include):
    return Targets("everything", (".*",), (include,))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"adapter": AdapterConfig("lora", 4, 2.0)}, "found adapter.rank 2 -> 4. Set"),
        ({"adapter": AdapterConfig("lora", 2, 1.0)}, "found adapter.alpha 2.0 -> 1.0. Set"),
        (
            {"adapter": AdapterConfig("lora", 2, 2.0, dora=True, dropout=0.1)},
            "found adapter.dora False -> True. Set",
        ),
        (
            {"adapter": AdapterConfig("lora", 2, 2.0, precision="bf16")},
            "found adapter.precision fp32 -> bf16. Set",
        ),
        (
            {"targets": everything(r".*img_attn\.(qkv|proj)"), "config": {"seed": 9}},
            "1 module more such as 'double_blocks.0.img_attn.proj', "
            "2 modules fewer such as 'double_blocks.0.txt_attn.qkv'. Set",
        ),
    ],
)
def test_why_a_run_cannot_go_on(load, options, found):
    model = load("flux")
    run(model, "flux", steps=1, targets=everything(r".*attn\.qkv|single_blocks\.0\.linear1"))
    options = {"targets": everything(r".*attn\.qkv|single_blocks\.0\.linear1")} | options
    with pytest.raises(AdapterLabError) as refused:
        run(model, "flux", steps=2, **options)
    text = str(refused.value)
    assert "'run' was started with other settings" in text and found in text
    assert "seed" not in text and "lora', 1.0" not in text


def test_a_shelf_that_is_in_the_way_is_a_note(load, monkeypatch):
    """The run goes on to its end; its files are where they always are."""
    model = load("flux")

    def block():
        shutil.rmtree(here().shelf)
        here().shelf.write_text("a file")

    with at_pass(monkeypatch, 2, block):
        result = run(model, "flux", steps=6)
    assert result.progress.step == 6 and here().checkpoint(6).exists()
    assert result.report.count("loaders do not list") == 1
    assert "loaders do not list" in run(model, "flux", steps=6).report


@pytest.mark.parametrize("place", ["folder", "shelf"])
def test_a_file_where_a_folder_belongs(load, place):
    path = getattr(here(), place)
    path.parent.mkdir(parents=True)
    path.write_text("a file")
    with pytest.raises(AdapterLabError, match="it is a file, not a folder. Move it away"):
        run(load("flux"), "flux")
    assert path.read_text() == "a file"


def test_a_text_encoder_without_layers_to_train(load):
    model, clip = load("flux"), encoders.make("sd15")
    for name in list(dict(clip.patcher.model.named_modules())):
        module = clip.patcher.model.get_submodule(name)
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            module._parameters.pop("weight", None)
    data = {"dataset": samples.dataset("flux"), "clip": clip}
    both = run(model, "flux", targets=Targets("attention only", train="both"), **data)
    assert "the model is trained alone" in both.report
    with pytest.raises(AdapterLabError, match="without layers.*Set 'train' to model") as refused:
        run(model, "flux", name="alone", targets=Targets(train="text encoder"), **data)
    assert "img_in" not in str(refused.value)


FITS = {"norm": {"targets": Targets("everything", (".*",), (".*_norm",), norms=True)}}


@pytest.mark.parametrize("algorithm", [*choices()])
def test_going_on_under_the_same_config(load, algorithm):
    """No note where nothing differs; another rank is one, see ``test_trainer``."""
    kind = "flux" if algorithm in ("norm", "tlora") else "sd15"
    config = AdapterConfig(algorithm, 4, 4.0, conv_rank=2)
    options = {"steps": 1, "adapter": config, **FITS.get(algorithm, {})}
    first = run(load(kind), kind, **options).adapter
    options |= {"name": "second", "init_from": first, "on_existing": "restart"}
    assert "not of 'config'" not in run(load(kind), kind, **options).report


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (WRONG, "^The model fails on the validation set.*width 63"),
        (OTHER_LATENTS, "^The validation set's latents are not for this model"),
    ],
)
def test_a_validation_set_of_another_model(load, data, says):
    with pytest.raises(AdapterLabError, match=says):
        run(load("flux"), "flux", validation=data)


def test_a_text_encoder_of_another_model(load):
    """Not the dataset, whose conditioning is not even looked at."""
    with pytest.raises(AdapterLabError, match="text encoder connected to 'clip'.*to Train Adapter"):
        run_text(load("flux"), encoders.make("sd15"))


class Broken:
    """Stands where the VAE of another model does."""

    def decode(self, latent):
        return torch.nn.functional.conv2d(latent, torch.zeros(3, 4, 1, 1))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            PreviewConfig([[torch.randn(1, 4, 99), {}]], width=64, height=64, steps=1),
            "sampling failed: found '.*text encoder that belongs to the model",
        ),
        (preview(vae=Broken()), "decoding failed: found '.*VAE that belongs to the model"),
    ],
)
def test_previews_that_fail_say_what_to_do(load, config, says):
    report = run(load("flux"), "flux", preview=config).report
    assert re.search(f"no previews after step 0: {says}", report)


IDLE = [
    ({"optimizer": OptimizerConfig(warmup=5)}, "'warmup' is longer"),
    ({"optimizer": OptimizerConfig(text_encoder_rate=1e-4)}, "'text_encoder_rate' has no effect"),
    ({"clip": object()}, "'clip' is not trained"),
    ({"offload_activations": True}, "'offload_activations' has no effect on a CPU"),
    ({"streaming": "on"}, "'streaming' saves no memory"),
    ({"config": {"save_every": 0, "keep_last": 2}}, "'keep_last' has no effect"),
]


@pytest.mark.parametrize(("options", "says"), IDLE)
def test_settings_without_effect(load, options, says):
    (note,) = effects.idle(job(load("flux"), "flux", **options), ["diffusion_model.img_in"])
    assert note.startswith(says)


def test_settings_with_effect(load, monkeypatch):
    model = load("flux")
    given = job(
        model, "flux", optimizer=OptimizerConfig(warmup=4, text_encoder_rate=1e-4), clip=object(),
        offload_activations=True, streaming="on",
    )  # fmt: skip
    monkeypatch.setattr(model, "load_device", torch.device("cuda"))
    encoder = ["clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"]
    assert effects.idle(given, encoder) == []
    off = Job(**{**vars(given), "checkpointing": "off"})
    assert effects.idle(off, encoder) == [
        "'offload_activations' has no effect while 'checkpointing' is off"
    ]


def test_notes_of_settings_are_in_the_report(load):
    assert "Note: 'warmup' is longer" in run(
        load("flux"), "flux", steps=1, optimizer=OptimizerConfig(warmup=5)
    ).report  # fmt: skip


def test_bad_names_are_shown_short_with_what_is_wrong():
    with pytest.raises(AdapterLabError, match="'nul', a name that Windows keeps for a device"):
        paths.run("nul.txt")
    with pytest.raises(AdapterLabError, match="300 bytes") as refused:
        paths.run("x" * 300)
    assert len(str(refused.value)) < 250


def test_a_full_disk_does_not_hide_that_training_diverged(load, monkeypatch):
    model = load("flux")
    module = model.model.diffusion_model.get_submodule("double_blocks.0.img_mlp.0")

    def spoil():
        with torch.inference_mode():
            module.weight.fill_(float("nan"))

    real = keep.Keeper.save_diverged

    def full(self):
        with no_more_than(1_000):
            real(self)

    monkeypatch.setattr(keep.Keeper, "save_diverged", full)
    with (
        at_pass(monkeypatch, 4, spoil),
        pytest.raises(AdapterLabError, match="^Training diverged at step 4") as failed,
    ):
        run(model, "flux", steps=5)
    text = str(failed.value)
    assert "could not be saved: Cannot write" in text and "run-step00000002" in text
    assert written() == ["run-step00000002"]
