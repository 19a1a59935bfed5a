"""What a choice of modules would train, counted without the model."""

from __future__ import annotations

import pytest
import torch.nn as nn
from adapter_lab.core.adapters import AdapterConfig
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.counts import count
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, get_peft_model

SIZES = [(96, 64, True), (64, 96, False), (96, 64, False)]
SHAPES = [((out, width), bias) for width, out, bias in SIZES] + [((32, 16, 3, 3), True)]


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*size) for size in SIZES)
        self.conv = nn.Conv2d(16, 32, 3)


def test_as_many_as_peft_trains():
    model = get_peft_model(Stack(), LoraConfig(r=4, target_modules=r"layers\.\d|conv"))
    trained, _ = model.get_nb_trainable_parameters()
    found = count(SHAPES, AdapterConfig("lora", 4))
    assert found.trained == trained
    assert found.weights == sum(p.numel() for p in Stack().parameters() if p.ndim > 1)


@pytest.mark.parametrize(("algo", "options"), [("loha", {}), ("lokr", {"factor": 4}), ("full", {})])
def test_as_many_as_lycoris_trains(algo, options):
    # Of the whole process; other tests choose other modules.
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "target_name": []})
    network = create_lycoris(
        Stack(), 1.0, linear_dim=2, conv_dim=2, algo=algo, bias=True, **options
    )
    network.apply_to()
    factors = {n: t for n, t in network.named_parameters() if t.requires_grad}
    wanted = sum(t.numel() for t in factors.values())
    config = AdapterConfig(algo, 2, bias=algo == "full", **options)
    assert count(SHAPES, config).trained == wanted


def test_norms_are_trained_whole():
    assert count([((64,), True), ((64,), False)], AdapterConfig("lora", 4)).trained == 3 * 64


@pytest.mark.timeout(60)
def test_large_models_take_no_time():
    shapes = [((28_672, 8192), False)] * 400 + [((8192, 28_672), True)] * 400
    found = count(shapes, AdapterConfig("full", bias=True))
    assert found.trained == found.weights + 400 * 8192
    assert count(shapes, AdapterConfig("lora", 16)).trained == 800 * 16 * (8192 + 28_672)


def test_notes_are_counted():
    (note,) = count([((8, 8), False)] * 3, AdapterConfig("lora", 16)).notes
    assert note.endswith("(3 modules)")


def test_layers_an_algorithm_is_not_for():
    with pytest.raises(AdapterLabError):
        count([((3, 5), False)], AdapterConfig("boft", 4))
