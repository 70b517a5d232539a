"""Says on which device a cache is computed."""

from __future__ import annotations

import torch

from kvpack.numerics.processor import processor_name


def device_name(device: torch.device) -> str:
    """Return the kind and the name of a device, such as ``cuda NVIDIA H200``; for the CPU it is the processor's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{device.type} {name}"
