"""docs/defaults.md: the releases that the pack knows, and the settings that come with each by themselves."""

from __future__ import annotations

import pack

_TITLES = ("release", "variant", "size, frames", "steps", "flow shift", "guidance", "shift in training")
_INTRO = """# What comes by itself

What the authors of each release recommend. Flow shift, guidance and the shift of the training are what a value of 0 (or *auto*) stands
for; size and steps are those that the models were made for, and are set in their nodes.
"""


def text() -> str:
    """The page."""
    families = pack.load("core.families").FAMILIES
    return "\n".join([_INTRO, *(_family(family) for family in families.values())])


def _family(family) -> str:
    usable = [variant for variant in family.variants.values() if not variant.unusable]
    lines = [_TITLES, ("---",) * len(_TITLES), *(_row(variant) for variant in usable)]
    refused = [f"{variant.title} is recognised and refused: {variant.unusable}." for variant in family.variants.values()
               if variant.unusable]  # fmt: skip
    return "\n".join(
        [f"## {family.title}", "", f"{family.fps} frames per second.", ""]
        + [f"| {' | '.join(line)} |" for line in lines]
        + ["", *refused, ""]
    )


def _row(variant) -> tuple[str, ...]:
    shift = f"{variant.sampling_shift:g}"
    by_value: dict[float, list[str]] = {}
    for (width, height), value in variant.shift_at.items():
        by_value.setdefault(value, []).append(f"{width} x {height}")
    shift += "".join(f"; {value:g} at {' and '.join(sizes)}" for value, sizes in by_value.items())
    if variant.few_steps:
        shift += f"; {variant.few_steps_shift:g} below {variant.few_steps} steps"
    guidance = f"{variant.guidance:g}"
    if variant.embedded_guidance:
        guidance += f", embedded {variant.embedded_guidance:g}"
    if variant.expert:
        guidance += f"; {'from' if variant.expert == 'high' else 'below'} noise level {variant.boundary:g}"
    training = f"{variant.training_shift:g}"
    if variant.training_sampling != "shift":
        training = f"`{variant.training_sampling}`; {training} with `shift`"
    size = variant.size
    return (variant.title, f"`{variant.name}`", f"{size.width} x {size.height}, {size.frames}", str(variant.steps), shift,
            guidance, training)  # fmt: skip
