"""What a training run is told wrongly, and what goes wrong around it."""

from __future__ import annotations

import resource
import shutil
import signal
import tempfile
from contextlib import contextmanager

import comfy.model_management
import pytest
import samples
import torch
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.objective import ObjectiveConfig
from adapter_lab.core.train.record import read_metrics
from adapter_lab.core.train.targets import Targets
from adapter_lab.nodes.host import paths
from adapter_lab.nodes.host.advice import out_of_memory
from adapter_lab.nodes.host.preview import PreviewConfig
from adapter_lab.nodes.host.process import HostProcess
from test_trainer import interrupted, job, output, run, written

COND = [[torch.zeros(1, 4, 64), {}]]


def here():
    return paths.run("run")


@contextmanager
def at_pass(monkeypatch, number, action):
    """Do ``action`` before forward pass ``number`` of training (one a step), counted from 1."""
    real, calls = HostProcess.predict, []

    def predict(self, *args):
        calls.extend([1] * torch.is_grad_enabled())
        if torch.is_grad_enabled() and len(calls) == number:
            action()
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(HostProcess, "predict", predict)
        yield


FIELDS = [
    (TrainConfig, {"steps": 0}, "steps"),
    (TrainConfig, {"batch_size": 0}, "batch_size"),
    (TrainConfig, {"accumulation": 0}, "accumulation"),
    (TrainConfig, {"save_every": -1}, "save_every"),
    (TrainConfig, {"keep_last": -1}, "keep_last"),
    (TrainConfig, {"seed": -1}, "seed"),
    (TrainConfig, {"seed": 2**64}, "seed"),
    *((OptimizerConfig, {"learning_rate": r}, "learning rate") for r in (0, -1, float("nan"))),
    (OptimizerConfig, {"optimizer": "no such"}, "no such"),
    (OptimizerConfig, {"schedule": "no such"}, "no such"),
    (OptimizerConfig, {"weight_decay": -1}, "weight_decay"),
    (OptimizerConfig, {"clip": -1}, "clip"),
    (OptimizerConfig, {"warmup": -1}, "warmup"),
    (OptimizerConfig, {"rates": "( = 1"}, "regular expression"),
    (AdapterConfig, {"rank": 0}, "rank"),
    (AdapterConfig, {"alpha": -1.0}, "alpha"),
    (AdapterConfig, {"dropout": 1.0}, "dropout"),
    (AdapterConfig, {"precision": "fp8"}, "precision"),
    (ObjectiveConfig, {"timestep_sampling": "no such"}, "timestep_sampling"),
    (ObjectiveConfig, {"weighting": "no such"}, "weighting"),
    (ObjectiveConfig, {"gamma": 0.0}, "gamma"),
    (ObjectiveConfig, {"min_timestep": 0.6, "max_timestep": 0.5}, "range of timesteps"),
    (Targets, {"preset": "no such"}, "preset"),
    (Targets, {"exclude": ("(",)}, "regular expression"),
    *((PreviewConfig, {"positive": COND, n: 0}, n)
      for n in ("width", "height", "steps", "every", "frames")),
    (PreviewConfig, {"positive": COND, "sampler": "no such"}, "no such"),
    (PreviewConfig, {"positive": COND, "scheduler": "no such"}, "no such"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "settings", "says"), FIELDS)
def test_fields_out_of_range(config, settings, says):
    with pytest.raises(AdapterLabError, match=says):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"chunk": -1}, "chunk"), ({"on_existing": "no such"}, "no such"),
     ({"trackers": "no such"}, "no such")],
)  # fmt: skip
def test_fields_of_the_node_out_of_range(load, settings, says):
    with pytest.raises(AdapterLabError, match=says):
        run(load("flux"), "flux", **settings)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (Targets("everything", (".*",), ("no such module",)), "No module is left"),
        (Targets("everything", (".*",)), "No module is left"),
        (Targets(train="text encoder"), "no text encoder"),
    ],
)
def test_targets_with_nothing_to_train(load, targets, says):
    with pytest.raises(AdapterLabError, match=says):
        run(load("flux"), "flux", targets=targets)
    assert not here().folder.exists()


