"""Norms and biases in training, other dtypes to compute in, and compiled blocks."""

from __future__ import annotations

import comfy.sd
import pytest
import samples
import sessions
import tiny
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.adapters.full import Bias
from adapter_lab.core.adapters.training import make
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.core.train.random import generator
from adapter_lab.nodes.host import session
from adapter_lab.nodes.host.adapting import adapting
from adapter_lab.nodes.host.compiled import Compiled
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.session import Session, SessionOptions
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified

COMPILED = ["single_blocks.0.linear1"]
CPU = torch.device("cpu")
PARTITIONED = "aot_eager_decomp_partition"  # inductor's choice of what to keep, without its code
# Norms of every class, and layers for their biases.
NORMS = {
    "flux": ["double_blocks.0.img_attn.norm.query_norm", "single_blocks.0.norm.key_norm"],
    "wan": ["blocks.0.norm3", "blocks.1.self_attn.norm_q"],
    "sd15": ["input_blocks.1.0.in_layers.0", "input_blocks.1.1.transformer_blocks.0.norm2"],
    "cosmos": ["blocks.0.self_attn.q_norm", "blocks.1.cross_attn.k_norm"],
}
BIASES = {
    "flux": ["double_blocks.0.txt_mlp.0", "img_in"],
    "wan": ["blocks.0.norm3", "blocks.0.ffn.2", "patch_embedding"],
    "sd15": ["input_blocks.1.0.in_layers.0", "input_blocks.1.0.in_layers.2", "out.2"],
}


def model_of(load, kind):
    return tiny.cosmos() if kind == "cosmos" else load(kind)


def changes(model, names, parameter):
    """Differences for a parameter of the modules of these names, by their algorithm."""
    made = {}
    for name in names:
        rng = generator(0, name)
        module = model.model.diffusion_model.get_submodule(name)
        noise = torch.randn(getattr(module, parameter).shape, generator=rng) * 0.1
        kind, suffix = (Bias, "diff_b") if parameter == "bias" else (ALGORITHMS["full"], "diff")
        made[f"diffusion_model.{name}"] = kind({suffix: noise.requires_grad_()})
    return made


@pytest.mark.parametrize("options", [sessions.OFF, sessions.BLOCKS], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "kind, parameter",
    [*((kind, "weight") for kind in NORMS), *((kind, "bias") for kind in BIASES)],
)
def test_norms_and_biases(load, kind, parameter, options):
    """As ComfyUI merges the same differences, and with the slope of the loss."""
    model = model_of(load, kind)
    made = changes(model, (NORMS if parameter == "weight" else BIASES)[kind], parameter)
    merged = model.clone()
    merged.add_patches(
        {
            f"{path}.{parameter}": ("diff", (t.detach(),))
            for path, algorithm in made.items()
            for t in algorithm.tensors.values()
        }
    )
    found = sessions.gradients(model, kind, made, options)[0]
    assert found == pytest.approx(sessions.gradients(merged, kind, {})[0], rel=1e-5)
    assert found != pytest.approx(sessions.gradients(model, kind, {})[0], rel=1e-5)
    sessions.check_slope(model, kind, made, options, rel=2e-2)


@pytest.mark.parametrize("options", [sessions.OFF, sessions.BLOCKS], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["flux", "wan", "sd15"])
def test_biases_beside_weights(load, kind, options):
    """The layer in training is the one that a file of the same adapter gives."""
    model, config = load(kind), AdapterConfig(rank=2, alpha=2.0, bias=True)
    made, file = {}, {}
    for name in BIASES[kind]:
        module = model.model.diffusion_model.get_submodule(name)
        rng, shape = generator(0, name), tuple(module.weight.shape)
        if len(shape) == 1:
            continue
        algorithm = make(shape, config, rng, biased=True)
        tensors = algorithm.tensors.items()
        noise = {n: torch.randn(t.shape, generator=rng) * 0.1 for n, t in tensors}
        algorithm = algorithm.on({n: (t + noise[n]).requires_grad_() for n, t in tensors})
        assert "diff_b" in algorithm.tensors
        made[f"diffusion_model.{name}"] = algorithm
        file |= {f"diffusion_model.{name}.{n}": t.detach() for n, t in algorithm.state().items()}
    found = sessions.gradients(model, kind, made, options)[0]
    applied = samples.apply(model, Adapter(file), mode="merge")
    assert found == pytest.approx(sessions.gradients(applied, kind, {})[0], rel=1e-5)
    sessions.check_slope(model, kind, made, options, rel=2e-2)


