"""The layers of text encoders, so that underscored names of them can be told apart."""

from __future__ import annotations

from typing import NamedTuple

from ..archs import Templates
from .base import ANY_ENCODER, Parts

_CLIP = (
    *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2", "layer_norm1",
    "layer_norm2",
)  # fmt: skip
_LLM = (
    *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
_T5 = (
    *(f"layer.0.SelfAttention.{x}" for x in "qkvo"), "layer.0.layer_norm", "layer.1.layer_norm",
    *(f"layer.1.DenseReluDense.{w}" for w in ("wi", "wi_0", "wi_1", "wo")),
)  # fmt: skip


class Kind(NamedTuple):
    """A family of text encoders: how ComfyUI's names of such parts begin; one of them."""

    names: tuple[str, ...]
    usual: str


CLIP, T5 = Kind(("clip_",), "clip_l"), Kind(("t5", "umt5", "mt5", "byt5", "pile_t5"), "t5xxl")
LLM = Kind(("llama", "gemma", "qwen", "mistral", "ministral", "gpt"), ANY_ENCODER)


def _rows(
    head: str, leaves: tuple[str, ...], kind: Kind, own: str
) -> list[tuple[str, tuple[str, Kind]]]:
    return [(f"{head}{leaf}", (f"{own}{leaf}", kind)) for leaf in leaves]


# As transformers' classes of all versions have them -> (as ComfyUI has them, kind).
_LAYERS: Templates[tuple[str, Kind]] = Templates([
    *_rows("text_model.encoder.layers.{}.", _CLIP, CLIP, "text_model.encoder.layers.{}."),
    *_rows("encoder.layers.{}.", _CLIP, CLIP, "text_model.encoder.layers.{}."),
    ("text_projection", ("text_projection", CLIP)),
    *_rows("encoder.block.{}.", _T5, T5, "encoder.block.{}."),
    *_rows("model.layers.{}.", _LLM, LLM, "model.layers.{}."),
    *_rows("layers.{}.", _LLM, LLM, "model.layers.{}."),
    *_rows("language_model.layers.{}.", _LLM, LLM, "model.layers.{}."),
    *_rows("model.language_model.layers.{}.", _LLM, LLM, "model.layers.{}."),
])  # fmt: skip


def locate(parts: Parts, body: str) -> tuple[str, str] | None:
    """(part, ComfyUI's path) of a layer of a text encoder; None where ``body`` is none."""
    for (own, kind), numbers in _LAYERS.find(body):
        named = (part for part in parts if part.startswith(kind.names))
        return next(named, kind.usual), own.format(*numbers)
    return None


def spelled(path: str, separator: str) -> str:
    """``path`` as trainers with this separator name it: without a language model's "model."."""
    return path.removeprefix("model.") if separator == "_" else path
