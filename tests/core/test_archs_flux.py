"""Architecture tables of the image and video transformers against diffusers' own conversions.

Own names and shapes are those of ComfyUI's classes (``data/models``). Where diffusers' conversion
is part of its package it is executed here on weights whose rows are numbered; where it is a
script, what it made of numbered rows is on file (``data/rows``).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from adapter_lab.core.archs import ARCHITECTURES, Alias, ArchSpec, detect, detect_stems
from diffusers.loaders import single_file_utils as oracle

DATA = Path(__file__).resolve().parents[1] / "data"
Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
NORMS = dict(num_layers=2, num_refiner_layers=2)
STREAMS = dict(num_layers=2, num_single_layers=2)
CASCADE = dict(
    in_channels=16, out_channels=16, timestep_ratio_embedding_dim=64, patch_size=1,
    conditioning_dim=2048, block_out_channels=[2048, 2048], num_attention_heads=[32, 32],
    down_num_layers_per_block=[1, 2], up_num_layers_per_block=[2, 1],
    down_blocks_repeat_mappers=[1, 1], up_blocks_repeat_mappers=[1, 1],
    block_types_per_layer=[["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"]]
    * 2,
    clip_text_in_channels=1280, clip_text_pooled_in_channels=1280, clip_image_in_channels=768,
    clip_seq=4, dropout=[0.1, 0.1], timestep_conditioning_type=["sca", "crp"],
    switch_level=[False],
)  # fmt: skip
HIDREAM = dict(
    patch_size=2, in_channels=16, out_channels=16, attention_head_dim=128, num_attention_heads=20,
    caption_channels=[4096, 4096], text_emb_dim=2048, num_routed_experts=4,
    num_activated_experts=2, axes_dims_rope=(64, 32, 32), max_resolution=(128, 128),
    llama_layers=[0, 1],
)  # fmt: skip
DIT = dict(
    num_layers=4, hidden_size=1408, mlp_ratio=4.3637, num_attention_heads=16,
    attention_head_dim=88, patch_size=2, in_channels=4, sample_size=128,
    activation_fn="gelu-approximate", cross_attention_dim=1024, cross_attention_dim_t5=2048,
    pooled_projection_dim=1024,
)  # fmt: skip


class Case(NamedTuple):
    """``convert``: what of diffusers' package converts the released weights; "": on file."""

    spec: str
    variant: str
    model: str
    options: dict[str, Any]
    convert: str = ""


CASES = {
    "flux": Case("flux", "dev", "FluxTransformer2DModel",
                 STREAMS | dict(guidance_embeds=True), "flux_transformer_checkpoint"),
    "flux2": Case("flux2", "dev", "Flux2Transformer2DModel", STREAMS,
                  "flux2_transformer_checkpoint"),
    "chroma": Case("chroma", "base", "ChromaTransformer2DModel", STREAMS,
                   "chroma_transformer_checkpoint"),
    "hunyuan video": Case("hunyuan_video", "t2v",
                          "HunyuanVideoTransformer3DModel", STREAMS | NORMS,
                          "hunyuan_video_transformer"),
    "hunyuan video 1.5": Case("hunyuan_video_15", "meanflow",
                              "HunyuanVideo15Transformer3DModel",
                              NORMS | dict(use_meanflow=True, in_channels=98)),
    "hunyuan image": Case("hunyuan_image", "distilled",
                          "HunyuanImageTransformer2DModel",
                          STREAMS | NORMS | dict(guidance_embeds=True, use_meanflow=True,
                                                 text_embed_2_dim=1472)),
    "sd3.5": Case("sd3", "sd3.5-medium", "SD3Transformer2DModel",
                  dict(num_layers=3, qk_norm="rms_norm", dual_attention_layers=(0, 1),
                       num_attention_heads=24, caption_projection_dim=1536),
                  "sd3_transformer_checkpoint"),
    "sd3": Case("sd3", "sd3-medium", "SD3Transformer2DModel",
                dict(num_layers=3, num_attention_heads=24, caption_projection_dim=1536),
                "sd3_transformer_checkpoint"),
    "mochi": Case("mochi", "base", "MochiTransformer3DModel", dict(num_layers=3),
                  "mochi_transformer_checkpoint"),
    "auraflow": Case("auraflow", "base", "AuraFlowTransformer2DModel",
                     dict(num_mmdit_layers=2, num_single_dit_layers=2),
                     "auraflow_transformer_checkpoint"),
    "pixart": Case("pixart", "alpha", "PixArtTransformer2DModel",
                   dict(num_layers=2, use_additional_conditions=True, caption_channels=4096)),
    "hunyuan dit": Case("hunyuan_dit", "1.0", "HunyuanDiT2DModel", DIT),
    "cascade": Case("cascade_c", "full", "StableCascadeUNet", CASCADE,
                    "stable_cascade_unet_single_file"),
    "hidream": Case("hidream", "base", "HiDreamImageTransformer2DModel",
                    STREAMS | HIDREAM, "hidream_transformer"),
}  # fmt: skip
# Also models without a class of diffusers' that this package has converted.
OURS = [*dict.fromkeys(case.spec for case in CASES.values()), "longcat_image", "ovis_image",
        "cascade_b"]  # fmt: skip


