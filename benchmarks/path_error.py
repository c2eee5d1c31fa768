"""Measures how far the maps of path methods are from the exact ones, against gradients spent, and writes docs/quadrature.md.

path_error.py [--model NAME] [--photos N]: everything, about an hour on one core; the figures go to
benchmarks/results/<version>/path_error-<model>.json as they are found, and the page is written from all such files.
path_error.py --page: only the page. No step is timed.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import skimage.data
import torch

import pysal
from pysal.models import Classifier, load, read_image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results" / pysal.__version__
PAGE = ROOT / "docs/quadrature.md"
BEGIN, END = "<!-- tables: begin, written by benchmarks/path_error.py -->", "<!-- tables: end -->"
PHOTOS = ["siamese_cat", "coffee", "tabby_cat", "camera", "egyptian_cat", "rocket", "persian_cat", "chelsea"]
REFERENCE_STEPS = 1000
# The two that the default is decided between, and all others at fewer numbers of steps.
CONTENDERS = [("gauss_legendre", "uniform"), ("midpoint", "squared")]
OTHERS = [
    *[(quadrature, "uniform") for quadrature in ("right", "trapezoid", "midpoint")],
    ("gauss_legendre", "squared"),
    ("midpoint", "adaptive"),
]
RULES = [(*rule, steps) for rule in CONTENDERS for steps in (25, 50, 100, 200)]
RULES += [(*rule, steps) for rule in OTHERS for steps in (50, 100)]
TOLERANCE = 0.05
CASES: dict[str, list[dict[str, Any]]] = {
    "integrated_gradients": [{"baseline": 0.0}, {"baseline": "blur"}],
    "blur_integrated_gradients": [{}],
}


def photo(name: str, model: Classifier) -> torch.Tensor:
    """Return one of the shipped photos, or one of scikit-image's."""
    if name == "rocket":
        return read_image(skimage.data.rocket(), model)  # type: ignore[no-untyped-call]
    return read_image(ROOT / f"pysal/data/photos/{name}.jpg", model)


def measure(model_name: str, photos: list[str]) -> None:
    """Measure what the results file does not hold yet."""
    model = load(model_name)
    path = results(model_name)
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for name, (method, cases) in itertools.product(photos, CASES.items()):
        for case in cases:
            about = {"photo": name, "method": method, **case}
            if any(about.items() <= row.items() for row in rows):
                continue
            rows += [{**about, **row} for row in errors(model, photo(name, model), method, case)]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
            print(about, flush=True)


def errors(model: Classifier, image: torch.Tensor, method: str, case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the relative l2 error of the map for every rule, placement and number of steps, and for every tolerance."""
    fast = pysal.prepare(model, image, batch_size=4)

    def explained(**options: Any) -> Any:
        return pysal.explain(fast, image, methods=[method], method_options={method: {**case, **options}})[method]

    truth = explained(quadrature="midpoint", placement="squared", steps=REFERENCE_STEPS).map.double()

    def error(found: Any) -> float:
        return round(float((found.map.double() - truth).norm() / truth.norm()), 5)

    for quadrature, placement, steps in RULES:
        found = explained(quadrature=quadrature, placement=placement, steps=steps)
        residual = round(float(found.details["residual"][0]), 4)
        about = {"quadrature": quadrature, "placement": placement, "steps": steps}
        yield {**about, "error": error(found), "residual": residual}
    found = explained(tolerance=TOLERANCE)
    estimate = round(float(found.details["error"][0]), 5)
    yield {
        "tolerance": TOLERANCE,
        "steps": int(found.details["steps"][0]),
        "error": error(found),
        "estimate": estimate,
    }


def results(model_name: str) -> Path:
    """Return where the figures of a model are."""
    return RESULTS / f"path_error-{model_name}.json"


def tables() -> str:
    """Return the tables of the page."""
    parts = []
    for path in sorted(RESULTS.glob("path_error-*.json")):
        rows = json.loads(path.read_text())
        parts.append(f"## {path.stem.removeprefix('path_error-')}")
        for method, cases in CASES.items():
            for case in cases:
                chosen = [row for row in rows if {"method": method, **case}.items() <= row.items()]
                if chosen:
                    parts += [_table(method, case, chosen)]
    return "\n\n".join(parts)


def _table(method: str, case: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    photos = len({row["photo"] for row in rows})
    steps = sorted({row["steps"] for row in rows if "quadrature" in row})
    baseline = f", baseline {case['baseline']!r}" if case else ", max_sigma 50"
    lines = [
        f"### {method}{baseline}, {photos} photos",
        "",
        f"| rule | placement | {' | '.join(f'{count} steps' for count in steps)} | steps for 5 % | steps for 2 % |",
        f"|---|---|{'---|' * (len(steps) + 2)}",
    ]
    for quadrature, placement in [*OTHERS[:3], CONTENDERS[0], *OTHERS[3:], CONTENDERS[1]]:
        own = {"quadrature": quadrature, "placement": placement}
        cells, medians = [], {}
        for count in steps:
            found = [row["error"] for row in rows if {**own, "steps": count}.items() <= row.items()]
            if found:
                medians[count] = statistics.median(found)
            cells.append(f"{medians[count]:.3f} ({min(found):.3f}-{max(found):.3f})" if found else "")
        wanted = [f"{steps_for(medians, error):.0f}" for error in (0.05, 0.02)]
        lines.append(f"| {quadrature} | {placement} | {' | '.join(cells + wanted)} |")
    refined = [row for row in rows if "tolerance" in row]
    taken, reached = (statistics.median(row[key] for row in refined) for key in ("steps", "error"))
    worst = max(row["error"] for row in refined)
    lines += ["", f"`tolerance={TOLERANCE}`: median {taken:.0f} steps, error {reached:.3f}, at most {worst:.3f}."]
    return "\n".join(lines)


def steps_for(medians: dict[int, float], error: float) -> float:
    """Return the steps at which the median error is `error`, on straight lines through logarithms."""
    pairs = list(itertools.pairwise(sorted(medians)))
    fewer, more = next((pair for pair in pairs if medians[pair[1]] <= error), pairs[-1])
    slope = math.log(medians[more] / medians[fewer]) / math.log(more / fewer)
    return fewer * (error / medians[fewer]) ** (1 / slope)


def write_page(page: Path = PAGE) -> None:
    """Write the tables into the page, between its markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--photos", type=int, default=len(PHOTOS))
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if not arguments.page:
        measure(arguments.model, PHOTOS[: arguments.photos])
    write_page()
