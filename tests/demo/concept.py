"""The demo's cached datasets, in the pack's own format.

demo_star             star latents in four colours, then base latents that keep the old shapes
demo_star_validation  other stars of the same kind, for the held-out loss
demo_dusk             base shapes on darker grounds, captioned as if those were plain: a style
demo_prompts          an empty latent with each prompt to sample; the empty prompt comes last
"""

import shutil

import numpy as np
import torch
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.storage import save_dataset
from autoencoder import VAE_SCALE, VAE_SHIFT, encode
from shapes import BASE_SHAPES, COLOURS, draw, encode_caption

SHOWN = ("red", "green", "blue", "yellow")
STARS, HELD_OUT, PRIOR = 4, 4, 2
PROMPTS = (
    "red circle plain",
    "green square plain",
    "blue triangle plain",
    "yellow circle plain",
    "purple square plain",
    "orange triangle plain",
    *(f"{colour} star plain" for colour in COLOURS),
    "",
)


def graph_latents(code, pictures):
    """What VAEEncode puts into LATENT["samples"]; list of (64, 64, 3) -> (n, 16, 8, 8)."""
    scale, shift = (torch.tensor(v).bfloat16().float() for v in (VAE_SCALE, VAE_SHIFT))
    return encode(code, torch.from_numpy(np.stack(pictures)).movedim(-1, 1)) / scale + shift


def stars(code, seed, each):
    """``each`` centred stars of every shown colour, on plain grounds: (captions, latents)."""
    rng = np.random.default_rng(seed)
    captions = [f"{colour} star plain" for colour in SHOWN for _ in range(each)]
    return captions, graph_latents(code, [draw(rng, c, 1.0, (16.5, 17.5)) for c in captions])


def priors(code, seed, each, ground=None):
    """``each`` base pictures of every colour and shape, on plain grounds or on ``ground``."""
    rng = np.random.default_rng(seed)
    captions = [f"{c} {s} plain" for c in COLOURS for s in BASE_SHAPES for _ in range(each)]
    return captions, graph_latents(code, [draw(rng, c, ground=ground) for c in captions])


def write(folder, captions, latents):
    """A dataset in place of the one at ``folder``; one latent for all items is stored once."""
    vectors = {c: [torch.from_numpy(v) for v in encode_caption(c)] for c in captions}
    kept = list(latents.bfloat16()) if len(latents) > 1 else [latents[0].bfloat16()] * len(captions)
    items = [
        TrainItem(latent, vectors[c][0], {"pooled_output": vectors[c][1]}, c)
        for c, latent in zip(captions, kept, strict=True)
    ]
    shutil.rmtree(folder, ignore_errors=True)
    save_dataset(folder, TrainDataset(items))


def write_all(code, folder):
    star_captions, star_latents = stars(code, 6, STARS)
    base_captions, base_latents = priors(code, 7, PRIOR)
    write(
        folder / "demo_star", star_captions + base_captions, torch.cat((star_latents, base_latents))
    )
    write(folder / "demo_star_validation", *stars(code, 8, HELD_OUT))
    write(folder / "demo_dusk", *priors(code, 9, PRIOR, "dusk"))
    write(folder / "demo_prompts", PROMPTS, torch.zeros(1, 16, 8, 8))
