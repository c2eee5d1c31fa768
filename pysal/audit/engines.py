"""Who computes the shards: this process, a pool of processes, or a Ray cluster. All of them the same way."""

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, process
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pysal._checks import refuse
from pysal.audit import files
from pysal.audit.data import Item
from pysal.audit.shard import WHERE, Files, Setup, Worker

ENGINES = ("pool", "inline", "ray")
# How often a shard may take its worker with it before it is given up: once may be anybody's kill, thrice is the shard.
ATTEMPTS = 3
# Ray starts a task where this much of a processor is free. Below 1, so that a cluster whose processors are all promised to
# others still has room for the tasks that hand data on (ray-project/ray issue 44687).
RAY_CPUS = 0.9
REACHED_WITHIN = 10.0  # seconds until a cluster must have answered
# glibc gives blocks above its threshold back to the system as soon as they are free, and pays for their pages again and again;
# raising it makes batches of 16 several times faster (benchmarks/README.md). Values in bytes, keys of mallopt(3).
MALLOPT = {"M_MMAP_THRESHOLD": (-3, 32 * 2**20), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


class Shard(NamedTuple):
    """A shard to be computed."""

    number: int
    items: list[Item]


class Done(NamedTuple):
    """A shard that is on the disk."""

    number: int
    explained: int
    failed: int


@dataclass
class Stopped(RuntimeError):
    """A job cannot go on; the message says why. What is finished is kept."""

    sentence: str

    def __str__(self) -> str:
        return self.sentence


def commit(out: Path, number: int, found: Files) -> Done:
    """Write a shard's files; the rows come last, and with them the shard is finished.

    Raises:
        files.DiskFault: the disk is full; the shard is not there then.
    """
    files.write(files.shard_path(out, "errors", number), found.errors)
    files.write(files.shard_path(out, "timings", number), found.timings)
    files.write(files.shard_path(out, "shards", number), found.rows)
    return Done(number, found.explained, found.failed)


def devices(device: str, workers: int | None) -> list[str]:
    """Return the device of each worker: a processor of this process, or a GPU, for each unless `workers` says otherwise."""
    if device == "cuda":
        gpus = torch.cuda.device_count()
        return [f"cuda:{n % gpus}" for n in range(workers or gpus)]
    return ["cpu"] * (workers or len(os.sched_getaffinity(0)))


def keep_freed_memory() -> None:
    """Tell the C library of this process, which must be ours, to keep what is freed; without glibc, do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for key, value in MALLOPT.values():
            mallopt(key, value)


# In this process ------------------------------------------------------------------------------------------------------------


def inline(todo: Sequence[Shard], out: Path, worker: Worker) -> Generator[Done]:
    """Compute the shards here, one after the other."""
    for shard in todo:
        yield commit(out, shard.number, worker.explain(shard.number, shard.items))


# In a pool of processes -----------------------------------------------------------------------------------------------------


@dataclass
class _Hand:
    """A process of the pool, as its parent sees it."""

    device: str
    process: process.BaseProcess
    pipe: connection.Connection
    shard: Shard | None = None


def pool(setup: Setup, todo: Sequence[Shard], out: Path, places: Sequence[str]) -> Generator[Done]:
    """Compute the shards in processes, one for each device in `places`; a process that dies is replaced.

    Raises:
        Stopped: a shard has killed its worker three times, or went wrong in another way.
        files.DiskFault: a worker could not write its files.
    """
    waiting, attempts, unborn = deque(todo), dict.fromkeys((shard.number for shard in todo), 0), 0
    hands: list[_Hand] = []
    try:
        hands.extend(_hire(setup, out, place) for place in places[: len(todo)])
        while hands:
            ready = connection.wait([hand.pipe for hand in hands])
            for hand in [hand for hand in hands if hand.pipe in ready]:
                try:
                    kind, *said = hand.pipe.recv()
                except (EOFError, OSError):
                    kind, said = "dead", []
                if kind == "dead":
                    hand.process.join()
                    hands.remove(hand)
                    if hand.shard is None:
                        unborn += 1
                    else:
                        attempts[hand.shard.number] += 1
                        if attempts[hand.shard.number] < ATTEMPTS:
                            waiting.appendleft(hand.shard)
                    if unborn >= ATTEMPTS or (hand.shard is not None and attempts[hand.shard.number] >= ATTEMPTS):
                        raise Stopped(_obituary(hand))
                    if waiting:
                        hands.append(_hire(setup, out, hand.device))
                    continue
                if kind == "failed":
                    raise files.DiskFault(said[0]) if said[1] else Stopped(said[0])
                unborn, hand.shard = 0, None
                if waiting:
                    hand.shard = waiting.popleft()
                    with contextlib.suppress(OSError):  # it is dead, and the pipe will say so
                        hand.pipe.send(hand.shard)
                else:
                    hands.remove(hand)
                    hand.pipe.close()
                if kind == "done":
                    yield said[0]
                if not waiting and not hands:
                    break
    finally:
        for hand in hands:
            hand.process.terminate()
        for hand in hands:
            hand.process.join()
            hand.pipe.close()


def _hire(setup: Setup, out: Path, device: str) -> _Hand:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs, setup, out, device), name="pysal-audit", daemon=True)
    worker.start()
    theirs.close()  # so that the pipe ends when the process does
    return _Hand(device, worker, ours)


def _obituary(hand: _Hand) -> str:
    code = hand.process.exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if hand.shard is None:
        return f"pysal.audit: a worker died {ATTEMPTS} times before its first shard ({how})"
    images = f"images {hand.shard.items[0].id} to {hand.shard.items[-1].id}"
    hint = ", which is what a full memory looks like: fewer workers or a smaller batch may help" if code == -9 else ""
    return f"pysal.audit: shard {hand.shard.number} ({images}) killed its worker {ATTEMPTS} times ({how}{hint})"


def _serve(pipe: connection.Connection, setup: Setup, out: Path, device: str) -> None:
    """Be a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, too, and says what to do
    threading.Thread(target=_die_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        worker = Worker(setup, device)
        pipe.send(("ready",))
        while True:
            shard = pipe.recv()
            pipe.send(("done", commit(out, shard.number, worker.explain(shard.number, shard.items))))
    except EOFError:
        return
    except Exception as error:
        pipe.send(("failed", sentence(error), isinstance(error, files.DiskFault)))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def sentence(error: BaseException) -> str:
    """Return an error as the one sentence that a job stops with."""
    text = " ".join(str(error).split())
    return text if text.startswith("pysal") else f"{WHERE}: {type(error).__name__}: {text}"


# On Ray ---------------------------------------------------------------------------------------------------------------------

_worker_of: dict[str, Worker] = {}


def on_ray(setup: Setup, todo: Sequence[Shard], out: Path, workers: int | None, address: str | None) -> Generator[Done]:
    """Compute the shards as tasks of a Ray cluster, and write what they return here.

    Images and model must be found under the same paths on every node, and pysal be installed there.

    Raises:
        Stopped: a task went wrong; those whose node died are made again first.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        missing = f"'ray' without the package {error.name} (run: pip install 'pysal-saliency[ray]')"
        refuse(WHERE, "engine", "have its package installed", missing, ModuleNotFoundError)
    cuda = setup.manifest["device"] == "cuda"
    started_here = not ray.is_initialized()
    if started_here:
        _check_reachable(address)
        cpus = None if address else (workers or len(os.sched_getaffinity(0)))
        # "local": without it Ray would join a cluster that it finds on this machine
        ray.init(address=address or "local", num_cpus=cpus, include_dashboard=None if address else False, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=RAY_CPUS, num_gpus=1 if cuda else 0, max_retries=ATTEMPTS)(_on_node)
        setup_there = ray.put(setup)
        key = f"{os.getpid()} {id(setup)} {setup.manifest['created']['time']}"
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        at_once = workers or max(1, int(resources.get("GPU" if cuda else "CPU", 1)))
        waiting = deque(todo)
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < 2 * at_once:
                shard = waiting.popleft()
                running[task.remote(key, setup_there, shard)] = shard.number
            (first,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(first)
            try:
                found = ray.get(first)
            except ray.exceptions.RayTaskError as error:
                raise Stopped(sentence(error.cause or error)) from error
            except ray.exceptions.RayError as error:
                raise Stopped(f"pysal.audit: Ray gave up shard {number} ({type(error).__name__})") from error
            yield commit(out, number, found)
    finally:
        if started_here:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Refuse a cluster's address at which nobody listens, which Ray would try again for many minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\]]+?)\]?:(\d+)", address or "")
    if found is None:
        return  # "auto", "local": Ray knows where that is
    try:
        socket.create_connection((found[1], int(found[2])), timeout=REACHED_WITHIN).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        refuse(WHERE, "address", "be that of a Ray cluster", f"{address!r} ({reason.lower()})", ConnectionError)


def _on_node(key: str, setup: Setup, shard: Shard) -> Files:
    """Compute a shard in a process of Ray, which keeps the prepared model for the next."""
    if key not in _worker_of:
        _worker_of.clear()
        keep_freed_memory()
        torch.set_num_threads(1)
        _worker_of[key] = Worker(setup, setup.manifest["device"])
    return _worker_of[key].explain(shard.number, shard.items)
