"""What a run keeps on disk: names, links, lines, settings, the lock."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, write_adapter
from adapter_lab.core.train.checkpoints import TrainRun
from adapter_lab.core.train.kohya import network, objective_entries
from adapter_lab.core.train.lock import locked
from adapter_lab.core.train.objective import ObjectiveConfig
from adapter_lab.core.train.record import (
    Metrics,
    differences,
    read_json,
    read_metrics,
    write_json,
)

HOLDER = """
import sys, time
from pathlib import Path
from adapter_lab.core.train.lock import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def made(tmp_path, *steps, name="a [b]"):
    run = TrainRun(name, tmp_path / "runs" / name, tmp_path / "loras" / name)
    for step in steps:
        for path in (run.checkpoint(step), run.ema(step, 0.05), run.ema(step, 0.1)):
            write_adapter(path, Adapter({"a": torch.full((1,), float(step))}))
        run.publish(step)
    return run


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_names(tmp_path):
    run = made(tmp_path, 100)
    assert files(run.folder) == [
        "a [b]-step00000100-ema0.050.safetensors",
        "a [b]-step00000100-ema0.100.safetensors",
        "a [b]-step00000100.safetensors",
    ]
    assert files(run.shelf) == ["a [b]-step00000100.safetensors"]
    assert [path.name for path in run.averages(run.checkpoint(100))] == files(run.folder)[:2]
    assert run.checkpoints() == [(100, run.checkpoint(100))]


def test_the_shelf_holds_the_same_file_and_follows_it(tmp_path):
    run = made(tmp_path, 1)
    shelved = run.shelf / run.checkpoint(1).name
    assert shelved.samefile(run.checkpoint(1))
    write_adapter(run.checkpoint(1), Adapter({"a": torch.ones(2)}))
    assert not shelved.samefile(run.checkpoint(1))
    run.publish(1)
    run.publish(1)
    assert shelved.samefile(run.checkpoint(1)) and len(files(run.shelf)) == 1


def test_a_shelf_on_another_disk_gets_a_copy(tmp_path):
    if not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    run = made(tmp_path, 1)
    other = TrainRun(run.name, run.folder, Path(f"/dev/shm/adapter-lab-{os.getpid()}"))
    try:
        other.publish(1)
        assert files(other.shelf) == [run.checkpoint(1).name]
        assert (other.shelf / run.checkpoint(1).name).read_bytes() == (
            run.checkpoint(1).read_bytes()
        )
    finally:
        for path in other.shelf.iterdir():
            path.unlink()
        other.shelf.rmdir()


def test_prune_takes_averages_and_shelf_along_and_never_the_last(tmp_path):
    run = made(tmp_path, 1, 2, 3)
    run.prune(0)
    assert len(run.checkpoints()) == 3
    run.prune(1)
    assert [step for step, _ in run.checkpoints()] == [3]
    assert len(files(run.folder)) == 3 and len(files(run.shelf)) == 1


def test_a_retired_run_keeps_its_files_under_a_new_name(tmp_path):
    run = made(tmp_path, 1)
    old = run.retire()
    assert old.name == "a [b].1" and [step for step, _ in old.checkpoints()] == [1]
    assert old.averages(old.checkpoints()[0][1]) and files(old.shelf) and not run.exists
    assert run.retire() is None
    made(tmp_path, 2)
    assert run.retire().name == "a [b].2"


def test_a_run_goes_on_from_its_state_alone(tmp_path):
    """Killed behind a checkpoint and before its state, or before the shelf had it."""
    run = made(tmp_path, 1, 2, 3)
    (run.shelf / run.checkpoint(2).name).unlink()
    (run.folder / ".adapter_lab-00.tmp").write_bytes(b"half")
    assert run.rewind(2) == [3]
    assert [step for step, _ in run.checkpoints()] == [1, 2]
    assert len(files(run.folder)) == 6
    assert files(run.shelf) == [run.checkpoint(step).name for step in (1, 2)]
    run.prune(1)
    assert [step for step, _ in run.checkpoints()] == [2]
    assert run.rewind(2) == [] and files(run.shelf) == [run.checkpoint(2).name]


def test_only_what_was_learned_is_kept_under_a_new_name(tmp_path):
    run = made(tmp_path, 1)
    for path in run.folder.iterdir():
        path.unlink()
    run.config.write_text("{}")
    assert run.retire().checkpoints() == []
    assert files(run.folder) == ["config.json"] and not run.shelf.exists()
    assert files(run.shelf.with_name("a [b].1")) == [run.checkpoint(1).name]
    assert run.retire() is None


