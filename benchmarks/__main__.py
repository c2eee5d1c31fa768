"""Runs the benchmarks in processes of their own: `python -m benchmarks --help`. `make bench` calls this."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.networks import NETWORKS, ON_A_CPU

ROOT = Path(__file__).resolve().parents[1]
# Under the C library's defaults every large tensor is mapped and cleared anew; see "The C library" in README.md.
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time ops and methods.")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: methods on a GPU, one network at a time"
    )
    parser.add_argument("--images", type=int, choices=[1, 32], help="with --device cuda: batches of so many images only")
    parser.add_argument("--minutes", type=float, default=9.0, help="with --device cuda: begin no case after so many")
    parser.add_argument("--suite", choices=["ops", "methods", "all"], default="all")
    parser.add_argument("--method", "--methods", help="this method only; the rows of the others stay")
    parser.add_argument("--network", choices=list(NETWORKS), help="methods on this network only")
    parser.add_argument("--threads", type=int, default=1, help="of each process; with 1 the networks run side by side")
    parser.add_argument("--raised-malloc", action="store_true", help="let the C library keep what large tensors free")
    parser.add_argument("--results", type=Path, help="folder for the results")
    options, more = parser.parse_known_args()
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= RAISED if options.raised_malloc else {}
    environment["BENCHMARK_COMMAND"] = " ".join(["python -m benchmarks", *sys.argv[1:]])
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-o", "python_files=bench_*.py"]
    pytest += ["-q", "--benchmark-only", "--benchmark-columns=median,iqr,rounds", *more]
    pytest += ["--results", str(options.results.resolve())] if options.results else []

    if options.device == "cuda":
        return on_gpu(options, pytest, environment)

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*pytest, *arguments], cwd=ROOT, env=environment)

    failed = 0
    if options.suite != "methods" and not options.method and not options.network:
        failed |= start("benchmarks/bench_ops.py").wait()
    if options.suite != "ops":
        files = ["benchmarks/bench_methods.py", "benchmarks/bench_claims.py", "benchmarks/bench_faces.py"]
        files += ["--method", options.method] if options.method else []
        networks = [options.network] if options.network else list(ON_A_CPU)
        side_by_side = options.threads == 1 and len(networks) <= (os.cpu_count() or 1)
        running = []
        for network in networks:
            running.append(start(*files, "--network", network))
            if not side_by_side:
                failed |= running[-1].wait()
        for process in running:
            failed |= process.wait()
    return int(failed != 0)


def on_gpu(options: argparse.Namespace, pytest: list[str], environment: dict[str, str]) -> int:
    """Run the methods on a GPU, each network in a process of its own; what the time does not suffice for is named."""
    if not torch.cuda.is_available():
        print(f"python -m benchmarks: --device cuda needs a CUDA device, torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    environment = environment | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)} if options.threads == 1 else environment
    command = [*pytest, "-s", "-rs", "benchmarks/bench_gpu.py", "--device", "cuda"]
    for name in ("method", "images"):
        value = getattr(options, name)
        command += [f"--{name}", str(value)] if value is not None else []
    failed, started = 0, time.time()
    networks = [options.network] if options.network else list(NETWORKS)
    for number, network in enumerate(networks, 1):
        until = started + 60 * options.minutes * number / len(networks)
        own = ["--network", network, "--until", str(until)]
        failed |= subprocess.run([*command, *own], cwd=ROOT, env=environment, check=False).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
