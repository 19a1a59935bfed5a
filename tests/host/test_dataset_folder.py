"""Training Dataset from Folder on real files, against ComfyUI's own nodes and Pillow."""

from __future__ import annotations

from pathlib import Path

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import comfy.utils
import encoders
import folder_paths
import numpy as np
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.buckets import Buckets
from adapter_lab.core.train.captions import CaptionConfig
from adapter_lab.core.train.storage import load_dataset, save_dataset
from adapter_lab.nodes.folder import DatasetFolder
from adapter_lab.nodes.host import paths, pictures
from adapter_lab.nodes.host.folder import FolderJob, build
from media import picture, video
from PIL import Image

EMPTY = CaptionConfig(missing="empty")


@pytest.fixture(scope="module")
def vae():
    path = paths.DEMO / "vae" / "adapter_lab_demo_vae.safetensors"
    with torch.inference_mode():
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture(scope="module")
def clip():
    return encoders.make("flux")


@pytest.fixture(scope="module")
def video_vae():
    """Wan 2.1's, a sixteenth as wide."""
    with torch.inference_mode():
        model = comfy.ldm.wan.vae.WanVAE(
            dim=8, z_dim=16, temperal_downsample=[False, True, True]
        )  # fmt: skip
        rng = torch.Generator().manual_seed(0)
        state = {n: torch.randn(t.shape, generator=rng) * 0.1 + (t.ndim == 1 or "gamma" in n)
                 for n, t in model.state_dict().items()}  # fmt: skip
        return comfy.sd.VAE(sd=state)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


def made(vae, clip, source, **options):
    options = {"name": "d", "buckets": Buckets(64, 16), "captions": EMPTY} | options
    return build(FolderJob(vae, clip, source, **options), None)


def test_like_the_native_nodes(vae, clip, source):
    """What Load Image, VAE Encode and CLIP Text Encode make of the same files."""
    from nodes import CLIPTextEncode, VAEEncode

    image = picture(source / "a.png")
    (source / "a.txt").write_text("a cat")
    dataset, report = made(vae, clip, source, captions=CaptionConfig())
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]
    with torch.inference_mode():
        latent = VAEEncode().encode(vae, pixels)[0]["samples"]
        ((cond, extra),) = CLIPTextEncode().encode(clip, "a cat")[0]
    (item,) = dataset
    assert torch.equal(item.latent, latent[0]) and torch.equal(item.cond, cond[0])
    assert torch.equal(item.extra["pooled_output"], extra["pooled_output"][0])
    assert item.caption == "a cat" and not item.latent.is_inference()
    loaded = load_dataset(paths.find_dataset("d"))
    assert loaded.fingerprint == dataset.fingerprint and "1 x 64 x 64" in report


