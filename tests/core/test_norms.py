"""The norm of what an adapter changes, by block."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig, Ordered, load
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.keys import block_norms, resolve
from adapter_lab.core.keys.norms import delta_norm, needs_weight

H = 8
FLUX = {
    "img_in": (H, 4), "vector_in.in_layer": (H, 4), "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.10.img_attn.proj": (H, H), "double_blocks.2.txt_mlp.0": (4 * H, H),
    "single_blocks.1.linear1": (7 * H, H),
}  # fmt: skip
Q = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("shape", [(16, 12), (16, 12, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "full"])
@pytest.mark.parametrize("tucker", [False, True])
def test_norm_of_the_delta(name, shape, tucker):
    torch.manual_seed(0)
    config = AdapterConfig(name, 2, 3, factor=4, tucker=tucker)
    made = ALGORITHMS[name].init(shape, config, torch.Generator())
    tensors = {k: t if k == "alpha" else torch.randn(t.shape) for k, t in made.state().items()}
    algorithm = load(tensors)
    assert algorithm is not None
    expected = float(algorithm.delta(torch.zeros(shape)).norm())
    assert delta_norm(algorithm) == pytest.approx(expected, rel=1e-5)
    assert delta_norm(algorithm.at(-2)) == pytest.approx(2 * expected, rel=1e-5)


def test_what_depends_on_the_weight_needs_it():
    up, down, weight = torch.randn(H, 2), torch.randn(2, H), torch.randn(H, H)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": torch.ones(H, 1)}
    algorithm = load(tensors)
    assert algorithm is not None and delta_norm(algorithm) is None
    merged = torch.nn.functional.normalize(weight + up @ down, dim=1)
    assert delta_norm(algorithm, weight) == pytest.approx(float((merged - weight).norm()), rel=1e-4)


def test_rows_in_another_order_have_the_norm_of_theirs():
    """A delta that depends on the weight is that of the rows as the file has them."""
    torch.manual_seed(0)
    weight, order = torch.randn(H, H), torch.randperm(H)
    pairs = {f"{n}.weight": torch.randn(*((H, 2) if n[1] == "1" else (2, H)))
             for n in ("a1", "a2", "b1", "b2")}  # fmt: skip
    ordered = Ordered(load(pairs), order)
    merged = ordered.merge(weight.clone())
    assert delta_norm(ordered, weight) == pytest.approx(float((merged - weight).norm()), rel=1e-4)
    assert delta_norm(ordered) is None
    up, down = torch.randn(H, 2), torch.randn(2, H)
    plain = Ordered(load({"lora_up.weight": up, "lora_down.weight": down}), order)
    assert delta_norm(plain) == pytest.approx(float((up @ down).norm()), rel=1e-5)


def test_what_takes_a_corner_needs_the_width():
    a, b = torch.randn(2, H + 4), torch.randn(H, 2)
    vectors = {"vera_lambda_b": torch.ones(H), "vera_lambda_d": torch.ones(2)}
    algorithm = load({"vera_A": a, "vera_B": b, **vectors})
    assert delta_norm(algorithm) is None and delta_norm(Ordered(algorithm, torch.arange(H))) is None
    assert needs_weight(algorithm) and needs_weight(Ordered(algorithm, torch.arange(H)))
    expected = float((b @ a[:, :H]).norm())
    assert delta_norm(algorithm, torch.randn(H, H)) == pytest.approx(expected, rel=1e-5)


def test_by_block_in_the_order_of_the_model():
    file, squares = {}, {}
    for path, (out, width) in FLUX.items():
        stem = "diffusion_model." + path
        up, down = torch.randn(out, 2), torch.randn(2, width)
        file |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        squares[path] = float((up @ down).norm()) ** 2
    file |= {f"text_encoders.clip_l.transformer.{Q}.diff": torch.ones(4, 4)}
    weights = {f"diffusion_model.{path}.weight": torch.zeros(s) for path, s in FLUX.items()}
    weights |= {f"clip_l.transformer.{Q}.weight": torch.zeros(4, 4)}
    entries, _ = resolve(file, weights)
    norms = block_norms(entries, ARCHITECTURES["flux"])
    assert [block for block, _ in norms] == [
        "clip_l.text_model.encoder.layers.0", "img_in", "vector_in", "double_blocks.0",
        "double_blocks.2", "double_blocks.10", "single_blocks.1",
    ]  # fmt: skip
    found = dict(norms)
    assert found["double_blocks.10"] ** 2 == pytest.approx(
        squares["double_blocks.10.img_attn.proj"], rel=1e-4
    )
    assert found["clip_l.text_model.encoder.layers.0"] == pytest.approx(4)


def test_rows_of_a_weight_add_up():
    """q and k on their rows of one fused weight, and a DoRA that needs these rows."""
    file, square = {}, 0.0
    weights = {f"diffusion_model.{path}.weight": torch.randn(shape) for path, shape in FLUX.items()}
    weight = weights["diffusion_model.double_blocks.0.img_attn.qkv.weight"]
    for n, x in enumerate("qk"):
        stem, diff = f"transformer.transformer_blocks.0.attn.to_{x}", torch.randn(H, H)
        up, down = diff, torch.eye(H)
        file |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        file |= {f"{stem}.lora_magnitude_vector": torch.ones(H)}
        rows = weight[n * H : (n + 1) * H]
        square += float((torch.nn.functional.normalize(rows + diff, dim=1) - rows).norm()) ** 2
    entries, _ = resolve(file, weights)
    assert block_norms(entries, ARCHITECTURES["flux"]) == []
    ((block, norm),) = block_norms(entries, ARCHITECTURES["flux"], weights)
    assert (block, norm**2) == ("double_blocks.0", pytest.approx(square, rel=1e-4))
