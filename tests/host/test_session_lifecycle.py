"""A session ends, pauses and fails without a trace, and shares its model with other prompts."""

from __future__ import annotations

import sys

import comfy.model_management
import pytest
import samples
import sessions
import torch
from adapter_lab.nodes.host import session as host
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import Session, SessionOptions

EVERYTHING = SessionOptions(
    checkpointing="blocks", offload=True, compile=True, backend="eager", compute="bf16"
)
STREAMED = SessionOptions(checkpointing="blocks", streaming="on")
QKV = sessions.QKV
NORM = "double_blocks.0.img_attn.norm.query_norm"


def state(model):
    """All that a session touches: parameters, attributes and hooks of modules, flags, functions."""
    network, management = model.model, comfy.model_management
    modules = [
        (name, {k: v for k, v in vars(m).items() if not k.startswith("_")}, dict(m._parameters),
         dict(m._buffers), dict(m._forward_hooks), dict(m._forward_pre_hooks))
        for name, m in network.named_modules()
    ]  # fmt: skip
    names = ("optimized_attention", "optimized_attention_masked")
    attention = {
        (path, name): vars(module)[name]
        for path, module in list(sys.modules.items())
        for name in names
        if name in getattr(module, "__dict__", {})
    }
    flags = management.in_training, management.training_fp8_bwd, network.manual_cast_dtype
    return modules, attention, flags


def same(before, after):
    """Compared by identity where it matters: tensors have no truth value."""
    for (name, *first), (other, *second) in zip(before[0], after[0], strict=True):
        assert name == other
        for a, b in zip(first, second, strict=True):
            assert a.keys() == b.keys(), name
            assert all(a[k] is b[k] or a[k] == b[k] for k in a), name
    assert before[1:] == after[1:]


def ready(model):
    """The model loaded, and its state then."""
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        return state(model), samples.prediction(model, "flux")


@pytest.mark.parametrize("options", [sessions.OFF, EVERYTHING], ids=["plain", "everything"])
def test_paused_and_ended_it_is_as_before(load, monkeypatch, options):
    # Compiling takes seconds for each class of blocks.
    monkeypatch.setattr(host, "blocks", lambda *_: ["single_blocks.0"])
    model = load("flux")
    adapters = sessions.adapters(model, [QKV]) | sessions.adapters(model, [NORM], "full")
    before, output = ready(model)
    noise = torch.get_rng_state()
    with torch.inference_mode(), Session(model, adapters, options) as session:
        process = HostProcess(session)
        first = sessions.loss(process, "flux")
        first.backward()
        with session.paused():
            assert torch.is_inference_mode_enabled()
            same(before, state(model))
            assert torch.equal(samples.prediction(model, "flux"), output)
        second = sessions.loss(process, "flux")
        second.backward()
        assert first.item() == second.item()
        assert not torch.is_inference_mode_enabled()
    same(before, state(model))
    with torch.inference_mode():
        assert torch.equal(samples.prediction(model, "flux"), output)
    assert torch.equal(torch.get_rng_state(), noise)


def test_a_preview_that_fails_does_not_end_the_training(load):
    model = load("flux")
    adapters = sessions.adapters(model)
    with torch.inference_mode(), Session(model, adapters, sessions.BLOCKS) as session:
        before = sessions.loss(HostProcess(session), "flux")
        with pytest.raises(ZeroDivisionError), session.paused():
            raise ZeroDivisionError
        assert sessions.loss(HostProcess(session), "flux").item() == before.item()


@pytest.mark.parametrize("where", ["forward", "recomputation"])
def test_cancelled_inside_any_operation(load, where):
    """ComfyUI raises a BaseException out of the next operation, also out of a recomputation."""
    model = load("flux")
    adapters = sessions.adapters(model)
    before, output = ready(model)
    cancel = comfy.model_management.interrupt_current_processing
    with (
        pytest.raises(comfy.model_management.InterruptProcessingException),
        torch.inference_mode(),
        Session(model, adapters, sessions.BLOCKS) as session,
    ):
        process = HostProcess(session)
        if where == "recomputation":
            value = sessions.loss(process, "flux")
            cancel(True)
            value.backward()
        cancel(True)
        sessions.loss(process, "flux")
    same(before, state(model))
    with torch.inference_mode():
        assert torch.equal(samples.prediction(model, "flux"), output)


def test_another_prompt_merges_into_the_shared_model(load):
    """In a pause and between two sessions; the training goes on with its own weights."""
    model = load("flux")
    adapters, other = sessions.adapters(model), sessions.merged(model)
    expected = sessions.gradients(model, "flux", adapters)
    with torch.inference_mode():
        alone = samples.run(other, "flux")
    with torch.inference_mode(), Session(model, adapters, sessions.OFF) as session:
        assert sessions.loss(HostProcess(session), "flux").item() == expected[0]
        with session.paused():
            assert torch.equal(samples.run(other, "flux"), alone)
        assert sessions.loss(HostProcess(session), "flux").item() == expected[0]
    with torch.inference_mode():
        assert torch.equal(samples.run(other, "flux"), alone)
    assert sessions.gradients(model, "flux", adapters)[0] == expected[0]


def test_sessions_of_two_nodes_in_turn(load):
    model = load("flux")
    first, second = sessions.adapters(model), sessions.adapters(sessions.merged(model), [QKV])
    expected = sessions.gradients(model, "flux", first), sessions.gradients(model, "flux", second)
    one, two = Session(model, first, sessions.OFF), Session(model.clone(), second, STREAMED)
    with torch.inference_mode():
        for _ in range(2):
            with one:
                assert sessions.loss(HostProcess(one), "flux").item() == expected[0][0]
            with two:
                value = sessions.loss(HostProcess(two), "flux").item()
                assert value == pytest.approx(expected[1][0], rel=1e-5)


def test_memory_is_freed(load):
    import gc
    import weakref

    model = load("flux")
    adapters = sessions.adapters(model)
    with torch.inference_mode(), Session(model, adapters, sessions.BLOCKS) as session:
        sessions.loss(HostProcess(session), "flux").backward()
        gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None
