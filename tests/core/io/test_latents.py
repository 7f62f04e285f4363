"""Files of latents, ours and ComfyUI's."""

import pytest
import torch
from safetensors.torch import save_file
from videolora.core.io import latents


def test_latents_come_back_with_what_they_were_sampled_with(tmp_path):
    made = torch.randn(2, 16, 3, 4, 4)
    latents.save(tmp_path / "a.latent", made, {"seed": "7", "prompt": "ein Käfer"})
    found, told = latents.load(tmp_path / "a.latent")
    assert torch.equal(found, made) and told == {"seed": "7", "prompt": "ein Käfer"}


def test_files_are_numbered_on_and_never_written_over(tmp_path):
    made = torch.zeros(1, 16, 1, 2, 2)
    (tmp_path / "video_odd.latent").touch()
    paths = [latents.save_numbered(tmp_path / "video", made + number, {}) for number in range(3)]
    assert [path.name for path in paths] == ["video_00001.latent", "video_00002.latent", "video_00003.latent"]
    assert float(latents.load(paths[1])[0].mean()) == 1
    paths[0].unlink()
    assert latents.save_numbered(tmp_path / "video", made, {}).name == "video_00004.latent"


@pytest.mark.parametrize("tensors", [{"weight": torch.zeros(2)}, {"latent_tensor": torch.zeros(1, 4, 8, 8)}])
def test_other_files_are_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "other.latent")
    with pytest.raises(ValueError, match=r"other\.latent holds no video latents"):
        latents.load(tmp_path / "other.latent")
