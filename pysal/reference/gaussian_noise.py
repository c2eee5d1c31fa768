"""Oracle of `pysal::gaussian_noise`: Philox4x32-10 (Salmon et al. 2011, doi 10.1145/2063384.2063405) and Box-Muller."""

import math

import torch
from torch import Tensor

from pysal._library import widest

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def gaussian_noise(
    images: Tensor,
    scales: Tensor,
    seed: int,
    rows: Tensor,
    image_ids: Tensor,
    samples: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Return images[rows[n]] + scales[rows[n]] * normal(seed, image_ids[n], samples[n], element)."""
    arithmetic = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    elements = math.prod(images.shape[1:])
    normals = box_muller(gaussian_noise_bits(seed, image_ids, samples, elements + elements % 2))[:, :elements]
    centres, widths = images[rows].to(arithmetic), scales[rows].to(arithmetic)
    noisy = centres + widths[:, None, None, None] * normals.reshape(centres.shape).to(arithmetic)
    return noisy.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def gaussian_noise_bits(seed: int, image_ids: Tensor, samples: Tensor, elements: int) -> Tensor:
    """Return the 32-bit words (N, elements), int64 in [0, 2^32), from which the noise is made."""
    quads = torch.arange((elements + 3) // 4, device=image_ids.device)
    ids, samples = image_ids[:, None], samples[:, None]
    counter = torch.broadcast_tensors(quads, samples & _MASK, ids & _MASK, ids >> 32 & _MASK)
    words = philox(counter, (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(words, -1).flatten(1)[:, :elements]


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four output words of Philox4x32-10 for four counter words and two key words, 32 bits in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(_MULTIPLIERS[0], c0), _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_INCREMENTS[0] & _MASK, k1 + _KEY_INCREMENTS[1] & _MASK
    return c0, c1, c2, c3


def box_muller(words: Tensor) -> Tensor:
    """Return float64 normals (N, even): word pairs (a, b) give sqrt(-2 ln u_a) (cos, sin)(2 pi u_b)."""
    uniform = (words.to(widest(words.device)) + 0.5) * 2.0**-32
    radius, angle = torch.sqrt(-2 * torch.log(uniform[:, 0::2])), 2 * math.pi * uniform[:, 1::2]
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).flatten(1)


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * word, from 16-bit halves so that int64 never overflows."""
    low = factor * (word & 0xFFFF)
    high = factor * (word >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
