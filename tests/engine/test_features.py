"""The activation of a layer: which one, at which of its runs, and what is kept to differentiate it."""

import threading
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from pysal.engine.layers.features import Layer, find_layer
from tests.methods.calls import request
from tests.methods.networks import images, seeded

INPUTS = images(2, 3, 8, 7)
Pair = namedtuple("Pair", ["map", "rest"])


class Layered(nn.Module):
    """conv, what follows it, conv, mean, linear; `wrap` is what the first convolution's block returns."""

    def __init__(self, after: Callable[[Tensor], Tensor], wrap: Callable[[Tensor], Any] = lambda value: value) -> None:
        super().__init__()
        self.block = Block(wrap)
        self.after = after
        self.second, self.unused = nn.Conv2d(5, 4, 3), nn.Conv2d(5, 4, 3)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        value = self.block(inputs)
        value = value[0] if isinstance(value, (tuple, list)) else value
        return self.head(self.pool(torch.sin(self.second(self.after(value)))).flatten(1))


class Block(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 5, 3), wrap

    def forward(self, inputs: Tensor) -> Any:
        return self.wrap(self.conv(inputs))


def layered(after: Callable[[Tensor], Tensor] = F.relu, wrap: Callable[[Tensor], Any] = lambda value: value) -> Layered:
    return seeded(lambda: Layered(after, wrap))  # type: ignore[return-value]


def cam_by_hand(model: Layered, target: int = 1) -> Tensor:
    """The two equations of Grad-CAM at the first convolution, by plain autograd."""
    activation = model.block.conv(INPUTS).detach().requires_grad_()
    score = model.head(model.pool(torch.sin(model.second(F.relu(activation)))).flatten(1))[:, target]
    (gradient,) = torch.autograd.grad(score.sum(), activation)
    small = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True).clamp_min(0)
    return F.interpolate(small, INPUTS.shape[2:], mode="bilinear").detach()


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "function": F.relu,
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "in place": lambda value: value.relu_(),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("by", ["name", "module"])
def test_captured_by_name_or_module_whatever_happens_to_it_next(by: str, after: str) -> None:
    model = layered(AFTER[after])
    expected = cam_by_hand(model)
    assert expected.any()
    found = pysal.grad_cam(model, INPUTS, 1, layer="block.conv" if by == "name" else model.block.conv)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    guided = pysal.guided_grad_cam(model, INPUTS, 1, layer="block.conv")
    product = pysal.guided_backprop(model, INPUTS, 1) * expected
    torch.testing.assert_close(guided, product, rtol=1e-12, atol=1e-14)


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda value: (value, "rest"),
    "list": lambda value: [value, value.sum()],
    "namedtuple": lambda value: Pair(value, None),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_layer_that_returns_several_things(wrap: str) -> None:
    model = layered(nn.ReLU(inplace=True), WRAPS[wrap])
    returned: list[Any] = []
    handle = model.block.register_forward_hook(lambda _module, _args, output: returned.append(output))
    found = pysal.grad_cam(model, INPUTS, 1, layer="block")
    handle.remove()
    torch.testing.assert_close(found, cam_by_hand(layered()), rtol=1e-12, atol=1e-14)
    assert type(returned[0]) is type(WRAPS[wrap](INPUTS)), "the model goes on with the type it made"


@pytest.mark.parametrize("wrap", [lambda value: {"a": value}, lambda value: (), lambda value: ("text", value)])
def test_layer_that_returns_no_tensor(wrap: Callable[[Tensor], Any]) -> None:
    model = layered(wrap=wrap)
    with pytest.raises(ValueError) as error:
        pysal.grad_cam(model, INPUTS, 1, layer="block")
    kind = type(wrap(INPUTS)).__name__
    assert str(error.value) == f"pysal.grad_cam: layer 'block' must return a tensor, got {kind}"


