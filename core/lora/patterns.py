"""Choosing matrices by regular expressions on their whole names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def check_patterns(*patterns: str) -> None:
    """Raise ValueError for what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"the pattern '{pattern}' is no regular expression ({error}): use one such as .*self_attn.*"
            ) from error


def chosen(names: Iterable[str], include: Sequence[str], exclude: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those of `names` that any of `include` matches, or all without one, and none of `exclude`.

    Raises ValueError for a pattern that matches none of `known`, the names of all of the model's matrices.
    """
    check_patterns(*include, *exclude)
    for pattern in (*include, *exclude):
        if not any(re.fullmatch(pattern, name) for name in known):
            raise ValueError(
                f"the pattern '{pattern}' matches none of the model's {len(known)} matrices. It must match a whole name, "
                f"such as {known[0]}; use .*{pattern}.* for a part of it."
            )
    return [name for name in names if _is_chosen(name, include, exclude)]


def _is_chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    included = not include or any(re.fullmatch(pattern, name) for pattern in include)
    return included and not any(re.fullmatch(pattern, name) for pattern in exclude)
