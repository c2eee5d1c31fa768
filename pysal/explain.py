"""Internal: `pysal.explain`, one call for several methods."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pysal._checks import refuse, refuse_unknown
from pysal._library import build_info
from pysal.engine.model.class_names import ClassNames, Names, names_of
from pysal.engine.model.not_applicable import NotApplicable
from pysal.engine.prepared.model import PreparedModel
from pysal.engine.request.attribution import checked_options
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import Output, ScoreKind, noun, probabilities, taken_for
from pysal.engine.request.sweeps import Sweep
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.precision import Precision
from pysal.explanation import Explanation, MethodResult
from pysal.methods.registry import EVERY, method_names
from pysal.methods.traits import MODE_WORDS


class Picture(Protocol):
    """A PIL image or a NumPy array."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Where its numbers lie."""


Photo: TypeAlias = str | Path | bytes | Picture

WHERE = "pysal.explain"


def explain(
    model: Model,
    images: Tensor | Photo | Sequence[Photo],
    target: Target = None,
    *,
    methods: str | Sequence[str] = "all",
    method_options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    class_names: Names | Literal["imagenet"] | None = None,
    score: ScoreKind | None = None,
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Explanation:
    """Return the maps of several methods for a batch of images, and what else they found.

    Args:
        model: an nn.Module in eval mode, or any callable; see the methods for what they need.
        images: (B, C, H, W), floating point; or a photo or a list of them (files, PIL images, arrays: see `pysal.read_image`)
            for a model that knows how it wants them: of `pysal.models.load` or `pysal.models.wrap`, prepared or not.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        methods: names, or "all". "all" leaves out methods that do not apply to this model; `Explanation.skipped` lists them.
            "guided_integrated_gradients", "xrai", "shapley", "interactions", "rise", "legrad" and "gradient_attention" are none
            of all: they run where they are named.
        method_options: method name -> its own options, `{"integrated_gradients": {"steps": 100}}`.
        seed: seed of SmoothGrad's noise, of the orders of Shapley values and of RISE's masks.
        class_names: K names of the classes, in order or by index ({0: "cat", 1: "dog"}), or "imagenet", for a model that
            carries none, or instead of its own.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
            For all methods; None = "auto" for leave-one-out and these three, "logit" for the others.
            `Explanation.output` and its table say what the output was taken for.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, value, target, method name or option.
        NotApplicable: a method asked for by name cannot explain this model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()
        >>> found = explain(model, torch.rand(1, 3, 8, 8), 3, methods=["gradient", "integrated_gradients"])
        >>> found.maps["gradient"].shape
        torch.Size([1, 3, 8, 8])
    """
    started = time.perf_counter()
    names = method_names(WHERE, methods)
    options = _checked_options(names, methods, method_options or {}, seed)
    _check_that_no_method_is_a_target(model, target)
    if not isinstance(images, Tensor):
        from pysal.models.wrapping import photos_for  # and all that reads photos

        images = photos_for(WHERE, model.original if isinstance(model, PreparedModel) else model, images)
    given = None if class_names is None else _names(class_names)
    running = Running(score or "logit", extra_inputs, batch_size, precision, None)
    plan = Plan(WHERE, model, images, target, running, names=given)
    results: dict[str, MethodResult] = {}
    skipped: dict[str, str] = {}

    @contextlib.contextmanager
    def skipping(name: str) -> Iterator[None]:
        try:
            yield
        except NotApplicable as error:
            if methods != "all":
                raise
            skipped[name] = str(error)

    def request(name: str) -> Plan:
        return plan.renamed(f"pysal.{name}", score or EVERY[name].score)

    works: dict[str, Work] = {}
    for name in names:
        with skipping(name):
            works[name] = EVERY[name].prepare(request(name), **options[name])
    announced: list[tuple[ScoreKind, Sweep]] = []
    sharing: list[str] = []
    for name in list(works):  # nothing will be refused any more: what several methods ask of the images is made in one pass
        with skipping(name):
            wanted = works[name].announced(plan)
            announced += wanted
            sharing += [name] if wanted else []
    began = time.perf_counter()
    clean = plan.clean(announced)
    known = _names_that_fit(plan, class_names is not None, clean.table)
    _finish(plan)
    shared = (time.perf_counter() - began) / max(len(sharing), 1)  # each has its part of the pass that they share
    for name in names:
        method = EVERY[name]
        began = time.perf_counter()
        found = None
        if name not in skipped:
            with skipping(name):
                found = works.pop(name).run(report=True)
        if found is None:
            continue
        _finish(plan)
        # A mean of maps is drawn as they are; squares and variances have no sign left to show.
        drawn = EVERY[found.details["base"]] if found.details.get("kind") == "mean" else method
        mode = MODE_WORDS.get(str(found.details.get("mode")))
        results[name] = MethodResult(
            name=name,
            title=found.details.get("title", method.title if mode is None else mode.title),
            map=found.map.cpu(),
            reduction=drawn.reduction,
            signed=drawn.signed or (mode is not None and mode.signed),
            seconds=time.perf_counter() - began + (shared if name in sharing else 0.0),
            passes=round(found.passes),
            details={key: _on_cpu(value) for key, value in found.details.items()},
            score_kind=_named(score or method.score, plan.output),
        )
    found_out = plan.output
    shown = plan.renamed(WHERE, score or "auto").score
    scores = clean.scores if clean.table is None else shown.pick(shown.scaled(clean.table), plan.origin)
    assert scores is not None
    kind = _named(score or "auto", found_out)
    output = None if found_out is None else taken_for(score or "auto", found_out)
    index = plan.score.index
    return Explanation(
        images=plan.inputs.to("cpu", copy=True),
        target=index.cpu() if plan.score.is_class else torch.full((plan.images,), -1, device="cpu"),
        target_names=plan.score.names(known, noun(kind, output or "")),
        scores=scores.cpu(),
        score_kind=kind,
        probabilities=_probabilities(clean.table, index, output) if plan.score.is_class else None,
        results=results,
        skipped={name: skipped[name] for name in names if name in skipped},
        model_name=_model_name(plan.layered_model),
        seconds=time.perf_counter() - started,
        build=build_info(),
        output=output or "",
    )


def _names(given: object) -> ClassNames:
    from pysal.models.loading import checked_names  # and all that loads models
    from pysal.models.spec import imagenet_names

    found = checked_names(WHERE, given)
    assert found is not None
    return ClassNames(*imagenet_names()) if isinstance(found, str) else ClassNames(found)


def _names_that_fit(plan: Plan, given: bool, table: Tensor | None) -> ClassNames | None:
    """Return the classes by name; refuse names that were given, here or to `wrap`, for another number of classes."""
    known = plan.names()
    said = given or isinstance(getattr(plan.layered_model, "classes", None), ClassNames)
    if said and known is not None and table is not None and len(known) != table.shape[1]:
        requirement = f"have one name for each of the model's {table.shape[1]} classes"
        refuse(WHERE, "class_names", requirement, f"{len(known)} names")
    return known


def _finish(plan: Plan) -> None:
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)


