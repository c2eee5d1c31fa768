"""The report of an audit: one HTML file that needs no network, to be read, printed and passed on."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pysal import metrics
from pysal._checks import refuse
from pysal.audit import files, plots
from pysal.audit.results import Figure, Results
from pysal.audit.sheets import Sheets, finite
from pysal.audit.words import count, counted, moment, number, percent, settings, signed
from pysal.viz import palette

WHERE = "pysal.audit.report"

MOST_IMAGES = 24  # on one contact sheet, which keeps the file below some tens of megabytes
COMPARED = 64  # images whose maps are compared between methods
SHOWN_CLASSES, LISTED_CLASSES, LISTED_REASONS, LISTED_PATHS, LISTED_PAIRS = 25, 1000, 50, 5, 12


def report(out: str | Path, *, to: str | Path | None = None, images: int = 6) -> Path:
    """Write a report on an audit's finished shards, one HTML file, and return its path.

    The file holds everything: tables, plots as SVG, photos and overlays as JPEG of at most 208 pixels. Photos are read again
    from where they were. The report leaves out those that are gone, and says so.

    Args:
        out: the folder of the audit, finished or not.
        to: the file to write; None = report.html in that folder.
        images: number of photos on each contact sheet, 1 to 24.

    Raises:
        ValueError: the folder holds no audit or no finished shard; or `images` is outside 1 to 24.
        pysal.audit.DiskFault: the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if isinstance(images, bool) or not isinstance(images, int) or not 1 <= images <= MOST_IMAGES:
        refuse(WHERE, "images", f"be a whole number from 1 to {MOST_IMAGES}", repr(images))
    place = Path(out)
    results = Results(WHERE, place)
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "percent": percent, "number": number, "signed": signed, "moment": moment}
    page = environment.get_template("report.html.jinja").render(_Report(results, images).content())
    target = place / "report.html" if to is None else Path(to)
    files.write(target, page.encode())
    return target


