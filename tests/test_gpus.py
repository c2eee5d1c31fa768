"""Which kernels run on which GPUs, what is said where they do not, and where the compiler is looked for."""

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from pysal import _gpus, _library
from pysal._gpus import Machine, refused, runs_on

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("75-real", "80-real", "90")


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((7, 5), ARCHS, True),
        ((7, 0), ARCHS, False),
        ((8, 0), ARCHS, True),
        ((8, 9), ARCHS, True),  # of the same major number
        ((9, 0), ARCHS, True),
        ((12, 0), ARCHS, True),  # through PTX
        ((12, 0), ("75-real", "80-real", "90-real"), False),
        ((8, 0), ("86",), False),
        ((9, 0), ("86",), True),
        ((8, 6), ("80-virtual",), True),
        ((9, 0), ("90a",), True),
        ((10, 0), ("90a",), False),
        ((10, 3), ("100f-real", "90-real"), False),
        ((8, 0), (), False),
    ],
)
def test_what_runs_on_what(capability: tuple[int, int], archs: tuple[str, ...], expected: bool) -> None:
    assert runs_on(capability, archs) == expected


@pytest.mark.parametrize(
    ("capabilities", "driver", "torch_archs", "expected"),
    [
        (((7, 5),), (13, 0), "sm_75 sm_80", None),
        (((8, 6), (9, 0)), (13, 1), "sm_75 sm_80 sm_90", None),
        (((12, 0),), (13, 0), "sm_120 compute_120", None),
        (
            ((9, 0),),
            (12, 8),
            "sm_90",
            "they need a driver of CUDA 13, and this machine's has 12.8: update it, or compile with the nvcc of "
            "torch's CUDA 12.6",
        ),
        (
            ((9, 0), (7, 0)),
            (13, 0),
            "sm_70 sm_90",
            "they were compiled for 75-real, 80-real, 90, and a GPU of this machine has compute capability 7.0: compile with "
            'PYSAL_CMAKE_ARGS="-DPYSAL_CUDA_ARCHS=70"',
        ),
        (((9, 0), (3, 5)), (13, 0), "sm_75 sm_80 sm_90", None),  # torch does not use the second either
        (((9, 0), (3, 5)), (13, 0), None, "they were compiled for 75-real, 80-real, 90, and a GPU of this machine has compute"),
    ],
)
def test_why_kernels_are_not_loaded(
    capabilities: Any, driver: Any, torch_archs: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: torch_archs, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    found = refused(Machine(capabilities, driver), ARCHS, "13.0.88")
    assert found == expected if expected is None or torch_archs is not None else str(found).startswith(expected)


def test_ptx_needs_a_driver_that_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: "sm_120", raising=False)
    assert refused(Machine(((12, 0),), (13, 0)), ARCHS, "13.1.80") == (
        "they were compiled for 75-real, 80-real, 90, and a GPU of this machine has compute capability 12.0: its driver "
        "must know CUDA 13.1 for that, and knows 13.0"
    )
    assert (
        refused(Machine(((8, 6),), (13, 0)), ARCHS, "13.1.80") is None
    )  # compiled code of the same major number needs no more


MANAGEMENT_LIBRARY = """
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 3; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 12080; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) { *device = (void*)(index + 1ul); return 0; }
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  *major = (unsigned long)device == 2 ? 7 : 9; *minor = (unsigned long)device == 2 ? 5 : 0; return 0; }
"""


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of three GPUs, the second of another kind, as its driver's library describes it."""
    source, library = tmp_path / "ml.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(MANAGEMENT_LIBRARY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(os.fspath(library) if name == "libnvidia-ml.so.1" else name))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ((9, 0), (7, 5), (9, 0))),
        ("0,2", ((9, 0), (9, 0))),
        ("1", ((7, 5),)),
        ("GPU-1e3f", ((9, 0), (7, 5), (9, 0))),
        ("-1", None),
        ("", None),
    ],
)
def test_the_machine(three_gpus: None, visible: str | None, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpus.machine() == (None if expected is None else Machine(expected, (12, 8)))


def test_no_machine_without_cuda_in_torch_or_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(_: str) -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert _gpus.machine() is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _gpus.machine() is None


def test_a_gpu_without_kernels_is_said_once(three_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_cuda_status", "not compiled")
    with pytest.warns(
        UserWarning, match=r"^pysal: this machine has a GPU, and the CUDA kernels are not compiled, so every op"
    ) as found:
        _library._warn_without_cuda_kernels()
    assert len(found) == 1
    assert 'pip install "nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*"' in str(found[0].message)
    monkeypatch.setattr(_library, "_cuda_status", "loaded")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library._warn_without_cuda_kernels()


def test_kernels_that_do_not_run_are_not_loaded(three_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if _library._native is None:
        pytest.skip("nothing is compiled")
    (tmp_path / "_C_cuda.so").touch()
    monkeypatch.setattr(_library, "HERE", tmp_path)
    monkeypatch.setattr(_library, "_cuda_status", "not compiled")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loaded {path}"))
    built = {"cuda_archs": list(ARCHS), "cuda_version": "13.0.88"}
    monkeypatch.setattr(_library._native, "build_info", lambda: built)
    assert _library.load_cuda().startswith("compiled, not loaded: they need a driver of CUDA 13, and this machine's has 12.8")


def test_how_to_compile_with_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert _gpus.how_to_compile() == "install the CUDA toolkit 12.6 and set CUDA_HOME"


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(os.fspath(ROOT / "setup.py"))


def test_nvcc_of_pip(builder: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", os.fspath(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert builder["find_nvcc"]() is None or "nvidia" in os.fspath(builder["find_nvcc"]())
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    sys.path_importer_cache.clear()
    assert builder["find_nvcc"]() == nvcc
    (tmp_path / "nvcc").write_text("#!/bin/sh")
    (tmp_path / "nvcc").chmod(0o755)
    assert builder["find_nvcc"]() == tmp_path / "nvcc"  # the machine's own comes first
    home = tmp_path / "cuda" / "bin" / "nvcc"
    home.parent.mkdir(parents=True)
    home.touch()
    monkeypatch.setenv("CUDA_HOME", os.fspath(tmp_path / "cuda"))
    assert builder["find_nvcc"]() == home


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
def test_a_broken_nvcc_is_not_no_nvcc(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"],
        env={**os.environ, "CUDACXX": os.fspath(nvcc)},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    said = " ".join(done.stderr.split())
    assert f"{nvcc} compiles nothing" in said
    assert "PYSAL_CUDA=OFF to build for CPUs alone" in said
