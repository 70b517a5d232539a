"""Says on which processor and on which device a cache is computed."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor_name() -> str:
    """Return the processor's name as the system tells it, or its kind."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the kind and the name of a device, such as ``cuda NVIDIA H200``; for the CPU it is the processor's."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return f"{device.type} {name}"
