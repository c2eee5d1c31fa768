"""An explanation in a file: an npz that holds everything, read back without running anything of it."""

from __future__ import annotations

import json
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pysal._checks import check_path, refuse
from pysal._spelling import close_to, did_you_mean
from pysal.explanation.findings import WHERE, Detail, Findings, MethodResult, one_line

FORMAT = "pysal.explanation.1"
STEM = "explanation"  # of the files that `Explanation.save` writes, where it is told none
Made = TypeVar("Made")


def save(
    found: Findings, directory: str | os.PathLike[str], stem: str, draw: Callable[[int, BinaryIO], Any] | None
) -> tuple[Path, ...]:
    """Write the npz and, with `draw`, a picture of each image; see `Explanation.save`."""
    where = f"{WHERE}.save"
    if not stem or stem in (".", "..") or "/" in stem or os.sep in stem or "\0" in stem:
        refuse(where, "stem", "be a file name without directories", repr(stem))
    folder = Path(directory)
    writers: dict[Path, Callable[[BinaryIO], Any]] = {folder / f"{stem}.npz": partial(_write_npz, found)}
    if draw is not None:
        for image, name in enumerate(numbered(stem, len(found.images))):
            writers[folder / f"{name}.png"] = partial(draw, image)
    write_all(where, writers)
    return tuple(writers)


def numbered(stem: str, count: int) -> list[str]:
    """Return a name for each image: the stem, or the stem with a number; the names sort as the images do."""
    digits = len(str(count - 1))
    return [stem] if count == 1 else [f"{stem}-{image:0{digits}}" for image in range(count)]


def wanted_file(directory: str | os.PathLike[str], stem: str) -> Path | None:
    """Return the one file that `Explanation.save` is asked for, None where it is asked for a folder."""
    where = f"{WHERE}.save"
    given = os.fspath(check_path(where, "directory", directory))
    path = Path(given)
    if not given:
        refuse(where, "directory", "name a folder or a file", repr(given))
    if stem != STEM or path.is_dir() or not path.stem or given.endswith(("/", os.sep)):
        return None
    ending = path.suffix[1:].lower()
    if ending == "npz" or ending in pictures():
        return path
    if ending.isalpha():  # v1.2 is a folder, and x.jgp a mistake
        known = [".npz", *(f".{one}" for one in sorted(pictures()))]
        meant = did_you_mean(close_to(path.suffix, known))
        refuse(
            where, "directory", f"be a folder (one with such an ending: {given}/), or end in {', '.join(known)}{meant}", given
        )
    return None


def pictures() -> dict[str, str]:
    """Return the endings of pictures that matplotlib writes, with what they are."""
    from matplotlib.backend_bases import FigureCanvasBase

    return FigureCanvasBase.get_supported_filetypes()


def save_one(found: Findings, path: Path, draw: Callable[[int, BinaryIO, str], Any]) -> tuple[Path, ...]:
    """Write the numbers alone, or the pictures alone; see `Explanation.save`."""
    ending = path.suffix[1:].lower()
    writers: dict[Path, Callable[[BinaryIO], Any]] = {}
    if ending == "npz":
        writers[path] = partial(_write_npz, found)
    else:
        for image, name in enumerate(numbered(path.stem, len(found.images))):
            writers[path.with_name(name + path.suffix)] = lambda file, image=image: draw(image, file, ending)  # type: ignore[misc]
    write_all(f"{WHERE}.save", writers)
    return tuple(writers)


