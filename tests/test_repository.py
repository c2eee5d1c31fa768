"""What belongs together is complete: every op has all its parts, every method its page, every pin its reason."""

import ast
import hashlib
import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import pysal
from pysal import _library, ops
from pysal.methods.registry import METHODS
from tests.conftest import KINDS, ORDER, kinds_of, left_closed
from wheels.build import PYTHONS

ROOT = Path(__file__).resolve().parents[1]
STEMS = sorted(path.stem for path in (ROOT / "pysal/ops").glob("[!_]*.py"))

# level picks the instruction set; fuzz and cuda_graphs are about every op
OF_NO_OP = {"csrc/cpu": {"level"}, "tests/ops": {"fuzz", "cuda_graphs"}}


def designed() -> dict[str, str]:
    """The schemas that docs/design.md lists: op name -> signature."""
    text = (ROOT / "docs/design.md").read_text().split("## Op stems")[1].split("\n## ")[0]
    return dict(re.findall(r"^(\w+)(\(.*\) -> .+)$", text, re.MULTILINE))


def stem_of(op: str) -> str:
    """The op card a schema is in: the longest stem that the op's name starts with."""
    fitting = [stem for stem in STEMS if op == stem or op.startswith(f"{stem}_")]
    assert fitting, f"no card in pysal/ops for {op}"
    return max(fitting, key=len)


REQUIREMENTS = sorted(path.name for path in (ROOT / "requirements").glob("*.txt"))


