"""Calls native ops with arguments that nobody would choose, as long as the process lives. To be run as a script.

Every op starts from arguments that are right. Some of them are then replaced: numbers by the ends of their ranges, tensors by
empty, expanded, misshapen or non-finite ones, or ones of another dtype. Whatever an op refuses, it refuses with an exception; a
process that dies has said before what it was about to call. Usage: native_ops.py NAMESPACE EXAMPLES SEED
"""

import math
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pysal.ops  # noqa: F401, registers the ops
from pysal import _library
from pysal.testing import emulation

INTEGERS = [0, 1, 2, 3, -1, -2, 7, 1000, 2**16 + 1]
INTEGERS += [sign * 2**power + step for power in (31, 32, 33, 34, 40, 61, 62, 63) for sign in (1, -1) for step in (-1, 0, 1)]
INTEGERS = [number for number in INTEGERS if -(2**63) <= number < 2**63]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-310,
    5e-324,
    1e6,
    1e300,
    sys.float_info.max,
    -sys.float_info.max,
    math.inf,
    -math.inf,
    math.nan,
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHER_DTYPES = [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]
# Address space that the ops get. With a tenth of it, torch has none to put its own error into words: it reads what
# backtrace_symbols(3) could not allocate.
ROOM = 256 << 20


def arguments(name: str, draw: random.Random) -> list[Any]:
    """Return arguments that the op accepts."""
    dtype = draw.choice(DTYPES)
    shape = (2, draw.choice([1, 3, 5]), draw.choice([1, 4, 7]), draw.choice([1, 5, 8]))
    channels, height, width = shape[1:]
    images, others = torch.rand(shape).to(dtype), torch.rand(shape).to(dtype)
    rows, ids = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    labels = torch.randint(0, 3, (2, height, width), dtype=torch.int32)
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, height, width], [0, 0, 1, 1]], dtype=torch.int32)
    mean, long = torch.rand(channels).double() + 0.5, ids.long()
    scores = torch.rand(2, 2, 3).to(dtype)
    weights, totals = torch.rand(3).double(), torch.rand(shape)
    samples = torch.rand(3, *shape[1:]).to(dtype)
    gates = torch.zeros((images.numel() + 7) // 8, dtype=torch.uint8)
    regions = [images[:1], samples[:2, :, :1, :2], torch.zeros(2, 2, dtype=torch.int32)]
    corners = torch.zeros(2, 2, dtype=torch.int32)
    right: dict[str, list[Any]] = {
        "occlusion_masks": [images, others, labels, rows, ids, dtype, False, mean, mean],
        "occlusion_masks_boxes": [images, others, boxes, rows, dtype, True, None, None],
        "occlusion_masks_map": [scores, labels],
        "occlusion_masks_boxes_map": [scores, boxes, height, width],
        "guided_relu": [images, 6.0, 1],
        "guided_relu_gates": [images, 6.0],
        "guided_relu_backward": [images, gates, 1, False],
        "guided_relu_backward_": [images, gates, 1, False],
        "epilogue_": [images, totals[0, :, 0, 0].contiguous(), others, 1, 6.0, True],
        "epilogue_backward_": [images, others, gates, 1, 6.0, 1, len(images), False],
        "gaussian_scale_space": [images, [1.0, 2.0], 1],
        "gaussian_scale_space_derivative": [images, [1.0, 2.0], 0.5, 0],
        "path_integral_points": [images, others, rows, weights, dtype, False],
        "path_integral_accumulate_": [totals, samples, None, rows, weights],
        "path_integral_moments_": [totals, totals.clone(), torch.zeros(2, dtype=torch.int64), samples, rows],
        "path_integral_product": [images, others, totals],
        "gaussian_noise": [images, torch.rand(2).double(), 3, rows, long, long, dtype, False],
        "gaussian_noise_bits": [3, long, long, 9],
        "grad_cam": [images, others, 6, 5, True],
        "box_regions": [*regions, corners, 3, 2, 1, 1, 0.0],
        "box_regions_depthwise": [
            *regions, corners, 3, 2, torch.rand(3, 3, channels).to(dtype), torch.rand(channels).to(dtype), 1, 2, 1, 1, 0.0, 6.0
        ],
        "box_regions_sums": regions,
    }  # fmt: skip
    return right[name]


def hostile_tensor(given: Tensor, draw: random.Random) -> Tensor:
    """Return a tensor that is wrong, or right in a way that is not thought of."""
    kinds: list[Callable[[], Tensor]] = [
        lambda: given[:0],
        lambda: given.new_zeros([0] * given.ndim),
        lambda: given.new_zeros([draw.choice([0, 1, 2**20, 2**40]) if draw.random() < 0.5 else 0 for _ in given.shape]),
        lambda: given.reshape(-1),
        lambda: given[None],
        lambda: given.to(draw.choice(DTYPES + OTHER_DTYPES)),
        lambda: given.new_zeros(()).expand([draw.choice([1, 3, 2**15, 2**31, 2**40, 2**61])] * max(given.ndim, 1)),
        lambda: given.new_zeros([1] * given.ndim).expand([draw.choice([1, 2, 2**20, 2**33]), *([-1] * (given.ndim - 1))]),
        lambda: given.transpose(0, -1),
        lambda: given.flip(-1)[..., ::2],
        lambda: torch.full_like(given, draw.choice(FLOATS if given.is_floating_point() else [0, 1, -1, 2**31 - 1, -(2**31)])),
        lambda: given.to("meta"),
        lambda: given.to_sparse() if given.ndim else given,
        lambda: torch.zeros(3),
    ]
    return draw.choice(kinds)()


def hostile(argument: Any, draw: random.Random) -> Any:
    """Return something in the place of an argument that is right."""
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, int):
        return draw.choice(INTEGERS)
    if isinstance(argument, float):
        return draw.choice(FLOATS)
    if isinstance(argument, list):
        return [draw.choice(FLOATS) for _ in range(draw.choice([len(argument), len(argument), 0, 5]))]
    if isinstance(argument, torch.dtype):
        return draw.choice(DTYPES + OTHER_DTYPES)
    if argument is None:
        return torch.rand(draw.choice([1, 3, 5])).double()
    return hostile_tensor(argument, draw)


def shown(argument: Any) -> str:
    if isinstance(argument, Tensor):
        strides = argument.stride() if argument.layout == torch.strided else "none"
        return f"<{argument.dtype} {tuple(argument.shape)} strides {strides}>"
    return repr(argument)


def main(namespace: str, examples: int, seed: int) -> None:
    torch.set_num_threads(2)
    if namespace == "pysal_emu":
        emulation()
    with open("/proc/self/status") as lines:
        used = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    found: Counter[str] = Counter()
    for name in sorted(_library.SCHEMAS):
        draw = random.Random(f"{seed} {name}")
        op = getattr(getattr(torch.ops, namespace), name)
        for _ in range(examples):
            try:
                given = arguments(name, draw)
                for place in draw.sample(range(len(given)), min(len(given), draw.choice([1, 1, 1, 2, 3]))):
                    given[place] = hostile(given[place], draw)
            except (RuntimeError, MemoryError):
                continue  # what torch itself does not make
            print(f"{name}({', '.join(map(shown, given))})", flush=True)
            try:
                op(*given)
                found["accepted"] += 1
            except Exception:
                found["refused"] += 1
    print(dict(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
