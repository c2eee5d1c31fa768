"""What a user installs: one version, a package that works uncompiled, an sdist that builds, a wheel that runs."""

import ctypes
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import pysal
from pysal import _library

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(code, *options, path):
    """Run Python in a folder that holds no pysal, with `path` in front of the installed packages; return what it printed.

    -S leaves out their .pth files: that of an editable install of this checkout would offer its pysal, and its pysal._C.
    """
    result = subprocess.run(
        [sys.executable, "-S", *options, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.fspath(path), sysconfig.get_path("platlib")])},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_one_version(monkeypatch):
    assert pysal.__version__ == VERSION
    assert pysal.build_info().get("version_built", VERSION) == VERSION

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert _library.version() == VERSION


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources as a clone has them: nothing built, nothing ignored."""
    target = tmp_path_factory.mktemp("packaging") / "checkout"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def test_uncompiled_checkout_works_and_says_so_once(checkout):
    code = """
import torch, pysal
output, gates = pysal.ops.guided_relu(torch.tensor([-1.0, 2.0], requires_grad=True))
output.sum().backward()
info = pysal.build_info()
assert not info["compiled"] and not info["fell_back"], info
assert info["kernels"]["guided_relu"] == {"cpu": "reference", "cuda": "reference"}
"""
    printed = run(code, "-W", "always", path=checkout).stderr
    assert printed.count("UserWarning") == 1
    slow = f"pysal is not compiled in {checkout}/pysal, so every op runs its slower PyTorch reference"
    assert f"{slow}: compile it with pip install --no-build-isolation --editable {checkout}\n" in printed


@pytest.mark.skipif(not _library.build_info()["compiled"], reason="pysal is not compiled")
def test_an_uncompiled_checkout_that_hides_a_compiled_package_says_so(checkout, tmp_path):
    """Which happens to whoever installs and then runs Python in the folder of the sources."""
    shutil.copytree(_library.HERE, tmp_path / "pysal", ignore=shutil.ignore_patterns("*.jpg", "__pycache__"))
    code = f"import sys; sys.path.append({os.fspath(tmp_path)!r}); import pysal; pysal.ops"
    printed = run(code, "-W", "always", path=checkout).stderr
    assert printed.count("UserWarning") == 1
    assert f"It hides the compiled one in {tmp_path}/pysal: run Python from another folder than {checkout}, or" in printed
    assert (
        "UserWarning"
        not in run(f"import sys; sys.path[:0] = [{os.fspath(tmp_path)!r}]; import pysal; pysal.ops", path=checkout).stderr
    )


def test_a_library_that_does_not_load_is_an_error_and_not_slow(checkout, tmp_path):
    shutil.copytree(checkout / "pysal", tmp_path / "pysal", ignore=shutil.ignore_patterns("*.jpg"))
    (tmp_path / "pysal/_C_cpu.so").write_bytes(b"of another system")
    printed = run("import pysal\ntry: pysal.ops\nexcept ImportError as error: print(error)", path=tmp_path).stdout
    assert printed.startswith(f"pysal: {tmp_path}/pysal/_C_cpu.so must load beside torch ")


@pytest.mark.skipif(not _library.build_info()["compiled"], reason="pysal is not compiled")
def test_ops_are_native_in_a_python_that_the_module_is_not_compiled_for(tmp_path):
    without = shutil.ignore_patterns("*.jpg", "__pycache__", "_C.*.so")
    shutil.copytree(_library.HERE, tmp_path / "pysal", ignore=without)
    code = """
import pysal
info = pysal.build_info()
print(info["compiled"], info["kernels"]["guided_relu"]["cpu"], "simd" in info)
"""
    assert run(code, "-W", "error", path=tmp_path).stdout.split() == ["True", "native", "False"]


def built_sources(checkout, target):
    """What a wheel holds of the Python sources."""
    command = ["setup.py", "-q", "build_py", "--build-lib", os.fspath(target)]
    subprocess.run([sys.executable, *command], cwd=checkout, capture_output=True, text=True, check=True)
    return target


def test_installed_files_are_none_of_the_spatial_analysis_library(checkout, tmp_path):
    """Both are there, whichever was installed first; `pysal` is PySAL, and nothing of ours asks it for anything."""
    installed = built_sources(checkout, tmp_path / "installed")
    assert {path.name for path in installed.iterdir()} == {"pysal.py", "pysal_saliency"}
    code = """