def _write_npz(found: Findings, file: BinaryIO) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    dtypes: dict[str, str] = {}

    def put(key: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if tensor.dtype == torch.bfloat16:
            dtypes[key] = "bfloat16"
            tensor = tensor.float()
        arrays[key] = tensor.numpy()

    put("images", found.images)
    for key, tensor in found.per_image().items():
        put(key, tensor)
    results = []
    for name, result in found.results.items():
        put(name, result.map)
        lists, plain = {}, {}
        for key, detail in result.details.items():
            if isinstance(detail, Tensor):
                put(f"{name}.{key}", detail)
            elif isinstance(detail, list):
                lists[key] = len(detail)
                for index, tensor in enumerate(detail):
                    put(f"{name}.{key}.{index}", tensor)
            else:
                plain[key] = detail
        fields = ("name", "title", "reduction", "signed", "seconds", "passes", "score_kind")
        about = {key: getattr(result, key) for key in fields}
        results.append({**about, "order": list(result.details), "lists": lists, "details": plain})
    names = ("target_names", "score_kind", "skipped", "model_name", "seconds", "build", "output")
    metadata = {"format": FORMAT, **{key: getattr(found, key) for key in names}, "results": results}
    metadata |= {"keys": list(arrays), "dtypes": dtypes}
    arrays["metadata"] = np.array(json.dumps(_plain(metadata), ensure_ascii=False, allow_nan=False))
    np.savez(file, **arrays)  # type: ignore[arg-type]


def load(path: str | os.PathLike[str], make: Callable[..., Made]) -> Made:
    """Return what `make` makes of the fields that `save` wrote, see `Explanation.load`."""
    where = f"{WHERE}.load"
    path = check_path(where, "path", path)
    if os.path.isdir(path):
        path = _in_folder(where, Path(path))
    try:
        file = open(path, "rb")
    except OSError as error:
        refuse(where, "path", "be a file that can be read", f"{path} ({error.strerror or error})", type(error))
    with file:
        try:
            return _read(file, make)
        except Exception as error:  # numpy, zipfile, tokenize and json raise a dozen types on damaged files
            refuse(where, "path", "be an npz file written by Explanation.save, whole", f"{path} ({one_line(str(error))})")


def _in_folder(where: str, folder: Path) -> Path:
    """Return the explanation in a folder: the one that `save` names by itself, or the only one."""
    there = sorted(path for path in folder.glob("*.npz") if path.is_file())
    usual = folder / f"{STEM}.npz"
    if usual in there or len(there) == 1:
        return usual if usual in there else there[0]
    if not there:
        refuse(where, "path", "be an npz file, or a folder with one", f"{folder}, which has none", FileNotFoundError)
    names = ", ".join(path.name for path in there[:5]) + (", ..." if len(there) > 5 else "")
    refuse(where, "path", f"be one of the files of a folder that has several ({names})", str(folder))


def _read(file: BinaryIO, make: Callable[..., Made]) -> Made:
    with zipfile.ZipFile(file) as archive:
        if spoilt := archive.testzip():
            raise ValueError(f"{spoilt} is damaged")
    file.seek(0)
    arrays = np.load(file, allow_pickle=False)
    metadata = json.loads(str(arrays["metadata"][()]), object_hook=_restored)
    if metadata["format"] != FORMAT:
        raise ValueError(f"format {metadata['format']}")
    if missing := sorted(set(metadata["keys"]) - set(arrays)):
        raise ValueError(f"without {', '.join(missing)}")

    def get(key: str) -> Tensor:
        tensor = torch.from_numpy(arrays[key])
        return tensor.to(getattr(torch, metadata["dtypes"].get(key, ""), tensor.dtype))

    results = {}
    for about in metadata["results"]:
        name, lists, plain = about["name"], about.pop("lists"), about.pop("details")
        details: dict[str, Detail] = {}
        for key in about.pop("order"):
            if key in lists:
                details[key] = [get(f"{name}.{key}.{index}") for index in range(lists[key])]
            else:
                details[key] = plain[key] if key in plain else get(f"{name}.{key}")
        results[name] = MethodResult(map=get(name), details=details, **about)
    names = ("target_names", "score_kind", "skipped", "model_name", "seconds", "build")
    return make(
        images=get("images"),
        target=get("target"),
        scores=get("scores"),
        probabilities=get("probabilities") if "probabilities" in arrays else None,
        results=results,
        output=metadata.get("output", ""),
        **{key: metadata[key] for key in names},
    )


def _plain(value: object) -> object:
    """Return what JSON can say: numbers that are not finite as {"__float__": "nan"}, unknown objects as their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _restored(mapping: dict[str, Any]) -> Any:
    return float(mapping["__float__"]) if set(mapping) == {"__float__"} else mapping


def write_all(where: str, writers: Mapping[Path, Callable[[BinaryIO], Any]]) -> None:
    """Write all files or none: under temporary names beside their own first, renamed when all are whole."""
    written: dict[Path, Path] = {}
    path = Path()
    try:
        for path, writer in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            written[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            with open(written[path], "xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        for path in writers:
            os.replace(written[path], path)
    except OSError as error:
        refuse(where, str(path), "be writable", error.strerror or str(error), type(error))
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
