"""Architecture tables against diffusers' own classes and its own conversion of original weights.

Every original weight holds numbers of its own in every row, so that the converted weights tell
which rows of which original each diffusers layer is made of.
"""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
from adapter_lab.core.archs import (
    ARCHITECTURES,
    Alias,
    Templates,
    detect,
    detect_metadata,
    detect_stems,
)
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders import single_file_utils as oracle

Shapes = dict[str, tuple[int, ...]]
LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)


def flux() -> Shapes:
    """Original names; 3072 is written into diffusers' conversion."""
    h = 3072
    shapes = {
        "img_in": h, "txt_in": h, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * h,
        **{f"{m}_in.{n}_layer": h for m in ("time", "vector", "guidance") for n in ("in", "out")},
    }  # fmt: skip
    for i in range(2):
        for m in ("img", "txt"):
            rows = {"attn.qkv": 3 * h, "attn.proj": h, "mlp.0": 4 * h, "mlp.2": h, "mod.lin": 6 * h}
            norms = {"attn.norm.query_norm": 128, "attn.norm.key_norm": 128}
            shapes |= {f"double_blocks.{i}.{m}_{n}": r for n, r in (rows | norms).items()}
        rows = {"linear1": 7 * h, "linear2": h, "modulation.lin": 3 * h}
        shapes |= {f"single_blocks.{i}.{n}": r for n, r in rows.items()}
        shapes |= {f"single_blocks.{i}.norm.{n}_norm": 128 for n in ("query", "key")}
    return {name: (rows, 1) if "norm." not in name else (rows,) for name, rows in shapes.items()}


def wan(image: bool) -> Shapes:
    ends = "patch_embedding text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2"
    names = [*ends.split(), "time_projection.1", "head.head"]
    norms = ["img_emb.proj.0", "img_emb.proj.4"] if image else []
    names += ["img_emb.proj.1", "img_emb.proj.3"] if image else []
    for i in range(2):
        block = f"blocks.{i}."
        names += [f"{block}{a}_attn.{x}" for a in ("self", "cross") for x in "qkvo"]
        names += [block + "ffn.0", block + "ffn.2"]
        norms += [f"{block}{a}_attn.norm_{x}" for a in ("self", "cross") for x in "qk"]
        norms += [block + "norm3"]
        names += [f"{block}cross_attn.{x}_img" for x in "kv"] if image else []
        norms += [block + "cross_attn.norm_k_img"] if image else []
    return dict.fromkeys(names, (4, 4)) | dict.fromkeys(norms, (4,))


def unet(widths: tuple[int, ...], depths: tuple[int, ...], res: int, xl: bool = False) -> Shapes:
    """The original UNet: width and transformer depth (0: no attention) by level."""
    names = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    last, middle = len(depths), depths[-1] or 1
    names += ["label_emb.0.0", "label_emb.0.2"] if xl else []

    def resnet(at: str, skip: bool) -> list[str]:
        leaves = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
        return [f"{at}.{leaf}" for leaf in leaves + ["skip_connection"] * skip]

    def transformer(at: str, depth: int) -> list[str]:
        ends = [f"{at}.{leaf}" for leaf in ("norm", "proj_in", "proj_out") if depth]
        leaves = [f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")]
        leaves += ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
        return ends + [f"{at}.transformer_blocks.{i}.{n}" for i in range(depth) for n in leaves]

    n = 1
    for level in range(last):
        wider = widths[level] > widths[max(level - 1, 0)]
        for j in range(res):
            names += resnet(f"input_blocks.{n}.0", skip=wider and j == 0)
            names += transformer(f"input_blocks.{n}.1", depths[level])
            n += 1
        names += [f"input_blocks.{n}.0.op"] if level < last - 1 else []
        n += 1
    for i in (0, 2):
        names += resnet(f"middle_block.{i}", skip=False)
    names += transformer("middle_block.1", middle)
    n = 0
    for level in reversed(range(last)):
        for j in range(res + 1):
            names += resnet(f"output_blocks.{n}.0", skip=True)
            names += transformer(f"output_blocks.{n}.1", depths[level])
            if j == res and level:
                names.append(f"output_blocks.{n}.{1 + bool(depths[level])}.conv")
            n += 1
    norm = re.compile(r".*(in_layers\.0|out_layers\.0|norm\d?)|out\.0")
    shapes: Shapes = {name: (4,) if norm.fullmatch(name) else (4, 4) for name in names}
    shapes |= {name: (4, 4, 1, 1) for name in names if not xl and "proj_" in name}
    return shapes | ({"label_emb.0.0": (4, 2816)} if xl else {})


def linear(shapes: Shapes) -> Shapes:
    """SD2's UNet: SD1's, projecting with linear layers, for states of width 1024."""
    context = {name: (4, 1024) for name in shapes if name.endswith(("attn2.to_k", "attn2.to_v"))}
    return {
        name: shape[:2] if "proj_" in name else shape for name, shape in shapes.items()
    } | context


def meta_flux() -> torch.nn.Module:
    return FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)


