"""Boxes and masks: each pixel by hand, the crop of the photo, names that find each other, and files that are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pysal import annotations, metrics
from pysal.models import Classifier, read_image

HEIGHT, WIDTH = 12, 20


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photos/a.jpg"
    file.parent.mkdir()
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(file)
    return file


def voc(folder: Path, name: str = "a", boxes: str = "", size: str = f"<width>{WIDTH}</width><height>{HEIGHT}</height>") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    file = folder / f"{name}.xml"
    file.write_text(f"<annotation><filename>{name}.jpg</filename><size>{size}</size>{boxes}</annotation>")
    return file


def box(left: float, top: float, right: float, bottom: float, name: str = "cat") -> str:
    sides = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>12</ymax></bndbox></part>"
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox>{part}</object>"


def coco(folder: Path, *objects: dict[str, Any], **more: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    images = [{"id": 7, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}]
    listed = [{"image_id": 7, "category_id": 1 + number, **one} for number, one in enumerate(objects)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": listed, "categories": categories, **more}))
    return file


def pixels(*places: tuple[slice, slice]) -> torch.Tensor:
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    for rows, columns in places:
        mask[0, rows, columns] = True
    return mask


def runs(mask: np.ndarray) -> list[int]:
    """COCO's run lengths, column after column, the first outside."""
    counts, now, length = [], False, 0
    for value in mask.T.flatten():
        if bool(value) != now:
            counts, now, length = [*counts, length], bool(value), 0
        length += 1
    return [*counts, length]