def _check_that_no_method_is_a_target(model: object, target: object) -> None:
    """Refuse a method's name in the place of a class's, unless the model has a class of that name."""
    named = [target] if isinstance(target, str) else list(target) if isinstance(target, (list, tuple)) else []
    spelled = [name.strip().casefold() if isinstance(name, str) else "" for name in named]
    if spelled and all(name.replace("-", "_") in ("all", *EVERY) for name in spelled):
        known = names_of(model.original if isinstance(model, PreparedModel) else model)
        if known is None or not set(spelled) <= set(map(str.casefold, known.names)):
            refuse(WHERE, "target", f"be a class; names of methods are given as methods={target!r}", repr(target))


def _checked_options(
    names: list[str], methods: object, given: Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, dict[str, Any]]:
    """Return the options of each method, refusing unknown methods and options."""
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    if not isinstance(given, Mapping):
        refuse(WHERE, "method_options", "be a mapping of methods to their options", repr(given), TypeError)
    for name in given:
        if name not in EVERY:
            refuse_unknown(WHERE, "method_options", f"be for methods out of {', '.join(EVERY)}", name, EVERY)
        if name not in names:
            refuse(WHERE, "method_options", f"be for the methods asked for ({', '.join(names)})", repr(name))
        argument = f"method_options[{name!r}]"
        options[name] = checked_options(WHERE, argument, EVERY[name].prepare, given[name])
    for name in names:
        if EVERY[name].noisy:
            options[name].setdefault("seed", seed)
    return options


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return [one.cpu() for one in value] if isinstance(value, list) else value


def _model_name(model: object) -> str:
    return str(getattr(model, "name", "") or getattr(model, "__name__", type(model).__name__))


def _named(kind: ScoreKind, output: Output | None) -> str:
    """Return the kind of score that was explained, once it is known what the output is."""
    if output is None:
        return "callable"
    return ("raw" if output == "numbers" else "probability") if kind == "auto" else kind


def _probabilities(table: Tensor | None, index: Tensor, output: Output | None) -> Tensor | None:
    """Return the probability of each image's target, None where the output tells none."""
    if table is None or output is None or output == "numbers":
        return None
    return probabilities(table, output).gather(1, index[:, None]).squeeze(1).cpu()
