"""A run as a whole: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import errno
import math
import shutil

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import samples
import torch
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter
from adapter_lab.core.train import checkpoints as checkpoints_
from adapter_lab.core.train.config import OptimizerConfig
from adapter_lab.core.train.lock import locked
from adapter_lab.core.train.objective import ObjectiveConfig
from adapter_lab.core.train.record import read_json, read_metrics
from adapter_lab.core.train.targets import Targets
from adapter_lab.nodes.host import fingerprint, keep, paths, trainer
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.run import Run
from adapter_lab.nodes.train import Train
from test_previews import preview
from test_trainer import interrupted, job, output, run, written


def here(name="run"):
    return paths.run(name)


def test_what_a_run_leaves_on_disk(load):
    result = run(load("flux"), "flux", validation=samples.dataset("flux", 1, seed=8))
    found = sorted(path.name for path in here().folder.iterdir())
    steps = [f"run-step0000000{step}{ema}.safetensors" for step in (2, 4)
             for ema in ("-ema0.050", "-ema0.100", "")]  # fmt: skip
    assert found == sorted(["config.json", "metrics.jsonl", "state.safetensors", *steps])
    assert not here().lock.exists()
    config = read_json(here().config)
    assert config["step"] == 4 and config["settings"]["adapter"]["rank"] == 2
    assert [row["step"] for row in config["history"]] == [0]
    measured, rows = [], []
    for row in read_metrics(here().metrics):
        (measured if "validation" in row else rows).append(row)
    assert [row["loss"] for row in rows] == result.progress.losses
    assert [(row["step"], row["validation"]) for row in measured] == result.progress.validation
    assert [row["step"] for row in measured] == [0, 2, 4]
    assert {"step", "loss", "rate", "norm", "t", "seconds", "memory"} == rows[0].keys()
    assert len(rows[0]["t"]) == 2 and rows[0]["memory"] > 2**20


def test_averages_are_adapters_between_the_start_and_the_end(load):
    """The narrow one is nearer to the last factors than the wide one."""
    model = load("flux")
    before = output(model, "flux")
    run(model, "flux", steps=30, config={"save_every": 0})
    last = read_adapter(here().checkpoint(30))
    narrow, wide = (read_adapter(here().ema(30, width)) for width in (0.05, 0.1))
    away = [sum(float((e[k] - last[k]).norm()) for k in last) for e in (narrow, wide)]
    assert 0 < away[0] < away[1]
    assert narrow.keys() == last.keys() and narrow.metadata["ss_steps"] == "30"
    adapted = host.apply(model, None, wide, 1.0, 1.0, "error").model
    assert not torch.allclose(output(adapted, "flux"), before, atol=1e-4)


def test_a_run_goes_on_where_its_state_is(load):
    """Killed behind a checkpoint, before its state: other settings may never pass there again."""
    model = load("flux")
    run(model, "flux", steps=2)
    state = here().state.read_bytes()
    run(model, "flux", steps=4)
    here().state.write_bytes(state)
    (here().shelf / here().checkpoint(2).name).unlink()
    held = {"save_every": 0, "keep_last": 2}
    result = run(model, "flux", steps=3, config=held, validation=samples.dataset("flux", 1))
    assert "to be trained anew: 4" in result.report and "resumed at 2" in result.report
    assert written() == ["run-step00000002", "run-step00000003"]
    assert sorted(path.stem for path in here().shelf.iterdir()) == written()
    assert len(list(here().folder.glob("*ema*"))) == 4
    _, latest, _ = (output_ := Run.execute("run")).args
    assert all(torch.equal(latest[k], t) for k, t in result.adapter.items())
    assert output_.ui["adapter_lab"][0]["validation"] == [
        list(row) for row in result.progress.validation
    ]


def test_a_first_save_that_was_cut_short(load, monkeypatch):
    """Killed behind the first checkpoint, before the state."""
    model = load("flux")
    whole = run(model, "flux", name="whole")

    def kill(*_):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(keep.snapshot, "save", kill)
        run(model, "flux")
    assert here().checkpoints() and not here().state.exists()
    result = run(model, "flux")
    assert result.progress.losses == whole.progress.losses
    assert written() == ["run-step00000002", "run-step00000004"]
    assert [step for step, _ in here("run.1").checkpoints()] == [2]


def test_adapters_of_a_deleted_run_are_kept_apart(load):
    model = load("flux")
    run(model, "flux")
    shutil.rmtree(here().folder)
    assert "the old run is kept as 'run.1'" in run(model, "flux", steps=2).report
    assert [path.stem for path in here().shelf.iterdir()] == ["run-step00000002"]
    assert len(list(here("run.1").shelf.iterdir())) == 2


def test_nothing_is_renamed_where_nothing_can_be_written(load, monkeypatch):
    """The disk is full."""
    model = load("flux")
    run(model, "flux", steps=2)

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints_, "TemporaryFile", full)
    with pytest.raises(AdapterLabError, match="No space left"):
        run(model, "flux", on_existing="restart")
    assert written() == ["run-step00000002"] and not here("run.1").folder.exists()


def test_without_averages(load):
    run(load("flux"), "flux", ema_tracking=False)
    assert not list(here().folder.glob("*ema*"))


def test_chunks_are_the_same_run(load):
    """Another model is sampled between them, which takes this one's place in memory."""
    model, other = load("flux"), load("sd15")
    whole = run(model, "flux", steps=7, name="whole")
    told = []
    for _ in range(3):
        part = run(model, "flux", steps=7, chunk=3)
        told.append((part.progress.step, part.continues))
        output(other, "sd15")
        comfy.model_management.unload_all_models()
    assert told == [(3, True), (6, True), (7, False)]
    assert part.progress.losses == whole.progress.losses
    assert all(torch.equal(part.adapter[k], t) for k, t in whole.adapter.items())
    assert len(part.rates) == 7


