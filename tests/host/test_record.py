"""What is told of a run while it goes on: events, dashboards."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
import samples
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.loop import Step
from adapter_lab.core.train.progress import Progress
from adapter_lab.nodes.host import paths, trainer
from adapter_lab.nodes.host.record import Record
from server import PromptServer
from test_previews import preview
from test_trainer import job, run


def here(name="run"):
    return paths.run(name)


@pytest.fixture
def server(monkeypatch):
    """ComfyUI's own server, without a port: what it would send to a client waits in its queue."""
    monkeypatch.setattr(PromptServer, "instance", None, raising=False)
    loop = asyncio.new_event_loop()
    made = PromptServer(loop)
    made.client_id = "client"
    yield made
    loop.close()


def sent(server, event):
    """The data of the events of one kind that are under way to the client."""
    server.loop.run_until_complete(asyncio.sleep(0))
    waiting = [server.messages.get_nowait() for _ in range(server.messages.qsize())]
    ours = [row for row in waiting if str(row[0]).startswith("adapter_lab.")]
    assert all(sid == "client" for _, _, sid in ours)
    found = [(kind, json.loads(json.dumps(data, allow_nan=False))) for kind, data, _ in ours]
    return [data for kind, data in found if kind == event], found


def test_events(load, server):
    with torch.inference_mode():
        given = job(
            load("flux"), "flux", steps=20, preview=preview(every=10),
            validation=samples.dataset("flux", 1, seed=8),
        )  # fmt: skip
        result = trainer.Trainer(given, "7").run()
    training, found = sent(server, "adapter_lab.training")
    shown = [data for kind, data in found if kind == "adapter_lab.preview"]
    assert [data["step"] for data in shown] == [0, 10, 20]
    assert shown[0]["images"][0]["filename"] == "run-step00000000.png"
    assert all(data["node"] == "7" for data in (*training, *shown))
    points = [point for data in training for point in data["points"]]
    assert [point[0] for point in points] == list(range(1, 21))
    assert [point[1] for point in points] == result.progress.losses
    last = training[-1]
    assert (last["step"], last["steps"], last["start"], last["left"]) == (20, 20, 0, 0)
    assert last["validation"] == [list(row) for row in result.progress.validation]
    assert last["smooth"] == pytest.approx(sum(result.progress.losses) / 20)
    assert {"loss", "rate", "norm", "per_second", "memory", "text"} < last.keys()


def test_events_do_not_grow_with_the_run(load, server):
    """A held-out loss a step, over days."""
    measured = [(n, float(n)) for n in range(10_000)]
    told = Record(job(load("flux"), "flux"), "7")
    told.resume(Progress(losses=[1.0], validation=measured))
    told.show(Step(1, 1.0, 1e-4, 1.0, [0.5], 0.1), last=True)
    (event,), _ = sent(server, "adapter_lab.training")
    assert len(event["validation"]) <= 400 and event["validation"][-1] == [9999, 9999.0]


def test_nobody_is_told_of_a_job_without_a_client(load, server):
    """ComfyUI sends what has no client to every open browser."""
    server.client_id = None
    told = Record(job(load("flux"), "flux"), "7")
    told.resume(Progress(losses=[1.0]))
    told.show(Step(1, 1.0, 1e-4, 1.0, [0.5], 0.1), last=True)
    assert sent(server, "adapter_lab.training") == ([], [])


def test_at_most_ten_events_a_second(load, server):
    began = time.monotonic()
    with torch.inference_mode():
        trainer.Trainer(job(load("flux"), "flux", steps=60, config={"save_every": 0}), "7").run()
    training, _ = sent(server, "adapter_lab.training")
    assert 2 <= len(training) <= 10 * (time.monotonic() - began) + 2
    assert training[-1]["step"] == 60


def test_tensorboard(load):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = load("flux")
    run(model, "flux", steps=2, trackers="tensorboard")
    result = run(
        model, "flux", trackers="tensorboard", validation=samples.dataset("flux", 1, seed=8)
    )
    found = EventAccumulator(str(here().folder / "tensorboard"))
    found.Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == pytest.approx(dict(enumerate(result.progress.losses, 1)), rel=1e-6)
    assert [event.step for event in found.Scalars("validation/loss")] == [2, 4]


def test_a_tracker_that_is_not_installed_is_named(load):
    with pytest.raises(AdapterLabError, match="no package 'wandb'.*pip install wandb"):
        run(load("flux"), "flux", trackers="wandb")
    with pytest.raises(AdapterLabError, match="no tracker 'x'"):
        run(load("flux"), "flux", trackers="x")
