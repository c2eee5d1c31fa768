"""What an audit has found so far, read from its folder: figures by column, maps of chosen images, photos."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pysal import ops
from pysal._checks import first_line, refuse
from pysal.audit import files
from pysal.audit import manifest as manifests
from pysal.audit.data import IMAGES, Item, Unreadable, decode, read_bytes
from pysal.methods.traits import stores_drops
from pysal.metrics import METRICS
from pysal.models import Classifier

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A number that says how good a map is: a column of the shards, or the difference of two.

    Attributes:
        name: the column, or "insertion_minus_deletion".
        title: for people.
        better: "lower" or "higher".
        summary: what it measures, in a line.
    """

    name: str
    title: str
    better: str
    summary: str

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.better == "higher" else -1


DIFFERENCE = Figure(
    "insertion_minus_deletion",
    "Insertion \N{MINUS SIGN} deletion",
    "higher",
    "insertion less deletion, image by image, so that how sure the model is of an image cancels in part",
)


@dataclass(frozen=True)
class MethodRows:
    """The rows of one method, in the order of ids.

    Attributes:
        ids: (N,) of the images.
        columns: name -> (N,) float64, NaN where there is nothing.
        faults: (N,) what was not finite, or None.
    """

    ids: NDArray[np.int64]
    columns: Mapping[str, Numbers]
    faults: Sequence[str | None]


