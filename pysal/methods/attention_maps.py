"""LeGrad and gradient x attention: which patches a transformer's attention would have to look at more for a higher score."""

import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from pysal._checks import check_count, refuse
from pysal.engine.layers.default_layer import check_layered, reading_of
from pysal.engine.layers.features import Layer
from pysal.engine.layers.spatial import Reading
from pysal.engine.model.attention import SpelledOut
from pysal.engine.model.not_applicable import NotApplicable, not_differentiable
from pysal.engine.request.attribution import Attribution
from pysal.engine.request.extra_inputs import ExtraInputs, ordinary
from pysal.engine.request.plan import Model, Plan
from pysal.engine.request.running import Running
from pysal.engine.request.score import ScoreKind
from pysal.engine.request.target import Target
from pysal.engine.request.work import Work
from pysal.engine.running.chunks import is_out_of_memory
from pysal.engine.running.precision import Precision
from pysal.engine.running.states import Hooks, restoring
from pysal.methods.grad_cam import resized

Way: TypeAlias = Literal["legrad", "gradient_attention"]


def legrad(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    layers: int | None = None,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return how much each patch's attention would raise the score, as each block of a vision transformer would have it.

    With A_l the attention of block l and s_l the score of what the block returns, as the model's own head reads it, it is the
    mean of relu(ds_l / dA_l) over the blocks, the heads and all tokens that look; bilinear to the image's size.

    Args:
        model: an nn.Module in eval mode, with a stack of blocks in which every token attends to every token.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        layers: how many blocks count, from the last on; None = all.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, 1, H, W), 0 or more.

    Raises:
        TypeError: an argument of the wrong type or dtype, or a model that is no nn.Module.
        ValueError: a wrong shape, value or target, or more layers than there are.
        NotApplicable: the model has no such blocks.

    Source:
        Bousselham et al. 2024, arXiv:2404.03214, section 3, without the last scaling to [0, 1].
    """
    plan = Plan("pysal.legrad", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    return prepare_legrad(plan, layers=layers).run(report=False).map


def gradient_attention(
    model: Model,
    inputs: Tensor,
    target: Target = None,
    *,
    layers: int | None = None,
    score: ScoreKind = "logit",
    extra_inputs: ExtraInputs = (),
    batch_size: int | None = None,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the attention that each patch of a vision transformer gets, as far as it raises the score: gradient x attention.

    With A_l the attention of block l and s the score, it is the mean of relu(ds / dA_l) A_l over the blocks, the heads and all
    tokens that look; bilinear to the image's size.

    Args:
        model: see `legrad`.
        inputs: (B, C, H, W), floating point.
        target: a class by index, or by name if the model carries names; a `pysal.Margin`; one of `pysal.targets`; a callable
            `output -> (N,)` that scores each row by that row alone; a list with one of these per image; a `pysal.RowTarget`,
            which is told the image of each row; or None for each image's highest class.
        layers: see `legrad`.
        score: which number of the target's column is explained. "logit" or "raw": the output as it is. "auto": the target's
            probability if the output tells one, else the output as it is. "probability" and "log_probability": the same, but
            one number per image outside [0, 1] is refused. "softmax", "log_softmax" (classes exclude each other), "sigmoid",
            "log_sigmoid" (independent labels, or a binary logit): that function, whatever the output is. What the output is
            (numbers, probabilities, logits) is found out from all images of the call together.
        extra_inputs: further arguments of the model, by position (a sequence) or by name (a mapping). Mark one that is as long
            as there are images: `pysal.PerImage(x)` has a row for each image, `pysal.Shared(x)` is the same for all.
        batch_size: most rows per model pass; None = chosen by speed and memory. Changes the result by rounding only. The model
            must answer for each row as if it were alone, which is checked by passes of two rows and of one. With `batch_size=B`
            it need not: every pass then holds the whole batch in its order.
        precision: "float32", "tf32", "mixed" (float32 forward, bf16 backward) or "bf16" (rounding switches some ReLUs).
        dtype: dtype of the result; None = float32, or float64 for float64 inputs.

    Returns:
        (B, 1, H, W), 0 or more.

    Raises:
        TypeError: see `legrad`.
        ValueError: see `legrad`.
        NotApplicable: see `legrad`.

    Source:
        Barkan et al. 2021, arXiv:2204.11073 (Grad-SAM), for images.
    """
    plan = Plan("pysal.gradient_attention", model, inputs, target, Running(score, extra_inputs, batch_size, precision, dtype))
    return prepare_gradient_attention(plan, layers=layers).run(report=False).map


