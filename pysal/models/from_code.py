"""Models that a Python file makes: `networks.py:classifier`."""

import importlib.util
import sys
from pathlib import Path

from torch import nn

from pysal._checks import first_line, refuse
from pysal.models.classifier import Classifier
from pysal.models.spec import WHERE, ModelSpec, from_file, load_weights, refuse_file


def load(spec: ModelSpec) -> Classifier:
    """Return what a function of a Python file returns: a `Classifier`, or a network that takes normalised images.

    The network may be a detector, a segmenter or an encoder, too: what is explained of it is said by a target.

    Raises:
        PermissionError: running code was not permitted.
        ValueError: no such file or function, or one that fails or returns something else; a network whose size or
            normalisation is not given.
    """
    file, _, name = spec.name.rpartition(":")
    path = Path(file)
    if not spec.allow_code:
        requirement = "be True (--allow-code) for a Python file, which will be run"
        refuse(WHERE, "allow_code", requirement, f"False for {spec.source}", PermissionError)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        refuse_file("source", path, error)
    code = importlib.util.spec_from_file_location(f"pysal_models_{path.stem}", path)
    assert code is not None  # for a .py file
    assert code.loader is not None
    module = importlib.util.module_from_spec(code)
    sys.modules[code.name] = module  # where dataclasses and pickle look their module up
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours can be imported, as where it is run
    try:
        code.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            refuse(WHERE, "source", f"name a function of {path} ({', '.join(names) or 'it has none'})", repr(name))
        model = function()
    except Exception as error:  # the file's own code
        if str(error).startswith(WHERE):
            raise
        refuse(WHERE, "source", "be code that runs", f"{spec.source} ({type(error).__name__}: {first_line(error)})")
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not isinstance(model, nn.Module):
        refuse(WHERE, "source", "return a torch.nn.Module", f"{type(model).__name__} from {spec.source}", TypeError)
    if spec.weights is not None:
        load_weights(spec, model)
    return model.eval() if isinstance(model, Classifier) else from_file(spec, model, any_output=True)
