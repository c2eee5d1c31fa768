"""Words: how likely a model that writes about an image finds the next token, or a text."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pysal._checks import refuse
from pysal.engine.request.target import Call, CallTarget
from pysal.engine.running.states import outside_inference
from pysal.targets.outputs import Field, tokens_of

# What turns a text into tokens: a tokenizer of transformers, whose answer holds `input_ids`, or a function that returns them.
Tokenizer: TypeAlias = Callable[..., Any]
Tokens: TypeAlias = str | Sequence[int] | Tensor | np.ndarray[Any, Any]


class Token(CallTarget):
    """The logarithm of the probability of a next token, after the text that the model was given.

    Args:
        token: its number; or a text, with `tokenizer`, which must be a single token.
        at: the place of the text after which it would come: -1 the last one, 0 the first.
        tokenizer: what turns the text into tokens.
        field: the name of the output's entry, or its place in a tuple, where it has several.

    Raises:
        TypeError: no number.
        ValueError: a text of no token, or of several.

    Example:
        >>> import pysal
        >>> def captioner(images, tokens):  # scores (N, T, 3) of the next token at each of T places
        ...     return images.mean((1, 2, 3))[:, None, None] * torch.tensor([0.0, 1.0, 2.0]) + 0 * tokens[None, :, None]
        >>> images, prompt = torch.rand(2, 3, 8, 8), torch.tensor([0, 1, 1, 2])
        >>> pysal.gradient(captioner, images, pysal.targets.Token(2), extra_inputs=[pysal.Shared(prompt)]).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self, token: int | str, *, at: int = -1, tokenizer: Tokenizer | None = None, field: Field | None = None
    ) -> None:
        where = "pysal.targets.Token"
        self.__name__ = f"token {token!r}" if isinstance(token, str) else f"token {token}"
        if isinstance(token, str):
            numbers = _tokens(where, "token", token, tokenizer, special=False)[0].tolist()
            if len(numbers) != 1:
                refuse(
                    where,
                    "token",
                    "be a single token (pysal.targets.Caption takes several)",
                    f"{token!r} ({len(numbers)} tokens)",
                )
            token = numbers[0]
        try:
            if isinstance(token, (bool, str)):
                raise TypeError
            self.token, self.at = operator.index(token), operator.index(at)
        except TypeError:
            refuse(where, "token", "be the number of a token, at a place", f"{token!r} at {at!r}", TypeError)
        if self.token < 0:
            refuse(where, "token", "be 0 or more", self.token)
        self.field = field

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        where = self.call.where
        logits = tokens_of(where, output, len(rows), self.field)
        places, known = logits.shape[1:]
        if not -places <= self.at < places:
            refuse(where, "target.at", f"be a place of a text of {places} tokens", self.at)
        if self.token >= known:
            refuse(where, "target", f"be below the model's {known} tokens", f"token {self.token}")
        return logits[:, self.at].log_softmax(-1)[:, self.token]