def prepare_legrad(plan: Plan, *, layers: int | None) -> Work:
    """Return the work that finds LeGrad of a plan's images; details: "layer", "native" (B, 1, h, w)."""
    return _prepare(plan, layers, "legrad")


def prepare_gradient_attention(plan: Plan, *, layers: int | None) -> Work:
    """Return the work that finds gradient x attention of a plan's images; details: "layer", "native" (B, 1, h, w)."""
    return _prepare(plan, layers, "gradient_attention")


@dataclass(frozen=True)
class Stack:
    """The blocks of a model, in the order in which they run.

    Attributes:
        blocks: name and run of each. A run of a module is counted from 0.
        tokens: of a row.
        reading: where the patches are among them.
        beside: whether blocks hand on other tensors of the tokens' shape beside the tokens.
        heads_lead: for blocks whose attention is (rows * heads, T, T), whether it is (heads * rows, T, T), where that is known.
    """

    blocks: tuple[tuple[str, int], ...]
    tokens: int
    reading: Reading
    beside: bool
    heads_lead: dict[int, bool] = field(default_factory=dict)


class _Changed(Exception):
    """The model is not as its stack says."""


# Stacks of models, by size of the images: a model is looked at for it once.
_STACKS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Stack]] = weakref.WeakKeyDictionary()


def _prepare(plan: Plan, layers: int | None, way: Way) -> Work:
    if layers is not None:
        check_count(plan.where, "layers", layers)
    check_layered(plan.where, plan.layered_model)

    def make(_report: bool) -> Attribution:
        counted = slice(0, None) if layers is None else slice(-layers, None)
        parts: list[Tensor] = []

        def run(stack: Stack) -> None:
            if layers is not None and layers > len(stack.blocks):
                refuse(plan.where, "layers", f"be at most the model's {len(stack.blocks)} blocks", layers)
            if way == "legrad" and stack.beside and layers != 1:
                _refuse(plan.where, "blocks that hand on more than one row of tokens")

            passed = len(stack.blocks[counted]) if way == "legrad" else 1

            def body(start: int, stop: int) -> None:
                if start == 0:
                    parts.clear()  # all are run again
                rows = torch.arange(start, stop, device=plan.device)
                find = functools.partial(_relevance, plan, plan.inputs[start:stop], rows, stack, counted, way)
                parts.append(plan.differentiated(find))
                plan.check_rows(rows)
                if passed > 2:  # the head has read several blocks' tokens in one pass, which is no pass of the caller's images
                    plan.check_rows(rows.repeat(passed - 1))

            plan.over_images(body)

        stack = _stack(plan, anew=False)
        try:
            run(stack)
        except _Changed:  # since another call looked at the model, or from pass to pass
            stack = _stack(plan, anew=True)
            try:
                run(stack)
            except _Changed as error:
                _refuse(plan.where, str(error))
        plan.score.close()
        size = (plan.inputs.shape[2], plan.inputs.shape[3])
        small = torch.cat(parts).to(plan.accumulator_dtype)
        names = [name for name, _ in stack.blocks[counted]]
        label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        details = {"layer": label, "native": small.to(plan.dtype)}
        return Attribution(resized(small, size).to(plan.dtype), 1, details)

    return Work(plan, make)


@dataclass
class _Frame:
    """A run of a module in the pass that is looked at."""

    name: str
    module: nn.Module
    run: int
    attention: int = 0
    given: Sequence[object] = ()
    more_given: Sequence[object] = ()
    returned: object = None
    more_returned: Sequence[object] = ()


def _stack(plan: Plan, *, anew: bool) -> Stack:
    """Return the blocks of the plan's model; `anew`: whatever was found of it before."""
    model = plan.layered_model
    assert isinstance(model, nn.Module)
    size = tuple(plan.inputs.shape[1:])
    known = {} if plan.extra_inputs else _STACKS.setdefault(model, {})
    if anew:
        known[size] = _looked(plan.where, plan.root, model)
    elif size not in known:
        known[size] = plan.shared("stack of blocks", lambda root: _looked(plan.where, root, model))
    return known[size]


