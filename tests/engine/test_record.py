"""What was found out about a prepared model is written to a file of numbers and words, and used for that model alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.engine.prepared import prepare as preparing
from pysal.engine.prepared.gains import Gains

USED = Gains(2.0, 2.0)
METHODS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gradient": lambda model, x: pysal.gradient(model, x, 1),
    "grad_cam": lambda model, x: pysal.grad_cam(model, x, 1),
    "leave_one_out": lambda model, x: pysal.leave_one_out(model, x, 1, segments=pysal.Grid(3, 3)),
}


class Network(nn.Module):
    def __init__(self, *, decides: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.last, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.decides, self.factor = decides, 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.decides and x.shape[2] < 2:  # what torch.fx cannot decide
            raise ValueError("the image is too small")
        y = self.act(self.last(self.act(self.norm(self.conv(x)))))
        return self.head(y.mean((2, 3))) * self.factor


class Branching(Network):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


def network(
    *, decides: bool = False, kind: type[Network] = Network, dtype: torch.dtype = torch.float32
) -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    return kind(decides=decides).to(dtype).eval(), torch.rand(2, 3, 14, 14, dtype=dtype)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model, x = network()
    path = tmp_path / "model.json"
    pysal.prepare(model, x, batch_size=3, gains=USED).save(path)
    return path


@pytest.mark.parametrize("decides", [False, True])
def test_a_loaded_one_is_the_saved_one(tmp_path: Path, decides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(decides=decides)
    saved = pysal.prepare(model, x, gains=Gains(2.0, 0.5, 0.5))
    saved.save(tmp_path / "model.json")

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("this was found out before")

    for name in ("own_pass", "exact_pass", "compared", "measure_gains", "fastest_rows"):
        monkeypatch.setattr(preparing, name, refuse)
    loaded = pysal.load_prepared(tmp_path / "model.json", network(decides=decides)[0])
    assert loaded.report() == saved.report()
    assert (loaded.rows, loaded.rows_asked, loaded.gains, loaded.precision) == (saved.rows, False, saved.gains, saved.precision)
    assert (loaded.program is None, loaded._graph is None) == (False, True)
    for method in METHODS.values():
        assert torch.equal(method(loaded, x), method(saved, x))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "model.json").read_bytes()


def test_what_runs_as_it_is_is_not_looked_at_again(tmp_path: Path) -> None:
    model, x = network(kind=Branching)
    saved = pysal.prepare(model, x, batch_size=2)
    assert not saved.fused
    saved.save(tmp_path / "model.json")
    loaded = pysal.load_prepared(tmp_path / "model.json", model)
    assert loaded.report() == saved.report()
    assert torch.equal(loaded(x), model(x))


def test_the_file_has_numbers_and_words_alone(file: Path) -> None:
    found = json.loads(file.read_text())
    assert found["shape"] == [3, 14, 14]
    assert (found["rows"], found["rows_asked"], found["dtype"]) == (3, True, "float32")
    assert len(file.read_bytes()) < 2000


def other_weights(model: Network) -> None:
    with torch.no_grad():
        model.head.bias[1] += 1e-6


def other_statistics(model: Network) -> None:
    assert model.norm.running_mean is not None
    model.norm.running_mean[3] = 0.5


def other_stride(model: Network) -> None:
    model.last.stride = (2, 2)


def other_factor(model: Network) -> None:
    model.factor = 2.0


def other_epsilon(model: Network) -> None:
    model.norm.eps = 1e-3


def other_slope(model: Network) -> None:
    model.act = nn.LeakyReLU(0.2)  # type: ignore[assignment]


CHANGES = {
    other_weights: "model must have the weights that .* was made for, got others: prepare the model again",
    other_statistics: "model must have the weights that .* was made for, got others: prepare the model again",
    other_stride: "model must have the graph that .* was made for, got another: prepare the model again",
    other_factor: "model must have the graph that .* was made for, got another: prepare the model again",
    other_epsilon: "model must have the graph that .* was made for, got another: prepare the model again",
    other_slope: "model must have the weights that .* was made for, got others: prepare the model again",
    lambda model: model.double(): "model must have the dtype float32 that .* was made for, got float64",
    lambda model: model.train(): "model must be in eval mode",
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_refused(file: Path, change: Callable[[Network], Any]) -> None:
    model, _ = network()
    change(model)
    with pytest.raises(ValueError, match=rf"^pysal.load_prepared: {CHANGES[change]}") as caught:
        pysal.load_prepared(file, model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["torch", "pysal", "processor"])
def test_another_machine_or_version_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    prepared = pysal.prepare(model, x, batch_size=3, gains=USED)
    record = prepared.record()
    object.__setattr__(record, name, "7.0")
    monkeypatch.setattr(prepared, "record", lambda: record)
    prepared.save(tmp_path / "model.json")
    with pytest.raises(
        ValueError, match=rf"^pysal.load_prepared: path must be of this {name}, .* of 7.0: prepare the model again$"
    ):
        pysal.load_prepared(tmp_path / "model.json", model)


def damaged(content: bytes) -> dict[str, bytes]:
    found = json.loads(content)
    return {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "another": b"PK\x03\x04" + content,
        "a list": b"[]",
        "a number": b"1",
        "deep": b"[" * 50_000,
        "a value": content.replace(b'"rows": 3', b'"rows": 4'),
        "a gain": json.dumps(found | {"gains": {"gradient": "2", "forward": 1.0, "boxes": None}}).encode(),
        "a key more": json.dumps(found | {"more": 1}).encode(),
        "a key less": json.dumps({key: value for key, value in found.items() if key != "gains"}).encode(),
        "not UTF-8": b"\xff\xfe" + content,
        "long": content + b" " * 200_000,
    }


def test_a_damaged_file_is_refused_in_a_sentence(file: Path, tmp_path: Path) -> None:
    model, _ = network()
    sentence = r"^pysal.load_prepared: path must be a file written by PreparedModel.save, whole, got"
    for number, content in enumerate(damaged(file.read_bytes()).values()):
        spoilt = tmp_path / f"{number}.json"
        spoilt.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            pysal.load_prepared(spoilt, model)


def test_files_that_are_not_there(tmp_path: Path, file: Path) -> None:
    model, x = network()
    with pytest.raises(
        FileNotFoundError, match=r"^pysal.load_prepared: path must be a file that can be read, got .*No such file"
    ):
        pysal.load_prepared(tmp_path / "none.json", model)
    with pytest.raises(TypeError, match=r"^pysal.load_prepared: model must be an nn.Module, got str"):
        pysal.load_prepared(file, "model")  # type: ignore[arg-type]
    prepared = pysal.prepare(model, x, batch_size=3, gains=USED)
    with pytest.raises(
        OSError, match=r"^pysal.PreparedModel.save: path must be a file that can be written, got .*No such file"
    ):
        prepared.save(tmp_path / "no" / "model.json")
    before = file.read_bytes()
    other_weights(model)
    with pytest.raises(ValueError, match="be prepared again after its weights have changed"):
        prepared.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("value", [None, 3, b"model.json"])
def test_what_is_no_name_of_a_file_is_refused(value: Any) -> None:
    model, images = network()
    sentence = f"path must be the name of a file or folder, a str or os.PathLike, got {type(value).__name__}$"
    with pytest.raises(TypeError, match=f"^pysal.load_prepared: {sentence}"):
        pysal.load_prepared(value, model)
    with pytest.raises(TypeError, match=f"^pysal.PreparedModel.save: {sentence}"):
        pysal.prepare(model, images).save(value)


def test_another_image_size_runs_the_model(file: Path) -> None:
    model, _ = network()
    loaded, larger = pysal.load_prepared(file, model), torch.rand(1, 3, 20, 20)
    assert torch.equal(loaded(larger), model(larger))
