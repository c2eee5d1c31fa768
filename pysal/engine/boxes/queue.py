"""The queue of leave-one-out where a model recomputes only what a segment reaches: its order, and its rows as patches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal import ops
from pysal.engine.boxes.groups import Geometry, group_numbers
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.boxes.reach import Integers, Truths
from pysal.engine.boxes.run import CleanMaps
from pysal.engine.running.chunks import to_device


class Keeping:
    """Runs an image whole, and keeps its activations for the queue of what changes it.

    Args:
        engine: runs images that differ from one image inside boxes.
    """

    def __init__(self, engine: Incremental) -> None:
        self._engine = engine
        self._kept: CleanMaps | None = None

    def __call__(self, image: Tensor) -> Any:
        """Return the model's output for an image (1, C, H, W)."""
        self._kept = None  # before the next, so that two are never held
        self._kept = self._engine.keep(image)
        return self._kept.output

    def take(self) -> CleanMaps | None:
        """Return the activations of the last image, None where there was none, and hold them no longer."""
        kept, self._kept = self._kept, None
        return kept


class BoxQueue:
    """Segments of images, each of which is replaced by its fill, in groups that run together.

    Args:
        engine: runs images that differ from one image inside boxes.
        images: (B, C, H, W).
        fills: (B, C, H, W), what a segment is replaced by.
        boxes: for each image (S, 4), the boxes that hold its segments.
        hidden: says of pixels whether they are in their segment: (image, ids (n,), y (n, h, 1), x (n, 1, w)) -> (n, h, w).
        most_rows: most rows in one group.
        kept: the activations of the first image, where somebody has them.

    Attributes:
        ends: where what runs together in the sorted queue begins: a group, or several whose last layers run together.
        approximate: (N,), which rows of the sorted queue get approximate scores.
        images_run: how many images have been run for their activations.
    """

    def __init__(
        self,
        engine: Incremental,
        images: Tensor,
        fills: Tensor,
        boxes: Sequence[Integers],
        hidden: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        most_rows: int,
        kept: CleanMaps | None = None,
    ) -> None:
        self._engine, self._images, self._fills, self._boxes, self._hidden = engine, images, fills, boxes, hidden
        self.most_rows = most_rows
        self.ends: list[int] = []
        self.approximate = torch.empty(0, dtype=torch.bool, device="cpu")
        self.images_run = 0
        self._starts: list[int] = []  # of groups
        self._sorted = np.empty((0, 2), dtype=np.int64)
        self._whole: set[int] = set()  # groups that run as whole images, by where they begin
        self._clean = kept
        self._image = -1 if kept is None else 0

    def sort(self, queue: Tensor, whole_rows: int, share: float | None = None, faster_whole: float = 1.0) -> Tensor:
        """Return the queue in groups that run together, image after image.

        From now on boxes grow to a share of each map's side at most, or without bounds for None.

        Args:
            queue: (N, 2), images and segments.
            whole_rows: most rows in a group that runs as whole images.
            share: see `Incremental.limited`.
            faster_whole: how many times as fast whole images run as this graph does.
        """
        self._engine = self._engine.limited(share, faster_whole)
        self.ends, self._starts, self._whole = [], [], set()
        together = min(self.most_rows, self._engine.most_together)
        on_host = queue.cpu().numpy()
        sorted_rows: list[NDArray[np.int64]] = []
        approximate: list[Truths] = []
        known: dict[bytes, tuple[list[tuple[Integers, bool]], Truths]] = {}
        done = 0
        for image in range(len(self._images)):
            own = on_host[on_host[:, 0] == image]
            if not len(own):
                continue
            boxes = self._boxes[image][own[:, 1]]
            key = boxes.tobytes()
            if key not in known:
                groups = self._engine.groups
                known = {
                    key: (groups.batches(boxes, self.most_rows, group_numbers(self._images.device)), groups.approximates(boxes))
                }
            batches, limited = known[key]
            open_until = -1  # up to where more groups join the one before
            for group, pays in batches:
                pieces = [group] if pays else np.array_split(group, math.ceil(len(group) / whole_rows))
                for piece in pieces:
                    self._starts.append(done)
                    if not pays or done + len(piece) > open_until:
                        self.ends.append(done)
                        open_until = done + together if pays else -1
                    if not pays:
                        self._whole.add(done)
                    sorted_rows.append(own[piece])
                    approximate.append(limited[piece])
                    done += len(piece)
        if not sorted_rows:
            self.approximate = torch.zeros(len(queue), dtype=torch.bool, device="cpu")
            return queue
        self.approximate = torch.from_numpy(np.concatenate(approximate)).to(queue.device)
        self._sorted = np.concatenate(sorted_rows)
        return to_device(self._sorted, queue.device)

    def follows(self, start: int) -> bool:
        """Say whether the row at `start` is in a group that runs in boxes."""
        return self.ends[np.searchsorted(self.ends, start, side="right") - 1] not in self._whole

    def patches(self, start: int, ids: Tensor) -> tuple[int, Tensor, Callable[[Tensor], Tensor]]:
        """Return rows of the sorted queue as patches.

        Args:
            start: the first row, of a group that runs in boxes.
            ids: (n,), the segments of the rows, all of one image, up to the next of `ends` at most.

        Returns:
            The image, the patches (n, C, h, w) and the model, which takes patches for the images they are of. Where several
            groups run together, the model has their patches, and what it is given only stands for them.
        """
        rows = self._sorted[start : start + len(ids)]  # on the host, where nobody has to wait for a GPU
        image = int(rows[0, 0])
        inner = [at - start for at in self._starts if start < at < start + len(ids)]
        parts = list(zip(np.split(rows, inner), ids.tensor_split(inner), strict=True))
        if len(parts) == 1:
            patches, geometry = self._group(image, *parts[0])
            return image, patches, lambda batch: self._engine.run(self._clean_of(image), batch, geometry)
        stand_ins = self._images[image : image + 1].expand(len(ids), -1, -1, -1)  # each group has patches of its own size

        def run(_batch: Tensor) -> Tensor:
            return self._engine.run_groups(self._clean_of(image), (self._group(image, *part) for part in parts))

        return image, stand_ins, run

    def _group(self, image: int, rows: Integers, ids: Tensor) -> tuple[Tensor, Geometry]:
        """Return the patches of a group, and where they lie."""
        geometry = self._engine.groups.geometry(self._boxes[image][rows[:, 1]], self._images.device)
        origins = geometry.on_device[0, 0]
        height, width = (int(size) for size in geometry.sizes[0])
        nothing = self._images.new_empty(len(ids), self._images.shape[1], 0, 0)
        own = slice(image, image + 1)
        clean, fill = (
            ops.box_regions(images[own], nothing, origins, origins, height, width) for images in (self._images, self._fills)
        )
        y = origins[:, :1].long()[:, :, None] + torch.arange(height, device=ids.device)[:, None]
        x = origins[:, 1:].long()[:, :, None] + torch.arange(width, device=ids.device)
        hidden = self._hidden(image, ids, y, x)
        return torch.where(hidden[:, None], fill, clean).contiguous(memory_format=torch.channels_last), geometry

    def _clean_of(self, image: int) -> CleanMaps:
        if self._image != image or self._clean is None:
            self._clean = None  # before the next, so that two are never held
            self._clean, self._image = self._engine.keep(self._images[image : image + 1]), image
            self.images_run += 1
        return self._clean