def _refuse(where: str, got: str) -> NoReturn:
    requirement = "attend from every patch to every patch, in a stack of blocks each of which takes what the last returned"
    raise NotApplicable(f"{where}: model must {requirement}, got {got}; grad_cam explains such a model")


@restoring
def _looked(where: str, plan: Plan, model: nn.Module) -> Stack:
    """Find the blocks in a pass of one image: the largest modules in which attention happens once."""
    running: list[_Frame] = []
    ran: list[_Frame] = []
    runs: dict[str, int] = {}
    found: list[tuple[list[_Frame], int]] = []  # around each attention, and its number of tokens
    hooks = Hooks()

    def begin(name: str, module: nn.Module, given: Any, named: Any) -> None:
        taken = (_first(given),) if given else tuple(named.values())  # by keyword alone, whatever its name is
        frame = _Frame(name, module, runs.get(name, 0), given=taken, more_given=(*given[1:], *named.values()))
        runs[name] = frame.run + 1
        running.append(frame)
        ran.append(frame)

    def end(_module: nn.Module, _given: Any, returned: Any) -> None:
        frame = running.pop()
        frame.returned = _first(returned)
        frame.more_returned = returned[1:] if isinstance(returned, (tuple, list)) else ()

    for name, module in model.named_modules():
        before = functools.partial(begin, name)
        hooks.add(module, before, before=True, named=True)
        hooks.add(module, end)

    def see(weights: Tensor) -> None:
        if _of_rows(weights, 1) is not None:
            found.append(([*running], weights.shape[-1]))
            for frame in running:
                frame.attention += 1

    with SpelledOut(see):
        plan.look(0)
    hooks.close()
    if not found:
        _refuse(where, "no attention that torch shows")
    tokens = found[0][1]
    if any(number != tokens for _, number in found):
        _refuse(where, f"attention among {' and '.join(map(str, dict.fromkeys(number for _, number in found)))} tokens")
    blocks = [next((one for one in frames if one.attention == 1), None) for frames, _ in found]
    if any(one is None for one in blocks):
        _refuse(where, "attention that no module of its own has")
    stack = [one for one in blocks if one is not None]
    if not all(any(part is before.returned for part in one.given) for before, one in itertools.pairwise(stack)):
        _refuse(where, f"{len(stack)} blocks that do not follow each other")
    beside = any(_handed_on(before, one) for before, one in itertools.pairwise(stack))
    for frame in (*found[-1][0], *reversed(ran)):  # the largest that returns the row, or any
        if isinstance(frame.returned, Tensor) and frame.returned.ndim == 3 and max(frame.returned.shape[:2]) == tokens:
            layer = Layer(frame.name, frame.module, frame.run)
            try:
                reading = reading_of(where, model, layer, lambda: plan.look(0))
            except ValueError:  # of what is no row of the image's patches
                continue
            if reading is not None:
                runs_of_blocks = tuple((one.name, one.run) for one in stack)
                return Stack(runs_of_blocks, tokens, replace(reading, sequence_first=False), beside)
    _refuse(where, f"{tokens} tokens that are no patches of the image")


def _handed_on(before: _Frame, after: _Frame) -> bool:
    """Whether a block is given a tensor that the last returned beside its tokens, and which is as large as these."""
    shape = before.returned.shape if isinstance(before.returned, Tensor) else None
    returned = {id(one) for one in before.more_returned if isinstance(one, Tensor) and one.shape == shape}
    return any(id(one) in returned for one in after.more_given)


def _first(value: object) -> object:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _of_rows(weights: Tensor, rows: int) -> Tensor | None:
    """Return the attention of so many rows as (rows, heads, T, T), None where it is not of tokens of a row among themselves."""
    if weights.shape[-1] != weights.shape[-2] or weights.shape[-1] < 2 or not weights.requires_grad:
        return None
    if weights.ndim == 4:
        return weights if weights.shape[0] == rows else None
    return weights.unflatten(0, (rows, -1)) if weights.shape[0] % rows == 0 else None


