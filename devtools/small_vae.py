"""A Wan 2.1 video VAE written by hand: official tensor names, few channels, and it really codes video.

Demos and tests need latents that look like something without the real checkpoint. No weight here is random or
trained; every layer does one plain job:

- Residual branches and the attention end in zeros, so these blocks pass their input through.
- The encoder halves the picture twice by averaging; the third time it keeps the four cells of each 2x2 apart.
  A latent pixel then holds four cells of 4x4 pixels in RGB (12 numbers), how RGB changes within its four
  frames (the trend, 3), and how that change differs between left and right (the sway, 1).
- The decoder sharpens the cells once and then enlarges smoothly.
- One channel, the anchor, is large and constant. The norms before the heads divide by it, so they keep the
  magnitude of everything else. It is enlarged like the picture: what zero padding takes from both at the
  border cancels in that division.
- Before a head each signal is stored as x and as -x, because silu(x) - silu(-x) = x.
"""

import pack
import torch
from torch import Tensor

# Weights are (output, input, time, height, width); a causal kernel sees the present in its last tap.

# Statistics of the official latents: users of the VAE normalise with them, so `mu` must come out like theirs.
LATENT = pack.load("core.families").FAMILIES["wan"].latent
LOG_VARIANCE = -20.0

WIDTHS = (1, 2, 4, 4)
COLOURS = 3
FEATURES = 16  # what a latent pixel holds: the signals below, in their order

# Channels inside the network: the anchor, the signals, and before a head the negated signals.
ANCHOR = 0
RGB = torch.arange(1, 4)
CELLS = torch.arange(1, 13).view(COLOURS, 4)  # cells in the order of reading
TREND = torch.arange(13, 16)
SWAY = torch.tensor(16)
SIGNALS = torch.arange(1, 17)
PICTURE_TREND = torch.arange(4, 7)
ANCHOR_LEVEL = 64.0
SMALLEST_DIM = 9  # the anchor and 16 signals with both signs need 33 of the 4 * dim channels

# A dark tone, stored as zero: what the zero padding around a picture looks like.
BRIGHTNESS = -0.6
# Mean, right - left, bottom - top and diagonal of four cells, and the typical size of each in a picture.
HAAR = torch.tensor([[1, 1, 1, 1], [-1, 1, -1, 1], [-1, -1, 1, 1], [1, -1, -1, 1]]) / 4
HAAR_SPREAD = torch.tensor([0.4, 0.08, 0.08, 0.04])
TREND_SPREAD = 0.1
SWAY_SPREAD = 0.03
SIDE = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # left and right cells

# One-dimensional kernels. After pixels were doubled, SMOOTH interpolates linearly and MERGE lays left and
# right cells side by side, blurred by [1 2 1] / 4: SHARPEN[to, from] undoes most of that beforehand.
SMOOTH = torch.tensor([0.25, 0.5, 0.25])
MERGE = torch.tensor([[0.0, 0.25, 0.25], [0.25, 0.25, 0.0]])
SHARPEN = torch.tensor([[[0, 1.5, 0], [-0.25, -0.25, 0]], [[0, -0.25, -0.25], [0, 1.5, 0]]])
# SHARPEN and MERGE keep 7/8 of a flat picture in the outermost cells, and so must the anchor.
ANCHOR_MERGE = torch.tensor([0.125, 0.75, 0.125])

# How far the two frames of a pair part along the trend: 1 suits slow changes, 0 sudden ones.
WITHIN_PAIR = 0.5


def wan_vae_tensors(dim: int = 16) -> dict[str, Tensor]:
    """The float32 checkpoint; `dim` is the width of the widest pictures, 96 in the official VAE."""
    if dim < SMALLEST_DIM:
        raise ValueError(f"The VAE cannot be {dim} channels wide: use {SMALLEST_DIM} or more.")
    tensors = {**_blank_encoder(dim), **_conv("conv1", 32, 32, 1, 1, 1)}
    tensors |= {**_conv("conv2", 16, 16, 1, 1, 1), **_blank_decoder(dim)}
    _write_encoder(tensors)
    _write_latent_scaling(tensors)
    _write_decoder(tensors)
    return tensors


