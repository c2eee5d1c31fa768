"""What happens when something on the page is touched."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
from PIL import Image, ImageOps
from torch import Tensor

from pysal.demo import article, pictures, tiles, words
from pysal.demo.session import COLLAGE, Answer, Found, Options, Told, Workspace, photos, watch
from pysal.engine.running.chunks import Cancelled
from pysal.explanation import Explanation

THUMBNAIL = 96  # pixels
FIRST_PHOTO = COLLAGE


class Listed(str):
    """The list of classes on offer, anew: which of them is explained depends on the tab in front."""


SIDE_BY_SIDE, TWO_CLASSES, EIGHT_STEPS = "side-by-side", "two-classes", "eight-steps"


class Reader:
    """What one reader has chosen.

    Attributes:
        source: the key of a photo, or the file of an upload.
        caption: what the photo is called.
        target: the class to explain; None = the most probable one.
        stop: set to end what is being computed.
        superseded: whether it ends for something else that is about to begin, which will say how it fares.
        asked: the number of what was moved last; runs that do not know of it yet compute nothing, for another one follows.
        no: why nothing is computed until something else is moved: the refusal of a choice, or that it was stopped.
    """

    def __init__(self) -> None:
        self.source, self.caption = FIRST_PHOTO, photos()[FIRST_PHOTO][0]
        self.target: int | None = None
        self.stop, self.superseded, self.asked = threading.Event(), False, 0
        self.no: Exception | None = None

    def __deepcopy__(self, _memo: object) -> Reader:
        return Reader()  # Gradio copies the first value for each reader; an event cannot be copied


def slider_of(knob: article.Knob | None) -> dict[str, Any]:
    """Return how the slider of a section looks, if it has one."""
    if knob is None:
        return {"visible": False}
    return {
        "minimum": knob.low,
        "maximum": knob.high,
        "step": knob.step,
        "value": knob.value,
        "label": knob.label,
        "visible": True,
    }


def section_text(number: int) -> str:
    """Return a section of the article, with its heading."""
    title, text = article.sections()[number - 1]
    return f"## {number}. {title}\n\n{text}"


class Actions:
    """What happens when something is touched. Every error becomes a sentence in the status line."""

    def __init__(self, workspace: Workspace, keep: Callable[[Explanation], str]) -> None:
        self._workspace, self._keep = workspace, keep
        self._thumbnails: dict[str, tuple[str, str]] = {}
        self._readers: WeakValueDictionary[str, Reader] = WeakValueDictionary()  # by the name their tab asks under

    # Choosing -----------------------------------------------------------------------------------------------------

    def start(self, reader: Reader, model: str, order: int, request: gr.Request) -> Any:
        """Show the photo and its classes, for a new reader or another model."""
        self._readers[str(request.session_hash)] = reader
        return self._photo(reader, model, reader.source, reader.caption, order)

    def pick_photo(self, reader: Reader, model: str, order: int, event: gr.EventData) -> Any:
        """Take a photo that comes with the page."""
        key = str(event.key) if str(event.key) in photos() else FIRST_PHOTO
        return [*self._photo(reader, model, key, photos()[key][0], order), gr.update(value=None)]

    def upload(self, reader: Reader, model: str, path: str | None, order: int) -> Any:
        """Take a reader's own photo."""
        source = path or reader.source
        # the box is empty again, so that the next photo goes the same way
        return [*self._photo(reader, model, source, os.path.basename(source), order), gr.update(value=None)]

    def _photo(self, reader: Reader, model: str, source: str, caption: str, order: int) -> list[Any]:
        """Look at a photo, if it can be read: else the reader keeps the one before."""
        if not self._newest(reader, order):
            return [gr.skip()] * 7
        try:
            image = self._workspace.photo(model, source)
            found = self._workspace.answers(model, image, reader=reader)
        except Exception as error:
            reader.no = error
            return [gr.skip()] * 7
        reader.source, reader.caption, reader.target = source, caption, found[0].index
        names = list(self._workspace.model(model).classifier.class_names)
        return [
            words.thumbnails(self._shown_photos(), reader.source),
            words.preview(image[0], reader.caption),
            words.answers(found, reader.target),
            gr.update(value=""),
            gr.update(choices=names, value=found[0].name),
            gr.update(choices=names, value=found[1].name if len(found) > 1 else found[0].name),
            words.status("Waiting for the model …", 0.0, "busy"),
        ]

    def _shown_photos(self) -> dict[str, tuple[str, str]]:
        if not self._thumbnails:
            for key, (caption, source) in photos().items():
                with Image.open(source) if isinstance(source, Path) else source.copy() as photo:
                    small = ImageOps.fit(photo.convert("RGB"), (THUMBNAIL, THUMBNAIL))
                self._thumbnails[key] = (caption, tiles.picture_uri(small))
        return self._thumbnails

    def pick_class(self, reader: Reader, model: str, order: int, event: gr.EventData) -> Any:
        """Take one of the classes on offer, which is also the first of two."""
        return self._class(reader, model, str(event.key), order)

    def name_class(self, reader: Reader, model: str, name: str | None, order: int) -> Any:
        """Take any class by name or number, which is also the first of two."""
        return self._class(reader, model, name, order) if name and name.strip() else [gr.skip()] * 3

    def _class(self, reader: Reader, model: str, wanted: str, order: int) -> list[Any]:
        if not self._newest(reader, order):
            return [gr.skip()] * 3
        try:
            image = self._workspace.photo(model, reader.source)
            chosen = self._workspace.answer(model, image, wanted, reader)
            found = self._workspace.answers(model, image, reader=reader)
        except Exception as error:
            reader.no = error
            return [gr.skip()] * 3
        reader.target = chosen.index
        listed = [*found, *([] if chosen.index in {answer.index for answer in found} else [chosen])]
        listing, status = words.answers(listed, chosen.index), words.status("Waiting for the model …", 0.0, "busy")
        return [listing, gr.update(value=chosen.name), status]

    def walk(self, reader: Reader, number: int, order: int) -> Any:
        """Go to a step of the article."""
        if not self._newest(reader, order):
            return [gr.skip()] * 5
        number = min(max(number, 1), len(article.STEPS))
        return [
            number,
            section_text(number),
            gr.update(**slider_of(article.STEPS[number - 1].knob)),
            gr.update(interactive=number > 1),
            gr.update(interactive=number < len(article.STEPS)),
        ]

    def step_back(self, reader: Reader, number: int, order: int) -> Any:
        """Go to the step before."""
        return self.walk(reader, number - 1, order)

    def step_forth(self, reader: Reader, number: int, order: int) -> Any:
        """Go to the next step."""
        return self.walk(reader, number + 1, order)

    def stop(self, reader: Reader) -> None:
        """Stop what is being computed for a reader, and the runs that Gradio still holds back for when it has ended."""
        reader.no = Cancelled("pysal demo: cancelled before anything was computed")
        reader.stop.set()

    def leave(self, request: gr.Request) -> None:
        """Stop what is being computed for a reader who has closed the page."""
        reader = self._readers.get(str(request.session_hash))
        if reader is not None:
            reader.superseded = True  # nobody is there to be told
            reader.stop.set()

    def give_way(self, reader: Reader, order: int) -> None:
        """Stop what is being computed for a reader, without a word: a run follows that knows what was moved."""
        reader.superseded, reader.asked, reader.no = True, max(reader.asked, order), None
        reader.stop.set()

    def _newest(self, reader: Reader, order: int) -> bool:
        """Give way to a question, unless a newer one has overtaken it."""
        newest = order >= reader.asked
        self.give_way(reader, order)
        return newest

    # Computing ----------------------------------------------------------------------------------------------------

    def run(self, reader: Reader, model: str, methods: list[str], *choices: Any) -> Iterator[list[Any]]:
        """Compute what the tab in front shows; yield status and pictures while it grows."""
        count = len(fields(Options))
        options, (one, two, compared, step, knob, tab, order) = Options(*choices[:count]), choices[count:]
        if order < reader.asked:  # on its way when something was moved; the run that follows knows what
            return
        reader.stop = cancel = threading.Event()
        reader.superseded = False
        place = (SIDE_BY_SIDE, TWO_CLASSES, EIGHT_STEPS).index(tab)

        def said(status: Any, picture: Any = None) -> list[Any]:
            places = [gr.skip()] * 4
            if picture is not None:
                places[3 if isinstance(picture, Listed) else place] = picture
            return [status, *places]

        def work(report: Callable[[str, float], None]) -> Iterator[str]:
            image = self._workspace.photo(model, reader.source)
            ask = _Question(self._workspace, model, image, report, cancel, reader)
            if tab != TWO_CLASSES:
                yield self._listed(ask, ask.answer(reader.target))
            if tab == TWO_CLASSES:
                yield from self._two_classes(ask, one, two, compared, options)
            elif tab == EIGHT_STEPS:
                yield from self._eight_steps(ask, reader, int(step), knob)
            else:
                yield from self._side_by_side(ask, reader, methods, options)

        try:
            if reader.no is not None:
                raise reader.no
            for item in watch(work, cancel):
                if isinstance(item, Told):
                    yield said(words.status(item.text, item.share, "busy"))
                else:
                    yield said(gr.skip(), item)
            done = "Done. Point at a picture to read its values; everything on this page can be moved."
            end = words.status(done, run=order)
        except Exception as error:
            end = _sentence(error, order)
            if isinstance(error, Cancelled) and not reader.superseded:
                reader.no = error
        if not reader.superseded:
            yield said(end)

    def _side_by_side(self, ask: _Question, reader: Reader, methods: list[str], options: Options) -> Iterator[str]:
        target = ask.answer(reader.target).index
        found = Found(None, (), {})
        try:
            for found in ask.explain(target, methods, options):
                yield self._shown(found, ask.image)
        except Exception:  # stopped, most often: nothing is on its way any more
            yield self._shown(replace(found, waiting=()), ask.image)
            raise

    def _listed(self, ask: _Question, chosen: Answer, beside: Answer | None = None) -> Listed:
        """Return the classes on offer, among them those that are explained."""
        known = {answer.index: answer for answer in [*ask.answers(), chosen, *([beside] if beside else [])]}
        return Listed(words.answers(list(known.values()), chosen.index, beside.index if beside else None))

    def _shown(self, found: Found, image: Tensor) -> str:
        links = ""
        if found.explanation is not None and not found.waiting:
            token = self._keep(found.explanation)
            links = (
                f'<nav><a href="found/{token}/explanation.png" download>Panel (PNG)</a>'
                f'<a href="found/{token}/explanation.npz" download>Arrays (NPZ)</a></nav>'
            )
        return pictures.side_by_side(found, image, links)

    def _two_classes(self, ask: _Question, one: str, two: str, methods: list[str], options: Options) -> Iterator[str]:
        if not one or not two:  # an emptied box names no class, and certainly not the first of all
            raise ValueError("pysal demo: Both boxes must name a class, got an empty one")
        first, second = ask.answer(one), ask.answer(two)
        yield self._listed(ask, first, second)
        ask.part(0, 2)
        *_, left = ask.explain(first.index, methods, options)
        ask.part(1, 2)
        for right in ask.explain(second.index, methods, options):
            yield pictures.two_classes(left, right, ask.image)

    def _eight_steps(self, ask: _Question, reader: Reader, number: int, knob: float | None) -> Iterator[str]:
        target = ask.answer(reader.target).index
        sides, refused = [], {}
        for place, side in enumerate(article.STEPS[number - 1].sides(knob)):
            ask.part(place, 2)
            *_, found = ask.explain(target, [side.method], side.options)
            if found.explanation is None:
                refused[side.title] = found.refused[side.method]
            else:
                sides.append(pictures.swipe_side(found.explanation, side.method, side.title))
        yield pictures.refused(ask.image[0], refused) if refused else pictures.swipe(ask.image[0], sides[0], sides[1])


