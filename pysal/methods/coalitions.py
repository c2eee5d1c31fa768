"""Scores of images of which some segments are there and the others are not: the games that their segments play."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal import ops
from pysal._checks import refuse
from pysal.engine.boxes.groups import group_rows
from pysal.engine.boxes.incremental import Incremental
from pysal.engine.boxes.queue import BoxQueue
from pysal.engine.boxes.reach import Integers
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.fills import Fill, resolve_fill
from pysal.engine.request.patch_tokens import DROP, PatchTokens, patch_tokens
from pysal.engine.request.plan import Plan
from pysal.methods.regions import boxes_of, patches_of, regions_of
from pysal.segments import Boxes, Labels, Segments


class Coalitions:
    """The segments of a plan's images, and the score of any set of them; a set has bit s for segment s.

    A segment that is not in a set is filled. With `fill="drop"` the patches that leave-one-out leaves out with it are left out.

    A prepared model recomputes only what a set reaches of the photo, or of the fill, whichever it is nearer to: the activations
    of both are kept, of one image at a time (engine.boxes).

    Args:
        plan: of the images.
        segments: which must not overlap.
        fill: see `leave_one_out`.

    Attributes:
        labels: (B, H, W), int32; -1 where no segment is, which stays in all sets.
        counts: how many segments each image has.
        passes: how many have been made for an image, in the mean, beside the one on the photo.

    Raises:
        TypeError: segments or a fill of the wrong type.
        ValueError: segments overlap; an unknown fill, or "drop" for a model without patches to leave out.
    """

    def __init__(self, plan: Plan, segments: Segments, fill: Fill) -> None:
        regions = _without_overlaps(plan, regions_of(plan, segments))
        self._plan, self._regions = plan, regions
        self.labels, self.counts, self.passes = regions.labels, regions.counts, 0.0
        self._most = max(regions.counts)
        self._places = torch.where(regions.labels < 0, self._most, regions.labels).long()  # of each pixel in `_bits`
        self._clean: Tensor | None = None
        self._tokens: PatchTokens | None = None
        if isinstance(fill, str) and fill == DROP:
            self._tokens = patch_tokens(plan, "fill")
            self._left_out = patches_of(self._tokens, plan, regions)
        else:
            self._fills = resolve_fill(plan, "fill", fill, also=(DROP,))

    def check(self, sets: Sequence[Iterable[int]]) -> None:
        """Refuse sets, some of each image, of which the model would see no patch, if it needs one.

        Raises:
            ValueError: there is one.
        """
        tokens = self._tokens
        if tokens is None or tokens.allows_none:
            return
        for image, own in enumerate(sets):
            left_out = self._left_out[image].cpu()
            for one in own:
                gone = [segment for segment in range(self.counts[image]) if not one >> segment & 1]
                if bool(left_out[gone].any(0).all()):
                    requirement = f"leave a patch in all sets of them with fill={DROP!r}, as this model has no answer to none"
                    refuse(self._plan.where, "segments", requirement, f"{len(gone)} of image {image} that cover all patches")

    def clean(self) -> Tensor:
        """Return the score (B,) of the whole images."""
        plan = self._plan
        if self._clean is None:
            if self._tokens is None or plan.layered_model is plan.model:
                self._clean = plan.clean_scores_without_gradients()[0]
            else:  # as the model's own layers tell them
                self._clean = plan.scores_of(plan.inputs, plan.layered_model)[0]
        return self._clean

    def scores(self, sets: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
        """Return the score of each set of segments of each image; that of all segments is the photo's."""
        plan = self._plan
        if self._tokens is None:
            plan.expect_forwards(sum(map(len, sets)))
        clean = self.clean()
        found = [np.full(len(own), float(score)) for own, score in zip(sets, clean.tolist(), strict=True)]
        whole = [(1 << count) - 1 for count in self.counts]
        queue = [(image, place) for image, own in enumerate(sets) for place, one in enumerate(own) if one != whole[image]]
        if not queue:
            return found
        engine = self._engine()
        together = self._tokens is None and engine is None and plan.company == "whole" and plan.images > 1
        if together:  # a set of each image in every pass; images with fewer repeat one, those with none are whole
            turns = [[place for image, place in queue if image == number] or [-1] for number in range(plan.images)]
            rounds = max(map(len, turns))
            queue = [(image, turns[image][turn % len(turns[image])]) for turn in range(rounds) for image in range(plan.images)]
        rows = torch.tensor([image for image, _ in queue], device=plan.device)
        there = _bits([whole[image] if place < 0 else sets[image][place] for image, place in queue], self._most)
        scores = torch.zeros(len(queue), dtype=clean.dtype, device=plan.device)
        if self._tokens is not None:
            self._without_tokens(self._tokens, rows, there, scores)
        elif engine is not None:
            self._in_boxes(engine, rows, there, scores)
        else:
            self._whole(rows, there, scores)
        self.passes += len(queue) / plan.images
        for (image, place), score in zip(queue, scores.cpu().double().tolist(), strict=True):
            if place >= 0:
                found[image][place] = score
        return found

    def on_pixels(self, values: Sequence[NDArray[np.float64]]) -> Tensor:
        """Return values of the segments of each image at their pixels, (B, 1, H, W); 0 where no segment is."""
        plan = self._plan
        table = torch.zeros(plan.images, 1, self._most, dtype=torch.float64, device="cpu")
        for row, one in zip(table, values, strict=True):
            row[0, : len(one)] = torch.from_numpy(one)
        scores = table.to(device=plan.device, dtype=plan.accumulator_dtype)
        return ops.occlusion_masks_map(scores, self.labels).to(plan.dtype)

    def _pictures(self, rows: Tensor, there: Tensor) -> Tensor:
        """Return images (n, C, H, W) of which the segments `there` (n, F + 1) are to be seen."""
        plan = self._plan
        kept = there.gather(1, self._places[rows].flatten(1)).unflatten(1, plan.inputs.shape[2:])[:, None]
        return plan.laid_out(torch.where(kept, plan.inputs[rows], self._fills[rows]))

    def _whole(self, rows: Tensor, there: Tensor, scores: Tensor) -> None:
        """Score whole images."""
        there = there.to(self._plan.device)

        def body(start: int, stop: int) -> None:
            own = rows[start:stop]
            scores[start:stop] = self._plan.scores(self._pictures(own, there[start:stop]), own)[0]

        self._plan.run(len(rows), body)

    def _without_tokens(self, tokens: PatchTokens, rows: Tensor, there: Tensor, scores: Tensor) -> None:
        """Score images without the tokens of what is not there; rows of as many tokens run together."""
        plan, images = self._plan, rows.tolist()
        absent, left_out = ~there[:, :-1], self._left_out.cpu()
        kept = torch.stack([~(left_out[image] & own[:, None]).any(0) for image, own in zip(images, absent, strict=True)])
        numbers = kept.sum(1)
        order = numbers.argsort(stable=True)
        ends = (1 + numbers[order].diff().nonzero()[:, 0]).tolist()
        kept, order = kept[order].to(plan.device), order.to(plan.device)

        def body(start: int, stop: int) -> None:
            places = order[start:stop]
            own = rows[places]
            scores[places] = plan.scores(plan.inputs[own], own, tokens.keeping(kept[start:stop]))[0]

        plan.run(len(order), body, ends=ends)

    def _engine(self) -> Incremental | None:
        """Return what recomputes only what a set reaches, None where the model runs whole images.

        Raises:
            ValueError: images depend on each other, and may not run as whole batches.
        """
        plan = self._plan
        if not isinstance(plan.model, PreparedModel) or plan.extra_inputs or self._tokens is not None:
            return None
        engine = plan.model.incremental(plan.inputs)
        if engine is None:
            return None
        try:
            plan.check_independence()
        except ValueError:
            if plan.company != "whole":
                raise
            return None
        return engine

    def _in_boxes(self, engine: Incremental, rows: Tensor, there: Tensor, scores: Tensor) -> None:
        """Score images by what they change of the photo, or of the fill, the one of which a smaller box changes."""
        plan, on_host = self._plan, rows.cpu().numpy()
        chosen = there.numpy()
        numbers = [np.flatnonzero(on_host == image) for image in range(plan.images)]
        held = [boxes_of(self._regions, image) for image in range(plan.images)]
        ways = []  # boxes of what is absent and of what is there, of each image's sets
        for absent in (True, False):
            ways.append([_around(boxes, chosen[own, : len(boxes)] != absent) for own, boxes in zip(numbers, held, strict=True)])
        nearer = [_areas(a) <= np.where(_areas(b) > 0, _areas(b), np.inf) for a, b in zip(*ways, strict=True)]
        places = torch.zeros(plan.images, max(map(len, numbers)), dtype=torch.int64, device=plan.device)  # in the queue
        for image, own in enumerate(numbers):
            places[image, : len(own)] = torch.from_numpy(own).to(plan.device)
        there = there.to(plan.device)
        blank = torch.where(self.labels[:, None] >= 0, self._fills, plan.inputs)
        for from_photo, boxes in zip((True, False), ways, strict=True):
            queue = [(image, set) for image, photo in enumerate(nearer) for set in np.flatnonzero(photo == from_photo).tolist()]
            if not queue:
                continue
            base, other = (plan.inputs, blank) if from_photo else (blank, plan.inputs)

            def replaced(image: int, ids: Tensor, y: Tensor, x: Tensor, from_photo: bool = from_photo) -> Tensor:
                pixels = self._places[image][y, x]
                seen = there[places[image, ids]].gather(1, pixels.flatten(1)).view_as(pixels)
                return seen != from_photo

            most_rows = plan.asked_batch_size or group_rows(plan.device)
            in_boxes = BoxQueue(engine, base, other, boxes, replaced, most_rows)
            faster = plan.model.faster_whole if isinstance(plan.model, PreparedModel) else 1.0
            ordered = in_boxes.sort(torch.tensor(queue, device=plan.device), plan.rows_at_once, faster_whole=faster)

            def body(start: int, stop: int, in_boxes: BoxQueue = in_boxes, ordered: Tensor = ordered) -> None:
                images, ids = ordered[start:stop].unbind(1)
                where = places[images, ids]
                if in_boxes.follows(start):
                    image, patches, run_boxes = in_boxes.patches(start, ids)
                    scores[where] = plan.scores(patches, torch.full_like(ids, image), run_boxes)[0]
                else:
                    scores[where] = plan.scores(self._pictures(images, there[where]), images)[0]

            plan.run(len(ordered), body, batch_size=in_boxes.most_rows, ends=in_boxes.ends)
            self.passes += in_boxes.images_run / plan.images


