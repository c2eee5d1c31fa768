"""The oracle of gaussian_noise against published vectors, closed forms and the normal distribution."""

import math

import pytest
import torch

from pysal.reference.gaussian_noise import box_muller, gaussian_noise, gaussian_noise_bits, philox

# Random123's known answers for philox4x32-10: counter, key, output
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox(tuple(integers(word) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS[:1])
def test_bits_known_answer(counter, key, expected):
    assert gaussian_noise_bits(0, integers(0), integers(0), 4).tolist() == [list(expected)]


def test_bits_layout():
    """Word e is word e % 4 of the counter (e // 4, sample, id low, id high) under the key (seed low, seed high)."""
    seed, image_id, sample = 0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3
    words = gaussian_noise_bits(seed, integers(image_id), integers(sample), 11)[0].tolist()
    for element, word in enumerate(words):
        counter = (element // 4, sample, 0x13198A2E, 0x03707344)
        quad = philox(tuple(integers(each) for each in counter), (0xA4093822, 0x299F31D0))
        assert word == int(quad[element % 4])


def test_negative_numbers_are_two_s_complement():
    ones = gaussian_noise_bits(-1, integers(-1), integers(-1), 4)[0].tolist()
    counter = tuple(integers(word) for word in (0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF))
    assert ones == [int(word) for word in philox(counter, (0xFFFFFFFF, 0xFFFFFFFF))]


def test_only_the_low_bits_of_the_sample_count():
    low, high = (gaussian_noise_bits(3, integers(1), integers(sample), 8) for sample in (5, 5 + 2**32))
    assert torch.equal(low, high)


@pytest.mark.parametrize("words", [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x12345678, 0x9ABCDEF0), (0xB504F334, 1)])
def test_box_muller_closed_form(words):
    first, second = ((word + 0.5) / 2**32 for word in words)
    radius, angle = math.sqrt(-2 * math.log(first)), 2 * math.pi * second
    normals = box_muller(integers(*words)[None])[0]
    expected = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)], dtype=torch.float64)
    # a handful of roundings each, of numbers up to the radius
    assert (normals - expected).abs().max() <= 8 * torch.finfo(torch.float64).eps * radius
    assert normals.isfinite().all()


NORMALS = {}


def normals(samples=50, elements=6_000):
    """300 000 normals, (samples, elements): one image id, several draws."""
    if not NORMALS:
        draws = torch.arange(samples)
        bits = gaussian_noise_bits(20260101, torch.full_like(draws, 7), draws, elements)
        NORMALS["of one id"] = box_muller(bits)
    return NORMALS["of one id"]


@pytest.mark.parametrize(
    ("power", "expected", "variance"),
    [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)],
)
def test_moments(power, expected, variance):
    """E n^k = 0, 1, 0, 3; the mean of N of them has variance (E n^2k - (E n^k)^2) / N. Five standard errors."""
    values = normals()
    assert abs((values**power).mean().item() - expected) <= 5 * math.sqrt(variance / values.numel())


def test_distribution():
    """Kolmogorov-Smirnov: P(sup |F_N - F| > d) <= 2 exp(-2 N d^2) (Massart 1990), here 1e-6."""
    values = normals().flatten().sort().values
    count = len(values)
    cumulative = torch.special.ndtr(values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = max((steps[1:] - cumulative).max(), (cumulative - steps[:-1]).max())
    assert distance <= math.sqrt(math.log(2 / 1e-6) / (2 * count))


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 5])
def test_elements_are_uncorrelated(shift):
    values = normals()
    products = values[:, shift:] * values[:, :-shift]
    assert abs(products.mean()) <= 5 / math.sqrt(products.numel())
    squares = (values[:, shift:] ** 2 - 1) * (values[:, :-shift] ** 2 - 1)
    assert abs(squares.mean()) <= 5 * 2 / math.sqrt(squares.numel())


def test_samples_ids_and_seeds_are_uncorrelated():
    values = normals()
    draws = torch.arange(len(values))
    elements = values.shape[1]
    others = [
        values.roll(1, 0),
        box_muller(gaussian_noise_bits(20260101, torch.full_like(draws, 8), draws, elements)),
        box_muller(gaussian_noise_bits(20260102, torch.full_like(draws, 7), draws, elements)),
    ]
    for other in others:
        assert abs((values * other).mean()) <= 5 / math.sqrt(values.numel())


def test_noise_is_scaled_normals_on_the_right_image():
    images = torch.arange(2 * 3 * 3 * 5, dtype=torch.float64).reshape(2, 3, 3, 5)
    rows, ids, samples = integers(1, 0, 1), integers(4, 5, 4), integers(0, 0, 9)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    noisy = gaussian_noise(images, scales, 3, rows, ids, samples, torch.float64, False)
    expected = box_muller(gaussian_noise_bits(3, ids, samples, 46))[:, :45].reshape(3, 3, 3, 5)
    for n, row in enumerate(rows.tolist()):
        assert torch.equal(noisy[n], images[row] + scales[row] * expected[n])
    quiet = gaussian_noise(images, torch.zeros_like(scales), 3, rows, ids, samples, torch.float64, True)
    assert torch.equal(quiet, images[rows])
    assert quiet.is_contiguous(memory_format=torch.channels_last)
