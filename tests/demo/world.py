"""Batches, loss and held-out measure for the transformer: latents of the base world."""

import numpy as np
import torch
from autoencoder import encode
from shapes import SIZE, base_caption, draw, encode_caption
from stage import cosine

STEPS, BATCH, POOL, PEAK_LR = 14500, 64, 65536, 2e-3
COSINE, WARMUP = 26000, 300
LINE = (8000, 10500, STEPS), (1.0, 13 / 18, 0.0)
DROPPED = 0.1


class World:
    """``count`` latents of random base pictures with the vectors of their captions.

    Every batch comes from a generator of its own step, so that a resumed run repeats nothing and
    skips nothing.
    """

    def __init__(self, code, seed, count):
        rng = np.random.default_rng(seed)
        captions = [base_caption(rng) for _ in range(count)]
        names = ["", *sorted(set(captions))]
        vectors = [encode_caption(name) for name in names]
        self.context = torch.from_numpy(np.stack([c for c, _ in vectors]))
        self.pooled = torch.from_numpy(np.stack([p for _, p in vectors]))
        self.prompt = torch.tensor([names.index(c) for c in captions])
        self.latents = torch.empty(count, 16, SIZE // 8, SIZE // 8)
        for start in range(0, count, 256):
            drawn = np.stack([draw(rng, c) for c in captions[start : start + 256]])
            pictures = torch.from_numpy(drawn).movedim(-1, 1)
            self.latents[start : start + len(drawn)] = encode(code, pictures)

    def loss(self, net, chosen, generator, drop=DROPPED):
        """Flow loss |v - (noise - x)|^2 at x_t = (1 - t) x + t noise, averaged."""
        x = self.latents[chosen]
        t = draw_times(len(x), generator)
        noise = torch.randn(x.shape, generator=generator)
        blank = torch.rand(len(x), generator=generator) < drop
        prompt = torch.where(blank, 0, self.prompt[chosen])
        mixed = torch.lerp(x, noise, t[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = net(mixed, t, self.context[prompt], self.pooled[prompt])
        return (velocity.float() - (noise - x)).square().mean()

    def training_loss(self, net, step):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(self.latents), (BATCH,), generator=generator)
        return self.loss(net, chosen, generator)

    @torch.no_grad()
    def held_out_loss(self, net):
        """The loss over all latents with fixed noise, times and full prompts."""
        generator = torch.Generator().manual_seed(0)
        return self.loss(net, torch.arange(len(self.latents)), generator, drop=0.0).item()


def rate(step):
    """Learning rate: a cosine laid out for COSINE steps, left at 8000 for two lines to zero."""
    start = cosine(min(step, LINE[0][0]), COSINE, PEAK_LR, WARMUP)
    return start * float(np.interp(step, *LINE))


def draw_times(count, generator):
    """Stratified t in (0, 1): three quarters sigmoid of N(0.1, 1.2), a quarter uniform; (b,)."""
    strata = torch.randperm(count, generator=generator)
    u = (strata + torch.rand(count, generator=generator)) / count
    normal = 2**0.5 * torch.erfinv((2 * u - 1).clamp(-0.99999, 0.99999))
    even = torch.rand(count, generator=generator) < 0.25
    return torch.where(even, u, torch.sigmoid(0.1 + 1.2 * normal))
