"""HunyuanVideo's transformer as other tools lay it out in their files."""

import torch
from videolora.core.families.hunyuan_video.checkpoint import _DIFFUSERS, _DIFFUSERS_BLOCKS, COMFYUI


def in_comfyuis_names(weights):
    return {"model.model." + COMFYUI.to_file(name): value for name, value in weights.items()}


def in_diffusers_names(weights):
    """The same transformer as diffusers has it."""
    layers = dict(_DIFFUSERS)
    for ours, theirs, table in _DIFFUSERS_BLOCKS:
        for number in range(4):
            layers |= {f"{ours}.{number}.{a}": tuple(f"{theirs}.{number}.{s}" for s in b) for a, b in table.items()}
    made, dim = {}, weights["img_in.proj.bias"].shape[0]
    for name, value in weights.items():
        layer, kind = name.rsplit(".", 1)
        if layer == "final_layer.adaLN_modulation.1":
            made[f"norm_out.linear.{kind}"] = torch.cat(value.chunk(2)[::-1])
            continue
        sources = layers[layer]
        sizes = [dim] * 3 + [len(value) - 3 * dim] * (len(sources) - 3) if len(sources) > 1 else [len(value)]
        made |= {f"{s}.{kind}": part.clone() for s, part in zip(sources, value.split(sizes), strict=True)}
    return made


def in_module(weights):
    return {"module": weights}
