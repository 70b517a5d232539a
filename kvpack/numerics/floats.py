"""Converts bit patterns of floats to float32 and back in numpy, which has no bf16, and to torch tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

FLOAT_BITS = {"BF16": (8, 7), "F16": (5, 10), "F32": (8, 23)}
"""Numbers of exponent bits and mantissa bits of each dtype (safetensors spelling)."""

UINT: dict[str, type[np.unsignedinteger[Any]]] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
"""Unsigned dtype that holds the bit patterns of each dtype."""

NAN = {
    "BF16": 0x7FC0,
    "F16": 0x7E00,
    "F32": 0x7FC00000,
    "F64": 0x7FF8000000000000,
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7E,
    "F8_E4M3FNUZ": 0x80,
    "F8_E5M2FNUZ": 0x80,
}
"""The bit pattern of a NaN of each dtype that has one."""

TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""torch's name of each dtype."""

Bits = NDArray[np.unsignedinteger[Any]]

_BLOCK = 1 << 16
"""Number of values that are rounded at once; intermediate arrays of this size stay in a core's cache."""


def to_float32(bits: Bits, dtype: str) -> NDArray[np.float32]:
    """Convert bit patterns of ``dtype`` to float32 values of the same shape, exactly; NaN payloads are kept."""
    if dtype == "F32":
        return np.ascontiguousarray(bits, np.uint32).view(np.float32)
    if dtype == "F16":
        with np.errstate(invalid="ignore"):
            return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> Bits:
    """Round float32 values to bit patterns of ``dtype``, to nearest with ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits, out = values.reshape(-1).view(np.uint32), np.empty(values.shape, np.uint16)
    flat = out.reshape(-1)
    for at in range(0, bits.size, _BLOCK):
        some = bits[at : at + _BLOCK]
        rounded = some >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += some
        rounded >>= np.uint32(16)
        nan = np.isnan(some.view(np.float32))
        if nan.any():
            rounded[nan] = (some[nan] >> np.uint32(16)) | np.uint32(0x40)
        flat[at : at + _BLOCK] = rounded
    return out


def to_torch(bits: Bits, dtype: str) -> torch.Tensor:
    """Return a copy of BF16, F16 or F32 bit patterns as a torch tensor of that dtype in main memory."""
    import torch

    wanted: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return torch.from_numpy(np.array(bits).view(np.dtype(f"i{bits.itemsize}"))).view(wanted)


def from_torch(tensor: torch.Tensor) -> Bits:
    """Return the bit patterns of a tensor of floats, without a copy if it lies in main memory."""
    import torch

    array = tensor.cpu().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()
    bits: Bits = array.view(f"<u{array.itemsize}")
    return bits