class _Question:
    """A photo and a model, asked part by part: reports of a part are its share of the whole."""

    def __init__(
        self,
        workspace: Workspace,
        model: str,
        image: Tensor,
        report: Callable[[str, float], None],
        cancel: threading.Event,
        reader: Reader,
    ) -> None:
        self._workspace, self._model, self.image, self._report, self._cancel = workspace, model, image, report, cancel
        self._reader = reader
        self._part, self._parts = 0, 1

    def part(self, number: int, of: int) -> None:
        """Begin part `number` of several."""
        self._part, self._parts = number, of

    def answer(self, wanted: str | int | None) -> Answer:
        """Return a class by name or index; None = the most probable one."""
        if wanted is None:
            return self._workspace.answers(self._model, self.image, 1, self._reader)[0]
        return self._workspace.answer(self._model, self.image, wanted, self._reader)

    def answers(self) -> list[Answer]:
        """Return the most probable classes."""
        return self._workspace.answers(self._model, self.image, reader=self._reader)

    def explain(self, target: int, methods: list[str], options: Options) -> Iterator[Found]:
        """Yield what is found of this part, see `Workspace.explain`."""

        def report(text: str, share: float) -> None:
            self._report(text, (self._part + share) / self._parts)

        return self._workspace.explain(
            self._model, self.image, target, methods, options, report=report, cancel=self._cancel, reader=self._reader
        )


def _sentence(error: Exception, run: int) -> str:
    """Return what went wrong as the status line."""
    text = " ".join(str(error).split())
    if isinstance(error, Cancelled):
        done = text.removeprefix("pysal demo: ").removeprefix("pysal: ").replace("_", " ")
        return words.status(f"Stopped: {done}. What was finished is kept.", kind="stopped", run=run)
    if text.startswith("pysal"):
        return words.status(words.plain(text), kind="wrong", run=run)
    traceback.print_exception(error)  # a mistake of ours: the reader gets the sentence, the terminal the place
    return words.status(f"Something went wrong: {type(error).__name__}: {text}", kind="wrong", run=run)