def _bits(sets: Sequence[int], features: int) -> Tensor:
    """Return sets as (n, F + 1), the last of which, for pixels of no segment, is always there."""
    size = features // 8 + 1
    packed = np.frombuffer(b"".join(one.to_bytes(size, "little") for one in sets), np.uint8).reshape(len(sets), size)
    found = np.unpackbits(packed, axis=1, count=features + 1, bitorder="little").astype(bool)
    found[:, features] = True
    return torch.from_numpy(found)


def _around(boxes: Integers, chosen: NDArray[np.bool_]) -> Integers:
    """Return the boxes (n, 4) around those of the segments (S, 4) that are chosen (n, S); empty ones for none."""
    some = chosen[:, :, None]
    low = np.where(some, boxes[:, :2], np.iinfo(np.int64).max).min(1)
    high = np.where(some, boxes[:, 2:], 0).max(1)
    return np.concatenate([np.minimum(low, high), high], 1)


def _areas(boxes: Integers) -> Integers:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _without_overlaps(plan: Plan, regions: Boxes | Labels) -> Labels:
    """Return segments as label maps.

    Raises:
        ValueError: boxes overlap.
    """
    if isinstance(regions, Labels):
        return regions
    covered = torch.full(plan.inputs.shape[2:], -1, dtype=torch.int32, device="cpu")
    for number, (top, left, bottom, right) in enumerate(regions.boxes.tolist()):
        box = covered[top:bottom, left:right]
        if bool((box >= 0).any()):
            refuse(plan.where, "segments", "not overlap", f"boxes {int(box.max())} and {number}, which do")
        box.fill_(number)
    labels = covered.to(plan.device).expand(plan.images, -1, -1).contiguous()
    return Labels(labels, (len(regions.boxes),) * plan.images)
