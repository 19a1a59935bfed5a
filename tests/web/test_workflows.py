"""Every shipped workflow in the real front end, in both renderers."""

from __future__ import annotations

import pytest
from frontend import CHECKOUT, SIZE, FrontEnd, workflow

WORKFLOWS = sorted(path.stem for path in (CHECKOUT / "workflows").glob("*.json"))


def values(workflow: dict) -> dict:
    """What is stored by position, and must not be shifted by a panel or a renderer."""
    return {node["id"]: node.get("widgets_values") or [] for node in workflow["nodes"]}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_opens_and_runs(front: FrontEnd, name: str) -> None:
    shipped = workflow(name)
    front.page.set_viewport_size({"width": 2900, "height": 1900})
    front.open(shipped)
    front.screenshot(f"{name}-opened")
    assert front.js("app.graph.nodes.filter((n) => n.has_errors).map((n) => n.type)") == []
    assert front.js("app.graph.nodes.length") == len(shipped["nodes"])
    assert front.overlaps() == []
    assert values(front.js("() => app.graph.serialize()")) == values(shipped)
    kind, data = front.run()
    front.page.wait_for_timeout(1500)
    front.screenshot(f"{name}-ran")
    assert kind == "execution_success", data
    assert front.overlaps() == []
    inputs = front.js("async () => Object.values((await app.graphToPrompt()).output)")
    assert not any("report" in node["inputs"] for node in inputs)
    front.page.set_viewport_size(SIZE)
