"""Photos as tensors: every format gives the pixels that were written, and every bad file a sentence."""

import io
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from torch import nn

from pysal.models import Classifier, Normalized, read_image, read_images

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)

HALF_LEVEL = 0.5 / 255  # what rounding to 8 bits may cost


def tensor(pixels: np.ndarray) -> torch.Tensor:
    """(H, W) or (H, W, 3) floats in [0, 1] as (1, 3, H, W)."""
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def exactly(pixels: np.ndarray) -> torch.Tensor:
    return tensor(pixels) / np.iinfo(pixels.dtype).max


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255 if pixels.ndim == 3 else alpha / 255
    return pixels / 255 * share + 1 - share


def classifier(size: tuple[int, int], fraction: float = 1.0) -> Classifier:
    return Classifier(nn.Identity(), name="none", class_names=["a"], input_size=size, crop_fraction=fraction)


@pytest.fixture
def write(tmp_path):
    def save(picture: Image.Image, suffix: str, **options: object) -> Path:
        path = tmp_path / f"photo{suffix}"
        picture.save(path, **options)
        return path

    return save


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".tga"])
@pytest.mark.parametrize("pixels", [RGB, GREY], ids=["rgb", "grey"])
def test_lossless_files_give_their_pixels(write, suffix, pixels) -> None:
    image = read_image(write(Image.fromarray(pixels), suffix))
    assert torch.equal(image, exactly(pixels))
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert image.device.type == "cpu"


def test_lossless_webp_gives_its_pixels(write) -> None:
    assert torch.equal(read_image(write(Image.fromarray(RGB), ".webp", lossless=True)), exactly(RGB))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("pixels", [RGB, GREY], ids=["rgb", "grey"])
def test_jpeg_gives_what_pillow_decodes(write, progressive, pixels) -> None:
    path = write(Image.fromarray(pixels), ".jpg", progressive=progressive)
    assert torch.equal(read_image(path), exactly(np.asarray(Image.open(path))))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_content_is_the_same_photo_as_the_file(write, suffix) -> None:
    path = write(Image.fromarray(RGB), suffix)
    assert torch.equal(read_image(path.read_bytes()), read_image(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"photo.jpg", "not an image that Pillow can read")],
    ids=["none", "text"],
)
def test_content_that_is_no_photo(content, reason) -> None:
    expected = f"pysal.read_image: source must be a readable image file, got {len(content)} bytes ({reason})"
    assert refused(content) == expected


def test_str_and_path_and_picture_are_the_same_photo(write) -> None:
    path = write(Image.fromarray(RGB), ".png")
    with Image.open(path) as picture:
        assert torch.equal(read_image(picture), read_image(path))
    assert torch.equal(read_image(str(path)), read_image(path))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_transparent_photos_are_put_on_white(write, suffix) -> None:
    picture = Image.fromarray(np.dstack([RGB, ALPHA]))
    image = read_image(write(picture, suffix, **({"lossless": True, "exact": True} if suffix == ".webp" else {})))
    assert (image - tensor(on_white(RGB, ALPHA))).abs().max() <= HALF_LEVEL * 1.0001


def test_fully_transparent_is_white_and_opaque_is_itself(write) -> None:
    hidden, shown = (np.dstack([RGB, np.full_like(GREY, level)]) for level in (0, 255))
    assert torch.equal(read_image(write(Image.fromarray(hidden), ".png")), torch.ones(1, 3, 5, 7))
    assert torch.equal(read_image(write(Image.fromarray(shown), ".png")), exactly(RGB))


