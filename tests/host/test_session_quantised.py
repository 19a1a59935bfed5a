"""Training on quantised models: right gradients, and no dequantised weight that waits for them."""

from __future__ import annotations

import comfy.sd
import pytest
import samples
import sessions
import tiny
import torch
from adapter_lab.core.merge.modules import quiet
from adapter_lab.core.quant import Settings
from adapter_lab.core.quant.formats import FORMATS
from adapter_lab.nodes.host.frozen import HostLayer
from adapter_lab.nodes.host.layers import quantised
from adapter_lab.nodes.host.process import HostProcess
from adapter_lab.nodes.host.quantised import load as load_quantised
from adapter_lab.nodes.host.session import Session, layers
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

QKV = "double_blocks.0.img_attn.qkv"
CPU = torch.device("cpu")
# Of ours what ComfyUI's own quantiser of models does not make: scales of rows, a rotation.
OURS = ("int8_row", "int8_convrot")


@pytest.fixture
def pair(checkpoints, tmp_path):
    """Format -> (Flux in that format, the same with the dequantised weights, loaded plain).

    A format of ComfyUI in a file that its own quantiser made, one of ours from our loader.
    """

    def make(form):
        source = checkpoints("flux")
        with torch.inference_mode():
            if form in FORMATS:
                low = load_quantised(source, Settings(form), quiet)[0]
            else:
                file = tiny.quantise(source, tmp_path / f"{form}.safetensors", form)
                low = comfy.sd.load_diffusion_model(str(file))
            plain = comfy.sd.load_diffusion_model(str(source))
        table, native = layers(plain), FORMATS[form].native if form in FORMATS else form
        for name, module in layers(low).items():
            if isinstance(module.weight, QuantizedTensor):
                assert quantised(module) == native
                table[name].weight = torch.nn.Parameter(module.weight.dequantize(), False)
        return low, plain

    return make


@pytest.mark.parametrize("form", [*QUANT_ALGOS, *OURS])
def test_gradient_of_a_layer_is_that_of_its_dequantised_weight(pair, form):
    low, plain = pair(form)
    layer = HostLayer(layers(low)[QKV], CPU)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    along = torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        inferred = layers(low)[QKV](x.detach()).clone()
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        y = layer.base(x)
        (grad,) = torch.autograd.grad(y, x, along)
        expected = along @ layers(plain)[QKV].weight.clone()
        assert torch.equal(y.detach(), inferred)
        torch.testing.assert_close(grad, expected)
        torch.testing.assert_close(layer.weight(), layers(plain)[QKV].weight.clone())


@pytest.mark.parametrize("options", [sessions.OFF, sessions.BLOCKS], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("form", ["float8_e4m3fn", "mxfp8", "nvfp4"])
def test_gradients_are_those_of_the_dequantised_model(pair, form, options):
    """Of formats whose activations the CPU leaves alone; the others round them."""
    low, plain = pair(form)
    made = sessions.adapters(plain)
    expected = sessions.gradients(plain, "flux", made)
    found = sessions.gradients(low, "flux", made, options)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    sessions.check_same(found[1], expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["int8_tensorwise", "convrot_w4a4", *OURS])
def test_formats_that_round_activations_still_lead_downhill(pair, form):
    low, plain = pair(form)
    made = sessions.adapters(plain)
    expected, found = (sessions.gradients(m, "flux", made)[1] for m in (plain, low))
    assert sessions.cosine(found, expected) > 0.9


def weights_kept(model, made, kind="flux"):
    """Bytes of the tensors that autograd saves and that are as large as a weight of a block."""
    shapes = {tuple(layers(model)[name].weight.shape) for name in layers(model)}
    shapes |= {shape[::-1] for shape in shapes}
    kept = {}
    with torch.inference_mode(), Session(model, made, sessions.OFF) as session:
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
        )
        held = {p.data_ptr() for p in session.model.parameters()}
        with hooks:
            sessions.loss(HostProcess(session), kind)
    new = [t for pointer, t in kept.items() if pointer not in held and tuple(t.shape) in shapes]
    return sum(t.nbytes for t in new)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "int8_tensorwise", "int8_convrot"])
def test_no_dequantised_weight_waits_for_the_backward_pass(pair, form):
    low, _ = pair(form)
    assert weights_kept(low, sessions.adapters(low)) == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_weights(checkpoints, dtype):
    """As Load Diffusion Model casts them: no scale, each layer casts its weight for use."""
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(checkpoints("flux")), {"dtype": dtype})
        plain = comfy.sd.load_diffusion_model(str(checkpoints("flux")))
        network = plain.model.diffusion_model
        rounded = {n: p.to(dtype).float() for n, p in network.named_parameters()}
        network.load_state_dict(rounded)
    assert layers(model)[QKV].weight.dtype == dtype
    made = sessions.adapters(plain)
    expected = sessions.gradients(plain, "flux", made)
    for options in (sessions.OFF, sessions.BLOCKS):
        found = sessions.gradients(model, "flux", made, options)
        assert found[0] == pytest.approx(expected[0], rel=1e-3)
        sessions.check_same(found[1], expected[1], rtol=1e-2, atol=1e-4)
    assert weights_kept(model, made) == 0


class Packed(torch.Tensor):
    """A weight in a format that only its own layer can read, as of GGUF files."""


class PackedLinear(torch.nn.Linear):
    """As loaders of such formats make them: it unpacks its weight itself."""

    comfy_cast_weights = True

    def cast_bias_weight(self, input=None, dtype=None, device=None, bias_dtype=None):
        weight = self.weight.data.as_subclass(torch.Tensor).to(device, dtype) / 16
        return weight, self.bias.to(device, bias_dtype)

    def forward(self, x):
        return torch.nn.functional.linear(x, *self.cast_bias_weight(dtype=x.dtype, device=x.device))


def test_layers_of_loaders_with_formats_of_their_own(load):
    model, plain = load("flux"), load("flux")
    with torch.inference_mode():
        codes = torch.randint(-20, 20, (384, 128), generator=torch.Generator().manual_seed(0))
        layer = PackedLinear(128, 384)
        layer.weight = torch.nn.Parameter(codes.to(torch.int8).as_subclass(Packed), False)
        layer.bias = layers(plain)[QKV].bias
        model.model.diffusion_model.double_blocks[0].img_attn.qkv = layer
        layers(plain)[QKV].weight.copy_(codes / 16)
    made = sessions.adapters(plain)
    expected = sessions.gradients(plain, "flux", made)
    for options in (sessions.OFF, sessions.BLOCKS):
        found = sessions.gradients(model, "flux", made, options)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        sessions.check_same(found[1], expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "int8_convrot"])
def test_the_quantised_model_is_as_before(pair, form):
    low, _ = pair(form)
    with torch.inference_mode():
        before = samples.run(low, "flux")
    weight = layers(low)[QKV].weight
    sessions.gradients(low, "flux", sessions.adapters(low), sessions.BLOCKS)
    assert layers(low)[QKV].weight is weight
    with torch.inference_mode():
        assert torch.equal(samples.run(low, "flux"), before)
