"""What the queue does with a training graph: once, again, changed, in chunks, cancelled, killed."""

from __future__ import annotations

import json

import pytest
import samples
import tiny
import torch
from adapter_lab.core.files import read_adapter
from adapter_lab.core.train.storage import save_dataset
from adapter_lab.nodes.types import curve
from adapter_lab.tests.server import Server
from conftest import COMFYUI

TRAIN = "2"
EVENT = "adapter_lab.training"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("queueing")
    tiny.write("flux", base / "models" / "diffusion_models" / "flux.safetensors")
    datasets = base / "output" / "adapter_lab" / "datasets"
    save_dataset(datasets / "noise", samples.dataset("flux"))
    save_dataset(datasets / "other", samples.dataset("flux", seed=5))
    with Server(COMFYUI, base=base) as running:
        yield running


def graph(run, dataset="noise", config=None, **options):
    """Train Adapter behind a model and a dataset; a preview of its curve behind it."""
    inputs = {
        "run_name": run, "steps": 4, "batch_size": 2, "accumulation": 1, "seed": 0,
        "save_every": 2, "keep_last": 0, "on_existing": "resume", "checkpointing": "auto",
        **options,
    }  # fmt: skip
    config = {
        "algorithm": "lora", "rank": 4, "alpha": 4.0, "factor": -1, "decompose_both": False,
        "full_matrix": False, "tucker": False, **(config or {}),
    }  # fmt: skip
    nodes = [
        ("UNETLoader", {"unet_name": "flux.safetensors", "weight_dtype": "default"}),
        ("AdapterLabDatasetLoad", {"name": dataset}),
        ("AdapterLabTrain", {"model": ["0", 0], "dataset": ["1", 0], "config": ["4", 0], **inputs}),
        ("PreviewImage", {"images": [TRAIN, 4]}),
        ("AdapterLabConfig", config),
    ]
    return {str(i): {"class_type": name, "inputs": given} for i, (name, given) in enumerate(nodes)}


def executed(result):
    """Whether Train Adapter was executed, not taken from ComfyUI's cache."""
    return any(kind == "executing" and data["node"] == TRAIN for kind, data in result.messages)


def folder(server, run):
    return server.base / "output" / "adapter_lab" / "runs" / run


def factors(server, run, step):
    return read_adapter(folder(server, run) / f"{run}-step{step:08}.safetensors")


def error(result):
    (found,) = result.errors
    return found["exception_message"]


def test_the_same_graph_again_does_not_train(server):
    first = server.run(graph("once"))
    assert first.ok and executed(first), first.errors
    before = {path: path.stat().st_mtime_ns for path in folder(server, "once").rglob("*.*")}
    again = server.run(graph("once"))
    assert again.ok and not executed(again)
    assert {path: path.stat().st_mtime_ns for path in folder(server, "once").rglob("*.*")} == before
    assert not [data for kind, data in again.messages if kind == EVENT]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dataset": "other"}, "another dataset"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"config": {"rank": 2}}, "other settings"),
    ],
)
def test_a_finished_run_is_no_answer_to_changed_inputs(server, change, says):
    assert server.run(graph("finished")).ok
    before = factors(server, "finished", 4)
    result = server.run(graph("finished", **change))
    assert says in error(result)
    after = factors(server, "finished", 4)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_more_steps_go_on(server):
    assert server.run(graph("longer")).ok
    result = server.run(graph("longer", steps=6))
    assert result.ok and "resumed at 4" in result.texts[TRAIN]
    assert server.run(graph("at once", steps=6)).ok
    one, other = factors(server, "longer", 6), factors(server, "at once", 6)
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())


def test_chunks_continue_and_leave_the_queue_to_others(server):
    prompt = graph("chunked", steps=6, chunk=2)
    for left in (True, True, False):
        result = server.run(prompt)
        assert result.ok and executed(result), result.errors
        assert result.outputs[TRAIN]["adapter_lab"][0]["continues"] is left
        # Something else in between takes the model's place.
        assert server.run(graph("between", steps=1, on_existing="restart", seed=int(left))).ok
    assert "(resumed at 6)" in server.run(prompt).texts[TRAIN], "it trained on"
    assert not executed(server.run(prompt))
    assert server.run(graph("unchunked", steps=6)).ok
    one, other = factors(server, "chunked", 6), factors(server, "unchunked", 6)
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())


def test_restart_keeps_the_old_run(server):
    assert server.run(graph("again")).ok
    old = factors(server, "again", 4)
    assert server.run(graph("again", seed=3, on_existing="restart")).ok
    kept = read_adapter(folder(server, "again.1") / "again-step00000004.safetensors")
    assert all(torch.equal(kept[key], tensor) for key, tensor in old.items())
    new = factors(server, "again", 4)
    assert not all(torch.equal(new[key], tensor) for key, tensor in old.items())


def test_two_nodes_of_one_name_and_other_settings_are_refused(server):
    both = graph("twice")
    both["5"] = {**both[TRAIN], "inputs": {**both[TRAIN]["inputs"], "seed": 9}}
    result = server.run(both)
    assert "seed" in error(result) and "'twice'" in error(result)


def test_events_tell_the_whole_curve(server):
    result = server.run(graph("events", steps=30, save_every=0))
    told = [data for kind, data in result.messages if kind == EVENT]
    points = [point for data in told for point in data["points"]]
    assert [point[0] for point in points] == list(range(1, 31))
    last = told[-1]
    assert (last["node"], last["step"], last["steps"]) == (TRAIN, 30, 30)
    assert {"loss", "smooth", "rate", "norm", "per_second", "left", "memory"} <= last.keys()
    lines = (folder(server, "events") / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == [point[1] for point in points]


def test_the_node_keeps_a_curve_of_any_length_small(server):
    result = server.run(graph("curve", steps=3))
    (shown,) = result.outputs[TRAIN]["adapter_lab"]
    assert shown["rates"] == [[1, 1e-4], [2, 1e-4], [3, 1e-4]] and len(shown["losses"]) == 3
    many = curve([float(i) for i in range(1, 100_002)])
    assert 300 <= len(many) <= 400 and many[-1] == (100_001, 100_001.0)
