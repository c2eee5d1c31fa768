"""One call, several methods, one answer: what `explain` returns, how it is shown, written and read back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

Detail = Tensor | list[Tensor] | str | float | int


@dataclass(frozen=True, eq=False)
class MethodResult:
    """What one method found, for the whole batch.

    Attributes:
        name: the public function, "integrated_gradients".
        title: what a reader calls it, "Integrated Gradients".
        map: (B, C, H, W) or (B, 1, H, W), floating point, CPU, unnormalised.
        reduction: how the channels become one picture: "max_abs", "sum" or "none" (the map has one channel).
        signed: whether the picture has two directions (for and against the target) or one.
        seconds: wall time of the method on the whole batch.
        passes: model passes per image, None where nobody counted.
        details: what else the method found. Known names: "residual" (B,), "standard_error" (B, 1, H, W), "drops" (B, S) or
            one (S_b,) tensor per image, "labels" (B, H, W) or "boxes" (S, 4) that say where the drops are, "layer",
            "steps". Others are kept and written.
    """

    name: str
    title: str
    map: Tensor
    reduction: str
    signed: bool
    seconds: float
    passes: int | None = None
    details: dict[str, Detail] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a model answered as it did, by several methods, for a batch of images.

    Attributes:
        images: (B, C, H, W) as the model was given them; [0, 1] is shown as it is, other ranges are rescaled for drawing.
        target: (B,) int64 class index, -1 where the target is a callable.
        target_names: B names, "Egyptian cat".
        scores: (B,) the score explained.
        score_kind: "probability", "logit", "log_probability" or "callable".
        probabilities: (B,) softmax probability of the target, None where the target is no class.
        results: method name -> MethodResult, in the order they are shown.
        model_name: what the model is called in pictures and tables.
        seconds: wall time of the whole call.
        build: `pysal.build_info()` at the time of the call.
    """

    images: Tensor
    target: Tensor
    target_names: list[str]
    scores: Tensor
    score_kind: str
    probabilities: Tensor | None
    results: dict[str, MethodResult]
    model_name: str = ""
    seconds: float = 0.0
    build: dict[str, object] = field(default_factory=dict)

    @property
    def maps(self) -> dict[str, Tensor]:
        """The maps by method name, in the order of `results`."""
        return {name: result.map for name, result in self.results.items()}

    def __getitem__(self, name: str) -> MethodResult:
        """Return the result of method `name`."""
        return self.results[name]