def test_buckets_and_crops(vae, clip, source):
    """The middle of the picture at one scale, by Pillow's own resize and crop."""
    big = picture(source / "a.png", 600, 200, seed=1)
    made_of = {"a.png": (128, 32), "b.png": (48, 64), "c.png": (64, 64)}
    picture(source / "b.png", 50, 70)
    picture(source / "c.png", 300, 310)
    dataset, _ = made(vae, clip, source)
    shapes = [tuple(item.latent.shape[1:]) for item in dataset]
    assert shapes == [(h // 8, w // 8) for w, h in made_of.values()]
    ours = pictures.pixels([big], Buckets(64, 16).plan(600, 200))[0].numpy() * 255
    cut = big.crop((0, 25, 600, 175)).resize((128, 32), Image.Resampling.LANCZOS)
    assert np.abs(ours - np.asarray(cut, np.float32))[2:-2].max() <= 1


def test_only_what_changed_is_encoded_again(vae, clip, source):
    for i in range(3):
        picture(source / f"{i}.png", seed=i)
        (source / f"{i}.txt").write_text(f"picture {i}")
    first, report = made(vae, clip, source, captions=CaptionConfig())
    assert "encoded 6, 0 were" in report
    again, report = made(vae, clip, source, captions=CaptionConfig())
    assert "encoded 0, 6 were" in report and again.fingerprint == first.fingerprint
    (source / "1.txt").write_text("another")
    changed, report = made(vae, clip, source, captions=CaptionConfig())
    assert "encoded 1, 5 were" in report and changed.fingerprint != first.fingerprint
    picture(source / "2.png", seed=9)
    assert "encoded 1, 5 were" in made(vae, clip, source, captions=CaptionConfig())[1]
    assert "encoded 3, 6 were" in made(vae, clip, source, captions=CaptionConfig(), flip=True)[1]
    loaded = load_dataset(paths.find_dataset("d"))
    assert [i.caption for i in loaded] == ["picture 0", "another", "picture 2"]
    (source / "0.png").rename(source / "9.png")
    (source / "0.txt").rename(source / "9.txt")
    assert "encoded 0, 6 were" in made(vae, clip, source, captions=CaptionConfig())[1]


def test_other_models_are_encoded_anew(vae, clip, source, video_vae):
    picture(source / "a.png")
    made(vae, clip, source)
    assert "encoded 1, 1 were" in made(vae, encoders.make("sd15"), source)[1]
    dataset, report = made(video_vae, clip, source)
    assert "encoded 1, 1 were" in report and dataset[0].latent.shape == (16, 1, 8, 8)
    other = clip.clone()
    other.clip_layer(-2)
    assert "encoded 1, 1 were" in made(vae, other, source)[1]
    patched = clip.clone()
    key = "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    patched.patcher.add_patches({key: (torch.randn(32, 32),)})
    assert key in patched.patcher.patches
    assert "encoded 1, 1 were" in made(vae, patched, source)[1]
    assert "encoded 0, 2 were" in made(vae, clip, source)[1]


def test_flip(vae, clip, source):
    image = picture(source / "a.png")
    (item,) = made(vae, clip, source, flip=True)[0]
    (mirrored,) = item.variants
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(source / "a.png")
    assert torch.equal(mirrored.latent, made(vae, clip, source)[0][0].latent)
    assert (item.share, mirrored.share) == (0.5, 0.5)


def test_caption_forms(vae, clip, source):
    picture(source / "a.png")
    (source / "a.txt").write_text("a, b, c, d, e")
    options = CaptionConfig(shuffles=3, keep_tokens=1, dropout=0.25)
    (item,) = made(vae, clip, source, captions=options, flip=True)[0]
    forms = (item, *item.variants)
    assert len(forms) == 8 and sum(f.share for f in forms) == pytest.approx(1)
    assert sum(f.share for f in forms if not f.caption) == pytest.approx(0.25)
    for form in forms:
        with torch.inference_mode():
            ((cond, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(form.caption))
        assert torch.equal(form.cond, cond[0])


def test_missing_captions(vae, clip, source):
    picture(source / "5_sks dog" / "a.png")
    picture(source / "5_sks dog" / "b.png", seed=2)
    with pytest.raises(AdapterLabError, match="2 of 2.*a.png, 5_sks dog/b.png"):
        made(vae, clip, source, captions=CaptionConfig())
    named = CaptionConfig(missing="folder name")
    dataset, _ = made(vae, clip, source, captions=named)
    assert [(i.caption, i.repeats) for i in dataset] == [("sks dog", 5)] * 2
    (source / "5_sks dog" / "b.txt").write_text("\n")
    dataset, _ = made(vae, clip, source, captions=named)
    assert [i.caption for i in dataset] == ["sks dog", ""]
    with pytest.raises(AdapterLabError, match="1 of 2.*a.png"):
        made(vae, clip, source, captions=CaptionConfig())


def test_regularisation_goes_without_the_trigger(vae, clip, source):
    for place in ("4_me", "reg/1_me"):
        for i, text in enumerate(("a person", "[trigger] person", "")):
            picture(source / place / f"{i}.png", seed=i + len(place))
            (source / place / f"{i}.txt").write_text(text)
    captions = CaptionConfig(trigger="ohwx", prefix="photo,")
    found = [(i.regularisation, i.caption) for i in made(vae, clip, source, captions=captions)[0]]
    assert found == [
        (False, "ohwx, photo, a person"), (False, "photo, ohwx person"), (False, "ohwx, photo,"),
        (True, "photo, a person"), (True, "photo,  person"), (True, "photo,"),
    ]  # fmt: skip


def test_regularisation(vae, clip, source):
    picture(source / "4_me" / "a.png")
    picture(source / "reg" / "1_person" / "b.png", seed=2)
    dataset, report = made(vae, clip, source)
    assert [(i.regularisation, i.repeats) for i in dataset] == [(False, 4), (True, 4)]
    assert "1 regularisation item, 8 visits" in report
    assert [i.repeats for i in made(vae, clip, source, balance=False)[0]] == [4, 1]


def test_masks(vae, clip, source):
    picture(source / "a.png")
    half = np.zeros((32, 32), np.uint8)
    half[:, 16:] = 255
    Image.fromarray(half).save(source / "a.mask.png")
    see_through = Image.new("RGBA", (64, 64), (9, 9, 9, 255))
    see_through.paste((0, 0, 0, 0), (0, 0, 64, 32))
    see_through.save(source / "b.png")
    expected = torch.zeros(8, 8)
    expected[:, 4:] = 1
    first, second = made(vae, clip, source, masks="files or alpha", flip=True)[0]
    assert torch.equal(first.mask, expected)
    assert torch.equal(first.variants[0].mask, expected.flip(1))
    assert torch.equal(second.mask, expected.T)
    first, second = made(vae, clip, source)[0]
    assert first.mask is not None and second.mask is None
    assert made(vae, clip, source, masks="off")[0][0].mask is None
    Image.new("L", (64, 64)).save(source / "a.mask.png")
    assert "a.png: Its mask is black" in made(vae, clip, source)[1]


def test_frames_of_clips(vae, video_vae, clip, source):
    video(source / "a.mp4")
    assert pictures.facts(source / "a.mp4") == pictures.Facts((64, 48), 10)
    greys = [np.asarray(f)[:, 16:].mean() for f in pictures.frames(source / "a.mp4", 1, 4, 2)]
    assert greys == pytest.approx([20, 60, 100, 140], abs=4)
    (item,), report = made(video_vae, clip, source)
    assert item.latent.shape == (16, 3, 6, 8) and "frames of a clip: 9" in report
    two, _ = made(video_vae, clip, source, frames=5, clips=3)
    assert [i.latent.shape[1] for i in two] == [2, 2]
    stills, _ = made(vae, clip, source, every=3)
    assert [i.latent.shape for i in stills] == [(16, 6, 8)] * 4
    with pytest.raises(AdapterLabError, match="passed over"):
        made(vae, clip, source, frames=0)


def test_animated_pictures(vae, clip, source):
    shots = [Image.new("RGB", (64, 64), (60 * i,) * 3) for i in range(4)]
    for name in ("a.gif", "b.webp"):
        shots[0].save(source / name, save_all=True, append_images=shots[1:], lossless=True)
    for name in ("a.gif", "b.webp"):
        greys = [np.asarray(f.convert("L")).mean() for f in pictures.frames(source / name, 0, 4)]
        assert greys == pytest.approx([0, 60, 120, 180], abs=2)
    dataset, _ = made(vae, clip, source)
    assert len(dataset) == 8


def broken(source):
    (source / "empty.png").write_bytes(b"")
    (source / "text.jpg").write_text("no picture")
    whole = source / "cut.png"
    picture(whole, 256, 256)
    whole.write_bytes(whole.read_bytes()[:900])
    picture(source / "pixel.png", 1, 1)
    (source / "noise.mp4").write_bytes(bytes(range(256)) * 10)
    (source / "hollow.gif").write_bytes(b"GIF89a")
    return ["cut.png", "empty.png", "hollow.gif", "noise.mp4", "pixel.png", "text.jpg"]


def test_broken_files_are_named_and_left_out(vae, clip, source):
    names = broken(source)
    picture(source / "good.png")
    dataset, report = made(vae, clip, source)
    assert len(dataset) == 1 and "left out 6" in report
    assert all(f"{name}: " in report for name in names)
    for name in names:
        for other in source.iterdir():
            if other.name not in (name, "good.png"):
                other.rename(other.with_suffix(".kept"))
        with pytest.raises(AdapterLabError, match=name):
            made(vae, clip, source, on_unusable="error")
        for other in source.glob("*.kept"):
            other.rename(source / next(n for n in names if n.startswith(f"{other.stem}.")))


def test_nothing_but_broken_files(vae, clip, source):
    (source / "empty.png").write_bytes(b"")
    with pytest.raises(AdapterLabError, match="Nothing in.*empty.png: The file is empty"):
        made(vae, clip, source)
    (source / "empty.png").unlink()
    picture(source / "cut.png")  # known only when it is decoded
    (source / "cut.png").write_bytes((source / "cut.png").read_bytes()[:-500])
    with pytest.raises(AdapterLabError, match="Nothing in.*cut.png: The file cannot be read"):
        made(vae, clip, source)


def test_huge_picture(vae, clip, source, monkeypatch):
    picture(source / "a.png", 200, 200)
    picture(source / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    dataset, report = made(vae, clip, source)
    assert len(dataset) == 1 and "a.png: The picture is too large" in report


def test_the_same_file_twice(vae, clip, source):
    for name in ("a.png", "b.png", "c.png"):
        picture(source / name)
    (source / "c.txt").write_text("with a caption")
    dataset, report = made(vae, clip, source)
    assert [i.caption for i in dataset] == ["", "with a caption"]
    assert "b.png: the same as a.png" in report


def test_cancel_keeps_what_was_encoded(vae, clip, source, monkeypatch):
    for i in range(4):
        picture(source / f"{i}.png", seed=i)
    encode, seen = vae.encode, []

    def cancelling(pixels):
        seen.append(1)
        if len(seen) == 2:
            comfy.model_management.interrupt_current_processing()
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", cancelling)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        made(vae, clip, source)
    assert len(seen) == 2 and "d" not in paths.datasets()
    assert "encoded 3, 2 were" in made(vae, clip, source)[1]


def test_checkpoints_without(vae, clip, source):
    picture(source / "a.png")
    for coders, says in (((None, clip), "no VAE"), ((vae, None), "no text encoder")):
        with pytest.raises(AdapterLabError, match=says):
            made(*coders, source)


@pytest.mark.parametrize(
    ("value", "says"),
    [(torch.nan, "The VAE gives NaN"), (1e38, r"What the VAE gives.*1e\+38 in its latent")],
)
def test_a_vae_that_overflows(vae, clip, source, monkeypatch, value, says):
    """What it gives is not kept for the next run."""
    picture(source / "a.png")
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: encode(pixels) * 0 + value)
    with pytest.raises(AdapterLabError, match=f"a.png: {says}"):
        made(vae, clip, source)
    monkeypatch.undo()
    assert "encoded 1, 1 were" in made(vae, clip, source)[1]


def test_cancel_while_looking_for_pictures(vae, clip, source):
    (source / "a.txt").write_text("before it is known that there are none")
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        made(vae, clip, source)


def test_names(vae, clip, source):
    picture(source / "a.png")
    dataset, _ = made(vae, clip, source)
    save_dataset(paths.dataset_folder("other"), dataset)
    with pytest.raises(AdapterLabError, match="put together"):
        made(vae, clip, source, name="other")
    moved = source.with_name("moved")
    source.rename(moved)
    with pytest.raises(AdapterLabError, match="exists already.*pictures.*moved"):
        made(vae, clip, moved)
    for name in ("../x", "demo_star"):
        with pytest.raises(AdapterLabError):
            made(vae, clip, moved, name=name)
    unnamed, report = made(vae, clip, moved, name="")
    assert unnamed.fingerprint == dataset.fingerprint and sorted(paths.datasets())[-2:] == [
        "demo_star_validation", "other",
    ]  # fmt: skip
    assert "encoded 0, 2 were" in made(vae, clip, moved, name="")[1]


def test_the_demos_pictures():
    assert paths.input_folder("demo_stars") == paths.DEMO / "images" / "demo_stars"
    assert paths.input_folder("nothing").parent == Path(folder_paths.get_input_directory())


def options(**more):
    inputs = DatasetFolder.define_schema().inputs
    usual = {i.id: i.default for i in inputs if i.id not in ("vae", "clip")}
    return usual | more


def test_node(vae, clip, source, monkeypatch):
    """Defaults, a folder below the input folder, and a new run when a file changes."""
    picture(source / "a.png")
    (source / "a.txt").write_text("a cat")
    monkeypatch.setattr(folder_paths, "input_directory", str(source.parent))
    told = options(folder="pictures", resolution=64)
    before = DatasetFolder.fingerprint_inputs(**told)
    with torch.inference_mode():
        dataset, report = DatasetFolder.execute(vae, clip, **told).result
    assert len(dataset) == 1 and "1 x 64 x 64" in report
    assert DatasetFolder.fingerprint_inputs(**told) == before
    (source / "a.txt").write_text("a dog")
    assert DatasetFolder.fingerprint_inputs(**told) != before
    unknown = DatasetFolder.fingerprint_inputs(**{**told, "folder": None})
    assert unknown != unknown
    for folder, says in (
        ("", "No folder"),
        ("../..", "not in ComfyUI's input"),
        ("x", "no folder"),
    ):
        with pytest.raises(AdapterLabError, match=says):
            DatasetFolder.execute(vae, clip, **options(folder=folder))
