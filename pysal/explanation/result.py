"""What `explain` found: maps and numbers, their picture and table, written to files and read back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from pysal.engine.request.plan import Model
from pysal.engine.request.target import Target
from pysal.explanation import drawing, file, notebook, text
from pysal.explanation.drawing import PlotKind
from pysal.explanation.findings import Findings, MethodResult, counted

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from pysal import viz


class Explanation(Findings):
    """What several methods found for a batch of images, and how to show, save and load it.

    In a notebook it shows itself; elsewhere `plot` draws one image, `table` (and `print`) lists the numbers, `save` writes
    both and `load` reads the numbers back.

    Attributes:
        images: (B, C, H, W) as the model was given them; [0, 1] is shown as it is, other ranges rescaled for drawing.
        target: (B,) int64 class index, -1 where the target is a callable.
        target_names: B names, "Egyptian cat".
        scores: (B,) the score explained.
        score_kind: which score that is: "probability", "log_probability", "logit", "raw", "softmax", "log_softmax", "sigmoid"
            or "log_sigmoid", as `pysal.gradient` takes them, or "callable".
        probabilities: (B,) probability of the target, None where the target is a callable or the output tells none.
        results: method name -> MethodResult, in the order they are shown.
        skipped: method name -> why it does not apply to the model, for those that "all" left out.
        model_name: what the model is called in pictures and tables.
        seconds: wall time of the whole call.
        build: `pysal.build_info()` at the time of the call.
        output: what the model's output was taken for: "logits" or "log_probabilities" of classes, "probabilities" of classes,
            "labels" (probabilities of independent labels), "label_logits", "numbers"; "" where the target is a callable.

    Raises:
        TypeError: `images`, `target`, `scores`, `probabilities` or a map is no tensor.
        ValueError: shapes that do not fit `images`, an unknown reduction, or a name that cannot be a key of the file.
    """

    @property
    def maps(self) -> dict[str, Tensor]:
        """The maps by method name, in the order of `results`."""
        return {name: result.map for name, result in self.results.items()}

    def __getitem__(self, name: str) -> MethodResult:
        """Return the result of method `name`.

        Raises:
            ValueError: no such method; the sentence names those there are. It is a KeyError too.
        """
        return self.result_of("pysal.Explanation", name)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a result of method `name`."""
        return name in self.results

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __repr__(self) -> str:
        return f"Explanation({self.model_name!r}, {counted(len(self), 'image')}: {', '.join(self.results)})"

    def plot(
        self,
        image: int = 0,
        *,
        kind: PlotKind = "maps",
        methods: str | Sequence[str] | None = None,
        model: Model | None = None,
        target: Target = None,
        options: Mapping[str, Any] | None = None,
        path: str | os.PathLike[str] | None = None,
        view: viz.Shown | None = None,
        cells: int | None = None,
        smooth: float | None = None,
        percentile: float | None = None,
        colours: viz.Colours | None = None,
        photo: bool | None = None,
        ax: Axes | Sequence[Axes] | None = None,
    ) -> Figure:
        """Return a picture of one image: its maps, or a plot of what they say.

        Args:
            image: index in the batch.
            kind: "maps", the photo and each method's map with its colour bar; "drops", a bar for each segment of
                leave-one-out; "interactions", lines between the segments that need or replace each other; "agreement", the rank
                correlation of each two maps; "convergence", the error of path methods over the number of steps;
                "deletion_insertion", the score while important pixels are replaced, or shown.
            methods: names out of `results`, in the order to show them; None = all that this kind of picture is about.
            model: the model that was explained; "convergence" and "deletion_insertion" run it again.
            target: the target that was explained, if it was not a class; needed by the same two kinds. One for all images, or
                one for each.
            options: those of `pysal.metrics.agreement`, of `pysal.plots.converge` or of `pysal.metrics.deletion` and
                `insertion`: {"absolute": True}, {"steps": (10, 20, 50), "reference": 200}, {"substrate": "blur"}.
            path: also write the figure there; the ending says how (.png, .pdf, .svg ...).
            view: of maps, as are all that follow: "signed", what speaks for and against, or "magnitude", how much there is of
                either, as PAIR draws maps; None = as each method means it.
            cells: side of the squares, in pixels, over which a map is summed; 1 shows every pixel. None = 1/28 of the
                shorter side for the maps of Integrated Gradients and Blur Integrated Gradients, 1 for others. The sums are
                exact: the shares still add up. Maps of segments and of a layer are not summed.
            smooth: width sigma, in pixels, of a Gaussian, in place of cells.
            percentile: of |map| inside the colour limits; None = 99.5.
            colours: a matplotlib colour map, or its name; None = pysal's own.
            photo: whether the photo lies below the maps; None = True.
            ax: matplotlib axes to draw the maps on, one for each method, without bars; the figure that they are in is returned.

        Returns:
            A matplotlib figure that pyplot does not know of; `figure.savefig` and, in a notebook, `display` work.

        Raises:
            TypeError: `options` is no mapping, `image` no index, `path` no name of a file, or a value has the wrong type.
            ValueError: `image`, a method, the kind or an option is not there, a model is missing or not needed, or matplotlib
                does not know the ending.
            OSError: the file cannot be written; nothing of it is left then.
        """
        style = {
            "view": view,
            "cells": cells,
            "smooth": smooth,
            "percentile": percentile,
            "colours": colours,
            "photo": photo,
        }
        return drawing.plot(
            self,
            image,
            kind=kind,
            methods=methods,
            model=model,
            target=target,
            options=options,
            path=path,
            ax=ax,
            **style,
        )

    def overlay(
        self,
        name: str,
        image: int = 0,
        *,
        view: viz.Shown | None = None,
        cells: int | None = None,
        smooth: float | None = None,
        percentile: float | None = None,
        colours: viz.Colours | None = None,
        photo: bool | None = None,
    ) -> NDArray[np.uint8]:
        """Return a method's map over the photo as an RGB image, without text: for `Image.fromarray`, OpenCV or a video.

        Args:
            name: of the method.
            image: index in the batch.
            view: as in `plot`, as are all that follow.
            cells: side of the squares over which the map is summed.
            smooth: width of a Gaussian, in place of cells.
            percentile: of |map| inside the colour limits.
            colours: a matplotlib colour map, or its name.
            photo: whether the photo lies below.

        Returns:
            (H, W, 3), uint8, the size of the image.

        Raises:
            TypeError, ValueError: no such method or image, or an option that cannot be drawn.
        """
        return drawing.overlay(
            self,
            name,
            image,
            view=view,
            cells=cells,
            smooth=smooth,
            percentile=percentile,
            colours=colours,
            photo=photo,
        )

    def panel(self, name: str, image: int = 0) -> viz.Panel:
        """Return what is drawn of a method's map of one image, and said about it.

        With it, `viz.draw` shows maps of several explanations in one picture.

        Raises:
            ValueError: no such method or image.
        """
        return drawing.panel(self, name, image)

    def table(self) -> str:
        """Return the numbers as plain text: for each image its class and score, and a line per method.

        Seconds are of the whole batch, model passes of one image. The residual is by how much the map misses the change of
        the score that it should add up to, in the score's own unit. The largest drop is what hiding the most important
        segment does to the score.
        """
        return text.table(self)

    __str__ = table

    def _repr_html_(self) -> str:
        return notebook.notebook(self, self.plot)

    def save(self, directory: str | os.PathLike[str], stem: str = file.STEM, *, pictures: bool = True) -> tuple[Path, ...]:
        """Write `<stem>.npz` and a picture of each image: `<stem>.png`, or `<stem>-0.png` ... for several; or one of them.

        `save("out")` makes a folder. `save("cat.png")` writes the picture alone, in the format of its ending, and
        `save("cat.npz")` the numbers alone. Numbers of images have leading zeros where they need them to sort.

        All files are written under temporary names first and renamed when all are whole, so that a full disk leaves what
        was there before.

        The npz opens with `numpy.load(path, allow_pickle=False)`. Its keys: `images`, `target`, `scores`, `probabilities`
        (where the target is a class), `<method>` (the map, B x C x H x W), `<method>.<detail>` ("grad_cam.native",
        "leave_one_out.labels"), `<method>.<detail>.<image>` where each image has its own length ("leave_one_out.drops.0"),
        and `metadata`, a JSON string with everything else. bfloat16 is stored as float32.

        Args:
            directory: made if it is not there; or a file's name that ends in .npz or as a picture does (.png, .pdf, .svg ...).
            stem: of the file names.
            pictures: whether to draw.

        Returns:
            The files written, the npz first.

        Raises:
            TypeError: `directory` is no name of a folder or file.
            ValueError: `stem` is no plain file name.
            OSError: a file cannot be written; the sentence names it.
        """
        only = file.wanted_file(directory, stem)
        if only is not None:
            return file.save_one(self, only, self._write)
        return file.save(self, directory, stem, self._write_png if pictures else None)

    def _write(self, image: int, file: BinaryIO, ending: str) -> None:
        self.plot(image).savefig(file, format=ending)

    def _write_png(self, image: int, file: BinaryIO) -> None:
        self.plot(image).savefig(file, format="png")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Return the explanation that `save` wrote.

        Args:
            path: the npz file, or the folder it is in. Nothing in it is ever executed.

        Raises:
            TypeError: `path` is no name of a file: a number, too, which `open` would take for a file that is open already.
            OSError: the file cannot be opened; FileNotFoundError where there is none.
            ValueError: it is no such file, or it is damaged; the folder has none, or several.
        """
        return file.load(path, cls)
