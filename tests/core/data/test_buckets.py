"""Bucket sizes."""

import pytest
from videolora.core.data.buckets import bucket_sizes, choose_bucket

RESOLUTIONS = [(16, 16), (20, 20), (31, 17), (64, 64), (96, 48), (512, 512), (832, 480), (1000, 31)]


def test_buckets_and_picks_equal_the_reference(numerics):
    assert numerics["buckets"]
    for case in numerics["buckets"]:
        resolution = tuple(case["resolution"])
        assert len(bucket_sizes(resolution, 16)) == case["count"], case
        for size, bucket in case["picks"]:
            chosen = choose_bucket(tuple(size), resolution, 16, no_upscale=case["no_upscale"])
            assert chosen == tuple(bucket), (case["architecture"], resolution, size)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_bucket_has_positive_sides_of_the_multiple_within_the_area_in_both_orientations(resolution):
    sizes = bucket_sizes(resolution, 16)
    assert sizes
    for width, height in sizes:
        assert width > 0 and height > 0
        assert width % 16 == height % 16 == 0
        assert width * height <= resolution[0] * resolution[1]
        assert (height, width) in sizes


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_the_chosen_bucket_is_nearest_in_shape(resolution):
    sizes = bucket_sizes(resolution, 16)
    for width, height in [(1920, 1080), (1080, 1920), (7, 900), (64, 64), (3000, 10)]:
        chosen = choose_bucket((width, height), resolution, 16, no_upscale=False)
        assert chosen in sizes
        best = min(abs(w / h - width / height) for w, h in sizes)
        assert abs(chosen[0] / chosen[1] - width / height) == best


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((100, 50), (96, 48)), ((64, 64), (64, 64)), ((5, 70), (16, 64)), ((1, 1), (16, 16))],
)
def test_without_upscaling_a_small_item_keeps_its_size_rounded_down(size, bucket):
    assert choose_bucket(size, (80, 64), 16, no_upscale=True) == bucket


def test_without_upscaling_a_large_item_goes_to_a_bucket():
    assert choose_bucket((256, 128), (80, 64), 16, no_upscale=True) in bucket_sizes((80, 64), 16)
    assert choose_bucket((256, 128), (80, 64), 16, no_upscale=True) == choose_bucket(
        (256, 128), (80, 64), 16, no_upscale=False
    )
