"""The diffusion process of a ComfyUI model, as the training loop wants it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_sampling import V_PREDICTION_DDPM
from torch import Tensor

from ...core.errors import AdapterLabError
from ...core.train.data import TrainItem, tensors
from ...core.train.process import Noise
from .conditioning import Conditioner, Conds, Encode, stacks
from .noise import noise
from .session import Session


class HostProcess:
    """Implements :class:`core.train.process.Process` over a :class:`Session`.

    Args:
        guidance: for models that embed it, where the conditioning does not say.
        encode: where a text encoder is trained: item -> its conditioning, with gradients.

    Raises:
        AdapterLabError: the model does not go from noise to data.
    """

    def __init__(
        self, session: Session, guidance: float = 1.0, encode: Encode | None = None
    ) -> None:
        self.session = session
        self.model = session.model
        self.sampling = session.patcher.get_model_object("model_sampling")
        self.noise: Noise = noise(self.sampling)
        self.conditioner = Conditioner(self.model, session.device, guidance, encode)

    @property
    def half(self) -> bool:
        """Whether the model computes in float16."""
        return self.model.get_dtype_inference() == torch.float16

    def latents(self, items: Sequence[TrainItem], what: str = "dataset") -> Tensor:
        """(b, c, *space) in the model's latent format."""
        batch = torch.stack([item.latent for item in items]).to(self.session.device, torch.float32)
        wanted = self.session.patcher.get_model_object("latent_format")
        if batch.shape[1] != wanted.latent_channels or batch.ndim - 2 != wanted.latent_dimensions:
            raise AdapterLabError(
                f"The {what}'s latents are not for this model",
                found=f"{batch.shape[1]} channels over {batch.ndim - 2} axes",
                expected=f"{wanted.latent_channels} over {wanted.latent_dimensions}",
                fix="Encode the images with the VAE that belongs to this model",
            )
        return self.model.process_latent_in(batch)

    def corrupt(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_t of the model's own forward process."""
        x_t = self.sampling.noise_scaling(sigma, noise.clone(), x0, False)
        if isinstance(self.sampling, V_PREDICTION_DDPM):
            # Such a network is given x_t as it is, and was trained on unit variance.
            x_t = x_t / (1 + sigma.square()).sqrt().view(-1, *(1,) * (x_t.ndim - 1))
        return x_t

    def target(self, x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """The network output that denoises ``x_t`` to ``x0``."""
        return self._output(x0, x_t, sigma)

    def predict(
        self,
        x_t: Tensor,
        sigma: Tensor,
        items: Sequence[TrainItem],
        t: Tensor,
        number: int | None = None,
    ) -> Tensor:
        """One forward pass for all items whose conditionings can be stacked, else several.

        Raises when the user cancelled: a step of many batches, or validation, may take minutes.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        conds: list[Conds] = []
        for i, item in enumerate(items):
            # Adapters may be on layers that conditioning passes through.
            self._begin(number, t[i : i + 1], i)
            conds.append(self.conditioner(item, x_t[i : i + 1]))
        parts = stacks(conds)
        if len(parts) == 1:
            self._begin(number, t, len(items))
            return self._forward(x_t, sigma, conds)
        outputs: list[Tensor] = []
        for i, part in enumerate(parts):
            self._begin(number, t[part], len(items) + i)
            outputs.append(self._forward(x_t[part], sigma[part], [conds[j] for j in part]))
        order = torch.tensor([i for part in parts for i in part]).argsort()
        return torch.cat(outputs)[order.to(x_t.device)]

    def _begin(self, number: int | None, t: Tensor, part: int) -> None:
        if number is None:
            self.session.end_batch()
        else:
            self.session.begin_batch(number, t, part=part)

    def _forward(self, x_t: Tensor, sigma: Tensor, conds: list[Conds]) -> Tensor:
        stacked = comfy.samplers.cond_cat(conds)
        options = self.session.options()
        options |= {"cond_or_uncond": [0], "uuids": [], "sigmas": sigma, "sample_sigmas": sigma}
        denoised = self.model.apply_model(x_t, sigma, transformer_options=options, **stacked)
        if denoised.shape != x_t.shape:
            raise AdapterLabError(
                "The model answers in another shape than it was asked in",
                found=str(tuple(denoised.shape)),
                expected=str(tuple(x_t.shape)),
            )
        return self._output(denoised, x_t, sigma)

    def check(self, items: Iterable[TrainItem], what: str = "dataset") -> None:
        """One forward pass for each kind of item: channels, widths of the conditioning.

        Args:
            what: to call the items in the error.

        Raises:
            AdapterLabError: the model fails on an item.
        """
        kinds = {str([i.latent.ndim, _widths(i)]): i for i in items}
        for item in kinds.values():
            try:
                with torch.no_grad():
                    x0 = self.latents([item], what)
                    t = self.noise.scheduled(torch.tensor([0.5]))
                    self.predict(x0, self.noise.sigma(t).to(x0), [item], t)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as err:
                raise self._refusal(item, what, err) from err

    def _refusal(self, item: TrainItem, what: str, error: Exception) -> AdapterLabError:
        if self.conditioner.encode is not None:
            return AdapterLabError(
                f"The model fails on captions of the {what}, most likely because of the text "
                "encoder connected to 'clip'",
                found=f"'{error}'",
                expected="a text encoder made for this model",
                fix="Connect the CLIP that belongs to the model to Train Adapter",
            )
        return AdapterLabError(
            f"The model fails on the {what}, most likely on its conditioning",
            found=f"{_widths(item)} and '{error}'",
            expected="what the text encoder of this model gives",
            fix="Encode the captions with the text encoder that belongs to the model",
        )

    def _output(self, denoised: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Invert denoised = a(sigma) x_t + b(sigma) output, which holds for eps, v, EDM and flow
        alike; a and b are read off the model's own function."""
        one = x_t.new_ones(len(x_t), *(1,) * (x_t.ndim - 1))
        a = self.sampling.calculate_denoised(sigma, torch.zeros_like(one), one)
        b = self.sampling.calculate_denoised(sigma, one, torch.zeros_like(one))
        return (denoised - a * x_t) / b


def _widths(item: TrainItem) -> str:
    """The sizes of an item that belong to its model, not to the picture or the prompt."""
    text = "no text" if item.cond is None else f"text of width {item.cond.shape[-1]}"
    more = [f"{n} of width {t.shape[-1]}" for n, t in tensors(item.extra) if t.ndim]
    return ", ".join([f"{item.latent.shape[0]} channels", text, *more])
