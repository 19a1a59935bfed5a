"""What the server hands to any front end: tooltips, help pages, templates, scripts."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from frontend import CHECKOUT
from server import Server

HELP = sorted(path.parent.name for path in (CHECKOUT / "web" / "docs").glob("*/en.md"))
WORKFLOWS = sorted(path.stem for path in (CHECKOUT / "workflows").glob("*.json"))


def fetch(server: Server, path: str) -> str:
    with urllib.request.urlopen(server.address + path, timeout=20) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def nodes(server: Server) -> dict[str, dict]:
    return {k: v for k, v in server.object_info().items() if k.startswith("AdapterLab")}


def test_every_input_and_output_has_a_tooltip(nodes: dict[str, dict]) -> None:
    missing = []
    for name, info in nodes.items():
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        missing += [f"{name}.{key}" for key, spec in inputs.items()
                    if not (len(spec) > 1 and spec[1].get("tooltip"))]
        tips = info["output_tooltips"] or [None] * len(info["output"])
        missing += [f"{name} -> {out}" for out, tip in zip(info["output_name"], tips, strict=True)
                    if not tip]
    assert len(nodes) > 10 and missing == []


def test_every_node_says_what_it_does(nodes: dict[str, dict]) -> None:
    assert [name for name, info in nodes.items() if not info["description"]] == []
    assert {info["category"].split("/")[0] for info in nodes.values()} == {"adapter lab"}


def test_the_readme_lists_every_node(nodes: dict[str, dict]) -> None:
    rows = (CHECKOUT / "README.md").read_text("utf-8").partition("| node |")[2].partition("\n\n")[0]
    listed = [row.split("|")[1].strip() for row in rows.splitlines()[2:]]
    assert sorted(listed) == sorted(info["display_name"] for info in nodes.values())


@pytest.mark.parametrize("name", HELP)
def test_help_page_is_served(server: Server, nodes: dict[str, dict], name: str) -> None:
    page = fetch(server, f"/extensions/adapter-lab/docs/{name}/en.md")
    assert page.startswith("# " + nodes[name]["display_name"])


def test_templates_are_listed_with_a_thumbnail(server: Server) -> None:
    assert sorted(server.get("/workflow_templates")["adapter-lab"]) == WORKFLOWS
    for name in WORKFLOWS:
        address = f"{server.address}/api/workflow_templates/adapter-lab/{name}.jpg"
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert answer.read(3) == b"\xff\xd8\xff"


def test_only_the_entry_script_is_loaded_by_itself(server: Server) -> None:
    ours = [path for path in server.get("/extensions") if "adapter-lab" in path]
    assert ours == ["/extensions/adapter-lab/js/adapter_lab.js"]
    for path in (*ours, "/extensions/adapter-lab/lib/panel.mjs",
                 "/extensions/adapter-lab/lib/chart.mjs", "/extensions/adapter-lab/lib/panel.css"):
        assert fetch(server, path)
    with pytest.raises(urllib.error.HTTPError):
        fetch(server, "/extensions/adapter-lab/lib/missing.mjs")