def test_chunks_are_queued_until_they_are_done(load):
    """The stamp by which ComfyUI knows that a node has to run again."""
    assert Train.fingerprint_inputs("run", 0) == Train.fingerprint_inputs("run", 0)
    stamps = [Train.fingerprint_inputs("run", 2)]
    for _ in range(3):
        run(load("flux"), "flux", chunk=2)
        stamps.append(Train.fingerprint_inputs("run", 2))
    assert stamps[0] != stamps[1] != stamps[2] == stamps[3]


@pytest.mark.parametrize(
    ("choice", "says"),
    [("restart", "begin anew with each chunk"), ("error", "refuse the second chunk")],
)
def test_a_chunk_has_to_resume(load, choice, says):
    with pytest.raises(AdapterLabError, match=says):
        job(load("flux"), "flux", chunk=2, on_existing=choice)


def test_restart_keeps_the_old_run(load):
    model = load("flux")
    first = run(model, "flux")
    again = run(model, "flux", steps=2, on_existing="restart")
    assert "kept as 'run.1'" in again.report and len(again.progress.losses) == 2
    old = here("run.1")
    assert old.state.exists() and [step for step, _ in old.checkpoints()] == [2, 4]
    stored = read_adapter(old.checkpoints()[-1][1])
    assert all(torch.equal(stored[k], t) for k, t in first.adapter.items())
    assert [row["step"] for row in read_metrics(here().metrics)] == [1, 2]
    assert [path.name for path in sorted(old.shelf.iterdir())] == [
        "run-step00000002.safetensors", "run-step00000004.safetensors",
    ]  # fmt: skip


OTHER = {
    "dataset": dict(dataset=samples.dataset("flux", seed=4)),
    "seed 3 -> 4": dict(config={"seed": 4}),
    "optimizer.learning_rate 0.01 -> 0.02": dict(optimizer=OptimizerConfig(learning_rate=2e-2)),
    "objective.loss mse -> l1": dict(objective=ObjectiveConfig(loss="l1")),
    "batch_size 2 -> 1": dict(config={"batch_size": 1}),
    "adapter.dropout 0.0 -> 0.1": dict(adapter=AdapterConfig("lora", 2, 2.0, dropout=0.1)),
}


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory):
    """The output folder of a finished run, and its model."""
    folder = str(tmp_path_factory.mktemp("finished"))
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(folder)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(checkpoints("flux")))
    run(model, "flux", steps=2)
    folder_paths.set_output_directory(before)
    return folder, model


@pytest.mark.parametrize("says", OTHER)
def test_a_finished_run_is_no_answer_to_other_inputs(finished, says):
    folder, model = finished
    folder_paths.set_output_directory(folder)
    assert run(model, "flux", steps=2).progress.step == 2
    with pytest.raises(AdapterLabError, match=f"finished.*{says}.*'steps' above 2"):
        run(model, "flux", steps=2, **OTHER[says])


def test_settings_of_how_to_train_are_no_other_inputs(finished):
    folder, model = finished
    folder_paths.set_output_directory(folder)
    same = run(
        model, "flux", steps=2, checkpointing="blocks", validation=samples.dataset("flux", 1),
        preview=preview(), config={"save_every": 1, "keep_last": 3}, ema_tracking=False, chunk=1,
    )  # fmt: skip
    assert same.progress.step == 2 and "Note: resumed" not in same.report


