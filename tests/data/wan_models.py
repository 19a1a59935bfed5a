"""Video, image and sound transformers: ComfyUI's names and shapes as recorded, their diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from adapter_lab.core.archs import Alias, ArchSpec

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, torch.Tensor]
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
FOLDER = Path(__file__).resolve().parent / "models"
# Recorded from ComfyUI's classes; tests/host compares them with the classes.
OURS = (
    "wan", "qwen_image", "mage_flow", "lumina2", "z_image", "ltxv", "ltx2", "cosmos",
    "cosmos_predict2", "anima", "kandinsky5", "krea2", "ace_step", "ace_step15", "cogvideox",
    "omnigen2", "boogu", "hidream_o1", "ideogram4", "lens", "ernie", "joyimage", "minimax_h3",
)  # fmt: skip
MODELS: dict[str, dict[str, Shapes]] = {
    name: {
        variant: {path: tuple(shape) for path, shape in modules.items()}
        for variant, modules in json.loads((FOLDER / f"{name}.json").read_text("utf-8")).items()
    }
    for name in OURS
}
VARIANTS = [(name, variant) for name in OURS for variant in MODELS[name]]
TWO = {"num_layers": 2}
GATED = {f"{prefix}{option}": True for prefix in ("", "audio_") for option in
         ("gated_attn", "cross_attn_mod")}  # fmt: skip
COSMOS = "CosmosTransformer3DModel"
COSMOS1 = TWO | {"extra_pos_embed_type": "learnable"}
PREDICT2 = TWO | {"num_attention_heads": 16, "extra_pos_embed_type": None}
COG = "CogVideoXTransformer3DModel"
COG5B = TWO | {"num_attention_heads": 48, "use_rotary_positional_embeddings": True}
COG15 = COG5B | {"in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 512}
I2V = TWO | {"in_channels": 36, "added_kv_proj_dim": 5120, "image_dim": 1280}
ERNIE = {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 12288}
KANDINSKY = {"model_dim": 1792, "ff_dim": 7168, "in_visual_dim": 33, "out_visual_dim": 16}
# (architecture, variant) -> diffusers' class and options with the same widths
THEIRS = {
    ("wan", "t2v"): ("WanTransformer3DModel", TWO),
    ("wan", "i2v"): ("WanTransformer3DModel", I2V),
    ("wan", "flf"): ("WanTransformer3DModel", I2V | {"pos_embed_seq_len": 514}),
    ("wan", "vace"): ("WanVACETransformer3DModel", TWO | {"vace_layers": [0, 1]}),
    ("wan", "animate"): ("WanAnimateTransformer3DModel",
                         {"num_layers": 6, "added_kv_proj_dim": 5120}),
    ("qwen_image", "base"): ("QwenImageTransformer2DModel", TWO),
    ("qwen_image", "layered"): ("QwenImageTransformer2DModel",
                                TWO | {"use_additional_t_cond": True}),
    ("lumina2", "base"): ("Lumina2Transformer2DModel", TWO | {"cap_feat_dim": 2304}),
    ("z_image", "base"): ("ZImageTransformer2DModel", {"n_layers": 2}),
    ("z_image", "omni"): ("ZImageTransformer2DModel", {"n_layers": 2, "siglip_feat_dim": 1152}),
    ("ltxv", "base"): ("LTXVideoTransformer3DModel", TWO),
    ("ltx2", "base"): ("LTX2VideoTransformer3DModel", TWO),
    ("ltx2", "2.3"): ("LTX2VideoTransformer3DModel",
                      TWO | GATED | {"use_prompt_embeddings": False}),
    ("cosmos", "base"): (COSMOS, COSMOS1),
    ("cosmos_predict2", "base"): (COSMOS, PREDICT2),
    ("anima", "base"): (COSMOS, PREDICT2),
    ("kandinsky5", "base"): ("Kandinsky5Transformer3DModel", {"num_visual_blocks": 2} | KANDINSKY),
    ("krea2", "base"): ("Krea2Transformer2DModel", TWO),
    ("ace_step15", "base"): ("AceStepTransformer1DModel", {"num_hidden_layers": 2}),
    ("cogvideox", "2b"): (COG, TWO),
    ("cogvideox", "5b"): (COG, COG5B),
    ("cogvideox", "1.5"): (COG, COG15),
    ("ideogram4", "base"): ("Ideogram4Transformer2DModel", TWO),
    ("ernie", "base"): ("ErnieImageTransformer2DModel", TWO | ERNIE | {"text_in_dim": 3072}),
    ("joyimage", "base"): ("JoyImageEditTransformer3DModel", TWO),
    ("minimax_h3", "base"): ("MiniMaxH3Transformer3DModel", TWO),
}  # fmt: skip


def meta(case: tuple[str, str]) -> torch.nn.Module:
    name, options = THEIRS[case]
    with torch.device("meta"):
        return getattr(diffusers, name)(**options)


def parameters(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Module path, or name of a raw parameter -> shape, as ``MODELS`` lists them."""
    state = model.state_dict()
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in state.items()
        if not name.endswith(".bias") or f"{name[:-4]}weight" not in state
    }


def find(spec: ArchSpec, shapes: Shapes, name: str) -> tuple[Alias, str]:
    """(alias, own path) of a diffusers name; every name has one meaning."""
    named = [(alias, alias.own.format(*n)) for alias, n in spec.theirs_in(shapes).find(name)]
    found = [(alias, path) for alias, path in named if path in shapes]
    assert len(found) == 1, f"{name} means {found}"
    return found[0]


def rows_of(spec: ArchSpec, shapes: Shapes, alias: Alias, path: str) -> torch.Tensor:
    """The rows of the own weight that a delta's rows go to, in the delta's order."""
    hidden = shapes[spec.hidden][0] if spec.hidden else 0
    offset, length = alias.span(shapes[path][0], hidden)
    order = alias.order(length) if alias.order else torch.arange(length)
    return offset + order


# Blurs images of faces; its layers are classes of their own in both, which nobody trains.
FACES = "motion_encoder."