class Results:
    """The finished shards of an audit's folder.

    Args:
        where: the public name that was called, for errors.
        out: the folder.

    Raises:
        ValueError: it is no audit's folder, or no shard of it is finished.
    """

    def __init__(self, where: str, out: Path) -> None:
        self.out, self._where = out, where
        self.manifest = manifests.read(where, out)
        self.shards = sorted(files.finished(out))
        if not self.shards:
            refuse(where, "out", "hold at least one finished shard", f"{out} (none of {self.manifest['data']['shards']})")
        self.methods: dict[str, dict[str, Any]] = self.manifest["methods"]
        self._data = ds.dataset([self._path("shards", shard) for shard in self.shards], format="parquet")

    def _path(self, folder: str, shard: int) -> str:
        return str(files.shard_path(self.out, folder, shard))

    @cached_property
    def listed(self) -> pa.Table:
        """All images of the audit, row n with id n."""
        try:
            return pq.read_table(self.out / "plan.parquet", schema=IMAGES)
        except (OSError, pa.ArrowException) as error:
            refuse(
                self._where,
                "out",
                "have a readable plan.parquet (pysal audit resume writes a lost one)",
                f"{self.out} ({first_line(error)})",
            )

    @cached_property
    def planned(self) -> int:
        """How many images are in the finished shards."""
        size = self.manifest["data"]["shard_size"]
        return sum(min(size, len(self.listed) - shard * size) for shard in self.shards)

    @cached_property
    def figures(self) -> list[Figure]:
        """The figures that were computed, and the difference of insertion and deletion where both were."""
        found = []
        for name in self.manifest["metrics"]:
            metric = METRICS.get(name)
            title, better, summary = (metric.title, metric.better, metric.summary) if metric else (name, "higher", "")
            found.append(Figure(name, title, better, summary))
        if {"insertion", "deletion"} <= set(self.manifest["metrics"]):
            return [DIFFERENCE, *found]
        return found

    @cached_property
    def rows(self) -> dict[str, MethodRows]:
        """The rows of each method."""
        names = ["predicted", "predicted_probability", "target", "probability", "score", "residual", "label"]
        names += self.manifest["metrics"]
        return {method: self._rows(method, names) for method in self.methods}

    def _rows(self, method: str, names: Sequence[str]) -> MethodRows:
        # one method at a time: the others' row groups are not read, and a million images stay below a gigabyte
        table = self._data.to_table(columns=["id", "fault", *names], filter=ds.field("method") == method).sort_by("id")
        columns = {name: table[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in names}
        if {"insertion", "deletion"} <= set(names):
            columns[DIFFERENCE.name] = columns["insertion"] - columns["deletion"]
        return MethodRows(table["id"].to_numpy(), columns, table["fault"].to_pylist())

    @cached_property
    def images(self) -> MethodRows:
        """What the model says of each image: the rows of the first method, which all methods share."""
        return next(iter(self.rows.values()))

    def table(self, folder: str) -> pa.Table:
        """Return the finished shards' files in "errors" or "timings" as one table."""
        return pa.concat_tables([pq.read_table(self._path(folder, shard)) for shard in self.shards])

    def path(self, image: int) -> str:
        """Return the path of an image."""
        return str(self.listed["path"][image].as_py())

    def class_name(self, index: float) -> str:
        """Return the name of a class, or its number."""
        if not np.isfinite(index):
            return "unknown"
        names = self.manifest["model"]["class_names"]
        return str(names[int(index)]) if names and int(index) < len(names) else f"class {int(index)}"

    def maps(self, method: str, images: Iterable[int]) -> dict[int, Tensor]:
        """Return the maps (H, W) of chosen images at the images' size, those that were kept."""
        wanted = sorted(set(images))
        names = set(self._data.schema.names)
        size = tuple(self.manifest["model"]["input_size"])
        if stores_drops(method):
            columns = ["drops", *(["segments"] if "segments" in names else [])]
            if self.manifest["boxes"] is None and "segments" not in names:
                return {}
        else:
            columns = [f"map_{method}", "map_scale"]
            if columns[0] not in names:
                return {}
        shard_size = self.manifest["data"]["shard_size"]
        holders = sorted({image // shard_size for image in wanted} & set(self.shards))
        if not holders:
            return {}
        chosen = ds.dataset([self._path("shards", shard) for shard in holders], format="parquet")
        keep = (ds.field("method") == method) & ds.field("id").isin(wanted)
        table = chosen.to_table(columns=["id", *columns], filter=keep)
        table = table.filter(pc.is_valid(table[columns[0]]))
        found: dict[int, Tensor] = {}
        for row, image in enumerate(table["id"].to_pylist()):
            if stores_drops(method):
                found[image] = self._drops(table, row, size)
            else:
                values = table[columns[0]][row].as_py()
                shape = table.schema.field(columns[0]).type.shape
                map = (
                    torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 1, *shape) * table["map_scale"][row].as_py()
                )
                if tuple(shape) != size:
                    map = torch.nn.functional.interpolate(map, size, mode="bilinear", align_corners=False)
                found[image] = map[0, 0]
        return found

    def _drops(self, table: pa.Table, row: int, size: tuple[int, ...]) -> Tensor:
        drops = torch.tensor(table["drops"][row].as_py(), dtype=torch.float32, device="cpu").view(1, 1, -1)
        if self.manifest["boxes"] is not None:
            return ops.occlusion_masks_boxes_map(drops, torch.tensor(self.manifest["boxes"], device="cpu"), *size)[0, 0]
        labels = torch.tensor(table["segments"][row].as_py(), dtype=torch.int32, device="cpu").view(1, *size)
        return ops.occlusion_masks_map(drops, labels)[0, 0]

    @cached_property
    def _crops(self) -> Classifier | None:
        """What crops photos as the audit's model did, without the model; None where it was told their size alone."""
        about = self.manifest["model"]
        if about["class_names"] is None:
            return None
        return Classifier(
            nn.Identity(),
            name=about["name"],
            class_names=about["class_names"],
            input_size=tuple(about["input_size"]),
            crop_fraction=about["crop_fraction"],
            resample=about["resample"],
        )

    def photo(self, image: int) -> Tensor | None:
        """Return an image (3, H, W) as the model saw it, or None where its file is not there any more."""
        row = {name: self.listed[name][image].as_py() for name in Item._fields}
        try:
            content = read_bytes(Path(self.manifest["data"]["root"]), Item(**row))
            about = self.manifest["model"]
            seen = decode(content, self._crops, tuple(about["input_size"]), about["channels"])[0]
            # of grey images and of many bands their mean is shown
            return seen if len(seen) == 3 else seen.mean(0, keepdim=True).expand(3, -1, -1)
        except Unreadable:
            return None
