"""Reference inputs and outputs: small checkpoints whose weights follow from their names, official tensor lists."""

import json
from math import prod
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from safetensors import safe_open

HERE = Path(__file__).parent


def weights(shapes, seed=0):
    """Tensor name -> shape becomes tensor name -> value: the rule that the reference outputs were made with."""
    made = {}
    for name, shape in shapes.items():
        rng = np.random.RandomState((crc32(name.encode()) + seed) & 0xFFFFFFFF)
        x = rng.standard_normal(prod(shape)).astype(np.float32).reshape(shape)
        if name.endswith("bias"):
            x = 0.02 * x
        elif len(shape) == 1:
            x = 1 + 0.1 * x
        else:
            x = x / np.float32(np.sqrt(prod(shape[1:])))
        made[name] = torch.from_numpy(np.ascontiguousarray(x.astype(np.float32)))
    return made


def vector(name):
    """Inputs and outputs, and the weights of the small model they belong to."""
    with safe_open(HERE / "vectors" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    shapes = json.loads(metadata["shapes"])
    return tensors, weights(shapes, json.loads(metadata["seed"]))


def manifest(name):
    """Tensor name -> shape of an official checkpoint."""
    entries = json.loads((HERE / "manifests" / f"{name}.json").read_text(encoding="utf-8"))["tensors"]
    shapes = {}
    for key, entry in entries.items():
        for i in range(entry.get("repeat", 1)):
            shapes[key.replace("{i}", str(i)) if "repeat" in entry else key] = tuple(entry["shape"])
    return shapes


def relative_error(output, reference):
    return float((output.double() - reference.double()).norm() / reference.double().norm())