def test_conditioning_that_the_model_rejects(load):
    items = [TrainItem(torch.randn(16, 8, 8), torch.randn(4, 63))]
    with pytest.raises(AdapterLabError, match="fails on the dataset.*width 63"):
        run(load("flux"), "flux", dataset=TrainDataset(items))
    assert not here().exists


def test_a_latent_with_nan_is_named():
    with pytest.raises(AdapterLabError, match="'a red star' holds NaN.*latent"):
        TrainItem(torch.full((16, 8, 8), torch.nan), torch.randn(4, 64), caption="a red star")


def test_a_learning_rate_that_diverges(load):
    """The message names the step and the last good adapter; lower, the run can go on from there."""
    model = load("flux")
    good = run(model, "flux", steps=4)
    fast = OptimizerConfig(learning_rate=1e30, clip=0.0)
    with pytest.raises(AdapterLabError, match=r"diverged.*good adapter is 'run-step00000004"):
        run(model, "flux", steps=40, optimizer=fast, config={"save_every": 100})
    stored = read_adapter(here().checkpoint(4))
    assert all(torch.equal(stored[k], t) for k, t in good.adapter.items())
    result = run(model, "flux", steps=6)
    assert "1e+30" not in result.report
    assert result.progress.losses == run(model, "flux", steps=6, name="whole").progress.losses


def test_a_loss_that_is_no_number_in_the_middle(load, monkeypatch):
    """What was learned before is on disk, and the step and the last good adapter are named."""
    model = load("flux")
    whole = run(model, "flux", steps=5, name="whole")
    name = "double_blocks.0.img_mlp.0"
    weight = model.model.diffusion_model.get_submodule(name).weight
    kept = weight.detach().clone()

    def spoil():
        with torch.inference_mode():
            weight.fill_(float("nan"))

    with (
        at_pass(monkeypatch, 4, spoil),
        pytest.raises(AdapterLabError, match=r"diverged at step 4.*nan.*run-step00000002"),
    ):
        run(model, "flux", steps=5)
    assert written() == ["run-step00000002", "run-step00000003"]
    with torch.inference_mode():
        weight.copy_(kept)
    assert run(model, "flux", steps=5).progress.losses == whole.progress.losses


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (
            {"checkpointing": "off"},
            ["'checkpointing' to blocks", "'batch_size' to 1", "AdamW8bit"],
        ),
        (
            {"checkpointing": "blocks", "config": {"batch_size": 1}},
            ["AdamW8bit", "smaller pictures", "in fp8"],
        ),
    ],
)
def test_out_of_memory_in_the_first_step(load, settings, advice):
    """torch's own error for an allocation that no machine can grant, out of the model."""
    model = load("flux")
    module = model.model.diffusion_model.get_submodule("single_blocks.0")

    def grow(*_):
        if torch.is_grad_enabled():
            torch.empty(1 << 60)

    handle = module.register_forward_pre_hook(grow)
    with pytest.raises(AdapterLabError) as failed:
        run(model, "flux", **settings)
    handle.remove()
    text = str(failed.value)
    assert text.startswith("Out of memory in step 1")
    assert [part for part in advice if part not in text] == []
    assert failed.value.fix.count(". ") == 2  # three settings
    assert run(model, "flux").progress.step == 4


def test_out_of_memory_of_a_gpu(load, monkeypatch):
    """What a GPU can leave to the CPU's memory, this one can't leave to itself."""
    model = load("flux")
    given = job(model, "flux", streaming="on", config={"batch_size": 1})
    monkeypatch.setattr(model, "load_device", torch.device("cuda"))
    fix = out_of_memory(given, 1, MemoryError()).fix
    assert fix.startswith("Switch 'offload_activations' on. Choose the optimizer")
    fix = out_of_memory(job(model, "flux", config={"batch_size": 1}), 1, MemoryError()).fix
    assert fix.startswith("Set 'streaming' to on. Switch")


# The run's folder


def test_the_folder_is_deleted_while_training(load, monkeypatch):
    model = load("flux")
    whole = run(model, "flux", name="whole")
    with at_pass(monkeypatch, 4, lambda: shutil.rmtree(here().folder)):
        result = run(model, "flux")
    assert result.progress.losses == whole.progress.losses
    assert here().state.exists() and here().config.exists()
    assert [row["step"] for row in read_metrics(here().metrics)] == [4]
    again = run(model, "flux")
    assert all(torch.equal(again.adapter[k], t) for k, t in whole.adapter.items())


