"""The layers of docs/design.md: a module imports only from the layers below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pysal"

# First component below `pysal` -> height. Equal heights are strangers to each other; modules of one package are not.
LAYERS = {
    "_C": 0,
    "_folders": 0,
    "_gpus": 0,
    "_interrupts": 0,
    "_names": 0,
    "_spelling": 0,
    "_checks": 1,
    "_elsewhere": 1,
    "_library": 1,
    "reference": 2,
    "ops": 3,
    "testing": 4,
    "engine": 4,
    "segments": 4,
    "methods": 5,
    "models": 6,
    "targets": 6,
    "viz": 6,
    "annotations": 7,
    "metrics": 7,
    "plots": 7,
    "explanation": 8,
    "explain": 9,
    "audit": 10,
    "comparison": 10,
    "captum": 10,
    "pair": 10,
    "pytorch_grad_cam": 10,
    "demo": 10,
    "gradio": 10,
    "cli": 11,
    "__init__": 12,
    "__main__": 13,
}
# The rooms of `pysal.engine`, likewise; nothing stands outside of them.
ROOMS = {
    "ablation": 1,
    "running": 1,
    "model": 2,
    "layers": 3,
    "graph": 4,
    "tape": 5,
    "boxes": 5,
    "prepared": 6,
    "request": 7,
    "paths": 8,
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}


def modules() -> list[Path]:
    """Every Python module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """pysal/ops/grad_cam.py -> pysal.ops.grad_cam; a package by its own name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def component(module: str) -> str:
    """pysal.ops.grad_cam -> ops; pysal itself -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(tree: ast.AST, module: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules of pysal that `tree` imports anywhere, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "pysal"}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            if base.split(".")[0] == "pysal":
                # `from pysal import ops` means the submodule; `from pysal import gradient` means the package itself
                names = {f"{base}.{alias.name}" for alias in node.names}
                found |= {name if name in known else base for name in names}
    return found


def upward(source: str, module: str, is_package: bool, known: set[str]) -> list[str]:
    """The imports of one module that do not point downward."""
    here = component(module)
    return sorted(
        f"{module} imports {name}"
        for name in imported(ast.parse(source), module, is_package, known)
        if component(name) != here and LAYERS[component(name)] >= LAYERS[here]
    )


KNOWN = {dotted(path) for path in modules()} | {"pysal._C"}


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_point_downward(path: Path) -> None:
    assert upward(path.read_text(), dotted(path), path.name == "__init__.py", KNOWN) == []


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_every_module_has_a_layer(path: Path) -> None:
    assert component(dotted(path)) in LAYERS, "give the new module a layer here and in docs/design.md"


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import pysal.ops.grad_cam", "pysal.reference.grad_cam", ["pysal.ops.grad_cam"]),
        ("from pysal.ops import grad_cam", "pysal.reference.grad_cam", ["pysal.ops.grad_cam"]),
        ("from ..ops.grad_cam import grad_cam", "pysal.reference.grad_cam", ["pysal.ops.grad_cam"]),
        ("from .. import explain", "pysal.reference.grad_cam", ["pysal.explain"]),
        ("from pysal import gradient", "pysal.viz", ["pysal"]),
        ("def f():\n    from pysal import cli", "pysal.engine.request.plan", ["pysal.cli"]),
        ("if True:\n    from pysal.cli import main", "pysal.ops.grad_cam", ["pysal.cli"]),
        ("from pysal.models import load", "pysal.viz", ["pysal.models"]),
        ("from pysal.reference.grad_cam import grad_cam", "pysal.ops.grad_cam", []),
        ("from . import path_integral", "pysal.ops.grad_cam", []),
        ("import torch\nfrom pysal._checks import refuse", "pysal.reference.grad_cam", []),
    ],
)  # fmt: skip
def test_the_check_sees_each_way_to_import(source: str, module: str, expected: list[str]) -> None:
    known = {"pysal.ops.grad_cam", "pysal.ops.path_integral", "pysal.methods.gradient", "pysal.models", "pysal.explain"}
    known |= {"pysal.cli", "pysal.reference.grad_cam", "pysal._checks"}
    assert upward(source, module, False, known) == [f"{module} imports {name}" for name in expected]


def room(module: str) -> str | None:
    """pysal.engine.tape.cuda_graphs -> tape; None for what is not in a room of the engine."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["pysal", "engine"] and len(parts) > 2 else None


def upstairs(source: str, module: str, is_package: bool, known: set[str]) -> list[str]:
    """The imports of one module of the engine that go to a room which is not below its own."""
    here = room(module)
    return sorted(
        f"{module} imports {name}"
        for name in imported(ast.parse(source), module, is_package, known)
        if here and (there := room(name)) and there != here and ROOMS[there] >= ROOMS[here]
    )


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").rglob("*.py")), ids=dotted)
def test_rooms_of_the_engine_import_from_rooms_below(path: Path) -> None:
    assert path.name == "__init__.py" or path.parent.parent == PACKAGE / "engine", "give the module a room"
    assert room(dotted(path)) in {None, *ROOMS}, "give the new room a floor here and in docs/design.md"
    assert upstairs(path.read_text(), dotted(path), path.name == "__init__.py", KNOWN) == []


def test_the_check_of_rooms_sees_what_goes_up() -> None:
    known = {"pysal.engine.tape.tape", "pysal.engine.request.plan", "pysal.engine.graph.fold"}
    source = "from pysal.engine.request import plan\nfrom pysal.engine.graph.fold import fold\nfrom .. import request"
    assert upstairs(source, "pysal.engine.tape.tape", False, known) == [
        "pysal.engine.tape.tape imports pysal.engine.request.plan"
    ]


def circles(imports: dict[str, set[str]]) -> set[str]:
    """The modules that import themselves by way of others."""

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        left = set(imports[module])
        while left:
            one = left.pop()
            if one not in seen:
                seen.add(one)
                left |= imports.get(one, set())
        return seen

    return {module for module in imports if module in reached(module)}


def test_no_module_imports_itself_by_way_of_others() -> None:
    imports = {
        dotted(path): imported(ast.parse(path.read_text()), dotted(path), path.name == "__init__.py", KNOWN) - {dotted(path)}
        for path in modules()
        if path.name != "__init__.py"  # a package hands on what its modules define
    }
    assert circles(imports) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a", "b", "c"}


def test_references_import_nothing_native() -> None:
    for path in (PACKAGE / "reference").glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "pysal" not in names, f"{path.name} reaches torch.ops.pysal: an oracle must not call what it judges"


def test_no_module_is_named_for_nothing() -> None:
    folders = [PACKAGE, ROOT / "csrc", ROOT / "tests"]
    stems = {path: path.stem for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".cpp", ".cu", ".h"}}
    assert [str(path.relative_to(ROOT)) for path, stem in stems.items() if stem in FORBIDDEN_NAMES] == []
