"""Make the demo model and its datasets from nothing, in fixed steps and with fixed seeds.

    python tests/demo/make.py --work FOLDER [--stages vae flux data pictures] [--threads 1]

Each stage keeps a checkpoint in the work folder, and a killed run goes on from it.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import autoencoder
import concept
import numpy as np
import pictures
import torch
from flux import Flux, sample
from PIL import Image
from safetensors.torch import save_file
from shapes import BASE_SHAPES, COLOURS, encode_caption
from stage import Stage
from world import BATCH, POOL, STEPS, World, rate

OUT = Path(__file__).resolve().parents[2] / "workflows" / "demo"
log = logging.getLogger("demo")


def make_code(work):
    """The autoencoder's linear code, computed once."""
    path = work / "code.pt"
    if not path.exists():
        pictures = autoencoder.mixed_pictures(1, 2000).float() / 255
        torch.save(autoencoder.linear_code(pictures), path)
    return torch.load(path, weights_only=True)


def make_vae(work):
    code = make_code(work)
    torch.manual_seed(0)
    train, held = autoencoder.mixed_pictures(2, 12000), autoencoder.mixed_pictures(3, 200)
    some = train[:64].float() / 255
    net = autoencoder.start_decoder(autoencoder.encode(code, some), some)
    net = net.to(memory_format=torch.channels_last)

    def loss_at(step):
        latents, truth = autoencoder.batch_at(step, train, code)
        with torch.autocast("cpu", torch.bfloat16):
            guess = net(latents.contiguous(memory_format=torch.channels_last))
        return autoencoder.reconstruction_loss(guess.float(), truth)

    def report():
        log.info("vae: held-out PSNR %.2f dB", autoencoder.psnr(net, code, held))

    stage = Stage(work / "vae.pt", net, (0.9, 0.99))
    stage.run(loss_at, autoencoder.STEPS, autoencoder.rate, 250, report)
    publish_vae(code, net, autoencoder.psnr(net, code, held))


def make_flux(work):
    code = make_code(work)
    train, held = World(code, 4, POOL), World(code, 5, 256)
    torch.manual_seed(0)
    net, judge = Flux(), Flux()
    stage = Stage(work / "flux.pt", net, (0.9, 0.98), ema=0.999)

    def report():
        judge.load_state_dict({key: value.bfloat16() for key, value in stage.average.items()})
        loss = held.held_out_loss(judge)
        log.info("flux: held-out loss %.4f", loss)
        if stage.step % 2000 == 0 or stage.step == STEPS:
            sheet(finished_decoder(work), judge, work / f"sheet_{stage.step}.png")
            publish_flux(stage, loss)

    stage.run(lambda step: train.training_loss(net, step), STEPS, rate, 500, report)


def make_data(work):
    concept.write_all(make_code(work), OUT / "datasets")


def make_pictures(_work):
    pictures.write_folder(OUT / "images" / "demo_stars")


def finished_decoder(work):
    net = autoencoder.decoder()
    net.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["net"])
    return net


def publish(name, tensors, **notes):
    """Write a bf16 file with notes on its making."""
    path = OUT / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.bfloat16().contiguous() for key, value in tensors.items()}
    made = {"made_by": "tests/demo/make.py", "data": "rendered", "license": "Apache-2.0"}
    save_file(tensors, path, metadata={"format": "pt", **made, **notes})
    log.info("wrote %s, %d bytes", path.name, path.stat().st_size)


def publish_vae(code, net, quality):
    """Both halves in one file that ComfyUI takes for a TAESD."""
    tensors = {
        "vae_scale": torch.tensor(autoencoder.VAE_SCALE),
        "vae_shift": torch.tensor(autoencoder.VAE_SHIFT),
    }
    for part, half in (("encoder", autoencoder.build_encoder(code)), ("decoder", net)):
        tensors |= {f"taesd_{part}.{key}": value for key, value in half.state_dict().items()}
    publish(
        "vae/adapter_lab_demo_vae",
        tensors,
        architecture="TAESD, 16 latent channels; encoder in closed form, decoder trained",
        steps=str(autoencoder.STEPS),
        held_out_psnr=f"{quality:.2f} dB",
    )


def publish_flux(stage, loss):
    publish(
        "diffusion_models/adapter_lab_demo_flux",
        stage.average,
        architecture="Flux, hidden 128, 1 double and 3 single blocks, no guidance",
        steps=f"{stage.step} of {STEPS}, batch {BATCH}",
        held_out_loss=f"{loss:.4f}",
    )


@torch.no_grad()
def sheet(decoder, net, path):
    """Every colour and shape, two seeds at cfg 1 (upper half) and at cfg 3 (lower half)."""
    captions = [f"{c} {s} plain" for s in BASE_SHAPES for c in COLOURS]
    context, pooled = (
        torch.from_numpy(np.stack(v)) for v in zip(*map(encode_caption, captions), strict=True)
    )
    empty = tuple(map(torch.from_numpy, encode_caption("")))
    noise = torch.randn(2, len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = [sample(net, n, context, pooled, empty, cfg=cfg) for cfg in (1, 3) for n in noise]
    pictures = decoder(torch.cat(rows)).clamp(0, 1).mul(255).byte().numpy()
    lines = [
        np.concatenate(line, 2) for line in pictures.reshape(len(rows), -1, *pictures.shape[1:])
    ]
    Image.fromarray(np.concatenate(lines, 1).transpose(1, 2, 0)).save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stages", nargs="*", default=["vae", "flux", "data", "pictures"])
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for name in options.stages:
        globals()[f"make_{name}"](options.work)
        log.info("%s done after %.0f s", name, time.monotonic() - start)


if __name__ == "__main__":
    main()
