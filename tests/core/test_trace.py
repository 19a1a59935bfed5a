"""What a skipped step is filled with, against the equations written out."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.cache.trace import FILLS, Trace, filled, length
from adapter_lab.core.errors import AdapterLabError

A, B = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]])


def trace(*points, size=2):
    made = Trace(size)
    for sigma, residual in points:
        made.put(sigma, (residual,))
    return made


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reuse", [[3.0, 1.0]]),
        ("scaled", [[2.7, 0.9]]),
        ("first order", [[4.0, 2.5]]),  # half as far again: b + (b - a) / 2
        ("auto", [[4.0, 2.5]]),
    ],
)
def test_fills(name, expected):
    (made,) = filled(name, trace((0.8, A), (0.6, B)), 0.5, 0.9)
    assert torch.allclose(made, torch.tensor(expected))


def test_first_order_is_exact_for_a_residual_linear_in_sigma():
    def residual(sigma):
        return torch.tensor([[2 - 3 * sigma, 0.5 + sigma]])

    known = trace((0.9, residual(0.9)), (0.7, residual(0.7)))
    for sigma in (0.6, 0.3, 0.0, 0.8):
        assert torch.allclose(filled("first order", known, sigma, 1.0)[0], residual(sigma))


@pytest.mark.parametrize("name", FILLS)
def test_with_one_residual_there_is_no_line(name):
    (made,) = filled(name, trace((0.6, B)), 0.5, 1.0)
    assert torch.equal(made, B)


def test_streams_of_other_shapes_are_filled_one_by_one():
    known = Trace()
    known.put(0.8, (A, torch.ones(1, 3)))
    known.put(0.6, (B, torch.zeros(1, 3)))
    made = filled("first order", known, 0.5, 1.0)
    assert torch.allclose(made[0], torch.tensor([[4.0, 2.5]]))
    assert torch.allclose(made[1], torch.full((1, 3), -0.5))


def test_a_change_of_shape_is_not_extrapolated_over():
    made = filled("first order", trace((0.8, torch.ones(1, 5)), (0.6, B)), 0.5, 1.0)
    assert torch.equal(made[0], B)


def test_the_oldest_is_dropped_and_the_same_sigma_replaced():
    known = trace((0.9, A), (0.8, A), (0.6, A), (0.6, B))
    assert [sigma for sigma, _ in known.points] == [0.8, 0.6]
    assert known.points[1][1][0] is B and known.at(0.8) and not known.at(0.9)
    assert len(trace((0.8, A), (0.6, B), size=1).points) == 1


def test_a_fill_changes_no_residual():
    known = trace((0.8, A.clone()), (0.6, B.clone()))
    for name in FILLS:
        filled(name, known, 0.5, 0.9)
    assert torch.equal(known.points[0][1][0], A) and torch.equal(known.points[1][1][0], B)


def test_lengths_and_unknown_fills():
    assert [length(name) for name in ("reuse", "scaled", "first order", "auto")] == [1, 1, 2, 2]
    for ask in (lambda: length("guess"), lambda: filled("guess", trace((0.6, B)), 0.5, 1.0)):
        with pytest.raises(AdapterLabError, match="guess"):
            ask()
