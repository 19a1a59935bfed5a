"""A plain copy of the Flux transformer at toy size, with the original's tensor names, to train.

Hidden 128 in one head, one double and three single blocks, context and vector 64, no guidance:
1,468,608 parameters. Its output agrees with ComfyUI's class to rounding.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

HIDDEN, CHANNELS, PATCH, AXES = 128, 16, 2, (16, 56, 56)
DOUBLE, SINGLE, CONTEXT, VECTOR = 1, 3, 64, 64


class Embed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class Scale(nn.Module):
    """RMS norm with a learned scale."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x):
        return F.rms_norm(x.float(), (HIDDEN,), self.scale, 1e-6).type_as(x)


class QKNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = Scale(), Scale()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.norm = QKNorm()

    def heads(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.norm.query_norm(q), self.norm.key_norm(k), v


class Modulation(nn.Module):
    """(b, d) -> ``parts`` of (b, 1, d), each three being shift, scale and gate."""

    def __init__(self, parts):
        super().__init__()
        self.lin, self.parts = nn.Linear(HIDDEN, parts * HIDDEN), parts

    def forward(self, vec):
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, -1)


def normed(x, shift, scale):
    return F.layer_norm(x, (HIDDEN,), eps=1e-6) * (1 + scale) + shift


def attend(q, k, v, rotation):
    """One head over (b, s, d), queries and keys turned by their positions.

    Written out: at twenty tokens the fused kernel's backward pass costs a sixth of a step.
    """
    q, k = turn(q, rotation), turn(k, rotation)
    return (q @ k.transpose(1, 2) / HIDDEN**0.5).softmax(-1).to(v.dtype) @ v


def turn(x, rotation):
    """Rotary embedding of (b, s, d) on interleaved pairs; ``rotation``: cos and sin (s, d/2)."""
    cos, sin = rotation
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * a - sin * b, sin * a + cos * b), -1).flatten(-2).type_as(x)


class DoubleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        for side in ("img", "txt"):
            setattr(self, f"{side}_mod", Modulation(6))
            setattr(self, f"{side}_attn", Attention())
            mlp = nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU("tanh"), nn.Linear(4 * HIDDEN, HIDDEN)
            setattr(self, f"{side}_mlp", nn.Sequential(*mlp))

    def forward(self, img, txt, vec, rotation):
        mods = self.txt_mod(vec), self.img_mod(vec)
        streams = (txt, self.txt_attn, self.txt_mlp), (img, self.img_attn, self.img_mlp)
        parts = [a.heads(normed(x, *m[:2])) for (x, a, _), m in zip(streams, mods, strict=True)]
        mixed = attend(*(torch.cat(p, 1) for p in zip(*parts, strict=True)), rotation)
        pieces = mixed.split((txt.shape[1], img.shape[1]), 1)
        out = []
        for (x, attn, mlp), m, piece in zip(streams, mods, pieces, strict=True):
            x = x + m[2] * attn.proj(piece)
            out.append(x + m[5] * mlp(normed(x, *m[3:5])))
        return out[1], out[0]


class SingleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(HIDDEN, 7 * HIDDEN)
        self.linear2 = nn.Linear(5 * HIDDEN, HIDDEN)
        self.norm, self.modulation = QKNorm(), Modulation(3)

    def forward(self, x, vec, rotation):
        shift, scale, gate = self.modulation(vec)
        sizes = HIDDEN, HIDDEN, HIDDEN, 4 * HIDDEN
        q, k, v, mlp = self.linear1(normed(x, shift, scale)).split(sizes, -1)
        mixed = attend(self.norm.query_norm(q), self.norm.key_norm(k), v, rotation)
        return x + gate * self.linear2(torch.cat((mixed, F.gelu(mlp, approximate="tanh")), -1))


class Final(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, CHANNELS * PATCH * PATCH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 2 * HIDDEN))

    def forward(self, x, vec):
        return self.linear(normed(x, *self.adaLN_modulation(vec)[:, None].chunk(2, -1)))


class Flux(nn.Module):
    """Velocity of the flow; the last layer and all modulations start at zero."""

    def __init__(self):
        super().__init__()
        self.img_in = nn.Linear(CHANNELS * PATCH**2, HIDDEN)
        self.txt_in = nn.Linear(CONTEXT, HIDDEN)
        self.time_in, self.vector_in = Embed(256), Embed(VECTOR)
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(DOUBLE))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(SINGLE))
        self.final_layer = Final()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "mod" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
        self.rotations = {}

    def rotation(self, tokens, rows, columns):
        """cos and sin (s, 64) for text at the origin, then image tokens at (0, row, column)."""
        key = tokens, rows, columns
        if key not in self.rotations:
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            places = torch.stack((torch.zeros_like(y), y, x), -1).flatten(0, 1)
            places = torch.cat((torch.zeros(tokens, 3), places)).double()
            angles = [
                places[:, i, None] * 10000.0 ** -(torch.arange(0, d, 2).double() / d)
                for i, d in enumerate(AXES)
            ]
            angles = torch.cat(angles, -1)
            self.rotations[key] = angles.cos().float(), angles.sin().float()
        return self.rotations[key]

    def forward(self, x, t, context, y):
        """x (b, 16, h, w), t (b,) in [0, 1], context (b, s, 64), y (b, 64) -> (b, 16, h, w)."""
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        img = self.img_in(F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2))
        vec = self.time_in(time_waves(t)) + self.vector_in(y)
        txt, rotation = self.txt_in(context), self.rotation(context.shape[1], rows, columns)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rotation)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec, rotation)
        out = self.final_layer(img[:, txt.shape[1] :], vec).transpose(1, 2)
        return F.pixel_shuffle(out.unflatten(2, (rows, columns)), PATCH)


def time_waves(t):
    """Sinusoids of 1000 t, cosines first; (b,) -> (b, 256)."""
    angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat((angles.cos(), angles.sin()), -1)


@torch.no_grad()
def sample(net, noise, context, y, empty, steps=20, cfg=1.0):
    """Euler along a straight schedule from t = 1 to 0; ``empty`` is the (context, y) of ""."""
    x, times = noise, torch.linspace(1, 0, steps + 1)
    for now, then in zip(times[:-1], times[1:], strict=True):
        t = now.expand(len(x))
        velocity = net(x, t, context, y)
        if cfg != 1:
            free = net(x, t, *(e.expand(len(x), *e.shape) for e in empty))
            velocity = free + cfg * (velocity - free)
        x = x + (then - now) * velocity
    return x