def models(spec: str) -> dict[str, Shapes]:
    """Variant -> own names and shapes of ComfyUI's class."""
    variants = json.loads((DATA / "models" / f"{spec}.json").read_text("utf-8"))
    return {v: {n: tuple(shape) for n, shape in m.items()} for v, m in variants.items()}


def diffusers_model(case: Case) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, case.model)(**case.options)


def resolve(spec: ArchSpec, shapes: Shapes, name: str) -> tuple[Alias, str]:
    """(alias, own path) of a name; it has one meaning, and the model's own names go first."""
    if name in shapes:
        return Alias(name, name), name
    found = [(alias, alias.own.format(*n)) for alias, n in spec.theirs_in(shapes).find(name)]
    found = [(alias, path) for alias, path in found if path in shapes]
    assert len(found) == 1, f"{name} means {found}"
    return found[0]


def rows_of(spec: ArchSpec, shapes: Shapes, name: str, state: State) -> torch.Tensor:
    """The rows that ``name`` is made of, says the table."""
    alias, path = resolve(spec, shapes, name)
    offset, length = alias.span(shapes[path][0], shapes[spec.hidden][0] if spec.hidden else 0)
    rows = state[path][offset : offset + length]
    return rows if alias.order is None else rows[alias.order(length)]


def numbered(shapes: Shapes) -> State:
    """Each row a number that occurs nowhere else."""
    count, state = 0, {}
    for name, shape in shapes.items():
        rows = torch.arange(count, count + shape[0])
        state[name] = rows.view(-1, 1) if len(shape) > 1 else rows
        count += shape[0]
    return state


def released(spec: ArchSpec, state: State) -> State:
    """Weights and biases under the names of the released code, as far as it has its own."""
    whole = [a for a in spec.aliases if a.family == "original" and a.rows is None]
    theirs = {alias.own: alias.theirs for alias in whole}
    parameters = ("pos_embed", "positional_encoding", "register_tokens", "pos_frequencies")
    full: State = {}
    for path, rows in state.items():
        template, numbers = next(spec.own.find(path), (path, ()))
        name = theirs.get(template, template).format(*numbers)
        ends = ("",) if name in parameters or name.endswith(("gamma", "beta")) else (
            ".weight", ".bias")  # fmt: skip
        full |= {name + end: rows.clone() if end == ".bias" else rows for end in ends}
    return full


def scales(state: State) -> State:
    return {re.sub(r"(_norm|norms\.\d+)\.weight$", r"\1.scale", k): v for k, v in state.items()}


def many_blocks(state: State) -> State:
    """Mochi's conversion counts to 48: blocks 1 to 46 alike, the last as the third one here."""
    full = {k.replace("blocks.2.", "blocks.47."): v for k, v in state.items()}
    for i in range(2, 47):
        full |= {k.replace("blocks.1.", f"blocks.{i}."): v for k, v in state.items()
                 if k.startswith("blocks.1.")}  # fmt: skip
    return full


def fused_attention(state: State) -> State:
    """Cascade was released with torch's own attention, its three projections in one."""
    full: State = {}
    for key, rows in state.items():
        name, x, end = re.fullmatch(r"(.*attn\.)to_([qkv])(.*)|.*", key).groups()
        if name:
            fused = f"{name}in_proj{end.replace('.', '_')}"
            parts = [full[fused]] if fused in full else []
            full[fused] = torch.cat([*parts, rows])
        else:
            full[key] = rows
    return full


PREPARE: dict[str, Callable[[State], State]] = {
    "flux": scales, "chroma": scales, "mochi": many_blocks, "cascade": fused_attention,
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest):
    case = CASES[request.param]
    shapes = models(case.spec)[case.variant]
    return request.param, case, ARCHITECTURES[case.spec], shapes, diffusers_model(case)


