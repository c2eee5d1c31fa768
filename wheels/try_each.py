"""Tries each wheel of dist/ in an environment of its own, outside of the repository: wheels/check.py says what must hold.

    python wheels/try_each.py --torch "torch==2.11.*" torch

An environment has what pip installs for that wheel and that torch, and nothing else. Which builds of torch these are, with CUDA
or without, is a matter of pip's index: on PyPI, those for Linux on x86 have CUDA.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def interpreter(wheel: Path) -> str | None:
    """Return the Python that a wheel is for, None where it is not here; for a wheel of all of them, this one."""
    tag = wheel.name.split("-")[2]
    if tag == "py3":
        return sys.executable
    found = shutil.which(f"python{tag[2]}.{tag[3:]}")
    works = found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0
    return found if works else None


def attempt(python: str, wheel: Path, torch: str) -> str:
    """Install a wheel and a torch, and return what the check printed last: what it found, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "bin/python"
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        install = [own, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", torch, wheel]
        check = [own, ROOT / "wheels/check.py", "uncompiled" if "none-any" in wheel.name else "compiled"]
        for command in ([python, "-m", "venv", folder], install, check):
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                return f"FAILED: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def main() -> None:
    """Try all; end with an error where one fails, and say which were not tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=["torch==2.11.*", "torch"], help="what pip installs, default %(default)s")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    wheels = sorted(arguments.dist.resolve().glob("*.whl"))
    failed = 0 if wheels else 1
    for wheel in wheels:
        python = interpreter(wheel)
        if python is None:
            print(f"{wheel.name}\n  NOT TRIED: its Python is not here", flush=True)
            continue
        for torch in arguments.torch:
            answer = attempt(python, wheel, torch)
            failed += answer.startswith("FAILED")
            print(f"{wheel.name} with {torch}\n  {answer}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
