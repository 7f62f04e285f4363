"""Every dialect that LoRA files come in, read into one form and written again."""

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_loras import WAN_MATRICES, dense, matrices_of, some_factors
from videolora.core.families import FAMILIES
from videolora.core.lora import files
from videolora.core.lora.adapter import attached
from videolora.core.lora.factors import DoRAFactors, summed
from videolora.core.lora.names import LoRANames, Named, Share
from videolora.core.modules.layers import Linear

WAN = FAMILIES["wan"]
ROOT = Path(__file__).resolve().parents[3]
VECTORS = ROOT / "tests" / "vectors"


def _parts(theirs, ours, cuts, of):
    """`theirs` are row parts of `ours`, cut at these places of `of` equal parts."""
    shares = [Share(start, stop, of) for start, stop in pairwise(cuts)]
    return [Named(name, ours, of_ours=share) for name, share in zip(theirs, shares, strict=True)]


# A family with fused matrices where diffusers has several, and one with several where ComfyUI has them fused.
FUSED = LoRANames(
    diffusers=(
        *_parts([f"transformer_blocks.{{i}}.attn.to_{x}" for x in "qkv"], "double_blocks.{i}.img_attn_qkv", (0, 1, 2, 3), 3),
        *_parts([f"transformer_blocks.{{i}}.attn.add_{x}_proj" for x in "qkv"], "double_blocks.{i}.txt_attn_qkv", (0, 1, 2, 3), 3),
        *_parts([*[f"single_transformer_blocks.{{i}}.attn.to_{x}" for x in "qkv"], "single_transformer_blocks.{i}.proj_mlp"],
                "single_blocks.{i}.linear1", (0, 1, 2, 3, 7), 7),
        Named("transformer_blocks.{i}.ff.net.0.proj", "double_blocks.{i}.img_mlp.fc1"),
        Named("single_transformer_blocks.{i}.proj_out", "single_blocks.{i}.linear2"),
    ),
    aliases=(Named("double_blocks.{i}.img_attn.qkv", "double_blocks.{i}.img_attn_qkv"),
             Named("double_blocks.{i}.img_mlp.0", "double_blocks.{i}.img_mlp.fc1")),
    prefixes=("official_I2V_lora_",),
)  # fmt: skip
SPLIT = LoRANames(comfyui=tuple(
    Named(f"double_blocks.{{i}}.{side}_attn_qkv", f"double_blocks.{{i}}.{side}_attn_{x}", of_theirs=Share(index, index + 1, 3))
    for side in ("img", "txt") for index, x in enumerate("qkv")
))  # fmt: skip


FUSED_MATRICES = matrices_of({
    "double_blocks.0.img_attn_qkv": (36, 12), "double_blocks.0.txt_attn_qkv": (36, 12), "double_blocks.0.img_mlp.fc1": (48, 12),
    "single_blocks.3.linear1": (84, 12), "single_blocks.3.linear2": (12, 60),
})  # fmt: skip
SPLIT_MATRICES = matrices_of({f"double_blocks.1.{side}_attn_{x}": (12, 8) for side in ("img", "txt") for x in "qkv"}
                           | {"double_blocks.1.img_attn_proj": (8, 12), "double_blocks.1.img_mlp.fc1": (32, 8)})  # fmt: skip
