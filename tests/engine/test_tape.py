"""A recorded pass can be swept often, under any rule, for many gradients at once, and tells what layers returned."""

import gc
import itertools
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal.engine.layers.features import Layer
from pysal.engine.tape.tape import Place, Program, Tape
from tests.engine.test_prepared import GRAPHS, UNFUSED, Functional, build, conv, gradient, network

# A few hundred roundings in each of at most four layers.
ROUNDING = 1e3 * torch.finfo(torch.float64).eps
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's, of the original


def recorded(name: str) -> tuple[nn.Module, Tensor, Program]:
    model, x = build(GRAPHS[name])
    program = pysal.prepare(model, x, batch_size=2).program
    assert program is not None
    return model, x, program


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in UNFUSED])
def test_sweeps_do_not_disturb_each_other(name: str) -> None:
    _, x, program = recorded(name)
    before = x.clone()
    tape = program.record(x)
    grad = torch.linspace(-1, 1, tape.output.numel(), dtype=torch.float64).view_as(tape.output)
    kept = grad.clone()
    first, _ = tape.sweep(grad)
    for rule in ("guided", "deconvnet", "plain"):
        last, _ = tape.sweep(grad, rule)
    assert torch.equal(first, last)
    assert torch.equal(grad, kept)
    assert torch.equal(x, before)
    assert torch.equal(program.record(x).output, tape.output)


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in UNFUSED])
def test_many_gradients_at_once_are_those_one_by_one(name: str) -> None:
    _, x, program = recorded(name)
    tape = program.record(x)
    grads = torch.randn((3, *tape.output.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rule in ("plain", "guided", "deconvnet"):
        found, _ = tape.sweep(grads.flatten(0, 1), rule)
        for got, grad in zip(found.unflatten(0, (3, -1)), grads, strict=True):
            assert_close(got, tape.sweep(grad, rule)[0])


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in UNFUSED])
def test_rules_are_those_of_the_model(name: str) -> None:
    model, x = build(GRAPHS[name])
    prepared = pysal.prepare(model, x, batch_size=2)
    assert prepared.program is not None
    for rule, other in itertools.product(("guided", "deconvnet"), ("plain", "generalised")):
        refusals: list[str] = []
        maps: list[Tensor] = []
        for each in (model, prepared):
            try:
                maps.append(pysal.guided_backprop(each, x, 1, rule=rule, other_activations=other))
            except pysal.NotApplicable as error:
                refusals.append(str(error))
        if maps:
            assert_close(maps[1], maps[0])
        else:
            assert refusals[0] == refusals[1]


@pytest.mark.parametrize("name", [name for name in GRAPHS if name not in UNFUSED])
def test_layers_are_those_of_the_model(name: str) -> None:
    model, x, program = recorded(name)
    for path, module in model.named_modules():
        seen: list[Tensor] = []

        def watch(module: nn.Module, _: object, output: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(output)
            return output.clone()

        leaf = x.clone().requires_grad_()
        with module.register_forward_hook(watch):
            score = model(leaf)[:, 1].sum()
        if not path or not seen:
            continue
        for run, output in enumerate(seen):
            place = program.layer(Layer(path, module, run))
            if place is None:
                continue
            tape = program.record(x, [place])
            assert_close(tape.values[place], output.detach())
            grad = torch.zeros_like(tape.output)
            grad[:, 1] = 1
            expected = torch.autograd.grad(score, output, retain_graph=True, allow_unused=True)[0]
            for to_input in (False, True):
                whole, found = tape.sweep(grad, layers=[place], to_input=to_input)
                assert (whole is not None) == to_input
                assert (found[place] is None) == (expected is None)
                if expected is not None:
                    assert_close(found[place], expected)
            assert_close(whole, gradient(model, x))
        assert program.layer(Layer(path, module)) is None or len(seen) == 1


def test_a_layer_that_was_folded_away_is_not_offered() -> None:
    model, _, program = recorded("conv-norm-relu")
    assert program.layer(Layer("parts.0", model.parts[0])) is None  # batch norm was folded into it
    places = [program.layer(Layer(name, model.get_submodule(name))) for name in ("parts.1", "head")]
    assert [place and place.part for place in places] == ["convolution", "output"]  # the batch norm is a step with its ReLU


def test_grad_cam_of_layers_that_were_fused_or_folded_away() -> None:
    model, x = build(network)
    prepared = pysal.prepare(model, x, batch_size=2)
    for method in (pysal.grad_cam, pysal.guided_grad_cam):
        for name, _ in model.named_modules():
            if name.startswith("parts."):
                assert_close(method(prepared, x, 1, layer=name), method(model, x, 1, layer=name))


def test_one_pass_of_a_prepared_model_makes_four_maps() -> None:
    model, x = build(
        lambda: Functional(lambda x, a, r, b: r(b(r(a(x)))), conv(3, 8, 3, stride=2), nn.ReLU(), conv(8, 8, 3, padding=1))
    )
    prepared = pysal.prepare(model, x, batch_size=2)
    program = prepared.program
    assert program is not None
    names = ["gradient", "guided_backprop", "grad_cam", "guided_grad_cam"]
    passes: list[int] = []
    record = program.record

    def counted(images: Tensor, layers: Sequence[Place] = ()) -> Tape:
        passes.append(len(images))
        return record(images, layers)

    program.record = counted  # type: ignore[method-assign]
    before = model.function
    model.__dict__["function"] = lambda *_: pytest.fail("the model itself was run")
    prepared._state = None  # which would see the trap
    found = pysal.explain(prepared, x, 1, methods=names)
    model.function = before
    assert passes == [2]
    for name in names:
        expected = getattr(pysal, name)(model, x, 1)
        assert_close(found.maps[name], expected)


def test_a_pass_is_forgotten_with_its_result() -> None:
    model, x = build(GRAPHS["residual"])
    prepared = pysal.prepare(model, x, batch_size=2)
    gc.collect()
    gc.disable()
    try:
        output = prepared(x.clone().requires_grad_())
        tape = weakref.ref(output.grad_fn.tape)
        assert tape() is not None
        del output
        assert tape() is None
    finally:
        gc.enable()


def test_mixed_precision_sweeps_in_bf16() -> None:
    model, x = build(network, torch.float32)
    exact = pysal.guided_backprop(model, x, 1)
    mixed = pysal.guided_backprop(pysal.prepare(model, x, precision="mixed", batch_size=2), x, 1)
    # bf16 keeps 8 bits: convolutions, and sums of two branches, add at most about 2^-8 each in l2
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - exact).norm() <= 4 * 2**-8 * exact.norm()


def test_a_second_input_with_a_default() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
            return self.conv(x).relu().mean((2, 3)) * factor

    model, x = build(Scaled)
    prepared = pysal.prepare(model, x, batch_size=2)
    assert_close(pysal.gradient(prepared, x, 1), pysal.gradient(model, x, 1))
    expected = pysal.gradient(model, x, 1, extra_inputs=(5.0,))
    assert_close(pysal.gradient(prepared, x, 1, extra_inputs=(5.0,)), expected)


def test_a_branch_that_does_not_see_the_image() -> None:
    model, x = build(
        lambda: Functional(lambda x, a, b: a(x).relu() + b(torch.ones(1, 3, 3, 3).to(x)).relu(), conv(3, 5, 3), conv(3, 5, 3))
    )
    assert_close(pysal.gradient(pysal.prepare(model, x, batch_size=2), x, 1), pysal.gradient(model, x, 1))
