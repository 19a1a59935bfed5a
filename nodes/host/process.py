"""The diffusion process of a ComfyUI model, as the training loop wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...core.errors import AdapterLabError
from ...core.train.data import TrainItem, tensors
from .latents import graph
from .session import Session

_MARGIN = 1e-3  # one of the thousand steps that discrete models were trained on


class HostProcess:
    """Implements :class:`core.train.loop.Process` over a :class:`Session`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.model = session.model
        self.sampling = session.patcher.get_model_object("model_sampling")

    @property
    def half(self) -> bool:
        """Whether the model computes in float16."""
        return self.model.get_dtype_inference() == torch.float16

    def latents(self, items: Sequence[TrainItem]) -> Tensor:
        """(b, c, *space) in the model's latent format."""
        batch = torch.stack([item.latent for item in items]).to(self.session.device, torch.float32)
        wanted = self.session.patcher.get_model_object("latent_format")
        if batch.shape[1] != wanted.latent_channels or batch.ndim - 2 != wanted.latent_dimensions:
            raise AdapterLabError(
                "The dataset's latents are not for this model",
                found=f"{batch.shape[1]} channels over {batch.ndim - 2} axes",
                expected=f"{wanted.latent_channels} over {wanted.latent_dimensions}",
                fix="Encode the images with the VAE that belongs to this model",
            )
        return self.model.process_latent_in(batch)

    def sigmas(self, u: Tensor) -> Tensor:
        """Noise levels at fractions ``u`` of the schedule: what a sampler with many steps visits,
        each equally often, the model's shift included."""
        # At the very ends sigma is 0 or infinite, and the network's output has no meaning.
        inside = u.clamp(_MARGIN, 1 - _MARGIN).tolist()
        return torch.tensor([float(self.sampling.percent_to_sigma(v)) for v in inside])

    def corrupt(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t of the model's own forward process."""
        return self.sampling.noise_scaling(sigma, noise.clone(), x0, False)

    def target(self, x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """The network output that denoises ``x_t`` to ``x0``."""
        return self._output(x0, x_t, sigma)

    def predict(self, x_t: Tensor, sigma: Tensor, items: Sequence[TrainItem]) -> Tensor:
        """One forward pass for all items whose conditionings can be stacked, else several."""
        conds = [self._conditioning(item, x_t[i : i + 1]) for i, item in enumerate(items)]
        parts: list[list[int]] = []
        for i, cond in enumerate(conds):
            fits = (p for p in parts if comfy.samplers.cond_equal_size(conds[p[0]], cond))
            part = next(fits, None)
            if part is None:
                parts.append([i])
            else:
                part.append(i)
        outputs = [self._forward(x_t[p], sigma[p], [conds[i] for i in p]) for p in parts]
        order = torch.tensor([i for p in parts for i in p]).argsort()
        return torch.cat(outputs)[order.to(x_t.device)]

    def _forward(self, x_t: Tensor, sigma: Tensor, conds: list[dict[str, Any]]) -> Tensor:
        stacked = comfy.samplers.cond_cat(conds)
        options = self.session.options()
        options |= {"cond_or_uncond": [0], "uuids": [], "sigmas": sigma, "sample_sigmas": sigma}
        denoised = self.model.apply_model(x_t, sigma, transformer_options=options, **stacked)
        return self._output(denoised, x_t, sigma)

    def check(self, items: Sequence[TrainItem]) -> None:
        """One forward pass for each kind of item: channels, widths of the conditioning.

        Raises:
            AdapterLabError: the model fails on an item.
        """
        kinds = {str([i.latent.ndim, _widths(i)]): i for i in items}
        for item in kinds.values():
            try:
                with torch.no_grad():
                    x0 = self.latents([item])
                    self.predict(x0, self.sigmas(torch.tensor([0.5])).to(x0), [item])
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as err:
                raise AdapterLabError(
                    "The model fails on the dataset, most likely on its conditioning",
                    found=f"{_widths(item)} and '{err}'",
                    expected="what the text encoder of this model gives",
                    fix="Encode the captions with the text encoder that belongs to the model",
                ) from err

    def _output(self, denoised: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Invert denoised = a(sigma) x_t + b(sigma) output, which holds for eps, v, EDM and flow
        alike; a and b are read off the model's own function."""
        one, zero = torch.ones_like(x_t), torch.zeros_like(x_t)
        a = self.sampling.calculate_denoised(sigma, zero, one)
        b = self.sampling.calculate_denoised(sigma, one, zero)
        return (denoised - a * x_t) / b

    def _conditioning(self, item: TrainItem, x_t: Tensor) -> dict[str, Any]:
        """What the model makes of one item's conditioning: name -> COND of batch 1."""
        _, entries = graph(item)
        converted = comfy.sampler_helpers.convert_cond(entries)
        device = self.session.device
        encoded = comfy.samplers.encode_model_conds(
            self.model.extra_conds, converted, x_t.detach(), device, "positive",
            latent_image=torch.zeros_like(x_t),
        )  # fmt: skip
        conds = encoded[0]["model_conds"]
        return {name: cond.process_cond(batch_size=1, area=None) for name, cond in conds.items()}


def _widths(item: TrainItem) -> str:
    """The sizes of an item that belong to its model, not to the picture or the prompt."""
    text = "no text" if item.cond is None else f"text of width {item.cond.shape[-1]}"
    more = [f"{n} of width {t.shape[-1]}" for n, t in tensors(item.extra) if t.ndim]
    return ", ".join([f"{item.latent.shape[0]} channels", text, *more])