def meta_wan(image: bool) -> torch.nn.Module:
    options = {"added_kv_proj_dim": 5120, "image_dim": 1280} if image else {}
    return WanTransformer3DModel(num_layers=2, **options)


def meta_unet(attends: str, **options: object) -> torch.nn.Module:
    """``attends``: "x" for a level with attention, "-" for one without."""
    names = {"x": "CrossAttn{}Block2D", "-": "{}Block2D"}
    options["down_block_types"] = [names[level].format("Down") for level in attends]
    options["up_block_types"] = [names[level].format("Up") for level in reversed(attends)]
    return UNet2DConditionModel(**options)


SDXL = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD2 = {
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 1024,
}
SMALL = {"block_out_channels": (320,), "layers_per_block": 1}
# name -> architecture, original layout, diffusers model
CASES = {
    "flux": ("flux", flux(), meta_flux),
    "wan t2v": ("wan", wan(False), lambda: meta_wan(False)),
    "wan i2v": ("wan", wan(True), lambda: meta_wan(True)),
    "sd15": ("sd15", unet((1, 2, 4, 4), (1, 1, 1, 0), 2), lambda: meta_unet("xxx-")),
    "sd2": ("sd2", linear(unet((1, 2, 4, 4), (1, 1, 1, 0), 2)), lambda: meta_unet("xxx-", **SD2)),
    "sdxl": ("sdxl", unet((1, 2, 4), (0, 2, 10), 2, xl=True), lambda: meta_unet("-xx", **SDXL)),
    "one level": ("sd15", unet((1,), (1,), 1), lambda: meta_unet("x", **SMALL)),
}


