"""The parameters of kernels, read from their CUDA sources, so that a wrong call is an error and not a wrong result.

CUDA's driver takes an array of addresses and cannot tell how many of them a kernel reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvpack.gpu.runtime.source import source_of

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_KERNEL = re.compile(r'extern "C" __global__ void\s*(?:__launch_bounds__\(([^()]*)\))?\s*(\w+)\(([^()]*)\)')
_PARAMETER = re.compile(r"(.+?)(\w+)")
_INTEGERS = {"i64", "u64"}
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Signature:
    """A kernel's name (``folder/file:function``), its parameters, and for each whether it is an address."""

    kernel: str
    parameters: tuple[str, ...]
    addresses: tuple[bool, ...]
    threads: int | None
    """Threads of every block, if ``__launch_bounds__`` gives a plain number, else None."""

    def words(self, arguments: tuple[Any, ...]) -> list[int]:
        """Return the 64-bit words that are handed to the kernel for these arguments.

        A tensor gives the address of its first element, None the address 0. An integer is taken as it is, also where
        the kernel expects an address.

        Raises:
            TypeError: the number of arguments is wrong; or an argument is neither of these, or is a tensor or None
                where the kernel expects an integer. The message names the kernel.

        """
        if len(arguments) != len(self.addresses):
            raise TypeError(
                f"{self.kernel} takes {len(self.addresses)} arguments ({', '.join(self.parameters)}), "
                f"and {len(arguments)} were given"
            )
        words = []
        for argument, is_address in zip(arguments, self.addresses, strict=True):
            if isinstance(argument, int):
                words.append(argument & _WORD)
            elif not is_address:
                raise self._wrong(len(words), argument)
            elif argument is None:
                words.append(0)
            else:
                try:
                    words.append(argument.data_ptr())
                except AttributeError:
                    raise self._wrong(len(words), argument) from None
        return words

    def _wrong(self, position: int, argument: object) -> TypeError:
        kind = "a tensor, an address or None" if self.addresses[position] else "an integer"
        given = type(argument).__name__
        return TypeError(f"{self.kernel} takes {kind} as {self.parameters[position]}, and a {given} was given")


@cache
def signature_of(kernel: str) -> Signature:
    """Return the signature of the kernel ``folder/file:function``; it is parsed once in a process.

    Raises:
        ValueError: the source has no such kernel, or a parameter is neither an address nor a 64-bit integer.

    """
    unit, function = kernel.rsplit(":", 1)
    found = signatures_in(unit)
    if function not in found:
        raise ValueError(f"{unit}.cu has no kernel {function!r}; it has: {', '.join(found)}")
    return found[function]


@cache
def signatures_in(unit: str) -> dict[str, Signature]:
    """Return the signatures of all kernels of the source ``folder/file``, by the names of the functions.

    Raises:
        ValueError: a parameter is neither an address nor a 64-bit integer.

    """
    found = {}
    for bounds, function, inside in _KERNEL.findall(_COMMENT.sub("", source_of(unit))):
        kernel = f"{unit}:{function}"
        parsed = [_parameter(kernel, text) for text in inside.split(",")] if inside.strip() else []
        threads = int(bounds) if bounds.isdecimal() else None
        names, addresses = tuple(name for name, _ in parsed), tuple(address for _, address in parsed)
        found[function] = Signature(kernel, names, addresses, threads)
    return found


def _parameter(kernel: str, text: str) -> tuple[str, bool]:
    """Return a parameter's name and whether it is an address."""
    match = _PARAMETER.fullmatch(text.strip())
    kind, name = (match[1].strip(), match[2]) if match else ("", "")
    if not kind.endswith("*") and kind not in _INTEGERS:
        raise ValueError(f"{kernel}: the parameter {text.strip()!r} is neither an address nor a 64-bit integer")
    return name.rstrip("_"), kind.endswith("*")