def test_rows_go_where_diffusers_conversion_puts_them(case):
    kind, case, spec, shapes, model = case
    state = numbered(shapes)
    if case.convert:
        original = PREPARE.get(kind, dict)(released(spec, state))
        theirs = getattr(oracle, f"convert_{case.convert}_to_diffusers")(original)
        expected = {k.removesuffix(".weight"): v for k, v in theirs.items()
                    if v is not None and not k.endswith(".bias")}  # fmt: skip
        expected = {
            k.replace("blocks.47.", "blocks.2."): v
            for k, v in expected.items()
            if not (kind == "mochi" and re.search(r"blocks\.([2-9]|[1-3]\d|4[0-6])\.", k))
        }
    else:
        recorded = json.loads((DATA / "rows" / f"{case.spec}.json").read_text("utf-8"))["rows"]
        expected = {}
        for name, (source, first, count, *swap) in recorded.items():
            rows = rows_of(spec, shapes, source, state)[first : first + count]
            expected[name] = rows.roll(count // 2, 0) if swap else rows
    checked = 0
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is None or name in CONFUSED.get(kind, ()):
            continue
        found = rows_of(spec, shapes, name, state)
        assert torch.equal(found.flatten(), expected[name].flatten()), name
        checked += 1
    assert checked > 20


# Names that mean one layer in the model and another in diffusers: the model's own goes first.
CONFUSED = {"hunyuan dit": {f"blocks.{i}.norm{n}" for i in range(4) for n in (2, 3)}}


def test_every_diffusers_layer_fits_and_together_they_fill_the_model(case):
    kind, case, spec, shapes, model = case
    reached: dict[str, list[int]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            alias, path = resolve(spec, shapes, name)
            offset, length = alias.span(
                shapes[path][0], shapes[spec.hidden][0] if spec.hidden else 0
            )
            assert (length, *shapes[path][1:]) == tuple(module.weight.shape), name
            reached[path] += range(offset, offset + length)
    layers = {path for path in shapes if any(True for _ in spec.own.find(path))}
    matrices = {p for p in layers if next(spec.own.find(p))[0] in spec.layers}
    assert {path: sorted(reached[path]) for path in matrices} == {
        path: list(range(shapes[path][0])) for path in matrices
    }


def test_no_two_names_of_a_model_are_spelled_alike(case):
    """An underscored stem has one meaning: nothing of the model or of its aliases collides."""
    kind, case, spec, shapes, model = case
    meanings: dict[str, set[object]] = defaultdict(set)
    names = [*shapes, *(name for name, m in model.named_modules() if isinstance(m, LAYERS))]
    for alias in spec.aliases:
        if alias.family != "diffusers":
            names += [alias.theirs.format(*n) for n in ((0, 0), (1, 0)) if alias.theirs.count("{}")]
    for name in names:
        found = [a for a, n in spec.theirs_in(shapes).find(name) if a.own.format(*n) in shapes]
        if name in shapes or found:
            alias, path = resolve(spec, shapes, name)
            span = alias.span(shapes[path][0], shapes[spec.hidden][0] if spec.hidden else 0)
            meanings[name.replace(".", "_")].add((path, span))
    assert not {name: paths for name, paths in meanings.items() if len(paths) > 1}


@pytest.mark.parametrize("name", OURS)
def test_detects_the_model_and_nothing_else(name):
    for shapes in models(name).values():
        assert [spec.id for spec in ARCHITECTURES.values() if spec.detect(shapes)] == [name]
        assert ARCHITECTURES[name].hidden in {"", *shapes}
        assert detect({f"net.{path}": shape for path, shape in shapes.items()}) is None


def test_no_model_is_taken_for_two():
    for file in sorted((DATA / "models").glob("*.json")):
        for variant, shapes in models(file.stem).items():
            found = [spec.id for spec in ARCHITECTURES.values() if spec.detect(shapes)]
            assert len(found) <= 1, f"{file.stem} {variant} is taken for {found}"


def test_framepack_is_told_from_hunyuan_video():
    """Its files keep diffusers' names, so they are the model's own."""
    options = STREAMS | NORMS | dict(has_image_proj=True, has_clean_x_embedder=True)
    with torch.device("meta"):
        model = diffusers.HunyuanVideoFramepackTransformer3DModel(**options)
    shapes = {k.removesuffix(".weight"): tuple(v.shape) for k, v in model.state_dict().items()}
    spec = detect(shapes)
    assert spec is ARCHITECTURES["framepack"]
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    assert all(any(True for _ in spec.own.find(name)) for name in layers)
    # On a HunyuanVideo model all but what is FramePack's alone has its place.
    hunyuan = models("hunyuan_video")["t2v"]
    for name in layers:
        if not name.startswith(("clean_x_embedder", "image_projection")):
            resolve(ARCHITECTURES["hunyuan_video"], hunyuan, name)


@pytest.mark.parametrize("separator", [".", "_"])
@pytest.mark.parametrize("kind", CASES)
def test_stems_alone_tell_the_architecture(kind, separator):
    case = CASES[kind]
    names = [n for n, m in diffusers_model(case).named_modules() if isinstance(m, LAYERS)]
    shapes = models(case.spec)[case.variant]
    own = [path for path, shape in shapes.items() if len(shape) > 1]
    for stems in (own, names):
        found = detect_stems(name.replace(".", separator) for name in stems)
        assert found is ARCHITECTURES[case.spec]


@pytest.mark.parametrize("name", OURS)
def test_patterns_match_modules(name):
    spec = ARCHITECTURES[name]
    paths = {path for shapes in models(name).values() for path in shapes}
    for pattern in (*spec.keep, *spec.excludes, *(rf"(?:{b})\..+" for b in spec.blocks)):
        assert any(re.fullmatch(pattern, path) for path in paths), pattern
    for group, globs in spec.groups.items():
        for pattern in globs:
            regex = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
            assert any(re.fullmatch(regex, path) for path in paths), f"{group}: {pattern}"
    assert {"attention", "mlp", "modulation"} <= spec.groups.keys()
