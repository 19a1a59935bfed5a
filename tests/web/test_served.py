"""What the server hands to any front end: tooltips, help pages, templates, scripts."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

import pytest
from frontend import CHECKOUT
from server import Server

DOCS = CHECKOUT / "web" / "docs"
HELP = sorted(path.parent.name for path in DOCS.glob("*/en.md"))
WORKFLOWS = sorted(path.stem for path in (CHECKOUT / "workflows").glob("*.json"))


def fetch(server: Server, path: str) -> str:
    with urllib.request.urlopen(server.address + path, timeout=20) as answer:
        return answer.read().decode()


def inputs_of(info: dict) -> dict[str, list]:
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def choices_of(info: dict) -> set[str]:
    """Everything that the menus of a node offer."""
    specs = inputs_of(info).values()
    return {str(choice) for kind, *rest in specs
            for choice in (kind if isinstance(kind, list) else
                           rest[0].get("options", []) if rest else [])}  # fmt: skip


def sockets_of(info: dict) -> set[str]:
    return {*inputs_of(info), *info["output_name"]}


@pytest.fixture(scope="module")
def nodes(server: Server) -> dict[str, dict]:
    return {k: v for k, v in server.object_info().items() if k.startswith("AdapterLab")}


def test_every_input_and_output_has_a_tooltip(nodes: dict[str, dict]) -> None:
    missing = []
    for name, info in nodes.items():
        missing += [f"{name}.{key}" for key, spec in inputs_of(info).items()
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


def test_every_node_has_a_help_page(nodes: dict[str, dict]) -> None:
    assert sorted(nodes) == HELP


@pytest.mark.parametrize("name", HELP)
def test_help_page_explains_every_input(nodes: dict[str, dict], name: str) -> None:
    page = (DOCS / name / "en.md").read_text("utf-8")
    bold = set(re.findall(r"\*\*(\w+)\*\*", page))
    assert sorted({*inputs_of(nodes[name])} - bold) == []


@pytest.mark.parametrize("name", HELP)
def test_help_page_names_nothing_that_is_not_there(nodes: dict[str, dict], name: str) -> None:
    """What is bold is an input, an output or a choice of the node, or an input or output of one
    that the page mentions; what is called a node of ours has its name."""
    page, own = (DOCS / name / "en.md").read_text("utf-8"), nodes[name]
    mentioned = [info for info in nodes.values() if f"*{info['display_name']}*" in page]
    known = choices_of(own).union(sockets_of(own), *map(sockets_of, mentioned))
    bold = set(re.findall(r"\*\*([a-z]\w+)\*\*", page))
    assert sorted(bold - known) == []
    menus = set(re.findall(r"(?<!\*)\*((?:Training|Adapter) \w[\w ]*)\*", page))
    assert sorted(menus - {info["display_name"] for info in nodes.values()}) == []


@pytest.mark.parametrize("name", HELP)
def test_help_page_is_served(server: Server, nodes: dict[str, dict], name: str) -> None:
    page = fetch(server, f"/extensions/adapter-lab/docs/{name}/en.md")
    assert page.startswith("# " + nodes[name]["display_name"])
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        # ComfyUI looks for the pictures of all pages in one place.
        address = f"{server.address}/extensions/adapter-lab/docs/{picture}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert answer.read(4) == b"\x89PNG"


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