def test_metrics_are_whole_lines(tmp_path):
    metrics = Metrics(tmp_path / "m" / "metrics.jsonl")
    for step in range(1, 6):
        metrics.add({"step": step, "loss": float("nan") if step == 2 else step / 3, "t": [0.1]})
    metrics.sync()
    rows = read_metrics(metrics.path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1]["loss"] is None and rows[2]["loss"] == 1.0
    with open(metrics.path, "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    metrics.cut(4)
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [
        1, 2, 3, 4,
    ]  # fmt: skip
    metrics.add({"step": 5})
    assert [row["step"] for row in read_metrics(metrics.path)] == [1, 2, 3, 4, 5]


def test_metrics_that_cannot_be_written_wait_and_are_missed_at_a_save(tmp_path):
    folder = tmp_path / "m"
    folder.write_text("in the way")
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.add({"step": 1})
    with pytest.raises(AdapterLabError, match="Cannot write"):
        metrics.sync()
    folder.unlink()
    metrics.add({"step": 2})
    metrics.sync()
    assert [row["step"] for row in read_metrics(metrics.path)] == [1, 2]


def test_settings_are_read_back_and_compared(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": {"b": (1, 2.5)}, "ä": float("inf")})
    assert read_json(path) == {"a": {"b": [1, 2.5]}, "ä": None}
    assert "ä" in path.read_text(encoding="utf-8")
    assert not differences(read_json(path), {"a": {"b": (1, 2.5)}, "ä": None})
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}) == {
        "a.b": (1, 2), "c": (None, 3),
    }  # fmt: skip
    path.write_text("{")
    assert read_json(path) == {} == read_json(tmp_path / "none.json")


def test_lock_within_a_process(tmp_path):
    path = tmp_path / "locks" / ".a.lock"
    with locked(path, "The run 'a'"):
        assert path.read_text() == str(os.getpid())
        refused = pytest.raises(AdapterLabError, match=rf"^The run 'a' .*{os.getpid()}, this one")
        with refused, locked(path, "The run 'a'"):
            pytest.fail("two hold the lock")
    assert not path.exists()
    with locked(path, "The run 'a'"):
        pass


def test_lock_of_another_process_and_of_a_dead_one(tmp_path):
    path = tmp_path / ".a.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        refused = pytest.raises(AdapterLabError, match=f"process {holder.pid}")
        with refused, locked(path, "it"):
            pytest.fail("two hold the lock")
        holder.kill()
        holder.wait()
    assert path.exists()
    with locked(path, "it"):
        assert path.read_text() == str(os.getpid())


@pytest.mark.skipif(sys.platform == "win32", reason="locks otherwise")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    """Lustre and some network shares."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / ".a.lock", "it"):
        assert (tmp_path / ".a.lock").exists()
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(AdapterLabError, match="bad"), locked(tmp_path / ".a.lock", "it"):
        pytest.fail("no lock")
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("settings", "name", "module", "arguments"),
    [
        ({}, "lora", "networks.lora", {}),
        (
            {"conv_rank": 4, "conv_alpha": 2.0, "dropout": 0.1}, "lora", "networks.lora",
            {"conv_dim": 4, "conv_alpha": 2.0, "dropout": 0.1},
        ),
        ({"tucker": True}, "lora", "lycoris.kohya", {"algo": "lora", "use_tucker": True}),
        (
            {"dora": True}, "lora", "lycoris.kohya",
            {"algo": "lora", "dora_wd": True, "wd_on_output": True},
        ),
        (
            {"algorithm": "dylora", "unit": 4}, "lora", "networks.dylora", {"unit": 4},
        ),
        (
            {"algorithm": "lokr", "factor": 8, "rank_dropout": 0.2}, "lokr", "lycoris.kohya",
            {"algo": "lokr", "factor": 8, "rank_dropout": 0.2},
        ),
        ({"algorithm": "loha", "factor": 8}, "loha", "lycoris.kohya", {"algo": "loha"}),
        (
            {"algorithm": "coft", "constraint": 1e-4}, "oft", "lycoris.kohya",
            {"algo": "diag-oft", "constraint": 1e-4},
        ),
    ],
)  # fmt: skip
def test_networks_are_named_as_lycoris_and_sd_scripts_do(settings, name, module, arguments):
    assert network(AdapterConfig(**settings), name) == (module, arguments)


def test_the_arguments_are_those_that_lycoris_takes():
    """Every argument for lycoris.kohya is one that its ``create_network`` asks for."""
    source = Path(find_spec("lycoris").origin).with_name("kohya.py").read_text()
    settings = {
        "conv_rank": 4, "conv_alpha": 2.0, "dropout": 0.1, "rank_dropout": 0.1,
        "module_dropout": 0.1, "factor": 8, "decompose_both": True, "full_matrix": True,
        "tucker": True, "constraint": 0.1, "rescale": True, "dora": True, "rs_lora": True,
        "scalar": True, "unit": 4,
    }  # fmt: skip
    _, arguments = network(AdapterConfig("lokr", **settings), "lokr")
    assert len(arguments) > len(settings)
    assert not [name for name in arguments if f'kwargs.get("{name}"' not in source]


def test_objectives_are_named_as_sd_scripts_does():
    usual = objective_entries(ObjectiveConfig())
    assert usual["ss_loss_type"] == "l2" and usual["ss_min_snr_gamma"] == ""
    config = ObjectiveConfig(
        weighting="min_snr", gamma=4.0, loss="huber", huber_c=0.2, noise_offset=0.05,
        input_perturbation=0.1,
    )  # fmt: skip
    found = objective_entries(config)
    wanted = {
        "ss_min_snr_gamma": 4.0, "ss_loss_type": "huber", "ss_huber_c": 0.2,
        "ss_huber_schedule": "snr", "ss_noise_offset": 0.05, "ss_ip_noise_gamma": 0.1,
    }  # fmt: skip
    assert wanted.items() <= found.items()