def pins(name: str) -> dict[str, str]:
    """The packages of a requirements file: normalised name -> version."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith(("#", "-r")))
    return {normalised(package): version for package, version in pairs}


def normalised(package: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def test_the_listing_is_read() -> None:
    assert len(designed()) >= 14
    assert {stem_of(op) for op in designed()} == set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    "part",
    [
        "pysal/ops/{}.py",
        "pysal/reference/{}.py",
        "csrc/cpu/{}.cpp",
        "csrc/cuda/{}.cu",
        "csrc/cuda/{}.h",
        "csrc/cuda/{}_op.cpp",
        "tests/ops/test_{}.py",
        "tests/reference/test_{}.py",
        "tests/emu/{}.cpp",
    ],
)
def test_every_op_has_all_its_parts(stem: str, part: str) -> None:
    assert (ROOT / part.format(stem)).is_file(), f"{part.format(stem)} is missing"


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [("pysal/reference", "[!_]*.py"), ("csrc/cpu", "*.cpp"), ("csrc/cuda", "*.cu"), ("tests/ops", "test_*.py")],
)
def test_nothing_is_named_for_no_op(folder: str, pattern: str) -> None:
    found = {path.stem.removeprefix("test_") for path in (ROOT / folder).glob(pattern)}
    found -= OF_NO_OP.get(folder, set())
    assert found <= set(STEMS), f"{folder} has files of no op: {sorted(found - set(STEMS))}"


def test_the_design_and_the_registry_agree() -> None:
    assert ops.__all__, "importing the cards defines the ops"

    def parse(op: str, signature: str) -> torch._C.FunctionSchema:
        return torch._C.parse_schema(f"pysal::{op}{signature}")

    assert set(designed()) == set(_library.SCHEMAS)
    for op, signature in designed().items():
        assert parse(op, signature) == parse(op, _library.SCHEMAS[op]), f"{op}: {_library.SCHEMAS[op]}"


@pytest.mark.parametrize("op", sorted(_library.SCHEMAS))
def test_every_op_has_a_benchmark(op: str) -> None:
    assert f'Case("{op}"' in re.sub(r"\(\s+", "(", (ROOT / "benchmarks/bench_ops.py").read_text())


def test_cuda_launchers_neither_wait_nor_allocate() -> None:
    """What a CUDA graph cannot capture, or what would make results depend on the order of threads, is nowhere in csrc/cuda."""
    never = re.compile(r"cuda(Malloc|Free|Memcpy|Memset|EventCreate)|cuda\w*Synchronize|\batomic[A-Z]|fast_math|\bcpu\(\)")
    for path in [*(ROOT / "csrc/cuda").iterdir(), ROOT / "CMakeLists.txt"]:
        assert not (found := never.findall(path.read_text())), f"{path.name}: {found}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_test(name: str) -> None:
    home = getattr(pysal, name).__module__.rsplit(".", 1)[1]
    assert (ROOT / f"tests/methods/test_{home}.py").is_file()


def test_no_code_asks_which_method_it_has() -> None:
    """What differs between methods stands in methods/traits.py, or in a table by their names, and not in comparisons."""

    def compared(source: str) -> set[str]:
        tests = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
        sides = [side for test in tests for side in (test.left, *test.comparators)]
        parts = [part for side in sides for part in getattr(side, "elts", [side]) if isinstance(part, ast.Constant)]
        return {part.value for part in parts if isinstance(part.value, str)} & set(METHODS)

    assert compared("a = b == 'gradient' or c in ('grad_cam', 'd')") == {"gradient", "grad_cam"}
    found = {path: names for path in (ROOT / "pysal").rglob("*.py") if (names := compared(path.read_text()))}
    assert found == {}


def test_pins_are_exact_and_cover_the_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    declared += [one for extra in project["project"]["optional-dependencies"].values() for one in extra]
    files = {name: pins(name) for name in REQUIREMENTS}
    makefile = (ROOT / "Makefile").read_text()
    for requirement in declared:
        name = normalised(re.split(r"[=<>!~ ]", requirement)[0])
        pinned = [file for file, packages in files.items() if name in packages and file != "dev.txt"]
        assert pinned, f"{requirement} of pyproject.toml is not pinned in requirements/"
    versions = [version for packages in files.values() for version in packages.values()]
    assert all(re.fullmatch(r"[\w.]+", version) for version in versions)
    names = [name for packages in files.values() for name in packages]
    assert sorted(names) == sorted(set(names)), "a package is pinned in two files"
    included = re.findall(r"^-r (.*)$", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)
    assert {"dev.txt", "no-deps.txt", *included} == set(REQUIREMENTS), "make setup installs dev.txt and what it includes"
    assert re.search(r"^\$\(VENV\)/stamp-no-deps: requirements/no-deps.txt .*\n\t.* --no-deps -r \$<$", makefile, re.MULTILINE)


def test_every_direct_dependency_has_a_reason() -> None:
    page = (ROOT / "docs/dependencies.md").read_text()
    for name in REQUIREMENTS:
        direct = (ROOT / "requirements" / name).read_text().split("# what those need")[0]
        for line in direct.splitlines():
            if "==" in line:
                assert line.split("==")[0] in page, f"{line} is in requirements/{name}, its reason nowhere"


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_kind_of_test_is_there_and_explained() -> None:
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert [line.split(":")[0] for line in markers] == ["slow", *KINDS]
    assert set(ORDER) == {*KINDS, ""}
    page = (ROOT / "TESTING.md").read_text()
    for kind, places in KINDS.items():
        assert f"| `{kind}` |" in page
        assert [place for place in places if not (ROOT / "tests" / place).exists()] == []


def test_only_what_the_core_deselects_is_left_closed() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    for file in files:
        ways = [place for place in (file, *file.parents) if place.is_relative_to(ROOT / "tests")]
        core = "core" in kinds_of(file)
        assert any(left_closed(place, "core") for place in ways) == (not core), file
        assert any(left_closed(place, "not core") for place in ways) == core, file
        assert not any(left_closed(place, other) for place in ways for other in ("", "not slow", "peer", "core or peer"))


def test_the_workflow_calls_stages_alone() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    stages = re.findall(r"^ *(?:\[\[ .* \]\] \|\| )?stage ([a-z-]+) ", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert {"clang", "cross", "quick", "test", "uncompiled", "wheel"} <= set(stages)
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = [command for command in commands if not command.startswith("brew install ")]
    assert len(called) == len(workflow["jobs"])
    for command in called:
        name, *named = command.split()
        assert name == ".ci/run"
        assert set(named) <= set(stages), command
    matrix = workflow["jobs"]["pythons"]["strategy"]["matrix"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert matrix["python"] == named == PYTHONS
    assert project["requires-python"] == f">={named[0]}"
    assert matrix["torch"] == [f"{project['dependencies'][0].replace('>=', '==')}.*", "torch"], "the oldest and the newest"


def test_make_lists_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    assert targets == phony
    for page in ("README.md", "CONTRIBUTING.md", "TESTING.md"):
        for target in re.findall(r"make ([a-z-]+)", (ROOT / page).read_text()):
            assert target in targets, f"{page} says make {target}"


def test_the_tests_that_correctness_names_are_there() -> None:
    rows = [line for line in (ROOT / "docs/correctness.md").read_text().splitlines() if line.startswith("| ")]
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    named = [name for row in rows for name in re.findall(r"`((?:tests/|test_)[^`]+)`", row.rsplit(" | ", 1)[1])]
    assert len(named) >= len(rows) - 20, "a heading and a row each"
    for name in named:
        path, _, function = name.rpartition("::") if "::" in name else (name, "", "") if "/" in name else ("", "", name)
        text = (ROOT / path).read_text() if path else "".join(sources.values())
        assert not function or f"def {function}(" in text, name


def test_the_photos_of_the_documents_are_those_of_the_package() -> None:
    assert (ROOT / "examples/photos").readlink() == Path("../pysal/data/photos")


def test_no_picture_is_there_twice() -> None:
    places: dict[str, list[str]] = {}
    for folder in ("benchmarks", "docs", "examples", "pysal", "tests"):
        for path in (ROOT / folder).rglob("*"):
            own = not path.is_symlink() and not {"_build", "__pycache__"} & set(path.parts)
            if own and path.suffix in {".gif", ".jpg", ".png", ".svg", ".webp"}:
                places.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(str(path.relative_to(ROOT)))
    assert [names for names in places.values() if len(names) > 1] == []
