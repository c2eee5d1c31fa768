"""The libraries load in the oldest torch and on the oldest processor that pysal supports."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pysal
from pysal import _library

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = sorted(_library.HERE.glob("_C_*.so"))  # of ops
MODULES = sorted(_library.HERE.glob("_C.*.so"))  # of Python
# torch 2.11's exported C shims: nm -D --defined-only libtorch_cpu.so, names starting with torch_ or aoti_torch_
STABLE = frozenset((ROOT / "tests/data/torch-2.11-stable-symbols.txt").read_text().split())
LEVELS = ["baseline", "avx2", "avx512"]

needs_build = pytest.mark.skipif(not LIBRARIES, reason="pysal is not compiled")


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_build
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_needs_only_the_stable_abi(library):
    undefined = [line.split()[-1].split("@")[0] for line in output_of("nm", "-D", "--undefined-only", library).splitlines()]
    shims = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert shims
    assert shims <= STABLE, f"not in torch 2.11: {sorted(shims - STABLE)}"
    mangled = [name for name in undefined if re.match(r"_ZN?[KVr]*(2at|3c10|5torch|6caffe2)", name)]
    assert not mangled, f"C++ of torch: {mangled}"
    assert not [name for name in undefined if re.match(r"(cuda|cu)[A-Z]", name)], "the CUDA runtime is linked statically"


@needs_build
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_links_libtorch_cpu_alone_and_by_name(library):
    dynamic = output_of("readelf", "-d", library)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.match(r"libc10|libtorch_(?!cpu)|libtorch\.|libcuda|libgomp|libpython", name)]
    assert not re.search(r"R(UN)?PATH", dynamic), "a path of the machine it was built on"


@needs_build
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_knows_nothing_of_python(library):
    """So that one build serves every version of it."""
    undefined = [line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", library).splitlines()]
    assert not [name for name in undefined if name.lstrip("_").startswith("Py")]


@needs_build
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_the_python_module_needs_the_ops_library_beside_it_and_no_torch(module):
    dynamic = output_of("readelf", "-d", module)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "_C_cpu.so" in needed
    assert not [name for name in needed if re.match(r"libtorch|libc10|libpython", name)]
    assert re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic) == ["$ORIGIN"]
    # in a process that has loaded nothing of torch's, it finds its neighbour and fails on torch's library alone
    code = f"import ctypes; ctypes.CDLL({os.fspath(module)!r})"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert "libtorch_cpu" in failed.stderr


@needs_build
@pytest.mark.parametrize("library", [*LIBRARIES, *MODULES], ids=lambda path: path.name)
def test_holds_no_path_of_the_build(library):
    assert os.fsencode(ROOT) not in library.read_bytes()


@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/cpu/simd/*.cpp")), ids=lambda path: path.stem)
def test_isa_kernels_share_no_symbol(source, tmp_path):
    """A weak symbol compiled for AVX-512 could be the one the linker keeps, for every processor."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    if os.uname().machine != "x86_64":
        pytest.skip("one instruction set")
    target = tmp_path / "kernels.o"
    isa = ["-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"]
    defines = ["-DPYSAL_ISA=avx512", "-DPYSAL_VECTOR_BYTES=64"]
    subprocess.run([compiler, "-std=c++17", "-O1", *isa, *defines, "-c", source, "-o", target], check=True)
    symbols = [line.split()[-2:] for line in output_of("nm", "-C", target).splitlines()]
    assert not [name for kind, name in symbols if kind in "WwVvui"], symbols
    exported = [name for kind, name in symbols if kind in "TDBR"]
    assert exported == [f"pysal::cpu::{source.stem}_avx512"]


def run_at(level, code):
    environment = {**os.environ, "PYSAL_SIMD": level}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)


@needs_build
def test_simd_levels_agree():
    """Selections give the same bits at every level; ops that round are held to assert_no_worse by their own tests."""
    code = """
import hashlib, pysal, torch
x = torch.linspace(-1, 1, 100003)
output, gates = pysal.ops.guided_relu(x, 0.5)
grad = pysal.ops.guided_relu_backward(x.flip(0), gates, "guided")
print(pysal.build_info()["simd"], *(hashlib.sha256(t.numpy()).hexdigest() for t in (output, gates, grad)))
"""
    best = pysal.build_info()["simd_compiled"]
    results = [run_at(level, code).stdout.split() for level in LEVELS]
    assert len({tuple(result[1:]) for result in results}) == 1
    assert all(len(result[1]) == 2 * hashlib.sha256().digest_size for result in results)
    highest = max(LEVELS.index(result[0]) for result in results)
    assert [result[0] for result in results] == [LEVELS[min(i, highest)] for i in range(3)]
    assert results[0][0] == best[0]


@needs_build
def test_an_unknown_simd_level_is_refused():
    result = run_at("sse9", "import pysal.ops")  # not first in a kernel, where it would be an error in torch's words
    assert result.returncode != 0
    assert "pysal: PYSAL_SIMD must be baseline, avx2 or avx512, got sse9" in result.stderr
