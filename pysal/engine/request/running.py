"""How a model is run on images and which number of its output is meant: the five arguments that every public function has."""

from dataclasses import dataclass

import torch

from pysal._checks import FLOATING, refuse, refuse_unknown
from pysal.engine.request.extra_inputs import ExtraInputs
from pysal.engine.request.score import ScoreKind
from pysal.engine.running.precision import PRECISIONS, Arithmetic


@dataclass(frozen=True)
class Running:
    """The last arguments of every public function, which go on as one value.

    Their defaults stand in the public signatures alone. `pysal.gradient` has what each says to users; tests/test_signatures.py
    holds the other functions to it.

    Attributes:
        score: which number of the output is meant; see `engine.request.score`.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping); see
            `engine.request.extra_inputs`.
        batch_size: most rows in one model pass; None = as many as memory allows.
        precision: the arithmetic of the model passes; see `engine.running.precision`.
        dtype: of the result; None = float32, or float64 for float64 inputs.
    """

    score: ScoreKind
    extra_inputs: ExtraInputs
    batch_size: int | None
    precision: Arithmetic
    dtype: torch.dtype | None

    def check(self, where: str) -> None:
        """Refuse what no model can be run with.

        Raises:
            TypeError: a dtype that is none of floating point.
            ValueError: a batch size below 1, or an arithmetic that does not exist.
        """
        size = self.batch_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            refuse(where, "batch_size", "be None or a whole number of at least 1", repr(size))
        if self.precision not in (*PRECISIONS, "as set"):
            refuse_unknown(where, "precision", f"be one of {', '.join(map(repr, PRECISIONS))}", self.precision, PRECISIONS)
        if self.dtype is not None and self.dtype not in FLOATING:
            refuse(where, "dtype", "be a floating-point torch.dtype or None", self.dtype, TypeError)
