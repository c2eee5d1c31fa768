"""Files of models that do more than compute: none of them does it unasked, whatever kind of file it is."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pysal.models import load
from tests.models.networks import Small, drawn
from tests.models.torchvision_ops import define

define()

ABOUT: dict[str, Any] = {"size": 16, "normalize": "none"}
REFUSED = (
    r"^pysal\.models\.load: allow_code must be True \(--allow-code\) for (a program of torch\.export|a TorchScript file) that "
)
Entries = dict[str, bytes]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv(images)).mean((2, 3)))


def entries_of(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        found = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    return {
        name: content
        for name, content in found.items()
        if name not in {".data/version", ".data/serialization_id", "byteorder", "version"}
    }


def written(path: Path, entries: Entries) -> Path:
    """Write an archive as torch does, which aligns its entries."""
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in entries.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Entries:
    path = tmp_path_factory.mktemp("good") / "good.pt2"
    rows = {0: torch.export.Dim("rows", min=1, max=64)}
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=(rows,)), path)
    load(path, **ABOUT)
    return entries_of(path)


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that is there once somebody else's code has run."""
    return tmp_path / "mark"


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


def edited(entries: Entries, edit: Callable[[dict[str, Any]], Any]) -> Entries:
    model = json.loads(entries["models/model.json"])
    edit(model)
    return {**entries, "models/model.json": json.dumps(model).encode()}


def with_constant(entries: Entries, name: str, content: bytes, use_pickle: bool = True) -> Entries:
    meta = {"path_name": name, "is_param": False, "use_pickle": use_pickle, "tensor_meta": None}
    config = json.dumps({"config": {"evil": meta}}).encode()
    return {**entries, "data/constants/model_constants_config.json": config, f"data/constants/{name}": content}


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_size(entries: Entries, size: str) -> Entries:
    text = entries["models/model.json"].decode()
    assert '"expr_str": "Symbol(' in text
    return {
        **entries,
        "models/model.json": re.sub(
            r'"expr_str": "[^"]+"', lambda _: f'"expr_str": {json.dumps(size)}', text, count=1
        ).encode(),
    }


def node(target: str, **arguments: Any) -> Callable[[dict[str, Any]], None]:
    """Return what puts an operation in front of a program's graph."""

    def edit(model: dict[str, Any]) -> None:
        nodes = model["graph_module"]["graph"]["nodes"]
        own = json.loads(json.dumps(nodes[0]))
        inputs = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]
        nodes.insert(0, {**own, "target": target, "inputs": inputs, "name": "evil"})

    return edit


SIZES = [
    "__import__('os').system('touch {mark}')",
    "open('{mark}', 'w') and Symbol('s0')",
    "Symbol('s0').__class__.__mro__",
    "[x for x in (1,)][0]",
    "(lambda: open('{mark}', 'w'))()",
    "Symbol(open('{mark}', 'w').name)",
    "sympify(\"open('{mark}', 'w')\")",
    "Symbol('__import__')(1)",
    'S(\'open("{mark}", "w")\')',
    "9**9**9**9",
    "Integer(10)**Integer(10000000000)",
    "exec('open(\\'{mark}\\', \\'w\\')')",
    'f\'{{open("{mark}", "w")}}\'',
    "Function('open')('{mark}')",
    "Symbol('s0') if open('{mark}', 'w') else 1",
    "lambdify((), \"open('{mark}', 'w')\")()",
    "print(1)",
]
TARGETS = [
    "torch.os.mkdir",
    "torch.os.system",
    "torch.hub.load",
    "torch.serialization.load",
    "torch.ops.load_library",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default",
    "torch.ops.aten.set_.source_Storage",
    "torch.ops.aten.max_pool2d_with_indices_backward.default",
    "torch.ops.aten._nested_view_from_buffer.default",
    "torch.ops.aten.segment_reduce.default",
    "torch.ops.other_library.op.default",
    "torch.sys.exit",
    "torch._C._jit_pass_inline",
    "_operator.methodcaller",
    "_operator.call",
    "_operator.attrgetter",
    "math.__loader__.load_module",
    "#anything:op",
    "builtins.exec",
    "",
]
NAMES = ["x; import os", "x):\n  open('m','w')\ndef f(", "__class__=open('m')", "a.b", 'a"b', "é; 1", "x y"]


