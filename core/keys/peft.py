"""What peft's save_pretrained writes, and its adapters in memory, under any adapter name."""

from .base import ANY_ENCODER, KeyFormat

PEFT_SPELLINGS = {
    "lora_up.weight": "lora_B.weight",
    "lora_down.weight": "lora_A.weight",
    "lora_up.bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
# Bare parameters, whose keys end in the adapter's name while they are in memory.
_BARE = (
    *_HADA, *_LOKR, "boft_R", "boft_s", "ia3_l", "hra_u", "lora_embedding_A", "lora_embedding_B",
    "vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B",
)  # fmt: skip
_GLORA = (*(f"{path}.{x}" for path in "ABC" for x in ("X", "Xd", "Xu")), "D.X", "E.X")

PEFT = KeyFormat(
    id="peft",
    title="peft",
    prefixes=(
        ("base_model.model.", ("model", ANY_ENCODER)),
        ("base_model.model.diffusion_model.", ("model",)),
        ("base_model.model.transformer.", ("model",)),
        ("base_model.model.unet.", ("model",)),
        ("base_model.model.text_encoder.", (ANY_ENCODER,)),
    ),
    separator=".",
    spellings=PEFT_SPELLINGS,
    reads={
        "lora_A.*.weight": "lora_down.weight",
        "lora_B.*.weight": "lora_up.weight",
        "lora_B.*.bias": "lora_up.bias",
        "lora_A": "lora_down.weight",
        "lora_B": "lora_up.weight",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
        "lora_magnitude_vector.*.weight": "magnitude",
        "lora_magnitude_vector.*": "magnitude",
        "base_layer.bias": "set_bias",
        "oft_R.*.weight": "oft_R.weight",
        **{name: name for name in (*_BARE, "oft_R.weight")},
        **{f"{name}.*": name for name in _BARE},
        **{f"glora_{name}": f"glora_{name}" for name in _GLORA},
        **{f"glora_{name[0]}.*{name[1:]}": f"glora_{name}" for name in _GLORA},
    },
    family="diffusers",
    folds=("lora", "loha", "lokr"),
    single=True,
)