def test_changes_of_a_run_that_goes_on_are_written_down(load):
    model = load("flux")
    run(model, "flux", steps=2)
    faster = OptimizerConfig(learning_rate=2e-2, schedule="linear")
    result = run(model, "flux", steps=4, optimizer=faster, config={"seed": 9})
    assert "seed 3 -> 9" in result.report and "learning_rate 0.01 -> 0.02" in result.report
    history = read_json(here().config)["history"]
    assert [row["step"] for row in history] == [0, 2] and not history[0]["changed"]
    assert history[1]["changed"]["optimizer.learning_rate"] == {"before": 0.01, "now": 0.02}
    again = run(model, "flux", steps=4, optimizer=faster, config={"seed": 9})
    assert again.progress.losses == result.progress.losses


def test_another_algorithm_is_refused_with_the_difference(load):
    model = load("flux")
    run(model, "flux", steps=2)
    for other in (AdapterConfig("loha", 2, 2.0), AdapterConfig("lora_fa", 2, 2.0)):
        with pytest.raises(AdapterLabError, match=f"other settings.*lora.*{other.algorithm}"):
            run(model, "flux", steps=4, adapter=other)
    with pytest.raises(AdapterLabError, match=r"other settings.*proj"):
        run(model, "flux", steps=4, targets=Targets("everything", (".*",), (".*qkv|.*proj",)))


def test_another_base_model_is_noticed(load, checkpoints):
    """Other weights, or an adapter on the same ones, merged or beside the layers."""
    model = load("flux")
    adapter = run(model, "flux", steps=2).adapter
    on_top = run(model, "flux", steps=2, name="other").adapter
    found = {fingerprint.fingerprint(m) for m in (model, load("flux"), model.clone())}
    for mode in ("merge", "bypass"):
        adapted = host.apply(model, None, on_top, 1.0, 1.0, "error", mode=mode).model
        output(adapted, "flux")  # what ComfyUI merges stays in the weights that clones share
        assert fingerprint.fingerprint(model) in found and len(found) == 1
        with pytest.raises(AdapterLabError, match="finished.*another base model"):
            run(adapted, "flux", steps=2)
        assert fingerprint.fingerprint(adapted) not in found
    assert "another base model" in run(adapted, "flux", steps=4).report
    assert all(torch.equal(adapter[k], t) for k, t in on_top.items())


def test_two_trainings_under_one_name(load):
    model = load("flux")
    with locked(here().lock, "it"), pytest.raises(AdapterLabError, match="'run' is being trained"):
        run(model, "flux")
    assert run(model, "flux").progress.step == 4


def test_cancel_between_chunks_of_a_save(load, monkeypatch):
    """A cancel that comes while files are written waits for them."""
    real = trainer.Keeper._write

    def write(self, place):
        comfy.model_management.interrupt_current_processing()
        real(self, place)

    model = load("flux")
    whole = run(model, "flux", name="whole")
    monkeypatch.setattr(trainer.Keeper, "_write", write)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, "flux")
    monkeypatch.undo()
    assert written() == ["run-step00000002"]
    assert run(model, "flux").progress.losses == whole.progress.losses


def test_the_run_node(load):
    run(load("flux"), "flux", name="first")
    result = run(load("flux"), "flux", name="second")
    assert paths.runs() == ["second", "first"]
    output_ = Run.execute("second")
    found, adapter, report = output_.args
    assert found == here("second")
    assert all(torch.equal(adapter[k], t) for k, t in result.adapter.items())
    assert "step 4 of 4" in report and "second-step00000002.safetensors" in report
    assert output_.ui["adapter_lab"][0]["losses"] == result.progress.losses
    assert Run.validate_inputs("second") is Run.validate_inputs(None) is True
    assert math.isnan(Run.fingerprint_inputs(None))
    (here("first").folder / "gone.safetensors").symlink_to("nowhere")
    assert set(paths.runs()) == {"second", "first"}
    (here("first").folder / "gone.safetensors").unlink()
    assert "no run 'third'" in Run.validate_inputs("third")
    before = Run.fingerprint_inputs("second")
    run(load("flux"), "flux", name="second", steps=5)
    assert Run.fingerprint_inputs("second") != before
    with pytest.raises(AdapterLabError, match="no adapter files"):
        Run.execute("third")


def test_a_run_that_is_interrupted_twice(load, monkeypatch):
    """The second time in its first step: nothing is lost and nothing saved twice."""
    model = load("flux")
    whole = run(model, "flux", name="whole")
    for after in (3, 0):
        with monkeypatch.context() as patch:
            interrupted(patch, after)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                run(model, "flux")
        assert read_json(here().config)["step"] == 3
    assert run(model, "flux").progress.losses == whole.progress.losses
