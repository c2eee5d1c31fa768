import pytest
import torch

from pysal.ops import gaussian_noise, gaussian_noise_bits
from pysal.reference import gaussian_noise as reference
from pysal.testing import DTYPES, assert_no_worse, assert_same_layout, backends, layouts, sample, with_last_row

SEED = -0x0123456789ABCDEF
# (B, C, H, W): one element, an odd number, more than a band of pixels, many channels, one channel
SHAPES = [(1, 1, 1, 1), (3, 3, 5, 7), (2, 3, 61, 67), (2, 70, 9, 11), (2, 1, 2, 3)]


def arguments(shape, dtype=torch.float32, count=5, device="cpu"):
    """images, scales, seed, rows, image_ids, samples; ids and samples of all sizes."""
    batch = shape[0]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, batch, (count,), generator=generator, dtype=torch.int32)
    ids = torch.tensor([0, -1, 2**40 + 17, 5, -(2**63)])[:count]
    samples = torch.tensor([0, 1, 2**31 + 3, 7, 2**32 - 1])[:count]
    images = sample(*shape, dtype=dtype, low=0.0)
    scales = sample(batch, dtype=torch.float64, low=0.1, high=2.0, seed=3)
    return *(each.to(device) for each in (images, scales)), SEED, *(each.to(device) for each in (rows, ids, samples))


@pytest.mark.parametrize("elements", [0, 1, 4, 63, 64, 65, 1000])
@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
def test_bits_match_reference(backend, elements):
    _, _, seed, _, ids, samples = arguments((1, 1, 1, 1))
    bits = backend.op("gaussian_noise_bits")(seed, ids.to(backend.device), samples.to(backend.device), elements)
    assert torch.equal(bits.cpu(), reference.gaussian_noise_bits(seed, ids, samples, elements))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
def test_matches_reference(backend, shape, image_dtype, dtype, channels_last):
    given = arguments(shape, image_dtype)
    kernel = backend.op("gaussian_noise")(*arguments(shape, image_dtype, device=backend.device), dtype, channels_last)
    baseline = reference.gaussian_noise(*given, dtype, channels_last)
    assert_no_worse(kernel, reference.gaussian_noise(given[0].double(), *given[1:], torch.float64, False), baseline)
    assert_same_layout(kernel.cpu(), baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", backends(), ids=str)
def test_normals_are_right_relative_to_their_radius(backend, dtype):
    """Box-Muller's radius is as accurate near 0, where u rounds to 1 in float32, as at 6; so are both ends of a turn."""
    elements = 2**17
    zero = torch.zeros(1, dtype=torch.int64, device=backend.device)
    image = torch.zeros(1, 1, 1, elements, dtype=dtype, device=backend.device)
    one = torch.ones(1, dtype=torch.float64, device=backend.device)
    noise = backend.op("gaussian_noise")(image, one, 11, zero.int(), zero, zero, dtype, False).cpu().double().flatten()
    words = reference.gaussian_noise_bits(11, zero.cpu(), zero.cpu(), elements)
    exact = reference.box_muller(words)[0]
    radius = torch.sqrt(-2 * torch.log((words[0, 0::2] + 0.5) * 2.0**-32)).repeat_interleave(2)
    # a logarithm, its argument, a root, an angle, its cosine and a product: rounded twice each
    assert ((noise - exact).abs() / radius).max() <= 12 * torch.finfo(dtype).eps
    assert radius.min() < 1e-2
    assert radius.max() > 4


@pytest.mark.parametrize("backend", [each for each in backends() if each.name != "emulated"], ids=str)
def test_backward_matches_reference(backend):
    given = arguments((3, 2, 5, 3), device=backend.device)
    weights = sample(5, 2, 5, 3, seed=4).to(backend.device)
    images, scales = given[0].clone().requires_grad_(), given[1].clone().requires_grad_()
    noisy = torch.ops.pysal.gaussian_noise(images, scales, *given[2:], torch.float32, True)
    (noisy * weights).sum().backward()

    def differentiated(dtype):
        leaves = [each.detach().clone().cpu().requires_grad_() for each in (given[0].to(dtype), given[1])]
        others = [each.cpu() if isinstance(each, torch.Tensor) else each for each in given[2:]]
        (reference.gaussian_noise(*leaves, *others, dtype, False) * weights.cpu().to(dtype)).sum().backward()
        return leaves[0].grad, leaves[1].grad

    exact, plain = differentiated(torch.float64), differentiated(torch.float32)
    assert_no_worse(images.grad, exact[0], plain[0])
    assert_no_worse(scales.grad.float(), exact[1], plain[1].float())


def test_gradcheck():
    images, scales, *others = arguments((2, 2, 3, 1), torch.float64, count=4)
    images, scales = images.requires_grad_(), scales.requires_grad_()

    def noisy(images, scales):
        return torch.ops.pysal.gaussian_noise(images, scales, *others, torch.float64, False)

    assert torch.autograd.gradcheck(noisy, (images, scales))
    assert torch.autograd.gradgradcheck(noisy, (images, scales))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, False), (torch.bfloat16, True)])