class _Report:
    """Gathers what the template shows."""

    def __init__(self, results: Results, images: int) -> None:
        self.results = results
        self.sheets = Sheets(results, self.first, images)

    @property
    def first(self) -> Figure | None:
        """The figure that images are ranked by."""
        return self.results.figures[0] if self.results.figures else None

    def content(self) -> dict[str, Any]:
        """Return the template's variables."""
        results = self.results
        found: dict[str, Any] = {
            "manifest": results.manifest,
            "manifest_sha256": hashlib.sha256((results.out / "manifest.json").read_bytes()).hexdigest(),
            "facts": self._facts(),
            "figures": results.figures,
            "first": self.first,
            "methods": self._methods(),
            "plots": self._plots(),
            "classes": self._classes(),
            "pairs": self._pairs(),
            "wrong": self.sheets.wrong(),
            "sheets": self.sheets.best_and_worst(),
            "disputed": self.sheets.disputed(*self._matrix()) if self.first is not None and len(results.rows) > 1 else [],
            "agreement": self._agreement(),
            "errors": self._errors(),
            "faults": self._faults(),
            "stages": self._stages(),
            "style": (resources(__package__) / "report.css").read_text("utf-8"),
        }
        found["missing_photos"] = len(self.sheets.missing_photos)
        found["verdict"] = self._verdict(found["facts"], found["methods"])
        kinds = {method["signed"] for name, method in results.methods.items() if self.sheets.has_maps(name)}
        found["palettes"] = {
            "signed": _gradient(True) if True in kinds else "",
            "unsigned": _gradient(False) if False in kinds else "",
        }
        found["options"] = {name: settings(method["options"]) for name, method in results.methods.items()}
        return found

    def _verdict(self, facts: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what matters most, a sentence each."""
        found = ["The images have no labels, so nothing is said about right and wrong."]
        if facts["accuracy"] is not None:
            right, labelled = count(facts["right"]), count(facts["labelled"])
            found = [f"The model classified {right} of {labelled} labelled images right ({percent(facts['accuracy'])})."]
        if self.first is not None and len(table) > 1:
            best = [row for row in table if row["best"][0]]
            if len(best) == 1:
                value = number(best[0]["cells"][0]["middle"])
                found.append(f"By the median of {self.first.title.lower()}, {best[0]['title']} ranks highest ({value}).")
        if not facts["unreadable"] and not facts["faults"]:
            found.append("Every image could be explained.")
        if facts["unreadable"]:
            found.append(f"{counted(facts['unreadable'], 'image')} could not be explained.")
        if facts["faults"]:
            found.append(f"{counted(facts['faults'], 'result')} {'is' if facts['faults'] == 1 else 'are'} not finite.")
        return found

    # Tables ------------------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        results, images = self.results, self.results.images
        data = results.manifest["data"]
        label, predicted = images.columns["label"], images.columns["predicted"]
        known = np.isfinite(label) & np.isfinite(predicted)
        right = known & (label == predicted)
        sure = images.columns["predicted_probability"]
        return {
            "images": data["images"],
            "planned": results.planned,
            "explained": len(images.ids),
            "unreadable": results.planned - len(images.ids),
            "shards": len(results.shards),
            "of_shards": data["shards"],
            "complete": len(results.shards) == data["shards"],
            "labelled": int(known.sum()),
            "right": int(right.sum()),
            "accuracy": float(right.sum() / known.sum()) if known.any() else None,
            "sure": float(np.nanmedian(sure)) if np.isfinite(sure).any() else None,
            "faults": sum(fault is not None for rows in results.rows.values() for fault in rows.faults),
            "rows": sum(len(rows.ids) for rows in results.rows.values()),
            "by_label": bool(known.any()),
        }

    def _methods(self) -> list[dict[str, Any]]:
        results = self.results
        wins = self._wins()
        table = []
        for name, rows in results.rows.items():
            cells = []
            for figure in results.figures:
                values = finite(rows.columns[figure.name])
                cells.append(dict(zip(("low", "middle", "high"), np.percentile(values, [25, 50, 75]).tolist(), strict=True))
                             if len(values) else None)  # fmt: skip
            residual = finite(np.abs(rows.columns["residual"]))
            table.append(
                {
                    "name": name,
                    "title": results.methods[name]["title"],
                    "images": len(rows.ids),
                    "cells": cells,
                    "wins": wins.get(name),
                    "residual": float(np.median(residual)) if len(residual) else None,
                    "best": [False] * len(cells),
                }
            )
        for column, figure in enumerate(results.figures):
            known = [figure.sign * row["cells"][column]["middle"] for row in table if row["cells"][column]]
            for row in table:
                cell = row["cells"][column]
                row["best"][column] = bool(cell) and len(table) > 1 and figure.sign * cell["middle"] == max(known)
        return table

    def _matrix(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the images (N,) of which every method has the first figure, and the figures (N, M), more is better."""
        assert self.first is not None
        ids: np.ndarray[Any, Any] = self.results.images.ids
        columns = []
        for rows in self.results.rows.values():
            column = np.full(len(ids), np.nan)
            _, here, there = np.intersect1d(ids, rows.ids, assume_unique=True, return_indices=True)
            column[here] = self.first.sign * rows.columns[self.first.name][there]
            columns.append(column)
        values = np.stack(columns, 1)
        whole = np.isfinite(values).all(1)
        return ids[whole], values[whole]

    def _wins(self) -> dict[str, float]:
        """Return the share of images on which each method is the best; methods that are equal share an image."""
        if self.first is None or len(self.results.rows) < 2:
            return {}
        _, values = self._matrix()
        if not len(values):
            return {}
        best = values == values.max(1, keepdims=True)
        shares = (best / best.sum(1, keepdims=True)).mean(0)
        return dict(zip(self.results.rows, shares.tolist(), strict=True))

    def _plots(self) -> list[dict[str, str]]:
        results = self.results
        found = []
        for figure in results.figures:
            values = {results.methods[name]["title"]: rows.columns[figure.name] for name, rows in results.rows.items()}
            arrow = f"{figure.title} ({figure.better} is better)"
            svg = plots.distributions(values, arrow)
            if svg:
                found.append({"title": figure.title, "summary": figure.summary, "better": figure.better, "svg": svg})
        images = self.results.images
        label, predicted = images.columns["label"], images.columns["predicted"]
        known = np.isfinite(label) & np.isfinite(predicted)
        if known.any():
            sure = images.columns["predicted_probability"]
            svg = plots.confidences(sure[known & (label == predicted)], sure[known & (label != predicted)])
            found.append({"title": "How sure the model is", "summary": "where it is right, and where it is wrong",
                          "better": "", "svg": svg})  # fmt: skip
        return found

    def _classes(self) -> dict[str, Any]:
        """Return the images by class: by label where there are labels, else by prediction."""
        results, images = self.results, self.results.images
        by_label = bool(np.isfinite(images.columns["label"]).any())
        key = images.columns["label" if by_label else "predicted"]
        predicted, sure = images.columns["predicted"], images.columns["probability"]
        groups = _groups(key)
        rows: dict[float, dict[str, Any]] = {}
        for index, members in groups.items():
            right = predicted[members] == index
            rows[index] = {
                "name": results.class_name(index),
                "images": len(members),
                "right": float(right.mean()) if by_label else None,
                "probability": float(np.nanmedian(sure[members])) if np.isfinite(sure[members]).any() else None,
                "cells": [],
            }
        if self.first is not None:
            for method in results.rows.values():
                own = key[np.searchsorted(images.ids, method.ids)] if len(method.ids) else np.empty(0)
                places = _groups(own)
                for index, row in rows.items():
                    values = finite(method.columns[self.first.name][places.get(index, np.empty(0, np.int64))])
                    row["cells"].append(float(np.median(values)) if len(values) else None)
        if by_label:  # what needs attention comes first
            ordered = sorted(rows.values(), key=lambda row: (row["right"], -row["images"], row["name"]))
        else:
            ordered = sorted(rows.values(), key=lambda row: (-row["images"], row["name"]))
        return {
            "by_label": by_label,
            "rows": ordered[:SHOWN_CLASSES],
            "more": ordered[SHOWN_CLASSES:LISTED_CLASSES],
            "all": len(ordered),
        }

    def _pairs(self) -> list[dict[str, Any]]:
        """Return which classes were taken for which others, the most frequent first."""
        columns = self.results.images.columns
        label, predicted = columns["label"], columns["predicted"]
        wrong = np.isfinite(label) & np.isfinite(predicted) & (label != predicted)
        pairs = Counter(zip(label[wrong].tolist(), predicted[wrong].tolist(), strict=True))
        name = self.results.class_name
        return [{"label": name(a), "predicted": name(b), "images": n} for (a, b), n in pairs.most_common(LISTED_PAIRS)]

    def _errors(self) -> dict[str, Any]:
        table = self.results.table("errors")
        paths: dict[str, list[tuple[str, str | None]]] = {}
        for row in table.select(["reason", "path", "detail"]).to_pylist():
            paths.setdefault(row["reason"], []).append((row["path"], row["detail"]))
        reasons = sorted(paths.items(), key=lambda item: (-len(item[1]), item[0]))
        rows = [{"reason": reason, "images": len(own), "paths": own[:LISTED_PATHS]} for reason, own in reasons]
        return {"rows": rows[:LISTED_REASONS], "reasons": len(rows), "images": len(table)}

    def _faults(self) -> list[dict[str, Any]]:
        found: dict[tuple[str, str], list[int]] = {}
        for method, rows in self.results.rows.items():
            for image, fault in zip(rows.ids.tolist(), rows.faults, strict=True):
                if fault is not None:
                    found.setdefault((method, fault), []).append(image)
        return [
            {
                "method": self.results.methods[method]["title"],
                "fault": fault,
                "images": len(own),
                "paths": [self.results.path(image) for image in own[:LISTED_PATHS]],
            }
            for (method, fault), own in sorted(found.items())
        ]

    def _stages(self) -> list[dict[str, Any]]:
        table = self.results.table("timings").select(["stage", "images", "cpu_seconds"]).to_pylist()
        sums: dict[str, list[float]] = {}
        for row in table:
            own = sums.setdefault(row["stage"], [0.0, 0.0])
            own[0] += row["images"] or 0
            own[1] += row["cpu_seconds"] or 0.0
        total = sum(seconds for _, seconds in sums.values())
        return [
            {
                "stage": self._stage(stage),
                "images": int(images),
                "seconds": seconds,
                "each": 1000 * seconds / images if images else None,
                "share": seconds / total if total else 0.0,
            }
            for stage, (images, seconds) in sorted(sums.items(), key=lambda item: -item[1][1])
        ]

    def _stage(self, stage: str) -> str:
        names = {"read": "Reading images", "model": "The pass all methods share", "encode": "Writing"}
        if stage.startswith("metric:"):
            metric = metrics.METRICS.get(stage.removeprefix("metric:"))
            return metric.title if metric else stage
        return names.get(stage) or self.results.methods.get(stage, {}).get("title", stage)

    def _agreement(self) -> dict[str, Any] | None:
        """Return how alike methods rank pixels: the mean over images spread evenly over the audit."""
        results = self.results
        names = [name for name in results.rows if self.sheets.has_maps(name)]
        if len(names) < 2:
            return None
        ids = results.images.ids
        chosen = ids[np.unique(np.linspace(0, len(ids) - 1, min(COMPARED, len(ids))).astype(np.int64))].tolist()
        maps = {name: results.maps(name, chosen) for name in names}
        common = [image for image in chosen if all(image in own for own in maps.values())]
        if not common:
            return None
        stacked = {name: torch.stack([own[image] for image in common])[:, None] for name, own in maps.items()}
        found = metrics.agreement(stacked, absolute=True).numpy()
        usable = np.isfinite(found)
        mean = np.where(usable, found, 0.0).sum(0) / np.maximum(usable.sum(0), 1)
        rows = [[float(cell) if n else None for cell, n in zip(line, counts, strict=True)]
                for line, counts in zip(mean, usable.sum(0), strict=True)]  # fmt: skip
        return {"titles": [results.methods[name]["title"] for name in names], "rows": rows, "images": len(common)}


def _groups(key: np.ndarray[Any, Any]) -> dict[float, np.ndarray[Any, Any]]:
    """Return the places of each finite value."""
    places = np.flatnonzero(np.isfinite(key))
    ordered = places[np.argsort(key[places], kind="stable")]
    values, starts = np.unique(key[ordered], return_index=True)
    return dict(zip(values.tolist(), np.split(ordered, starts[1:]), strict=True)) if len(values) else {}


def _gradient(signed_map: bool) -> str:
    """Return the colours of maps as the stops of a CSS gradient."""
    colours = (palette(signed_map)[:: 510 // 10] * 255).round().astype(int).tolist()
    return ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colours)