import sys, warnings
warnings.simplefilter("ignore")
import {name}
import pysal_saliency.captum, pysal_saliency.pair, pysal_saliency.metrics, pysal_saliency.cli, torch
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(5)).eval()
model(torch.rand(2, 3, 8, 8))
found = {name}.explain(model, torch.rand(1, 3, 8, 8))
print(found.table() and sorted(name for name in sys.modules if name.split(".")[0] == "pysal"))
"""
    alone = run(code.format(name="pysal"), path=installed).stdout
    assert "'pysal'" in alone
    (installed / "pysal").mkdir()
    (installed / "pysal" / "__init__.py").write_text("spatial = True")
    assert run(code.format(name="pysal_saliency"), path=installed).stdout == "[]\n"
    beside = "import pysal, pysal_saliency; print(pysal.spatial, pysal_saliency.__version__)"
    assert run(beside, path=installed).stdout.startswith("True ")
    command = [sys.executable, "-m", "pysal_saliency", "methods"]
    assert "leave_one_out" in subprocess.run(command, cwd=installed, capture_output=True, text=True, check=True).stdout


def test_both_names_of_what_is_installed_are_one_package(checkout, tmp_path):
    installed = built_sources(checkout, tmp_path)
    code = "import pysal.captum, pysal_saliency; print(pysal is pysal_saliency, pysal_saliency.captum is pysal.captum)"
    assert run(code, path=installed).stdout == "True True\n"
    command = [sys.executable, "-m", "pysal", "methods"]
    assert "leave_one_out" in subprocess.run(command, cwd=installed, capture_output=True, text=True, check=True).stdout


def build(checkout, hook, target, **variables):
    """Call a build hook of setuptools in the checkout, without CUDA: that is one more library, not another path."""
    code = f"from setuptools import build_meta; print('BUILT', build_meta.{hook}({os.fspath(target)!r}))"
    environment = {**os.environ, "PYSAL_CUDA": "OFF", "PYSAL_CMAKE_ARGS": "", **variables}
    result = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return target / result.stdout.split("BUILT ")[1].strip()


@pytest.fixture(scope="module")
def sdist(checkout):
    (checkout / "pysal/_C_stale.so").touch()  # what an earlier build may have left
    return build(checkout, "build_sdist", checkout.parent)


def test_sdist_holds_the_sources_and_nothing_built(sdist, checkout):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {os.fspath(path.relative_to(checkout)) for path in checkout.glob("csrc/**/*") if path.is_file()}
    sources |= {os.fspath(path.relative_to(checkout)) for path in checkout.glob("pysal/**/*.py")}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "pysal/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_from_the_sdist_runs(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    (source / "pysal/_C_stale.so").touch()
    wheel = build(source, "build_wheel", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    libraries = sorted(name for name in names if name.endswith(".so"))
    assert libraries == ["pysal_saliency/_C" + sysconfig.get_config_var("EXT_SUFFIX"), "pysal_saliency/_C_cpu.so"]
    licence = f"pysal_saliency-{VERSION}.dist-info/licenses/LICENSE"
    assert {"pysal.py", "pysal_saliency/py.typed", "pysal_saliency/_C.pyi", licence} <= set(names)
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]
    assert "none-any" not in wheel.name
    code = """
import importlib.metadata, pysal, torch
info = pysal.build_info()
assert info["compiled"] and info["kernels"]["guided_relu"]["cpu"] == "native", info
assert info["version"] == info["version_built"] == importlib.metadata.version("pysal-saliency"), info
pysal.ops.guided_relu(torch.ones(3))
"""
    run(code, "-W", "error", path=tmp_path / "installed")


def test_the_wheel_for_all_platforms_has_no_library_and_says_so(checkout, tmp_path):
    wheel = build(checkout, "build_wheel", tmp_path, PYSAL_COMPILE="OFF")
    assert wheel.name == f"pysal_saliency-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "installed")
    code = """
