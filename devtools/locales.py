"""The pack in other languages, locales/, from what ComfyUI says of the nodes and from translations.json."""

from __future__ import annotations

import json
from pathlib import Path

LANGUAGES = ("ja", "zh")
_TRANSLATIONS = Path(__file__).with_name("translations.json")


def files(nodes: dict[str, dict]) -> dict[str, str]:
    """Path below locales/ -> content; `nodes` are the pack's own of ComfyUI's /object_info. What has no translation stays
    English."""
    made = {}
    for index, language in enumerate(LANGUAGES):
        words = {english: others[index] for english, others in translations().items()}
        defined = {name: _without_gaps(_node(node, words)) for name, node in nodes.items()}
        categories = {
            part: words[part] for node in nodes.values() for part in node["category"].split("/") if part in words
        }
        for name, content in (("nodeDefs", defined), ("main", {"nodeCategories": categories})):
            made[f"{language}/{name}.json"] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return made


def translations() -> dict[str, list[str]]:
    """English text -> the same in each of LANGUAGES."""
    return json.loads(_TRANSLATIONS.read_text(encoding="utf-8"))


def texts(nodes: dict[str, dict]) -> set[str]:
    """All that a user reads of the nodes."""
    found = set()
    for node in nodes.values():
        found |= {node["display_name"], node["description"], *node["output_name"], *node["category"].split("/")[1:]}
        for name, options in _inputs(node):
            found |= {_shown(name), options["tooltip"]}
    return found


def _node(node: dict, words: dict[str, str]) -> dict:
    return {
        "display_name": words.get(node["display_name"]),
        "description": words.get(node["description"]),
        "inputs": {
            name: {"name": words.get(_shown(name)), "tooltip": words.get(options["tooltip"])}
            for name, options in _inputs(node)
        },
        "outputs": {str(index): {"name": words.get(name)} for index, name in enumerate(node["output_name"])},
    }


def _inputs(node: dict) -> list[tuple[str, dict]]:
    groups = (node["input"].get(group, {}) for group in ("required", "optional"))
    return [(name, spec[1]) for group in groups for name, spec in group.items()]


def _shown(name: str) -> str:
    """An input's name as words."""
    return name.replace("_", " ")


def _without_gaps(value: dict) -> dict:
    """Without what has no translation."""
    inner = {name: _without_gaps(one) if isinstance(one, dict) else one for name, one in value.items()}
    return {name: one for name, one in inner.items() if one not in (None, {})}
