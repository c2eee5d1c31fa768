"""Runs a folded model with few passes over memory, and differentiates it with respect to its input only.

A convolution, the addition of a shortcut and the ReLU that follow it become one module, which knows the gradient of its input;
`engine.tape.tape` puts these together.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pysal import ops
from pysal.engine.graph.fold import Convolution, fold_division, module_of, replace_by_module
from pysal.engine.graph.matrix_unit import GATED_CHANNELS, MatrixConvolution
from pysal.engine.model.relu_rules import ReluRule

_ADDITIONS = (operator.add, torch.add)
# Images per pass for which oneDNN arranges the weights; other numbers run too.
PACKED_FOR = 8
# Input channels times phases up to which the input gradient is arranged by phases.
FEW_CHANNELS = 32
# Taps of zero that replace padding on one side may make a kernel this many times larger: 3 x 3 becomes 4 x 4.
MOST_TAPS = 2


class FusedConvolution(nn.Module):
    """min(max(convolution(input) + shortcut, 0), upper), each part but the convolution optional.

    Args:
        convolution: the folded convolution.
        upper: where the ReLU saturates: infinity, 6 for ReLU6; None without ReLU.
        input_shape: (C, H, W) of the input, for which the weights are arranged.
        backward_dtype: dtype of the input gradient's convolution, unless that is a grouped one.
    """

    def __init__(
        self, convolution: Convolution, upper: float | None, input_shape: tuple[int, ...], backward_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.convolution, self.upper, self.input_shape = convolution, upper, input_shape
        # oneDNN has no fast grouped convolution in bf16
        self.backward_dtype = backward_dtype if convolution.groups == 1 else convolution.weight.dtype
        self.onednn = _onednn(convolution.weight)
        self.matrix: MatrixConvolution | None = None
        if MatrixConvolution.suited(convolution):
            self.matrix = MatrixConvolution(convolution.weight, convolution.bias, convolution.dilation)
        self.evened = _evened(convolution)
        self.forward_weight = self.evened.weight
        if self.forward_weight.is_cuda:  # the layout of the images: cuDNN would make it so in every pass
            self.forward_weight = self.forward_weight.contiguous(memory_format=torch.channels_last)
        if self.onednn:
            shape = [PACKED_FOR, *input_shape]
            left, right, top, bottom = self.evened.padding
            if self.evened.symmetric is None:
                shape[2], shape[3] = shape[2] + top + bottom, shape[3] + left + right
            self.forward_weight = _packed(self.evened, self.forward_weight, self._padding, self.evened.stride, shape)
        self._make_backward(input_shape)

    @property
    def _padding(self) -> tuple[int, int]:
        return self.evened.symmetric or (0, 0)

    def _make_backward(self, input_shape: tuple[int, ...]) -> None:
        """Arrange the weights of the input gradient: for stride 1 a convolution with the flipped kernel.

        A convolution of few channels and a larger stride, such as the first of a network, is arranged by phases: the rows y and
        columns x with the same remainders y % stride and x % stride see the same part of the kernel, and are the channels of
        one convolution of stride 1.
        """
        # row and column of a phase of the stride, its weights, zeros around the gradient
        self.matrix_phases: list[tuple[int, int, MatrixConvolution, tuple[int, int, int, int]]] = []
        self.flipped_padding: tuple[int, int] | None = None
        self.phases: _Phases | None = None
        self.phases_matrix: MatrixConvolution | None = None
        if self._make_matrix_backward(input_shape[1:]):
            return
        even = self.evened
        weight = even.weight.to(self.backward_dtype)
        height, width = (
            (input_shape[1 + i] + 2 * self._padding[i] - _reach(even)[i] - 1) // even.stride[i] + 1 for i in range(2)
        )
        self.backward_weight = weight.contiguous(memory_format=torch.channels_last)
        if not self.onednn or even.symmetric is None:
            return
        shape = [PACKED_FOR, weight.shape[0], height, width]
        if even.stride == (1, 1):
            padding = (_reach(even)[0] - self._padding[0], _reach(even)[1] - self._padding[1])
            if min(padding) >= 0:
                self.flipped_padding = padding
                flipped = weight.flip(2, 3).unflatten(0, (even.groups, -1)).transpose(1, 2).flatten(0, 1)
                self.backward_weight = _packed(even, flipped, padding, (1, 1), shape)
        elif even.groups == 1 and even.dilation == (1, 1) and input_shape[0] * even.stride[0] * even.stride[1] <= FEW_CHANNELS:
            left, _, top, _ = self.convolution.padding  # as it was: taps of zero would widen what the phases see
            weight = self.convolution.weight.to(self.backward_dtype)
            self.phases = _Phases(weight, even.stride, (top, left), input_shape[1:], (height, width))
            rows, columns = self.phases.padding
            joint = Convolution(self.phases.weight, None, (1, 1), (columns, columns, rows, rows), (1, 1), 1)
            if MatrixConvolution.suited(joint, least_outputs=1):
                self.phases_matrix = MatrixConvolution(joint.weight, None)
            else:
                self.backward_weight = _packed(even, joint.weight, self.phases.padding, (1, 1), shape)

    def _make_matrix_backward(self, size: Sequence[int]) -> bool:
        """Arrange them for the matrix unit, where that gains: a convolution of stride 1 for each phase of the stride."""
        convolution = self.convolution
        weight, (rows, columns) = convolution.weight, convolution.stride
        left, right, top, bottom = convolution.padding
        if self.matrix is None or self.backward_dtype != torch.float32:
            return False
        if convolution.dilation != (1, 1) and convolution.stride != (1, 1):
            return False
        reach = _reach(convolution)
        height = (size[0] + top + bottom - reach[0] - 1) // rows + 1
        width = (size[1] + left + right - reach[1] - 1) // columns + 1
        for a, (first_y, taps_y, shift_y) in enumerate(_phases_of_axis(weight.shape[2], rows, top)):
            for b, (first_x, taps_x, shift_x) in enumerate(_phases_of_axis(weight.shape[3], columns, left)):
                reach_y, reach_x = convolution.dilation[0] * (taps_y - 1), convolution.dilation[1] * (taps_x - 1)
                above, before = reach_y - shift_y, reach_x - shift_x
                below = len(range(a, size[0], rows)) - height - above + reach_y
                after = len(range(b, size[1], columns)) - width - before + reach_x
                if taps_y and taps_x:
                    part = weight[:, :, first_y::rows, first_x::columns].flip(2, 3).transpose(0, 1).contiguous()
                    unit = MatrixConvolution(part, None, convolution.dilation)
                    self.matrix_phases.append((a, b, unit, (before, after, above, below)))
        if any(min(padding) < 0 for *_, padding in self.matrix_phases):
            self.matrix_phases.clear()
        return bool(self.matrix_phases)

    @property
    def masks_gradient(self) -> bool:
        """Whether `input_gradient` can let it through the gates of the convolution's input."""
        return bool(self.matrix_phases) and self.convolution.stride == (1, 1) and _gated(self.convolution.weight.shape[1])

    def _matrix_gradient(
        self, grad: Tensor, size: Sequence[int], onto: Tensor | None, gates: Tensor | None, rule: ReluRule | None
    ) -> Tensor:
        rows, columns = self.convolution.stride
        if (rows, columns) == (1, 1):
            ((_, _, unit, padding),) = self.matrix_phases
            return unit.run(grad, padding=padding, shortcut=onto, over=True, mask=gates, rule=rule)
        result = onto
        if result is None:
            shape = (len(grad), self.convolution.weight.shape[1], *size)
            full = len(self.matrix_phases) == rows * columns
            result = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last, device="cpu")
            result = result if full else result.zero_()
        for a, b, unit, padding in self.matrix_phases:
            place, part = result[:, :, a::rows, b::columns], unit.run(grad, padding=padding)
            place.copy_(part) if onto is None else place.add_(part)
        return result

    def run(self, input: Tensor, shortcut: Tensor | None) -> Tensor:
        """Return the result; nothing is kept for a backward pass."""
        return self._run(input, shortcut, self.upper)

    def run_with_gates(self, input: Tensor, shortcut: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the result and the gates of its ReLU, as `ops.guided_relu_gates` does."""
        assert self.upper is not None
        if self.matrix is None or not _gated(len(self.convolution.weight)):
            output = self._run(input, shortcut, self.upper)
            return output, ops.guided_relu_gates(output, self.upper)
        shape = self.matrix.shape(input, self.convolution.stride, self.convolution.padding)
        gates = torch.empty(math.prod(shape) // 8, dtype=torch.uint8, device="cpu")
        return self._run(input, shortcut, self.upper, gates), gates

    def _run(self, input: Tensor, shortcut: Tensor | None, upper: float | None, gates: Tensor | None = None) -> Tensor:
        if self.matrix is not None:
            between = (-math.inf, math.inf) if upper is None else (0.0, upper)
            at = (self.convolution.stride, self.convolution.padding)
            return self.matrix.run(input, *at, shortcut=shortcut, limits=between, gates=gates)
        even = self.evened
        if even.symmetric is None:
            input = F.pad(input, even.padding)
        geometry = (self._padding, even.stride, even.dilation, even.groups)
        if not self.onednn:
            padding, stride, dilation, groups = geometry
            output = F.conv2d(input, self.forward_weight, even.bias, stride, padding, dilation, groups)
            output = output if shortcut is None else output.add_(shortcut)
            return output if upper is None else output.clamp_(0, upper)
        input = input.contiguous(memory_format=torch.channels_last)
        name, limits = ("none", []) if upper is None else ("relu", [])
        if upper is not None and upper < float("inf"):
            name, limits = "hardtanh", [0.0, upper]
        mkldnn = torch.ops.mkldnn
        if shortcut is None:
            result: Tensor = mkldnn._convolution_pointwise(input, self.forward_weight, even.bias, *geometry, name, limits, None)
            return result
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        result = mkldnn._convolution_pointwise.binary(
            input,
            shortcut,
            self.forward_weight,
            even.bias,
            *geometry,
            "add",
            1.0,
            None if upper is None else "relu",
            [],
            None,
        )
        return result if name != "hardtanh" else result.clamp_(max=upper)

    def parts(self, input: Tensor, shortcut: Tensor | None) -> dict[str, Tensor]:
        """Return what `run` fuses, one tensor for each: "convolution", "sum" and "output"."""
        found = self._run(input, None, None)
        total = found if shortcut is None else found + shortcut
        return {"convolution": found, "sum": total, "output": total if self.upper is None else total.clamp(0, self.upper)}

    def input_gradient(
        self,
        grad: Tensor,
        input_shape: Sequence[int],
        onto: Tensor | None = None,
        gates: Tensor | None = None,
        rule: ReluRule | None = None,
    ) -> Tensor:
        """Return the gradient of the convolution's input from that of its output, in `backward_dtype`.

        Args:
            grad: (N, K, h, w), gradient of the output.
            input_shape: (N, C, H, W).
            onto: (N, C, H, W): overwritten by its sum with the gradient, which is returned.
            gates: those of the ReLU whose output the input is, of N images or of fewer that follow each other again and again;
                only where `masks_gradient`.
            rule: what they let through of the gradient, the sum with `onto` if there is one; None is all.
        """
        even = self.evened
        grad = grad.to(self.backward_dtype)
        height, width = input_shape[2:]
        if self.matrix_phases:
            return self._matrix_gradient(grad, (height, width), onto, gates, rule)
        if self.flipped_padding is not None or self.phases is not None:
            grad = grad.contiguous(memory_format=torch.channels_last)
            padding = self.phases.padding if self.phases is not None else self.flipped_padding
            geometry = (padding, (1, 1), even.dilation, even.groups)
            mkldnn = torch.ops.mkldnn
            dense = onto is not None and onto.is_contiguous(memory_format=torch.channels_last)
            if onto is not None and dense and self.phases is None and onto.dtype == grad.dtype:
                added: Tensor = mkldnn._convolution_pointwise_.binary(
                    onto, grad, self.backward_weight, None, *geometry, "add", 1.0, None, [], None
                )
                return added
            result: Tensor
            if self.phases is not None and self.phases_matrix is not None:
                rows, columns = self.phases.padding
                result = self.phases_matrix.run(grad, padding=(columns, columns, rows, rows))
            else:
                result = mkldnn._convolution_pointwise(grad, self.backward_weight, None, *geometry, "none", [], None)
            result = result if self.phases is None else self.phases.join(result, height, width)
            return result if onto is None else onto.add_(result)
        left, right, top, bottom = (0, 0, 0, 0) if even.symmetric is not None else even.padding
        padded = (height + top + bottom, width + left + right)
        # what the last window of the convolution did not reach
        beyond = [
            padded[i] + 2 * self._padding[i] - (grad.shape[2 + i] - 1) * even.stride[i] - _reach(even)[i] - 1 for i in range(2)
        ]
        result = F.conv_transpose2d(
            grad, self.backward_weight, None, even.stride, self._padding, beyond, even.groups, even.dilation
        )
        if even.symmetric is None:
            result = result[:, :, top : top + height, left : left + width]
        return result if onto is None else onto.add_(result)

    def forward(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return the result, which autograd does not follow."""
        return self.run(input, shortcut)


class _Phases:
    """The input gradient of a convolution as a convolution of stride 1 with a channel per input channel and phase.

    For an axis with stride s, padding p and a kernel w of k taps, row y = s i + a of the gradient is the sum over t of
    w[c + s t] g[i + o - t], c = (a + p) % s and o = (a + p - c) / s: what depends on a alone is its phase.

    Args:
        weight: (K, C, kh, kw) of the convolution.
        stride: of the convolution.
        padding: of the convolution.
        size: (H, W) of its input.
        grad_size: (h, w) of its output.
    """

    def __init__(
        self,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        size: tuple[int, ...],
        grad_size: tuple[int, int],
    ) -> None:
        axes = [_phases_of_axis(weight.shape[2 + i], stride[i], padding[i]) for i in range(2)]
        # gradient rows i + low ... i + high are seen by some phase
        low = [min(shift - taps + 1 for _, taps, shift in axis) for axis in axes]
        high = [max(shift for _, _, shift in axis) for axis in axes]
        spans = [high[i] - low[i] + 1 for i in range(2)]
        channels, (rows, columns) = weight.shape[1], stride
        joint = weight.new_zeros(channels, rows, columns, weight.shape[0], *spans)
        for a, (first_y, taps_y, shift_y) in enumerate(axes[0]):
            for b, (first_x, taps_x, shift_x) in enumerate(axes[1]):
                part = weight[:, :, first_y::rows, first_x::columns].flip(2, 3).transpose(0, 1)
                top, left = shift_y - taps_y + 1 - low[0], shift_x - taps_x + 1 - low[1]
                joint[:, a, b, :, top : top + taps_y, left : left + taps_x] = part
        self.weight, self.stride = joint.flatten(0, 2), stride
        self._counts = [-(-size[i] // stride[i]) for i in range(2)]
        after = [self._counts[i] + high[i] - grad_size[i] for i in range(2)]
        self.padding = (max(-low[0], after[0], 0), max(-low[1], after[1], 0))
        self._first = [self.padding[i] + low[i] for i in range(2)]

    def join(self, result: Tensor, height: int, width: int) -> Tensor:
        """Return (N, C, height, width) from the convolution's (N, C * phases, h, w)."""
        (rows, columns), (top, left) = self._counts, self._first
        parts = result[:, :, top : top + rows, left : left + columns].unflatten(1, (-1, *self.stride))
        size = (rows * self.stride[0], columns * self.stride[1])
        joined: Tensor = parts.permute(0, 1, 4, 2, 5, 3).reshape(len(result), -1, *size)
        return joined[:, :, :height, :width]


def _phases_of_axis(taps: int, stride: int, padding: int) -> list[tuple[int, int, int]]:
    """Return for each phase its first tap, its number of taps and the gradient's row its first tap meets at i = 0."""
    found = []
    for phase in range(stride):
        first = (phase + padding) % stride
        found.append((first, len(range(first, taps, stride)), (phase + padding - first) // stride))
    return found


def _gated(channels: int) -> bool:
    return channels % GATED_CHANNELS == 0


def _reach(convolution: Convolution) -> tuple[int, int]:
    """Return the rows and columns between the first and the last input a window sees."""
    height, width = convolution.weight.shape[2:]
    return convolution.dilation[0] * (height - 1), convolution.dilation[1] * (width - 1)


def _evened(convolution: Convolution) -> Convolution:
    """Return the same convolution with equal padding on opposite sides, by taps of zero, where that costs less than padding.

    Padding one side alone copies the whole map: a depthwise convolution of 112 x 112 takes 4 times as long with it.
    """
    left, right, top, bottom = convolution.padding
    rows, columns = max(top, bottom), max(left, right)
    missing = [(columns - left, 1), (columns - right, 1), (rows - top, 0), (rows - bottom, 0)]
    if any(zeros % convolution.dilation[axis] for zeros, axis in missing):
        return convolution
    weight = F.pad(convolution.weight, [zeros // convolution.dilation[axis] for zeros, axis in missing])
    if weight.numel() > MOST_TAPS * convolution.weight.numel():
        return convolution
    padding = (columns, columns, rows, rows)
    return Convolution(weight, convolution.bias, convolution.stride, padding, convolution.dilation, convolution.groups)


def _onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _packed(
    convolution: Convolution, weight: Tensor, padding: tuple[int, int], stride: tuple[int, int], input_shape: list[int]
) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(memory_format=torch.channels_last),
        list(padding),
        list(stride),
        list(convolution.dilation),
        convolution.groups,
        input_shape,
    )
    return result


def lower(graph: fx.GraphModule, example: Tensor, backward_dtype: torch.dtype = torch.float32) -> int:
    """Replace the convolutions of a folded graph, with what can be fused into them, in place; return how many.

    Args:
        graph: a graph made by `fold`.
        example: (1, C, H, W), whose shapes the weights are arranged for.
        backward_dtype: dtype of the input gradients' convolutions.
    """
    shapes = _Shapes(graph)
    with torch.no_grad():
        shapes.run(example.repeat(2, 1, 1, 1) if len(example) == 1 else example)  # what is the same for all images shows
    fold_division(graph, shapes.found)
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    lowered = 0
    for node in list(graph.graph.nodes):
        convolution = module_of(graph, node)
        if not isinstance(convolution, Convolution) or node.args[0] not in shapes.found:
            continue
        last, inputs = node, [node.args[0]]
        inner = [(name, run, "convolution") for name, run in node.meta.get("layers", ())]
        addition = _only_user(last)
        if addition is not None and is_addition(addition) and addition.args[0] is not addition.args[1]:
            shortcut: Any = addition.args[1] if addition.args[0] is node else addition.args[0]
            if order[shortcut] < order[node] and shapes.found.get(shortcut) == shapes.found[node]:
                last, inputs = addition, [node.args[0], shortcut]
                inner += [(name, run, "sum") for name, run in addition.meta.get("layers", ())]
        upper = None
        activation = _only_user(last)
        if activation is not None and (upper := relu_upper(graph, activation)) is not None:
            last = activation
        fused = FusedConvolution(convolution, upper, shapes.found[node.args[0]][1:], backward_dtype)
        new = replace_by_module(graph, last, fused, *inputs)
        new.meta["inner_layers"] = inner
        order[new], shapes.found[new] = order[last], shapes.found[last]
        lowered += 1
    for node in graph.graph.nodes:
        if is_addition(node):
            first, second = (shapes.found.get(arg) for arg in node.args)
            node.meta["same_shapes"] = first is not None and first == second
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return lowered


class _Shapes(fx.Interpreter):
    """Runs a graph and remembers the shape of every floating tensor."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[Any, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.found[n] = tuple(result.shape)
        return result


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def is_addition(node: fx.Node) -> bool:
    """Say whether a node adds two others, and nobody sees one of them changed by it."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return False
    if node.target in (operator.iadd, "add_"):  # changes its first argument, which nobody else may be waiting for
        return isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1
    return (node.op == "call_function" and node.target in _ADDITIONS) or (node.op == "call_method" and node.target == "add")


def relu_upper(graph: fx.GraphModule, node: fx.Node) -> float | None:
    """Return where a ReLU node saturates, infinity for a plain one, or None where the node is no ReLU."""
    module = module_of(graph, node)
    if isinstance(module, nn.ReLU6):
        return 6.0
    if isinstance(module, nn.ReLU):
        return float("inf")
    if isinstance(module, nn.Hardtanh):
        return float(module.max_val) if module.min_val == 0 and module.max_val > 0 else None
    if node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_):
        return float("inf")
    if node.op == "call_function" and node.target is F.relu6:
        return 6.0
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return float("inf")
    return None
