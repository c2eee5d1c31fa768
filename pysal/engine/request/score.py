"""What a model's output is taken for, and which number of it `score=` means: the one rule that everything follows.

The target's column of the output is explained as

=================  ===================================================================================================
"auto"             the target's probability where the output tells one, else the number itself
"probability"      the target's probability; of one number per image, that number, which must then lie in [0, 1]
"log_probability"  the natural logarithm of the same
"logit", "raw"     the output as it is; "logit" names it after what the output is taken for, "raw" says that it is a number
"softmax"          the softmax over the columns, and "log_softmax" its logarithm: the output is logits of classes that exclude
                   each other
"sigmoid"          the sigmoid of the column, and "log_sigmoid" its logarithm: each column is a logit of its own, of independent
                   labels or of a binary classifier
=================  ===================================================================================================

The first three depend on what the output is. It is found out from the output on all unchanged images of a call, together and
once:

- one column: a number with a unit of its own; a regression cannot be told from a binary classifier's logit;
- values in [0, 1] whose rows sum to 1: class probabilities, taken as they are;
- values in [0, 1] whose rows do not: probabilities of independent labels, taken as they are;
- anything else: class logits, of which the softmax is taken. Logarithms of probabilities are such logits; logits of independent
  labels cannot be told from them.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

ScoreKind: TypeAlias = Literal[
    "auto", "probability", "log_probability", "logit", "raw", "softmax", "log_softmax", "sigmoid", "log_sigmoid"
]
SCORE_KINDS: tuple[str, ...] = get_args(ScoreKind)
# Kinds whose meaning depends on what the output is.
FOUND_OUT = ("auto", "probability", "log_probability")

Output: TypeAlias = Literal["numbers", "probabilities", "labels", "logits", "log_probabilities", "label_logits"]
OUTPUTS: dict[str, str] = {
    "numbers": "plain numbers",
    "probabilities": "class probabilities",
    "labels": "probabilities of independent labels",
    "logits": "class logits",
    "log_probabilities": "class log-probabilities",
    "label_logits": "logits of independent labels",
}
"""What an output can be taken for, in words. The last is never found out, only said."""

How: TypeAlias = Literal["as it is", "log", "softmax", "log_softmax", "sigmoid", "log_sigmoid"]

# By how much a probability may leave [0, 1], which averages and float32 arithmetic do.
BEYOND = 1e-4
# By how much probabilities may miss a sum of 1: bfloat16 rounds each of them by up to 1 in 512, also where the model has turned
# them into float32 afterwards.
ROUNDING = 5e-3
# So many values in [0, 1] or fewer can be logits that happen to lie there.
FEW = 12


@dataclass
class Look:
    """What is known of a model's output, from all the unchanged images that were looked at.

    Attributes:
        output: what it is taken for; None before the first look.
        open: whether the pass that runs is over unchanged images, which tell what the output is.
        changed: whether a later part of the pass has corrected what an earlier one was scored by.
        values: how many numbers have been seen in the pass.
    """

    output: Output | None = None
    open: bool = False
    changed: bool = False
    values: int = 0
    in_unit: bool = True
    sums_to_one: bool = True
    logs: bool = True

    def begin(self) -> None:
        """Start a pass over all unchanged images, or start it again."""
        self.open, self.changed, self.values = True, False, 0

    def end(self) -> None:
        """Keep what was found for good."""
        self.open = False

    def add(self, table: Tensor) -> None:
        """Look at the output (N, K) for some of the unchanged images; rows with a NaN tell nothing."""
        table = table.detach()
        rows = table[~table.isnan().any(1)]
        self.values += table.numel()
        before = self.output
        if table.shape[1] == 1:
            self.in_unit &= _in_unit(rows)
            self.output = "numbers"
            return
        if len(rows):
            self.in_unit = self.in_unit and _in_unit(rows)
            self.sums_to_one = self.sums_to_one and self.in_unit and _sums_to_one(rows)
            self.logs = self.logs and bool((rows <= BEYOND).all()) and _sums_to_one(rows.exp())
        elif before is None:
            self.in_unit = self.sums_to_one = self.logs = False  # nothing is known: logits, as those of most models
        if self.in_unit:
            self.output = "probabilities" if self.sums_to_one else "labels"
        else:
            self.output = "log_probabilities" if self.logs else "logits"
        self.changed = self.changed or (before is not None and how("probability", before) != how("probability", self.output))

    @property
    def is_a_guess(self) -> bool:
        """Whether few values say that they are probabilities of labels."""
        return self.output == "labels" and 0 < self.values <= FEW

    @property
    def lies_in_unit(self) -> bool:
        """Whether many values all lie in [0, 1]."""
        return self.in_unit and self.values > FEW


def _in_unit(rows: Tensor) -> bool:
    return bool((rows >= -BEYOND).all()) and bool((rows <= 1 + BEYOND).all())


def _sums_to_one(rows: Tensor) -> bool:
    return bool(((rows.sum(1) - 1).abs() < ROUNDING).all())


def follows(table: Tensor, output: Output) -> Tensor:
    """Return (N,): whether a row of outputs (N, K) can be what the model's output was taken for on other images."""
    if output not in ("probabilities", "labels"):
        return torch.ones(len(table), dtype=torch.bool, device=table.device)
    return ((table >= -BEYOND) & (table <= 1 + BEYOND)).all(1)


