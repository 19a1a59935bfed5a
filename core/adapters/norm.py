"""Trained norm layers."""

from .full import Full


class Norm(Full):
    """dW = ``w_norm``, (n,), for the weight of a norm; ``b_norm`` goes to its bias.

    Reference: LyCORIS, ``train_norm``.
    """

    name = "norm"
    title = "Norm"
    suffixes = ("w_norm",)
