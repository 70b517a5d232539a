"""What runs kernels: what a GPU must have, checked launches, and constants that CUDA shares with Python."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvpack.codecs.chain.base import PlaneSpec
from kvpack.codecs.chain.entropy.rans import _HEAD, Rans
from kvpack.codecs.chain.entropy.rans import cpu as rans_cpu
from kvpack.codecs.chain.entropy.scaled_rans import _HEAD as SCALED_HEAD
from kvpack.codecs.chain.transforms.token_klt import model
from kvpack.gpu.kernels import constants, dead_zone, lloyd_max, rans, scaled_rans
from kvpack.gpu.runtime import host, launch, requirements
from kvpack.gpu.runtime.signature import Signature, signature_of, signatures_in
from kvpack.gpu.runtime.source import KERNELS, source_of
from kvpack.numerics import checksum

UNITS = sorted(str(path.relative_to(KERNELS).with_suffix("")) for path in KERNELS.rglob("*.cu"))


# --- what a GPU must have


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared: int, known: bool = True) -> None:
    """Let torch and the driver see one GPU that there is not."""
    properties = SimpleNamespace(
        name="NVIDIA Test", major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared
    )
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *a: object() if name == "libcuda.so.1" else real(name, *a))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(launch, "driver", object)
    monkeypatch.setattr(launch, "nvrtc_version", lambda: "NVRTC 13.0")
    architecture = 10 * capability[0] + capability[1]
    monkeypatch.setattr(launch, "nvrtc_architectures", lambda: frozenset({architecture} if known else ()))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def test_a_gpu_that_has_all(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    with_gpu(monkeypatch, capability, 99 << 10)
    found, reason = host.find_gpu("cuda", 1)
    assert reason is None
    assert found is not None
    assert found.max_shared == 99 << 10
    assert host.find_gpu("auto", host.AUTO_BYTES)[0] is not None
    assert host.find_gpu("cuda:1", 1) == (None, "there are 1 GPUs, none is number 1")


@pytest.mark.parametrize(
    ("capability", "shared", "known", "expected"),
    [
        ((7, 5), 64, True, "the GPU NVIDIA Test has compute capability 7.5, and kvpack's kernels need 8.0 or later"),
        ((8, 9), 48, True, "the GPU NVIDIA Test has 48 KiB of shared memory for a block, and kvpack's kernels need 99"),
        ((13, 0), 227, False, "NVRTC 13.0 does not know GPUs of compute capability 13.0"),
    ],
)
def test_a_gpu_that_lacks_something(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared: int, known: bool, expected: str
) -> None:
    with_gpu(monkeypatch, capability, shared << 10, known)
    found, reason = host.find_gpu("cuda", 1)
    assert found is None
    assert reason is not None
    assert reason.startswith(expected)
    assert host.find_gpu("auto", host.AUTO_BYTES) == (None, None)
    with pytest.raises(launch.UnsupportedError, match=re.escape(expected)):
        launch.Gpu()


def test_no_nvrtc_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, (9, 0), 227 << 10)

    def missing() -> frozenset[int]:
        raise launch.UnsupportedError("NVRTC was not found")

    monkeypatch.setattr(launch, "nvrtc_architectures", missing)
    assert host.find_gpu("cuda", 1) == (None, "NVRTC was not found")


def test_instructions_fit_the_capability() -> None:
    """The instructions that came with compute capability 8.0 are used, and none that came later."""
    text = "".join(path.read_text() for path in KERNELS.rglob("*.cu*"))
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16" in text
    assert "cvt.rn.bf16x2" in text
    assert not re.search(
        r"wgmma|cp\.async\.bulk|cluster\.|setmaxnreg|tcgen05|stmatrix|\be4m3|redux\.sync\.\w+\.f32", text
    )


@pytest.fixture
def small_gpu(gpu: Any) -> Any:
    """The launcher with the least shared memory that a GPU may have."""
    if gpu.device != "cpu":
        pytest.skip("only the stand-in can have less shared memory")
    return type(gpu)(requirements.MIN_SHARED)


def test_little_shared_memory_is_enough(small_gpu: Any) -> None:
    """What is coded has the same bytes, whatever shared memory is asked for."""
    shape = (2, 40, 96)
    plane = np.random.default_rng(1).integers(0, 200, shape).astype(np.uint8)
    given = torch.from_numpy(plane)
    parts = rans.Parts(torch.tensor([given.data_ptr()]), shape, shape[1] * shape[2])
    coded = rans.encode(small_gpu, parts)
    size = int(coded.sizes[0])
    stream = coded.arena[int(coded.places[0]) :][:size].numpy().tobytes()
    assert stream == Rans().encode(plane, PlaneSpec("codes", shape, 8))
    back = torch.zeros(shape, dtype=torch.uint8)
    target = rans.Parts(torch.tensor([back.data_ptr()]), shape, parts.head_stride)
    wanted = 128 << 10  # more than there is
    meta, _, _ = rans.decode(small_gpu, coded.places[:1] + coded.arena.data_ptr(), coded.sizes, target, shared=wanted)
    assert not meta[0, rans.FAULT]
    if meta[0, rans.MODE]:
        assert torch.equal(back, given)


def test_what_cannot_be_lowered_is_not_asked_for(small_gpu: Any) -> None:
    """Kernels without a choice need no more than every GPU has; what needs more is not supported."""
    assert rans.BANK_BYTES * rans.LARGE_BANK + 2 * rans.tables.BANK_TABLES < requirements.MIN_SHARED - (16 << 10)
    assert lloyd_max._shared(128) + (2 << 10) < requirements.MIN_SHARED  # and the levels of pairs of codes
    rings = scaled_rans.RING_BYTES * scaled_rans.WARPS
    assert rings + scaled_rans.MAX_TABLES * (4 * 64 + 2 * 256) < requirements.MIN_SHARED
    assert dead_zone.supports(4096, 64)
    assert not dead_zone.supports(60_000, 64)
    assert dead_zone.supports(60_000, 64, 227 << 10)
    part = rans.Parts(torch.zeros(1, dtype=torch.int64), (1, 1, 1), 1, item=2, width=12)
    with pytest.raises(ValueError, match="codes of 12 bits"):
        rans.encode(small_gpu, part)


# --- launches


def test_every_kernel_is_parsed() -> None:
    found = {f"{unit}:{name}" for unit in UNITS for name in signatures_in(unit)}
    declaration = r"__global__[^;{]*?\bvoid\s+(?:__launch_bounds__\(.*?\)\s*)?(\w+)\s*\("
    declared = {
        f"{unit}:{name}" for unit in UNITS for name in re.findall(declaration, (KERNELS / f"{unit}.cu").read_text())
    }
    count = sum((KERNELS / f"{unit}.cu").read_text().count("__global__") for unit in UNITS)
    assert found == declared
    assert len(found) == count
    assert count > 20
    for kernel in found:
        signature = signature_of(kernel)
        assert signature.parameters
        assert len(signature.parameters) == len(signature.addresses) <= 24


def test_a_signature() -> None:
    assert signature_of("common/checksum:checksum") == Signature(
        "common/checksum:checksum", ("starts", "sizes", "sums"), (True, True, True), 256
    )
    layout = signature_of("scaled_rans/emit:layout")
    assert layout.parameters == ("meta", "lengths", "planes", "groups_most", "places", "sizes")
    assert layout.addresses == (True, True, False, False, True, True)
    assert signature_of("rans/decode:decode").threads is None
    assert signature_of("rans/decode:decode") is signature_of("rans/decode:decode")
    with pytest.raises(ValueError, match="no kernel 'missing'; it has: checksum"):
        signature_of("common/checksum:missing")
    with pytest.raises(FileNotFoundError):
        signature_of("common/missing:missing")


def test_words() -> None:
    tensor = torch.zeros(3)
    signature = Signature("a/b:c", ("x", "n", "y"), (True, False, True), None)
    assert signature.words((tensor, -1, None)) == [tensor.data_ptr(), (1 << 64) - 1, 0]
    assert signature.words((5, 6, 7)) == [5, 6, 7]


WRONG = [
    ((1, 2), "common/checksum:checksum takes 3 arguments (starts, sizes, sums), and 2 were given"),
    ((1, 2, 3, 4), "common/checksum:checksum takes 3 arguments (starts, sizes, sums), and 4 were given"),
    ((1, 2.5, 3), "common/checksum:checksum takes a tensor, an address or None as sizes, and a float was given"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_launch(gpu: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        gpu.launch("common/checksum:checksum", {}, (1, 1), 256, 0, *arguments)


def test_a_wrong_launch_on_a_gpu() -> None:
    """The class for real GPUs checks before it needs one, and also what would run nothing."""
    device = object.__new__(launch.Gpu)
    for arguments, message in WRONG:
        with pytest.raises(TypeError, match=re.escape(message)):
            device.launch("common/checksum:checksum", {}, (0, 1), 256, 0, *arguments)
    with pytest.raises(TypeError, match="takes an integer as planes, and a Tensor was given"):
        device.launch("scaled_rans/emit:layout", {}, (0, 1), 32, 0, 1, 2, torch.zeros(1), 4, 5, 6)
    with pytest.raises(TypeError, match="takes an integer as planes, and a NoneType was given"):
        device.launch("scaled_rans/emit:layout", {}, (0, 1), 32, 0, 1, 2, None, 4, 5, 6)
    with pytest.raises(ValueError, match="made for blocks of 32 threads, not 64"):
        device.launch("scaled_rans/emit:layout", {}, (0, 1), 64, 0, 1, 2, 3, 4, 5, 6)
    device.launch("scaled_rans/emit:layout", {}, (0, 1), 32, 0, 1, 2, 3, 4, 5, 6)


# --- constants


def macros(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#define (\w+) (.+)$", text, re.MULTILINE))


@pytest.mark.parametrize("unit", UNITS)
def test_shared_constants_are_defined_once(unit: str) -> None:
    """No source defines what Python gives it; and what Python gives it is in the text that is compiled."""
    given = constants.constants_of(unit.split("/", maxsplit=1)[0])
    text = source_of(unit)
    names = re.findall(r"^\s*#\s*define (\w+)", text, re.MULTILINE)
    assert len(names) == len(set(names)), "a name is defined twice"
    assert given.items() <= {name: int(value) for name, value in macros(text).items() if value.isdecimal()}.items()


def test_every_folder_has_its_constants() -> None:
    folders = {unit.split("/")[0] for unit in UNITS} - {"common"}
    assert set(constants._FOLDERS) == folders
    for folder in folders:
        text = "".join(path.read_text() for path in (KERNELS / folder).glob("*.cu*"))
        for name in constants._FOLDERS[folder]:
            assert re.search(rf"\b{name}\b", text), f"{folder} does not use {name}"


def test_constants_that_stand_in_both() -> None:
    """The checksum's constants are 64 bits wide, and compiled into the CPU's code, too."""
    pattern = r"0x([0-9A-F]{16})"
    cuda = re.findall(pattern, (KERNELS / "common/common.cuh").read_text())
    cpu = re.findall(pattern, Path(checksum.__file__).read_text())
    assert cuda == cpu
    assert len(cuda) == 3


def test_constants_of_the_formats() -> None:
    assert constants.RANS["HEAD"] == _HEAD.size
    assert constants.SCALED_RANS["HEAD"] == SCALED_HEAD.size
    assert f"1 << {constants.RANS['LOW'].bit_length() - 1}" in Path(rans_cpu.__file__).read_text()
    inputs = (KERNELS / "token_klt/inputs.cu").read_text()
    (last,) = set(re.findall(r"\b2047\b", inputs))
    assert last in Path(model.__file__).read_text()