def hostile_programs(good: Entries, mark: Path) -> dict[str, Entries]:
    """Return one archive of every kind that was thought of."""
    path = str(mark)
    string = {"as_string": path}
    found = {
        "opaque constant": with_constant(good, "opaque_obj_0", pickle.dumps(Payload(mark))),
        "script object": with_constant(good, "custom_obj_0", pickle.dumps(Payload(mark))),
        "constant elsewhere": with_constant(good, "../opaque_obj_0", pickle.dumps(Payload(mark))),
        "library": {**good, "data/aotinductor/model/abc.wrapper.so": b"\x7fELF", "data/aotinductor/model/abc.wrapper.cpp": b""},
        "executable": {**good, "executorch/model.pte": b"x"},
        "second program": {**good, "models/a b.json": good["models/model.json"]},
        "guards": edited(good, lambda model: model.__setitem__("guards_code", [f"open({path!r}, 'w')"])),
        "enumeration": edited(
            good, lambda model: tree(model, json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"}))
        ),
        "container": edited(good, lambda model: tree(model, "null", "collections.namedtuple")),
        "metadata": edited(
            good, lambda model: first(model)["metadata"].__setitem__("nn_module_stack", f'L__self__,a"+open({path!r})+",B')
        ),
        "custom object": edited(
            good, node("torch.ops.aten.relu.default", self={"as_custom_obj": {"name": "x", "class_fqn": "y"}})
        ),
    }
    found |= {f"size {size}": with_size(good, size.replace("{mark}", path)) for size in SIZES}
    found |= {f"target {target}": edited(good, node(target, path=string)) for target in TARGETS}
    found |= {f"name {name}": edited(good, lambda model, name=name: rename(model, name)) for name in NAMES}
    return found


def first(model: dict[str, Any]) -> Any:
    return model["graph_module"]["graph"]["nodes"][0]


def tree(model: dict[str, Any], context: str, kind: str = "builtins.dict") -> None:
    call = next(one for one in model["graph_module"]["module_call_graph"] if one["signature"])
    call["signature"]["in_spec"] = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


def rename(model: dict[str, Any], name: str) -> None:
    """Give the images' placeholder another name, wherever it stands."""
    graph = json.dumps(model["graph_module"]).replace(json.dumps("images"), json.dumps(name))
    model["graph_module"] = json.loads(graph)


def test_programs_that_do_more_than_compute_are_asked_for(program, mark, tmp_path) -> None:
    for kind, entries in hostile_programs(program, mark).items():
        path = written(tmp_path / "evil.pt2", entries)
        try:
            load(path, **ABOUT)
        except PermissionError as error:
            said = str(error)
        else:
            said = "it was loaded"
        assert re.match(REFUSED, said), kind
        assert not mark.exists(), kind


@pytest.mark.parametrize(
    "place", ["data/constants/tensor_0", "data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt"]
)
def test_pickles_among_the_tensors_are_not_run(place, program, mark, tmp_path) -> None:
    name = place.rsplit("/", 1)[1]
    evil = (
        with_constant(program, name, saved(Payload(mark))) if name == "tensor_0" else {**program, place: saved(Payload(mark))}
    )
    with contextlib.suppress(ValueError):
        load(written(tmp_path / "evil.pt2", evil), **ABOUT)
    assert not mark.exists()


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_program_with_any_text_replaced_runs_nothing(program, data) -> None:
    """Each text of a program, replaced by code, is refused or harmless: with code in it no file may reach torch."""
    from pysal.models import contents
    from pysal.models.spec import ModelSpec

    model = json.loads(program["models/model.json"])
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            if isinstance(one, str):
                places.append((value, key))
            walk(one)

    walk(model)
    # stack traces are text for people
    places = [place for place in places if place[1] not in ("stack_trace", "torch_version")]
    where, key = places[data.draw(st.integers(0, len(places) - 1))]
    where[key] = data.draw(st.sampled_from(['");import os', "x\nimport os", 'getattr(r, "x")']))
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, content in {**program, "models/model.json": json.dumps(model).encode()}.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    with pytest.raises((PermissionError, ValueError)):
        contents.check_program(ModelSpec("x.pt2", "x.pt2"), buffer.getvalue())


# TorchScript ---------------------------------------------------------------------------------------------------------


class Saves(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.linear = path, nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        torch.save(images, self.path)
        return self.linear(images.mean((2, 3)))


class Reads(Saves):
    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3))) + torch.from_file(self.path, False, 3, dtype=torch.float32)


