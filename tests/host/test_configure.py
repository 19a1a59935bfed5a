"""Adapter Config."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.adapters.training import choices
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.nodes.configure import Config

FIRST = ["algorithm", "rank", "alpha", "factor", "decompose_both", "full_matrix", "tucker"]
SAVED = {
    "algorithm": "lora", "rank": 8, "alpha": 8.0, "factor": -1, "decompose_both": False,
    "full_matrix": False, "tucker": False,
}  # fmt: skip


def report(**options: Any) -> tuple[AdapterConfig, str]:
    output = Config.execute(**{**SAVED, **options})
    assert output.ui is not None
    return output.args[0], output.ui["text"][0]


def test_inputs_are_the_options_and_their_defaults() -> None:
    inputs = Config.define_schema().inputs
    names = [i.id for i in inputs]
    assert names[: len(FIRST)] == FIRST and names == [f.name for f in fields(AdapterConfig)]
    defaults = {i.id: i.default for i in inputs if i.id != "algorithm"}
    assert all(getattr(AdapterConfig(), name) == value for name, value in defaults.items())
    assert [i.id for i in inputs if not i.optional] == FIRST
    assert all(i.tooltip for i in inputs)


def test_menu_is_everything_that_can_be_trained() -> None:
    menu = Config.define_schema().inputs[0]
    assert menu.options == list(choices())
    assert {"lora", "lora_fa", "dylora", "coft", "tlora", "full"} <= set(menu.options)


def test_workflows_saved_before_the_options_were_there() -> None:
    config, text = report()
    assert config == AdapterConfig("lora", 8, 8.0)
    assert "Note" not in text


def test_says_what_is_without_effect() -> None:
    config, text = report(algorithm="oft", alpha=4.0, unit=2, dropout=0.1)
    assert config.dropout == 0.1
    assert "Note: Diag-OFT does not use alpha, unit" in text


def test_refuses_before_training() -> None:
    with pytest.raises(AdapterLabError, match="DoRA means nothing on BOFT"):
        report(algorithm="boft", dora=True)