def numbered(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Weight and bias of every module, each row a number that occurs nowhere else."""
    count, state = 0, {}
    for name, shape in shapes.items():
        rows = torch.arange(count, count + shape[0])
        state |= {f"{name}.weight": rows.view(-1, 1), f"{name}.bias": rows.clone()}
        count += shape[0]
    return state


def converted(case: str, state: dict[str, torch.Tensor], model: torch.nn.Module):
    if case == "flux":
        # diffusers renames norm scales, which ComfyUI calls weights, and nothing else of them.
        renamed = {k.replace("_norm.weight", "_norm.scale"): v for k, v in state.items()}
        return oracle.convert_flux_transformer_checkpoint_to_diffusers(renamed)
    if case.startswith("wan"):
        return oracle.convert_wan_transformer_to_diffusers(dict(state))
    full = {f"model.diffusion_model.{k}": v for k, v in state.items()}
    return oracle.convert_ldm_unet_checkpoint(full, dict(model.config))


def find(aliases: Templates[Alias], shapes: Shapes, name: str) -> tuple[Alias, str]:
    """(alias, own path) of a diffusers name; every name has one meaning."""
    found = [(alias, alias.own.format(*numbers)) for alias, numbers in aliases.find(name)]
    found = [(alias, path) for alias, path in found if path in shapes]
    assert len(found) == 1, f"{name} means {found}"
    return found[0]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest):
    spec, shapes, build = CASES[request.param]
    with torch.device("meta"):
        model = build()
    state = numbered(shapes)
    spec, theirs = ARCHITECTURES[spec], converted(request.param, state, model)
    return spec, shapes, spec.theirs_in(shapes), model, state, theirs


def test_each_diffusers_layer_is_made_of_the_rows_its_alias_says(case):
    spec, shapes, aliases, model, state, theirs = case
    reached: dict[str, list[torch.Tensor]] = defaultdict(list)
    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    assert names
    for name in names:
        alias, path = find(aliases, shapes, name)
        rows = state[f"{path}.weight"]
        offset, length = alias.span(len(rows), shapes[spec.hidden][0] if spec.hidden else 0)
        rows = rows[offset : offset + length]
        rows = rows if alias.order is None else rows[alias.order(length)]
        assert torch.equal(theirs[f"{name}.weight"], rows) and not alias.refuse, name
        reached[path].append(rows)
    for path, shape in shapes.items():
        if len(shape) > 1:
            rows = torch.cat(reached[path]).flatten()
            assert sorted(rows.tolist()) == state[f"{path}.weight"].flatten().tolist(), path


def test_norms_go_where_diffusers_puts_them(case):
    spec, shapes, aliases, model, state, theirs = case
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 1:
            _, path = find(aliases, shapes, name)
            assert torch.equal(theirs[f"{name}.weight"], state[f"{path}.weight"])


def test_layers_are_the_linear_and_convolution_layers(case):
    spec, shapes, *_ = case
    layers = {path for path, shape in shapes.items() if len(shape) > 1}
    published = spec.layout is None or len([p for p in shapes if p.startswith("input_blocks")]) > 99
    for path in layers if published else ():
        assert [template.format(*n) for template, n in spec.own.find(path)] == [path]
    norms = {template for template in spec.layers if re.search(r"norm\d?$|in_layers\.0", template)}
    assert not norms


def test_no_two_names_of_a_model_are_spelled_alike(case):
    """An underscored stem has one meaning: nothing of the model or of its aliases collides."""
    spec, shapes, aliases, model, *_ = case
    meanings: dict[str, set[object]] = defaultdict(set)
    for path in shapes:
        meanings[path.replace(".", "_")].add((path, None))
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            alias, path = find(aliases, shapes, name)
            meanings[name.replace(".", "_")].add((path, alias.rows))
    assert not {name: paths for name, paths in meanings.items() if len(paths) > 1}


def test_detects_the_model_and_nothing_else(case):
    spec, shapes, *_ = case
    assert detect(shapes) is spec
    assert detect({}) is None
    assert detect({f"net.{name}": shape for name, shape in shapes.items()}) is None


def test_neighbours_are_not_taken_for_ours():
    no_vector = {k: v for k, v in flux().items() if not k.startswith("vector_in")}
    assert detect(no_vector).id == "longcat_image"
    bare = {k: v for k, v in no_vector.items() if "_mod" not in k and "modulation" not in k}
    assert detect(bare) is None
    no_label = {k: v for k, v in CASES["sdxl"][1].items() if not k.startswith("label_emb")}
    assert detect(no_label) is None
    svd = CASES["sd2"][1] | {"middle_block.1.time_stack.0.attn1.to_q": (4, 4)}
    assert detect(svd) is None
    refiner = CASES["sdxl"][1] | {"label_emb.0.0": (4, 2560)}
    assert detect(refiner) is None


@pytest.mark.parametrize("separator", [".", "_"])
@pytest.mark.parametrize("kind", [k for k in CASES if k not in ("one level", "sd2")])
def test_stems_alone_tell_the_architecture(kind, separator):
    spec, shapes, build = CASES[kind]
    with torch.device("meta"):
        model = build()
    theirs = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    own = [path for path, shape in shapes.items() if len(shape) > 1]
    for names in (own, theirs, theirs[: len(theirs) // 2] + ["something.else"]):
        found = detect_stems(name.replace(".", separator) for name in names)
        assert found is ARCHITECTURES[spec]


def test_stems_of_nothing_known_have_no_architecture():
    assert detect_stems([]) is None
    assert detect_stems(["net.0", "net.2"]) is None
    assert detect_stems(["net.0", "net.2", "img_in"]) is None


def test_metadata_decides_where_names_do_not():
    shared = ["middle_block.1.transformer_blocks.0.attn1.to_q"]
    assert detect_stems(shared, {"ss_base_model_version": "sdxl_base_v1-0"}).id == "sdxl"
    assert detect_stems(shared, {"modelspec.architecture": "stable-diffusion-v1/lora"}).id == "sd15"
    assert detect_stems(["net.0"], {"ss_base_model_version": "flux1"}).id == "flux"
    assert detect_stems(["img_in"], {"ss_base_model_version": "wan"}).id == "flux"
    for spec in ARCHITECTURES.values():
        for version in spec.base_versions:
            assert detect_metadata({"ss_base_model_version": version}) is spec


def test_blocks_and_excludes_choose_what_trainers_choose():
    """musubi-tuner's defaults for FLUX and Wan, sd-scripts' attention layers for the UNets."""
    chosen = {}
    for kind in ("flux", "wan i2v", "sd15", "sd2", "sdxl"):
        spec, shapes = ARCHITECTURES[CASES[kind][0]], CASES[kind][1]
        chosen[kind] = [
            path
            for path, shape in shapes.items()
            if len(shape) > 1
            and any(re.fullmatch(rf"(?:{block})\..+", path) for block in spec.blocks)
            and not any(re.fullmatch(exclude, path) for exclude in spec.excludes)
        ]
    leaves = [
        f"{m}_{n}" for m in ("img", "txt") for n in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ]
    assert {path for path in chosen["flux"] if ".1." in path} == {
        *(f"double_blocks.1.{leaf}" for leaf in leaves),
        "single_blocks.1.linear1",
        "single_blocks.1.linear2",
    }
    assert len(chosen["flux"]) == 2 * 10
    assert len(chosen["wan i2v"]) == 2 * 12
    assert all("_attn." in path or ".ffn." in path for path in chosen["wan i2v"])
    # sd-scripts: 192 modules of SD1.5, 722 of SDXL.
    assert len(chosen["sd15"]) == 192
    assert chosen["sd2"] == chosen["sd15"]
    assert len(chosen["sdxl"]) == 722
