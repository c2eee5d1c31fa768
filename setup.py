"""Drives CMakeLists.txt, which says what is compiled and how.

Environment variables, all there are:
    PYSAL_COMPILE: OFF makes the package without native libraries, one wheel for all platforms, whose ops run their references.
    PYSAL_CUDA: AUTO (default; CUDA kernels where nvcc is found, also one that pip installed), ON (fail without nvcc) or OFF.
    PYSAL_CMAKE_ARGS: further arguments for CMake, "-DPYSAL_CUDA_ARCHS=90 -DPYSAL_EMU=ON -DPYSAL_SANITIZE=address".
    PYSAL_SIMD: at run time, caps the instruction set of the CPU kernels: baseline, avx2 or avx512.
    PYSAL_REQUIRE: in tests, the backends that must be there, "cpu,emulated,cuda": one that is absent fails.
CUDACXX (or CUDA_HOME) and CMAKE_BUILD_PARALLEL_LEVEL mean what they mean everywhere.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildUnderOwnName(build_py):
    """Puts the package into `pysal_saliency/`, which imports itself by that name, and `pysal.py` beside it.

    So that no file is one of PySAL's, the spatial analysis library; pysal/_names.py has the rest.
    """

    def run(self) -> None:
        """Copy the sources, and let a wheel's be called by their own name."""
        super().run()
        if self.editable_mode:
            return
        built = Path(self.build_lib)
        shutil.rmtree(built / "pysal_saliency", ignore_errors=True)
        (built / "pysal").rename(built / "pysal_saliency")
        (built / "pysal_saliency.py").rename(built / "pysal.py")
        for path in (built / "pysal.py", *(built / "pysal_saliency").rglob("*.py")):
            own = re.sub(r"^(\s*(?:from|import) )pysal\b", r"\1pysal_saliency", path.read_text("utf-8"), flags=re.M)
            path.write_text(own, "utf-8")


class CMakeBuild(build_ext):
    """Configures, builds and installs the native libraries: beside the sources in place, else into the wheel."""

    def run(self) -> None:
        """Run CMake."""
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(
                "pysal is compiled against the installed torch: install torch>=2.11, "
                "then use pip install --no-build-isolation ."
            )
        destination = ROOT / "pysal" if self.inplace else Path(self.build_lib).resolve() / "pysal_saliency"
        build = Path(self.build_temp).resolve() / sys.implementation.cache_tag
        configure = [
            *("cmake", "-S", os.fspath(ROOT), "-B", os.fspath(build)),
            f"-DPYSAL_PYTHON={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPYSAL_VERSION={self.distribution.get_version()}",
            f"-DPYSAL_CUDA={os.environ.get('PYSAL_CUDA', 'AUTO')}",
            *(("-G", "Ninja") if shutil.which("ninja") else ()),
            *shlex.split(os.environ.get("PYSAL_CMAKE_ARGS", "")),
        ]
        environment = dict(os.environ)
        wanted = environment.get("PYSAL_CUDA", "AUTO")
        if wanted != "OFF" and "CUDACXX" not in environment:
            nvcc = find_nvcc()
            if nvcc is not None:
                environment["CUDACXX"] = os.fspath(nvcc)
                # pip's packages have their libraries in lib, and nvcc looks in lib64
                environment["NVCC_APPEND_FLAGS"] = f"{environment.get('NVCC_APPEND_FLAGS', '')} -L{nvcc.parents[1] / 'lib'}"
            elif wanted == "AUTO" and has_gpu():
                print(
                    "pysal: this machine has a GPU, but no nvcc, so the CUDA kernels are not compiled: README.md says how pip "
                    "installs one, or set CUDA_HOME",
                    file=sys.stderr,
                )
        for command in (configure, ["cmake", "--build", os.fspath(build)], ["cmake", "--install", os.fspath(build)]):
            if subprocess.run(command, env=environment).returncode:
                raise SystemExit(f"failed: {shlex.join(command)}")

    def get_outputs(self) -> list[str]:
        """Return the libraries that were installed, for the wheel's record."""
        return [os.fspath(path) for path in Path(self.build_lib).glob("pysal_saliency/_C*.so")]


def find_nvcc() -> Path | None:
    """Return the path of nvcc: under CUDA_HOME, in the usual place, on the path, or where pip's packages have it."""
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    if nvcc.exists():
        return nvcc
    if (on_path := shutil.which("nvcc")) is not None:
        return Path(on_path)
    nvidia = importlib.util.find_spec("nvidia")
    places = [] if nvidia is None else nvidia.submodule_search_locations or []
    return next((found for place in places for found in sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True)), None)


def has_gpu() -> bool:
    """Return whether this machine has a GPU with NVIDIA's driver, also under WSL."""
    return any(Path(name).exists() for name in ("/proc/driver/nvidia/version", "/dev/dxg"))


compiled = [] if os.environ.get("PYSAL_COMPILE") == "OFF" else [Extension("pysal._C", sources=[])]
setup(ext_modules=compiled, cmdclass={"build_py": BuildUnderOwnName, "build_ext": CMakeBuild})
