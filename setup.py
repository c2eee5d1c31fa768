"""Drives CMakeLists.txt, which says what is compiled and how.

Environment variables, all there are:
    PYSAL_CUDA: AUTO (default; CUDA kernels where nvcc is found), ON (fail without nvcc) or OFF.
    PYSAL_CMAKE_ARGS: further arguments for CMake, "-DPYSAL_CUDA_ARCHS=90 -DPYSAL_EMU=ON -DPYSAL_SANITIZE=address".
    PYSAL_SIMD: at run time, caps the instruction set of the CPU kernels: baseline, avx2 or avx512.
    PYSAL_REQUIRE: in tests, the backends that must be there, "cpu,emulated,cuda": one that is absent fails.
CUDACXX (or CUDA_HOME) and CMAKE_BUILD_PARALLEL_LEVEL mean what they mean everywhere.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, builds and installs the native libraries: beside the sources in place, else into the wheel."""

    def run(self) -> None:
        """Run CMake."""
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(
                "pysal is compiled against the installed torch: install torch>=2.11, "
                "then use pip install --no-build-isolation ."
            )
        destination = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "pysal"
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
        if (nvcc := find_nvcc()) is not None:
            environment.setdefault("CUDACXX", nvcc)
        for command in (configure, ["cmake", "--build", os.fspath(build)], ["cmake", "--install", os.fspath(build)]):
            if subprocess.run(command, env=environment).returncode:
                raise SystemExit(f"failed: {shlex.join(command)}")

    def get_outputs(self) -> list[str]:
        """Return the libraries that were installed, for the wheel's record."""
        return [os.fspath(path) for path in Path(self.build_lib).glob("pysal/_C*.so")]


def find_nvcc() -> str | None:
    """Return the path of nvcc: under CUDA_HOME, in the usual place or on the path."""
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return os.fspath(nvcc) if nvcc.exists() else shutil.which("nvcc")


setup(ext_modules=[Extension("pysal._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
