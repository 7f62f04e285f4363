"""Renaming of tensor names by tables, both ways. `{i}` stands for a number, such as a block's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class KeyMap:
    """Rows of (name in the file, name in the model); a row may also be a prefix that ends with a dot.

    The first matching row applies; names that no row matches stay as they are.
    """

    rows: tuple[tuple[str, str], ...] = ()

    def to_model(self, name: str) -> str:
        return _rename(name, self._forward)

    def to_file(self, name: str) -> str:
        return _rename(name, self._backward)

    @cached_property
    def _forward(self) -> list[tuple[re.Pattern, str]]:
        return [_rule(file, model) for file, model in self.rows]

    @cached_property
    def _backward(self) -> list[tuple[re.Pattern, str]]:
        return [_rule(model, file) for file, model in self.rows]


IDENTITY = KeyMap()


def _rule(source: str, target: str) -> tuple[re.Pattern, str]:
    pattern = re.escape(source).replace(r"\{i\}", r"(\d+)")
    pattern += "(.*)" if source.endswith(".") else "()"
    template, group = target, 1
    while "{i}" in template:
        template = template.replace("{i}", rf"\g<{group}>", 1)
        group += 1
    return re.compile(pattern), template + rf"\g<{group}>"


def _rename(name: str, rules: Sequence[tuple[re.Pattern, str]]) -> str:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return match.expand(template)
    return name


# Longer prefixes first, so that "model." does not hide "model.diffusion_model.".
PREFIXES = ("model.diffusion_model.", "model.language_model.", "model.model.", "diffusion_model.", "first_stage_model.", "model.", "module.",
            "language_model.model.", "text_model.", "transformer.", "visual.", "vae.", "")  # fmt: skip


def find_prefix(names: Iterable[str], anchors: Iterable[str]) -> str | None:
    """The prefix under which one of the `anchors` stands among `names`, or None."""
    names, anchors = set(names), tuple(anchors)
    return next((prefix for prefix in PREFIXES if any(prefix + anchor in names for anchor in anchors)), None)