def test_something_in_the_way_of_a_save(load, monkeypatch):
    """What was learned is put elsewhere, and what was there is untouched."""
    model = load("flux")

    def block():
        here().checkpoint(4).mkdir()

    with (
        at_pass(monkeypatch, 4, block),
        pytest.raises(AdapterLabError, match="Step 4 .*could not be saved") as failed,
    ):
        run(model, "flux")
    place = paths.folder_paths.get_user_directory()
    rescued = f"{place}/adapter_lab/rescued/run-step00000004"
    assert rescued in str(failed.value) and "it is a folder" in str(failed.value)
    whole = run(model, "flux", name="whole")
    stored = read_adapter(f"{rescued}/run-step00000004.safetensors")
    assert all(torch.equal(stored[k], t) for k, t in whole.adapter.items())
    assert read_adapter(here().checkpoint(2))
    here().checkpoint(4).rmdir()
    shutil.copytree(rescued, here().folder, dirs_exist_ok=True)
    longer = run(model, "flux", steps=6)
    wanted = run(model, "flux", steps=6, name="whole")
    assert all(torch.equal(longer.adapter[k], t) for k, t in wanted.adapter.items())


@contextmanager
def no_more_than(size):
    """No file may grow beyond ``size`` bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_loses_nothing_that_was_there(load, monkeypatch, tmp_path):
    """Not even half a file appears anywhere, and the run goes on as soon as there is space."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    model = load("flux")
    whole = run(model, "flux", steps=6, name="whole")
    run(model, "flux", steps=2)
    state = here().state.read_bytes()
    limited = pytest.raises(AdapterLabError, match=r"Step 4 .*could not.*earlier step is untouched")
    with no_more_than(5_000), limited:
        run(model, "flux", steps=6)
    assert here().state.read_bytes() == state and written() == ["run-step00000002"]
    leftovers = [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]
    rescued = list((tmp_path / "user").rglob("*.safetensors"))
    assert not leftovers and not rescued
    resumed = run(model, "flux", steps=6)
    assert resumed.progress.losses == whole.progress.losses
    assert [row["step"] for row in read_metrics(here().metrics)] == [1, 2, 3, 4, 5, 6]


def test_a_save_that_fails_after_a_cancel_says_so(load, monkeypatch):
    def block():
        here().state.unlink(missing_ok=True)
        here().state.mkdir()
        comfy.model_management.interrupt_current_processing()

    with (
        at_pass(monkeypatch, 4, block),
        pytest.raises(AdapterLabError, match="Step 3 .*could not be saved.*rescued"),
    ):
        run(load("flux"), "flux")


# Cancel


def test_cancel_in_the_first_step(load, monkeypatch):
    model = load("flux")
    before = output(model, "flux")
    with monkeypatch.context() as patch:
        interrupted(patch, 0)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(model, "flux")
    assert torch.equal(output(model, "flux"), before)
    assert not here().exists and not here().lock.exists()
    assert run(model, "flux").progress.step == 4


def test_two_nodes_of_one_graph_with_one_name(load):
    """The second finds the finished run of the first, and does not take it for its own."""
    model = load("flux")
    first = run(model, "flux")
    assert run(model, "flux").progress.losses == first.progress.losses
    with pytest.raises(AdapterLabError, match="finished.*accumulation 1 -> 2"):
        run(model, "flux", config={"accumulation": 2})
    assert run(model, "flux").progress.losses == first.progress.losses


def test_the_largest_seed(load):
    """The native trainer adds to its seed, and overflows."""
    assert run(load("flux"), "flux", config={"seed": 2**64 - 1}).progress.step == 4


def test_a_job_is_checked_before_anything_is_written(load):
    with pytest.raises(AdapterLabError):
        job(load("flux"), "flux", chunk=1, on_existing="restart")
    assert not here().folder.parent.exists()


def test_captions_are_missing_for_the_text_encoder(load):
    """Found before any text encoder is trained on nothing."""
    from adapter_lab.nodes.host.text import require_captions

    items = [TrainItem(i.latent, i.cond, i.extra) for i in samples.items("flux")]
    with pytest.raises(AdapterLabError, match="no captions"):
        require_captions(TrainDataset(items))
