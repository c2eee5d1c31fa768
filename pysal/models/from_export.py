"""Programs of torch.export: `classifier.pt2`."""

import io
import logging
import pickle
import warnings
from pathlib import Path

import torch
from torch import nn

from pysal._checks import first_line, refuse
from pysal.models import contents
from pysal.models.classifier import Classifier
from pysal.models.spec import WHERE, FixedBatch, ModelSpec, from_file, read_file, tensors_only


def load(spec: ModelSpec) -> Classifier:
    """Return the classifier in a file of torch.export.save, its modules in their original hierarchy.

    A program that was exported for a fixed number of images gets that many at a time.

    Raises:
        PermissionError: it holds more than tensors and operations on them, and running code was not permitted.
        ValueError: no such file, or no exported program of one image batch; its normalisation is not given.
    """
    path = Path(spec.name)
    content = read_file("source", path)
    contents.check_program(spec, content)
    logger = logging.getLogger("torch.export")
    try:
        logger.disabled = True  # it writes a traceback of what it will raise
        with tensors_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(io.BytesIO(content))
            network: nn.Module = torch.export.unflatten(program)
    except pickle.UnpicklingError:  # in words of torch's, which say how to load the file all the same
        refuse(WHERE, "source", "be a program of torch.export", f"{path} (it holds a pickle of more than tensors)")
    except Exception as error:  # zip and JSON have theirs
        refuse(WHERE, "source", "be a program of torch.export", f"{path} ({first_line(error)})")
    finally:
        logger.disabled = False
    inputs = program.graph_signature.user_inputs
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        shown = ", ".join(str(tuple(shape)) for shape in shapes)
        refuse(WHERE, f"source {spec.source!r}", "take images (N, C, H, W)", f"{len(shapes)} inputs {shown}")
    batch, channels, *sides = shapes[0]
    if isinstance(batch, int):
        network = FixedBatch(network, batch)
    known = [side for side in sides if isinstance(side, int)]
    return from_file(
        spec,
        network,
        size=(known[0], known[1]) if len(known) == 2 else None,
        channels=channels if isinstance(channels, int) else None,
    )
