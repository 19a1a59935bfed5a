"""Lists of ComfyUI's own dataset nodes, unchanged into ours."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import encoders
import folder_paths
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.nodes.host import latents, paths
from comfy_extras.nodes_dataset import (
    LoadTrainingDataset,
    MakeTrainingDataset,
    ResolutionBucket,
    SaveTrainingDataset,
)

from nodes import SetLatentNoiseMask

TEXTS = ["a cat", "a dog", "a cat on a mat"]
SIZES = [(64, 64), (64, 64), (48, 80)]  # height, width


@pytest.fixture(scope="module")
def native():
    """LATENT and CONDITIONING lists as the executor passes them on."""
    with torch.inference_mode():
        path = paths.DEMO / "vae" / "adapter_lab_demo_vae.safetensors"
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
        images = [torch.rand(1, *size, 3) for size in SIZES]
        clip = encoders.make("flux")
        return MakeTrainingDataset.execute(images, [vae], [clip], TEXTS).result


def check(dataset, lists):
    """Each latent of a native list, with its own conditioning, in their order."""
    samples = [sample for latent in lists[0] for sample in latent["samples"]]
    assert len(dataset) == len(samples)
    for item, sample, text in zip(dataset, samples, TEXTS, strict=True):
        assert torch.equal(item.latent, sample) and not item.latent.is_inference()
        cond, more = next(c for t, (c,) in zip(TEXTS, lists[1], strict=True) if t == text)
        assert torch.equal(item.cond, cond[0])
        assert torch.equal(item.extra["pooled_output"], more["pooled_output"][0])


def test_made(native):
    check(latents.dataset(*native, [], ""), native)


def test_in_buckets(native):
    """A batch for each resolution, and one entry for each of its samples."""
    lists = ResolutionBucket.execute(*native).result
    assert [tuple(latent["samples"].shape) for latent in lists[0]] == [
        (2, 16, 8, 8), (1, 16, 6, 10),
    ]  # fmt: skip
    assert [len(group) for group in lists[1]] == [2, 1]
    check(latents.dataset(*lists, [], ""), native)


def test_saved_and_loaded(native, tmp_path, monkeypatch):
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "datasets", ([str(tmp_path)], {".pkl"})
    )
    SaveTrainingDataset.execute(*native, ["mine"], [2])
    lists = LoadTrainingDataset.execute("mine").result
    check(latents.dataset(*lists, [], ""), native)


def test_captions_go_with_them(native):
    dataset = latents.dataset(*native, [], "", TEXTS)
    assert [item.caption for item in dataset] == TEXTS
    pairs = [latents.graph(item) for item in dataset]
    again = latents.dataset([p[0] for p in pairs], [p[1] for p in pairs], [], "")
    assert [item.caption for item in again] == TEXTS
    assert [i.caption for i in latents.dataset(*native, [], "", ["x"])] == ["x"] * 3
    with pytest.raises(AdapterLabError, match="2 captions"):
        latents.dataset(*native, [], "", TEXTS[:2])


def test_noise_masks(native):
    """Set Latent Noise Mask says where the loss counts, unless a mask is connected."""
    batch = ResolutionBucket.execute(*native).result
    mask = torch.zeros(1, 32, 32)
    mask[:, :16] = 1
    masked = [SetLatentNoiseMask().set_mask(batch[0][0], mask)[0], batch[0][1]]
    dataset = latents.dataset(masked, batch[1], [], "")
    assert [item.mask is None for item in dataset] == [False, False, True]
    assert torch.equal(dataset[0].mask, mask[0]) and torch.equal(dataset[1].mask, mask[0])
    other = torch.ones(1, 8, 8)
    dataset = latents.dataset(masked, batch[1], [other], "")
    assert all(torch.equal(item.mask, other[0]) for item in dataset)


def test_one_bad_latent_is_named(native):
    bad = {"samples": native[0][1]["samples"].clone()}
    bad["samples"][0, 3, 2, 1] = torch.nan
    with pytest.raises(AdapterLabError, match="Item 1: .*NaN.*latent"):
        latents.dataset([native[0][0], bad, native[0][2]], native[1], [], "")
