"""Every op is whole: schema, fake, oracle, native kernels; and the C++ signatures are those of the schemas."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pysal.ops  # noqa: F401  defines the ops
from pysal import _library, testing

CSRC = Path(__file__).resolve().parents[1] / "csrc"
OPS = sorted(_library.SCHEMAS)

# TORCH_BOX converts by the C++ types alone: an int read as a double is 1.5e-323, and nothing says so.
CPP_TYPES = {
    "Tensor": "const Tensor&",
    "Optional[Tensor]": "const std::optional<Tensor>&",
    "int": "int64_t",
    "SymInt": "int64_t",
    "float": "double",
    "bool": "bool",
    "ScalarType": "ScalarType",
    "List[float]": "FloatList",
}
CPP_RESULTS = {0: "void", 1: "Tensor", 2: "std::tuple<Tensor, Tensor>"}


def implementations(folder):
    """Yield (op, the C++ function's result type, its argument types) of every m.impl in the folder."""
    for path in sorted((CSRC / folder).glob("*.cpp")):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for op, function in re.findall(r'm\.impl\(\s*"(\w+)",\s*TORCH_BOX\(&[\w:]*?(\w+)\)\)', text):
            found = re.search(rf"^([\w:<>, ]+?)\s+{function}\(([^)]*)\)\s*\{{", text, flags=re.MULTILINE)
            assert found, f"{path.name}: {function} is not defined in the file that registers it"
            arguments = [re.sub(r"\s*\b\w*$", "", " ".join(part.split())) for part in found[2].split(",")]
            # a bare type, its name left out, has been taken for a name
            names = [" ".join(part.split()) for part in found[2].split(",")]
            arguments = [name if name in CPP_TYPES.values() else kind for name, kind in zip(names, arguments, strict=True)]
            yield op, " ".join(found[1].split()), arguments


def signature_of(op):
    schema = getattr(torch.ops.pysal, op).default._schema
    return CPP_RESULTS[len(schema.returns)], [CPP_TYPES[str(argument.real_type)] for argument in schema.arguments]


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_cpp_signatures_are_the_schemas(folder):
    for op, result, arguments in implementations(folder):
        assert (result, arguments) == signature_of(op), f"{folder}/{op}"


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_every_op_is_implemented_once_and_no_other(folder):
    assert sorted(op for op, _, _ in implementations(folder)) == OPS


@pytest.mark.parametrize("op", OPS)
def test_schema_fake_and_oracle(op):
    name = f"pysal::{op}"
    assert str(getattr(torch.ops.pysal, op).default._schema) == name + _library.SCHEMAS[op]
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")
    assert _library.REFERENCES[op].__module__.startswith("pysal.reference.")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", testing.backends(native_only=True), ids=str)
def test_native_kernel_is_registered(op, backend):
    backend.op(op)


def test_required_backends_are_those_tested(monkeypatch):
    names = {backend.name for backend in testing.backends()}
    assert testing.required() <= names
    monkeypatch.setenv("PYSAL_REQUIRE", "cpu,emulated,cuda")
    assert {backend.name for backend in testing.backends()} == {"reference", "cpu", "emulated", "cuda"}
    monkeypatch.setenv("PYSAL_REQUIRE", "gpu")
    with pytest.raises(ValueError, match=r"^PYSAL_REQUIRE must name cpu, emulated or cuda, got gpu$"):
        testing.backends()


@pytest.fixture
def op_without_kernel(monkeypatch):
    """An op that only its oracle implements, in a package that says it is compiled."""
    for registry in ("SCHEMAS", "REFERENCES", "_fell_back"):
        monkeypatch.setattr(_library, registry, dict(getattr(_library, registry)))
    monkeypatch.setattr(_library, "_compiled", True)
    name = "only_a_reference"
    if not hasattr(torch.ops.pysal, name):
        _library.define(name, "(Tensor input) -> Tensor", torch.clone)
    return name


def test_a_missing_kernel_warns_once_and_shows(op_without_kernel):
    op = getattr(torch.ops.pysal, op_without_kernel)
    with pytest.warns(UserWarning, match="pysal::only_a_reference has no native kernel for cpu tensors"):
        op(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(torch.ones(2))
    assert _library.build_info()["fell_back"][op_without_kernel] == ["cpu"]


def test_a_missing_kernel_fails_the_test_that_needs_it(op_without_kernel):
    with pytest.raises(AssertionError, match="pysal::only_a_reference has no native cpu kernel"):
        testing.require_native(op_without_kernel, "cpu")


@pytest.mark.skipif(not (_library.HERE / "_C_cuda.so").exists(), reason="the CUDA kernels are not compiled")
def test_cuda_library_loads_without_cuda():
    """Its symbols resolve in any torch; on a CPU-only one it registers and does nothing else."""
    code = """
import torch, pysal
from pysal import _library
assert _library.load_cuda(force=True) == "loaded", _library.load_cuda(force=True)
kernels = pysal.build_info()["kernels"]
assert all(of["cuda"] == "native" for of in kernels.values()), kernels
pysal.ops.guided_relu(torch.ones(3))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=CSRC.parent)
