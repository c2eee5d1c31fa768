"""What torch.fx does not get through is captured by torch.export; programs of torch.export are taken as they are."""

import copy
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import pysal
from pysal.engine.graph.distance import distance
from pysal.engine.graph.exported import capture, graph_of
from pysal.engine.graph.fold import Convolution, NotTraceable, fold_graph, trace
from pysal.engine.graph.fused_convolution import FusedConvolution
from pysal.engine.graph.same_function import run
from pysal.engine.prepared.gains import Gains

IMAGES = (2, 3, 12, 12)
USED = Gains(2.0, 2.0)  # whatever this machine would measure


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm, self.act = (
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < 2:  # what torch.fx cannot decide
            raise ValueError("the image is too small")
        return self.act(self.norm(self.conv(x)))


class Network(nn.Module):
    """What transformers' networks do, in little: sizes are looked at, and results travel in dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 8), Block(8, 8)])
        self.six, self.shared = nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.drop, self.head = nn.Dropout(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        states: dict[str, Tensor] = {"map": x}
        for name, block in enumerate(self.blocks):
            states["before"], states["map"] = states["map"], block(states["map"])
            if name:
                states["map"] = states["map"] + states["before"]
        y = F.max_pool2d(states["map"], 2)
        for _ in range(y.dim() - 2):
            y = self.six(self.shared(y))
        return self.head(self.drop(F.adaptive_avg_pool2d(y, 1).flatten(1)))


def network(kind: Callable[[], nn.Module] = Network) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = kind().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model, torch.rand(IMAGES, dtype=torch.float64)


def exported(model: nn.Module, images: Tensor, *, any_number: bool = True, decomposed: bool = False) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 warns of its own
        shapes = ({0: Dim("b")},) if any_number else None
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
        return program.run_decompositions() if decomposed else program


METHODS: dict[str, Callable[..., Tensor]] = {
    "gradient": pysal.gradient,
    "guided_backprop": pysal.guided_backprop,
    "grad_cam": pysal.grad_cam,
    "guided_grad_cam": pysal.guided_grad_cam,
    "leave_one_out": lambda model, x, target: pysal.leave_one_out(model, x, target, segments=pysal.Grid(3, 3)),
    "integrated_gradients": lambda model, x, target: pysal.integrated_gradients(model, x, target, steps=4),
    "blur_ig": lambda model, x, target: pysal.blur_integrated_gradients(model, x, target, steps=3),
    "smooth_grad": lambda model, x, target: pysal.smooth_grad(model, x, target, samples=2, seed=0),
}


def test_what_torch_fx_refuses_is_captured_and_fused() -> None:
    model, x = network()
    with pytest.raises(NotTraceable):
        trace(model)
    prepared = pysal.prepare(model, x, gains=USED)
    assert prepared.program is not None, prepared.report()
    for method in METHODS.values():
        torch.testing.assert_close(method(prepared, x, 1), method(model, x, 1), rtol=1e-9, atol=1e-12)
    fused = [module for module in prepared._graph.modules() if isinstance(module, FusedConvolution)]  # type: ignore[union-attr]
    assert [module.upper for module in fused] == [float("inf"), float("inf"), 6.0, 6.0]


def forms(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Every form in which a program of torch.export comes."""
    program, core = exported(model, x), exported(model, x, decomposed=True)
    one = exported(model, x[:1], any_number=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "program": program,
            "module": program.module(),
            "core operations": core.module(),
            "one image at a time": one.module(),
            "unflattened": torch.export.unflatten(program),
            "part of a module": nn.Sequential(nn.Identity(), program.module()),
        }


def test_every_form_of_a_program_is_prepared() -> None:
    model, x = network()
    expected = pysal.gradient(model, x, 1)
    for name, form in forms(model, x).items():
        prepared = pysal.prepare(form, x, gains=USED)
        assert prepared.program is not None, f"{name}: {prepared.report()}"
        assert sum(isinstance(one, FusedConvolution) for one in prepared._graph.modules()) == 4, name  # type: ignore[union-attr]
        torch.testing.assert_close(pysal.gradient(prepared, x, 1), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-9, atol=1e-12)


LAYERS = (None, "blocks.0", "blocks.0.conv", "blocks[1].norm", "blocks.1.act", "six@0", "shared@-1")


def test_layers_of_captured_graphs_are_those_of_the_model() -> None:
    model, x = network()
    for form in (model, exported(model, x), exported(model, x, decomposed=True).module()):
        prepared = pysal.prepare(form, x, gains=USED)
        for layer in LAYERS:
            expected = pysal.grad_cam(model, x, 1, layer=layer)
            assert expected.abs().max() > 0
            torch.testing.assert_close(pysal.grad_cam(prepared, x, 1, layer=layer), expected, rtol=1e-9, atol=1e-12)


def test_a_file_of_a_program_is_prepared(tmp_path: Path) -> None:
    model, x = network()
    model, x = model.float(), x.float()
    for number, any_number in enumerate((True, False)):
        file = tmp_path / f"{number}.pt2"
        torch.export.save(exported(model, x if any_number else x[:1], any_number=any_number), file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            classifier = pysal.models.load(file, normalize="none", size=12, class_names=list("abcd"))
        prepared = pysal.prepare(classifier, x, gains=USED)
        assert prepared.program is not None, prepared.report()
        expected = pysal.grad_cam(classifier, x, 1)
        torch.testing.assert_close(pysal.grad_cam(prepared, x, 1), expected, rtol=1e-4, atol=1e-6)


def test_a_program_of_a_fixed_number_of_images_gets_that_many() -> None:
    model, x = network()
    prepared = pysal.prepare(exported(model, x, any_number=False), x, gains=USED)
    assert prepared.rows == 2
    assert "2 images per pass, which is all that it takes" in prepared.report()
    more = torch.cat([x, x[:1] / 2])
    torch.testing.assert_close(prepared(more), model(more), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pysal.gradient(prepared, more, 1), pysal.gradient(model, more, 1), rtol=1e-9, atol=1e-12)


class Odd(nn.Module):
    """A convolution, what each of some functions does to its map, and a head; torch.fx does not get through it.

    Its output is (N, functions, 4).
    """

    def __init__(self, *functions: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.layers, self.groups, self.head = nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Linear(8, 4)
        self.slopes = nn.Parameter(torch.rand(8))
        self.functions = functions

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] > 1
        y = self.conv(x)
        return torch.stack([self.head(function(self, y.clone()).mean((2, 3))) for function in self.functions], 1)


def without_gradient(net: Odd, y: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(net.other(y))
        with torch.enable_grad():
            gate = gate + y
    return gate * y


def written_through_a_view(net: Odd, y: Tensor) -> Tensor:
    z = y + 1
    z[:, :2].mul_(3)
    return net.other(z)


def written_and_read_before(net: Odd, y: Tensor) -> Tensor:
    z = y + 1
    before = z + 2
    z.add_(1)
    return before + net.other(z)


def normalised(net: Odd, y: Tensor) -> Tensor:
    y = net.groups(net.norm(y))
    return net.layers(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": torch.relu_,
    "relu6": F.relu6,
    "hardtanh": lambda y: F.hardtanh(y, 0.0, 2.0),
    "hardtanh of both signs": F.hardtanh,
    "threshold": lambda y: F.threshold(y, 0.0, 0.0),
    "threshold elsewhere": lambda y: F.threshold(y, 0.1, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky": lambda y: F.leaky_relu(y, 0.2),
    "leaky in place": lambda y: F.leaky_relu_(y, 0.3),
    "elu": lambda y: F.elu(y, 0.7),
    "celu": lambda y: F.celu(y, 0.7),
    "selu": F.selu,
    "mish": F.mish,
    "softplus": lambda y: F.softplus(y, 2.0),
    "dropped": lambda y: F.dropout(F.dropout2d(y, 0.5, training=False), 0.5, training=False, inplace=True),
    "clamp": lambda y: y.clamp(0, 1),
    "added with a factor": lambda y: torch.add(y, y.tanh(), alpha=3),
    "subtracted with a factor": lambda y: torch.sub(y, y.tanh(), alpha=3),
    "divided and rounded": lambda y: y + torch.div(y, 0.3, rounding_mode="floor"),
    "average": lambda y: F.avg_pool2d(y, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "largest": lambda y: F.max_pool2d(y, 3, 2, 1, ceil_mode=True),
    "padded": lambda y: F.pad(y, (1, 0, 2, 1)),
    "reflected": lambda y: F.pad(y, (1, 0, 2, 1), mode="reflect"),
    "softmax": lambda y: torch.softmax(y, 1),
    "shuffled": lambda y: y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "mean of all": lambda y: y * y.mean(),
    "cut": lambda y: torch.cat([y[:, 4:], y[:, :4]], 1),
    "rolled": lambda y: y.roll(1, 2),
    "cast": lambda y: y.to(torch.float64) * 2,
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: lambda _net, y, made=made: made(y) for name, made in ACTIVATIONS.items()},  # type: ignore[misc]
    "without gradient": without_gradient,
    "written and read before": written_and_read_before,
    "norms": normalised,
    "slopes": lambda net, y: F.prelu(y, net.slopes),
    "view, written": written_through_a_view,
}


@pytest.mark.parametrize("decomposed", [False, True])
def test_operations_keep_their_meaning(decomposed: bool) -> None:
    torch.manual_seed(0)
    # torch's decompositions drop what is without gradient
    functions = {name: function for name, function in FUNCTIONS.items() if not (decomposed and name == "without gradient")}
    model = Odd(*functions.values()).double().eval()
    x = torch.randn(IMAGES, dtype=torch.float64)
    # torch's decompositions have constants of float32, so that a program of theirs is held against itself
    program = exported(model, x, decomposed=True) if decomposed else None
    graph = fold_graph(capture(model, x)[0] if program is None else graph_of(program))
    expected, found = run(model if program is None else program.module(), x), run(graph, x)
    for number, name in enumerate(functions):
        assert distance(found.output[:, number], expected.output[:, number]) < 1e-12, name
    assert found.apart(expected)[1] < 1e-12
    convolutions = [module for module in graph.modules() if isinstance(module, Convolution)]
    assert len(convolutions) >= 2
    assert not any("convolution" in str(node.target) for node in graph.graph.nodes if node.op == "call_function")


def test_what_is_written_through_a_view_is_right_or_runs_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Odd(written_through_a_view).double().eval(), torch.rand(IMAGES, dtype=torch.float64)
    prepared = pysal.prepare(model, x, gains=USED)
    torch.testing.assert_close(prepared(x), model(x), rtol=1e-12, atol=1e-12)
    score = lambda output: output[:, 0, 1]  # noqa: E731
    torch.testing.assert_close(pysal.gradient(prepared, x, score), pysal.gradient(model, x, score), rtol=1e-9, atol=1e-12)


class WritesItsInput(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).mul_(2))


def test_images_that_a_model_writes_into_stay() -> None:
    model, x = network(WritesItsInput)
    before = x.clone()
    for form in (model, exported(model, x.clone())):
        prepared = pysal.prepare(form, x, gains=USED)
        assert prepared.fused, prepared.report()
        torch.testing.assert_close(prepared(x), model(x.clone()), rtol=1e-9, atol=1e-12)
        assert torch.equal(x, before)


class Counts(Network):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x) * (2 if self.passes > 9 else 1)


class CountsInABuffer(Network):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


class DecidesByValues(Network):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class AsksNumpy(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.from_numpy(x.detach().numpy()).sum() * 0


REASONS = {
    "counts": (Counts, "its forward pass changes its own attribute 'passes'"),
    "counts in a buffer": (CountsInABuffer, "its forward pass writes its own tensor 'passes' each time"),
    "decides by values": (
        DecidesByValues,
        "its forward pass decides by values that it computes from the images (test_exported",
    ),
    "asks NumPy": (AsksNumpy, "its forward pass does more than to call torch's operations (test_exported.py, line "),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_captured_runs_as_it_is_and_says_why(name: str) -> None:
    kind, reason = REASONS[name]
    model, x = network(kind)
    prepared = pysal.prepare(model, x, batch_size=1)
    assert prepared.report().splitlines()[0].startswith(f"runs as it is: {reason}")
    torch.testing.assert_close(pysal.gradient(prepared, x, 1), pysal.gradient(model, x, 1))


class Two(Network):
    def forward(self, x: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + super().forward(more)


def test_a_program_of_something_else_says_what_it_takes() -> None:
    model, x = network()
    two = torch.export.export(Two().double().eval(), (x, x), strict=False)
    larger = torch.rand(1, 3, 13, 14, dtype=torch.float64)
    cases = [
        (two, x, "it takes 2 tensors, not one batch of images"),
        (exported(model, x), larger, "it was exported for images of 3 x 12 x 12, not of 3 x 13 x 14"),
    ]
    for program, images, reason in cases:
        assert pysal.prepare(program, images, batch_size=1).report().splitlines()[0] == f"runs as it is: {reason}"
    with pytest.raises(TypeError, match=r"^pysal.prepare: example must have the model's dtype float64, got float32$"):
        pysal.prepare(exported(model, x), x.float())
    with pytest.raises(
        ValueError, match=r"^pysal.prepare: model must have weights with values, got weights on the meta device$"
    ):
        pysal.prepare(copy.deepcopy(model).to("meta"), x)


class Caching(Network):
    """Keeps what a pass made, as some attention keeps its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.head.bias * 2
        return super().forward(x) + self.kept["bias"].detach()


def test_a_program_for_one_image_is_given_one_at_a_time() -> None:
    """Without being told; images of another size are refused in a sentence, not by the program's guard."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(network, (images[:1],)).module()
    torch.testing.assert_close(pysal.gradient(program, images, 1), pysal.gradient(network, images, 1))
    torch.testing.assert_close(
        pysal.integrated_gradients(program, images, 1, steps=3), pysal.integrated_gradients(network, images, 1, steps=3)
    )
    sentence = r"inputs must have the shape that the program was exported for \(input.size\(\)\[2\] == 8\), got \(1, 3, 9, 8\)$"
    with pytest.raises(ValueError, match=sentence):
        pysal.gradient(program, torch.rand(1, 3, 9, 8), 1)


def test_a_program_itself_cannot_be_called() -> None:
    images = torch.rand(1, 3, 8, 8)
    program = torch.export.export(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval(), (images,)
    )
    message = r"model must be its module\(\) or what pysal.prepare makes of it, got ExportedProgram"
    for call in (
        lambda: pysal.gradient(program, images, 1),
        lambda: pysal.leave_one_out(program, images, 1),
        lambda: pysal.explain(program, images, 1, methods=["gradient"]),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_what_a_pass_leaves_on_the_model_is_captured_with_it() -> None:
    model, x = network(Caching)
    model(x)
    prepared = pysal.prepare(model, x, gains=USED)
    assert prepared.program is not None, prepared.report()
    torch.testing.assert_close(pysal.gradient(prepared, x, 1), pysal.gradient(model, x, 1), rtol=1e-9, atol=1e-12)


class AsksForALength(nn.Module):
    """A class token for each image, of which `len` says how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.mixed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).reshape(len(x), 8, -1).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)
        return self.head(tokens + F.gelu(self.mixed(tokens)).mean(len(tokens.shape) - 2, keepdim=True)).mean(1)


def test_the_length_of_a_tensor_is_that_of_any_batch() -> None:
    model, x = network(AsksForALength)
    prepared = pysal.prepare(model, x, gains=USED)
    assert prepared.fused, prepared.report()
    for images in (x, x.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(prepared(images), model(images), rtol=1e-9, atol=1e-12)
    assert "len" not in globals()


def test_several_threads_capture_models_of_the_same_code() -> None:
    found: list[Any] = []

    def capture_some() -> None:
        for _ in range(2):
            model, x = network(AsksForALength)
            graph, _ = capture(model, x)
            many = x.repeat(3, 1, 1, 1)
            found.append(torch.equal(graph(many), model(many)))

    threads = [threading.Thread(target=capture_some) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert "len" not in globals()


def test_capturing_leaves_the_model_as_it_was() -> None:
    model, x = network()
    model.states = []  # type: ignore[assignment]
    before = copy.deepcopy(model)
    capture(model, x)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters(), strict=True))
    assert all(one.requires_grad for one in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert set(model.__dict__) == set(before.__dict__)


def test_weights_of_a_prepared_program_may_not_change() -> None:
    model, x = network()
    program = exported(model, x).module()
    prepared = pysal.prepare(program, x, gains=USED)
    with torch.no_grad():
        program.blocks.get_submodule("0").conv.weight.mul_(2)
    with pytest.raises(ValueError, match="be prepared again after its weights have changed"):
        prepared(x)


def test_a_prepared_program_is_written_to_a_stream_as_before() -> None:
    model, x = network()
    program = exported(model, x)
    pysal.prepare(program, x, gains=USED)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    assert torch.equal(torch.export.load(stream).module()(x), model(x))
