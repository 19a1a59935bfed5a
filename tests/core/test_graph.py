"""What the front end saves, as the prompt that it would send."""

from __future__ import annotations

import pytest
from adapter_lab.tests.graph import to_prompt

SAMPLER = {"required": {
    "model": ["MODEL"],
    "seed": ["INT", {"default": 0, "control_after_generate": True}],
    "steps": ["INT", {"default": 20}],
    "name": [["euler", "heun"], {}],
}, "optional": {"text": ["STRING", {"default": "none", "forceInput": True}],
                "late": ["FLOAT", {"default": 0.5}]}}
RESIZE = {"required": {
    "kind": ["COMFY_DYNAMICCOMBO_V3", {"options": [
        {"key": "scale", "inputs": {"required": {"by": ["FLOAT", {"default": 2.0}]}}},
        {"key": "size", "inputs": {"required": {"seed": ["INT", {}], "high": ["INT", {}]}}}]}],
    "after": ["BOOLEAN", {"default": True}],
}}
INFO = {"Sampler": {"input": SAMPLER, "display_name": "A sampler"}, "Resize": {"input": RESIZE},
        "Load": {"input": {"required": {"file": ["COMBO", {"options": ["a", "b"],
                                                           "image_upload": True}]},
                           "optional": {"flag": ["BOOLEAN", {}]}}},
        "Pass": {"input": {"required": {"clip": ["CLIP"], "model": ["MODEL"]}}}}


def node(number: int, kind: str, *widgets: object, links: dict | None = None, **rest) -> dict:
    """A saved node with links by input name, and one MODEL output."""
    types = {"model": "MODEL", "clip": "CLIP", "text": "STRING", "steps": "INT", "": "*"}
    inputs = [{"name": name, "type": types[name], "link": link}
              for name, link in (links or {}).items()]
    return {"id": number, "type": kind, "inputs": inputs, "widgets_values": list(widgets),
            "outputs": [{"name": "out", "type": "MODEL"}], **rest}


def prompt(*nodes: dict, links: tuple = ()) -> dict:
    """`links`: (id, from node)."""
    saved = [[number, origin, 0, 0, 0, "*"] for number, origin in links]
    return to_prompt({"nodes": list(nodes), "links": saved}, INFO)


def test_values_go_by_position() -> None:
    """The control after a seed has a place and no input; a value not saved has its default."""
    entry = prompt(node(3, "Sampler", 7, "fixed", 5, "heun"))["3"]
    assert entry["inputs"] == {"seed": 7, "steps": 5, "name": "heun", "late": 0.5}
    assert entry["class_type"] == "Sampler" and entry["_meta"] == {"title": "A sampler"}


@pytest.mark.parametrize("options, places", [({}, 2), ({"control_after_generate": False}, 1)])
def test_seeds_have_a_control_unless_they_refuse_it(options: dict, places: int) -> None:
    inputs = {"required": {"seed": ["INT", options], "last": ["INT", {}]}}
    saved = {"nodes": [node(1, "Seeded", 3, *["fixed"] * (places - 1), 4)]}
    made = to_prompt(saved, {"Seeded": {"input": inputs}})
    assert made["1"]["inputs"] == {"seed": 3, "last": 4}


def test_upload_button_has_a_place() -> None:
    assert prompt(node(1, "Load", "b", "image", True))["1"]["inputs"] == {"file": "b", "flag": True}


@pytest.mark.parametrize("values, inputs", [
    (("scale", 3.0, False), {"kind": "scale", "kind.by": 3.0, "after": False}),
    (("size", 4, 5, False), {"kind": "size", "kind.seed": 4, "kind.high": 5, "after": False}),
    ((), {"kind": "scale", "kind.by": 2.0, "after": True}),
])
def test_dynamic_combo_brings_its_own_inputs(values: tuple, inputs: dict) -> None:
    assert prompt(node(1, "Resize", *values))["1"]["inputs"] == inputs


def test_links_win_over_widgets() -> None:
    sampler = node(2, "Sampler", 1, "fixed", 9, links={"model": 1, "steps": 2})
    made = prompt(node(1, "Load"), sampler, links=((1, 1), (2, 1)))
    assert made["2"]["inputs"]["model"] == made["2"]["inputs"]["steps"] == ["1", 0]


def test_lists_are_wrapped() -> None:
    """A bare list would be taken for a link."""
    made = prompt(node(1, "Load", ["a", "b"]))["1"]["inputs"]["file"]
    assert made == {"__value__": ["a", "b"]}


@pytest.mark.parametrize("between, expected", [
    (node(5, "Reroute", links={"": 1}), ["1", 0]),
    (node(5, "Pass", links={"clip": 9, "model": 1}, mode=4), ["1", 0]),
    (node(5, "Pass", links={"clip": 9, "model": None}, mode=4), None),
    (node(5, "Pass", links={"model": 1}, mode=2), None),
    (node(5, "PrimitiveNode", 42), 42),
])
def test_what_is_not_sent_is_looked_through(between: dict, expected: object) -> None:
    """Reroutes and bypassed nodes hand on, muted ones cut, primitives give their value."""
    made = prompt(node(1, "Load"), between, node(2, "Sampler", links={"model": 2}),
                  node(3, "Note", "read me"), links=((1, 1), (2, 5)))
    assert set(made) == {"1", "2"}
    assert made["2"]["inputs"].get("model") == expected


def test_links_saved_as_objects() -> None:
    saved = {"nodes": [node(1, "Load"), node(2, "Sampler", links={"model": 8})],
             "links": [{"id": 8, "origin_id": 1, "origin_slot": 0}]}
    assert to_prompt(saved, INFO)["2"]["inputs"]["model"] == ["1", 0]


def test_missing_nodes_are_named() -> None:
    with pytest.raises(ValueError, match="does not have: Other"):
        prompt(node(1, "Other"))
