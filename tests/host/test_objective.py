"""The node Training Objective: what it hands on and what its picture shows."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.objective import ObjectiveConfig
from adapter_lab.nodes.objective import ChooseObjective
from adapter_lab.nodes.plots import FAINT, level_plot

BAR = torch.tensor([int(FAINT[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def run(model=None, width=1024, height=1024, **options):
    given = asdict(ObjectiveConfig()) | options
    return ChooseObjective.execute(width=width, height=height, model=model, **given)


def heights(image):
    """Pixels of the histogram's colour in each column of the picture."""
    return ((image[0] - BAR).abs().amax(-1) < 1e-3).sum(0)


def test_node_without_changes_is_training_without_it():
    schema = ChooseObjective.GET_SCHEMA()
    defaults = {i.id: i.default for i in schema.inputs if hasattr(i, "default")}
    sizes = {"width": 1024, "height": 1024}
    assert defaults == asdict(ObjectiveConfig()) | sizes
    assert run().args[0] == ObjectiveConfig()
    assert run(loss="l1", gamma=2.0).args[0] == ObjectiveConfig(loss="l1", gamma=2.0)


def test_histogram_shows_the_density():
    """Half as many levels below 0.5 as above, and none below 0.2."""
    levels = torch.cat([torch.linspace(0.2, 0.5, 1000), torch.linspace(0.5, 1.0, 2000)])
    image = level_plot(levels, torch.tensor([0.2, 1.0]), torch.zeros(2))
    assert image.shape == (1, 360, 640, 3) and image.min() >= 0 and image.max() <= 1
    columns = heights(image)
    inside = columns[56:624]
    place = torch.linspace(0, 1, len(inside))
    assert (inside[place < 0.18] <= 1).all()
    low, high = inside[(place > 0.25) & (place < 0.45)], inside[(place > 0.55) & (place < 0.95)]
    assert low.float().mean() / high.float().mean() == pytest.approx(
        1000 / 0.3 / (2000 / 0.5), rel=0.1
    )


def test_picture_is_of_the_size_of_the_image_where_that_matters():
    for sampling, changes in (("flux_shift", True), ("uniform", False)):
        small, large = (
            run(timestep_sampling=sampling, width=w, height=w).args[1] for w in (256, 2048)
        )
        assert torch.equal(small, large) != changes


def test_picture_is_of_the_model(model):
    flow, discrete = (run(model(kind)) for kind in ("wan", "sd15"))
    assert "flow model, shift 8" in flow.ui["text"][0]
    assert "eps model" in discrete.ui["text"][0]
    assert not torch.equal(flow.args[1], discrete.args[1])
    assert torch.equal(run().args[1], run(timestep_sampling="sigmoid").args[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weighting": "cosmap"}, "'cosmap' is not defined"),
        ({"timestep_sampling": "qwen_shift"}, "for flow models"),
        ({"std": -1.0}, "'std' is out of range"),
    ],
)
def test_what_means_nothing_is_refused(model, options, says):
    with pytest.raises(AdapterLabError, match=says):
        run(model("sd15"), **options)
