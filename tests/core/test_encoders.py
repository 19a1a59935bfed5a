"""Text encoders: which one a name means, in every spelling, and what it is called there."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.keys import resolve

MODEL = {f"diffusion_model.{path}.weight": (8, 4)
         for path in ("img_in", "vector_in.in_layer", "double_blocks.0.img_attn.qkv")}  # fmt: skip
Q = "text_model.encoder.layers.0.self_attn.q_proj"
CLIP = {f"clip_{x}.transformer.{Q}.weight": (n, n) for x, n in (("l", 6), ("g", 10))}


def lora(stem: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    factors = {
        "lora_up.weight": torch.ones(shape[0], 2),
        "lora_down.weight": torch.ones(2, shape[1]),
    }
    return {f"{stem}.{suffix}": t for suffix, t in factors.items()} | {
        f"{stem}.alpha": torch.tensor(2.0)
    }


def test_text_encoders():
    stem = Q.replace(".", "_")
    names = {"lora_te_": "l", "lora_te1_": "l", "lora_te2_": "g"}
    dotted = {
        "text_encoder.": "l",
        "text_encoder_2.": "g",
        "text_encoders.clip_g.transformer.": "g",
        "clip_g.transformer.": "g",
    }
    for prefix, which in (names | dotted).items():
        size = {"l": 6, "g": 10}[which]
        file = lora(prefix + (Q if prefix in dotted else stem), (size, size))
        entries, report = resolve(file, MODEL | CLIP)
        assert [(e.key, e.part) for e in entries] == [
            (f"clip_{which}.transformer.{Q}.weight", f"clip_{which}")
        ]
        assert not report.warnings
        _, report = resolve(file, MODEL)
        whose = "a text encoder" if prefix == "lora_te_" else f"the text encoder clip_{which}"
        assert list(report.unmatched.values()) == [
            f"for {whose}, which is not among the given weights: connect its clip"
        ]
    _, report = resolve(lora("lora_unet_img_in", (8, 4)), CLIP)
    assert "for the diffusion model" in report.unmatched["lora_unet_img_in"]


T5 = "encoder.block.0.layer.0.SelfAttention.q"
LLM = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("encoders", "stem", "key"),
    [
        # FLUX.1 and SD3 in sd-scripts and OneTrainer: T5 is the third encoder or the second.
        (("clip_l", "t5xxl"), f"lora_te3_{T5.replace('.', '_')}", f"t5xxl.transformer.{T5}"),
        (("clip_l", "t5xxl"), f"lora_te2_{T5.replace('.', '_')}", f"t5xxl.transformer.{T5}"),
        (("clip_l", "clip_g", "t5xxl"), f"text_encoder_3.{T5}", f"t5xxl.transformer.{T5}"),
        (("clip_l", "t5xxl"), f"text_encoder_2.{T5}", f"t5xxl.transformer.{T5}"),
        (("t5xxl",), f"text_encoder.{T5}", f"t5xxl.transformer.{T5}"),
        # Language models, which trainers load without their head.
        (("gemma2_2b",), "lora_te_layers_0_self_attn_q_proj", f"gemma2_2b.transformer.{LLM}"),
        (("qwen3_06b",), f"lora_te_{LLM.replace('.', '_')}", f"qwen3_06b.transformer.{LLM}"),
        (("llama", "clip_l"), f"text_encoder.{LLM}", f"llama.transformer.{LLM}"),
        (("llama", "clip_l"), f"text_encoder_2.{Q}", f"clip_l.transformer.{Q}"),
        (("qwen25_7b",), "text_encoder.model.language_model.layers.0.self_attn.q_proj",
         f"qwen25_7b.transformer.{LLM}"),
        (("qwen25_7b",), f"text_encoders.qwen25_7b.transformer.{LLM}",
         f"qwen25_7b.transformer.{LLM}"),
        (("qwen25_7b",), f"text_encoders.transformer.{LLM}", f"qwen25_7b.transformer.{LLM}"),
        (("clip_l", "clip_g", "t5xxl", "llama"), f"lora_te4_{LLM.replace('.', '_')}",
         f"llama.transformer.{LLM}"),
        (("qwen3_06b",), "text_encoder.qwen3.layers.0.self_attn.q_proj",
         f"qwen3_06b.transformer.{LLM}"),
        (("clip_l",), f"text_encoder.base_model.model.{Q}", f"clip_l.transformer.{Q}"),
        (("clip_h",), f"lora_te_{Q.replace('.', '_')}", f"clip_h.transformer.{Q}"),
        (("clip_g",), f"lora_prior_te_{Q.replace('.', '_')}", f"clip_g.transformer.{Q}"),
        (("clip_l",), f"text_encoder.{Q.removeprefix('text_model.')}", f"clip_l.transformer.{Q}"),
    ],
)  # fmt: skip
def test_text_encoders_of_every_kind(encoders, stem, key):
    paths = {"clip": Q, "t5xx": T5}
    index = {f"{e}.transformer.{paths.get(e[:4].strip('_'), LLM)}.weight": (6, 6) for e in encoders}
    entries, report = resolve(lora(stem, (6, 6)), MODEL | index)
    assert [e.key for e in entries] == [f"{key}.weight"], report.to_text()


def test_an_encoder_of_another_size_is_a_way_out():
    """Names that two encoders share go to the usual one, unless only the other one fits."""
    file = lora(f"lora_te1_{Q.replace('.', '_')}", (10, 10))
    entries, _ = resolve(file, MODEL | CLIP)
    assert [e.part for e in entries] == ["clip_g"]


def test_parts_of_a_pipeline_in_two_formats_are_no_mixture():
    file = lora("lora_transformer_x_embedder", (8, 4))
    file |= lora(f"lora_te1_{Q.replace('.', '_')}", (6, 6))
    entries, report = resolve(file, MODEL | CLIP)
    assert len(entries) == 2 and report.format == "onetrainer" and not report.warnings
