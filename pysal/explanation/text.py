"""An explanation in words and numbers: what a method has to say of an image, the table, and the same for a notebook."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pysal.engine.request.attribution import default_of
from pysal.engine.request.score import OUTPUTS, noun, saturation
from pysal.explanation.findings import Findings, MethodResult, counted, of_image, one_line, value_of
from pysal.methods.smooth_grad import smooth_grad
from pysal.methods.traits import BY_NAME, TRAITS

COLUMNS = ("method", "seconds", "passes", "residual", "largest drop", "notes")
# What SmoothGrad computes, and of which method, unless it is told otherwise.
KIND, BASE = default_of(smooth_grad, "kind"), default_of(smooth_grad, "base")
# A share of the change of the score that a map misses, from which on a reader is told what helps.
LARGE_RESIDUAL = 0.1
RIGHT = ("seconds", "passes", "residual", "largest drop")


def notes(found: Findings, result: MethodResult, image: int, number: Callable[[float], str]) -> dict[str, str]:
    """Return what a method has to say about one image by what it is about, the important first."""
    details = result.details
    said: dict[str, str] = {}
    for key, name in (("residual", "residual"), ("error", "map error"), ("approximation_error", "approximation error")):
        if (value := value_of(details.get(key), image)) is not None:
            said[key] = f"{name} {number(value)}"
    if (missing := _missing(result, image)) > LARGE_RESIDUAL:
        said["missing"] = f"{100 * missing:.0f} % of the change is missing: more steps, or tolerance="
    if why := zero(result, image):
        said["zero"] = why
    if "layer" in details:
        said["layer"] = f"layer {details['layer']}"
    kind, base = details.get("kind", KIND), details.get("base", BASE)
    if (kind, base) != (KIND, BASE):
        said["base"] = f"{kind} of {str(base).replace('_', ' ')}"
    if (samples := value_of(details.get("samples"), image)) is not None:
        said["samples"] = counted(round(samples), "sample")
    if "exact" in details and (shares := of_image(details.get("values"), image)) is not None:
        orders = round(value_of(details.get("order_pairs"), image) or 0)
        how = f"estimated by {counted(orders, 'pair')} of orders" if orders else "exact"
        said["values"] = f"{counted(len(shares), 'segment')}, {how}"
    if (pairs := of_image(details.get("pairs"), image)) is not None:
        several = of_image(details.get("single_drops"), image)
        of = "" if several is None else f" of {counted(len(several), 'segment')}"
        said["pairs"] = counted(len(pairs), "pair") + of
    if (drops := of_image(details.get("drops", details.get("gains")), image)) is not None:
        said["drops"] = counted(len(drops), "segment")
    if (steps := value_of(details.get("steps"), image)) is not None:
        said["steps"] = counted(round(steps), "step")
    before = None if found.probabilities is None else found.score_before(result, image)
    if before is not None and (saturated := saturation(found.kind_of(result), found.output, before)):
        said["saturation"] = saturated
    return said


def _missing(result: MethodResult, image: int) -> float:
    """Return the residual as a share of the change of the score that the map should add up to; 0 where there is none."""
    residual = value_of(result.details.get("residual"), image)
    if residual is None or not math.isfinite(residual):
        return 0.0
    change = float(result.map[image].double().sum()) - residual
    share = abs(residual / change) if change else 0.0
    return share if math.isfinite(share) else 0.0


def zero(result: MethodResult, image: int) -> str:
    """Return why a map is zero everywhere, "" where it is not."""
    if bool((result.map[image] != 0).any()):
        return ""
    native, moving = (of_image(result.details.get(key), image) for key in ("native", "moving"))
    if native is not None and moving is not None and not native.any():
        return "zero: all of it was negative, and is cut off" if bool(moving) else "zero: no gradient arrives at the layer"
    if "drops" in result.details or "gains" in result.details:
        return "zero: no segment changes the score"
    traits = TRAITS.get(result.name) or BY_NAME.get(result.name)
    if traits is None or native is not None or not (traits.slopes or traits.on_path):
        return "zero everywhere"
    return "zero: nothing to share, or no gradient" if traits.on_path else "zero: no gradient arrives"


def seconds(value: float) -> str:
    """Return a time in two digits or more, "0.0043", so that no method seems to take none."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def _largest_drop(found: Findings, result: MethodResult, image: int) -> str:
    from pysal import viz

    drops, before = of_image(result.details.get("drops"), image), found.score_before(result, image)
    if drops is None or before is None:
        return ""
    finite = drops[torch.isfinite(drops)]
    if not len(finite):
        return ""
    largest = float(finite.max())
    shown = viz.fall(before, largest, found.unit_of(found.kind_of(result)) == "probability")
    return shown or ("too small to show" if largest > 0 else "none lowers it")


