"""Where in sampling a noise level is, as ComfyUI counts: 0 at its start and 1 at its end."""

from __future__ import annotations

from typing import Any

_HALVINGS = 24


def progress(sampling: Any, sigma: float) -> float:
    """The p for which ``sampling.percent_to_sigma(p)`` is ``sigma``, to six decimals.

    The same measure as that of the ``start_percent`` of ComfyUI's nodes: a share of the model's
    own time, shifted with it, and not of the steps. Only a denoise of 1 begins at 0.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float(sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return round(low, 6)
