"""The programs of docs/migrating.md, before and after: they differ by their imports alone, and give the same numbers."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.captum.peer import IGNORED
from tests.models.torchvision_ops import define

PAGE = (Path(__file__).parents[1] / "docs/migrating.md").read_text()
PROGRAM = r"{}:\n\n<!-- [^\n]* -->\n```python\n(.*?)```\n"
PAIRS = re.findall(PROGRAM.format("Before") + r"\n" + PROGRAM.format("After"), PAGE, re.DOTALL)
LIBRARIES = ["captum", "saliency", "pytorch_grad_cam"]
# Of the largest value: an average of 8 to 50 roundings of float32, with room. pytorch-grad-cam adds 1e-7 to the range that it
# divides a map by, which is 1e-3 or more here.
CLOSE = {"captum": 100 * 2.0**-23, "saliency": 100 * 2.0**-23, "pytorch_grad_cam": 1e-4}


def numbers(program: str) -> dict[str, NDArray[Any]]:
    """Run a program and return the arrays and tensors that it leaves by their names."""
    space: dict[str, Any] = {}
    exec(program, space)
    found = {name: value.detach().numpy() for name, value in space.items() if isinstance(value, torch.Tensor)}
    return found | {name: value for name, value in space.items() if isinstance(value, np.ndarray)}


def test_each_library_has_its_programs() -> None:
    assert [re.findall(r"^(?:from|import) (captum|saliency|pytorch_grad_cam)\b", one[0], re.MULTILINE)[0] for one in PAIRS] == (
        LIBRARIES
    )


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks", *IGNORED)
@pytest.mark.parametrize(("library", "programs"), list(zip(LIBRARIES, PAIRS, strict=True)), ids=LIBRARIES)
def test_before_and_after(library: str, programs: tuple[str, str]) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    define()
    before, after = (one.splitlines() for one in programs)
    changed = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert changed
    for one, other in changed:
        assert re.match(rf"(from|import) {library}\b", one)
        assert re.match(r"(from|import) pysal\.", other)
        assert one.rpartition("import ")[2] == other.rpartition("import ")[2] or library == "saliency"
    expected, found = map(numbers, programs)
    assert list(found) == list(expected)
    assert len(found) >= 5
    for name, value in expected.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        if value.dtype == np.uint8:  # rounding may move the map by a level of JET, 4 of a colour, half of it mixed in
            assert int(np.abs(value.astype(int) - found[name]).max()) <= 5, name
        else:
            assert value.any(), name
            np.testing.assert_allclose(found[name], value, rtol=0, atol=CLOSE[library] * np.abs(value).max(), err_msg=name)
