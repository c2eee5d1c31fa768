"""Builds the wheels of a release into dist/: manylinux_2_28 for each CPython whose headers are here, and one without libraries.

The libraries of the ops know nothing of Python: they are compiled once. `pysal._C`, which does, is compiled for each version
from its headers alone, so that its interpreter need not be there.

    python wheels/build.py --pythons 3.11 3.12 --headers FOLDER   # FOLDER/python3.12/Python.h, beside /usr/include

RELEASING.md says where headers come from.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{os.uname().machine}"
# what comes with torch, and is loaded before these libraries are
OF_TORCH = ["libtorch_cpu.so"]


def call(*command: str | Path, **environment: str) -> None:
    """Run a command in the repository's root; an error ends all."""
    print("+", shlex.join(map(str, command)), flush=True)
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)


def include_folders(version: str, places: list[Path]) -> list[Path]:
    """Return where the headers of a version of Python are: those of its interpreter, or of a place; none where they are not."""
    ask = "import sysconfig; print(sysconfig.get_path('include'))"
    found = shutil.which(f"python{version}")
    answer = found and subprocess.run([found, "-c", ask], capture_output=True, text=True)
    if answer and answer.returncode == 0:  # a shim of pyenv is on the path, and ends with an error
        places = [Path(answer.stdout.strip()).parent, *places]
    for place in places:
        if (place / f"python{version}" / "Python.h").exists():
            return [place / f"python{version}", place]  # Debian's Python.h includes some by their path from there
    return []


def build_ops(work: Path) -> Path:
    """Compile the libraries of the ops; return their folder."""
    target = work / "ops"
    arguments = f"{os.environ.get('PYSAL_CMAKE_ARGS', '')} -DPYSAL_GLIBC={GLIBC}"
    command = ["setup.py", "--quiet", "build_ext", f"--build-lib={target}", f"--build-temp={work / 'objects'}"]
    call(sys.executable, *command, PYSAL_CMAKE_ARGS=arguments)
    return target / "pysal_saliency"


def build_wheel(version: str, headers: list[Path], ops: Path, work: Path) -> Path:
    """Compile the module for a version of Python and return the wheel with it."""
    tag = "cp" + version.replace(".", "")
    suffix = f".cpython-{tag[2:]}-{sysconfig.get_config_var('MULTIARCH')}.so"
    arguments = [f"-DPYSAL_GLIBC={GLIBC}", f"-DPYSAL_OPS={ops}", f"-DPYSAL_MODULE_SUFFIX={suffix}"]
    arguments.append(f"-DPYSAL_PYTHON_INCLUDE={';'.join(map(str, headers))}")
    raw = work / tag
    shutil.rmtree(raw, ignore_errors=True)
    build = ["setup.py", "--quiet", "build", f"--build-base={raw / 'build'}", "bdist_wheel", f"--dist-dir={raw}"]
    call(sys.executable, *build, PYSAL_CMAKE_ARGS=shlex.join(arguments))
    (wheel,) = raw.glob("*.whl")
    call(sys.executable, "-m", "wheel", "tags", "--remove", f"--python-tag={tag}", f"--abi-tag={tag}", wheel)
    (wheel,) = raw.glob("*.whl")
    return wheel


def main() -> None:
    """Build what can be built, and say what cannot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pythons", nargs="*", default=PYTHONS, help="versions of CPython, default %(default)s")
    parser.add_argument("--headers", type=Path, nargs="*", default=[], help="folders with python3.12/Python.h and the like")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    work = ROOT / "build/wheels"
    shutil.rmtree(arguments.dist, ignore_errors=True)
    places = [*(place.resolve() for place in arguments.headers), Path("/usr/include")]
    headers = {version: include_folders(version, places) for version in arguments.pythons}

    uncompiled = ["setup.py", "--quiet", "build", f"--build-base={work / 'any'}", "bdist_wheel"]
    call(sys.executable, *uncompiled, f"--dist-dir={arguments.dist.resolve()}", PYSAL_COMPILE="OFF")
    ops = build_ops(work)
    for version, folders in headers.items():
        if folders:
            wheel = build_wheel(version, folders, ops, work)
            excluded = [f"--exclude={library}" for library in OF_TORCH]
            repair = ["repair", f"--plat={PLATFORM}", "--only-plat", f"--wheel-dir={arguments.dist.resolve()}", *excluded]
            call(sys.executable, "-m", "auditwheel", *repair, wheel)
    print("\nbuilt:", *sorted(path.name for path in arguments.dist.iterdir()), sep="\n  ")
    missing = [version for version, folders in headers.items() if not folders]
    if missing:
        print(f"NOT BUILT, their headers are not here (--headers): CPython {', '.join(missing)}")


if __name__ == "__main__":
    main()
