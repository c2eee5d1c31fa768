"""Who computes the shards: this process, a pool of processes, or a Ray cluster. All of them the same way."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
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
from pysal.audit.reading import MOST_THREADS
from pysal.audit.shard import WHERE, Files, Setup, Worker
from pysal.engine.running.chunks import progress
from pysal.engine.running.heap import keep_freed_memory

ENGINES = ("pool", "inline", "ray")
# How often a shard may take its worker with it before it is set aside: once may be anybody's kill, twice is the shard.
ATTEMPTS = 2
# How often a worker may die before its first shard.
BIRTHS = 3
# Seconds in which a worker must finish a pass of its model, whatever it computes; one that does not hangs.
PATIENCE = 600.0
# Ray starts a task where this much of a processor is free. Below 1, so that a cluster whose processors are all promised to
# others still has room for the tasks that hand data on (ray-project/ray issue 44687).
RAY_CPUS = 0.9
REACHED_WITHIN = 10.0  # seconds until a cluster must have answered


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
    """A job cannot continue; the message says why. Finished shards are kept."""

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


def readers(device: str, workers: int) -> int:
    """Return in how many threads each of the workers of this machine reads images, beside the one that computes.

    On a CPU one thread, unless every processor has a worker already. A GPU waits for nothing else, so its worker has its share
    of all processors.
    """
    processors = len(os.sched_getaffinity(0))
    if device == "cpu":
        return int(workers < processors)
    return min(MOST_THREADS, max(1, processors // workers))


def devices(device: str, workers: int | None) -> list[str]:
    """Return the device of each worker: a processor of this process, or a GPU, for each unless `workers` says otherwise."""
    if device == "cuda":
        gpus = torch.cuda.device_count()
        return [f"cuda:{n % gpus}" for n in range(workers or gpus)]
    return ["cpu"] * (workers or len(os.sched_getaffinity(0)))


# In this process ------------------------------------------------------------------------------------------------------------


def inline(todo: Sequence[Shard], out: Path, worker: Worker) -> Generator[Done]:
    """Compute the shards here, one after the other.

    Raises:
        Stopped: at the end, where shards went wrong.
        files.DiskFault: the files of a shard could not be written.
    """
    aside: list[str] = []
    with worker.reading_ahead(readers(worker.device, 1)):
        for n, shard in enumerate(todo):
            try:
                found = worker.explain(shard.number, shard.items, todo[n + 1].items if n + 1 < len(todo) else ())
            except Exception as error:
                aside.append(f"{_named(shard)} went wrong ({_reason(error)})")
                continue
            yield commit(out, shard.number, found)
    _stop_for(aside, len(todo))


def _named(shard: Shard) -> str:
    first, last = shard.items[0], shard.items[-1]
    images = (
        f"image {first.id}, {first.path}" if first is last else f"images {first.id} to {last.id}, {first.path} to {last.path}"
    )
    return f"shard {shard.number} ({images})"


def _stop_for(aside: Sequence[str], shards: int) -> None:
    """Say which shards were set aside, once all others are done."""
    if aside:
        more = f"; and {len(aside) - 3} more" if len(aside) > 3 else ""
        rest = ", the others are done" if len(aside) < shards else ""
        raise Stopped(f"pysal.audit: {'; '.join(aside[:3])}{more}{rest}; going on with the job tries again")


# In a pool of processes -----------------------------------------------------------------------------------------------------


@dataclass
class _Hand:
    """A process of the pool, as its parent sees it."""

    device: str
    process: process.BaseProcess
    pipe: connection.Connection
    shard: Shard | None = None
    ahead: Shard | None = None  # of which it reads images, if it has threads for that, and computes nothing yet
    heard: float = 0.0
    hung: bool = False


def pool(setup: Setup, todo: Sequence[Shard], out: Path, places: Sequence[str]) -> Generator[Done]:
    """Compute the shards in processes, one for each device in `places`; a process that dies or hangs is replaced.

    Raises:
        Stopped: workers die before their first shard; or, once all others are done, shards that killed or hung their worker
            twice, or went wrong in another way.
        files.DiskFault: a worker could not write its files.
    """
    waiting, attempts, unborn = deque(todo), dict.fromkeys((shard.number for shard in todo), 0), 0
    hands: list[_Hand] = []
    aside: list[str] = []
    places = places[: len(todo)]
    threads = readers(setup.manifest["device"], len(places))
    try:
        hands.extend(_hire(setup, out, place, threads) for place in places)
        while hands:
            ready = connection.wait([hand.pipe for hand in hands], timeout=PATIENCE / 10)
            for hand in hands:
                if hand.shard is not None and hand.pipe not in ready and time.monotonic() - hand.heard > PATIENCE:
                    hand.hung = True
                    hand.process.kill()  # its pipe ends with it
            for hand in [hand for hand in hands if hand.pipe in ready]:
                hand.heard = time.monotonic()
                try:
                    kind, *said = hand.pipe.recv()
                except (EOFError, OSError):
                    kind, said = "dead", []
                if kind == "alive":
                    continue
                if kind == "dead":
                    hand.process.join()
                    hand.pipe.close()
                    hands.remove(hand)
                    if hand.ahead is not None:
                        waiting.appendleft(hand.ahead)
                    if hand.shard is None:
                        unborn += 1
                        if unborn >= BIRTHS:
                            raise Stopped(f"pysal.audit: a worker died {BIRTHS} times before its first shard ({_how(hand)})")
                    else:
                        attempts[hand.shard.number] += 1
                        if attempts[hand.shard.number] < ATTEMPTS:
                            waiting.appendleft(hand.shard)
                        else:
                            verb = "hung" if hand.hung else "killed"
                            aside.append(f"{_named(hand.shard)} {verb} its worker {ATTEMPTS} times ({_how(hand)})")
                    if waiting:
                        hands.append(_hire(setup, out, hand.device, threads))
                    continue
                if kind == "failed":
                    if said[1]:
                        raise files.DiskFault(said[0])
                    if hand.shard is None:
                        raise Stopped(said[0])
                    aside.append(f"{_named(hand.shard)} went wrong ({said[0]})")
                unborn, hand.shard = 0, _next(hand, hands, waiting)
                if hand.shard is not None:
                    hand.ahead = waiting.popleft() if waiting and threads else None
                    with contextlib.suppress(OSError):  # it is dead, and the pipe will say so
                        hand.pipe.send((hand.shard, hand.ahead))
                else:
                    hands.remove(hand)
                    hand.pipe.close()
                if kind == "done":
                    yield said[0]
        _stop_for(aside, len(todo))
    finally:
        for hand in hands:
            hand.process.terminate()
        for hand in hands:
            hand.process.join()
            hand.pipe.close()


def _next(hand: _Hand, hands: Sequence[_Hand], waiting: deque[Shard]) -> Shard | None:
    """Take the shard of which a worker has read images, else the next, else one of which another has done no more than that."""
    if hand.ahead is None and waiting:
        return waiting.popleft()
    holder = hand if hand.ahead is not None else next((other for other in hands if other.ahead is not None), hand)
    found, holder.ahead = holder.ahead, None
    return found


def _hire(setup: Setup, out: Path, device: str, threads: int) -> _Hand:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs, setup, out, device, threads), name="pysal-audit", daemon=True)
    worker.start()
    theirs.close()  # so that the pipe ends when the process does
    return _Hand(device, worker, ours)


def _how(hand: _Hand) -> str:
    """Return how a worker ended."""
    if hand.hung:
        return f"no pass of its model ended within {PATIENCE:g} s"
    code = hand.process.exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return how + (
        ", which is what a full memory looks like: fewer workers or a smaller batch size may help" if code == -9 else ""
    )


def _serve(pipe: connection.Connection, setup: Setup, out: Path, device: str, threads: int) -> None:
    """Be a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, too, and says what to do
    threading.Thread(target=_die_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        worker = Worker(setup, device)
        pipe.send(("ready",))
        told = time.monotonic()

        def alive(*_: object) -> None:
            nonlocal told
            if time.monotonic() - told > 1:
                told = time.monotonic()
                pipe.send(("alive",))

        with worker.reading_ahead(threads):
            while True:
                shard, ahead = pipe.recv()
                try:
                    with progress(alive):
                        found = worker.explain(shard.number, shard.items, () if ahead is None else ahead.items)
                except Exception as error:
                    pipe.send(("failed", _reason(error), False))
                    continue
                pipe.send(("done", commit(out, shard.number, found)))
    except EOFError:
        return
    except Exception as error:
        pipe.send(("failed", sentence(error), isinstance(error, files.DiskFault)))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _reason(error: BaseException) -> str:
    """Return what an error says, without the name of whoever says it."""
    return sentence(error).removeprefix(f"{WHERE}: ")


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
        Stopped: at the end, where tasks went wrong; those whose node died are made again first.
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
        before = signal.getsignal(signal.SIGTERM)
        ray.init(address=address or "local", num_cpus=cpus, include_dashboard=None if address else False, log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray takes it, and ends the process without a word
    try:
        task = ray.remote(num_cpus=RAY_CPUS, num_gpus=1 if cuda else 0, max_retries=ATTEMPTS)(_on_node)
        setup_there = ray.put(setup)
        key = f"{os.getpid()} {id(setup)} {setup.manifest['created']['time']}"
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        at_once = workers or max(1, int(resources.get("GPU" if cuda else "CPU", 1)))
        waiting, shards = deque(todo), {shard.number: shard for shard in todo}
        aside: list[str] = []
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
                aside.append(f"{_named(shards[number])} went wrong ({_reason(error.cause or error)})")
                continue
            except ray.exceptions.RayError as error:
                aside.append(f"{_named(shards[number])} was given up by Ray ({type(error).__name__})")
                continue
            yield commit(out, number, found)
        _stop_for(aside, len(todo))
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
    threads = (
        readers("cuda", torch.cuda.device_count()) if setup.manifest["device"] == "cuda" else 0
    )  # a task has one processor
    with _worker_of[key].reading_ahead(threads):
        return _worker_of[key].explain(shard.number, shard.items)