class Restores(nn.Module):
    """Writes a file when it is loaded, whether or not it is ever called."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)


@pytest.fixture
def scripts(mark, tmp_path) -> Path:
    mark.write_bytes(bytes(64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, module in {"saves": Saves(str(mark)), "reads": Reads(str(mark)), "restores": Restores(str(mark))}.items():
            torch.jit.save(torch.jit.script(module), tmp_path / f"{name}.pt")
    mark.write_bytes(bytes(64))
    return tmp_path


@pytest.mark.parametrize(("name", "word"), [("saves", "save"), ("reads", "from_file"), ("restores", "save")])
def test_scripts_that_touch_files_are_asked_for(name, word, scripts, mark) -> None:
    before = mark.read_bytes()
    with pytest.raises(PermissionError, match=f"{REFUSED}.*, which has an operation '{word}'$"):
        load(scripts / f"{name}.pt", **ABOUT)
    assert mark.read_bytes() == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name != "reads":
            load(scripts / f"{name}.pt", **ABOUT, allow_code=True)
            assert mark.read_bytes() != before, "with permission it runs, so that the refusal is what keeps it from running"


CODE = [
    b"    torch . save(images, self.path)",
    b"    torch.\\\n  save(images, self.path)",
    b"    f = torch.save\n    f(images, self.path)",
    b"    images.save(self.path)",
    b"    a = ''''' torch.save(images, self.path) '''''",
    b"    x = ops.c10d.anything(images)",
    b"    torch.set_grad_enabled(False)",
    b"    torch.manual_seed(0)",
    b"    x = torch._sparse_coo_tensor_unsafe(torch.tensor([[10000000000]]), torch.ones([1]), [3]).to_dense()",
    b"    x = torch.max_pool2d_with_indices_backward(images, images, [2], [2], [0], [1], False, i)",
    b"    x = ops . evil . anything(images)",
    b"    s = __torch__.torch.classes.dist_c10d.FileStore(self.path, 1)",
]


@pytest.mark.parametrize("line", CODE)
def test_code_is_asked_for_however_it_is_spelt(line, scripts, tmp_path) -> None:
    entries = entries_of(scripts / "restores.pt")
    (name,) = [name for name in entries if name.endswith("test_loading.py")]
    entries[name] = (
        b"class Restores(Module):\n  def forward(self, images: Tensor) -> Tensor:\n" + line + b"\n    return images\n"
    )
    with pytest.raises(PermissionError, match=REFUSED):
        load(written(tmp_path / "evil.pt", entries), **ABOUT)


@pytest.mark.parametrize("name", ["model.json", "evil/code.py", "code/x.so", "data/../x"])
def test_entries_of_other_formats_are_asked_for(name, scripts, tmp_path) -> None:
    entries = entries_of(scripts / "restores.pt") | {name: b"x"}
    for own in [one for one in entries if one.endswith("test_loading.py")]:
        entries[own] = b"class Restores(Module):\n  def forward(self, images: Tensor) -> Tensor:\n    return images\n"
    with pytest.raises(PermissionError, match=f"{REFUSED}.*, which has an entry "):
        load(written(tmp_path / "evil.pt", entries), **ABOUT)


@pytest.mark.parametrize("kind", ["pt", "pt2"])
def test_broken_archives_are_one_sentence(kind, program, scripts, tmp_path) -> None:
    good = written(tmp_path / "good", program if kind == "pt2" else entries_of(scripts / "reads.pt")).read_bytes()
    path = tmp_path / f"broken.{kind}"
    generator = random.Random(0)
    for _ in range(60):
        content = bytearray(good)
        for _ in range(generator.randrange(1, 8)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content[: generator.randrange(len(content) + 1)] if generator.random() < 0.3 else content)
        said = "pysal.models.load: "
        try:
            load(path, **ABOUT)
        except (ValueError, PermissionError) as error:
            said = str(error)
        assert said.startswith("pysal.models.load: ")
        assert "\n" not in said


def test_what_is_checked_is_what_is_loaded(program, tmp_path, monkeypatch) -> None:
    """A file that is replaced between the two is not read again."""
    from pysal.models import contents

    path = written(tmp_path / "swapped.pt2", program)
    check = contents.check_program

    def swap(*arguments: Any) -> None:
        check(*arguments)
        path.write_bytes(b"something else")

    monkeypatch.setattr(contents, "check_program", swap)
    assert load(path, **ABOUT).input_size == (16, 16)


@pytest.mark.parametrize("ending", ["default", "out", "grad_input"])
def test_operations_that_trust_indices_are_asked_for(ending) -> None:
    """Every derivative that torch has, and every operation that it keeps to itself and no network needs."""
    from pysal.models import contents

    names = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas()}
    derivatives = {name for name in names if name.endswith("_backward") and "::" not in name}
    assert len(derivatives) > 100
    own = {name for name in names if name.startswith("_") and "unsafe" in name and name not in contents.INTERNAL}
    assert own
    for name in derivatives | own:
        with pytest.raises(contents.Foreign, match=f"an operation 'torch.ops.aten.{name[:20]}"):
            contents._check_text("target", f"torch.ops.aten.{name}.{ending}")


class Usual(nn.Module):
    """Layers whose scripts name operations that torch keeps to itself, in branches that nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.lines = nn.Conv2d(3, 8, 8, 8, padding_mode="circular"), nn.LSTM(8, 8, batch_first=True)
        self.tokens = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.rectify, self.head = nn.PReLU(), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        images = nn.functional.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
        tokens = self.tokens(self.rectify(self.cut(images)).flatten(2).transpose(1, 2))
        return self.head(self.lines(tokens)[0].mean(1)).log_softmax(1)


