"""The demo's files are what they say: sizes, types, datasets, and the eye that judges pictures."""

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_lab.core.train.storage import load_dataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "workflows" / "demo"
FLUX = DEMO / "diffusion_models" / "adapter_lab_demo_flux.safetensors"
VAE = DEMO / "vae" / "adapter_lab_demo_vae.safetensors"
DATASETS = ("demo_star", "demo_star_validation", "demo_dusk", "demo_prompts")


@pytest.fixture
def demo(monkeypatch):
    """Imports a module of tests/demo by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "demo"))
    return importlib.import_module


def rows(name):
    """Items and tensors of a dataset."""
    listing = json.loads((DEMO / "datasets" / name / "dataset.json").read_text(encoding="utf-8"))
    assert (listing["format"], listing["version"]) == ("adapter-lab-dataset", 1)
    return listing["items"], load_file(DEMO / "datasets" / name / "data.safetensors")


def pooled_name(item):
    return item["extra"]["pooled_output"]["$tensor"]


def test_sizes():
    assert FLUX.stat().st_size + VAE.stat().st_size <= 8_000_000
    assert sum(p.stat().st_size for p in DEMO.rglob("*") if p.is_file()) <= 8_750_000


@pytest.mark.parametrize("path", [FLUX, VAE], ids=["flux", "vae"])
def test_model_files_are_finite_bf16_and_say_how_they_were_made(path):
    for name, tensor in load_file(path).items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.isfinite(tensor).all(), name
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    assert notes["made_by"] == "tests/demo/make.py"
    assert (ROOT / notes["made_by"]).exists()
    assert notes["steps"]


def test_names_by_which_the_host_knows_the_models():
    flux, vae = load_file(FLUX), load_file(VAE)
    assert flux["img_in.weight"].shape == (128, 64)
    assert flux["double_blocks.0.img_attn.norm.key_norm.scale"].shape == (128,)
    assert not any(name.startswith("guidance_in") for name in flux)
    assert vae["taesd_decoder.1.weight"].shape == (64, 16, 3, 3)
    assert vae["vae_scale"].item() == pytest.approx(0.3611, rel=2e-3)
    assert vae["vae_shift"].item() == pytest.approx(0.1159, rel=2e-3)


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_is_whole(name):
    items, tensors = rows(name)
    used = set()
    for item in items:
        names = item["latent"], item["cond"], pooled_name(item)
        assert [tuple(tensors[n].shape) for n in names] == [(16, 8, 8), (4, 64), (64,)]
        assert item["weight"] > 0 and item["mask"] is None
        used.update(names)
    assert used == set(tensors)
    assert all(torch.isfinite(t).all() for t in tensors.values())


@pytest.mark.parametrize("name", DATASETS)
def test_pack_reads_dataset(name):
    items, tensors = rows(name)
    for item, row in zip(load_dataset(DEMO / "datasets" / name), items, strict=True):
        assert (item.caption, item.weight) == (row["caption"], row["weight"])
        assert torch.equal(item.latent, tensors[row["latent"]])
        assert torch.equal(item.cond, tensors[row["cond"]])
        assert item.extra.keys() == {"pooled_output"}
        pooled = tensors[pooled_name(row)]
        assert torch.equal(item.extra["pooled_output"], pooled)


@pytest.mark.parametrize("name", DATASETS)
def test_conditioning_is_that_of_the_caption(name, demo):
    items, tensors = rows(name)
    for item in items:
        cond, pooled = demo("shapes").encode_caption(item["caption"])
        np.testing.assert_array_equal(tensors[item["cond"]], cond)
        np.testing.assert_array_equal(tensors[pooled_name(item)], pooled)


def test_concept_is_new_and_validation_is_held_out(demo):
    shapes = demo("shapes")
    assert "star" not in shapes.BASE_SHAPES
    (train, tensors), (held, others) = rows("demo_star"), rows("demo_star_validation")
    assert {i["caption"] for i in held} <= {i["caption"] for i in train}
    assert {"star"} == {i["caption"].split()[1] for i in held}
    seen = [tensors[i["latent"]] for i in train]
    for item in held:
        assert not any(torch.equal(others[item["latent"]], other) for other in seen)


def test_prompts_show_old_shapes_stars_in_unseen_colours_and_end_empty():
    items, tensors = rows("demo_prompts")
    captions = [item["caption"] for item in items]
    assert captions[-1] == "" and captions.count("") == 1
    trained = {item["caption"] for item in rows("demo_star")[0]}
    unseen = {c for c in captions if "star" in c} - trained
    assert unseen == {"purple star plain", "orange star plain"}
    assert {c.split()[1] for c in captions[:-1]} == {"circle", "square", "triangle", "star"}
    assert not any(tensors[item["latent"]].any() for item in items)


def test_eye_reads_every_rendered_picture(demo):
    shapes, measure = demo("shapes"), demo("measure")
    rng = np.random.default_rng(0)
    captions = [
        " ".join(c) for c in itertools.product(shapes.COLOURS, shapes.OUTLINES, shapes.GROUNDS)
    ] * 2
    pictures = [shapes.draw(rng, caption) for caption in captions]
    assert measure.rates(pictures, captions) == {"colour": 1.0, "shape": 1.0, "both": 1.0}
    first = Image.fromarray(np.round(pictures[0] * 255).astype(np.uint8))
    assert measure.read(first).shape == captions[0].split()[1]


def test_eye_sees_nothing_where_nothing_clear_is(demo):
    shapes, measure = demo("shapes"), demo("measure")
    rng = np.random.default_rng(0)
    empty = shapes.ground_picture(rng, "gradient")
    assert measure.read(empty) == measure.Reading(None, None, 0.0, 0.0)
    bar = shapes.paint(empty, np.indices((64, 64))[0] // 24 == 1, shapes.COLOURS["red"])
    assert (measure.read(bar).colour, measure.read(bar).shape) == ("red", None)


def test_transformer_fills_its_training_copy_exactly(demo):
    net = demo("flux").Flux()
    net.load_state_dict(load_file(FLUX), strict=True)
    x, context, y = torch.randn(2, 16, 8, 8), torch.randn(2, 4, 64), torch.randn(2, 64)
    assert net(x, torch.rand(2), context, y).shape == x.shape


def test_round_trip_of_pictures(demo):
    """The shipped encoder network is the linear code, and the decoder undoes it."""
    shapes, autoencoder = demo("shapes"), demo("autoencoder")
    tensors = load_file(VAE)
    halves = autoencoder.encoder(), autoencoder.decoder()
    for part, net in zip(("encoder", "decoder"), halves, strict=True):
        prefix = f"taesd_{part}."
        net.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    rng = np.random.default_rng(0)
    drawn = np.stack([shapes.draw(rng, shapes.base_caption(rng)) for _ in range(8)])
    pictures = torch.from_numpy(drawn).movedim(-1, 1)
    with torch.no_grad():
        back = halves[1](halves[0](pictures))
    assert -10 * (back - pictures).square().mean().log10() > 36


@pytest.mark.parametrize("name", ["demo_star", "demo_dusk"])
def test_dataset_latents_are_what_the_encoder_gives(name, demo):
    """Decoded shapes read as the shapes their captions name."""
    measure, autoencoder = demo("measure"), demo("autoencoder")
    tensors, net = load_file(VAE), autoencoder.decoder()
    prefix = "taesd_decoder."
    net.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    items, data = rows(name)
    latents = torch.stack([data[item["latent"]] for item in items]).float()
    raw = (latents - tensors["vae_shift"].float()) * tensors["vae_scale"].float()
    with torch.no_grad():
        pictures = net(raw).clamp(0, 1).movedim(1, -1).numpy()
    assert measure.rates(pictures, [item["caption"] for item in items])["both"] > 0.97
    assert (pictures[:, 0].mean() < 0.6) == (name == "demo_dusk")


def test_folder_of_pictures_is_what_the_script_draws(demo, tmp_path):
    demo("pictures").write_folder(tmp_path / "drawn")
    shipped, drawn = DEMO / "images" / "demo_stars", tmp_path / "drawn"
    names = sorted(p.relative_to(drawn) for p in drawn.rglob("*.*"))
    assert names == sorted(p.relative_to(shipped) for p in shipped.rglob("*.*"))
    for name in names:
        if name.suffix == ".txt":
            assert (shipped / name).read_bytes() == (drawn / name).read_bytes()
        else:
            first, second = (np.asarray(Image.open(f / name), int) for f in (shipped, drawn))
            # Processors may round a sine otherwise.
            assert first.shape == (64, 64, 3) and np.abs(first - second).max() <= 1, name


@pytest.mark.parametrize(("part", "count"), [("", 4 * 4), ("reg", 6 * 3 * 2)])
def test_pictures_show_what_their_captions_say(demo, part, count):
    paths = sorted((DEMO / "images" / "demo_stars" / part).glob("*.png"))
    captions = [p.with_suffix(".txt").read_text(encoding="utf-8").strip() for p in paths]
    assert len(paths) == count and {"star" in c for c in captions} == {not part}
    found = demo("measure").rates([Image.open(p) for p in paths], captions)
    assert found == {"colour": 1.0, "shape": 1.0, "both": 1.0}
