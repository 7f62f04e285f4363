"""The example workflows: one description each, from which the editor's file and the API's file are made.

python devtools/workflows.py        writes workflows/*.json and workflows/api/*.json, asking a real ComfyUI about the nodes
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
_WIDTH, _GAP = 340, 40  # of a node, and between nodes, in pixels


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
    size: tuple[int, int] = (_WIDTH, 0)  # at least, in pixels

    def __getitem__(self, slot: int) -> Out:
        return Out(self.id, slot)


@dataclass
class Graph:
    """Nodes in columns from left to right, and a note for the reader."""

    note: str
    nodes: list[Node] = field(default_factory=list)

    def add(self, column: int, kind: str, title: str = "", size: tuple[int, int] = (_WIDTH, 0), **inputs: Any) -> Node:
        node = Node(str(len(self.nodes) + 1), kind, title, column, inputs, size)
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
            height = max(height, node.size[1])
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
            "nodes": [*placed.values(), self._note()], "links": links, "groups": [],
            "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip

    def _lefts(self) -> list[int]:
        """Where each column begins."""
        columns = range(max(node.column for node in self.nodes) + 1)
        widths = [max(node.size[0] for node in self.nodes if node.column == column) for column in columns]
        return [sum(widths[:column]) + column * _GAP for column in columns]

    def _note(self) -> dict[str, Any]:
        number = len(self.nodes) + 1
        return {
            "id": number, "type": "MarkdownNote", "pos": [0, -320], "size": [2 * _WIDTH + _GAP, 260], "flags": {},
            "order": number - 1, "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [self.note],
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


DIT, VAE, TEXT = "wan2.1_t2v_1.3B_bf16.safetensors", "wan_2.1_vae.safetensors", "umt5_xxl_fp16.safetensors"
FILES = f"""**Model files**
- `models/diffusion_models/{DIT}`
- `models/vae/{VAE}`
- `models/text_encoders/{TEXT}`

Any other Wan 2.1 or 2.2 text-to-video file works as well: choose it in the loaders."""
PROMPT = "character_1, walking through a park"
NEGATIVE = "blurry, static, overexposed, worst quality"


def _sampling(graph: Graph, column: int, dit: Node, model: Out, text: Node, vae: Node, prompt: str, prefix: str,
              skip_cfg: bool = False) -> None:  # fmt: skip
    positive = graph.add(column, "VideoLoRAEncodeText", "Prompt", text_encoder=text[0], prompt=prompt)
    negative = graph.add(column, "VideoLoRAEncodeText", "Negative prompt", text_encoder=text[0], prompt=NEGATIVE)
    latent = graph.add(column, "VideoLoRAEmptyLatent", dit=dit[0], width=832, height=480, frames=81, batch_size=1)
    schedule = graph.add(column, "VideoLoRAFlowSchedule", dit=dit[0], steps=30, shift=0.0, solver="euler")
    if skip_cfg:
        schedule = graph.add(column, "VideoLoRACFGSkip", schedule=schedule[0], ratio=0.5, mode="late")
    sampled = graph.add(column + 1, "VideoLoRASample", dit=model, positive=positive[0], negative=negative[0], latent=latent[0],
                        schedule=schedule[0], guidance=0.0, seed=0)  # fmt: skip
    frames = graph.add(column + 1, "VideoLoRADecode", vae=vae[0], latent=sampled[0])
    video = graph.add(column + 1, "CreateVideo", images=frames[0], fps=16.0)
    graph.add(column + 1, "SaveVideo", video=video[0], filename_prefix=prefix, format="auto", codec="auto")


def wan_t2v_train_loraid() -> Graph:
    graph = Graph(f"""# Train one LORAID of Wan text-to-video, then look at it
Put clips and a `.txt` caption for each into `ComfyUI/input/character_1`. Choose a LORAID that no other LoRA of yours has.
The LoRA is written to `ComfyUI/output/loras`.

{FILES}""")
    dit = graph.add(0, "VideoLoRALoadDiT", model=DIT, variant="auto")
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    data = graph.add(0, "VideoLoRADatasetFolder", caption_extension=".txt", width=832, height=480, frames="81", repeats=1,
                     batch_size=1, buckets=True, extraction="head", folder="character_1")  # fmt: skip
    latents = graph.add(1, "VideoLoRACacheLatents", datasets=data[0], vae=vae[0])
    captions = graph.add(1, "VideoLoRACacheText", datasets=data[0], text_encoder=text[0])
    loraid = graph.add(1, "VideoLoRASelectLORAID", dit=dit[0], loraid=1, units_per_id=12, unit="slot")
    network = graph.add(1, "VideoLoRANetworkSettings", rank=16, alpha=16.0)
    optimizer = graph.add(1, "VideoLoRAOptimizerSettings", learning_rate=2e-4, weight_decay=0.01, warmup_steps=0,
                          gradient_accumulation=1, max_grad_norm=1.0)  # fmt: skip
    save = graph.add(1, "VideoLoRASaveSettings", every_steps=500, every_epochs=0, keep=0, precision="bfloat16")
    train = graph.add(2, "VideoLoRATrain", dit=dit[0], latents=latents[0], text=captions[0], name="character_1", steps=1000,
                      seed=42, loraid=loraid[0], network=network[0], optimizer=optimizer[0], save=save[0])  # fmt: skip
    applied = graph.add(2, "VideoLoRAApplyLoRA", dit=dit[0], loras=train[0], allow_overlap=False)
    _sampling(graph, 3, dit, applied[0], text, vae, PROMPT, "video/character_1")
    return graph


def wan_t2v_prepare_data() -> Graph:
    graph = Graph(f"""# Look at the data, then cache it
