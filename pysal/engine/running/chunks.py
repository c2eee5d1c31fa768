"""One queue for every method: consecutive chunks under a memory budget, halved when memory runs out."""

import contextlib
import errno
import math
import os
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pysal._library import widest
from pysal.engine.running.states import DispatchMode, kept, restoring

ProgressCallback = Callable[[str, int, int], None]

# Rows per model pass where memory is no limit. On a CPU the caches decide: batches of 4 images of 224 x 224 are fastest
# (8 lose 7 %, larger ones up to 1.9x to page faults and cache misses). Smaller rows are as many as make the same bytes, or a
# pass would be over before what it costs to begin one; a GPU wants enough rows to fill its multiprocessors.
CPU_ROWS = 4
CPU_PASS_BYTES = CPU_ROWS * 3 * 224 * 224 * 4
GPU_ROWS = 64
# A pass of more rows than this is not begun before one row has been measured: what a network makes of a row of a few numbers
# may be a thousand times more, and few networks of images come here.
UNMEASURED_ROWS = 256
# Bytes that a forward and backward pass of a common network keeps per byte of its input (ResNet-50 at 224 x 224: about 400).
# Where even this many bytes a row fit, nothing needs to be measured.
GENEROUS_BYTES_PER_INPUT_BYTE = 1000
MEMORY_SHARE = 0.5


# What libraries say, in lower case, when memory has run out: torch on a CPU, CUDA, HIP, MPS and this package, the C++ library,
# the operating system, MKL, and NVIDIA's libraries by the names of their statuses.
_MEANS_IT = (
    "out of memory",
    "defaultcpuallocator",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "memory allocation failed",
    "failed to allocate",
    "bad_alloc",
    "bad allocation",
    "status_alloc_failed",
    "cufft_alloc_failed",
    "cuda_error_out_of_memory",
    "unable to find an engine",
    "unable to find a valid cudnn algorithm",
)
# What oneDNN, cuDNN and torch's stable ABI say then, and for other reasons, too.
_MAY_MEAN_IT = (
    "could not create a primitive",
    "could not create a memory",
    "could not execute a primitive",
    "could not append",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
    "API call failed",
)


class Reserve(Protocol):
    """Holds memory that it can do without."""

    def give_back(self) -> None:
        """Let go of the memory."""


_reserves: "weakref.WeakSet[Reserve]" = weakref.WeakSet()


def give_back_when_full(reserve: Reserve) -> None:
    """Have a reserve give its memory back before a chunk is halved because memory ran out."""
    _reserves.add(reserve)


class Cancelled(RuntimeError):
    """The computation was stopped through the `cancel` event of `pysal.progress`."""


@dataclass(frozen=True)
class _Reporting:
    callback: ProgressCallback | None = None
    cancel: threading.Event | None = None
    outermost: bool = True


NOBODY = _Reporting()
_reporting: ContextVar[_Reporting] = kept(ContextVar("pysal_reporting", default=NOBODY))


@contextlib.contextmanager
def progress(callback: bool | ProgressCallback = True, *, cancel: threading.Event | None = None) -> Iterator[None]:
    """Report the progress of every pysal call inside the `with` block, and let another thread stop it.

    Args:
        callback: True shows a tqdm bar for whatever takes more than a second; False nothing; a function is called as
            `callback(method, done, total)`, in model rows.
        cancel: when this event is set, the running call raises `Cancelled` before its next chunk.

    Example:
        >>> import pysal
        >>> seen = []
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).eval()
        >>> with pysal.progress(lambda method, done, total: seen.append((method, done, total))):
        ...     _ = pysal.integrated_gradients(model, torch.rand(1, 3, 8, 8), steps=16, batch_size=8)
        >>> seen[1:3]  # the clean image came first
        [('integrated_gradients', 8, 16), ('integrated_gradients', 16, 16)]
    """
    chosen = _tqdm_callback() if callback is True else (callback or None)
    token = _reporting.set(_Reporting(chosen, cancel))
    try:
        yield
    finally:
        _reporting.reset(token)
        if callback is True and chosen is not None:
            chosen("", 0, 0)


def _tqdm_callback() -> ProgressCallback:
    from tqdm import tqdm

    bars: list[Any] = []

    def report(label: str, done: int, total: int) -> None:
        if bars and (bars[0].desc.removesuffix(": ") != label or bars[0].total != total):
            bars.pop().close()
        if not total:
            return
        if not bars:
            bars.append(tqdm(total=total, desc=label, delay=1, leave=False, unit="row"))
        bars[0].update(done - bars[0].n)

    return report


def is_reported() -> bool:
    """Say whether somebody follows the progress of calls, or may stop them."""
    return _reporting.get() is not NOBODY


