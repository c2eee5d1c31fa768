"""Every default stands in one place: the signature of a public function."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from torch import Tensor

import pysal
import pysal.methods
import pysal.metrics
from pysal import audit, cli
from pysal.demo import server
from pysal.engine.request.attribution import Attribution, default_of, with_defaults
from pysal.engine.request.plan import Plan
from pysal.engine.request.running import Running
from pysal.engine.request.work import Work
from pysal.methods.registry import METHODS
from pysal.metrics.registry import METRICS

EMPTY = inspect.Parameter.empty
SHARED = ("score", "extra_inputs", "batch_size", "precision", "dtype")
# Of a map by itself: what `explain` returns holds no graph.
GRAPH = "create_graph"
PUBLIC = [*METHODS, "class_gradients"]
FIGURES = {
    "deletion_curve": "deletion",
    "insertion_curve": "insertion",
    "infidelity_of": "infidelity",
    "max_sensitivity_of": "max_sensitivity",
}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def keyword_only(function: Callable[..., Any]) -> list[str]:
    return [name for name, one in parameters(function).items() if one.kind is one.KEYWORD_ONLY]


def cores(package: ModuleType) -> list[Callable[..., Any]]:
    """Return what the modules of a package define that takes a plan."""
    found = []
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == info.name and next(iter(parameters(function)), "") == "plan":
                found.append(function)
    return found


@pytest.mark.parametrize("package", [pysal.methods, pysal.metrics], ids=["methods", "metrics"])
def test_what_takes_a_plan_has_no_default(package: ModuleType) -> None:
    functions = cores(package)
    assert len(functions) >= 4
    for function in functions:
        optional = [name for name, one in parameters(function).items() if one.default is not EMPTY]
        assert not optional, f"{function.__module__}.{function.__name__}: {optional}"


def test_a_plan_has_no_defaults_of_its_own_for_what_methods_share() -> None:
    known = parameters(Plan.__init__) | parameters(Running.__init__)
    assert [name for name in ("target", "running", *SHARED) if known[name].default is not EMPTY] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_public_function_has_the_options_of_its_core_and_the_shared_ones(name: str) -> None:
    public, core = getattr(pysal, name), METHODS[name].prepare
    assert isinstance(core, partial)
    options = [one for one in keyword_only(public) if one != GRAPH]
    assert options == [*keyword_only(core.func), *SHARED]
    assert core.keywords == {option: parameters(public)[option].default for option in keyword_only(core.func)}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figures_core_has_options_of_its_public_function(name: str) -> None:
    core = next(function for function in cores(pysal.metrics) if function.__name__ == name)
    known = parameters(getattr(pysal.metrics, FIGURES[name]))
    assert [option for option in keyword_only(core) if option not in known] == []


def test_what_methods_share_has_one_order_and_one_default() -> None:
    for name in PUBLIC:
        found = parameters(getattr(pysal, name))
        assert tuple(found)[-len(SHARED) :] == SHARED, name
        assert [found[option].default for option in SHARED[1:]] == [(), None, "float32", None], name
        assert all(found[option].kind is inspect.Parameter.KEYWORD_ONLY for option in SHARED)
        usual = METHODS[name].score if name in METHODS else METHODS["gradient"].score
        assert found["score"].default == usual
    assert {METHODS[name].score for name in METHODS if name != "leave_one_out"} == {METHODS["gradient"].score}


def test_other_functions_have_the_defaults_of_the_methods_for_what_they_share() -> None:
    others = [getattr(pysal.metrics, name) for name in pysal.metrics.__all__] + [pysal.explain, audit.Job, pysal.prepare]
    usual = {name: parameters(pysal.gradient)[name].default for name in SHARED[1:]}
    for function in filter(callable, others):
        for name, default in usual.items():
            if name in parameters(function):
                assert parameters(function)[name].default == default, function


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_handed_over_under_its_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    public = getattr(pysal, name)
    core = METHODS[name].prepare.func  # type: ignore[attr-defined]
    images, plans = torch.rand(2, 3, 4, 4), []
    seen: dict[str, Any] = {}

    class Noted(Plan):
        def __init__(self, where: str, model: Any, inputs: Tensor, target: Any, running: Running, **more: Any) -> None:
            self.where = where
            plans.append((where, model, inputs, target, {name: getattr(running, name) for name in SHARED}))

        def image_gradients(self) -> Tensor:
            return images

    def noted(plan: Plan, **options: Any) -> Work:
        seen.update(options)
        return Work(plan, lambda _report: Attribution(images, 1))

    monkeypatch.setitem(public.__globals__, core.__name__, noted)
    monkeypatch.setitem(public.__globals__, "Plan", Noted)
    given = {option: False if option == GRAPH else object() for option in keyword_only(public)}
    target = object()
    assert public(print, images, target, **given) is images
    (where, *request, shared), *rest = plans
    assert not rest
    assert [where, *request] == [f"pysal.{name}", print, images, target]
    assert shared == {option: given[option] for option in SHARED}
    assert seen == {option: given[option] for option in keyword_only(core)}


def test_defaults_are_read_from_the_signature() -> None:
    def public(model: Any, *, steps: int = 7, width: float = 2.0, score: str = "logit") -> None: ...

    def core(plan: Any, *, steps: int, width: float) -> tuple[Any, int, float]:
        return plan, steps, width

    assert with_defaults(core, public)("plan", width=3.0) == ("plan", 7, 3.0)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'width'"):
        core("plan", steps=1)  # type: ignore[call-arg]


def test_costs_in_words_name_the_defaults() -> None:
    for name, option in {
        "smooth_grad": "samples",
        "integrated_gradients": "steps",
        "blur_integrated_gradients": "steps",
    }.items():
        assert METHODS[name].cost.endswith(f"per {option.removesuffix('s')} ({default_of(getattr(pysal, name), option)})")
    assert METRICS["infidelity"].cost == f"{default_of(pysal.metrics.infidelity, 'samples')} forward, + 1"
    assert METRICS["road"].cost.startswith(f"{2 * len(default_of(pysal.metrics.road, 'shares'))} forward, + 1")
    assert METRICS["pic"].cost.startswith(f"{len(default_of(pysal.metrics.pic, 'shares')) + 2} forward, + 1")
    assert METRICS["max_sensitivity"].cost == f"{default_of(pysal.metrics.max_sensitivity, 'samples')} times the method"


@pytest.mark.parametrize(
    ("command", "functions"),
    [
        (cli.explain.explain, [pysal.explain]),
        (cli.audit.audit_run, [audit.Job, audit.Job.run]),
        (cli.audit.audit_resume, [audit.Job.run]),
        (cli.audit.audit_verify, [audit.verify]),
        (cli.audit.audit_report, [audit.report]),
        (cli.demo.demo, [server.serve]),
    ],
    ids=lambda value: value.name if isinstance(value, click.Command) else "",
)
def test_the_command_lines_defaults_are_the_functions(command: click.Command, functions: list[Callable[..., Any]]) -> None:
    compared = 0
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        for function in functions:
            known = parameters(function)
            # what says auto on the command line is resolved there
            if option.name in known and (default := known[option.name].default) is not EMPTY and option.default != "auto":
                given = None if "UNSET" in repr(option.default) else option.default
                wanted: Any = [default] if option.multiple else (default or None) if option.is_flag else default
                assert given == wanted, f"{command.name} --{option.name}: {given!r}, {function.__name__} has {wanted!r}"
                compared += 1
    assert compared


def test_help_names_the_defaults_of_methods_options() -> None:
    """Options of single methods are handed over only where they are given, so their help alone names the default."""
    helps = {option.name: option.help or "" for option in cli.explain.explain.params if isinstance(option, click.Option)}
    assert f"[default: {default_of(pysal.smooth_grad, 'samples')}]" in helps["samples"]
    assert f"[default: slic:{default_of(pysal.leave_one_out, 'segments').n_segments}; xrai has its own]" in helps["segments"]
    assert f"[default: {default_of(pysal.leave_one_out, 'mode')}]" in helps["mode"]
    assert default_of(pysal.leave_one_out, "approximate") is None
    assert "[default: exact]" in helps["approximate"]
    assert default_of(pysal.guided_backprop, "other_activations") == "error"
    assert "[default: refuse the model]" in helps["other_activations"]


def test_what_is_handed_over_under_its_own_name_has_one_default() -> None:
    """Where a function hands an optional argument over as `name=name`, the callee requires it or has the same default."""
    trees = [ast.parse(path.read_text()) for path in Path(pysal.__file__).parent.rglob("*.py")]
    definitions: dict[str, list[ast.FunctionDef]] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef):
            definitions.setdefault(node.name, []).append(node)
        if isinstance(node, ast.ClassDef):
            makers = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            definitions.setdefault(node.name, []).extend(makers)
    compared = 0
    for function in {id(one): one for several in definitions.values() for one in several}.values():
        own = _optional(function)
        for call in (node for node in ast.walk(function) if own and isinstance(node, ast.Call)):
            name = getattr(call.func, "id", None) or getattr(call.func, "attr", None)
            callees = definitions.get(str(name), [])
            if len(callees) != 1:  # which of several of that name cannot be told
                continue
            other = _optional(callees[0])
            for given in call.keywords:
                if (
                    isinstance(given.value, ast.Name)
                    and given.arg == given.value.id
                    and given.arg in own
                    and given.arg in other
                ):
                    same = own[given.arg] == other[given.arg]
                    assert same, f"{function.name} and {name} have defaults of their own for {given.arg}"
                    compared += 1
    assert compared


def _optional(function: ast.FunctionDef) -> dict[str, str]:
    arguments = function.args
    usual = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(usual[len(usual) - len(arguments.defaults) :], arguments.defaults, strict=True)]
    pairs += [(one, default) for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default]
    return {one.arg: ast.unparse(default) for one, default in pairs}
