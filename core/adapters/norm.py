"""Trained norm layers."""

from .full import Full


class Norm(Full):
    """dW = ``w_norm``, (n,), for the weight of a norm; ``b_norm`` goes to its bias.

    Reference: LyCORIS, ``train_norm``.
    """

    name = "norm"
    title = "Norm"
    trainable = True
    purpose = "the scales of norms only"
    additive = False
    suffixes = ("w_norm",)