def run_chunks(
    total: int,
    body: Callable[[int, int], None],
    *,
    label: str,
    batch_size: int | None,
    device: torch.device,
    row_bytes: int,
    ends: Sequence[int] = (),
) -> None:
    """Call `body(start, stop)` over consecutive slices of `range(total)` until all are done.

    `body` must leave nothing behind when it runs out of memory: it is called again with half the rows. What earlier
    chunks computed is kept.

    Args:
        total: rows in the queue.
        body: runs rows start (inclusive) to stop (exclusive).
        label: name shown as progress.
        batch_size: most rows per chunk; None = as many as are fast and fit half of the free memory.
        device: where the rows run.
        row_bytes: bytes of one row of model input, from which the memory a row needs is guessed before it is measured.
        ends: rows, ascending, that begin a chunk of their own: no chunk reaches across one.

    Raises:
        Cancelled: the `cancel` event of `progress` was set.
        MemoryError: one row alone does not fit.
    """
    most = batch_size or fast_rows(device, row_bytes)
    measure = batch_size is None and total > 1 and not _fits(min(most, total), row_bytes, device)
    size = most if total <= most else chunk_rows(total if not ends else 0, most, device)
    if 0 < total <= most and not (ends or measure) and _reporting.get() is NOBODY:  # most calls: there is no queue
        try:
            return body(0, total)
        except (RuntimeError, MemoryError, OSError) as error:
            if total == 1 or not is_out_of_memory(error):
                _refuse_row(error, total, label, device)
                raise
        _make_room(device)  # outside the except block, where the traceback still holds the tensors of the failed chunk
        size = total // 2
    _run_queue(total, body, label, size, device, ends, measure=measure)


def _fits(rows: int, row_bytes: int, device: torch.device) -> bool:
    """Say whether so many rows fit into memory with any common network, so that none has to be measured before them."""
    if rows > UNMEASURED_ROWS and device.type == "cpu":
        return False
    needed = rows * row_bytes * GENEROUS_BYTES_PER_INPUT_BYTE / MEMORY_SHARE
    return needed <= free_memory(device, needed)


def _refuse_row(error: BaseException, rows: int, label: str, device: torch.device) -> None:
    """Say in one sentence that a row alone does not fit; one that fails for another reason does so in its own words."""
    if rows == 1 and says_out_of_memory(error):
        raise MemoryError(f"pysal: one row of {label} does not fit into the memory of {device}") from error


def _make_room(device: torch.device) -> None:
    """Have memory given back that can be done without."""
    for one in list(_reserves):
        one.give_back()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@restoring
def _run_queue(
    total: int,
    body: Callable[[int, int], None],
    label: str,
    size: int,
    device: torch.device,
    ends: Sequence[int],
    *,
    measure: bool,
) -> None:
    """Go through a queue in chunks of at most `size` rows; `measure`: begin with one row."""
    reporting = _reporting.get()
    _reporting.set(_Reporting(cancel=reporting.cancel, outermost=False))
    done = 0
    while done < total:
        if reporting.cancel is not None and reporting.cancel.is_set():
            raise Cancelled(f"pysal: cancelled after {done} of {total} rows of {label}")
        stop = min([total, done + (1 if measure else size), *ends[bisect_right(ends, done) :][:1]])
        try:
            with _AllocationMeter() if measure else contextlib.nullcontext() as meter:
                body(done, stop)
        except (RuntimeError, MemoryError, OSError) as error:
            if stop - done == 1 or not is_out_of_memory(error):
                _refuse_row(error, stop - done, label, device)
                raise
            size, measure = (stop - done) // 2, False
            failed = True
        else:
            failed = False
        if failed:  # outside the except block, where the traceback still holds the tensors of the failed chunk
            _make_room(device)
            continue
        if meter is not None:
            size = max(1, min(size, int(MEMORY_SHARE * free_memory(device) / max(meter.bytes, 1))))
            measure = False
        done = stop
        if reporting.outermost and reporting.callback is not None:
            reporting.callback(label, done, total)


def chunk_rows(total: int, most: int, device: torch.device) -> int:
    """Return how many rows of a queue run together.

    A GPU gets chunks of nearly one size: 50 rows, at most 32 at once, are 25 and 25, not 32 and 18. Equal shapes are one CUDA
    graph, and a short last chunk leaves multiprocessors idle. On a CPU the most at once are as fast as any.

    Args:
        total: rows in the queue; 0 where other things cut it.
        most: rows in one chunk.
        device: where they run.
    """
    if device.type == "cpu" or total <= most:
        return most
    return math.ceil(total / math.ceil(total / most))


def fast_rows(device: torch.device, row_bytes: int) -> int:
    """Return how many rows of so many bytes are fast in one pass on a device where memory is no limit."""
    return max(CPU_ROWS, CPU_PASS_BYTES // max(row_bytes, 1)) if device.type == "cpu" else GPU_ROWS


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array on a device, as `sent`."""
    tensor = torch.from_numpy(array)
    if tensor.dtype == torch.float64:
        tensor = tensor.to(widest(device))
    return sent(tensor, device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, in the order of its queue; a plain copy to a GPU waits until all before it is done."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device, enough: float = math.inf) -> int:
    """Return the bytes that can still be allocated on `device`; where they are `enough`, perhaps fewer than there are."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with contextlib.suppress(ValueError, OSError):  # pages that nobody uses, which the kernel says at once
        unused = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if unused >= enough:
            return unused
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means, or may mean, that memory ran out, in whichever library."""
    return says_out_of_memory(error) or (isinstance(error, RuntimeError) and any(words in str(error) for words in _MAY_MEAN_IT))


def says_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception, or the one it came from, can mean nothing but that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(words in text for words in _MEANS_IT):
        return True
    return error.__cause__ is not None and says_out_of_memory(error.__cause__)


class _AllocationMeter(DispatchMode):
    """Adds up the bytes of every new tensor, memory used again counted once: an upper bound of what one row needs at once."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def see(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                address = storage.data_ptr()
                self._sizes[address] = max(self._sizes.get(address, 0), storage.nbytes())