def table(found: Findings) -> str:
    """Return the numbers as plain text: for each image its class and score, and a line per method."""
    lines = [headline(found)]
    for image in range(len(found.images)):
        cells_of = [COLUMNS, *rows(found, image)]
        widths = [max(len(row[column]) for row in cells_of) for column in range(len(COLUMNS))]
        lines += ["", f"image {image}: {verdict(found, image)}"]
        for row in cells_of:
            cells = [
                cell.rjust(width) if title in RIGHT else cell.ljust(width)
                for cell, width, title in zip(row, widths, COLUMNS, strict=True)
            ]
            lines.append("  " + "  ".join(cells).rstrip())
    lines += [f"{'' if index else chr(10)}left out: {said}" for index, said in enumerate(left_out(found))]
    return "\n".join(lines)


def left_out(found: Findings) -> list[str]:
    """Return why methods were left out, those that share a reason together."""
    reasons: dict[str, list[str]] = {}
    for name, why in found.skipped.items():
        reasons.setdefault(why.removeprefix(f"pysal.{name}: "), []).append(name)
    alone = {why: found.skipped[names[0]] for why, names in reasons.items() if len(names) == 1}
    return [f"{', '.join(names)}: {alone.get(why, why)}" for why, names in reasons.items()]


def headline(found: Findings) -> str:
    """Return one line about the whole call."""
    counts = f"{counted(len(found.images), 'image')}, {counted(len(found.results), 'method')}, {found.seconds:.3g} s"
    if found.output:
        counts += f", output taken for {OUTPUTS[found.output]}"
    return f"{one_line(found.model_name)}: {counts}" if found.model_name else counts


def verdict(found: Findings, image: int) -> str:
    """Return what an image was taken for, and its score."""
    from pysal import viz

    index = int(found.target[image])
    name = one_line(found.target_names[image])
    column = f"{noun(found.score_kind, found.output)} {index}"
    said = name if index < 0 or name == column else f"{name} ({column})"
    word = found.unit_of(found.score_kind)
    if word == "output":
        return f"{said} = {float(found.scores[image]):.4g}"
    if found.probabilities is not None:
        said += f", {viz.percent(float(found.probabilities[image]))}"
    if found.probabilities is None or word != "probability":
        said += f", {found.score_word(image)} {float(found.scores[image]):.4g}"
    return said


def rows(found: Findings, image: int) -> list[tuple[str, ...]]:
    """Return a row of `COLUMNS` for each method."""
    lines: list[tuple[str, ...]] = []
    for result in found.results.values():
        residual = value_of(result.details.get("residual"), image)
        about = notes(found, result, image, lambda x: f"{x:.3g}")
        said = [note for key, note in about.items() if key != "residual"]  # which has a column
        spread = result.details.get("standard_error")
        if isinstance(spread, Tensor) and not value_of(result.details.get("exact"), image):
            said.append(f"mean standard error {float(spread[image].cpu().double().mean()):.3g}")
        if broken := int((~torch.isfinite(result.map[image])).sum()):
            said.append(f"{counted(broken, 'value')} not finite")
        lines.append(
            (
                one_line(result.title),
                seconds(result.seconds),
                "" if result.passes is None else str(result.passes),
                "" if residual is None else f"{residual:.3g}",
                _largest_drop(found, result, image).replace("→", "->").replace("\N{MINUS SIGN}", "-"),
                one_line("; ".join(said)),
            )
        )
    return lines