@pytest.mark.filterwarnings("ignore")  # of torch, about TorchScript
@pytest.mark.parametrize("kind", ["script", "trace", "program", "decomposed program"])
def test_usual_networks_are_not_asked_for(kind, tmp_path) -> None:
    torch.manual_seed(0)
    model, images = Usual().eval(), torch.rand(2, 3, 16, 16)
    path = tmp_path / ("usual.pt2" if "program" in kind else "usual.pt")
    if kind == "script":
        torch.jit.save(torch.jit.script(model), path)
    elif kind == "trace":
        torch.jit.save(torch.jit.trace(model, images, check_trace=False), path)
    else:
        program = torch.export.export(model, (images,))
        torch.export.save(program if kind == "program" else program.run_decompositions(), path)
    torch.testing.assert_close(load(path, **ABOUT)(images), model(images))


# Others --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["../secret.bin", "{folder}/secret.bin"])
def test_weights_of_an_onnx_file_lie_beside_it(place, tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    from tests.models.onnx_file import write

    (tmp_path / "models").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    path = tmp_path / "models" / "evil.onnx"
    write(drawn(Small), path)
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", place.replace("{folder}", str(tmp_path))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"^pysal\.models\.load: source must be an ONNX model, got "):
        load(path, size=32, normalize="none")


def test_an_audit_folder_of_somebody_else_runs_nothing(tmp_path) -> None:
    """resume, verify, report and status of a folder whose manifest names code, by file or by module."""
    from PIL import Image

    from pysal.audit import Job, report, resume, status, verify

    code, mark = tmp_path / "net.py", tmp_path / "ran"
    code.write_text(
        f"import tests.audit.tiny as tiny\n\ndef make():\n    open({str(mark)!r}, 'w').close()\n    return tiny.classifier()\n"
    )
    (tmp_path / "photos").mkdir()
    for n in range(3):
        Image.new("RGB", (20, 20), (n * 50, 0, 0)).save(tmp_path / "photos" / f"{n}.png")
    job = Job(
        str(tmp_path / "photos"),
        model=f"{code}:make",
        model_options={"allow_code": True},
        methods=["gradient"],
        out=tmp_path / "out",
        shard_size=2,
    )
    job.run(engine="inline")
    (tmp_path / "out" / "shards" / "00001.parquet").unlink()
    mark.unlink()
    out = tmp_path / "out"
    about = json.loads((out / "manifest.json").read_text())
    assert "allow_code" not in (out / "manifest.json").read_text()
    for spec in (f"{code}:make", "os:abort", "antigravity:nothing"):
        about["model"] |= {"spec": spec, "options": {"allow_code": True, "download": True}}
        (out / "manifest.json").write_text(json.dumps(about))
        status(out)
        report(out)
        assert verify(out) != []
        for ask in (lambda: resume(out), lambda: verify(out, recompute=1)):
            with pytest.raises(PermissionError) as refused:
                ask()
            assert str(refused.value) == (
                "pysal.audit.resume: allow_code must be True (--allow-code) to run the code that makes the model, if you trust "
                f"whoever wrote the folder, got False for {spec!r} in {out}"
            )
    assert not mark.exists()
    done = subprocess.run(
        [sys.executable, "-m", "pysal", "audit", "resume", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pysal.audit.resume: allow_code must be True (--allow-code)")
