"""ONNX files: `classifier.onnx`, as a torch module through onnx2torch, else as a black box through ONNX Runtime."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pysal._checks import first_line, refuse
from pysal.engine.model.black_box import numpy_model
from pysal.models.classifier import Classifier
from pysal.models.spec import WHERE, FixedBatch, ModelSpec, from_file, needed, refuse_file


class BlackBox(nn.Module):
    """An ONNX Runtime session: answers images, and tells nothing of how it came to the answer.

    Args:
        session: of one input (N, C, H, W).
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        (self.input,) = [entry.name for entry in session.get_inputs()]
        self.function = numpy_model(lambda images: session.run(None, {self.input: images})[0])

    def forward(self, images: Tensor) -> Tensor:
        """Return the first output for images (N, C, H, W), computed in float32."""
        scores: Tensor = self.function(images.float())
        return scores.to(images.dtype)


def load(spec: ModelSpec) -> Classifier:
    """Return the classifier in an ONNX file.

    Where onnx2torch is installed and knows all its operators, it becomes a torch module that every method can explain.
    Else ONNX Runtime runs it, and leave-one-out alone can.

    Raises:
        ImportError: neither onnx2torch nor ONNX Runtime is installed.
        ValueError: no such file, or no ONNX model of one image batch; its normalisation is not given.

    Warns:
        UserWarning: onnx2torch is installed, and cannot be imported or does not know the model.
    """
    path = Path(spec.name)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        refuse_file("source", path, error)
    network, shape = _converted(spec, path) or _black_box(spec, path)
    if len(shape) != 4:
        refuse(WHERE, f"source {spec.source!r}", "take images (N, C, H, W)", f"an input of shape {tuple(shape)}")
    batch, channels, *sides = shape
    if isinstance(batch, int):
        network = FixedBatch(network, batch)
    known = [side for side in sides if isinstance(side, int)]
    return from_file(
        spec,
        network,
        size=(known[0], known[1]) if len(known) == 2 else None,
        channels=channels if isinstance(channels, int) else None,
    )


Shape = list[int | str | None]


def _converted(spec: ModelSpec, path: Path) -> tuple[nn.Module, Shape] | None:
    """Return the model as a torch module and the shape of its input, None where onnx2torch is missing or cannot."""
    try:
        onnx2torch = needed(spec, "onnx2torch", "onnx")
        onnx = needed(spec, "onnx", "onnx")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        _warn_black_box(spec, f"onnx2torch cannot be imported ({first_line(error.__context__ or error)})")
        return None
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's, the checker's, of external data
        refuse(WHERE, "source", "be an ONNX model", f"{path} ({first_line(error)})")
    known = {constant.name for constant in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in known]
    _check_one_input(spec, len(inputs))
    sides = inputs[0].type.tensor_type.shape.dim
    shape: Shape = [side.dim_value if side.HasField("dim_value") and side.dim_value > 0 else None for side in sides]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return onnx2torch.convert(model), shape
    except Exception as error:  # an operator it does not know, or a use of one
        _warn_black_box(spec, f"onnx2torch cannot convert it ({type(error).__name__}: {first_line(error)})")
        return None


def _warn_black_box(spec: ModelSpec, reason: str) -> None:
    warnings.warn(f"{WHERE}: only leave_one_out can explain {spec.source!r}: {reason}", stacklevel=6)


def _black_box(spec: ModelSpec, path: Path) -> tuple[nn.Module, Shape]:
    runtime = needed(spec, "onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes
        refuse(WHERE, "source", "be an ONNX model", f"{path} ({first_line(error)})")
    _check_one_input(spec, len(session.get_inputs()))
    return BlackBox(session), session.get_inputs()[0].shape


def _check_one_input(spec: ModelSpec, count: int) -> None:
    if count != 1:
        refuse(WHERE, f"source {spec.source!r}", "take one batch of images", f"{count} inputs")