def test_grey_with_alpha_is_put_on_white(write) -> None:
    picture = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
    image = read_image(write(picture, ".png"))
    assert (image - tensor(on_white(GREY, ALPHA))).abs().max() <= HALF_LEVEL * 1.0001


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif", ".bmp"])
def test_palette_gives_its_colours(write, suffix) -> None:
    picture = Image.fromarray(GREY % 4).convert("P")
    colours = np.array([[255, 0, 0], [0, 200, 0], [0, 0, 100], [9, 8, 7]], dtype=np.uint8)
    picture.putpalette(colours.tobytes())
    assert torch.equal(read_image(write(picture, suffix)), exactly(colours[GREY % 4]))


def test_transparent_palette_entry_is_white(write) -> None:
    picture = Image.fromarray(GREY % 2).convert("P")
    picture.putpalette([200, 0, 0, 0, 0, 100])
    expected = np.where((GREY % 2 == 1)[..., None], [255, 255, 255], [200, 0, 0]).astype(np.uint8)
    assert torch.equal(read_image(write(picture, ".png", transparency=1)), exactly(expected))


@pytest.mark.parametrize("pixels", [RGB, GREY], ids=["rgb", "grey"])
def test_transparent_colour_is_white(write, pixels) -> None:
    key = tuple(int(value) for value in pixels[2, 3]) if pixels.ndim == 3 else int(pixels[2, 3])
    image = read_image(write(Image.fromarray(pixels), ".png", transparency=key))
    expected = pixels.copy()
    expected[(pixels == np.array(key)).reshape(5, 7, -1).all(axis=-1)] = 255
    assert torch.equal(image, exactly(expected))


def test_bilevel_is_black_and_white(write) -> None:
    bits = GREY > 127
    assert torch.equal(read_image(write(Image.fromarray(bits), ".png")), tensor(bits))


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk_is_converted(write, suffix) -> None:
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[:, :8, 0] = 255  # cyan on the left, paper on the right
    image = read_image(write(cmyk(inks), suffix))
    expected = torch.ones(1, 3, 16, 16)
    expected[:, 0, :, :8] = 0
    # The block edge of a JPEG is at column 8 and each block is flat: only rounding of the colour conversion is left.
    assert (image - expected).abs().max() <= 2 / 255


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_model_of_grey_images_gets_grey(write, suffix) -> None:
    colours = np.random.default_rng(3).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    weights = np.array([299, 587, 114]) / 1000  # ITU-R BT.601
    for source in (write(Image.fromarray(colours), f"colour{suffix}"), colours, colours / 255.0):
        found = read_image(source, channels=1)
        seen = read_image(source)[0].numpy()
        assert found.shape == (1, 1, 9, 7)
        np.testing.assert_allclose(found[0, 0], np.tensordot(weights, seen, 1), rtol=0, atol=1e-6)
    grey = colours[..., 0]
    assert torch.equal(read_image(grey, channels=1), read_image(grey)[:, :1])
    assert read_image(np.full((4, 4, 3), 255, np.uint8), channels=1).max() <= 1


def test_channels_are_those_of_the_model() -> None:
    def of(network: nn.Module, **options: int) -> int:
        return Classifier(network, name="m", class_names=["a"], input_size=(4, 4), **options).channels

    grey, colour = nn.Conv2d(1, 1, 3), nn.Conv2d(3, 1, 3)
    assert of(grey) == of(Normalized(grey, [0.5], [0.25])) == of(Normalized(nn.Sequential(grey, colour), 0.5, 1.0)) == 1
    assert of(colour) == of(Normalized(colour, 0.5, 0.25)) == of(nn.Identity()) == of(Normalized(grey, [0.5] * 3, 0.25)) == 3
    assert of(nn.Flatten(), channels=1) == 1
    model = Classifier(grey, name="m", class_names=["a"], input_size=(4, 4))
    assert read_image(np.zeros((6, 6), np.uint8), model).shape == (1, 1, 4, 4)
    assert read_images([np.zeros((6, 6, 3), np.uint8)] * 2, model).shape == (2, 1, 4, 4)
    assert read_image(np.zeros((6, 6), np.uint8), model, channels=3).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"^pysal\.read_image: source must have shape \(H, W, 2\), got an array \(6, 6\)"):
        read_image(np.zeros((6, 6), np.uint8), channels=2)
    for wrong in (0, -1, 2.5, True, "3"):
        with pytest.raises(ValueError, match=r"^pysal\.read_image: channels must be a whole number of at least 1, got"):
            read_image(np.zeros((6, 6), np.uint8), channels=wrong)
        with pytest.raises(ValueError, match=r"^pysal\.models\.Classifier: channels must be a whole number of at least 1, got"):
            of(grey, channels=wrong)


