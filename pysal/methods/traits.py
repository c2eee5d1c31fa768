"""What there is to say of each method without running it. Reading it does not import torch, which takes seconds."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Traits:
    """A method in words and figures.

    Attributes:
        name: the public function's.
        title: for people.
        summary: what the map says, in a line.
        cost: model passes per image, in words.
        unit: of the map's values, "{score}" being what is explained; of SmoothGrad's maps it is the base method's.
        reduction: how its channels become one picture: "none" where there is one, "max_abs" or "sum".
        signed: whether that picture has a sign.
        per: the option that the cost is multiplied by.
        stored: what an audit stores of it: the "drops" of its segments, its "map", or the map at its "native" size.
        forward: whether it runs forward passes alone.
        slopes: whether the values are slopes of the score, to be multiplied by a change of the pixels, or shares of it.
        on_path: whether it integrates along a path, so that its steps can be too few.
        noisy: whether it draws noise, which a seed and ids of the images pick.
        page: what the page of `pysal demo` says for the summary, where a control there changes it.
        hint: what the method's own picture cannot say by itself.
    """

    name: str
    title: str
    summary: str
    cost: str
    unit: str
    reduction: Literal["none", "max_abs", "sum"]
    signed: bool
    per: str | None = None
    stored: Literal["drops", "map", "native"] = "map"
    forward: bool = False
    slopes: bool = False
    on_path: bool = False
    noisy: bool = False
    page: str | None = None
    hint: str = ""


TRAITS: dict[str, Traits] = {
    traits.name: traits
    for traits in (
        Traits(
            "leave_one_out",
            "Leave-one-out",
            "how much the score drops when a segment is filled in",
            "1 forward per segment, + 1",
            unit="drop of {score}",
            reduction="none",
            signed=True,
            stored="drops",
            forward=True,
        ),
        Traits(
            "gradient",
            "Gradient",
            "how strongly the score reacts to each pixel",
            "1 forward and backward",
            unit="|d {score} / d value|",
            reduction="max_abs",
            signed=False,
            slopes=True,
        ),
        Traits(
            "guided_backprop",
            "Guided backprop",
            "the gradient through what excites the score only",
            "1 forward and backward",
            unit="|guided d {score} / d value|",
            reduction="max_abs",
            signed=False,
            slopes=True,
            hint="Sharp, but much the same for any class.",
        ),
        Traits(
            "grad_cam",
            "Grad-CAM",
            "where a layer's features speak for the class",
            "1 forward, backward to the layer",
            unit="weighted activation",
            reduction="none",
            signed=False,
            stored="native",
            hint="As coarse as the layer it looks at.",
        ),
        Traits(
            "guided_grad_cam",
            "Guided Grad-CAM",
            "guided backprop where Grad-CAM looks",
            "1 forward, 2 backward",
            unit="gradient x activation",
            reduction="max_abs",
            signed=False,
            slopes=True,
            hint="Guided backprop, where Grad-CAM looks.",
        ),
        Traits(
            "smooth_grad",
            "SmoothGrad",
            "the mean gradient over noisy copies",
            "1 forward and backward per sample",
            unit="",
            reduction="max_abs",
            signed=False,
            per="samples",
            slopes=True,
            noisy=True,
            page="the mean of the maps of noisy copies",
        ),
        Traits(
            "integrated_gradients",
            "Integrated Gradients",
            "each pixel's share of the score, from a black image",
            "1 forward and backward per step",
            unit="{score} per pixel",
            reduction="sum",
            signed=True,
            per="steps",
            on_path=True,
            page="each pixel's share of the score, counted from a baseline",
        ),
        Traits(
            "blur_integrated_gradients",
            "Blur Integrated Gradients",
            "each pixel's share of the score, from a blurred image",
            "1 forward and backward per step",
            unit="{score} per pixel",
            reduction="sum",
            signed=True,
            per="steps",
            on_path=True,
        ),
    )
}

# Methods that run where they are named, and that "all" leaves out: they take many passes, or are for some models.
BY_NAME: dict[str, Traits] = {
    traits.name: traits
    for traits in (
        Traits(
            "guided_integrated_gradients",
            "Guided Integrated Gradients",
            "each pixel's share of the score, on a path of small gradients",
            "1 forward and backward per step",
            unit="{score} per pixel",
            reduction="sum",
            signed=True,
            per="steps",
            on_path=True,
        ),
        Traits(
            "xrai",
            "XRAI",
            "the mean share of the region that a pixel belongs to",
            "1 forward and backward per step and baseline",
            unit="{score} per pixel",
            reduction="none",
            signed=True,
            per="steps",
            on_path=True,
        ),
        Traits(
            "shapley",
            "Shapley values",
            "each segment's share of the score",
            "1 forward per set of segments, at most",
            unit="share of {score}",
            reduction="none",
            signed=True,
            per="passes",
            forward=True,
            noisy=True,
        ),
        Traits(
            "interactions",
            "Interactions",
            "whether a segment needs others, or stands in for them",
            "1 forward per segment and pair, at most",
            unit="interaction of {score}",
            reduction="none",
            signed=True,
            per="passes",
            forward=True,
        ),
        Traits(
            "rise",
            "RISE",
            "the mean score of masked images that show a pixel",
            "1 forward per mask",
            unit="{score} where shown",
            reduction="none",
            signed=False,
            per="samples",
            forward=True,
            noisy=True,
        ),
        Traits(
            "legrad",
            "LeGrad",
            "which patches' attention would raise the score",
            "1 forward and backward",
            unit="d {score} / d attention",
            reduction="none",
            signed=False,
            stored="native",
            hint="Of transformers alone, as coarse as their patches.",
        ),
        Traits(
            "gradient_attention",
            "Gradient x attention",
            "which patches' attention speaks for the score",
            "1 forward and backward",
            unit="gradient x attention",
            reduction="none",
            signed=False,
            stored="native",
            hint="Of transformers alone, as coarse as their patches.",
        ),
    )
}


@dataclass(frozen=True)
class ModeWords:
    """What a map says where an option changes it, in words; `signed`: that it has a sign then."""

    title: str
    unit: str
    signed: bool = False


MODES = {
    "out": ModeWords(TRAITS["leave_one_out"].title, TRAITS["leave_one_out"].unit),
    "in": ModeWords("Keep-one-in", "gain of {score}"),
    "both": ModeWords("Out and in, mean", "mean of drop and gain of {score}"),
}
# What "mode" in the details of a method means.
MODE_WORDS = {**MODES, "centred": ModeWords("RISE, centred", "change of {score}", signed=True)}
# Trees of segments, as `shapley(tree=)` calls them.
TREES = ("halves", "merged", "flat")
# Kinds of class activation map, as `grad_cam(kind=)` calls them, and what people call them.
CAMS = {
    "grad_cam": TRAITS["grad_cam"].title,
    "hirescam": "HiResCAM",
    "layer_cam": "LayerCAM",
    "grad_cam_plus_plus": "Grad-CAM++",
    "xgrad_cam": "XGrad-CAM",
    "grad_cam_elementwise": "Element-wise Grad-CAM",
    "eigen_cam": "Eigen-CAM",
    "eigen_grad_cam": "EigenGrad-CAM",
    "seg_eigen_cam": "Seg-Eigen-CAM",
    "kpca_cam": "KPCA-CAM",
    "fem": "FEM",
    "shapley_cam": "ShapleyCAM",
    "score_cam": "Score-CAM",
    "ablation_cam": "Ablation-CAM",
}
# Methods that integrate along a path.
PATHS = tuple(name for name, traits in TRAITS.items() if traits.on_path)


def stores_drops(name: str) -> bool:
    """Whether an audit keeps the drops of segments of a method, which a manifest may name without there being one."""
    traits = TRAITS.get(name)
    return traits is not None and traits.stored == "drops"