class Caption(CallTarget):
    """The logarithm of the probability of a text, or of some words of it, given the image and the words before.

    The model is given the tokens too (`extra_inputs=`), and says at each place what comes next.

    Args:
        tokens: (T,) for all images or (B, T) of each, numbers of tokens as the model is given them; or a text, with
            `tokenizer`.
        first: the first token that counts, 1 or more: nothing says what the text begins with.
        last: the token after the last that counts; None = the end. A word of a caption is `first` to `last` of its tokens.
        tokenizer: what turns the text into tokens.
        field: the name of the output's entry, or its place in a tuple, where it has several.

    Raises:
        TypeError: no numbers of tokens.
        ValueError: fewer than two tokens, or none between `first` and `last`.

    Example:
        >>> import pysal
        >>> def captioner(images, tokens):  # scores (N, T, 3) of the next token at each of T places
        ...     return images.mean((1, 2, 3))[:, None, None] * torch.tensor([0.0, 1.0, 2.0]) + 0 * tokens[None, :, None]
        >>> images, text = torch.rand(2, 3, 8, 8), torch.tensor([0, 1, 1, 2])
        >>> target = pysal.targets.Caption(text, first=1, last=3)
        >>> pysal.gradient(captioner, images, target, extra_inputs=[pysal.Shared(text)]).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        first: int = 1,
        last: int | None = None,
        tokenizer: Tokenizer | None = None,
        field: Field | None = None,
    ) -> None:
        where = "pysal.targets.Caption"
        self.tokens, self.field = _tokens(where, "tokens", tokens, tokenizer, special=True), field
        length = self.tokens.shape[-1]
        if length < 2:
            refuse(where, "tokens", "hold at least 2 tokens, of which the first is given", length)
        for name, value in (("first", first), ("last", last)):
            if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
                refuse(where, name, "be a whole number", repr(value), TypeError)
        first, stop = operator.index(first), length if last is None else operator.index(last)
        if not 1 <= first < stop <= length:
            refuse(
                where, "first and last", f"be 1 or more and at most {length}, with a token between them", f"{first} and {stop}"
            )
        self.first, self.last = first, stop
        whole = (first, stop) == (1, length)
        self.__name__ = f"tokens {first} to {stop - 1}"
        if whole:
            self.__name__ = repr(tokens) if isinstance(tokens, str) else "the text"

    own: Tensor

    def of_call(self, call: Call) -> Self:
        """Return a copy for one call."""
        ready = super().of_call(call)
        if self.tokens.ndim == 2 and len(self.tokens) not in (1, call.images):
            refuse(call.where, "target.tokens", f"be (T,), or (B, T) for {call.images} images", tuple(self.tokens.shape))
        length = self.tokens.shape[-1]
        ready.own = outside_inference(lambda: self.tokens.to(call.device).expand(call.images, length).clone())
        return ready

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Return (N,) scores."""
        where, length = self.call.where, self.tokens.shape[-1]
        logits = tokens_of(where, output, len(rows), self.field)
        if logits.shape[1] not in (length, length - 1):
            requirement = f"say what comes next at each of the text's {length} tokens"
            refuse(where, "the model's output", requirement, f"shape {tuple(logits.shape)}")
        largest = int(self.tokens.max())
        if largest >= logits.shape[2]:
            refuse(where, "target", f"be below the model's {logits.shape[2]} tokens", f"token {largest}")
        said = logits[:, self.first - 1 : self.last - 1].log_softmax(-1)
        return said.gather(2, self.own[rows, self.first : self.last, None].to(said.device)).sum((1, 2))


def _tokens(where: str, argument: str, given: object, tokenizer: Tokenizer | None, *, special: bool) -> Tensor:
    """Return numbers of tokens, (T,) or (B, T)."""
    if isinstance(given, str):
        if tokenizer is None:
            refuse(where, "tokenizer", f"be given for {argument} in words", None)
        made = tokenizer(given) if special else _without_special(tokenizer, given)
        found = made["input_ids"] if hasattr(made, "keys") and "input_ids" in made else made
        if isinstance(found, Sequence) and not len(found):
            refuse(where, argument, "hold a token", repr(given))
        numbers = _numbers(where, "the tokenizer's answer", found)
        return numbers if numbers.ndim == 2 or special else numbers.reshape(1, -1)
    return _numbers(where, argument, given)


def _numbers(where: str, argument: str, given: object) -> Tensor:
    """Return numbers of tokens, (T,) or (B, T)."""
    try:
        numbers = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        refuse(where, argument, "be numbers of tokens (T,) or (B, T)", " ".join(repr(given).split())[:80], TypeError)
    if not numbers.numel():
        refuse(where, argument, "hold a token", "none")
    if numbers.dtype.is_floating_point or numbers.dtype.is_complex or numbers.dtype == torch.bool:
        refuse(where, argument, "be numbers of tokens", f"dtype {str(numbers.dtype).removeprefix('torch.')}", TypeError)
    if numbers.ndim not in (1, 2) or int(numbers.min()) < 0:
        got = tuple(numbers.shape) if numbers.ndim not in (1, 2) else int(numbers.min())
        refuse(where, argument, "be numbers of tokens (T,) or (B, T), 0 or more", got)
    return numbers.long()


def _without_special(tokenizer: Tokenizer, text: str) -> Any:
    """Return the tokens of a text alone, without those that mark its beginning and end."""
    try:
        return tokenizer(text, add_special_tokens=False)
    except TypeError:
        return tokenizer(text)