def _write_encoder(tensors: dict[str, Tensor]) -> None:
    _anchor(tensors, "encoder.conv1")
    tensors["encoder.conv1.weight"][RGB, torch.arange(COLOURS), -1, 1, 1] = 1
    tensors["encoder.conv1.bias"][RGB] = -BRIGHTNESS

    for channel in (ANCHOR, *RGB):
        tensors["encoder.downsamples.2.resample.1.weight"][channel, channel, :2, :2] = 1 / 4
        tensors["encoder.downsamples.5.resample.1.weight"][channel, channel, :2, :2] = 1 / 4
        tensors["encoder.downsamples.5.time_conv.weight"][channel, channel, 1:] = 1 / 2

    split = tensors["encoder.downsamples.8.resample.1.weight"]
    split[ANCHOR, ANCHOR, :2, :2] = 1 / 4
    for cell in range(4):
        split[CELLS[:, cell], RGB, cell // 2, cell % 2] = 1
    _negate(split, SIGNALS)

    pairs = tensors["encoder.downsamples.8.time_conv.weight"][..., 0, 0]
    pairs[ANCHOR, ANCHOR, 1:] = 1 / 2
    later_minus_earlier = torch.tensor([0.0, -0.5, 0.5])
    for colour in range(COLOURS):
        for cell, side in zip(CELLS[colour], SIDE, strict=True):
            pairs[cell, cell, 1:] = 1 / 2
            pairs[TREND[colour], cell] = later_minus_earlier / 4
            pairs[SWAY, cell] = side * later_minus_earlier / CELLS.numel()
    _negate(pairs, SIGNALS)
    _read_signals(tensors, "encoder.head", SIGNALS)


def _write_latent_scaling(tensors: dict[str, Tensor]) -> None:
    """conv1 scales the features to one and gives them the official statistics; conv2 undoes it."""
    to_unit = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    for cells in _feature(CELLS):
        to_unit[cells[:, None], cells] = (HAAR / HAAR_SPREAD[:, None]).double()
    to_unit[_feature(TREND), _feature(TREND)] = 1 / TREND_SPREAD
    to_unit[_feature(SWAY), _feature(SWAY)] = 1 / SWAY_SPREAD

    mean = torch.tensor(LATENT.mean, dtype=torch.float64)
    std = torch.tensor(LATENT.std, dtype=torch.float64)
    to_mu = std[:, None] * to_unit
    to_features = torch.linalg.inv(to_mu)
    tensors["conv1.weight"][:FEATURES, :FEATURES, 0, 0, 0] = to_mu
    tensors["conv1.bias"][:FEATURES] = mean
    tensors["conv1.bias"][FEATURES:] = LOG_VARIANCE
    tensors["conv2.weight"][..., 0, 0, 0] = to_features
    tensors["conv2.bias"][:] = -to_features @ mean


def _write_decoder(tensors: dict[str, Tensor]) -> None:
    _anchor(tensors, "decoder.conv1")
    present = tensors["decoder.conv1.weight"][:, :, -1]
    for colour in range(COLOURS):
        for to in range(4):
            for source in range(4):
                kernel = torch.outer(SHARPEN[to // 2, source // 2], SHARPEN[to % 2, source % 2])
                present[CELLS[colour, to], _feature(CELLS[colour, source])] = kernel
    for signal in (*TREND, SWAY):
        present[signal, _feature(signal), 1, 1] = 1

    earlier, later = tensors["decoder.upsamples.3.time_conv.weight"][:, :, -1, 0, 0].chunk(2)
    for half, sign in ((earlier, -1), (later, 1)):
        half.copy_(torch.eye(len(half)))
        for cells, trend in zip(CELLS, TREND, strict=True):
            half[cells, trend] = sign
            half[cells, SWAY] = sign * SIDE

    merge = tensors["decoder.upsamples.3.resample.1.weight"]
    merge[ANCHOR, ANCHOR] = torch.outer(ANCHOR_MERGE, ANCHOR_MERGE)
    for colour in range(COLOURS):
        for cell in range(4):
            merge[RGB[colour], CELLS[colour, cell]] = torch.outer(MERGE[cell // 2], MERGE[cell % 2])
        merge[PICTURE_TREND[colour], TREND[colour]] = torch.outer(SMOOTH, SMOOTH)
        merge[PICTURE_TREND[colour], SWAY] = torch.outer(SMOOTH, MERGE[1] - MERGE[0])

    earlier, later = tensors["decoder.upsamples.7.time_conv.weight"][:, :, -1, 0, 0].chunk(2)
    for half, sign in ((earlier, -1), (later, 1)):
        half.copy_(torch.eye(len(half)))
        half[RGB, PICTURE_TREND] = sign * WITHIN_PAIR

    for channel in (ANCHOR, *RGB):
        tensors["decoder.upsamples.7.resample.1.weight"][channel, channel] = torch.outer(SMOOTH, SMOOTH)
        tensors["decoder.upsamples.11.resample.1.weight"][channel, channel] = torch.outer(SMOOTH, SMOOTH)
    _negate(tensors["decoder.upsamples.11.resample.1.weight"], RGB)
    _read_signals(tensors, "decoder.head", RGB)
    tensors["decoder.head.2.bias"].fill_(BRIGHTNESS)


def _anchor(tensors: dict[str, Tensor], conv: str) -> None:
    tensors[f"{conv}.bias"][ANCHOR] = ANCHOR_LEVEL


def _feature(signal: Tensor) -> Tensor:
    """Where a signal is among the features of a latent pixel, which have no anchor before them."""
    return signal - 1


def _negate(weight: Tensor, signals: Tensor) -> None:
    """Makes a layer give -x of the signals too, in the channels after the last of them."""
    weight[signals + len(signals)] = -weight[signals]


def _read_signals(tensors: dict[str, Tensor], head: str, signals: Tensor) -> None:
    """A head that gives the signals back: its norm restores their magnitude and its conv joins x and -x."""
    gamma = tensors[f"{head}.0.gamma"]
    gamma.fill_(ANCHOR_LEVEL / len(gamma) ** 0.5)
    weight = tensors[f"{head}.2.weight"]
    outputs = torch.arange(len(signals))
    weight[outputs, signals, -1, 1, 1] = 1
    weight[outputs, signals + len(signals), -1, 1, 1] = -1


def _blank_encoder(dim: int) -> dict[str, Tensor]:
    widths = [dim * factor for factor in WIDTHS]
    tensors = _conv("encoder.conv1", widths[0], COLOURS, 3, 3, 3)
    layer, inputs = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(2):
            tensors |= _residual(f"encoder.downsamples.{layer}", inputs, width)
            layer, inputs = layer + 1, width
        if level < 3:
            tensors |= _conv(f"encoder.downsamples.{layer}.resample.1", width, width, 3, 3)
            if level > 0:
                tensors |= _conv(f"encoder.downsamples.{layer}.time_conv", width, width, 3, 1, 1)
            layer += 1
    return tensors | _middle("encoder.middle", widths[-1]) | _head("encoder.head", widths[-1], 2 * FEATURES)


def _blank_decoder(dim: int) -> dict[str, Tensor]:
    widths = [dim * factor for factor in reversed(WIDTHS)]
    tensors = _conv("decoder.conv1", widths[0], FEATURES, 3, 3, 3) | _middle("decoder.middle", widths[0])
    layer, inputs = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(3):
            tensors |= _residual(f"decoder.upsamples.{layer}", inputs, width)
            layer, inputs = layer + 1, width
        if level < 3:
            inputs = width // 2
            tensors |= _conv(f"decoder.upsamples.{layer}.resample.1", inputs, width, 3, 3)
            if level < 2:
                tensors |= _conv(f"decoder.upsamples.{layer}.time_conv", 2 * width, width, 3, 1, 1)
            layer += 1
    return tensors | _head("decoder.head", widths[-1], COLOURS)


def _middle(name: str, width: int) -> dict[str, Tensor]:
    return {
        **_residual(f"{name}.0", width, width),
        f"{name}.1.norm.gamma": torch.ones(width, 1, 1),
        **_conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1),
        **_conv(f"{name}.1.proj", width, width, 1, 1),
        **_residual(f"{name}.2", width, width),
    }


def _residual(name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
    tensors = {
        f"{name}.residual.0.gamma": torch.ones(inputs, 1, 1, 1),
        **_conv(f"{name}.residual.2", outputs, inputs, 3, 3, 3),
        f"{name}.residual.3.gamma": torch.ones(outputs, 1, 1, 1),
        **_conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3),
    }
    if inputs != outputs:
        tensors |= _conv(f"{name}.shortcut", outputs, inputs, 1, 1, 1)
        tensors[f"{name}.shortcut.weight"][..., 0, 0, 0] = torch.eye(outputs, inputs)
    return tensors


def _head(name: str, width: int, outputs: int) -> dict[str, Tensor]:
    return {f"{name}.0.gamma": torch.ones(width, 1, 1, 1), **_conv(f"{name}.2", outputs, width, 3, 3, 3)}


def _conv(name: str, outputs: int, inputs: int, *kernel: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.zeros(outputs, inputs, *kernel), f"{name}.bias": torch.zeros(outputs)}
