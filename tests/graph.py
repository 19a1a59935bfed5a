"""A workflow as the front end saves it, turned into the prompt that ComfyUI's API takes.

The front end stores a node's widgets by position, so the order of its inputs in /object_info says
which value belongs to which input.
"""

from __future__ import annotations

from collections.abc import Iterator

NOTES = {"Note", "MarkdownNote"}
VIRTUAL = NOTES | {"Reroute", "PrimitiveNode"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COMFY_DYNAMICCOMBO_V3"}
UPLOADS = ("image_upload", "audio_upload", "video_upload", "file_upload")
MUTED, BYPASSED = 2, 4


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """API prompt of `workflow`; ValueError names node types that this ComfyUI does not have."""
    return Graph(workflow, object_info).prompt()


class Graph:
    def __init__(self, workflow: dict, object_info: dict) -> None:
        self.info = object_info
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = dict(map(ends, workflow.get("links", ())))
        missing = {node["type"] for node in self.nodes.values()} - VIRTUAL - set(object_info)
        if missing:
            raise ValueError(f"The workflow uses nodes that this ComfyUI does not have: "
                             f"{', '.join(sorted(missing))}. Install their pack, or, if these are "
                             "subgraphs, unpack them in the front end and save again.")

    def prompt(self) -> dict:
        entries = {}
        for node in sorted(self.nodes.values(), key=lambda node: node.get("order", 0)):
            if node["type"] not in VIRTUAL and node.get("mode", 0) not in (MUTED, BYPASSED):
                info = self.info[node["type"]]
                title = node.get("title") or info.get("display_name") or node["type"]
                entries[str(node["id"])] = {"class_type": node["type"], "inputs": self.inputs(node),
                                            "_meta": {"title": title}}
        return entries

    def inputs(self, node: dict) -> dict:
        """Widget values by name, then links, which win over the widget they are plugged into."""
        values = {}
        stored = node.get("widgets_values") or []
        if isinstance(stored, dict):
            stored = [stored.get(name) for name, _ in widgets(self.info[node["type"]]["input"], {})]
        for name, value in pair(self.info[node["type"]], list(stored)):
            values[name] = {"__value__": value} if isinstance(value, list) else value
        for socket in node.get("inputs", ()):
            if socket.get("link") is not None:
                source = self.source(socket["link"])
                if source is not None:
                    values[socket["name"]] = source
                elif not socket.get("widget"):
                    values.pop(socket["name"], None)
        return values

    def source(self, link: int) -> object:
        """[node, slot] at the far end of a link, the value of a primitive, None where it is cut."""
        origin, slot = self.links[link]
        node = self.nodes[origin]
        mode = node.get("mode", 0)
        if mode == MUTED:
            return None
        if node["type"] == "PrimitiveNode":
            return (node.get("widgets_values") or [None])[0]
        if node["type"] == "Reroute":
            passed = node["inputs"][0].get("link")
        elif mode == BYPASSED:
            passed = bypass(node, slot)
        else:
            return [str(origin), slot]
        return None if passed is None else self.source(passed)


def ends(link: list | dict) -> tuple[int, tuple[int, int]]:
    """Link id -> (node, slot) it starts from; both saved forms."""
    if isinstance(link, dict):
        return link["id"], (link["origin_id"], link["origin_slot"])
    return link[0], (link[1], link[2])


def bypass(node: dict, slot: int) -> int | None:
    """The link that a bypassed node hands on: same slot first, else the first of the same type."""
    kind, sockets = node["outputs"][slot]["type"], node.get("inputs", [])
    for socket in sockets[slot : slot + 1] + sockets:
        if socket["type"] == kind:
            return socket.get("link")
    return None


def pair(info: dict, stored: list) -> Iterator[tuple[str, object]]:
    """(input, value) of every widget; inputs newer than the saved file get their default."""
    chosen: dict[str, object] = {}
    for name, (kind, options) in widgets(info["input"], chosen):
        value = stored.pop(0) if stored else default(kind, options)
        chosen[name or ""] = value
        if name:
            yield name, value


def widgets(sections: dict, chosen: dict, prefix: str = "") -> Iterator[tuple[str, tuple]]:
    """Every widget in the order of its stored value; those that the API does not see have no name.

    `chosen` holds the values so far: what follows a dynamic combo depends on its choice.
    """
    upload = False
    for section in ("required", "optional"):
        for name, spec in sections.get(section, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            kind = "COMBO" if isinstance(spec[0], list) else options.get("widgetType", spec[0])
            if isinstance(spec[0], list):
                options = {"options": spec[0], **options}
            if kind not in WIDGETS or options.get("forceInput"):
                continue
            name = prefix + name
            yield name, (kind, options)
            upload |= any(map(options.get, UPLOADS))
            seed = kind == "INT" and name in ("seed", "noise_seed")
            if options.get("control_after_generate", seed):
                yield "", ("CONTROL", {})
            if kind == "COMFY_DYNAMICCOMBO_V3":
                picked = chosen.get(name)
                inner = [one["inputs"] for one in options["options"] if one["key"] == picked]
                yield from widgets(inner[0] if inner else {}, chosen, f"{name}.")
        if upload and section == "required":
            yield "", ("UPLOAD", {})


def default(kind: str, options: dict) -> object:
    """What the front end puts into a widget that has no saved value."""
    if "default" in options:
        return options["default"]
    if kind in ("COMBO", "COMFY_DYNAMICCOMBO_V3"):
        first = (options.get("options") or [None])[0]
        return first["key"] if isinstance(first, dict) else first
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(kind)
