"""The residual of a network's blocks, caught and put back, on the classes that ComfyUI has."""

from __future__ import annotations

import comfy.ops
import pytest
import tiny
import torch
from adapter_lab.nodes.host.residuals import Reader
from comfy.ldm.aura.mmdit import MMDiT as Aura
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan3d.model import Hunyuan3Dv2
from comfy.ldm.hydit.models import HunYuanDiT
from comfy.ldm.kandinsky5.model import Kandinsky5
from comfy.ldm.lightricks.av_model import LTXAVModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import VaceWanModel

CHROMA = dict(
    in_channels=64, out_channels=64, context_in_dim=32, hidden_size=128, mlp_ratio=2.0,
    num_heads=1, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2,
    qkv_bias=True, in_dim=64, out_dim=128, hidden_dim=64, n_layers=1,
    txt_ids_dims=[], vec_in_dim=0,
)  # fmt: skip
KANDINSKY = dict(
    in_text_dim=32, in_text_dim2=16, time_dim=32, model_dim=64, ff_dim=64, visual_embed_dim=64,
    num_text_blocks=1, num_visual_blocks=3, axes_dims=(16, 24, 24),
)  # fmt: skip
QWEN = dict(
    num_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=32,
    in_channels=64, out_channels=16,
)  # fmt: skip
LTXAV = dict(
    in_channels=16, audio_in_channels=128, cross_attention_dim=64, audio_cross_attention_dim=64,
    attention_head_dim=32, audio_attention_head_dim=32, num_attention_heads=2,
    audio_num_attention_heads=2, caption_channels=32, num_layers=2,
    connector_attention_head_dim=32, connector_num_attention_heads=2, connector_num_layers=1,
)  # fmt: skip
HUNYUAN_DIT = dict(
    input_size=None, hidden_size=64, depth=6, num_heads=2, text_states_dim=32,
    text_states_dim_t5=32, text_len=4, text_len_t5=4, size_cond=False,
)  # fmt: skip
VACE = dict(
    dim=128, ffn_dim=128, text_dim=32, num_heads=1, num_layers=2, vace_layers=2, vace_in_dim=8,
    text_len=4,
)  # fmt: skip
AURA = dict(
    dim=64, n_layers=3, n_double_layers=1, n_heads=2, global_conddim=64, cond_seq_dim=32,
    max_seq=64,
)  # fmt: skip
HUNYUAN_3D = dict(
    in_channels=16, context_in_dim=32, hidden_size=64, num_heads=1, depth=1,
    depth_single_blocks=1, mlp_ratio=2.0,
)  # fmt: skip


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def control(count, *shape):
    """What a ControlNet adds after each block of both kinds."""
    return {side: [noise(*shape, seed=9 + i) for i in range(count)] for side in ("input", "output")}


# network, its input, its other arguments, level
CASES = {
    "flux": (Flux, tiny.FLUX | dict(depth=2, depth_single_blocks=2), noise(1, 16, 8, 8), dict(
        context=noise(1, 3, 64), y=noise(1, 32)), "blocks"),
    "flux, control": (Flux, tiny.FLUX | dict(depth=2, depth_single_blocks=2), noise(1, 16, 8, 8),
        dict(context=noise(1, 3, 64), y=noise(1, 32), control=control(2, 1, 16, 128)), "blocks"),
    "chroma, control": (Chroma, CHROMA, noise(1, 16, 8, 8), dict(
        context=noise(1, 3, 32), guidance=torch.tensor([0.0]),
        control=control(2, 1, 16, 128)), "blocks"),
    "qwen, control": (QwenImageTransformer2DModel, QWEN, noise(1, 16, 1, 8, 8), dict(
        context=noise(1, 3, 32), control=control(2, 1, 16, 128)), "blocks"),
    # What its blocks are called with can't be given to them by a replacement.
    "kandinsky": (Kandinsky5, KANDINSKY, noise(1, 16, 1, 8, 8), dict(
        context=noise(1, 3, 32), y=noise(1, 16)), "network"),
    "vace": (VaceWanModel, VACE, noise(1, 16, 2, 8, 8), dict(
        context=noise(1, 4, 32), vace_context=noise(1, 1, 8, 2, 8, 8), vace_strength=[0.7]),
        "blocks"),
    "ltx with audio": (LTXAVModel, LTXAV, [noise(1, 16, 2, 4, 4), noise(1, 8, 6, 16)], dict(
        context=noise(1, 3, 64)), "blocks"),
    "hunyuan dit": (HunYuanDiT, HUNYUAN_DIT, noise(1, 4, 8, 8), dict(
        context=noise(1, 4, 32), encoder_hidden_states_t5=noise(1, 4, 32),
        text_embedding_mask=torch.ones(1, 4), text_embedding_mask_t5=torch.ones(1, 4)), "blocks"),
    # Its single blocks have text and image in one tensor and don't say where the image is.
    "aura": (Aura, AURA, noise(1, 4, 8, 8), dict(context=noise(1, 3, 32)), "network"),
    "hunyuan 3d": (Hunyuan3Dv2, HUNYUAN_3D, noise(1, 16, 12), dict(
        context=noise(1, 3, 32)), "network"),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    build, config, x, more, level = CASES[request.param]
    network = build(**config, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast)
    network.load_state_dict(tiny._random(network, torch.float32))
    return network.eval(), x, more, level


def caller(network, x, more, sigma=0.6):
    def call(options):
        given = [part.clone() for part in x] if isinstance(x, list) else x.clone()
        control = more.get("control")
        fresh = {"control": {k: list(v) for k, v in control.items()}} if control else {}
        with torch.inference_mode():
            t = torch.tensor([sigma])
            return network(given, t, transformer_options=options, **more | fresh)

    return call


def tensors(made):
    return [made] if isinstance(made, torch.Tensor) else list(made)


def test_a_residual_put_back_gives_the_output(case):
    """Computed steps are bitwise the plain ones; a step filled with its own residual is the same
    but for rounding, whatever is added between and after the blocks, and computes no block."""
    network, x, more, level = case
    call, reader = caller(network, x, more), Reader()
    plain = tensors(call({}))
    for _ in range(2):  # the first call finds out where the stack ends
        made, residual = reader.computed(call, {}, network)
        assert reader.level == level
        assert all(torch.equal(a, b) for a, b in zip(tensors(made), plain, strict=True))
    filled, computed = reader.skipped(call, {}, network, residual)
    assert computed is None
    for a, b in zip(tensors(filled), plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    zero = tuple(torch.zeros_like(part) for part in residual)
    other, _ = reader.skipped(call, {}, network, zero)
    assert not torch.allclose(tensors(other)[0], plain[0], rtol=1e-2)
    assert "forward" not in vars(network)
