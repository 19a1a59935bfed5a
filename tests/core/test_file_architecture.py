"""What model a file is for where nothing but its names and sizes say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_lab.core.archs import ARCHITECTURES
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.core.keys import ModelIndex, convert, describe, resolve

SPELLINGS = ["comfyui", "kohya", "diffusers", "lycoris", "musubi"]
DATA = Path(__file__).parents[1] / "data"
LISTS = sorted((DATA / "keys").glob("*.json"))
# Layers of FLUX.1 in number, name and size, but for what else is in the model.
ALIKE = {"chroma_kohya": "flux", "sd2_kohya_oft": "sd15"} | {
    f"framepack_musubi_{x}": "flux" for x in ("lora", "loha", "lokr")
}
UNCLEAR = [("framepack", "kohya"), ("framepack", "musubi")]


def model(listed: dict) -> ModelIndex:
    """The model that a list of keys is of, of the variant that has most of its modules."""
    folder = {name.stem.replace("_", ""): name for name in (DATA / "models").glob("*.json")}
    models = json.loads(folder[listed["architecture"].replace("_", "")].read_text("utf-8"))
    if "variant" in listed:
        models = {listed["variant"]: models[listed["variant"]]}
    indices = [
        ModelIndex({f"diffusion_model.{name}.weight": tuple(s) for name, s in shapes.items()})
        for shapes in models.values()
    ]
    names = [set(index) for index in indices]
    return indices[names.index(max(names, key=len))]


def rows(file: Adapter, index: ModelIndex) -> dict[str, set[int]]:
    """Path -> rows that some module of the file changes."""
    entries, report = resolve(file, index)
    assert not report.unmatched, report.to_text()
    changed: dict[str, set[int]] = {}
    for entry in entries:
        start, count = entry.slice[1:] if entry.slice else (0, index[entry.path][0])
        changed.setdefault(entry.path, set()).update(range(start, start + count))
    return changed


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_real_files_that_do_not_say_what_they_are_for(path):
    """Names and sizes tell it; where they don't, it does not matter for the names written."""
    torch.manual_seed(0)
    listed = json.loads(path.read_text("utf-8"))
    file = Adapter({key: torch.rand(shape) if shape else torch.tensor(4.0)
                    for key, shape in listed["keys"].items()})  # fmt: skip
    index, spec = model(listed), ARCHITECTURES[listed["architecture"]]
    before = rows(file, index)
    for spelling in SPELLINGS:
        told = convert(file, spelling, spec.id)
        if (path.stem.split("_")[0], spelling) in UNCLEAR:
            with pytest.raises(AdapterLabError, match=f"several architectures.*{spec.title}"):
                convert(file, spelling)
        else:
            assert set(convert(file, spelling)) == set(told)
        assert rows(told, index) == before, spelling


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_real_files_are_described_as_what_they_are_for(path):
    listed = json.loads(path.read_text("utf-8"))
    file = Adapter({key: torch.empty(shape, device="meta") if shape else torch.tensor(4.0)
                    for key, shape in listed["keys"].items()})  # fmt: skip
    assert describe(file).architecture == ALIKE.get(path.stem, listed["architecture"])


def cosmos(width: int, blocks: int) -> Adapter:
    names = {f"transformer_blocks.{n}.attn1.to_q": (width, width) for n in range(blocks)}
    names |= {f"transformer_blocks.{n}.norm1.linear_1": (256, width) for n in range(blocks)}
    file = Adapter()
    for name, (rows, columns) in names.items():
        file[f"transformer.{name}.lora_A.weight"] = torch.ones(2, columns)
        file[f"transformer.{name}.lora_B.weight"] = torch.ones(rows, 2)
    return file


def test_names_and_sizes_of_two_architectures_are_refused():
    """Of Cosmos 1 and Cosmos Predict2, 14B, which have as many blocks of the same width."""
    file = cosmos(5120, 2)
    with pytest.raises(AdapterLabError) as caught:
        convert(file, "comfyui")
    assert caught.value.found == "Cosmos Predict2, Cosmos 1"
    assert set(convert(file, "diffusers")) == set(file)  # it is called so for both
    file.metadata["modelspec.architecture"] = "cosmos"
    with pytest.raises(AdapterLabError):
        convert(file, "comfyui")
    (first, *_) = convert(file, "comfyui", "cosmos")
    assert first.startswith("diffusion_model.blocks.block0.blocks.0.block.attn.to_q.0.")
    (first, *_) = convert(cosmos(4096, 2), "comfyui")
    assert first.startswith("diffusion_model.blocks.block0.")
    (first, *_) = convert(cosmos(2048, 2), "comfyui")
    assert first.startswith("diffusion_model.blocks.0.self_attn.q_proj.")


@pytest.mark.parametrize(
    ("double", "single", "mlp", "width", "found"),
    [
        (19, 38, 4, 3072, "flux"), (20, 40, 4, 3072, "hunyuan_video"),
        (10, 20, 4, 3072, "longcat_image"), (20, 40, 4, 3584, "hunyuan_image"),
        (54, 0, 4, 2048, "hunyuan_video_15"), (2, 2, 4, 3072, "flux"), (2, 2, 4, 8, "flux"),
    ],
)  # fmt: skip
def test_numbers_of_blocks_tell_models_of_one_width_apart(double, single, mlp, width, found):
    names = {f"transformer_blocks.{n}.ff.net.0.proj": (mlp * width, width) for n in range(double)}
    names |= {f"single_transformer_blocks.{n}.proj_mlp": (mlp * width, width)
              for n in range(single)}  # fmt: skip
    shapes = {f"transformer.{name}.lora_up.weight": (shape[0], 1) for name, shape in names.items()}
    shapes |= {f"transformer.{name}.lora_down.weight": (1, shape[1])
               for name, shape in names.items()}  # fmt: skip
    file = Adapter({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert describe(file).architecture == found


def real(name: str) -> dict[str, torch.Tensor]:
    listed = json.loads((DATA / "keys" / f"{name}.json").read_text("utf-8"))["keys"]
    return {key: torch.empty(shape, device="meta") if shape else torch.tensor(4.0)
            for key, shape in listed.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "matched", "file"),
    [
        ("qwen_image_diffusers", "flux", "21 of 34", "Qwen-Image"),
        ("hunyuan_video_musubi_lora", "flux", "6 of 10", "HunyuanVideo"),
        ("flux_kohya", "chroma", "10 of 13", "FLUX.1"),
        ("chroma_kohya", "chroma", "10 of 10", None),
        ("framepack_musubi_lora", "hunyuan_video", "17 of 17", None),
        ("sd2_kohya", "sd15", "75 of 85", None),
    ],
)
def test_a_file_of_which_most_fits_may_be_for_another_architecture(name, model, matched, file):
    """It is where another has more of its names, such as SD1.5 has not of SD2's."""
    models = json.loads((DATA / "models" / f"{model}.json").read_text("utf-8"))
    shapes = next(iter(models.values()))
    index = {f"diffusion_model.{path}.weight": tuple(shape) for path, shape in shapes.items()}
    _, report = resolve(real(name), index)
    said = [text for text in report.warnings if "The file is for" in text]
    title = ARCHITECTURES[model].title
    assert report.verdict.startswith(matched)
    assert said == ([f"The file is for {file}, the model is {title}"] if file else [])
    assert (report.file_architecture == model) is (file is None)
