"""The piece of a page that explains: a button, a picture and a table, beside an app's own image and answer."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pysal._checks import first_line, refuse
from pysal.engine.model.class_names import names_of
from pysal.engine.prepared.model import PreparedModel
from pysal.explain import explain
from pysal.gradio.function import WHERE, Function, answer_of, labels_of, pixels_of
from pysal.methods.registry import method_names
from pysal.models import Classifier
from pysal.segments import Slic

if TYPE_CHECKING:
    import gradio

    from pysal.explanation import Explanation

# So many parts of an image are hidden one after the other where a function alone is asked, once for each.
PARTS = 50


@dataclass(frozen=True)
class Piece:
    """What was put on the page.

    Attributes:
        button: starts an explanation.
        picture: shows it, a `gradio.Image`.
        table: says it in numbers, a `gradio.Markdown`.
    """

    button: gradio.Button
    picture: gradio.Image
    table: gradio.Markdown


def explanations(
    function: Callable[..., Any] | None,
    image: gradio.Image,
    *,
    others: Sequence[gradio.Component] = (),
    output: int | None = None,
    model: Classifier | PreparedModel | None = None,
    methods: str | Sequence[str] = "all",
    segments: int = PARTS,
    label: str = "Explain",
) -> Piece:
    """Put a button that explains the app's answer to its image, with a picture and a table, where the page is being built.

    Call it inside `with gradio.Blocks()`. Without `model` the function alone is asked: parts of the image are hidden one after
    the other, and the drop of the label's score is drawn (leave-one-out). With `model` all methods explain that.

    Args:
        function: what the app calls with its image: it answers with {label: score}, a label, or a number. None with a `model`.
        image: the component whose image is explained.
        others: components of the function's further arguments, after the image.
        output: which of several outputs of the function holds the labels.
        model: of `pysal.models.load` or `pysal.models.wrap`, prepared or not, which the function asks too.
        methods: those that are asked of the model, by name, or "all" that apply to it.
        segments: how many parts the image is cut into where the function alone is asked, once for each.
        label: what the button says.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
        TypeError: no function, or a model that does not say which photos it wants.
        ValueError: a method that there is not, no number of segments.
    """
    return _piece(function, image, 0, list(others), output, model, methods, segments, label)


def _piece(
    function: Callable[..., Any] | None,
    image: Any,
    place: int,
    others: list[Any],
    output: int | None,
    model: Any,
    methods: str | Sequence[str],
    segments: int,
    label: str,
) -> Piece:
    gr = _gradio()
    if model is None and not callable(function):
        refuse(WHERE, "function", "be callable where no model is given", type(function).__name__, TypeError)
    whole = model.original if isinstance(model, PreparedModel) else model
    if model is not None and not isinstance(whole, Classifier):
        refuse(WHERE, "model", "say which photos it wants (see pysal.models.wrap)", type(model).__name__, TypeError)
    names = methods if methods == "all" else method_names(WHERE, methods)
    parts = Slic(segments)  # which checks the number

    def found_for(value: Any, *further: Any) -> tuple[Image.Image, str]:
        try:
            found = (
                _by_function(function, value, further, place, output, parts)
                if model is None
                else _by_model(function, value, further, place, output, model, names)
            )
        except Exception as error:  # of the app's own function too: the page says it and stays
            # the page shows the sentence as HTML
            raise gr.Error(html.escape(f"{type(error).__name__}: {first_line(error)}", quote=False)) from error
        return _drawn(found), f"```text\n{found.table()}\n```"

    button = gr.Button(label, elem_classes="pysal-explain")
    picture = gr.Image(label="What the answer depends on", type="pil", interactive=False, elem_classes="pysal-picture")
    table = gr.Markdown(elem_classes="pysal-table")
    button.click(found_for, [image, *others], [picture, table])
    return Piece(button, picture, table)


def add_explanations(
    interface: gradio.Interface,
    model: Classifier | PreparedModel | None = None,
    *,
    methods: str | Sequence[str] = "all",
    segments: int = PARTS,
    label: str = "Explain",
) -> gradio.Interface:
    """Return an image classifier's `gradio.Interface` with a button below it that explains its answer.

    The interface is made by others and knows nothing of this; it works as before. See `explanations` for pages of one's own.

    Args:
        interface: has an image among its inputs, and labels, a text or a number among its outputs.
        model: see `explanations`.
        methods: see `explanations`.
        segments: see `explanations`.
        label: see `explanations`.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
        TypeError: no interface.
        ValueError: it has no image among its inputs; and what `explanations` refuses.
    """
    gr = _gradio()
    if not isinstance(interface, gr.Interface):
        refuse(f"{WHERE}.add_explanations", "interface", "be a gradio.Interface", type(interface).__name__, TypeError)
    inputs, outputs = list(interface.input_components or ()), list(interface.output_components or ())
    places = [number for number, one in enumerate(inputs) if isinstance(one, (gr.Image, gr.ImageEditor))]
    if not places:
        kinds = ", ".join(type(one).__name__ for one in inputs) or "none"
        refuse(f"{WHERE}.add_explanations", "interface", "have an image among its inputs", kinds)
    place = places[0]
    labels = [number for number, one in enumerate(outputs) if isinstance(one, gr.Label)] or [0]
    output = labels[0] if len(outputs) > 1 else None
    others = [one for number, one in enumerate(inputs) if number != place]
    with interface:
        _piece(interface.fn, inputs[place], place, others, output, model, methods, segments, label)
    explained: gradio.Interface = interface
    return explained


def _by_function(function: Any, value: Any, further: Sequence[Any], place: int, output: int | None, parts: Slic) -> Explanation:
    """Explain by leave-one-out what a function says of an image."""
    pixels = pixels_of(value)
    asked = Function(function, value, further, place, output)
    best = int(np.argmax(asked.scores))
    sure = abs(sum(asked.scores) - 1) < 1e-3 and min(asked.scores) >= 0
    return explain(
        asked,
        pixels,
        best,
        methods="leave_one_out",
        method_options={"leave_one_out": {"segments": parts}},
        score="probability" if sure and len(asked.scores) > 1 else "raw",
        batch_size=1,
    )


def _by_model(
    function: Any, value: Any, further: Sequence[Any], place: int, output: int | None, model: Any, methods: Any
) -> Explanation:
    """Explain by all methods what a model says of an image: of the app's own answer, where it is a class of the model."""
    if value is None:
        pixels_of(value)
    target: int | None = None
    names = names_of(model.original if isinstance(model, PreparedModel) else model)
    if callable(function) and names is not None:
        answer = answer_of(function, *further[:place], value, *further[place:])
        said = labels_of(answer[output] if output is not None and isinstance(answer, (tuple, list)) else answer)
        highest = max(said, key=lambda one: said[one])
        target = names.names.index(highest) if highest in names.names else None
    source: Any = value.get("composite", value.get("background")) if isinstance(value, dict) else value
    return explain(model, source, target, methods=methods)


def _drawn(found: Explanation) -> Image.Image:
    file = io.BytesIO()
    found.plot().savefig(file, format="png")
    file.seek(0)
    return Image.open(file)


def _gradio() -> Any:
    try:
        import gradio
    except ModuleNotFoundError as error:
        missing = f"without {error.name} (run: pip install 'pysal-saliency[demo]')"
        refuse(WHERE, "a page", "be built with the extra `demo` installed", missing, ModuleNotFoundError)
    return gradio
