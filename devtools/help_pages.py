"""The help pages of the nodes, web/docs, from what ComfyUI says of them and from help_notes.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_NOTES = _HERE / "help_notes.md"
_WORKFLOWS = _HERE.parent / "workflows"
_FILES = ("model", "high", "low", "folder", "file", "lora", "source", "start_from")  # choices that are the user's files


def files(nodes: dict[str, dict]) -> dict[str, str]:
    """Path below web/docs -> page; `nodes` are the pack's own of ComfyUI's /object_info."""
    notes, uses = _notes(), _uses()
    return {f"{name}.md": _page(node, *notes[node["display_name"]], uses.get(name, [])) for name, node in nodes.items()}


def _notes() -> dict[str, tuple[str, str]]:
    """Of each node's title: when it is used, and an example."""
    found = {}
    for section in re.split(r"^# ", _NOTES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        when, _, example = text.strip().partition("\n\nExample: ")
        found[title] = (when, example)
    return found


def _uses() -> dict[str, list[str]]:
    """Of each kind of node the workflows that have one."""
    found: dict[str, list[str]] = {}
    for path in sorted(_WORKFLOWS.glob("*.json")):
        graph = json.loads(path.read_text(encoding="utf-8"))
        for kind in {node["type"] for node in graph["nodes"]}:
            found.setdefault(kind, []).append(path.stem)
    return found


def _page(node: dict, when: str, example: str, workflows: list[str]) -> str:
    rows = [
        (_cell(name), _values(name, *spec), _cell(_options(spec).get("tooltip", "")))
        for group in ("required", "optional")
        for name, spec in node["input"].get(group, {}).items()
    ]
    outputs = [(_cell(name), _type(kind)) for name, kind in zip(node["output_name"], node["output"], strict=True)]
    example = example[:1].upper() + example[1:]
    if workflows:
        example += f"\n\nIn the template browser: {', '.join(f'`{name}`' for name in workflows)}."
    return "\n\n".join(
        [
            f"# {node['display_name']}",
            node["description"],
            f"**When.** {when}",
            f"**Example.** {example}",
            f"## Inputs\n\n{_table(('input', 'values', 'what it is'), rows)}",
            f"## Outputs\n\n{_table(('output', 'type'), outputs)}\n",
        ]
    )


def _options(spec: list) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _values(name: str, kind: Any, options: dict[str, Any] | None = None) -> str:
    options = options or {}
    choices = kind if isinstance(kind, list) else options.get("options")
    default = options.get("default")
    if choices is not None:
        return "a file or folder" if name in _FILES else ", ".join(_value(one, default) for one in choices)
    if kind == "BOOLEAN":
        return "**on**, off" if default else "on, **off**"
    if kind == "INT":
        return f"**{default}**, {options['min']:,} to {options['max']:,}"
    if kind == "FLOAT":
        return f"**{default:g}**, {options['min']:g} to {options['max']:g}"
    if kind == "STRING":
        return f"**{_cell(default)}**" if default else "text"
    return f"link: {_type(kind)}"


def _type(kind: str) -> str:
    """VIDEOLORA_LATENT_CACHE -> latent cache: the column is narrow beside the editor's graph."""
    return kind.removeprefix("VIDEOLORA_").replace(",", " or ").replace("_", " ").lower()


def _value(one: Any, default: Any) -> str:
    return f"**{one}**" if one == default else str(one)


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