def test_opcheck(dtype, channels_last, requires_grad):
    images, scales, *others = arguments((2, 3, 4, 5))
    images, scales = images.requires_grad_(requires_grad), scales.requires_grad_(requires_grad)
    given = (images, scales, *others, dtype, channels_last)
    torch.library.opcheck(torch.ops.pysal.gaussian_noise.default, given)
    torch.library.opcheck(torch.ops.pysal.gaussian_noise_bits.default, (SEED, others[2], others[3], 7))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", backends(), ids=str)
def test_layouts(backend, channels_last):
    images, scales, seed, *indices = arguments((3, 3, 5, 7), device=backend.device)
    op = backend.op("gaussian_noise")
    expected = op(images, scales, seed, *indices, torch.float32, False)
    for name, view in layouts(images):
        assert torch.equal(op(view, scales, seed, *indices, torch.float32, channels_last), expected), name
    spread = [torch.stack([each, each], 1)[:, 0] for each in (scales, *indices)]
    assert torch.equal(op(images, spread[0], seed, *spread[1:], torch.float32, channels_last), expected)


@pytest.mark.parametrize("backend", backends(), ids=str)
def test_noise_does_not_depend_on_chunks_rows_or_storage(backend):
    images, scales, seed, rows, ids, samples = arguments((3, 3, 61, 67), device=backend.device)
    op = backend.op("gaussian_noise")
    whole = op(images, scales, seed, rows, ids, samples, torch.float32, False)
    for n in range(len(rows)):
        one = slice(n, n + 1)
        row = int(rows[n])
        alone = op(
            images[row : row + 1], scales[row : row + 1], seed, rows[one] * 0, ids[one], samples[one], torch.float32, True
        )
        assert torch.equal(alone[0], whole[n])
    black, one = torch.zeros_like(images), torch.ones_like(scales)
    noise = op(black, one, seed, rows, ids, samples, torch.float32, False)
    for storage in (torch.float16, torch.bfloat16):
        assert torch.equal(op(black.to(storage), one, seed, rows, ids, samples, torch.float32, False), noise)
        assert torch.equal(op(black, one, seed, rows, ids, samples, storage, False), noise.to(storage))


@pytest.mark.parametrize("backend", backends(), ids=str)
def test_empty_and_extremes(backend):
    op = backend.op("gaussian_noise")
    images, scales, seed, rows, ids, samples = arguments((2, 3, 4, 5), device=backend.device)
    none = op(images, scales, seed, rows[:0], ids[:0], samples[:0], torch.float16, True)
    assert none.shape == (0, 3, 4, 5)
    assert none.dtype == torch.float16
    flat = op(images[:, :, :0], scales, seed, rows, ids, samples, torch.float32, False)
    assert flat.shape == (5, 3, 0, 5)
    assert backend.op("gaussian_noise_bits")(seed, ids[:0], samples[:0], 4).shape == (0, 4)
    quiet = op(images, torch.zeros_like(scales), seed, rows, ids, samples, torch.float32, False)
    assert torch.equal(quiet, images[rows.long()])
    images[0, 0, 0, 0] = float("nan")
    images[1, 2, 3, 4] = float("inf")
    noisy = op(images, scales, seed, rows, ids, samples, torch.float32, False)
    finite = torch.nan_to_num(images, nan=0.0, posinf=0.0)
    clean = op(finite, scales, seed, rows, ids, samples, torch.float32, False)
    known = images[rows.long()].isfinite()
    assert torch.equal(noisy[known], clean[known])
    assert torch.equal(noisy.isnan(), images[rows.long()].isnan())
    assert torch.equal(noisy.isposinf(), images[rows.long()].isposinf())