class Twice(nn.Module):
    """conv - shared ReLU - conv - the same ReLU - mean - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.relu(self.second(self.relu(self.first(inputs)))).mean((2, 3)))


@pytest.mark.parametrize("method", [pysal.grad_cam, pysal.guided_grad_cam])
def test_sentences_about_layers_that_cannot_be_captured(method: Callable[..., Tensor]) -> None:
    where = f"pysal.{method.__name__}"
    with pytest.raises(ValueError) as error:
        method(seeded(Twice), INPUTS, 1, layer="relu")
    assert str(error.value) == f"{where}: layer 'relu' must run once in a pass, got a second run: choose another layer"
    with pytest.raises(ValueError) as error:
        method(layered(), INPUTS, 1, layer="unused")
    assert str(error.value) == f"{where}: layer 'unused' must run in the model's forward pass, got no run"
    model = layered()
    model.after = lambda value: F.relu(value) + 0 * model.unused(value.detach()).sum().item()
    with pytest.raises(ValueError) as error:
        method(model, INPUTS, 1, layer="unused")
    detail = "must lead to the score, got one that the score does not depend on through torch"
    assert str(error.value) == f"{where}: layer 'unused' {detail}"


def test_default_layer_is_the_last_run_of_the_last_spatial_layer() -> None:
    model = seeded(Twice)
    result = pysal.explain(model, INPUTS, 1, methods=["grad_cam"])["grad_cam"]
    assert result.details["layer"] == "relu@1"
    for name in ("relu@1", "relu@-1"):  # what is reported can be asked for
        again = pysal.explain(model, INPUTS, 1, methods=["grad_cam"], method_options={"grad_cam": {"layer": name}})["grad_cam"]
        assert again.details["layer"] == name
        assert torch.equal(again.map, result.map)
    # the second run of the shared ReLU, so the map of the second convolution rectified
    hidden = F.relu(model.second(F.relu(model.first(INPUTS))))
    assert result.details["native"].shape[2:] == hidden.shape[2:]
    cam = (model.head.weight[1][None, :, None, None] * hidden).sum(1, keepdim=True).clamp_min(0) / hidden[0, 0].numel()
    torch.testing.assert_close(result.details["native"], cam.detach(), rtol=1e-12, atol=1e-14)


def test_default_layer_ignores_what_is_not_spatial() -> None:
    assert pysal.explain(layered(), INPUTS, 1, methods=["grad_cam"])["grad_cam"].details["layer"] == "second"
    with pytest.raises(pysal.NotApplicable) as error:
        pysal.grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(168, 3)).double().eval(), INPUTS)
    assert str(error.value) == (
        "pysal.grad_cam: the model has no layer with a spatial map (N, C, h, w); pass layer= and tokens="
    )
    with pytest.raises(pysal.NotApplicable) as error:
        pysal.grad_cam(lambda x: x.sum((2, 3)), INPUTS)
    assert str(error.value) == "pysal.grad_cam: model must be an nn.Module, whose layers can be captured, got function"


def saved_bytes(work: Callable[[], object], model: nn.Module, layer: nn.Module) -> tuple[int, int]:
    """Bytes saved for the backward pass before and after `layer` has run, parameters left out."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    counts, place = [0, 0], [0]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            counts[place[0]] += tensor.nbytes
        return tensor

    before = layer.register_forward_pre_hook(lambda *_: place.__setitem__(0, 0))
    after = layer.register_forward_hook(lambda *_: place.__setitem__(0, 1))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work()
    finally:
        before.remove()
        after.remove()
    return counts[0], counts[1]


def test_nothing_below_the_layer_is_kept() -> None:
    model = seeded(Twice)

    def cam() -> None:
        pysal.grad_cam(model, INPUTS, 1, layer="second")

    below, above = saved_bytes(cam, model, model.second)
    assert below == 0
    assert above > 0
    below, _ = saved_bytes(lambda: pysal.gradient(model, INPUTS, 1), model, model.second)
    assert below > 0, "the measure sees nothing"


def test_other_threads_run_the_model_undisturbed() -> None:
    model, failed, stop = layered(nn.ReLU(inplace=True)), [], threading.Event()
    expected = {
        "cam": pysal.grad_cam(model, INPUTS, 1, layer="block.conv"),
        "default": pysal.grad_cam(model, INPUTS, 1),
        "gradient": pysal.gradient(model, INPUTS, 1),
        "guided": pysal.guided_grad_cam(model, INPUTS, 2),
    }
    work: dict[str, Callable[[], Tensor]] = {
        "cam": lambda: pysal.grad_cam(model, INPUTS, 1, layer="block.conv"),
        "default": lambda: pysal.grad_cam(model, INPUTS, 1),
        "gradient": lambda: pysal.gradient(model, INPUTS, 1),
        "guided": lambda: pysal.guided_grad_cam(model, INPUTS, 2),
    }

    def repeat(name: str) -> None:
        try:
            for _ in range(15):
                assert torch.equal(work[name](), expected[name]), name
        except BaseException as error:
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=repeat, args=(name,)) for name in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_pass_of_another_thread_is_not_captured() -> None:
    # not left to chance: the other thread runs the model between this one's layer and the end of this one's pass
    model = layered()
    expected = pysal.grad_cam(model, INPUTS, 1, layer="block.conv")
    inside: list[Tensor] = []

    def interrupt(value: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: inside.append(model(torch.zeros_like(INPUTS))))
            other.start()
            other.join()
        return F.relu(value)

    model.after = interrupt
    assert torch.equal(pysal.grad_cam(model, INPUTS, 1, layer="block.conv"), expected)
    assert len(inside) == 1
    assert inside[0].requires_grad
    assert pysal.explain(model, INPUTS, 1, methods=["grad_cam"])["grad_cam"].details["layer"] == "second"