import torch, pysal_saliency as pysal
model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 4)).eval()
print(pysal.build_info()["compiled"], *pysal.guided_backprop(model, torch.rand(1, 3, 8, 8)).shape)
"""
    printed = run(code, "-W", "always", path=tmp_path / "installed")
    assert printed.stdout.split() == ["False", "1", "3", "8", "8"]
    assert printed.stderr.count("pysal is not compiled in ") == 1


@pytest.mark.slow
@pytest.mark.skipif(not _library.build_info()["compiled"], reason="pysal is not compiled")
def test_a_wheel_takes_the_libraries_of_the_ops_as_they_are(checkout, tmp_path):
    """They are compiled once, whatever the number of Pythons."""
    ops = tmp_path / "ops"
    ops.mkdir()
    shutil.copy(_library.HERE / "_C_cpu.so", ops)
    arguments = f"-DPYSAL_OPS={ops} -DPYSAL_MODULE_SUFFIX=.of-another-python.so"
    wheel = build(checkout, "build_wheel", tmp_path, PYSAL_CMAKE_ARGS=arguments)
    with zipfile.ZipFile(wheel) as archive:
        libraries = sorted(name for name in archive.namelist() if name.endswith(".so"))
        assert libraries == ["pysal_saliency/_C.of-another-python.so", "pysal_saliency/_C_cpu.so"]
        assert archive.read("pysal_saliency/_C_cpu.so") == (ops / "_C_cpu.so").read_bytes()


@pytest.fixture(scope="module")
def glibc(tmp_path_factory):
    """Libraries to link against, of glibc 2.28."""
    if shutil.which("cc") is None or sysconfig.get_config_var("SOABI").split("-")[-1] != "gnu":
        pytest.skip("no C compiler for glibc")
    target = tmp_path_factory.mktemp("glibc")
    subprocess.run([sys.executable, ROOT / "wheels/old_glibc.py", target, "2.28"], check=True)
    return target


def link(source, glibc, tmp_path):
    """Compile a C function and link it against an older glibc; return the command's result and the library."""
    (tmp_path / "f.c").write_text(source)
    options = ["-shared", "-fPIC", "-O1", f"-L{glibc}", "-Wl,-z,defs", "-o", tmp_path / "f.so"]
    result = subprocess.run(["cc", tmp_path / "f.c", *options, "-lm"], capture_output=True, text=True)
    return result, tmp_path / "f.so"


def test_what_is_linked_runs_on_an_older_glibc(glibc, tmp_path):
    source = """
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
static void *f(void *x) { memcpy(x, x, strlen(x)); return x; }
double g(double x, char *name) {
  pthread_t thread;
  pthread_create(&thread, 0, f, name);
  pthread_join(thread, 0);
  return exp(x) + pow(x, x) + (dlopen(name, RTLD_NOW) != 0) + shm_open(name, 0, 0);
}
"""
    result, library = link(source, glibc, tmp_path)
    assert result.returncode == 0, result.stderr
    read = subprocess.run(["readelf", "--wide", "--dynamic", "--dyn-syms", library], capture_output=True, text=True, check=True)
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"@GLIBC_([\d.]+)", read.stdout)}
    assert versions
    assert max(versions) <= (2, 28), read.stdout
    assert {"libpthread.so.0", "libdl.so.2", "librt.so.1", "libm.so.6"} <= set(re.findall(r"NEEDED.*\[(.*)\]", read.stdout))
    g = ctypes.CDLL(os.fspath(library)).g
    g.restype = ctypes.c_double
    assert g(ctypes.c_double(1.0), b"/") == math.exp(1.0) + 1.0 + 0.0 - 1.0  # no library and no shared memory is called that


def test_what_an_older_glibc_had_not_does_not_link(glibc, tmp_path):
    result, _ = link("unsigned arc4random(void); unsigned g(void) { return arc4random(); }", glibc, tmp_path)  # of 2.36
    assert "arc4random" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not _library.build_info()["compiled"], reason="pysal is not compiled")
def test_editable_install_compiles_in_place(checkout, tmp_path):
    # that the ops compile too is what the wheel from the sdist shows
    wheel = build(checkout, "build_editable", tmp_path, PYSAL_CMAKE_ARGS=f"-DPYSAL_OPS={_library.HERE}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert list(checkout.glob("pysal/_C.cpython-*.so"))
    assert (checkout / "pysal/_C_cpu.so").exists()
    code = f"""
import site; site.addsitedir({os.fspath(tmp_path / "installed")!r})
import pysal
assert pysal.__file__ == {os.fspath(checkout / "pysal/__init__.py")!r}, pysal.__file__
assert pysal.build_info()["compiled"]
"""
    run(code, "-W", "error", path=tmp_path / "installed")