def cmyk(inks: np.ndarray) -> Image.Image:
    return Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(inks[..., ink])) for ink in range(4)])


def write_png(path: Path, pixels: np.ndarray, colour_type: int, bits: int) -> Path:
    """A PNG written by the specification, not by Pillow."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in pixels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_sixteen_bit_grey_png_is_divided_by_65535(tmp_path) -> None:
    path = write_png(tmp_path / "deep.png", DEEP, colour_type=0, bits=16)
    assert torch.equal(read_image(path), exactly(DEEP))


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_grey_tiff_is_divided_by_65535(tmp_path, order) -> None:
    import tifffile  # scikit-image brings it

    tifffile.imwrite(tmp_path / "deep.tif", DEEP, byteorder=order)
    assert torch.equal(read_image(tmp_path / "deep.tif"), exactly(DEEP))


def test_sixteen_bit_grey_written_by_pillow(write) -> None:
    assert torch.equal(read_image(write(Image.fromarray(DEEP), ".tif")), exactly(DEEP))
    assert torch.equal(read_image(Image.fromarray(DEEP.astype(np.int32))), exactly(DEEP))


def test_sixteen_bit_colour_png_keeps_its_upper_bits(tmp_path) -> None:
    pixels = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    image = read_image(write_png(tmp_path / "deep.png", pixels, colour_type=2, bits=16))
    assert (image - exactly(pixels)).abs().max() <= 1 / 255


def test_float_tiff_is_read_as_it_is(write) -> None:
    values = RNG.random((5, 7), dtype=np.float32)
    assert torch.equal(read_image(write(Image.fromarray(values), ".tif")), tensor(values))


# What each EXIF orientation does to the stored picture, from the standard's table (row 0 is, column 0 is).
ORIENTED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied(write, suffix, orientation) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(np.array([[0, 60, 120], [180, 240, 30]]), np.ones((16, 16))).astype(np.uint8)
    options = {"lossless": True} if suffix == ".webp" else {"quality": 100} if suffix == ".jpg" else {}
    image = read_image(write(Image.fromarray(blocks), suffix, exif=exif, **options))
    expected = exactly(np.ascontiguousarray(ORIENTED[orientation](blocks)))
    assert image.shape == expected.shape
    assert (image - expected).abs().max() <= (2 / 255 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_unreadable_exif_turns_nothing(write, exif) -> None:
    plain = read_image(write(Image.fromarray(RGB), ".jpg"))
    path = write(Image.fromarray(RGB), ".jpg", exif=exif)
    assert torch.equal(read_image(path), plain)
    picture = Image.fromarray(RGB)
    picture.info["exif"] = exif
    assert torch.equal(read_image(picture), exactly(RGB))


def test_first_frame_of_an_animation(write) -> None:
    frames = [Image.fromarray(np.full((5, 7), level, dtype=np.uint8)) for level in (10, 200)]
    image = read_image(write(frames[0], ".gif", save_all=True, append_images=frames[1:]))
    assert torch.equal(image, torch.full((1, 3, 5, 7), 10) / 255)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays(dtype) -> None:
    values = RNG.random((5, 7, 3)).astype(dtype)
    assert torch.equal(read_image(values), tensor(values))


def test_integer_arrays_of_every_channel_count() -> None:
    assert torch.equal(read_image(RGB), exactly(RGB))
    assert torch.equal(read_image(GREY), exactly(GREY))
    assert torch.equal(read_image(GREY[..., None]), exactly(GREY))
    assert torch.equal(read_image(DEEP), exactly(DEEP))
    for pixels in (RGB, GREY):
        image = read_image(np.dstack([pixels, ALPHA]))
        assert (image - tensor(on_white(pixels, ALPHA))).abs().max() <= HALF_LEVEL * 1.0001


def test_arrays_of_any_layout_and_byte_order() -> None:
    assert torch.equal(read_image(RGB[::-1, ::2]), exactly(np.ascontiguousarray(RGB[::-1, ::2])))
    assert torch.equal(read_image(np.asfortranarray(RGB)), exactly(RGB))
    assert torch.equal(read_image(DEEP.astype(">u2")), exactly(DEEP))


def test_the_result_shares_no_memory_and_the_source_is_left_alone() -> None:
    values = RNG.random((5, 7, 3), dtype=np.float32)
    before = values.copy()
    read_image(values).zero_()
    assert np.array_equal(values, before)
    picture = Image.fromarray(RGB)
    read_image(picture, size=3)
    assert picture.size == (7, 5)
    values.setflags(write=False)
    read_image(values).zero_()


# --- size and crop


@pytest.mark.parametrize("shape", [(300, 451), (451, 300), (512, 512), (225, 224), (37, 999)])
@pytest.mark.parametrize(("target", "fraction"), [((224, 224), 224 / 256), ((240, 240), 240 / 272), ((96, 128), 1.0)])
def test_the_crop_is_the_largest_centred_one_times_the_fraction(shape, target, fraction) -> None:
    """A photo that is 1 inside the box of the convention and 0 outside gives 1 everywhere, and no larger box would."""
    share = Fraction(fraction).limit_denominator(1000)
    scale = share * min(Fraction(shape[0], target[0]), Fraction(shape[1], target[1]))
    height, width = (int(scale * side) for side in target)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    inside = np.zeros(shape, dtype=np.float32)
    inside[top : top + height, left : left + width] = 1
    image = read_image(inside, classifier(target, fraction))
    assert image.shape == (1, 3, *target)
    # Bicubic weights sum to one only up to float32 rounding.
    assert (image - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps
    for rows, columns in ((slice(top, top + 1), slice(None)), (slice(None), slice(left + width - 1, left + width))):
        broken = inside.copy()
        broken[rows, columns] = 0
        assert read_image(broken, classifier(target, fraction)).min() < 0.99


def test_eight_bits_are_resized_as_pillow_resizes_a_photo() -> None:
    pixels = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC))
    assert torch.equal(read_image(pixels, size=24), exactly(expected))


def test_eight_bits_and_floats_agree_up_to_the_rounding_of_two_passes() -> None:
    smooth = (np.add.outer(np.arange(64), np.arange(48)) * 2).astype(np.uint8)
    difference = read_image(smooth, size=(20, 15)) - read_image(smooth / 255, size=(20, 15))
    assert difference.abs().max() <= 2 * HALF_LEVEL * 1.5  # bicubic weights: sum of absolute values below 1.5


def test_overshoot_is_clamped() -> None:
    edge = np.zeros((8, 8), dtype=np.float32)
    edge[:, 4:] = 1
    image = read_image(edge, size=64)
    assert image.min() == 0
    assert image.max() == 1


def test_size_stands_in_for_the_models() -> None:
    model = classifier((10, 10), 0.5)
    border = np.zeros((40, 40), dtype=np.float32)
    border[10:30, 10:30] = 1
    image = read_image(border, model, size=(6, 6))
    assert image.shape == (1, 3, 6, 6)
    assert image.min() > 0.99  # the model's crop still applies


def test_a_photo_at_its_own_size_is_not_resampled() -> None:
    assert torch.equal(read_image(RGB, size=(5, 7)), exactly(RGB))


def test_one_row_of_pixels_left_by_the_crop_still_gives_a_picture() -> None:
    assert read_image(np.ones((2, 50)), classifier((8, 8), 0.5)).shape == (1, 3, 8, 8)


def test_read_images_stacks() -> None:
    batch = read_images([RGB, GREY, Image.fromarray(RGB)], classifier((4, 4)))
    assert batch.shape == (3, 3, 4, 4)
    assert torch.equal(batch[1:2], read_image(GREY, classifier((4, 4))))
    assert torch.equal(read_images((RGB,)), read_image(RGB))
    assert read_images([RGB, GREY[:3]], size=4).shape == (2, 3, 4, 4)


# --- refusals


def sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def refused(source: object, kind: type[Exception] = ValueError, **options: object) -> str:
    with pytest.raises(kind) as caught:
        read_image(source, **options)
    assert type(caught.value) is kind
    return sentence(caught.value)


READABLE = "pysal.read_image: source must be a readable image file, got"


def test_missing_file(tmp_path) -> None:
    path = tmp_path / "none.jpg"
    assert refused(path, FileNotFoundError) == f"{READABLE} {path} (no such file)"
    assert refused("", IsADirectoryError) == f"{READABLE} '' (a directory)"


def test_directory(tmp_path) -> None:
    assert refused(tmp_path, IsADirectoryError) == f"{READABLE} {tmp_path} (a directory)"


def test_not_a_directory_on_the_way(tmp_path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "photo.png"
    assert refused(path).startswith(f"{READABLE} {path} (not a directory")


def test_named_pipe_is_refused_and_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe") == f"{READABLE} {tmp_path / 'pipe'} (not a regular file)"


def test_unreadable_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "photo.png"
    path.touch()

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    assert refused(path, PermissionError) == f"{READABLE} {path} (permission denied)"


def test_null_byte_in_the_name() -> None:
    assert refused("a\0b").startswith(READABLE)


def test_empty_file(tmp_path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert refused(path) == f"{READABLE} {path} (the file is empty)"


@pytest.mark.parametrize("content", [b"hello, I am text\n", b"\x00" * 100, b"%PDF-1.4\n", b"\xff\xd8", b"GIF89a", b"II*\0"])
def test_not_an_image(tmp_path, content) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    assert refused(path) == f"{READABLE} {path} (not an image that Pillow can read)"


def test_postscript_is_not_run(tmp_path) -> None:
    path = tmp_path / "photo.eps"
    Image.fromarray(RGB).save(path)
    assert refused(path) == f"{READABLE} {path} (not an image that Pillow can read)"


@pytest.mark.parametrize("suffix", [".jpg", ".progressive.jpg", ".png", ".tif", ".gif", ".webp", ".bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_file(tmp_path, suffix, kept) -> None:
    content = io.BytesIO()
    kind = {".jpg": "JPEG", ".progressive.jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    noise = Image.fromarray(RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8))
    noise.save(content, kind, **({"progressive": True} if "progressive" in suffix else {}))
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(content.getvalue()[: int(kept * len(content.getvalue()))])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    message = refused(path)
    assert message.startswith(f"{READABLE} {path} (")
    assert message.endswith(")")


def test_truncated_jpeg_says_so(write, tmp_path) -> None:
    path = write(Image.fromarray(np.tile(RGB, (20, 20, 1))), ".jpg")
    path.write_bytes(path.read_bytes()[:-400])
    expected = rf"{READABLE} {path} (damaged or cut off: image file is truncated ("
    assert refused(path).startswith(expected)


def test_flipped_bits_in_a_png(write) -> None:
    path = write(Image.fromarray(RGB), ".png")
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(content)
    assert refused(path).startswith(f"{READABLE} {path} (damaged or cut off: ")


@pytest.mark.parametrize("factor", [1.5, 3.0], ids=["pillow warns", "pillow raises"])
@pytest.mark.parametrize("limit", [1000])
def test_decompression_bomb(write, monkeypatch, factor, limit) -> None:
    side = int((factor * limit) ** 0.5) + 1
    path = write(Image.new("L", (side, side)), ".png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    expected = "pysal.read_image: source must be an image of at most 1000 pixels (PIL.Image.MAX_IMAGE_PIXELS), got "
    assert refused(path) == f"{expected}{path} ({side * side} pixels)"


def test_text_bomb_in_a_png(write) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    path = write(Image.fromarray(RGB), ".png", pnginfo=info)
    assert refused(path).startswith(f"{READABLE} {path} (")


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("model", [None, classifier((8, 8))], ids=["own size", "model"])
def test_too_small(write, shape, model) -> None:
    path = write(Image.fromarray(np.zeros(shape, dtype=np.uint8)), ".png")
    requirement = "pysal.read_image: source must be an image of at least 2 x 2 pixels"
    assert refused(path, model=model) == f"{requirement}, got {path} ({shape[1]} x {shape[0]} pixels)"


@pytest.mark.parametrize("empty", [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0)), Image.new("RGB", (0, 0))])
def test_empty_image(empty) -> None:
    assert refused(empty).startswith("pysal.read_image: source must be an image of at least 2 x 2 pixels, got ")


FINITE = "have finite values"
RANGE = "have values in [0, 1] (or be uint8)"
SHAPE = "have shape (H, W) or (H, W, C) with C from 1 to 4"
DTYPE = "have dtype uint8, uint16 or floating"


@pytest.mark.parametrize(
    ("array", "kind", "expected"),
    [
        (np.full((4, 4, 3), np.nan), ValueError, f"{FINITE}, got NaN or infinity in an array (4, 4, 3) of float64"),
        (np.full((4, 4), np.inf), ValueError, f"{FINITE}, got NaN or infinity in an array (4, 4) of float64"),
        (np.full((4, 4), 255.0), ValueError, f"{RANGE}, got [255, 255] in an array (4, 4) of float64"),
        (np.full((4, 4), -0.5), ValueError, f"{RANGE}, got [-0.5, -0.5] in an array (4, 4) of float64"),
        (np.zeros((3, 8, 9)), ValueError, f"{SHAPE}, got an array (3, 8, 9) of float64"),
        (np.zeros(5), ValueError, f"{SHAPE}, got an array (5,) of float64"),
        (np.zeros((2, 4, 4, 3)), ValueError, f"{SHAPE}, got an array (2, 4, 4, 3) of float64"),
        (np.zeros((4, 4), bool), TypeError, f"{DTYPE}, got an array (4, 4) of bool"),
        (np.zeros((4, 4), np.int64), TypeError, f"{DTYPE}, got an array (4, 4) of int64"),
        (np.zeros((4, 4), complex), TypeError, f"{DTYPE}, got an array (4, 4) of complex128"),
        (np.zeros((4, 4), object), TypeError, f"{DTYPE}, got an array (4, 4) of object"),
    ],
)  # fmt: skip
def test_bad_arrays(array, kind, expected) -> None:
    assert refused(array, kind) == f"pysal.read_image: source must {expected}"


def test_one_nan_among_good_values_is_found() -> None:
    values = RNG.random((50, 50, 3))
    values[49, 49, 2] = np.nan
    assert "NaN" in refused(values)


def test_picture_of_integers_beyond_sixteen_bits() -> None:
    picture = Image.fromarray(np.array([[0, 70000], [1, 2]], dtype=np.int32))
    assert refused(picture) == "pysal.read_image: source must have values in [0, 65535], got [0, 70000] in a PIL image"


@pytest.mark.parametrize("source", [None, 3, bytearray(b"photo.jpg"), torch.zeros(3, 4, 4), [1, 2]])
def test_other_sources(source) -> None:
    expected = f"be a path, bytes, a PIL image or a NumPy array, got {type(source).__name__}"
    assert refused(source, TypeError) == f"pysal.read_image: source must {expected}"


def test_other_models() -> None:
    expected = "pysal.read_image: model must be a pysal.models.Classifier, got Identity"
    assert refused(RGB, TypeError, model=nn.Identity()) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "be at least 1 pixel, got 0"),
        (2**31, "be at most 65535 pixels a side, got 2147483648"),
        ((4, -1), "be at least 1 pixel, got (4, -1)"),
        (2.5, "be a number of pixels or (height, width), got 2.5"),
        ((1, 2, 3), "be a number of pixels or (height, width), got (1, 2, 3)"),
        ("big", "be a number of pixels or (height, width), got 'big'"),
    ],
)
def test_bad_sizes(size, expected) -> None:
    assert refused(RGB, size=size) == f"pysal.read_image: size must {expected}"


def test_read_images_refusals(tmp_path) -> None:
    one_size = "have one size (or give size=)"
    for sources, kind, expected in (
        ([], ValueError, "hold at least one photo, got none"),
        ("photo.jpg", TypeError, "be a list of photos, got str"),
        (RGB, TypeError, "be a list of photos, got ndarray"),
        ([RGB, GREY[:3]], ValueError, f"{one_size}, got (5, 7) and (3, 7) (an array (3, 7) of uint8)"),
    ):
        with pytest.raises(kind) as caught:
            read_images(sources)
        assert sentence(caught.value) == f"pysal.read_images: sources must {expected}"
    with pytest.raises(FileNotFoundError, match="none\\.png"):
        read_images([RGB, tmp_path / "none.png"])


def test_no_file_stays_open(write) -> None:
    """An open file would end as a ResourceWarning, which the suite makes an error; here it is looked for."""
    path = write(Image.fromarray(RGB), ".png")
    before = set(os.listdir("/proc/self/fd"))
    read_image(path)
    path.write_bytes(path.read_bytes()[:50])
    refused(path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_warning_filters_are_left_as_they_were(write, tmp_path) -> None:
    path = write(Image.fromarray(RGB), ".png")
    before = list(warnings.filters)
    read_image(path)
    refused(tmp_path / "none.png", FileNotFoundError)
    assert warnings.filters == before


KINDS_OF_ARRAY = {
    "np.matrix": lambda pixels: pixels[..., 0].view(np.matrix),
    "a masked array with no mask": np.ma.array,
    "big-endian": lambda pixels: (pixels / 255).astype(">f4"),
    "big-endian whole numbers": lambda pixels: (pixels.astype(np.uint16) * 257).astype(">u2"),
    "negative strides": lambda pixels: pixels[::-1, ::-1][::-1, ::-1],
    "every other pixel": lambda pixels: pixels.repeat(2, 0).repeat(2, 1)[::2, ::2],
    "channels first in memory": lambda pixels: np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0),
    "read-only": lambda pixels: np.broadcast_to(pixels, pixels.shape),
    "a subclass": lambda pixels: pixels.view(type("Mine", (np.ndarray,), {"__getitem__": lambda *_: 1 / 0})),
    "long double": lambda pixels: (pixels / 255).astype(np.longdouble),
}


@pytest.mark.parametrize("kind", KINDS_OF_ARRAY)
@pytest.mark.parametrize("size", [None, 5])
def test_every_kind_of_array_is_read_as_its_values(kind: str, size: int | None) -> None:
    pixels = RNG.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    array = KINDS_OF_ARRAY[kind](pixels)
    plain = np.array(array, subok=False, dtype=array.dtype.newbyteorder("="), order="C")
    assert torch.equal(read_image(array, size=size), read_image(plain, size=size))
    exact = pixels[..., :1] if kind == "np.matrix" else pixels
    if size is None:
        assert (read_image(array) - exactly(exact)).abs().max() <= torch.finfo(torch.float32).eps


def test_a_memory_map_is_read(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "photo.npy", pixels)
    assert torch.equal(read_image(np.load(tmp_path / "photo.npy", mmap_mode="r")), exactly(pixels))


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.ma.array(np.zeros((4, 4)), mask=np.eye(4)), ValueError, r"have no masked values, got an array \(4, 4\) of float64"),
        (np.zeros((4, 4), dtype=object), TypeError, r"have dtype uint8, uint16 or floating, got an array \(4, 4\) of object"),
        (np.zeros((4, 4), dtype=[("r", "u1")]).view(np.recarray), TypeError, r"have dtype uint8, uint16 or floating, got .*"),
        (np.zeros((4, 4), dtype=complex).view(np.matrix), TypeError, r"have dtype uint8, uint16 or floating, got .*"),
    ],
)  # fmt: skip
def test_what_an_array_must_not_be(array: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^pysal.read_image: source must {message}$"):
        read_image(array)


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("dtype", ["bool", "int16", "complex64"])
def test_a_file_of_other_numbers_cannot_be_read(dtype: str, channels: int, tmp_path: Path) -> None:
    """A ValueError, as of a damaged photo: among many files it is one row. A TypeError, of a wrong call, would end them all."""
    path = tmp_path / "bands.npy"
    np.save(path, np.zeros((4, 5, channels), dtype=dtype))
    for source, named in ((path, re.escape(str(path))), (path.read_bytes(), f"{path.stat().st_size} bytes")):
        shown = rf"{named} \(an array \(4, 5, {channels}\) of {dtype}\)"
        with pytest.raises(ValueError, match=rf"^pysal.read_image: source must {DTYPE}, got {shown}$"):
            read_image(source, channels=channels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB"])
def test_a_large_photo_takes_a_few_copies_and_no_more(mode: str, tmp_path: Path) -> None:
    """The blending of transparency in float32, of a whole photo at once, took 50 bytes a pixel; Pillow holds 4."""
    Image.new(mode, (3000, 3000)).save(tmp_path / "large.png")
    script = (
        "import resource, sys, pysal, torch\n"
        "pysal.read_image(sys.argv[1], size=8)\n"  # what is loaded on the way is no matter of memory
        "used = next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if line.startswith('VmSize'))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 3000 * 3000, resource.RLIM_INFINITY))\n"
        "assert pysal.read_image(sys.argv[1], size=64).shape == (1, 3, 64, 64)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "large.png")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("turned", [False, True])
def test_heic_photos_are_decoded_and_turned(turned, tmp_path):
    """By the plugin, in a process that never heard of it: one that was written without loss, exactly."""
    script = """
import sys, numpy, pillow_heif, PIL.Image
pillow_heif.register_heif_opener()
picture = PIL.Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=numpy.uint8))
exif = picture.getexif()
exif[274] = int(sys.argv[2])
picture.save(sys.argv[1], format="HEIF", quality=-1, chroma=444, matrix_coefficients=0, exif=exif.tobytes())
"""
    path = tmp_path / "telephone.heic"
    subprocess.run([sys.executable, "-c", script, str(path), "6" if turned else "1"], check=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    expected = np.rot90(pixels, -1) if turned else pixels
    for source in (path, path.read_bytes()):
        assert torch.equal(read_image(source), read_image(expected.copy()))


def test_heic_photos_need_a_plugin_and_say_so(tmp_path, monkeypatch):
    path = tmp_path / "telephone.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
    Image.init()  # fills the list that is replaced, once in a process
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(caught.value) == (
        f"pysal.read_image: source must be a readable image file, got {path} "
        "(a HEIC photo, for which Pillow needs: pip install pillow-heif)"
    )
    registered = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    with pytest.raises(ValueError, match="not an image that Pillow can read"):  # the file is cut, and the plugin is not real
        read_image(path)
    assert registered == [True]