def how(kind: ScoreKind, output: Output | None) -> How:
    """Return what is done to an output of this kind for a score of that kind."""
    if kind in ("raw", "logit"):
        return "as it is"
    if kind not in FOUND_OUT:
        return kind  # type: ignore[return-value]
    assert output is not None  # the unchanged images have been looked at
    if output in ("logits", "log_probabilities"):
        return "log_softmax" if kind == "log_probability" else "softmax"
    return "log" if kind == "log_probability" else "as it is"


def scaled(table: Tensor, how: How) -> Tensor:
    """Return the scores of a table of outputs (N, K)."""
    if how == "softmax":
        return torch.softmax(table, 1)
    if how == "log_softmax":
        return torch.log_softmax(table, 1)
    if how == "sigmoid":
        return torch.sigmoid(table)
    if how == "log_sigmoid":
        return torch.nn.functional.logsigmoid(table)
    # 0 has a logarithm that no difference can be taken of
    return table.clamp_min(torch.finfo(table.dtype).tiny).log() if how == "log" else table


def probabilities(table: Tensor, output: Output) -> Tensor:
    """Return the probability of each class or label of a table of outputs (N, K) that are no plain numbers."""
    return scaled(table, "sigmoid" if output == "label_logits" else how("probability", output))


def taken_for(kind: ScoreKind, found: Output) -> Output:
    """Return what an output is taken for: what the user's word for the score says, else what was found out."""
    if kind == "raw":
        return "numbers"
    if kind in ("sigmoid", "log_sigmoid"):
        return "label_logits"
    if kind in ("softmax", "log_softmax"):
        return "log_probabilities" if found == "log_probabilities" else "logits"
    if kind in ("probability", "log_probability") and found == "numbers":
        return "labels"
    return found


def settled(kind: ScoreKind, output: Output) -> ScoreKind:
    """Return a kind that scores any other image in the same way, whatever its output alone could be taken for."""
    found = how(kind, output)
    return "raw" if found == "as it is" else "log_probability" if found == "log" else found


def unit(kind: str, output: str) -> str:
    """Return the unit of a score in a word: "probability", "log probability", "logit", "output" or "score"."""
    if kind == "callable":
        return "score"
    if kind in ("raw", "auto", "logit") and output == "numbers":
        return "output"
    if kind == "raw":
        return "output"
    if kind == "logit":
        as_it_is = {"probabilities": "probability", "labels": "probability", "log_probabilities": "log probability"}
        return as_it_is.get(output, "logit")
    return "log probability" if kind.startswith("log_") else "probability"


def noun(kind: str, output: str) -> str:
    """Return what the target's column is called where it has no name: "class", "label" or "output"."""
    if kind == "raw" or output == "numbers":
        return "output"
    return "label" if kind in ("sigmoid", "log_sigmoid") or output in ("labels", "label_logits") else "class"


def saturation(kind: str, output: str, score: float) -> str:
    """Return what to do about a probability that is so near 0 or 1 that changes of the image hardly change it, or ""."""
    if unit(kind, output) != "probability" or 1e-4 <= score <= 0.9999 or not -BEYOND <= score <= 1 + BEYOND:
        return ""
    if score > 0.5:
        if output in ("probabilities", "labels"):
            return "probability near 1, where little changes it: the logits before the model's last layer show more"
        return "probability near 1, where little changes it: score='logit' shows more"
    log = f"log_{kind}" if kind in ("softmax", "sigmoid") else "log_probability"
    also = ", 'sigmoid' is for independent labels" if kind == "probability" and output == "logits" else ""
    return f"probability near 0, where little changes it: score={log!r} shows more{also}"