@pytest.mark.parametrize("backend", backends(), ids=str)
def test_determinism(backend):
    given = arguments((3, 3, 61, 67), device=backend.device)
    op, threads = backend.op("gaussian_noise"), torch.get_num_threads()
    before = torch.random.get_rng_state()
    first = op(*given, torch.float32, False)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(op(*given, torch.float32, False), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), before)


IMAGES, SCALES = torch.zeros(2, 3, 4, 5), torch.ones(2)
INDICES = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGES[0]}, ValueError, "images must have 4 dimensions, got shape (3, 4, 5)"),
        (
            {"images": IMAGES.int()},
            TypeError,
            "images must have dtype float32 or float64 or float16 or bfloat16, got int32",
        ),
        ({"scales": SCALES[:1]}, ValueError, "scales must have 2 elements, one per image, got 1"),
        ({"scales": 0.1}, TypeError, "scales must be a torch.Tensor, got float"),
        ({"seed": 2**63}, ValueError, "seed must be a whole number in [-2^63, 2^63), got 9223372036854775808"),
        ({"seed": 0.5}, ValueError, "seed must be a whole number in [-2^63, 2^63), got 0.5"),
        ({"rows": INDICES + 1}, ValueError, "rows must be in [0, 2), got 2"),
        ({"rows": INDICES - 1}, ValueError, "rows must be in [0, 2), got -1"),
        ({"rows": INDICES[:2]}, ValueError, "image_ids must have the shape of rows, (2,), got shape (3,)"),
        ({"samples": INDICES[:2]}, ValueError, "samples must have the shape of image_ids, (3,), got shape (2,)"),
        (
            {"samples": INDICES.float()},
            TypeError,
            "samples must have dtype int32 or int64 or int16 or int8 or uint8, got float32",
        ),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, float64, float16 or bfloat16, got torch.int32"),
    ],
)
def test_errors(change, error, message):
    given = {
        "images": IMAGES,
        "scales": SCALES,
        "seed": 0,
        "rows": INDICES,
        "image_ids": INDICES,
        "samples": INDICES,
    }
    with pytest.raises(error) as caught:
        gaussian_noise(**(given | change))
    assert str(caught.value) == f"pysal::gaussian_noise: {message}"


@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_beyond_an_int32(backend, channels_last):
    """The last of more images than 2^31 elements hold is found."""
    images = with_last_row(sample(3, 5, 7, dtype=torch.float16).to(backend.device), backend.device)
    row = torch.tensor([len(images) - 1], dtype=torch.int32, device=backend.device)
    scales, id = torch.zeros(len(images), dtype=torch.float64, device=backend.device), row.long()
    noisy = backend.op("gaussian_noise")(images, scales, SEED, row, id, id, torch.float16, channels_last)
    assert torch.equal(noisy, images[-1:])


@pytest.mark.parametrize("elements", [-1, 2**34])
def test_bits_errors(elements):
    with pytest.raises(ValueError) as caught:
        gaussian_noise_bits(0, INDICES, INDICES, elements)
    assert str(caught.value) == f"pysal::gaussian_noise_bits: elements must be in [0, 2^34), got {elements}"


@pytest.mark.parametrize("backend", backends(native_only=True), ids=str)
def test_kernel_refuses_what_memory_safety_needs(backend):
    images, scales, seed, rows, ids, samples = arguments((2, 3, 4, 5), device=backend.device)
    op = backend.op("gaussian_noise")
    bad = [
        (images[0], scales, seed, rows, ids, samples),
        (images, scales[:1], seed, rows, ids, samples),
        (images, scales.float(), seed, rows, ids, samples),
        (images, scales, seed, rows.long(), ids, samples),
        (images, scales, seed, rows, ids[:1], samples),
        (images, scales, seed, rows, ids, samples.int()),
    ]
    if backend.device == "cpu" and backend.name == "cpu":  # the values are at hand
        bad.append((images, scales, seed, rows + 2, ids, samples))
    for given in bad:
        with pytest.raises(RuntimeError, match="pysal::gaussian_noise: "):
            op(*given, torch.float32, False)
