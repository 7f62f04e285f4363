"""VAEs that work on tiles."""

import pytest
import torch
from videolora.core.families import FAMILIES
from videolora.core.modules.tiling import TiledVAE, TimeTiledVAE, check_tile, check_tile_frames, tiled
from videolora.core.shapes import Tiles

LATENT = FAMILIES["wan"].latent


class LocalVAE:
    """Latents that follow from their own 8 x 8 pixels alone, so that tiles must give what the whole frame gives."""

    def encode(self, video):
        grey = torch.nn.functional.avg_pool3d(video[:, :, ::4].mean(1, keepdim=True), (1, 8, 8))
        return grey * torch.linspace(0.5, 2, 16).view(1, 16, 1, 1, 1)

    def decode(self, latents):
        for index in range(latents.shape[2]):
            frame = latents[:, :3, index : index + 1].repeat_interleave(8, 3).repeat_interleave(8, 4)
            yield frame.expand(-1, -1, 1 if index == 0 else 4, -1, -1)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (200, 72), (64, 344)])
def test_tiles_give_what_the_whole_frame_gives_where_a_latent_depends_on_its_own_pixels(height, width):
    video = torch.rand(1, 3, 9, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = LocalVAE().encode(video)
    tiled = TiledVAE(LocalVAE(), 64, LATENT)
    torch.testing.assert_close(tiled.encode(video), latents)
    whole, pieces = list(LocalVAE().decode(latents)), list(tiled.decode(latents))
    assert len(whole) == len(pieces) == 3
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)


def test_no_tile_is_larger_than_asked_for():
    sizes = []

    class Watched(LocalVAE):
        def encode(self, video):
            sizes.append(tuple(video.shape[3:]))
            return super().encode(video)

    TiledVAE(Watched(), 64, LATENT).encode(torch.zeros(1, 3, 1, 48, 200))
    assert set(sizes) == {(48, 64)}


def test_tiles_change_smoothly_where_they_disagree():
    class Disagreeing(LocalVAE):
        def __init__(self):
            self.calls = 0

        def encode(self, video):
            self.calls += 1
            return super().encode(video) * 0 + self.calls

    line = TiledVAE(Disagreeing(), 128, LATENT).encode(torch.zeros(1, 3, 1, 128, 224))[0, 0, 0, 0]
    assert line.shape == (28,) and line[0] == 1 and line[-1] == 2
    assert (line.diff() >= 0).all() and line.diff().max() < 0.3


@pytest.mark.parametrize("tile", [-64, 32, 100, 65])
def test_a_tile_size_that_cannot_be_used_is_refused_with_what_can(tile):
    with pytest.raises(ValueError, match=rf"tile size is {tile}: use a multiple of 32 from 64 on"):
        check_tile(tile, LATENT)


@pytest.mark.parametrize("frames", [1, 5, 33, 37, 41, 65, 101])
def test_tiles_in_time_give_what_the_whole_clip_gives_where_a_latent_depends_on_its_own_frames(frames):
    video = torch.rand(1, 3, frames, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, by_tiles = LocalVAE().encode(video), TimeTiledVAE(LocalVAE(), 32, LATENT)
    torch.testing.assert_close(by_tiles.encode(video), latents)
    chunks = list(by_tiles.decode(latents))
    torch.testing.assert_close(torch.cat(chunks, dim=2), torch.cat(list(LocalVAE().decode(latents)), dim=2))
    assert frames <= 33 or len(chunks) > 2


def test_tiles_in_time_change_smoothly_where_they_disagree():
    class Disagreeing(LocalVAE):
        calls = 0

        def encode(self, video):
            self.calls += 1
            assert video.shape[2] <= 33
            return super().encode(video) * 0 + self.calls

    line = TimeTiledVAE(Disagreeing(), 32, LATENT).encode(torch.zeros(1, 3, 57, 8, 8))[0, 0, :, 0, 0]
    assert line.shape == (15,) and line[0] == 1 and line[-1] == 2
    assert (line.diff() >= 0).all() and line.diff().max() < 0.5


def test_tiles_in_space_and_time_work_together():
    video = torch.rand(1, 3, 49, 96, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    both = tiled(LocalVAE(), Tiles(frames=32, side=64), LATENT)
    latents = LocalVAE().encode(video)
    torch.testing.assert_close(both.encode(video), latents)
    torch.testing.assert_close(torch.cat(list(both.decode(latents)), 2), torch.cat(list(LocalVAE().decode(latents)), 2))


@pytest.mark.parametrize("frames", [-16, 16, 40])
def test_tile_frames_that_cannot_be_used_are_refused_with_what_can(frames):
    with pytest.raises(ValueError, match=rf"tile frames is {frames}: use a multiple of 16 from 32 on"):
        check_tile_frames(frames, LATENT)