def letters(counts: list[int]) -> str:
    """COCO's text of run lengths, written from its description: 5 bits a letter, sign and continuation above."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            done = (value == 0 and not bits & 16) or (value == -1 and bits & 16)
            text += chr((bits if done else bits | 32) + 48)
            if done:
                break
    return text


def test_boxes_of_voc_are_counted_from_one_and_hold_their_last_pixel(photo: Path) -> None:
    found = annotations.read(voc(photo.parent.parent / "boxes", boxes=box(3, 2, 5, 4) + box(20, 12, 20, 12, "dog")).parent)
    assert (found.kind, found.names) == ("voc", ["a"])
    whole = pixels((slice(1, 4), slice(2, 5)), (slice(11, 12), slice(19, 20)))
    assert torch.equal(found.mask(photo), whole)
    assert torch.equal(found.mask(photo, label="DOG"), pixels((slice(11, 12), slice(19, 20))))
    assert torch.equal(found.mask(photo, label="horse"), whole)  # of a class that nobody has marked all objects are meant


def test_boxes_outlines_and_runs_of_coco(photo: Path, tmp_path: Path) -> None:
    assert torch.equal(
        annotations.read(coco(tmp_path / "1", {"bbox": [2, 1, 3, 3]})).mask(photo), pixels((slice(1, 4), slice(2, 5)))
    )
    outline = {"bbox": [0, 0, 20, 12], "segmentation": [[2, 1, 5, 1, 5, 4, 2, 4], [10, 6, 12, 6, 12, 8, 10, 8]]}
    both = pixels((slice(1, 4), slice(2, 5)), (slice(6, 8), slice(10, 12)))
    assert torch.equal(annotations.read(coco(tmp_path / "2", outline)).mask(photo), both)
    for number, counts in enumerate((runs(both[0].numpy()), letters(runs(both[0].numpy())))):
        region = {"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}, "iscrowd": 1}
        assert torch.equal(annotations.read(coco(tmp_path / f"3{number}", region)).mask(photo), both)


def test_text_of_long_runs() -> None:
    mask = np.random.default_rng(0).random((300, 200)) < 0.003  # runs of thousands, and short after long ones
    assert max(runs(mask)) > 1024
    assert annotations._unpacked(letters(runs(mask))) == runs(mask)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_masks_of_all_kinds(photo: Path, tmp_path: Path, mode: str) -> None:
    inside = pixels((slice(2, 9), slice(3, 11)))[0].numpy()
    (tmp_path / "masks").mkdir()
    if mode == "P":
        indices = np.where(inside, 15, 0).astype(np.uint8)
        indices[0] = 255  # VOC's border
        picture = Image.fromarray(indices, "P")
        picture.putpalette([value for number in range(256) for value in (number, 0, 255 - number)])
    elif mode == "I;16":
        picture = Image.fromarray(inside.astype(np.uint16) * 300)
    elif mode == "RGBA":
        picture = Image.fromarray(
            np.dstack([np.full((HEIGHT, WIDTH, 3), 90, np.uint8), np.where(inside, 255, 0).astype(np.uint8)])
        )
    else:
        picture = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).convert(mode)
    picture.save(tmp_path / "masks/a.png")
    assert torch.equal(annotations.read(tmp_path / "masks").mask(photo)[0], torch.from_numpy(inside))


@pytest.mark.parametrize(("size", "fraction"), [((6, 6), 1.0), ((8, 8), 0.75), ((5, 9), 0.9), ((24, 24), 1.0)])
def test_the_mask_is_cropped_and_resized_as_the_photo(tmp_path: Path, size: tuple[int, int], fraction: float) -> None:
    # a photo that is white on the object: what the model sees of it is bright where the mask is
    inside = np.zeros((40, 60), bool)
    inside[8:30, 20:44] = True
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(tmp_path / "masks/a.png")
    Image.fromarray(np.where(inside[..., None], 255, 0).astype(np.uint8).repeat(3, 2)).save(tmp_path / "a.png")
    model = Classifier(
        nn.Identity(), name="x", class_names=["a", "b"], input_size=size, crop_fraction=fraction, resample="bilinear"
    )
    seen = read_image(tmp_path / "a.png", model)[:, 0]
    mask = annotations.read(tmp_path / "masks").mask(tmp_path / "a.png", model)
    assert mask.shape == (1, *size)
    assert torch.equal(mask, seen >= 0.5)


def test_photos_that_are_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((WIDTH, HEIGHT, 3), np.uint8).transpose(1, 0, 2)).save(tmp_path / "a.jpg", exif=exif)
    boxes = voc(tmp_path / "boxes", boxes=box(1, 1, 2, 3), size=f"<width>{HEIGHT}</width><height>{WIDTH}</height>")
    mask = annotations.read(boxes).mask(tmp_path / "a.jpg")
    assert mask.shape == (1, WIDTH, HEIGHT)
    assert mask[0, :3, :2].all()
    assert mask.sum() == 6


def test_names_find_each_other(photo: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    for name in ("photos/a", "other/a", "b"):
        (masks / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.full((HEIGHT, WIDTH), 255 * (name != "other/a"), np.uint8)).save(masks / f"{name}.png")
    found = annotations.read(masks)
    assert found.has(photo)
    assert found.mask(photo).all()
    assert found.mask(photo.with_name("c.jpg")) is None
    assert found.has("anywhere/b.jpeg")
    assert found.mask("other/a.jpg", content=photo) is None  # without an object
    with pytest.raises(ValueError, match=r"photo must have one annotation, got a\.jpg with .*a\.png and .*a\.png$"):
        found.mask("a.jpg", content=photo)


def test_figures_take_it(photo: Path) -> None:
    mask = annotations.read(voc(photo.parent.parent / "boxes", boxes=box(3, 2, 5, 4))).mask(photo)
    map = torch.zeros(1, 1, HEIGHT, WIDTH)
    map[0, 0, 2, 3], map[0, 0, 0, 0] = 3.0, 1.0
    assert metrics.mass_in_mask(map, mask).tolist() == [0.75]


BOMB = "<!DOCTYPE a [<!ENTITY b 'bbbbbbbbbb'><!ENTITY c '&b;&b;&b;&b;&b;'>]><annotation>&c;</annotation>"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.xml", BOMB, "it declares a document type, which no annotation needs"),
        ("a.xml", "<!DOCTYPE a SYSTEM 'file:///etc/passwd'><annotation/>", "it declares a document type"),
        ("a.xml", "<annotation>", "no element found"),
        ("a.xml", "", "no element found"),
        ("a.xml", "<html/>", "its root is <html>, not <annotation>"),
        ("a.xml", "<annotation><object><name>cat</name></object></annotation>", "an object without <bndbox>"),
        ("a.xml", f"<annotation>{box(5, 1, 4, 2)}</annotation>", "a box from (5, 1) to (4, 2)"),
        ("a.xml", f"<annotation>{box('nan', 1, 4, 2)}</annotation>", "<xmin> is 'nan', no number"),  # type: ignore[arg-type]
        ("a.json", "{", "Expecting property name"),
        ("a.json", "[]", "no object with a list 'images'"),
        ("a.json", '{"images": [{}]}', "image 0 has no id or file_name"),
        ("a.json", '{"images": []}', "no list 'annotations'"),
        ("a.json", '{"images": [], "annotations": [{"image_id": 3}]}', "annotation 0 is of image 3, which is not listed"),
        ("a.json", '{"images": [{"id": 1, "file_name": "."}], "annotations": []}', "image 0 has the file_name '.'"),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}], "annotations": []}',
            "image 1 has the id 1 of another",
        ),
        ("a.json", "[" * 100_000, ""),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        annotations.read(tmp_path / name)
    assert str(caught.value).startswith("pysal.annotations.read: source must be a readable annotation, got ")
    assert f"{tmp_path / name} ({why}" in str(caught.value)


@pytest.mark.parametrize(
    ("one", "why"),
    [
        ({"bbox": [1, 2, 3]}, "has no bbox of x, y, width, height"),
        ({"bbox": [1, 2, -3, 4]}, "has no bbox of x, y, width, height"),
        ({"bbox": "here"}, "has no bbox of x, y, width, height"),
        ({"bbox": [1e308, 2, 1e308, 4]}, "has no bbox of x, y, width, height"),
        ({"bbox": [1, 2, 10**400, 4]}, "has no bbox of x, y, width, height"),
        ({"segmentation": [[1, 2, 3, 4]]}, "has an outline that is not x, y of at least three corners"),
        ({"segmentation": [[0, 0, 1e300, 0, 1e300, 1e300]]}, "has an outline that is not x, y of at least three corners"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3, 4]}}, "has run lengths that do not add up to its size"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "~~"}}, "has run lengths that do not add up to its size"),
        ({"segmentation": {"size": "big", "counts": [240]}}, "has run lengths that do not add up to its size"),
    ],
)
def test_damaged_objects_of_coco(tmp_path: Path, one: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"instances.json \\(annotation 0 {why}\\)$"):
        annotations.read(coco(tmp_path, one))


def test_what_other_programs_write(photo: Path, tmp_path: Path) -> None:
    box = {"bbox": [2, 1, 3, 3]}
    marked = coco(tmp_path / "1", box)
    marked.write_text(marked.read_text(), "utf-8-sig")
    unnamed = coco(tmp_path / "2", box | {"category_id": [1]}, categories=[{"id": {}, "name": "cat"}])
    sized = coco(tmp_path / "3", box, images=[{"id": 7, "file_name": "a.jpg", "height": True, "width": True}])
    for file in (marked, unnamed, sized):
        assert torch.equal(annotations.read(file).mask(photo, label="cat"), pixels((slice(1, 4), slice(2, 5))))


def test_sizes_that_do_not_fit(photo: Path, tmp_path: Path) -> None:
    found = annotations.read(voc(tmp_path / "b", boxes=box(1, 1, 2, 2), size="<width>99</width><height>12</height>"))
    with pytest.raises(
        ValueError, match=r"annotation must have the size of .*a\.jpg, 12 x 20 \(height x width\), got 12 x 99 in "
    ):
        found.mask(photo)
    unknown = annotations.read(voc(tmp_path / "c", boxes=box(1, 1, 2, 2), size="<width>0</width><height>0</height>"))
    assert unknown.mask(photo).sum() == 4
    (tmp_path / "m").mkdir()
    Image.new("L", (4, 4), 1).save(tmp_path / "m/a.png")
    with pytest.raises(ValueError, match=r"got 4 x 4 in .*a\.png$"):
        annotations.read(tmp_path / "m").mask(photo)
    (tmp_path / "m/a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"mask must be a readable PNG file, got .*a\.png \("):
        annotations.read(tmp_path / "m").mask(photo)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source must be there, got .*nowhere \(no such file or folder\)$"):
        annotations.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"source must be a COCO file \(.json\), VOC's files \(.xml\) or masks \(.png\), got "):
        annotations.read(tmp_path)
    with pytest.raises(TypeError, match="source must be a path, got int"):
        annotations.read(3)  # type: ignore[arg-type]
    voc(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"hold one kind of annotation, .xml, .png or .json, got .* with 1 .xml and 1 .png$"):
        annotations.read(tmp_path)


def test_arguments_of_another_type(photo: Path, tmp_path: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / "a.png")
    known = annotations.read(tmp_path)
    call = "^pysal.annotations.Annotations."
    with pytest.raises(TypeError, match=call + "mask: label must be the name of a class, or None, got 3$"):
        known.mask(photo, label=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=call + "mask: photo must be a path, got 3$"):
        known.mask(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=call + "has: photo must be a path, got None$"):
        known.has(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=call + "holds: file must be a path, got 3$"):
        known.holds(3)  # type: ignore[arg-type]


def test_the_fingerprint_is_of_what_the_files_hold(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "xyz"]
    for folder in folders:
        folder.mkdir()
        for name in "ab":
            Image.new("L", (4, 4), 1).save(folder / f"{name}.png")
    Image.new("L", (4, 4), 0).save(folders[2] / "b.png")
    first, copied, changed = (annotations.read(folder).fingerprint for folder in folders)
    assert first == copied
    assert first != changed
    (folders[1] / "b.png").rename(folders[1] / "c.png")
    assert annotations.read(folders[1]).fingerprint != first