Put clips or images and a `.txt` caption for each into `ComfyUI/input/character_1`. The preview shows what training will
see: crops, frame windows, captions, what is left out and why. It needs no weights. Then clips go through the VAE and
captions through the text encoder; what is cached is never done again, and cancelling loses nothing. To look first, mute
(Ctrl+M) the nodes to the right of the preview.

{FILES}""")
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    data = graph.add(0, "VideoLoRADatasetFolder", caption_extension=".txt", width=832, height=480, frames="81", repeats=1,
                     batch_size=1, buckets=True, extraction="head", folder="character_1")  # fmt: skip
    preview = graph.add(
        1, "VideoLoRADatasetPreview", size=(760, 700), datasets=data[0], vae=vae[0], text_encoder=text[0], shown=4
    )
    graph.add(2, "SaveVideo", video=preview[1], filename_prefix="video/preview", format="auto", codec="auto")
    latents = graph.add(3, "VideoLoRACacheLatents", datasets=data[0], vae=vae[0])
    captions = graph.add(3, "VideoLoRACacheText", datasets=data[0], text_encoder=text[0])
    graph.add(4, "PreviewAny", "Latents", size=(_WIDTH, 180), source=latents[1])
    graph.add(4, "PreviewAny", "Captions", size=(_WIDTH, 180), source=captions[1])
    return graph


def _two_loras(graph: Graph) -> tuple[Node, Node]:
    dit = graph.add(0, "VideoLoRALoadDiT", model=DIT, variant="auto")
    first = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=1, lora="character_1.safetensors")
    second = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=2, lora="character_2.safetensors", loras=first[0])
    return dit, graph.add(1, "VideoLoRAApplyLoRA", dit=dit[0], loras=second[0], allow_overlap=False)


def wan_t2v_two_loraids() -> Graph:
    graph = Graph(f"""# Two LORAIDs in one video
Both LoRAs are applied together. Each has its own multiplier; 0 switches it off. Files that touch the same parameters are
refused. CFG Skip leaves guidance out of some steps to save time.

{FILES}
- `output/loras/character_1.safetensors` (LORAID 1) and `character_2.safetensors` (LORAID 2)""")
    dit, applied = _two_loras(graph)
    vae = graph.add(0, "VideoLoRALoadVAE", model=VAE)
    text = graph.add(0, "VideoLoRALoadT5", model=TEXT)
    _sampling(graph, 2, dit, applied[0], text, vae, "character_1 and character_2, walking through a park", "video/two_loraids",
              skip_cfg=True)  # fmt: skip
    return graph


def wan_t2v_merge() -> Graph:
    graph = Graph(f"""# Merge two LORAIDs into a checkpoint
The new checkpoint is written to `ComfyUI/output/diffusion_models`; it needs as much disk space as the model, and hardly any
memory. The order of the LoRAs does not matter.

{FILES}""")
    _, applied = _two_loras(graph)
    graph.add(2, "VideoLoRAMergeLoRA", dit=applied[0], name="wan2.1_t2v_character_1_2")
    return graph


def wan_t2v_lora_workbench() -> Graph:
    graph = Graph(f"""# Look at LoRAs, convert and resize one, take one out of a checkpoint
The map shows which modules each LoRA changes and where they overlap; the report also names the LORAIDs that are free.
New LoRAs are written to `ComfyUI/output/loras`. Unmerging brings back the bytes of the base.

{FILES}
- `output/loras/character_1.safetensors` (LORAID 1) and `character_2.safetensors` (LORAID 2)
- `output/diffusion_models/wan2.1_t2v_character_1_2.safetensors`""")
    dit = graph.add(0, "VideoLoRALoadDiT", model=DIT, variant="auto")
    merged = graph.add(0, "VideoLoRALoadDiT", "Merged", model="wan2.1_t2v_character_1_2.safetensors", variant="auto")
    first = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=1, lora="character_1.safetensors")
    second = graph.add(1, "VideoLoRALoadLoRA", multiplier=1.0, loraid=2, lora="character_2.safetensors", loras=first[0])
    graph.add(2, "VideoLoRAInspectLoRA", size=(760, 560), dit=dit[0], loras=second[0])
    graph.add(
        3,
        "VideoLoRAConvertLoRA",
        dit=dit[0],
        lora="character_1.safetensors",
        dialect="diffusers",
        name="character_1_diffusers",
    )
    graph.add(3, "VideoLoRAResizeLoRA", dit=dit[0], lora="character_1.safetensors", rank=8, name="character_1_rank_8")
    graph.add(
        3, "VideoLoRAUnmergeLoRA", dit=merged[0], loras=first[0], name="wan2.1_t2v_character_2_alone", base=dit[0]
    )
    return graph


WORKFLOWS = {
    make.__name__: make
    for make in (wan_t2v_prepare_data, wan_t2v_train_loraid, wan_t2v_two_loraids, wan_t2v_merge, wan_t2v_lora_workbench)
}


def files(info: dict[str, dict]) -> dict[Path, str]:
    """Path below workflows/ -> content, for all workflows; `info` is ComfyUI's /object_info."""
    made = {}
    for name, make in WORKFLOWS.items():
        graph = make()
        made[Path(f"{name}.json")] = json.dumps(graph.editor(info), indent=1) + "\n"
        made[Path("api") / f"{name}.json"] = json.dumps(graph.api(info), indent=1) + "\n"
    return made


def main() -> None:
    import server

    with server.running(server.prepare()) as running:
        for path, content in files(running.get("/object_info")).items():
            (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
            (FOLDER / path).write_text(content, encoding="utf-8")
            print(f"wrote workflows/{path}")


if __name__ == "__main__":
    main()
