"""Embeddings: how alike an image is to a text or another image, or how far it is from nothing."""

import math
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pysal._checks import check_choice, refuse
from pysal.engine.request.target import Call, CallTarget
from pysal.engine.running.states import outside_inference
from pysal.targets.outputs import Field, embedding_of

Kind: TypeAlias = Literal["cosine", "dot"]


class Similarity(CallTarget):
    """How alike the embedding of an image is to another embedding: of a text, as CLIP has it, or of an image, as DINO has it.

    Args:
        to: (D,) for all images, or (B, D) of each.
        kind: "cosine" of the angle between them, 0 with a gradient of 0 for an embedding of zeros; or their "dot" product.
        field: the name of the output's entry; None = the output itself, `image_embeds` or `pooler_output`.
        token: which token's, of an output (N, T, D): 0 is the class token of most vision transformers.

    Raises:
        TypeError: no numbers.
        ValueError: another shape, numbers that are not finite, or zeros alone.

    Example:
        >>> import pysal
        >>> embed = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16)).eval()
        >>> pysal.gradient(embed, torch.rand(2, 3, 8, 8), pysal.targets.Similarity(torch.ones(16))).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self, to: Tensor | np.ndarray[Any, Any], *, kind: Kind = "cosine", field: Field | None = None, token: int | None = None
    ) -> None:
        where = "pysal.targets.Similarity"
        check_choice(where, "kind", kind, ("cosine", "dot"))
        if not isinstance(to, (Tensor, np.ndarray, list, tuple)):
            refuse(where, "to", "be an embedding (D,) or (B, D)", type(to).__name__, TypeError)
        try:
            found = torch.as_tensor(to, device="cpu").detach().to(torch.float64)
        except (TypeError, ValueError, RuntimeError):
            refuse(where, "to", "be an embedding (D,) or (B, D)", " ".join(repr(to).split())[:80], TypeError)
        if found.ndim not in (1, 2) or not found.numel():
            refuse(where, "to", "have shape (D,) or (B, D)", tuple(found.shape))
        if not bool(found.isfinite().all()):
            refuse(where, "to", "be finite", "NaN or infinity")
        if not bool(found.any(-1).all()):
            refuse(where, "to", "not be zeros alone", "zeros")
        self.to, self.kind, self.field, self.token = found, kind, field, _checked_token(where, token)
        self.__name__ = "similarity" if kind == "cosine" else "dot product"

    own: Tensor

    def of_call(self, call: Call) -> Self:
        """Return a copy for one call."""
        ready = super().of_call(call)
        if self.to.ndim == 2 and len(self.to) not in (1, call.images):
            refuse(call.where, "target.to", f"be (D,), or (B, D) for {call.images} images", tuple(self.to.shape))
        to = self.to if self.kind == "dot" else self.to / self.to.norm(dim=-1, keepdim=True)
        ready.own = outside_inference(lambda: to.expand(call.images, to.shape[-1]).clone())
        return ready

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        found = embedding_of(self.call.where, output, len(rows), self.field, self.token)
        if found.shape[1] != self.own.shape[1]:
            requirement = f"have the {found.shape[1]} numbers of the model's embeddings"
            refuse(self.call.where, "target.to", requirement, self.own.shape[1])
        if self.kind == "cosine":
            length = torch.linalg.vector_norm(found, dim=1, keepdim=True)
            found = found / torch.where(length > 0, length, float("inf"))  # an embedding of zeros: 0, of gradient 0
        return (found * self.own[rows.cpu()].to(found)).sum(1)


class Norm(CallTarget):
    """The norm of an image's embedding.

    Args:
        order: of the norm, above 0; infinity for the largest magnitude.
        field: the name of the output's entry; None = the output itself, `image_embeds` or `pooler_output`.
        token: which token's, of an output (N, T, D): 0 is the class token of most vision transformers.

    Raises:
        ValueError: an order that is not above 0.

    Example:
        >>> import pysal
        >>> embed = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16)).eval()
        >>> pysal.gradient(embed, torch.rand(2, 3, 8, 8), pysal.targets.Norm()).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, order: float = 2, *, field: Field | None = None, token: int | None = None) -> None:
        if isinstance(order, bool) or not isinstance(order, (int, float)) or math.isnan(order) or order <= 0:
            refuse("pysal.targets.Norm", "order", "be above 0", repr(order))
        self.order, self.field, self.token = order, field, _checked_token("pysal.targets.Norm", token)
        self.__name__ = "norm of the embedding"

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        found = embedding_of(self.call.where, output, len(rows), self.field, self.token)
        norms: Tensor = torch.linalg.vector_norm(found, self.order, dim=1)
        return norms


def _checked_token(where: str, token: object) -> int | None:
    if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
        refuse(where, "token", "be the number of a token", repr(token), TypeError)
    return token
