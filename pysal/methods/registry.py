"""The methods by name: what `explain` and the command line offer, and how each map is drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pysal._checks import refuse, refuse_unknown
from pysal.engine.request.attribution import Attribution, default_of, with_defaults
from pysal.engine.request.plan import Plan
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.work import Work
from pysal.methods import (
    attention_maps,
    blur_integrated_gradients,
    grad_cam,
    gradient,
    guided_backprop,
    guided_integrated_gradients,
    integrated_gradients,
    interactions,
    leave_one_out,
    rise,
    shapley,
    smooth_grad,
    xrai,
)
from pysal.methods.traits import BY_NAME, TRAITS, Traits
from pysal.segments import Grid

_CORES = {
    **smooth_grad.BASES,
    "smooth_grad": with_defaults(smooth_grad.prepare, smooth_grad.smooth_grad),
    "guided_integrated_gradients": with_defaults(
        guided_integrated_gradients.prepare, guided_integrated_gradients.guided_integrated_gradients
    ),
    "xrai": with_defaults(xrai.prepare, xrai.xrai),
    "shapley": with_defaults(shapley.prepare, shapley.shapley),
    "rise": with_defaults(rise.prepare, rise.rise),
    "interactions": with_defaults(interactions.prepare, interactions.interactions),
    "legrad": with_defaults(attention_maps.prepare_legrad, attention_maps.legrad),
    "gradient_attention": with_defaults(attention_maps.prepare_gradient_attention, attention_maps.gradient_attention),
}
_PUBLIC = {
    function.__name__: function
    for function in (
        leave_one_out.leave_one_out,
        gradient.gradient,
        guided_backprop.guided_backprop,
        grad_cam.grad_cam,
        grad_cam.guided_grad_cam,
        smooth_grad.smooth_grad,
        integrated_gradients.integrated_gradients,
        blur_integrated_gradients.blur_integrated_gradients,
        guided_integrated_gradients.guided_integrated_gradients,
        xrai.xrai,
        shapley.shapley,
        interactions.interactions,
        attention_maps.legrad,
        attention_maps.gradient_attention,
        rise.rise,
    )
}


# A forward pass, in gradients.
FORWARD = 0.4
# Segments of an image where their number shows only once it is cut.
SEGMENTS = 100


@dataclass(frozen=True, kw_only=True)
class Method(Traits):
    """A method as `explain` sees it: what there is to say of it, and what runs.

    Attributes:
        prepare: the core, `prepare(plan, **options) -> Work`, with the public function's defaults.
        score: which score it explains unless told.
    """

    prepare: Callable[..., Work]
    score: ScoreKind

    def gradients(self, options: Mapping[str, Any]) -> float:
        """Return about how many gradients of the model the map of an image takes; no end of them, where it must be prepared.

        Args:
            options: of the method; those that are missing have their defaults.
        """
        public = _PUBLIC[self.name]
        pass_in_gradients = FORWARD if self.forward else 1.0
        if self.per is not None:
            return pass_in_gradients * float(options.get(self.per, default_of(public, self.per)))
        if self.stored != "drops":
            return 1.0
        if options.get("approximate") is not None:
            return math.inf
        segments = options.get("segments", default_of(public, "segments"))
        count = segments.rows * segments.cols if isinstance(segments, Grid) else SEGMENTS
        return pass_in_gradients * count

    def attribute(self, plan: Plan, **options: Any) -> Attribution:
        """Return what the method finds on a plan's images, with all that it reports."""
        return self.prepare(plan, **options).run(report=True)


def _method(traits: Traits) -> Method:
    """Return a method with the defaults of its public function, one of which its cost may be multiplied by."""
    public = _PUBLIC[traits.name]
    cost = traits.cost if traits.per is None else f"{traits.cost} ({default_of(public, traits.per)})"
    words = {**vars(traits), "cost": cost}
    return Method(**words, prepare=_CORES[traits.name], score=default_of(public, "score"))


METHODS: dict[str, Method] = {name: _method(traits) for name, traits in TRAITS.items()}
# And those that run where they are named, and that "all" leaves out.
EVERY: dict[str, Method] = METHODS | {name: _method(traits) for name, traits in BY_NAME.items()}


def check_method(where: str, method: object) -> str:
    """Return the name of a method that there is.

    Raises:
        ValueError: there is none of this name.
    """
    if not isinstance(method, str) or method not in EVERY:
        refuse_unknown(where, "method", f"be one of {', '.join(EVERY)}", method, EVERY)
    return method


def method_names(where: str, methods: object) -> list[str]:
    """Return the names that `methods`, "all" or names, stands for, each once; "all" leaves out those that are not usual.

    Raises:
        TypeError: neither text nor a sequence.
        ValueError: no name, or one that no method has.
    """
    if not isinstance(methods, Sequence):
        refuse(where, "methods", "be 'all', a name or a sequence of names", repr(methods), TypeError)
    names = list(METHODS) if methods == "all" else [methods] if isinstance(methods, str) else list(methods)
    known = list(EVERY)
    for name in names:
        if not isinstance(name, str) or name not in known:
            refuse_unknown(where, "methods", f"be 'all' or names out of {', '.join(known)}", name, known)
    if not names:
        refuse(where, "methods", "name at least one method", "none")
    return list(dict.fromkeys(names))