def test_layer_gradients_are_those_of_plain_autograd() -> None:
    model = layered()
    plan = request(model, INPUTS, 1)
    from pysal.engine.layers.features import find_layer

    rows = torch.arange(2)
    activation, gradient, ruled = plan.layer_gradients(INPUTS, rows, find_layer("pysal.grad_cam", model, "block.conv"))
    assert ruled is None
    assert torch.equal(activation, model.block.conv(INPUTS))
    assert not activation.requires_grad
    leaf = model.block.conv(INPUTS).detach().requires_grad_()
    score = model.head(model.pool(torch.sin(model.second(F.relu(leaf)))).flatten(1))[:, 1]
    torch.testing.assert_close(gradient, torch.autograd.grad(score.sum(), leaf)[0], rtol=1e-12, atol=1e-14)


class Branching(nn.Module):
    """Two tensors out of one layer; the input of the shared ReLU goes on beside it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.act = Pairs(), nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self.pair(inputs)
        value = self.act(first * second)
        return (self.act(value.sin()) + value.sin() * value).flatten(1)


class Pairs(nn.Module):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.sin(), inputs.cos()


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_several_tensors(index: int) -> None:
    model = Branching().eval()
    plan = request(model, INPUTS, 5)
    activation, gradient, _ = plan.layer_gradients(INPUTS, torch.arange(2), Layer("pair", model.pair, index=index))
    parts = [INPUTS.sin(), INPUTS.cos()]
    parts[index].requires_grad_()
    value = F.relu(parts[0] * parts[1])
    score = (F.relu(value.sin()) + value.sin() * value).flatten(1)[:, 5].sum()
    torch.testing.assert_close(activation, parts[index].detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(score, parts[index])[0])


@pytest.mark.parametrize("at_input", [False, True])
def test_the_last_run_and_its_input(at_input: bool) -> None:
    """The gradient at an input counts every use of that tensor."""
    model = Branching().eval()
    plan = request(model, INPUTS, 5)
    layer = Layer("act", model.act, "last", at_input)
    activation, gradient, _ = plan.layer_gradients(INPUTS, torch.arange(2), layer)
    value = F.relu(INPUTS.sin() * INPUTS.cos())
    source = value.sin().requires_grad_() if at_input else F.relu(value.sin()).requires_grad_()
    # value.sin() is computed anew beside the ReLU: only the ReLU's own argument is its input
    score = ((F.relu(source) if at_input else source) + value.sin() * value).flatten(1)[:, 5].sum()
    torch.testing.assert_close(activation, source.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(score, source)[0])


def test_an_input_that_others_use() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, inputs: Tensor) -> Tensor:
            value = inputs.sin()
            early = value * 2
            return (early * self.act(value) + value.exp()).flatten(1)

    model = Shortcut().eval()
    plan = request(model, INPUTS, 5)
    _, gradient, _ = plan.layer_gradients(INPUTS, torch.arange(2), Layer("act", model.act, at_input=True))
    value = INPUTS.sin().requires_grad_()
    score = (value * 2 * F.relu(value) + value.exp()).flatten(1)[:, 5].sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(score, value)[0])


@pytest.mark.parametrize(("asked", "meant"), [("act[1]", "act@1"), ("blocks[0].act[-1]", "blocks.0.act@-1")])
def test_brackets_behind_a_module_without_children_are_told_to_be_a_run(asked: str, meant: str) -> None:
    model = nn.Module()
    model.act, model.blocks = nn.ReLU(), nn.ModuleList([nn.Module()])
    model.blocks[0].act = nn.ReLU()
    with pytest.raises(ValueError) as error:
        find_layer("here", model, asked)
    assert str(error.value) == f"here: layer must be the name of a module of the model (did you mean {meant!r}?), got {asked!r}"