@restoring
def _relevance(plan: Plan, batch: Tensor, rows: Tensor, stack: Stack, counted: slice, way: Way) -> Tensor:
    """Return what each patch adds, (N, 1, h, w), for rows of a plan's images."""
    plan.modes(grad=True).set()
    model = plan.layered_model
    assert isinstance(model, nn.Module)
    modules = dict(model.named_modules())
    if any(name not in modules for name, _ in stack.blocks):
        raise _Changed("blocks that are gone")
    blocks = [(modules[name], run) for name, run in stack.blocks]
    apart = way == "legrad" and len(blocks) > 1
    seen: list[Tensor] = []
    read = _Streams(blocks, apart=apart)
    leaf = ordinary(batch).detach().requires_grad_()

    def see(weights: Tensor) -> None:
        if _of_rows(weights, len(rows)) is not None and weights.shape[-1] == stack.tokens:
            seen.append(weights)

    with SpelledOut(see):
        _, scores = plan.score_of(plan.forward(model, leaf.clone(), rows), rows)
    read.hooks.close()
    if len(seen) != len(blocks):
        raise _Changed(f"attention that happens {len(blocks)} times in one pass and {len(seen)} in another")
    counted_blocks = range(len(blocks))[counted]
    earlier = [index for index in counted_blocks if index < len(blocks) - 1]
    groups = [earlier] if plan.company != "whole" else [[index] for index in earlier]  # a pass holds the batch then
    for group in groups if apart and earlier else ():
        streams = torch.cat([read.returned[index] for index in group], read.batch_dimension(len(rows)))
        read_scores = _read_by_head(plan, model, blocks, batch, rows, len(group), streams)
        scores = scores + read_scores.reshape(len(group), -1).sum(0)
    if not scores.requires_grad:
        raise not_differentiable(plan.where)
    asked = [seen[index] for index in counted_blocks]
    _find_heads(plan.where, scores, dict(zip(counted_blocks, asked, strict=True)), stack.heads_lead)
    slopes: Sequence[Tensor | None] = torch.autograd.grad(scores.sum(), asked, allow_unused=True)
    if all(one is None for one in slopes):
        raise not_differentiable(plan.where)
    relevance = torch.zeros(len(rows), stack.tokens, dtype=plan.accumulator_dtype, device=plan.device)
    for index, weights, slope in zip(counted_blocks, asked, slopes, strict=True):
        if slope is None:  # what the last block attends to with tokens that nobody reads
            continue
        share = slope.clamp_min(0) * weights.detach() if way == "gradient_attention" else slope.clamp_min(0)
        if share.ndim == 3 and stack.heads_lead.get(index):
            of_rows = share.unflatten(0, (-1, len(rows))).transpose(0, 1)
        else:
            of_rows = share.reshape(len(rows), -1, *share.shape[-2:])
        relevance += of_rows.to(relevance.dtype).mean((1, 2)) / len(asked)
    return stack.reading(relevance[:, :, None])


def _find_heads(where: str, scores: Tensor, attention: dict[int, Tensor], known: dict[int, bool]) -> None:
    """Find out where attention (rows * heads, T, T) of several rows has those of one: where it moves the score of that row.

    Where both orders hold, they read the same.

    Args:
        where: the public name of the method, for errors.
        scores: (N,).
        attention: by block.
        known: by block, whether heads come before rows; what is found is written into it.
    """
    rows = len(scores)
    asked = {index: one for index, one in attention.items() if one.ndim == 3 and len(one) > rows > 1 and index not in known}
    for row in range(rows if asked else 0):
        slopes = torch.autograd.grad(scores[row], list(asked.values()), retain_graph=True, allow_unused=True)
        for index, slope in zip(list(asked), slopes, strict=True):
            if slope is None:
                continue
            moves = (slope != 0).flatten(1).any(1)
            others = torch.arange(rows, device=slope.device) != row
            rows_lead = not bool(moves.unflatten(0, (rows, -1))[others].any())
            heads_lead = not bool(moves.unflatten(0, (-1, rows))[:, others].any())
            if not rows_lead and not heads_lead:
                _refuse(where, f"attention of shape {tuple(slope.shape)} of {rows} rows that cannot be told apart in it")
            if rows_lead != heads_lead:
                known[index] = heads_lead
                del asked[index]
        if not asked:
            return


