"""Which device and precision to compute with."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch


def compute_dtype(device: torch.device) -> torch.dtype:
    """For sampling: bfloat16 where the device has it, float16 on others, float32 on the CPU (exact, and as fast)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if device.type == "mps" else torch.bfloat16


def training_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on accelerators, even where it is slower: gradients in float16 would need their loss scaled."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device; the host's, for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def release_memory(device: torch.device) -> None:
    """Give back what the allocator keeps for later, so that it counts as free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def best_device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on the device, or by this process when there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss)
