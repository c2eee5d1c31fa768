"""Class activation maps by name: what each channel of a layer says of each cell, and how that becomes one map.

A and G are a layer's activation and the gradient of the score there, (N, K, h, w) each, of float32 or float64. What a kind
makes of them are terms (N, K, h, w), added up over the channels unless the kind says how else they become a map. A positive
factor of the score is a factor of the map or changes nothing, but for Grad-CAM++ and Score-CAM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pysal._checks import refuse, refuse_unknown
from pysal._library import widened
from pysal.methods.traits import CAMS

SPACE = (2, 3)


@dataclass(frozen=True)
class Kind:
    """A way to make a map of a layer.

    Attributes:
        name: what `kind=` calls it.
        title: for people.
        terms: (A, G) -> terms (N, K, h, w), weights of the channels (N, K), or a map (N, 1, h, w); G is A where `gradient` is
            False.
        collapse: terms -> map (N, 1, h, w).
        gradient: whether G is needed.
        passes: what the weights of the channels take passes of their own for; `terms` is not asked then.
        curvature: c, where the kind is told G - c H A in the place of G, H being the score's second derivative.
        align_corners: of Score-CAM's masks, as `torch.nn.functional.interpolate` has it.
    """

    name: str
    title: str
    terms: Callable[[Tensor, Tensor], Tensor]
    collapse: Callable[[Tensor], Tensor]
    gradient: bool = True
    passes: Literal["none", "masked", "ablated"] = "none"
    curvature: float = 0.0
    align_corners: bool = False


KindName: TypeAlias = Literal[
    "grad_cam",
    "hirescam",
    "layer_cam",
    "grad_cam_plus_plus",
    "xgrad_cam",
    "grad_cam_elementwise",
    "eigen_cam",
    "eigen_grad_cam",
    "seg_eigen_cam",
    "kpca_cam",
    "fem",
    "shapley_cam",
    "score_cam",
    "ablation_cam",
]
Kernel: TypeAlias = Literal["linear", "cosine", "sigmoid", "rbf", "poly"]


def total(terms: Tensor) -> Tensor:
    """Return the terms added up over the channels."""
    return terms.sum(1, keepdim=True)


def weighted(activations: Tensor, weights: Tensor) -> Tensor:
    """Return w_k A_k."""
    return weights[:, :, None, None] * activations


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0, numerator / denominator)


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return the weights mean(G_k): Selvaraju et al. 2016, arXiv:1610.02391, equation 1."""
    return gradients.mean(SPACE)


def hirescam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return G A: Draelos and Carin 2020, arXiv:2011.08891, equation 4."""
    return gradients * activations


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return relu(G) A: Jiang et al. 2021, IEEE TIP 30, equations 6 to 8."""
    return gradients.clamp_min(0) * activations


