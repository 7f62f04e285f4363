"""Bucket sizes: every item is resized to the bucket whose shape is nearest to its own."""

from __future__ import annotations

from math import isqrt


def bucket_sizes(resolution: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """All (width, height) of about the area of `resolution`, both sides multiples of `multiple`, sorted."""
    area = resolution[0] * resolution[1]
    side = isqrt(area)
    sizes = set()
    for width in range(_floor(side // 2, multiple), side + multiple, multiple):
        height = _floor(area // width, multiple) if width else 0
        if height:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def choose_bucket(
    size: tuple[int, int], resolution: tuple[int, int], multiple: int, *, no_upscale: bool
) -> tuple[int, int]:
    """The bucket for an item of `size` (width, height): nearest in width / height, the first of equals.

    With `no_upscale` an item that is not larger than the area keeps its own size, rounded down.
    """
    width, height = size
    if no_upscale and width * height <= resolution[0] * resolution[1]:
        return max(multiple, _floor(width, multiple)), max(multiple, _floor(height, multiple))
    return min(bucket_sizes(resolution, multiple), key=lambda bucket: abs(bucket[0] / bucket[1] - width / height))


def _floor(value: int, multiple: int) -> int:
    return value - value % multiple
