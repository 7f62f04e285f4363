"""A workflow as a description of its nodes, from which the editor's file and the API's file are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

WIDTH, _GAP = 340, 40  # of a node, and between nodes, in pixels
_EDGE, _TITLES = (
    14,
    84,
)  # between a node and its group's frame; and above a column, where the group's and the node's titles stand
_PURPOSES = {
    "VideoLoRA/loaders": "Models",
    "VideoLoRA/data": "Data",
    "VideoLoRA/caching": "Cache",
    "VideoLoRA/training": "Training",
    "VideoLoRA/sampling": "Sampling",
    "VideoLoRA/lora": "LoRAs",
    "video": "Output",
}
# What panels need of their nodes: width, and height besides sockets and inputs.
_PANELS = {
    "VideoLoRATrain": (520, 640),
    "VideoLoRASelectLORAID": (460, 360),
    "VideoLoRAInspectLoRA": (460, 360),
    "VideoLoRAFlowSchedule": (WIDTH, 190),
    "VideoLoRACFGSkip": (WIDTH, 110),
    "VideoLoRADatasetPreview": (620, 440),
    "VideoLoRANetworkSettings": (WIDTH, 170),  # the editor reserves room for its advanced texts
    "VideoLoRACacheLatents": (WIDTH, 110),  # reports
    "VideoLoRACacheText": (WIDTH, 70),
    "SaveVideo": (WIDTH, 200),  # the video
    "VideoLoRALoadFrames": (WIDTH, 250),  # ComfyUI shows the chosen video
}


@dataclass(frozen=True)
class Out:
    """An output of a node, to be given to another node as input."""

    node: str
    slot: int


@dataclass
class Node:
    id: str
    kind: str
    title: str
    column: int
    inputs: dict[str, Any]
    size: tuple[int, int] = (WIDTH, 0)  # at least, in pixels

    def __getitem__(self, slot: int) -> Out:
        return Out(self.id, slot)


@dataclass
class Graph:
    """Nodes in columns from left to right, and a note for the reader."""

    note: str
    nodes: list[Node] = field(default_factory=list)

    def add(self, column: int, kind: str, title: str = "", size: tuple[int, int] = (WIDTH, 0), **inputs: Any) -> Node:
        width, _ = _PANELS.get(kind, size)
        node = Node(str(len(self.nodes) + 1), kind, title, column, inputs, (max(width, size[0]), size[1]))
        self.nodes.append(node)
        return node

    def api(self, info: dict[str, dict]) -> dict[str, dict]:
        """The form that POST /prompt takes."""
        return {
            node.id: {
                "class_type": node.kind,
                "inputs": {
                    name: [value.node, value.slot] if isinstance(value, Out) else value
                    for name, value in node.inputs.items()
                },
                "_meta": {"title": node.title or info[node.kind]["display_name"]},
            }
            for node in self.nodes
        }

    def editor(self, info: dict[str, dict]) -> dict[str, Any]:
        """The form that the editor opens."""
        placed, links = {}, []
        heights: dict[int, int] = {}
        lefts = self._lefts()
        for order, node in enumerate(self.nodes):
            widgets = _widgets(node, info[node.kind])
            sockets = _sockets(info[node.kind])
            outputs = list(zip(info[node.kind]["output"], info[node.kind]["output_name"], strict=True))
            shown = sum(
                _is_widget(kind) and not options.get("advanced") for _, kind, options in _inputs(info[node.kind])
            )
            height = 110 + 26 * max(len(sockets), len(outputs)) + 26 * shown + 60 * _texts(node, info[node.kind])
            height = max(height + _PANELS.get(node.kind, (0, 0))[1], node.size[1])
            top = heights.get(node.column, 0)
            heights[node.column] = top + height + _GAP
            placed[node.id] = {
                "id": int(node.id), "type": node.kind, "pos": [lefts[node.column], top], "size": [node.size[0], height],
                "flags": {}, "order": order, "mode": 0,
                "inputs": [{"name": name, "type": kind, "link": None} for name, kind in sockets],
                "outputs": [{"name": name, "type": kind, "links": []} for kind, name in outputs],
                "properties": {"Node name for S&R": node.kind}, "widgets_values": widgets,
                **({"title": node.title} if node.title else {}),
            }  # fmt: skip
            for name, value in node.inputs.items():
                if isinstance(value, Out):
                    links.append(_link(len(links) + 1, placed, node, name, value))
        return {
            "last_node_id": len(self.nodes) + 1, "last_link_id": len(links),
            "nodes": [*placed.values(), self._note()], "links": links, "groups": self._groups(info, lefts, heights),
            "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip

    def _lefts(self) -> list[int]:
        """Where each column begins."""
        columns = range(max(node.column for node in self.nodes) + 1)
        widths = [max(node.size[0] for node in self.nodes if node.column == column) for column in columns]
        return [sum(widths[:column]) + column * _GAP for column in columns]

    def _groups(self, info: dict[str, dict], lefts: list[int], heights: dict[int, int]) -> list[dict[str, Any]]:
        """A frame around each column, named after what its nodes are for."""
        groups = []
        for column, left in enumerate(lefts):
            nodes = [node for node in self.nodes if node.column == column]
            purposes = [_PURPOSES.get(info[node.kind]["category"]) for node in nodes]
            title = ", ".join(dict.fromkeys(purpose for purpose in purposes if purpose)) or "Output"
            width, height = max(node.size[0] for node in nodes), heights[column] - _GAP
            bounding = [left - _EDGE, -_TITLES, width + 2 * _EDGE, height + _TITLES + _EDGE]
            groups.append(
                {
                    "id": column + 1,
                    "title": title,
                    "bounding": bounding,
                    "color": "#3f789e",
                    "font_size": 22,
                    "flags": {},
                }
            )
        return groups

    def _note(self) -> dict[str, Any]:
        number = len(self.nodes) + 1
        return {
            "id": number, "type": "MarkdownNote", "pos": [0, -_TITLES - 310], "size": [2 * WIDTH + _GAP, 260], "flags": {},
            "order": number - 1, "mode": 0, "inputs": [], "outputs": [], "properties": {},
            "widgets_values": [self.note.replace("`", "**")],  # the editor's code style is hard to read on a note
        }  # fmt: skip


_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def _inputs(info: dict) -> Iterable[tuple[str, Any, dict]]:
    """(name, type, options) in the order in which the editor shows them."""
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, ()):
            spec = info["input"][group][name]
            yield name, spec[0], spec[1] if len(spec) > 1 else {}


def _is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in _WIDGETS


def _sockets(info: dict) -> list[tuple[str, str]]:
    return [(name, kind) for name, kind, _ in _inputs(info) if not _is_widget(kind)]


def _widgets(node: Node, info: dict) -> list[Any]:
    values = []
    for name, kind, options in _inputs(info):
        if _is_widget(kind):
            values.append(node.inputs.get(name, options.get("default")))
            if options.get("control_after_generate"):
                values.append("fixed")
    return values


def _texts(node: Node, info: dict) -> int:
    return sum(bool(options.get("multiline")) for name, _, options in _inputs(info) if name in node.inputs)


def _link(number: int, placed: dict[str, dict], node: Node, name: str, value: Out) -> list[Any]:
    source, target = placed[value.node], placed[node.id]
    slot = next(index for index, socket in enumerate(target["inputs"]) if socket["name"] == name)
    target["inputs"][slot]["link"] = number
    output = source["outputs"][value.slot]
    output["links"].append(number)
    return [number, source["id"], value.slot, target["id"], slot, output["type"]]
