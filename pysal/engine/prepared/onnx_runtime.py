"""A model's passes without gradients through ONNX Runtime: an optional package, imported when a model is first exported to it.

The model is exported by torch's own tracing exporter, which needs no other package and takes a quarter of a second, into
memory; no file is written. The session keeps its own weights: whoever holds it sees to it that the model's have not changed.
"""

import copy
import importlib.util
import io
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pysal._checks import first_line
from pysal._interrupts import held_back, import_whole
from pysal.engine.graph.distance import distance
from pysal.engine.prepared.exactness import UNWITNESSED_TOLERANCE
from pysal.engine.running.chunks import MEMORY_SHARE, free_memory

# What exporting holds at once, in copies of the weights: the exporter's, those of the file in memory, the session's two.
COPIES_OF_WEIGHTS = 5
# Bytes that the format can hold in one piece.
MOST_BYTES = 2**31 - 2**20
# The exporter refuses to run while another thread exports.
_EXPORTING = threading.Lock()


class NotExported(Exception):
    """ONNX Runtime does not run a model; the message says why."""


class Runtime:
    """A session of ONNX Runtime: forward passes in float32 on the CPU, by as many threads as torch had when it was made.

    Args:
        file: the content of an ONNX file of one input and one output.
    """

    def __init__(self, file: bytes) -> None:
        onnxruntime = import_whole("onnxruntime")
        self.threads, self._process = torch.get_num_threads(), os.getpid()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 4  # what goes wrong is raised
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch computes in between
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        (self._input,) = [one.name for one in self._session.get_inputs()]

    @property
    def here(self) -> bool:
        """Whether it runs here as torch would: by as many threads, and not in a fork, where its threads are missing."""
        return self.threads == torch.get_num_threads() and self._process == os.getpid()

    def __call__(self, images: Tensor) -> Tensor:
        """Return the output for images (N, C, H, W)."""
        (output,) = self._session.run(None, {self._input: images.detach().contiguous().numpy()})
        return torch.from_numpy(output)


def missing() -> str | None:
    """Return what keeps models from being exported in this environment, None for nothing. It imports nothing."""
    try:
        found = sys.modules["onnxruntime"] if "onnxruntime" in sys.modules else importlib.util.find_spec("onnxruntime")
    except (ImportError, ValueError):
        found = None
    return None if found is not None else "ONNX Runtime is not installed"


class _Quiet(nn.Module):
    """A model that ends the exporter's log, which it begins, and in which graphs of unknown operations go to the terminal."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, False

    def forward(self, images: Tensor) -> Any:
        """Return what the model does."""
        torch._C._jit_set_onnx_log_enabled(False)
        return self.model(images)


def exported(model: nn.Module, images: Sequence[Tensor]) -> Runtime:
    """Return a model as ONNX Runtime runs it, where that is as near to the model in float64 as the model itself.

    Args:
        model: in eval mode, a static graph, of float32 on the CPU.
        images: batches of one and of several images, on which both are compared.

    Raises:
        NotExported: it is not, or cannot be exported.
    """
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > MOST_BYTES:
        raise NotExported("its weights are larger than an ONNX file can hold")
    if COPIES_OF_WEIGHTS * size > MEMORY_SHARE * free_memory(images[0].device, COPIES_OF_WEIGHTS * size / MEMORY_SHARE):
        raise NotExported("there is too little memory to export it")
    try:
        runtime = _session(model, images[-1])
        found = [runtime(batch) for batch in images]
        plain = _plain_images(images[0])
        with torch.no_grad():
            same = torch.equal(runtime(plain).isnan(), model(plain.clone()).isnan())
    except Exception as error:  # of an exporter that knows no such operation, or is not there, and of the runtime
        raise NotExported(f"it cannot be exported ({first_line(error)})") from error
    with torch.no_grad():
        expected = [model(batch.clone()) for batch in images]
    limit = UNWITNESSED_TOLERANCE
    exact = _in_float64(model, images)
    if exact is not None:
        limit = max(limit, 2 * max(distance(own, one, float("inf")) for own, one in zip(expected, exact, strict=True)))
        expected = exact
    apart = max(
        distance(one, own, float("inf")) if one.shape == own.shape else float("inf")
        for one, own in zip(found, expected, strict=True)
    )
    if not apart <= limit:
        raise NotExported(f"its output would be {apart:.1e} away from the model's")
    if not same:
        raise NotExported("it would give numbers where the model gives NaN")  # as maxima of NaN are in it
    return runtime


def _session(model: nn.Module, images: Tensor) -> Runtime:
    """Return a model as the exporter and ONNX Runtime make it, not yet compared with it."""
    file = io.BytesIO()
    # what the exporter changes of torch it puts back, which no interrupt may cut in two
    with _EXPORTING, held_back(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logs = torch._C._jit_is_onnx_log_enabled()
        try:
            torch.onnx.export(
                _Quiet(model),
                (images.clone(),),
                file,  # type: ignore[arg-type]  # a file in memory, which the tracing exporter takes
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                input_names=["images"],
                output_names=["output"],
                dynamic_axes={"images": {0: "N"}, "output": {0: "N"}},
            )
        finally:
            torch._C._jit_set_onnx_log_enabled(logs)
        return Runtime(file.getvalue())


def _plain_images(image: Tensor) -> Tensor:
    """Return a black and a white image, of which a model that divides by their norm or deviation may make NaN."""
    return torch.stack([torch.zeros_like(image[0]), torch.ones_like(image[0])])


def _in_float64(model: nn.Module, images: Sequence[Tensor]) -> list[Any] | None:
    """Return what a model gives in float64, None where it does not run in it."""
    try:
        wide = copy.deepcopy(model).double()
        with torch.no_grad():
            found = [wide(batch.double()) for batch in images]
    except Exception:  # of a dtype that the model's code fixes
        return None
    return found if all(isinstance(one, Tensor) and one.dtype == torch.float64 for one in found) else None