def grad_cam_elementwise(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return relu(G A): what each cell of each channel speaks for the score; Pillai and Pirsiavash 2021."""
    return (gradients * activations).clamp_min(0)


def grad_cam_plus_plus(activations: Tensor, gradients: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """Return the weights w_k = sum of alpha relu(G): Chattopadhyay et al. 2017, arXiv:1710.11063, equations 5 and 19.

    With the exponential of the score explained, alpha = G^2 / (2 G^2 + (sum A_k) G^3) = 1 / (2 + (sum A_k) G), which is how it
    is computed: the squares of small gradients vanish in float32. Where the denominator is 0, alpha is 0.

    Args:
        activations: A.
        gradients: G.
        epsilon: added to the denominator before it is divided by G^2; 0 in the paper.
    """
    sums = activations.sum(SPACE, keepdim=True)
    if epsilon:
        square = gradients.square()
        alpha = torch.where(gradients == 0, 0, square / (2 * square + sums * square * gradients + epsilon))
    else:
        alpha = quotient(torch.ones_like(gradients), 2 + sums * gradients)
    return (alpha * gradients.clamp_min(0)).sum(SPACE)


def xgrad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return the weights w_k = sum of G_k A_k / sum of A_k: Fu et al. 2020, arXiv:2008.02312, equation 7."""
    return quotient((gradients * activations).sum(SPACE), activations.sum(SPACE))


def alone(activations: Tensor, _gradients: Tensor) -> Tensor:
    """Return A."""
    return activations


def seg_eigen(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return |G| A: Chung and Ying 2025, Applied Sciences 15, equation 10."""
    return gradients.abs() * activations


def fem(activations: Tensor, _gradients: Tensor, *, k: float = 2.0) -> Tensor:
    """Return w_k A_k, w_k = the share of cells above the channel's mean + k standard deviations: Fuad et al. 2020."""
    limit = activations.mean(SPACE, keepdim=True) + k * activations.std(SPACE, correction=0, keepdim=True)
    return weighted(activations, (activations > limit).to(activations.dtype).mean(SPACE))


def _cells(terms: Tensor, *, centred: bool) -> Tensor:
    """Return the terms as rows (N, h w, K) in the widest dtype, less their mean where they are `centred`."""
    rows = widened(terms.detach()).flatten(2).mT
    rows = torch.where(rows.isnan(), 0, rows)
    return rows - rows.mean(1, keepdim=True) if centred else rows


def _with_sign(projection: Tensor, terms: Tensor, by: Literal["terms", "largest"]) -> Tensor:
    """Return a projection (N, h w), whose sign means nothing, as a map (N, 1, h, w) with one that does.

    By the "terms": it goes with their sum over the channels, rather than against it. By the "largest": its largest value is
    positive; so, too, where it goes neither with nor against.
    """
    largest = projection.gather(1, projection.abs().argmax(1, keepdim=True)).squeeze(1)
    sign = largest
    if by == "terms":
        along = (projection * _cells(terms, centred=False).sum(2)).sum(1)
        sign = torch.where(along == 0, largest, along)
    signed = torch.where((sign < 0)[:, None], -projection, projection)
    return signed.reshape(len(terms), 1, *terms.shape[2:]).to(terms.dtype)


def projection(terms: Tensor, *, centred: bool = True, sign: Literal["terms", "largest"] = "terms") -> Tensor:
    """Return the cells' coordinates along the direction in which they differ most, (N, 1, h, w).

    With M the cells' rows of K terms it is M v, v the first right singular vector of M: from the smaller of the two Gram
    matrices, whose eigenvectors are the same.

    Args:
        terms: (N, K, h, w).
        centred: whether the mean row is taken away first: then it is the first principal component.
        sign: see `_with_sign`.
    """
    rows = _cells(terms, centred=centred)
    if rows.shape[1] <= rows.shape[2]:
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        found = vectors[:, :, -1] * values[:, -1:].clamp_min(0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(rows.mT @ rows)
        found = (rows @ vectors[:, :, -1:]).squeeze(2)
    return _with_sign(found, terms, sign)


def kernel_projection(terms: Tensor, *, kernel: Kernel = "sigmoid", gamma: float | None = None) -> Tensor:
    """Return the cells' first principal component in a kernel's space: Karmani et al. 2024, arXiv:2410.00267.

    Args:
        terms: (N, K, h, w).
        kernel: with r and s rows of two cells, "sigmoid" is tanh(gamma r s + 1), "rbf" exp(-gamma |r - s|^2), "poly"
            (gamma r s + 1)^3, "linear" r s, "cosine" r s / (|r| |s|).
        gamma: None = 1 / K.
    """
    rows = _cells(terms, centred=True)
    scale = 1 / rows.shape[2] if gamma is None else gamma
    products = rows @ rows.mT
    squares = rows.square().sum(2)
    gram = {
        "linear": lambda: products,
        "cosine": lambda: quotient(products, (squares[:, :, None] * squares[:, None]).sqrt()),
        "sigmoid": lambda: (scale * products + 1).tanh(),
        "rbf": lambda: (-scale * (squares[:, :, None] + squares[:, None] - 2 * products).clamp_min(0)).exp(),
        "poly": lambda: (scale * products + 1) ** 3,
    }[kernel]()
    centred = gram - gram.mean(1, keepdim=True) - gram.mean(2, keepdim=True) + gram.mean((1, 2), keepdim=True)
    values, vectors = torch.linalg.eigh(centred)
    return _with_sign(vectors[:, :, -1] * values[:, -1:].clamp_min(0).sqrt(), terms, "largest")


def uncentred(terms: Tensor) -> Tensor:
    """Return Eigen-CAM's projection, its largest value positive: Muhammad and Yeasin 2020, arXiv:2008.00299, equations 2, 3."""
    return projection(terms, centred=False, sign="largest")


def largest_positive(terms: Tensor) -> Tensor:
    """Return the first principal component, its largest value positive: Chung and Ying 2025, equations 11 to 13."""
    return projection(terms, sign="largest")


def _kind(name: KindName, terms: Callable[[Tensor, Tensor], Tensor], collapse: Callable[[Tensor], Tensor], **how: Any) -> Kind:
    return Kind(name, CAMS[name], terms, collapse, **how)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _kind("grad_cam", grad_cam, total),
        _kind("hirescam", hirescam, total),
        _kind("layer_cam", layer_cam, total),
        _kind("grad_cam_plus_plus", grad_cam_plus_plus, total),
        _kind("xgrad_cam", xgrad_cam, total),
        _kind("grad_cam_elementwise", grad_cam_elementwise, total),
        _kind("eigen_cam", alone, uncentred, gradient=False),
        _kind("eigen_grad_cam", hirescam, projection),
        _kind("seg_eigen_cam", seg_eigen, largest_positive),
        _kind("kpca_cam", alone, kernel_projection, gradient=False),
        _kind("fem", fem, total, gradient=False),
        # the mean of G - H A / 2, times A_k: Cai 2025, arXiv:2501.06261, equation 11
        _kind("shapley_cam", grad_cam, total, curvature=0.5),
        _kind("score_cam", alone, total, gradient=False, passes="masked"),
        _kind("ablation_cam", alone, total, gradient=False, passes="ablated"),
    )
}


def kind_of(where: str, kind: object) -> Kind:
    """Return a kind by its name, or made of a function (A, G) -> terms, weights or a map.

    Raises:
        ValueError: there is none of that name.
        TypeError: neither a name nor a function.
    """
    if isinstance(kind, Kind):
        return kind
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    if callable(kind):
        return Kind("own", str(getattr(kind, "__name__", type(kind).__name__)), kind, total)
    names = ", ".join(map(repr, KINDS))
    error = ValueError if isinstance(kind, str) else TypeError
    refuse_unknown(where, "kind", f"be a function or one of {names}", kind, KINDS, error)


def made(kind: Kind, where: str, activations: Tensor, gradients: Tensor, *, smooth: bool, weights: Tensor | None) -> Tensor:
    """Return the map (N, 1, h, w) of a kind, before what is negative becomes 0.

    Args:
        kind: which.
        where: the public name of the method, for errors.
        activations: A.
        gradients: G, or A where the kind needs no gradient.
        smooth: whether the terms become their first principal component.
        weights: (N, K), of a kind that finds them by passes.

    Raises:
        ValueError: the kind is a function that returns something else than terms, weights or a map.
    """
    found: Any = weighted(activations, weights) if weights is not None else kind.terms(activations, gradients)
    number, channels, *size = activations.shape
    shape = tuple(found.shape) if isinstance(found, Tensor) else None
    if shape == (number, channels):
        found = weighted(activations, found)
    elif shape == (number, 1, *size) or shape == (number, *size):
        return found.reshape(number, 1, *size)  # type: ignore[no-any-return]
    elif shape != tuple(activations.shape):
        got = type(found).__name__ if shape is None else f"shape {shape}"
        wanted = f"{(number, channels, *size)}, {(number, channels)} or {(number, 1, *size)}"
        refuse(where, "kind", f"return a tensor of shape {wanted}", got)
    if not smooth or kind.collapse not in (total, uncentred):  # what is a principal component already stays it
        return kind.collapse(found)
    # activations add up to nothing that speaks for or against the score: behind a layer norm, to 0
    return projection(found, sign="largest" if kind.collapse is uncentred else "terms")


def unit(maps: Tensor) -> Tensor:
    """Return maps (N, ...) each scaled to [0, 1] by its least and largest value; 0 where all of it is the same."""
    flat = maps.flatten(1)
    least, largest = flat.amin(1), flat.amax(1)
    shape = (len(maps), *[1] * (maps.ndim - 1))
    return quotient(maps - least.reshape(shape), (largest - least).reshape(shape))
