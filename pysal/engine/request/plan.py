"""What all methods share: a request that says its clean scores, scores changed images, and makes sweeps."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysal._checks import warn
from pysal._library import without_autocast
from pysal.engine.layers.default_layer import Look
from pysal.engine.layers.features import Layer
from pysal.engine.model.gradient_layouts import lay_out
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.model.relu_rules import ReluRules
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.extra_inputs import ordinary
from pysal.engine.request.graphs import check_graph, gradients_with_graph, layer_gradients_with_graph
from pysal.engine.request.passes import Passes
from pysal.engine.request.request import Model
from pysal.engine.request.score import FOUND_OUT, Output, ScoreKind
from pysal.engine.request.sweeps import PLAIN, Found, Sweep, Swept, sweep
from pysal.engine.running.states import restoring

__all__ = ["Clean", "Model", "Plan"]


@dataclass(frozen=True)
class Clean:
    """What the model says of the unchanged images: class scores (B, K) or, for a callable target, its scores (B,)."""

    table: Tensor | None
    scores: Tensor | None


class Plan(Passes):
    """A request as a method gets it: everything was checked, and what is found out of the images is found out once.

    Args: see `Request`.

    Attributes:
        keeps_graph: whether gradients carry autograd's graph.
    """

    keeps_graph = False

    def connected(self, inputs: Tensor) -> "Plan":
        """Return a plan of the same images whose gradients carry autograd's graph, to the weights and to `inputs`.

        Raises:
            NotApplicable: the model keeps no graph.
            ValueError: the arithmetic does not.
        """
        check_graph(self)
        derived = self.derive(ordinary(inputs), torch.arange(self.images, device=self.device))
        derived.keeps_graph = True
        return derived

    def clean(self, announced: Sequence[tuple[ScoreKind, Sweep]] = (), model: Model | None = None) -> Clean:
        """Return the scores of the unchanged images; the first call runs the model once per image and fixes the target.

        Args:
            announced: sweeps that methods will ask for under a kind of score. Those of the first kind are made of that pass.
            model: answers as the plan's own, and runs instead of it if nothing else is made of that pass.
        """
        if "clean" not in self._shared and announced:
            kind = announced[0][0]
            wanted = list(dict.fromkeys(one for other, one in announced if other == kind))
            with contextlib.suppress(NotApplicable):  # the method that asked raises this later, under its own name
                self.renamed(self.where, kind)._sweep_images(wanted, required=False)
        if "clean" not in self._shared:
            self._shared["clean"] = self._look(self.model if model is None else model)
        clean: Clean = self._shared["clean"]
        self.score.close()
        if self.score.undecided:
            if self.root is self:
                self.score.look_at(clean.table)
            else:  # what the output is shows on the unchanged images
                self.root.clean()
        self._warn_of_the_score()
        return clean

    @property
    def known(self) -> Clean | None:
        """What the model says of the unchanged images, where a pass over them has been made."""
        found: Clean | None = self._shared.get("clean")
        return found

    @property
    def output(self) -> Output | None:
        """What the model's output is taken for, from all unchanged images; None where the target is a callable."""
        table = self.root.clean().table
        if self.score.look.output is None and table is not None:
            self.score.look_at(table)
        return self.score.look.output

    def _look(self, model: Model) -> Clean:
        """Run a model once per image."""
        tables: list[Tensor] = []
        scores: list[Tensor] = []

        @restoring
        def ask(start: int, stop: int) -> Tensor:
            self.modes(grad=False).set()  # a callable target is a part of the pass
            rows = torch.arange(start, stop, device=self.device)
            # a copy: a model that works in place must change neither the caller's images nor ours
            output = self.forward(model, ordinary(self.inputs[start:stop].clone()), rows)
            table = self.score.table(output, rows)
            self.score.resolve(output, table, self.origin_of(rows))
            if table is None:
                scores.append(self.score(output, self.origin_of(rows)).detach().clone())
            else:
                tables.append(table.clone())  # a model may answer into one buffer, as captured CUDA graphs do
            return rows

        def body(start: int, stop: int) -> None:
            self.check_rows(ask(start, stop))

        self.run(self.images, body)
        return _joined(tables, scores)

    def over_images(self, body: Callable[[int, int], None]) -> None:
        """Run `body(start, stop)` over the unchanged images, whose scores may depend on what the output is.

        Where a later part shows that an earlier one was taken for something else, all are run again: with logits that happens
        only where those of the first images all lie in [0, 1].
        """
        look = self.score.look
        if self.root is not self or not self.score.undecided:
            self.run(self.images, body)
            return
        known = False
        try:
            while not known:
                look.begin()
                self.run(self.images, body)
                known = not look.changed
        finally:
            look.open = False
            if not known:
                look.output = None
        self._warn_of_the_score()

    def _warn_of_the_score(self) -> None:
        """Say once in a call what may be wrong about the kind of score."""
        look, kind = self.score.look, self.score.kind
        if look.output is None or not self.score.looks or "warned" in self.root._shared:
            return
        if kind in ("softmax", "log_softmax") and look.output == "probabilities":
            what = f"the model's output already sums to 1, and score={kind!r} takes its softmax again"
            what += "; score='probability' takes it as it is"
        elif kind in ("sigmoid", "log_sigmoid") and look.lies_in_unit:
            what = f"the model's output already lies in [0, 1], and score={kind!r} takes its sigmoid again"
            what += "; score='probability' takes it as it is"
        elif kind in FOUND_OUT and look.is_a_guess:
            what = f"the model's {look.values} outputs lie in [0, 1] and are taken for probabilities of independent labels"
            what += "; score='softmax' or 'sigmoid' takes them for logits, 'raw' for plain numbers"
        else:
            return
        self.root._shared["warned"] = True
        warn(f"{self.where}: {what}")

    def clean_scores(self) -> tuple[Tensor, Tensor | None]:
        """Return the explained score of the unchanged images (B,) and, for class targets, that of every class (B, K)."""
        clean = self.clean()
        if clean.table is None:
            assert clean.scores is not None
            return clean.scores, None
        classes = self.score.scaled(clean.table)
        return self.score.pick(classes, self.origin), classes

    def clean_scores_without_gradients(self) -> tuple[Tensor, Tensor | None]:
        """Return `clean_scores()` as passes without gradients tell them, with which those of changed images are compared.

        Passes with gradients may have told them, in which some layers take another path: torch's own transformer layers make
        padded tokens zero only where no gradients are kept. One pass more shows whether it matters.
        """
        scores, classes = self.clean_scores()
        if "swept" not in self._shared or (isinstance(self.model, PreparedModel) and self.model.fused):
            return scores, classes
        rows = torch.arange(self.images if self.company == "whole" else 1, device=self.device)
        again, _ = self.scores(self.inputs[rows].clone(), rows)
        largest = float((scores if classes is None else classes).abs().nan_to_num(0.0, 0.0, 0.0).amax())
        allowed = math.sqrt(torch.finfo(again.dtype).eps) * largest
        if torch.allclose(again, scores[rows], rtol=0, atol=allowed, equal_nan=True):
            return scores, classes
        return self.scores_of(self.inputs)

    def scores_of(self, images: Tensor, model: Model | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the explained score (B,) of images in the place of the plan's and, for class targets, that of every class."""
        parts: dict[int, tuple[Tensor, Tensor | None]] = {}

        def body(start: int, stop: int) -> None:
            rows = torch.arange(start, stop, device=self.device)
            parts[start] = self.scores(images[start:stop].clone(), rows, model)

        self.run(self.images, body)
        tables = [table for _, table in parts.values() if table is not None]
        return torch.cat([part for part, _ in parts.values()]), torch.cat(tables) if tables else None

    @restoring
    def look(self, image: int) -> Look:
        """Run the model with gradients on one of the images, for whoever watches its layers."""
        rows = torch.tensor([image], device=self.device)

        def look() -> Look:
            leaf = self.inputs[image : image + 1].clone().requires_grad_()
            output = self.forward(self.layered_model, leaf.clone(), rows)
            score = self._preview(output, rows)
            lay_out(score, 1)
            return Look(leaf, output, score)

        self.modes(grad=True).set()
        return self.differentiated(look)

    def _preview(self, output: Any, rows: Tensor) -> Tensor:
        return self.score.preview(output, rows)

    def fix_target(self) -> None:
        """Make sure that the target of every image and what the output is are known, with a clean pass where they are not."""
        if self.score.open:
            self.clean()
        if self.score.undecided:
            self.root.clean()

    def scores(self, batch: Tensor, rows: Tensor, model: Model | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the explained score (N,) of changed images and, for class targets, that of every class (N, K).

        The model may overwrite `batch`. Where another `model` is given, it is that which turns `batch` into outputs.
        """
        self.fix_target()
        found, scores = self._scores(batch, rows, self.model if model is None else model)
        if found is None:
            assert scores is not None
            self.check_rows(rows)
            return scores, None
        classes = self.score.scaled(found.clone())  # a model that answers into one buffer overwrites it in the next pass
        if model is None:
            self.check_rows(rows)
        return self.score.pick(classes, self.origin_of(rows)), classes

    @restoring
    def _scores(self, batch: Tensor, rows: Tensor, model: Model) -> tuple[Tensor | None, Tensor | None]:
        self.modes(grad=False).set()
        output = self.forward(model, ordinary(batch), rows)
        table = self.score.table(output, rows)
        return table, self.score(output, self.origin_of(rows)).detach().clone() if table is None else None

    def gradients(self, batch: Tensor, rows: Tensor) -> Tensor:
        """Return df/dx (N, C, H, W) at each row of `batch`."""
        self.fix_target()
        if self.keeps_graph:
            return gradients_with_graph(self, batch, rows)
        return sweep(self, batch, rows, [PLAIN]).found[PLAIN][0]

    def image_gradients(self) -> Tensor:
        """Return df/dx (B, C, H, W) at the unchanged images, for a method that asks for nothing else."""
        if self.keeps_graph:
            self.fix_target()
        elif self.score.open or self.score.undecided:
            ((result,),) = self.sweeps(PLAIN)
            return result.to(self.dtype)
        found: dict[int, Tensor] = {}

        def body(start: int, stop: int) -> None:
            rows = torch.arange(start, stop, device=self.device)
            batch = self.inputs if stop - start == self.images else self.inputs[start:stop]
            found[start] = (
                self.gradients(batch, rows) if self.keeps_graph else sweep(self, batch, rows, (PLAIN,)).found[PLAIN][0]
            )

        self.run(self.images, body)
        return (found[0] if len(found) == 1 else _cat([*found.values()])).to(self.dtype)

    def layer_gradients(
        self, batch: Tensor, rows: Tensor, layer: Layer, rules: ReluRules | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a layer's activation A, G = df/dA and, with `rules`, df/dx under the rule, all from one forward pass.

        Without `rules` nothing below the layer is kept for the backward pass, unless its input is meant: others may use that.
        """
        self.fix_target()
        if self.keeps_graph and rules is None:
            return *layer_gradients_with_graph(self, batch, rows, layer), None
        at_layer, at_images = Sweep(layer=layer, where=self.where), Sweep(rules.rule, rules.other) if rules else None
        found = sweep(self, batch, rows, [at_layer, *([at_images] if at_images else [])]).found
        return *found[at_layer], found[at_images][0] if at_images else None  # type: ignore[return-value]

    def sweeps(self, *wanted: Sweep) -> list[Found]:
        """Return what sweeps over the unchanged images find; each is made once, however many methods ask for it."""
        made: dict[tuple[ScoreKind, Sweep], Found] = self._shared.setdefault("sweeps", {})
        missing = [one for one in wanted if (self.score.kind, one) not in made]
        if missing:
            self._sweep_images(missing, required=True)
        return [made[self.score.kind, one] for one in wanted]

    def _sweep_images(self, wanted: Sequence[Sweep], *, required: bool) -> None:
        """Make sweeps over the unchanged images, which also tell the clean scores; what is not required may be left out."""
        found: dict[int, Swept] = {}

        def body(start: int, stop: int) -> None:
            if start == 0:
                found.clear()  # all are run again
            rows = torch.arange(start, stop, device=self.device)
            found[start] = sweep(self, self.inputs[start:stop], rows, wanted, required=required)

        self.over_images(body)
        parts = list(found.values())
        self.score.close()
        made = self._shared.setdefault("sweeps", {})
        for one in wanted:
            if all(one in part.found for part in parts):
                pieces = zip(*(part.found[one] for part in parts), strict=True)
                # a gradient of the images is nobody else's, and of one pass it is whole
                own = one.layer is None and len(parts) == 1
                made[self.score.kind, one] = tuple(some[0] if own else _cat(some) for some in pieces)
        if "clean" not in self._shared:
            tables = [part.table for part in parts if part.table is not None]
            self._shared["clean"] = _joined(tables, [part.scores for part in parts])
            self._shared["swept"] = True


def _joined(tables: list[Tensor], scores: list[Tensor]) -> Clean:
    """Return what the model says of the unchanged images, whose parts were run one after the other."""
    return Clean(_cat(tables), None) if tables else Clean(None, _cat(scores))


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors one after the other in a new one; autocast does not join those of every dtype."""
    if len(parts) == 1:
        return parts[0].clone()
    return _cat_anew(parts) if torch.is_autocast_enabled(parts[0].device.type) else torch.cat(list(parts))


@restoring
def _cat_anew(parts: Sequence[Tensor]) -> Tensor:
    with without_autocast(parts[0].device.type):
        return torch.cat(list(parts))