class OwnNorm(torch.nn.Module):
    """A norm of a model's own, which ComfyUI does not cast."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        return x * self.weight


def test_a_norm_that_is_not_of_comfyui():
    module, diff = OwnNorm(), torch.tensor([0.0, 1, 2, 3]).requires_grad_()
    made = {"norm": ALGORITHMS["full"]({"diff": diff})}
    x = torch.full((2, 4), 2.0)
    with adapting({"norm": module}, made, made.get, CPU, "auto"):
        y = module(x)
        y.sum().backward()
    assert torch.equal(y[0], torch.tensor([2.0, 4, 6, 8]))
    assert torch.equal(diff.grad, torch.full((4,), 4.0))
    assert torch.equal(module(x), x) and "forward" not in vars(module)
    assert torch.equal(module.weight, torch.ones(4))


def test_what_has_no_place_is_named(load):
    model = load("flux")
    with torch.inference_mode():
        with pytest.raises(AdapterLabError, match=r"'diffusion_model\.single.+no bias"):
            path = "diffusion_model.single_blocks.0.norm.key_norm"
            Session(model, {path: Bias({"diff_b": torch.zeros(1)})}).__enter__()
        with pytest.raises(AdapterLabError, match="no module") as caught:
            Session(model, {"diffusion_model.nowhere": Bias({})}).__enter__()
    assert "nowhere" in str(caught.value)


@pytest.mark.parametrize("compute", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_computing_in_another_dtype(checkpoints, load, stored, compute):
    """Close to float32 throughout, within what the dtype rounds away, and not equal to it."""
    plain = load("flux")
    made = sessions.adapters(plain)
    expected = sessions.gradients(plain, "flux", made)
    with torch.inference_mode():
        given = {"dtype": stored}
        model = comfy.sd.load_diffusion_model(str(checkpoints("flux")), given)
    dtype = model.model.get_dtype_inference()
    options = SessionOptions(checkpointing="off", compute=compute)
    with torch.inference_mode(), Session(model, made, options) as session:
        half = HostProcess(session).half
    found = sessions.gradients(model, "flux", made, options)
    assert half == (compute == "fp16") and model.model.get_dtype_inference() == dtype
    rounded = compute != "fp32" or stored != torch.float32
    assert found[0] == pytest.approx(expected[0], rel=0.05 if rounded else 1e-5)
    assert (found[0] != expected[0]) == rounded
    assert sessions.cosine(found[1], expected[1]) > 0.98


@pytest.fixture
def one_block(monkeypatch):
    """Compiling takes seconds for each class of blocks."""
    monkeypatch.setattr(session, "blocks", lambda *_: ["single_blocks.0"])


@pytest.mark.parametrize("checkpointing", ["off", "blocks"])
def test_compiled_blocks(load, one_block, checkpointing):
    model = load("flux")
    made = sessions.adapters(model, COMPILED)
    expected = sessions.gradients(model, "flux", made)
    options = SessionOptions(checkpointing=checkpointing, compile=True, backend=PARTITIONED)
    found = sessions.gradients(model, "flux", made, options)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    sessions.check_same(found[1], expected[1], rtol=1e-3, atol=1e-5)


def test_compiled_blocks_survive_a_pause(load, one_block):
    model, graphs = load("flux"), []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    made = sessions.adapters(model, COMPILED)
    options = SessionOptions(checkpointing="off", compile=True, backend=counting)
    with torch.inference_mode(), Session(model, made, options) as session:
        process = HostProcess(session)
        first = sessions.loss(process, "flux").item()
        made_once = len(graphs)
        with session.paused():
            assert "forward" not in vars(model.model.diffusion_model.single_blocks[0])
        assert sessions.loss(process, "flux").item() == first
    assert made_once > 1 and len(graphs) <= made_once + 1  # one more is the trial


@pytest.mark.parametrize("checkpointing", ["off", "blocks"])
def test_a_block_that_cannot_be_compiled(load, one_block, checkpointing):
    """Told when it is first run, also where it fails for the backward pass alone."""
    forward, backward = (lambda graph, _: make_boxed_func(graph.forward)), []

    def failing(graph, _):
        backward.append(graph)
        if len(backward) > 1:  # the first is the trial's
            raise NotImplementedError("no such kernel")
        return make_boxed_func(graph.forward)

    def backend(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=forward, bw_compiler=failing)

    torch._dynamo.reset()
    model = load("flux")
    made = sessions.adapters(model, COMPILED)
    options = SessionOptions(checkpointing=checkpointing, compile=True, backend=backend)
    with (
        torch.inference_mode(),
        Session(model, made, options) as running,
        pytest.raises(AdapterLabError, match=r"single_blocks\.0.+no such kernel.+'compile'"),
    ):
        sessions.loss(HostProcess(running), "flux")
    assert "forward" not in vars(model.model.diffusion_model.single_blocks[0])


def test_without_a_compiler(monkeypatch):
    import torch._inductor.config as config

    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/c++",))
    torch._dynamo.reset()
    with pytest.raises(AdapterLabError, match="cannot compile") as caught:
        Compiled().require(CPU)
    assert "compiler" in str(caught.value)
