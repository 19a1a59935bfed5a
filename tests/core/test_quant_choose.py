"""Which layers of a model file are quantised: names and sizes of real models, no numbers."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from adapter_lab.core.archs import ARCHITECTURES, ArchSpec
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.header import Header, TensorInfo
from adapter_lab.core.merge.bake_plan import Plan
from adapter_lab.core.merge.outcome import Outcome
from adapter_lab.core.quant.choose import Choice, choose
from adapter_lab.core.quant.formats import FORMATS
from adapter_lab.core.quant.source import model_keys, settle

Shapes = dict[str, tuple[int, ...]]
FOLDER = Path(__file__).parents[1] / "data" / "models"
MODELS = {
    (file.stem, variant): shapes
    for file in sorted(FOLDER.glob("*.json"))
    for variant, shapes in json.loads(file.read_text("utf-8")).items()
}
# musubi-tuner: what a weight's name has to contain, and what it must not, in ComfyUI's names.
# hidream_o1_train_network.py, qwen_image_model.py, wan/modules/model.py and their like:
# FP8_OPTIMIZATION_TARGET_KEYS, FP8_OPTIMIZATION_EXCLUDE_KEYS.
MUSUBI = {
    "wan": (["blocks"], ["norm", "patch_embedding", "text_embedding", "time_embedding",
            "time_projection", "head", "modulation", "img_emb"]),
    "hunyuan_video_15": (["double_blocks"], ["norm", "_emb"]),
    "flux": (["single_blocks", "double_blocks"], ["norm", "mod"]),
    "flux2": (["double_blocks", "single_blocks"],
              ["norm", "pe_embedder", "time_in", "_modulation"]),
    "qwen_image": (["transformer_blocks"], ["norm", "time_text_embed"]),
    "z_image": (["layers.", "noise_refiner.", "context_refiner."],
                ["_modulation", ".norm_", "_norm"]),
    "hidream_o1": (
        ["language_model.layers", "visual.blocks", "visual.merger", "t_embedder1", "x_embedder",
         "final_layer2"], ["norm", "rotary", "pos_embed", "embed_tokens", "lm_head"]),
    "krea2": (["blocks."], ["mod.", "norm", "txtfusion"]),
    "ideogram4": (["layers."], ["norm", "adaln"]),
}  # fmt: skip
# What else is kept here: modulation, embedders and heads, and what a variant has beside the model.
SPARED = {
    "hunyuan_video_15": ("img_mod.lin", "txt_mod.lin"),
    "hidream_o1": ("t_embedder1.", "x_embedder.", "final_layer2."),
    "wan": ("face_adapter.fuser_blocks.",),
}
# What musubi-tuner has no list entry for.
MORE = {"z_image": "siglip_refiner."}
FP8, INT8, NVFP4 = FORMATS["fp8_e4m3"], FORMATS["int8_row"], FORMATS["nvfp4"]


def plan(shapes: Shapes, dtype: str = "BF16") -> Plan:
    """Of a file with tensors of these names and sizes."""
    infos, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        infos[key] = TensorInfo(dtype, tuple(shape), start, end)
    reader: Any = SimpleNamespace(header=Header(infos, {}, 0, end), path="file.safetensors")
    return Plan(reader, Outcome(), None)


@cache
def model(kind: str, variant: str = "base") -> Plan:
    return plan({f"{name}.weight": tuple(s) for name, s in MODELS[kind, variant].items()})


def names(choice: Choice) -> set[str]:
    return set(choice.chosen.values())


@cache
def take(kind: str, variant: str = "base", form: Any = INT8, keep: tuple[str, ...] = ()) -> Choice:
    return choose(model(kind, variant), form, ARCHITECTURES[kind], keep)


@pytest.mark.parametrize(("kind", "variant"), [key for key in MODELS if key[0] in MUSUBI])
def test_agrees_with_published_lists(kind: str, variant: str) -> None:
    targets, excludes = MUSUBI[kind]
    shapes = MODELS[kind, variant]
    theirs = {
        name for name, shape in shapes.items() if len(shape) == 2 and math.prod(shape) >= 1 << 14
        and any(part in f"{name}." for part in targets)
        and not any(part in f"{name}.weight" for part in excludes)
    }  # fmt: skip
    spared = {name for name in theirs if any(part in name for part in SPARED.get(kind, ()))}
    more = {
        name for name in shapes if name.startswith(MORE.get(kind, " ")) and len(shapes[name]) == 2
    }
    assert names(take(kind, variant)) - more == theirs - spared


SENSITIVE = (
    "norm",
    "embed",
    "head.",
    "adaln",
    "modulation",
    "time_",
    "final_layer",
    "_mod.",
    ".mod.",
)
# A third of the model and more, quantised in the files that Comfy-Org publishes.
LARGE = {"qwen_image": "_mod.", "mage_flow": "_mod.", "minimax_h3": "adaln"}


@pytest.mark.parametrize(("kind", "variant"), MODELS)
def test_sensitive_layers_of_every_model_stay(kind: str, variant: str) -> None:
    found = names(take(kind, variant))
    parts = [part for part in SENSITIVE if part != LARGE.get(kind)]
    assert not [n for n in found if any(part in f"{n}.".lower() for part in parts)]
    assert found < {n for n, shape in MODELS[kind, variant].items() if len(shape) == 2}


def test_every_architecture_has_a_list() -> None:
    specs = [spec for spec in ARCHITECTURES.values() if "model" in spec.parts]
    assert len(specs) > 40
    assert [spec.id for spec in specs if not spec.keep] == []


@pytest.mark.parametrize(("kind", "variant"), MODELS)
def test_of_unknown_models_no_more_is_taken(kind: str, variant: str) -> None:
    """Nothing that the lists keep, and most of the rest: not the refiners and gates of some."""
    unknown = choose(model(kind, variant), INT8, None, [])
    known = names(take(kind, variant))
    assert names(unknown) <= known
    assert any("not known" in warning for warning in unknown.warnings)
    unsure = ("refiner.", "gate", "merger", LARGE.get(kind, "-"))
    assert not [n for n in known - names(unknown) if not any(part in n for part in unsure)]


def test_packed_formats_spare_what_tells_the_width() -> None:
    read = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    assert read in names(take("sd15", form=INT8))
    packed = take("sd15", form=NVFP4)
    assert "columns" in packed.kept[read]
    assert "down_blocks.1.0.channelwise.0" in take("cascade_b", "full", NVFP4).kept


BLOCK = "double_blocks.0.img_attn.proj"


def flux(shape: tuple[int, ...], dtype: str = "BF16") -> Choice:
    """What becomes of one layer of this size of Flux."""
    shapes = {f"{n}.weight": tuple(s) for n, s in MODELS["flux", "dev"].items()}
    return choose(plan(shapes | {f"{BLOCK}.weight": shape}, dtype), FP8, ARCHITECTURES["flux"], [])


@pytest.mark.parametrize(
    ("shape", "why"),
    [((128, 128), ""), ((128, 112), "small"), ((16, 1000000), ""), ((0, 4096), "does not fit"),
     ((3072, 3080), "does not fit"), ((3080, 3072), "3080 x 3072 does not fit")],
)  # fmt: skip
def test_small_and_odd_weights_stay(shape: tuple[int, ...], why: str) -> None:
    choice = flux(shape)
    assert (BLOCK in names(choice)) == (not why)
    assert why in choice.kept.get(BLOCK, "")


@pytest.mark.parametrize("shape", [(), (3072,), (8, 256, 256), (64, 64, 3, 3)])
def test_what_is_no_matrix_is_not_looked_at(shape: tuple[int, ...]) -> None:
    choice = flux(shape)
    assert BLOCK not in names(choice) | choice.kept.keys()


def test_weights_that_are_no_plain_numbers_stay() -> None:
    with pytest.raises(AdapterLabError, match="int8 is no plain weight"):
        flux((3072, 3072), "I8")


def test_asked_layers_stay() -> None:
    choice = take(
        "flux", "dev", keep=(r"double_blocks\.0\..*", r"single_blocks\.\d+\.linear2", " ")
    )
    assert not [n for n in names(choice) if n.startswith("double_blocks.0.")]
    assert "single_blocks.1.linear2" not in names(choice)
    assert {BLOCK: "as asked"}.items() <= choice.kept.items()
    assert "single_blocks.1.linear1" in names(choice)
    assert not choice.warnings


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("img_attn", r"as '.*img_attn.*' does 'double_blocks.0.img_attn.qkv'"),
        (r"img_mlp\.[01]", r"does 'double_blocks.0.img_mlp.0'"),
        (f"{BLOCK}.weight", f"called as in '{BLOCK}'"),
        (f"model.diffusion_model.{BLOCK}", f"called as in '{BLOCK}'"),
        (f"diffusion_model.{BLOCK}.weight", f"called as in '{BLOCK}'"),
        ("nothing_of_it", ""),
        ("(?i)IMG_ATTN", ""),
        ("x" * 998, ""),
        (r"(\w+)+!", ""),  # takes exponential time where ways are tried one after another
        (r"(.*)*(.*)*=", ""),
    ],
)
def test_patterns_that_match_nothing_are_told(text: str, hint: str) -> None:
    choice = take("flux", "dev", keep=(text,))
    (warning,) = choice.warnings
    assert warning.startswith(f"'{text}' in 'keep' matches no linear layer")
    assert hint in warning
    assert hint or warning.endswith("layer")
    assert names(choice) == names(take("flux", "dev"))


@pytest.mark.parametrize("text", ["(", "a{2,1}", r"(a)\1", "x" * 1001])
def test_what_is_no_pattern_is_an_error(text: str) -> None:
    with pytest.raises(AdapterLabError, match="is not a regular expression"):
        take("flux", "dev", keep=(text,))


@pytest.mark.parametrize(
    ("kind", "form", "known", "keep", "fix"),
    [("flux", INT8, "flux", [".*"], "fewer"), ("flux", INT8, "flux", [".*_blocks.*"], "fewer"),
     ("flux", INT8, "wan", [], "architecture"), ("omnigen2", FP8, "omnigen2", [], "format")],
)  # fmt: skip
def test_no_layer_left_is_an_error(kind: str, form: Any, known: str, keep: Any, fix: str) -> None:
    variant = "dev" if kind == "flux" else "base"
    with pytest.raises(AdapterLabError, match=f"no layer to quantise(.|\n)*{fix}"):
        choose(model(kind, variant), form, ARCHITECTURES[known], keep)


def test_a_budget_keeps_the_worst() -> None:
    def spent(worst: int, most: float) -> Choice:
        choice = Choice(chosen={f"{x}.weight": x for x in "abcde"}, kept={"z": "small"})
        choice.spend({f"{x}.weight": e for x, e in zip("abcde", errors, strict=True)}, worst, most)
        return choice

    errors = (0.02, 0.05, 0.03, 0.05, 0.01)
    assert spent(0, 0).chosen == {f"{x}.weight": x for x in "abcde"}
    assert set(spent(1, 0).kept) == {"z", "b"}  # of two equal ones the first
    assert set(spent(3, 0).kept) == {"z", "b", "d", "c"}
    assert set(spent(0, 0.03).kept) == {"z", "b", "d"}  # not what reaches it
    both = spent(3, 0.04)
    assert set(both.kept) == {"z", "b", "d", "c"}
    assert [both.kept[x] for x in "bc"] == [
        "its error would be above 4 %",
        "one of the largest errors",
    ]
    for worst, most in ((5, 0), (99, 0), (0, 0.005)):
        with pytest.raises(AdapterLabError, match=r"leaves no layer(.|\n)*from 1.00% to 5.00%"):
            spent(worst, most)


def state(made: Any, prefix: str = "") -> Shapes:
    return {prefix + key: tuple(tensor.shape) for key, tensor in made.state_dict().items()}


def meta(build: Any, *options: Any, **more: Any) -> Shapes:
    with torch.device("meta"):
        return state(build(*options, **more))


SMALL = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16)
LLM = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)  # fmt: skip
CLIP = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
T5 = dict(vocab_size=64, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2)
STREAMS = SMALL | dict(num_single_layers=2, joint_attention_dim=64, pooled_projection_dim=64)
NETS = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
OTHERS = {
    # As in files: this class is called text_model in them.
    "clip": ("a text encoder", lambda: {
        f"text_model.{key.removeprefix('text_model.')}": shape for key, shape in meta(
            transformers.CLIPTextModel, transformers.CLIPTextConfig(**CLIP)).items()}),
    "t5": ("a text encoder", lambda: meta(
        transformers.T5EncoderModel, transformers.T5Config(**T5))),
    "qwen": ("a text encoder", lambda: meta(
        transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**LLM))),
    "clip_vision": ("an image encoder", lambda: meta(
        transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig(**CLIP))),
    "vae_diffusers": ("a VAE", lambda: meta(
        diffusers.AutoencoderKL, block_out_channels=(32,), norm_num_groups=8)),
    # LDM's and Wan's own names.
    "vae": ("a VAE", lambda: {"encoder.conv_in.weight": (128, 3, 3, 3),
            "decoder.mid.attn_1.q.weight": (512, 512, 1, 1)}),
    "vae_wan": ("a VAE", lambda: {"encoder.conv1.weight": (96, 3, 3, 3, 3),
            "decoder.middle.0.residual.2.weight": (384, 384, 3, 3, 3)}),
    "controlnet": ("a ControlNet", lambda: meta(
        diffusers.ControlNetModel, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=64, attention_head_dim=8, conditioning_embedding_out_channels=(16, 32),
        **NETS)),
    "controlnet_flux": ("a ControlNet", lambda: meta(
        diffusers.FluxControlNetModel, axes_dims_rope=[4, 4, 8], **STREAMS)),
    "controlnet_ldm": ("a ControlNet", lambda: {
        "control_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320)}),
    "flux": ("diffusers' names.*FLUX.1", lambda: meta(
        diffusers.FluxTransformer2DModel, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
        **STREAMS)),
    "sd3": ("diffusers' names.*SD3", lambda: meta(
        diffusers.SD3Transformer2DModel, sample_size=8, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=64, **SMALL)),
    "sd15": ("diffusers' names.*SD1.5", lambda: meta(
        diffusers.UNet2DConditionModel, cross_attention_dim=768)),
    "wan": ("diffusers' names.*Wan", lambda: meta(
        diffusers.WanTransformer3DModel, num_layers=2, num_attention_heads=2,
        attention_head_dim=64, text_dim=64, ffn_dim=128)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_something_else_are_named(kind: str) -> None:
    what, build = OTHERS[kind]
    with pytest.raises(AdapterLabError, match=f"(has|is) {what}"):
        settle(found := plan(build()), model_keys(found))


def test_a_checkpoint_is_the_model_that_is_in_it() -> None:
    whole = {
        f"model.diffusion_model.{n}.weight": tuple(s) for n, s in MODELS["sd15", "base"].items()
    }
    whole |= {f"first_stage_model.{n}": s for n, s in OTHERS["vae"][1]().items()}
    whole |= {f"cond_stage_model.transformer.{n}": s for n, s in OTHERS["clip"][1]().items()}
    spec: ArchSpec = ARCHITECTURES["sd15"]
    choice = choose(plan(whole), INT8, spec, [])
    assert names(choice) == names(take("sd15"))
    assert all(key.startswith("model.diffusion_model.") for key in choice.chosen)
    assert names(choose(plan(whole), INT8, None, [])) == names(
        choose(model("sd15"), INT8, None, [])
    )
