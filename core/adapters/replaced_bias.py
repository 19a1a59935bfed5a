"""Biases that were trained whole beside an adapter."""

from .full import Replaced


class ReplacedBias(Replaced):
    """db = s (``set_bias`` - b), (out,), as peft's ``bias="all"`` and ``"lora_only"`` save it."""

    name = "set_bias"
    title = "Replaced bias"
    untrained = "the same is trained as a difference, by the option 'bias'"
    suffixes = ("set_bias",)
    parameter = "bias"

    @property
    def reads_output(self) -> bool:
        return True