class _Streams:
    """Reads what each block returns in the next pass; `apart`: each block goes on from values without a graph of the last's."""

    def __init__(self, blocks: Sequence[tuple[nn.Module, int]], *, apart: bool) -> None:
        self.hooks = Hooks()
        self.returned: dict[int, Tensor] = {}
        runs: dict[nn.Module, int] = {}
        places = {(module, run): index for index, (module, run) in enumerate(blocks)}

        def begin(module: nn.Module, _given: Any) -> None:
            runs[module] = runs.get(module, 0) + 1

        def end(module: nn.Module, _given: Any, returned: Any) -> Any:
            index = places.get((module, runs[module] - 1))
            value = _first(returned)
            if index is None or not isinstance(value, Tensor):
                return None
            self.returned[index] = value
            if not apart or index == len(blocks) - 1:
                return None
            # whoever reads it, the next block, a later one or the head; a copy, for blocks may write into what they are given
            return _with_tokens(_without_graph(returned), value.detach().requires_grad_().clone())

        for module in dict.fromkeys(module for module, _ in blocks):
            self.hooks.add(module, begin, before=True)
            self.hooks.add(module, end)

    def batch_dimension(self, rows: int) -> int:
        """Return which dimension of what the blocks return is the batch's."""
        shape = self.returned[0].shape
        return 0 if shape[0] == rows else 1


def _without_graph(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return _like(value, [_without_graph(one) for one in value])
    return value.detach() if isinstance(value, Tensor) else value


def _with_tokens(returned: Any, tokens: Tensor) -> Any:
    """Return what a block returned, with other tokens."""
    return _like(returned, [tokens, *returned[1:]]) if isinstance(returned, (tuple, list)) else tokens


def _like(given: Any, parts: list[Any]) -> Any:
    return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)


def _read_by_head(
    plan: Plan,
    model: nn.Module,
    blocks: Sequence[tuple[nn.Module, int]],
    batch: Tensor,
    rows: Tensor,
    copies: int,
    streams: Tensor,
) -> Tensor:
    """Return the scores of what blocks returned, (copies * N,), read by what follows the last block.

    Blocks run in vain, so on two rows, unless what else they are given is of as many rows as there are.
    """
    try:
        return _head(plan, model, blocks, batch, rows, copies, streams, short=True)
    except Exception as error:  # the model's own, of any kind
        if is_out_of_memory(error) or isinstance(error, NotApplicable):
            raise
    return _head(plan, model, blocks, batch, rows, copies, streams, short=False)


@restoring
def _head(
    plan: Plan,
    model: nn.Module,
    blocks: Sequence[tuple[nn.Module, int]],
    batch: Tensor,
    rows: Tensor,
    copies: int,
    streams: Tensor,
    *,
    short: bool,
) -> Tensor:
    hooks = Hooks()
    runs: dict[nn.Module, int] = {}
    many = rows.repeat(copies)

    def begin(module: nn.Module, given: Any) -> Any:
        run = runs.get(module, 0)
        runs[module] = run + 1
        if (module, run) != blocks[0]:
            return None
        torch._C._set_grad_enabled(False)
        if not given or not short or len(many) <= 2:  # by keyword alone, all rows
            return None
        dimension = 0 if given[0].shape[0] == len(many) else 1
        # two rows, for one would be broadcast where a head reads several blocks
        return (given[0].narrow(dimension, 0, 2), *given[1:])

    def end(module: nn.Module, _given: Any, returned: Any) -> Any:
        if (module, runs[module] - 1) != blocks[-1]:
            return None
        torch._C._set_grad_enabled(True)
        return _with_tokens(returned, streams)

    for module in dict.fromkeys(module for module, _ in blocks):
        hooks.add(module, begin, before=True)
        hooks.add(module, end)
    torch._C._set_grad_enabled(False)
    output = plan.forward(model, ordinary(batch).repeat(copies, 1, 1, 1), many)
    return plan.score(output, plan.origin_of(many))
