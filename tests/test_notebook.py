"""A notebook, run by its kernel: what explains itself at the end of a cell, how often, and how much of it is kept."""

import os
from typing import Any

import nbclient
import nbformat
import pytest

CELLS = {
    "model": """
        import pysal, torch
        torch.manual_seed(0)
        nn = torch.nn
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
        images = torch.rand(1, 3, 96, 96)  # noise is what compresses worst
        names = ["gradient", "grad_cam", "integrated_gradients"]""",
    "found": "found = pysal.explain(model, images, methods=names)\nfound",
    "plot": "found.plot()",
    "nothing": "found.plot();",
    "pyplot": "import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\nfound.plot(methods='gradient', ax=axes);",
    "plot after pyplot": "found.plot()",
    "prepared": "pysal.prepare(model, images)",
    "refused": "found['grad-cam']",
}


@pytest.fixture(scope="module")
def outputs() -> dict[str, list[Any]]:
    """What the cells of a notebook show, by name."""
    lines = {name: "\n".join(line.removeprefix(" " * 8) for line in code.strip().splitlines()) for name, code in CELLS.items()}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in lines.values()])
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", allow_errors=True).execute(env=environment)
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


def test_what_a_cell_ends_with_shows_itself_once(outputs) -> None:
    kinds = {
        name: [set(one.data) - {"text/plain"} for one in found if one.output_type in ("display_data", "execute_result")]
        for name, found in outputs.items()
    }
    assert kinds == {
        "model": [],
        "found": [{"text/html"}],
        "plot": [{"image/jpeg"}],
        "nothing": [],
        "pyplot": [{"image/png"}],  # the caller's own figure, by pyplot
        "plot after pyplot": [{"image/jpeg"}],
        "prepared": [set()],
        "refused": [],
    }


def test_what_is_kept_of_a_cell_is_small(outputs) -> None:
    for name, found in outputs.items():
        assert sum(len(str(value)) for one in found for value in one.get("data", {}).values()) < 300_000, name


def test_reports_and_errors_are_readable(outputs) -> None:
    (report,) = outputs["prepared"]
    assert "times as fast as the model" in report.data["text/plain"]
    (error,) = outputs["refused"]
    assert "did you mean" in error.evalue
    assert "grad_cam" in error.evalue