MODELS = {"fused": (FUSED_MATRICES, FUSED), "split": (SPLIT_MATRICES, SPLIT), "named": (WAN_MATRICES, WAN.lora_names)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dialect", files.DIALECTS)
def test_a_round_trip_through_every_dialect_is_exact(model, dialect, tmp_path):
    matrices, names = MODELS[model]
    alpha = 4.0 if files.DIALECTS[dialect].alpha == "factors" else 2.5  # a root in float32 rounds
    made = some_factors(matrices, alpha=alpha)
    files.save(tmp_path / "l.safetensors", made, {"ss_loraid": "3"}, dialect, names)
    read = files.read(tmp_path / "l.safetensors", matrices, "", names)
    assert not read.unmatched and read.matched > 0 and read.metadata["ss_loraid"] == "3"
    assert list(read.factors) == list(made)
    for name, factors in made.items():
        assert torch.equal(read.factors[name].up, factors.up)
        assert torch.equal(read.factors[name].down, factors.down)
        assert read.factors[name].alpha == factors.alpha


@pytest.mark.parametrize("model", MODELS)
def test_a_folded_alpha_is_exact_to_rounding(model, tmp_path):
    matrices, names = MODELS[model]
    made = some_factors(matrices, alpha=-3.1)
    files.save(tmp_path / "l.safetensors", made, {}, "peft_folded", names)
    for name, factors in files.read(tmp_path / "l.safetensors", matrices, "", names).factors.items():
        assert reference.relative_error(dense(factors), dense(made[name])) < 1e-6


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("model", MODELS)
def test_other_kinds_keep_their_delta_where_they_are_divided_or_joined(kind, model, tmp_path):
    matrices, names = MODELS[model]
    made = some_factors(matrices, kind=kind)
    for dialect in ("training", "comfyui"):
        files.save(tmp_path / "l.safetensors", made, {}, dialect, names)
        for name, factors in files.read(tmp_path / "l.safetensors", matrices, "", names).factors.items():
            torch.testing.assert_close(dense(factors), dense(made[name]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=rf"is a {kind}, which PEFT has no form for: resize it"):
        files.save(tmp_path / "l.safetensors", made, {}, "peft", names)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_factors_are_cut_placed_summed_and_written_as_a_lora_exactly(kind):
    factors = next(iter(some_factors(FUSED_MATRICES, kind=kind).values()))
    whole = dense(factors)
    torch.testing.assert_close(dense(factors.as_lora()), whole)
    for rows in ((0, 9), (5, 20), (9, 36)):
        torch.testing.assert_close(dense(factors.cut(rows)), whole[slice(*rows)], rtol=1e-5, atol=1e-5)
    moved = dense(factors.placed(9, 54))
    torch.testing.assert_close(moved[9:45], whole)
    assert not moved[:9].any() and not moved[45:].any()
    torch.testing.assert_close(
        dense(summed([factors, factors.cut((0, 9)).placed(0, 36)]))[:9], 2 * whole[:9], rtol=1e-5, atol=1e-5
    )


def test_a_part_of_a_joined_matrix_may_be_missing(tmp_path):
    """A LORAID may own q and not k and v: ComfyUI's fused matrix then has zero rows, and they come back as nothing."""
    made = some_factors([SPLIT_MATRICES[1]])
    files.save(tmp_path / "l.safetensors", made, {}, "comfyui", SPLIT)
    up = load_file(tmp_path / "l.safetensors")["diffusion_model.double_blocks.1.img_attn_qkv.lora_up.weight"]
    assert up.shape == (36, 4) and not up[:12].any() and not up[24:].any()
    read = files.read(tmp_path / "l.safetensors", SPLIT_MATRICES, "", SPLIT)
    assert torch.equal(read.factors["double_blocks.1.img_attn_k"].up, made["double_blocks.1.img_attn_k"].up)
    assert list(read.factors) == ["double_blocks.1.img_attn_k"]


def test_parts_of_different_scale_are_joined_exactly(tmp_path):
    q, k = SPLIT_MATRICES[:2]
    made = {**some_factors([q], rank=4, alpha=1.0), **some_factors([k], rank=2, alpha=16.0, seed=1)}
    files.save(tmp_path / "l.safetensors", made, {}, "comfyui", SPLIT)
    assert float(load_file(tmp_path / "l.safetensors")["diffusion_model.double_blocks.1.img_attn_qkv.alpha"]) == 6.0
    read = files.read(tmp_path / "l.safetensors", SPLIT_MATRICES, "", SPLIT)
    for name, factors in made.items():
        assert torch.equal(dense(read.factors[name]), dense(factors))


# Stems as the tools write them, and how they write the factors.
WRITERS = {
    "training": ("lora_unet_blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
    "two bars": ("lora_unet__blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
    "lycoris": ("lycoris_blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
    "onetrainer": ("lora_transformer_blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
    "diffusion-pipe": ("diffusion_model.blocks.0.self_attn.q", "lora_A.weight", "lora_B.weight"),
    "peft": ("base_model.model.blocks.0.self_attn.q", "lora_A.default.weight", "lora_B.default.weight"),
    "prefixed": ("model.diffusion_model.blocks.0.self_attn.q", "lora_A.weight", "lora_B.weight"),
    "diffsynth": ("pipe.dit.blocks.0.self_attn.q", "lora_A.default.weight", "lora_B.default.weight"),
    "bare": ("blocks.0.self_attn.q", "lora_A.weight", "lora_B.weight"),
    "diffusers": ("transformer.blocks.0.attn1.to_q", "lora_A.weight", "lora_B.weight"),
    "diffusers old": ("transformer.blocks.0.attn1.to_q", "lora.down.weight", "lora.up.weight"),
    "diffusers trainer": ("blocks.0.attn1.to_q", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "onetrainer diffusers": ("lora_transformer_blocks_0_attn1_to_q", "lora_down.weight", "lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writers_names_lead_to_the_same_lora(writer, tmp_path):
    stem, down, up = WRITERS[writer]
    a, b = torch.randn(4, 12), torch.randn(16, 4)
    save_file({f"{stem}.{down}": a, f"{stem}.{up}": b, f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / "l.safetensors")
    read = files.read(tmp_path / "l.safetensors", WAN_MATRICES, "", WAN.lora_names)
    found = read.factors["blocks.0.self_attn.q"]
    assert torch.equal(found.down, a) and torch.equal(found.up, b) and found.alpha == 2.0
    assert "rank 4, alpha 2, 3 keys matched" in read.report()
    assert ("diffusers' names" in read.dialect) == ("to_q" in stem)


def test_a_family_may_know_further_prefixes_and_aliases(tmp_path):
    tensors = {"official_I2V_lora_double_blocks_0_img_attn_qkv.lora_down.weight": torch.randn(2, 12),
               "official_I2V_lora_double_blocks_0_img_attn_qkv.lora_up.weight": torch.randn(36, 2),
               "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.randn(2, 12),
               "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.randn(48, 2)}  # fmt: skip
    save_file(tensors, tmp_path / "l.safetensors")
    read = files.read(tmp_path / "l.safetensors", FUSED_MATRICES, "", FUSED)
    assert list(read.factors) == ["double_blocks.0.img_attn_qkv", "double_blocks.0.img_mlp.fc1"]


def test_alpha_comes_from_pefts_settings_where_no_tensor_has_it(tmp_path):
    stem = "base_model.model.blocks.0.self_attn.q"
    tensors = {f"{stem}.lora_A.weight": torch.randn(4, 12), f"{stem}.lora_B.weight": torch.randn(16, 4)}
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path)
    alpha = lambda: files.read(path, WAN_MATRICES, "").factors["blocks.0.self_attn.q"].alpha  # noqa: E731
    assert alpha() == 4.0
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 9}))
    assert alpha() == 9.0
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_alpha": 9, "use_rslora": True, "alpha_pattern": {"self_attn.q": 3}})
    )
    assert alpha() == pytest.approx(3 * math.sqrt(4))


def test_patterns_choose_among_the_matrices_of_a_file(tmp_path):
    files.save(tmp_path / "l.safetensors", some_factors(WAN_MATRICES), {})
    read = files.read(tmp_path / "l.safetensors", WAN_MATRICES, "", include=(r"blocks\.1\..*",), exclude=(".*ffn.*",))
    assert list(read.factors) == ["blocks.1.self_attn.o"]
    with pytest.raises(ValueError, match="leave none of its 5"):
        files.read(tmp_path / "l.safetensors", WAN_MATRICES, "", exclude=(".*",))
    with pytest.raises(ValueError, match="'ffn' matches none"):
        files.read(tmp_path / "l.safetensors", WAN_MATRICES, "", include=("ffn",))


def _vector_matrices(name):
    """The vectors' LoRAs are for matrices of 20 x 24, named as their dotted files say."""
    dotted = load_file(VECTORS / f"lora_{name}_other.safetensors")
    stems = {key.removeprefix("diffusion_model.").rsplit(".lora_", 1)[0] for key in dotted}
    return matrices_of(dict.fromkeys(sorted(stems), (20, 24)))


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "hunyuan_video_15"])
def test_conversion_gives_what_the_reference_gives(name, tmp_path):
    matrices = _vector_matrices(name)
    trained = files.read(VECTORS / f"lora_{name}_default.safetensors", matrices, "")
    files.save(tmp_path / "other.safetensors", trained.factors, trained.metadata, "peft_folded")
    assert_same_tensors(tmp_path / "other.safetensors", VECTORS / f"lora_{name}_other.safetensors")
    other = files.read(VECTORS / f"lora_{name}_other.safetensors", matrices, "")
    files.save(tmp_path / "again.safetensors", other.factors, other.metadata)
    assert_same_tensors(tmp_path / "again.safetensors", VECTORS / f"lora_{name}_default_again.safetensors")


def assert_same_tensors(made, expected):
    made, expected = load_file(made), load_file(expected)
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(made[key], value.float(), rtol=1e-6, atol=1e-6)


def _dora(path, m, magnitude, seed=1):
    factors = some_factors([m], seed=seed)[m.name]
    stem = "lora_unet_" + m.name.replace(".", "_")
    save_file({f"{stem}.lora_down.weight": factors.down, f"{stem}.lora_up.weight": factors.up,
               f"{stem}.alpha": torch.tensor(factors.alpha), f"{stem}.dora_scale": magnitude}, path)  # fmt: skip
    return factors


@pytest.mark.parametrize("over", ["rows", "columns"])
@pytest.mark.parametrize("multiplier", [1.0, 0.4])
def test_a_dora_gives_rows_or_columns_their_length_merged_and_applied(multiplier, over, tmp_path):
    m = WAN_MATRICES[0]
    torch.manual_seed(0)
    linear = Linear(m.columns, m.rows).requires_grad_(False)
    weight, magnitude = linear.weight.detach(), torch.rand((m.rows, 1) if over == "rows" else (1, m.columns)) + 0.5
    inner = _dora(tmp_path / "l.safetensors", m, magnitude)
    read = files.read(tmp_path / "l.safetensors", WAN_MATRICES, "").factors[m.name]
    direction = weight + dense(inner)
    length = direction.norm(dim=1 if over == "rows" else 0, keepdim=True)
    expected = weight + multiplier * (direction / length * magnitude - weight)
    band, parts = weight.clone(), [(0, weight[:7]), (7, weight[7:])]
    measured = read.measured(lambda: parts)
    for first, part in parts:  # in bands, as a merge does it
        measured.add_to(band[first : first + len(part)], first, multiplier, part)
    torch.testing.assert_close(band, expected)
    x = torch.randn(2, 5, m.columns)
    holder = torch.nn.ModuleDict({"linear": linear})
    with torch.no_grad(), attached(holder, {"linear": read.adapter(read.touched, multiplier)}) as model:
        torch.testing.assert_close(model["linear"](x), x @ expected.T + linear.bias)
    files.save(tmp_path / "again.safetensors", {m.name: read}, {}, "comfyui")
    again = files.read(tmp_path / "again.safetensors", WAN_MATRICES, "").factors[m.name]
    assert torch.equal(again.magnitude, magnitude)


def test_a_dora_leaves_rows_of_zeros_as_they_are(tmp_path):
    m = WAN_MATRICES[0]
    _dora(tmp_path / "l.safetensors", m, torch.ones(m.rows, 1))
    dora = files.read(tmp_path / "l.safetensors", WAN_MATRICES, "").factors[m.name]
    weight = -dense(dora.inner)
    assert torch.equal(weight + dense(dora, 1.0, weight), torch.zeros_like(weight))


def test_a_dora_of_a_wrong_shape_and_one_of_fused_rows_are_refused_by_name(tmp_path):
    m = WAN_MATRICES[0]
    _dora(tmp_path / "l.safetensors", m, torch.ones(m.columns))
    with pytest.raises(ValueError, match="a length for each row or for each column"):
        files.read(tmp_path / "l.safetensors", WAN_MATRICES, "")
    tensors = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(2, 12),
               "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(12, 2),
               "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.ones(12)}  # fmt: skip
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match="DoRA of some rows of a fused matrix"):
        files.read(tmp_path / "l.safetensors", FUSED_MATRICES, "", FUSED)


@pytest.mark.parametrize("key", ["blocks.0.self_attn.q.oft_blocks", "lora_unet_blocks_0_self_attn_q.hada_t1"])
def test_kinds_that_cannot_be_applied_are_refused_by_name(key, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match=r"neither a LoRA nor a LoHa.*(OFT|Tucker)"):
        files.read(tmp_path / "l.safetensors", WAN_MATRICES, "")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("lora_up.weight", torch.full((16, 4), torch.nan), "not finite"), ("alpha", torch.tensor(torch.inf), "not finite"),
     ("alpha", torch.ones(2), "2 alphas"), ("lora_up.weight", torch.ones(16, 3), "do not fit each other"),
     ("lora_up.weight", None, "has only alpha and down")],
)  # fmt: skip
def test_damaged_files_are_refused_with_the_matrix_that_is_damaged(key, value, message, tmp_path):
    path = tmp_path / "l.safetensors"
    files.save(path, some_factors(WAN_MATRICES[:1]), {})
    changed = {**load_file(path), f"lora_unet_blocks_0_self_attn_q.{key}": value}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    with pytest.raises(ValueError, match=rf"l\.safetensors.*'blocks_0_self_attn_q'.*{message}"):
        files.read(path, WAN_MATRICES, "")


@pytest.mark.parametrize(
    "settings", ["{", "[1]", '{"transformer.lora_alpha": "x"}', '{"transformer.alpha_pattern": {"a": NaN}}']
)
def test_peft_settings_that_cannot_be_read_are_an_error_that_names_the_file(settings, tmp_path):
    files.save(tmp_path / "l.safetensors", some_factors(WAN_MATRICES), {}, "peft")
    save_file(load_file(tmp_path / "l.safetensors"), tmp_path / "l.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(ValueError, match=r"l\.safetensors: PEFT's settings"):
        files.read(tmp_path / "l.safetensors", WAN_MATRICES, "")


def test_differences_of_norms_and_biases_are_reported_as_not_matched(tmp_path):
    files.save(tmp_path / "l.safetensors", some_factors(WAN_MATRICES), {})
    more = {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(4),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(4),
    }
    save_file({**load_file(tmp_path / "l.safetensors"), **more}, tmp_path / "l.safetensors")
    assert sorted(files.read(tmp_path / "l.safetensors", WAN_MATRICES, "").unmatched) == sorted(more)


COMFYUI = """
import json, sys
folder, sys.argv = sys.argv[1], [sys.argv[0], "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.lora, comfy.model_base, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file

class Config:
    unet_config = {}

for described in Path(folder).glob("*.json"):
    shapes = json.loads(described.read_text())
    kind = comfy.model_base.WAN21 if described.stem == "wan" else comfy.model_base.HunyuanVideo
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.model_config = Config()
    model.state_dict = lambda: {f"diffusion_model.{name}.weight": None for name in shapes}
    keys = comfy.lora.model_lora_keys_unet(model)
    for path in Path(folder).glob(described.stem + "-*.safetensors"):
        lora = load_file(path)
        patches = comfy.lora.load_lora(lora, keys, log_missing=False)
        used = {key for patch in patches.values() for key in patch.loaded_keys}
        used |= {key for key in lora if key.endswith(".alpha") and key[:-6] in keys}
        deltas, weights = {}, load_file(described.with_suffix(".weights"))
        for name, patch in patches.items():
            short = name.removeprefix("diffusion_model.").removesuffix(".weight")
            weight = weights[short]
            deltas[short] = patch.calculate_weight(weight.clone(), name, 0.7, 1.0, None, lambda x: x) - weight
        save_file(deltas, path.with_suffix(".deltas"), {"unused": json.dumps(sorted(lora.keys() - used))})
"""
# Official name -> ComfyUI's, as in the checkpoints that ComfyUI takes.
TO_COMFYUI = {"img_attn_qkv": "img_attn.qkv", "txt_attn_qkv": "txt_attn.qkv", "img_attn_proj": "img_attn.proj", "txt_attn_proj": "txt_attn.proj",
              "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "mod.linear": "mod.lin", "modulation.linear": "modulation.lin"}  # fmt: skip


def _block(manifest, blocks, factor):
    """The matrices of some blocks of an official checkpoint, made smaller by `factor`."""
    chosen = {name.removesuffix(".weight"): shape for name, shape in reference.manifest(manifest).items()
              if name.startswith(tuple(blocks)) and name.endswith(".weight") and len(shape) == 2}  # fmt: skip
    return matrices_of({name: (shape[0] // factor, shape[1] // factor) for name, shape in chosen.items()})


def _for_comfyui(names, split):
    """ComfyUI's names of the matrices and the rows that ours are in it."""
    found = {}
    for m in names:
        name = m.name
        if split and name[-2:] in ("_q", "_k", "_v"):
            index = "qkv".index(name[-1])
            found[m.name] = (f"{name[:-7]}_attn.qkv", slice(index * m.rows, (index + 1) * m.rows))
            continue
        for ours, theirs in TO_COMFYUI.items():
            name = name.replace(ours, theirs)
        found[m.name] = (name, slice(None))
    return found


def test_comfyuis_own_loader_uses_every_key_of_what_is_converted_for_it_and_makes_the_same_deltas(tmp_path):
    models = {
        "wan": (_block("wan21_i2v_14B_480p_720p", ["blocks.0.", "blocks.39."], 64), WAN.lora_names),
        "hv": (_block("hunyuanvideo_dit_t2v_720p_official", ["double_blocks.0.", "single_blocks.39."], 64), FUSED),
        "hv15": (_block("hunyuanvideo15_dit_t2v_i2v_official", ["double_blocks.0.", "double_blocks.53."], 64), SPLIT),
    }  # fmt: skip
    made, places, weights = {}, {}, {}
    for model, (matrices, names) in models.items():
        places[model] = _for_comfyui(matrices, split=model == "hv15")
        shapes = {}
        for m in matrices:
            name, _ = places[model][m.name]
            shapes[name] = (m.rows + shapes.get(name, (0, 0))[0], m.columns)
        (tmp_path / f"{model}.json").write_text(json.dumps(shapes))
        weights[model] = {
            name: torch.linspace(-1, 1, rows * columns).view(rows, columns) for name, (rows, columns) in shapes.items()
        }
        save_file(weights[model], tmp_path / f"{model}.weights")
        for kind in ("lora", "loha", "lokr", "dora"):
            made[model, kind] = some_factors(matrices, kind="lora" if kind == "dora" else kind)
            if kind == "dora":
                if model == "hv15":
                    continue  # ComfyUI has its matrices fused, and no length of some rows of a column is known
                made[model, kind] = {
                    m.name: DoRAFactors(made[model, kind][m.name], 1 + torch.rand(1, m.columns)) for m in matrices
                }
            for dialect in ("comfyui", "training", "peft", "peft_folded"):
                if (kind != "lora" and dialect.startswith("peft")) or (model != "wan" and dialect != "comfyui"):
                    continue
                files.save(tmp_path / f"{model}-{kind}-{dialect}.safetensors", made[model, kind], {}, dialect, names)
    done = subprocess.run(
        [sys.executable, "-c", COMFYUI, str(tmp_path)], cwd=ROOT / ".dev" / "ComfyUI", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written = sorted(tmp_path.glob("*.deltas"))
    assert len(written) == len(list(tmp_path.glob("*.safetensors"))) == 3 * 3 + 2 + 1 + 2 + 3
    for path in written:
        model, kind, _ = path.stem.split("-")
        deltas = load_file(path)
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["unused"]) == []
        for name, factors in made[model, kind].items():
            theirs, rows = places[model][name]
            expected = dense(factors, 0.7, weights[model][theirs][rows])
            assert reference.relative_error(deltas[theirs][rows], expected) < 1e-5, (path.stem, name)
