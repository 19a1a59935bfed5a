"""The node Optimizer: what it hands on, and what it says about it."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields

import pytest
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.config import OptimizerConfig
from adapter_lab.core.train.optimizers import OPTIMIZERS
from adapter_lab.nodes.optimizer import Optimizer


def run(**options):
    return Optimizer.execute(**(asdict(OptimizerConfig()) | options))


def shown(output):
    return output.ui["adapter_lab"][0]


def test_node_without_changes_is_training_without_it():
    inputs = Optimizer.GET_SCHEMA().inputs
    assert [i.id for i in inputs] == [f.name for f in fields(OptimizerConfig)]
    first = ["optimizer", "learning_rate", "weight_decay", "clip", "warmup"]
    assert [i.id for i in inputs if not i.optional] == first
    defaults = {i.id: i.default for i in inputs if i.id != "optimizer"}
    assert OptimizerConfig(**defaults) == OptimizerConfig() == run().args[0]
    assert inputs[0].options == list(OPTIMIZERS) and inputs[0].options[0] == "AdamW"


def test_workflows_of_five_inputs_still_run():
    output = Optimizer.execute(
        optimizer="AdamW", learning_rate=1e-4, weight_decay=0.01, clip=1.0, warmup=0
    )
    assert output.args[0] == OptimizerConfig()


def test_curve():
    found = shown(run(learning_rate=1.0, schedule="linear", warmup=100))["rates"]
    steps, rates = zip(*found, strict=True)
    assert steps == (*range(0, 1000, 10), 1000)
    assert rates[0] == 0.01 and max(rates) == 1.0 == rates[10] and rates[-1] < 0.002
    assert rates[55] == pytest.approx(0.5)


def test_notes():
    assert "Note" not in shown(run())["text"]
    assert (
        "Note: a learning rate of 0.0001 is unusual for Prodigy"
        in (shown(run(optimizer="Prodigy"))["text"])
    )


def test_a_missing_package_is_said_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(AdapterLabError, match="pip install --upgrade pytorch-optimizer"):
        run(optimizer="CAME")
