"""A TAESD-shaped autoencoder: a closed-form encoder and a trained decoder.

The encoder is linear: 8x8 pixel patches on their 16 leading principal directions. Trained end to
end from a random start the pair sits on a plateau for minutes; with the encoder given, the decoder
alone converges at once, and latents cost one matrix product.
"""

import numpy as np
import torch
from shapes import SIZE, base_caption, draw, scribble
from stage import cosine
from torch import nn
from torch.nn import functional as F

PATCH, CHANNELS, TRUNK = 8, 16, 64
# The scale and shift of ComfyUI's Flux latent format; stored in the file they cancel it, and the
# transformer sees the encoder's own output.
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159
WHITEN, LEVEL = 0.6, 0.75
STEPS, FULL_STEPS, BATCH, PEAK_LR = 2600, 500, 16, 1.2e-3


def conv(n_in, n_out, **options):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


class Block(nn.Module):
    """Three convolutions beside an identity, ``relu(conv(x) + x)``."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            conv(TRUNK, TRUNK), nn.ReLU(), conv(TRUNK, TRUNK), nn.ReLU(), conv(TRUNK, TRUNK)
        )

    def forward(self, x):
        return F.relu(self.conv(x) + x)


class Squash(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


def encoder():
    """(b, 3, h, w) in [0, 1] -> (b, 16, h/8, w/8)."""
    layers = [conv(3, TRUNK), Block()]
    for _ in range(3):
        layers += [conv(TRUNK, TRUNK, stride=2, bias=False), Block(), Block(), Block()]
    return nn.Sequential(*layers, conv(TRUNK, CHANNELS))


def decoder():
    """(b, 16, h, w) -> (b, 3, 8h, 8w), about [0, 1]."""
    layers = [Squash(), conv(CHANNELS, TRUNK), nn.ReLU()]
    for _ in range(3):
        layers += [Block(), Block(), Block(), nn.Upsample(scale_factor=2)]
        layers += [conv(TRUNK, TRUNK, bias=False)]
    return nn.Sequential(*layers, Block(), conv(TRUNK, 3))


def mixed_pictures(seed, count):
    """``count`` pictures, 60 % of the base world and 40 % scribbles; (n, 3, 64, 64) uint8."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for picture in pictures:
        free = draw(rng, base_caption(rng)) if rng.random() < 0.6 else scribble(rng)
        picture[:] = np.round(free * 255)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def patches(pictures):
    """(n, 3, h, w) in [0, 1] -> (n, 192, h/8, w/8) in the channel order of two unshuffles."""
    x = F.pixel_unshuffle(F.pixel_unshuffle(pictures, 2), 2)
    return F.pixel_unshuffle(x, 2)


def linear_code(pictures):
    """Directions (16, 192), scales (16,) and offsets (16,) of the code, rounded to bf16.

    Principal directions of the patches; a channel of deviation s is divided by s^WHITEN, which
    leaves the leading ones louder, so that they are drawn first. Edges are rare and their tails
    long: a LEVEL (RMS) below one keeps them inside the decoder's squash.
    """
    x = patches(pictures).movedim(1, -1).reshape(-1, 3 * PATCH * PATCH).double()
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    values, vectors = values.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS].T
    vectors = vectors * vectors.sum(1, keepdim=True).sign()
    deviation = values.sqrt()
    left = deviation ** (1 - WHITEN)
    scale = LEVEL * deviation**-WHITEN / left.square().mean().sqrt()
    directions = vectors.bfloat16()
    scale = scale.bfloat16()
    offset = (scale.double() * (directions.double() @ x.mean(0))).bfloat16()
    return directions.float(), scale.float(), offset.float()


def encode(code, pictures):
    """What the encoder network gives, as one product; (n, 3, h, w) -> (n, 16, h/8, w/8)."""
    directions, scale, offset = code
    return F.conv2d(patches(pictures), (scale[:, None] * directions)[..., None, None], -offset)


@torch.no_grad()
def build_encoder(code):
    """Write the linear code into the network: unshuffle, unshuffle, project, recombine.

    Pictures are not negative, so blocks of zeros pass them on; a projection may be, so it travels
    as the pair (relu(p), relu(-p)).
    """
    directions, scale, offset = code
    net = encoder()
    for parameter in net.parameters():
        parameter.zero_()
    for c in range(3):
        net[0].weight[c, c, 1, 1] = 1
    for layer, width in ((net[2], 3), (net[6], 12)):
        for c in range(width):
            for tap in range(4):
                layer.weight[4 * c + tap, c, 1 + tap // 2, 1 + tap % 2] = 1
    taps = directions.reshape(CHANNELS, 48, 2, 2)
    net[10].weight[:CHANNELS, :48, 1:, 1:] = taps
    net[10].weight[CHANNELS : 2 * CHANNELS, :48, 1:, 1:] = -taps
    for c in range(CHANNELS):
        net[14].weight[c, c, 1, 1], net[14].weight[c, CHANNELS + c, 1, 1] = scale[c], -scale[c]
    net[14].bias.copy_(-offset)
    return net


@torch.no_grad()
def start_decoder(latents, pictures):
    """A decoder that begins as a blurry inverse: near-identity trunk, least-squares read-out."""
    net = decoder()
    first = net[1].weight
    for c in range(CHANNELS):
        first[2 * c, c, 1, 1], first[2 * c + 1, c, 1, 1] = 1, -1
    for layer in net:
        if isinstance(layer, Block):
            layer.conv[4].weight.mul_(0.2)
            layer.conv[4].bias.zero_()
    for index in (7, 12, 17):
        net[index].weight.mul_(0.2)
        net[index].weight[range(TRUNK), range(TRUNK), 1, 1] += 1
    features = net[:19](latents).movedim(1, -1).reshape(-1, TRUNK)
    features = torch.cat((features, torch.ones(len(features), 1)), 1)
    colours = pictures.movedim(1, -1).reshape(-1, 3)
    ridge = 1e-3 * len(features) * torch.eye(TRUNK + 1)
    solved = torch.linalg.solve(features.T @ features + ridge, features.T @ colours)
    net[19].weight.zero_()
    net[19].weight[:, :, 1, 1], net[19].bias[:] = solved[:TRUNK].T, solved[TRUNK]
    return net


def reconstruction_loss(guess, truth):
    """L1 + 2 MSE + half the L1 of the pixel differences along both axes."""
    error = guess - truth
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def rate(step):
    """Learning rate: warm-up and cosine."""
    return cosine(step, STEPS, PEAK_LR, 50)


def batch_at(step, pictures, code):
    """Step ``step``'s latents and pictures: 32 px crops on the patch grid, whole ones at the end.

    Each step has its own generator, so that a resumed run sees the same batches.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    whole = step >= STEPS - FULL_STEPS
    chosen = pictures[torch.randint(len(pictures), (4 if whole else BATCH,), generator=generator)]
    truth = chosen.float() / 255
    if not whole:
        y, x = (torch.randint(5, (2,), generator=generator) * PATCH).tolist()
        truth = truth[..., y : y + 32, x : x + 32]
    latents = encode(code, truth)
    level = 0.15 * torch.rand(len(truth), 1, 1, 1, generator=generator)
    return latents + level * torch.randn(latents.shape, generator=generator), truth


def psnr(net, code, pictures):
    """Mean PSNR in dB of the round trip of (n, 3, 64, 64) uint8 pictures."""
    truth = pictures.float() / 255
    with torch.no_grad():
        guess = net(encode(code, truth)).clamp(0, 1)
    return (-10 * (guess - truth).square().mean((1, 2, 3)).log10()).mean().item()
