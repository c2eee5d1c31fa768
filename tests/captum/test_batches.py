"""Functions whose rows act on each other, and other habits that a batch split, packed or repeated would show."""

import itertools
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal.captum
from pysal.captum import _batches
from tests.captum.peer import IGNORED, difference, peers

pytestmark = [pytest.mark.filterwarnings(one) for one in [*IGNORED, "ignore:Internal batch size", "ignore:.*must be at least"]]

EXACT = 1e-9
SINGLE = 2 * torch.finfo(torch.float32).eps  # captum rounds what Occlusion finds to float32
DOUBLE = torch.float64


class Through(nn.Module):
    """A function of some modules and the inputs."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(self, *inputs)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) + 0.1


def vectors() -> dict[str, tuple[nn.Module, Tensor]]:
    """Models of rows of five numbers, three classes, whose rows act on each other, with a batch."""
    mixing = drawn(7, 7)
    mixing /= mixing.sum(1, keepdim=True)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        models = {
            "graph of seven nodes": Through(
                lambda m, x: m.b(mixing @ m.a(mixing @ x).tanh()), a=nn.Linear(5, 6), b=nn.Linear(6, 3)
            ),
            "attention over the set": Through(
                lambda m, x: torch.softmax(m.a(x) @ m.b(x).T, 1) @ m.c(x),
                a=nn.Linear(5, 4),
                b=nn.Linear(5, 4),
                c=nn.Linear(5, 3),
            ),
            "time first": Through(lambda m, x: m.out(m.rnn(x[:, None])[0][:, 0]), rnn=nn.LSTM(5, 4), out=nn.Linear(4, 3)),
            "time first, backwards": Through(
                lambda m, x: m.out(m.rnn(x.flip(0)[:, None])[0][:, 0].flip(0)), rnn=nn.GRU(5, 4), out=nn.Linear(4, 3)
            ),
            "state of a batch of seven": Through(
                lambda m, x: m.out(m.cell(x, torch.zeros(7, 4, dtype=x.dtype))), cell=nn.GRUCell(5, 4), out=nn.Linear(4, 3)
            ),
            "scaled by the batch": Through(lambda m, x: m.out((x / x.abs().max()).tanh()), out=nn.Linear(5, 3)),
            "less the batch's mean": Through(lambda m, x: m.out((x - x.mean(0)).square()), out=nn.Linear(5, 3)),
            "distances": Through(lambda m, x: m.out((x[:, None] - x).square().sum(1)), out=nn.Linear(5, 3)),
            "normalised over rows": Through(lambda m, x: m.out(x).softmax(0), out=nn.Linear(5, 3)),
            "batch norm in training mode": nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        }
    found = {}
    for name, model in models.items():
        found[name] = (model.double().train(name.endswith("training mode")), drawn(7, 5, seed=len(name)))
    return found


VECTORS = vectors()
CLASSES = [2, 0, 1, 1, 0, 2, 0]


def alike(call: Callable[[Any], Any], pair: tuple[Any, Any], tolerance: float = EXACT) -> None:
    """Both answer alike, or both fail."""
    answers = []
    for one in pair:
        torch.manual_seed(8)
        try:
            answers.append(call(one))
        except (RuntimeError, AssertionError) as error:
            answers.append(error)
    failed = [isinstance(one, Exception) for one in answers]
    assert failed[0] == failed[1], answers
    if not failed[0]:
        assert difference(*answers) < tolerance


@pytest.fixture(params=["as it is", "nothing is fast"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes that run in one pass, and as if no two rows were worth one."""
    if request.param == "nothing is fast":
        monkeypatch.setattr(_batches, "WORTH_CUTTING", 0)
        monkeypatch.setattr(_batches, "fast_rows", lambda *_: 1)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", VECTORS)
def test_rows_that_act_on_each_other(name: str) -> None:
    model, inputs = VECTORS[name]
    for classes in (CLASSES, 1):
        alike(lambda one: one.attribute(inputs, classes, abs=False), peers("Saliency", model))  # noqa: B023 (called at once)
        for size in (None, 1, 7, 15):
            alike(
                lambda one: one.attribute(inputs, target=classes, n_steps=5, internal_batch_size=size),  # noqa: B023 (called at once)
                peers("IntegratedGradients", model, exact_captum=True),
            )
        for together in (1, 3):
            alike(
                lambda one: one.attribute(inputs, target=classes, perturbations_per_eval=together),  # noqa: B023 (called at once)
                peers("FeatureAblation", model),
            )
            alike(
                lambda one: one.attribute(inputs, (2,), target=classes, perturbations_per_eval=together),  # noqa: B023 (called at once)
                peers("Occlusion", model),
                SINGLE,
            )


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", VECTORS)
def test_noisy_rows_that_act_on_each_other(name: str) -> None:
    model, inputs = VECTORS[name]
    for size, noise in itertools.product((None, 1, 2), (0.0, 0.3)):
        pair = (
            captum.attr.NoiseTunnel(captum.attr.Saliency(model)),
            pysal.captum.NoiseTunnel(pysal.captum.Saliency(model), rng="captum" if noise else "philox"),
        )
        choices = {"nt_samples": 5, "nt_samples_batch_size": size, "stdevs": noise, "target": CLASSES, "abs": False}
        if name != "normalised over rows" or noise:  # whose gradient without noise is rounding alone
            alike(lambda one: one.attribute(inputs, **choices), pair)  # noqa: B023 (called at once)


@pytest.mark.parametrize("rows", [1, 6])
def test_images_that_act_on_each_other(rows: int) -> None:
    """Batch norm that takes its statistics from the batch, in eval mode, and a squeeze of each image by the batch's mean."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        norm = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(48, 3),
        )  # fmt: skip
    model, images = norm.double().eval(), drawn(rows, 3, 8, 8)
    classes = CLASSES[:rows]
    for name in ("GuidedBackprop", "Deconvolution"):
        alike(lambda one: one.attribute(images, classes), peers(name, model))
    for name in ("LayerGradCam", "GuidedGradCam"):
        alike(lambda one: one.attribute(images, classes), peers(name, model, model[3]))
    for together in (1, 3):
        alike(
            lambda one: one.attribute(images, (3, 4, 4), (3, 2, 2), target=classes, perturbations_per_eval=together),  # noqa: B023 (called at once)
            peers("Occlusion", model),
            SINGLE,
        )


def test_a_quantised_model() -> None:
    """Steps as wide as the largest input of a pass wants them, which is what dynamic quantisation does."""

    def model(x: Tensor) -> Tensor:
        step = x.abs().max() / 127
        return ((x / step).round() * step).square()

    inputs = drawn(7, 5) * torch.logspace(-2, 1, 7)[:, None]
    for together in (1, 2):
        pair = peers("FeatureAblation", model)
        alike(lambda one: one.attribute(inputs, target=1, perturbations_per_eval=together), pair)  # noqa: B023 (called at once)
        alike(
            lambda one: one.attribute(inputs, (2,), target=1, perturbations_per_eval=together),  # noqa: B023 (called at once)
            peers("Occlusion", model),
            SINGLE,
        )


def seen(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    """A function, and the numbers of rows it is asked for with gradients."""
    rows: list[int] = []

    def forward(*inputs: Any) -> Tensor:
        if torch.is_grad_enabled():
            rows.append(len(inputs[0]))
        return function(*inputs)

    return forward, rows


def test_many_rows_are_cut_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_batches, "fast_rows", lambda *_: 8)
    inputs = drawn(3, 5)
    alone, rows = seen(lambda x: x.pow(3).sum(1))
    mixed, mixed_rows = seen(lambda x: (x.pow(3) - x.mean(0)).sum(1))
    for copies, each in ((10, [30]), (11, [6] * 5 + [3])):  # four times what is fast is not worth cutting
        rows.clear()
        pysal.captum.IntegratedGradients(alone).attribute(inputs, n_steps=copies)
        assert rows == each
        rows.clear()
        pysal.captum.NoiseTunnel(pysal.captum.Saliency(alone)).attribute(inputs, nt_samples=copies)
        assert rows == each
    pysal.captum.IntegratedGradients(mixed).attribute(inputs, n_steps=11)
    pysal.captum.NoiseTunnel(pysal.captum.Saliency(mixed)).attribute(inputs, nt_samples=11)
    assert mixed_rows == [33, 33]
    rows.clear()
    pysal.captum.IntegratedGradients(alone).attribute(drawn(9, 5), n_steps=11)
    assert rows == [9] * 11
    rows.clear()
    pysal.captum.Saliency(alone).attribute(drawn(99, 5))
    assert rows == [99]


@pytest.mark.parametrize("method", ["Saliency", "IntegratedGradients", "GuidedBackprop", "NoiseTunnel"])
def test_memory_that_runs_out(method: str) -> None:
    """A batch is split where its rows do not act on each other; where they do, it is said."""

    def tight(function: Callable[[Tensor], Tensor]) -> nn.Module:
        def forward(_model: nn.Module, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and len(x) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(x)

        return Through(forward).eval()

    def run(package: Any, model: nn.Module) -> Any:
        if method == "NoiseTunnel":
            return package.NoiseTunnel(package.Saliency(model)).attribute(inputs, stdevs=0.0)
        options = {"strict": False} if method == "GuidedBackprop" and package is pysal.captum else {}
        exact = {"exact_captum": True} if method == "IntegratedGradients" and package is pysal.captum else {}
        return getattr(package, method)(model, **options, **exact).attribute(inputs)

    inputs = drawn(7, 5)
    right = run(captum.attr, Through(lambda _model, x: x.pow(3).sum(1)).eval())
    assert difference(right, run(pysal.captum, tight(lambda x: x.pow(3).sum(1)))) < EXACT
    with pytest.raises(RuntimeError, match="rows depend on each other must fit into memory together"):
        run(pysal.captum, tight(lambda x: (x.pow(3) - x.mean(0)).sum(1)))


def test_random_numbers_of_the_function(fast: None) -> None:
    """What it draws it draws once, as with captum: to look whether rows are independent takes none."""
    inputs = drawn(3, 40)
    for function in (lambda x: F.dropout(x, 0.5).sum(1), lambda x: (x * torch.rand_like(x)).sum(1)):
        alike(lambda one: one.attribute(inputs, n_steps=9), peers("IntegratedGradients", function, exact_captum=True))
        alike(lambda one: one.attribute(inputs[:, :6], (2,)), peers("Occlusion", function), SINGLE)


TABLE = drawn(6, 4)
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 3], [1, 2, 3, 4, 5, 6, 0, 4, 5]])


def further() -> dict[str, tuple[Callable[..., Tensor], Tensor, Any]]:
    """Functions, batches and further arguments that have no row for each example."""
    weight = drawn(5, 4, seed=3)
    return {
        "prompts": (lambda x, texts: (x.square() @ weight @ texts.T).softmax(1), drawn(4, 5), TABLE),
        "prompts, one image": (lambda x, texts: (x.square() @ weight @ texts.T).softmax(1), drawn(1, 5), TABLE),
        "as many prompts as copies": (lambda x, texts: (x.square() @ weight @ texts.T).softmax(1), drawn(3, 5), TABLE),
        "two for each example": (lambda x, own: x.square() @ weight * own.view(len(x), -1, 4).sum(1), drawn(3, 5), TABLE),
        "two for the only example": (
            lambda x, own: x.square() @ weight * own.view(len(x), -1, 4).sum(1),
            drawn(1, 5),
            TABLE[:2],
        ),
        "edges": (
            lambda x, edges: (
                torch.zeros(len(x), 4, dtype=DOUBLE).index_add(0, edges[1], (x.square() @ weight)[edges[0]]).tanh()
            ),
            drawn(7, 5),
            EDGES,
        ),
    }


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("case", further())
def test_tensors_without_a_row_for_each_example(case: str) -> None:
    """captum repeats them with the copies of the batch; the answer is that of the batch on its own, copy by copy."""
    function, inputs, argument = further()[case]
    gradient = captum.attr.Saliency(lambda x: function(x, argument)).attribute(inputs, 1, abs=False)
    path = captum.attr.IntegratedGradients(lambda x: function(x, argument))
    integrated = path.attribute(inputs, target=1, n_steps=6, internal_batch_size=len(inputs))
    drops = captum.attr.FeatureAblation(lambda x: function(x, argument)).attribute(inputs, target=1)
    options = {"target": 1, "additional_forward_args": argument}
    if case in ("prompts", "edges"):
        assert difference(integrated, captum.attr.IntegratedGradients(function).attribute(inputs, n_steps=6, **options)) > 0.1
    assert difference(gradient, pysal.captum.Saliency(function).attribute(inputs, 1, False, argument)) < EXACT
    for size in (None, 1, 3 * len(inputs)):
        ours = pysal.captum.IntegratedGradients(function, exact_captum=True)
        assert difference(integrated, ours.attribute(inputs, n_steps=6, internal_batch_size=size, **options)) < EXACT
    for rng, size in itertools.product(("captum", "philox"), (None, 1, 2)):
        tunnel = pysal.captum.NoiseTunnel(pysal.captum.Saliency(function), rng=rng)  # type: ignore[arg-type]
        found = tunnel.attribute(inputs, stdevs=0.0, abs=False, nt_samples=4, nt_samples_batch_size=size, **options)
        assert difference(gradient, found) < EXACT
    for together in (1, 2):
        found = pysal.captum.FeatureAblation(function).attribute(inputs, perturbations_per_eval=together, **options)
        assert difference(drops, found) < EXACT


def test_further_arguments_of_every_kind() -> None:
    def function(x: Tensor, nothing: None, times: int, rows: Tensor, number: Tensor, word: str) -> Tensor:
        assert nothing is None
        assert len(rows) == len(x)
        return x.square() * times * rows[:, None] * number * len(word)

    inputs, arguments = drawn(3, 4), (None, 3, drawn(3), torch.tensor(2.0, dtype=DOUBLE), "abc")
    for target in (1, (1,), [1, 0, 2], torch.tensor([1, 0, 2]), [(1,), (0,), (2,)]):
        options = {"target": target, "additional_forward_args": arguments}
        for name, choices in (("Saliency", {}), ("IntegratedGradients", {"n_steps": 6}), ("FeatureAblation", {})):
            pair = peers(name, function, **({"exact_captum": True} if name == "IntegratedGradients" else {}))
            alike(lambda one: one.attribute(inputs, **options, **choices), pair)  # noqa: B023 (called at once)


WEIGHT = torch.complex(drawn(4, 3, seed=5), drawn(4, 3, seed=6))
SIGNAL = torch.complex(drawn(3, 4, seed=7), drawn(3, 4, seed=8) - 0.5)


@pytest.mark.parametrize(
    "inputs", [SIGNAL, SIGNAL.conj(), (SIGNAL, drawn(3, 2)), SIGNAL[:, :1]], ids=["z", "conj", "two", "one"]
)
def test_complex_numbers(inputs: Any) -> None:
    def power(z: Tensor, scale: Tensor | None = None) -> Tensor:
        found = (z @ WEIGHT[: z.shape[1]]).abs() ** 3
        return found if scale is None else found * scale.prod(1, keepdim=True)

    start = tuple(0.5 * one for one in inputs) if isinstance(inputs, tuple) else 0.5 * inputs
    for absolute in (True, False):
        alike(lambda one: one.attribute(inputs, 1, absolute), peers("Saliency", power))  # noqa: B023 (called at once)
    for times in (True, False):
        alike(
            lambda one: one.attribute(inputs, start, 1, n_steps=7, return_convergence_delta=True),
            peers("IntegratedGradients", power, times, exact_captum=True),
        )
    alike(lambda one: one.attribute(inputs, target=2, perturbations_per_eval=2), peers("FeatureAblation", power))
    for kind in ("smoothgrad", "smoothgrad_sq", "vargrad"):
        pair = (
            captum.attr.NoiseTunnel(captum.attr.Saliency(power)),
            pysal.captum.NoiseTunnel(pysal.captum.Saliency(power), rng="captum"),
        )
        alike(lambda one: one.attribute(inputs, kind, target=1, abs=False, stdevs=0.2), pair)  # noqa: B023 (called at once)
    still = pysal.captum.NoiseTunnel(pysal.captum.Saliency(power)).attribute(inputs, target=1, stdevs=0.0, abs=False)
    assert difference(pysal.captum.Saliency(power).attribute(inputs, 1, False), still) < EXACT


def test_noise_of_complex_numbers_is_real() -> None:
    given: list[Tensor] = []

    def function(z: Tensor) -> Tensor:
        given.append(z.detach().clone())
        return z.abs().sum(1)

    pysal.captum.NoiseTunnel(pysal.captum.Saliency(function)).attribute(SIGNAL, nt_samples=2)
    assert torch.equal(given[0].imag, SIGNAL.imag.repeat_interleave(2, 0))
    assert not torch.isclose(given[0].real, SIGNAL.real.repeat_interleave(2, 0)).any()


@pytest.mark.parametrize("number", [1, 2])
def test_views_of_the_inputs(number: int) -> None:
    """What a model is given lies in memory as a tensor of its own: rows follow each other, or as the caller's tensor does."""

    def frames(video: Tensor, table: Tensor) -> Tensor:
        return video.view(-1, 6).square().sum(1).view(len(table), -1).sum(1) * table.view(-1).view(len(table), -1).prod(1)

    inputs = (drawn(number, 4, 2, 3), drawn(number, 2))
    alike(lambda one: one.attribute(inputs, abs=False), peers("Saliency", frames))
    alike(lambda one: one.attribute(inputs, n_steps=6), peers("IntegratedGradients", frames, exact_captum=True))
    alike(lambda one: one.attribute(inputs, perturbations_per_eval=3), peers("FeatureAblation", frames))
    turned = drawn(4, 6, 3).permute(2, 0, 1)
    alike(
        lambda one: one.attribute(turned, abs=False),
        peers("Saliency", lambda x: x.permute(1, 2, 0).view(-1).reshape(4, 6, 3).square().sum((0, 1))),
    )
    for shape, order in (((3, 6, 6, 2), (0, 3, 1, 2)), ((2, 6, 6, 3), (3, 0, 2, 1))):
        images = drawn(*shape).permute(order)
        back = sorted(range(4), key=order.__getitem__)
        alike(
            lambda one: one.attribute(images, abs=False),  # noqa: B023 (called at once)
            peers("Saliency", lambda x: x.permute(back).view(-1).view(shape).permute(order).square().sum((1, 2, 3))),  # noqa: B023 (called at once)
        )


def test_outputs_of_a_row_alone_may_be_squeezed() -> None:
    """One row has one meaning only, whatever dimensions were dropped with it; captum refuses them."""
    cases: list[tuple[Callable[[Tensor], Tensor], Any]] = [
        (lambda x: x.square().sum(1, keepdim=True), None),
        (lambda x: x.square(), 2),
        (lambda x: x.square(), [2]),
        (lambda x: x.square(), torch.tensor([2])),
        (lambda x: x.square()[:, :, None] * torch.arange(1.0, 4), (2, 1)),
        (lambda x: x.square()[:, :, None] * torch.arange(1.0, 4), [(2, 1)]),
    ]
    inputs = drawn(1, 4)
    for function, target in cases:
        for name, choices in (
            ("Saliency", {}),
            ("IntegratedGradients", {"n_steps": 5}),
            ("IntegratedGradients", {"n_steps": 5, "internal_batch_size": 2}),  # the last pass has one row
            ("FeatureAblation", {}),
            ("FeatureAblation", {"perturbations_per_eval": 3}),
        ):
            if target is None and "perturbations_per_eval" in choices:
                continue  # that is an answer for the whole batch
            right = getattr(pysal.captum, name)(function).attribute(inputs, target=target, **choices)
            method = getattr(pysal.captum, name)(lambda x: function(x).squeeze())  # noqa: B023 (called at once)
            assert torch.equal(right, method.attribute(inputs, target=target, **choices))


def test_whole_numbers_as_outputs_of_images() -> None:
    images, mask = drawn(2, 3, 4, 4), torch.arange(16).reshape(1, 1, 4, 4) // 8
    count = lambda x: (x > 0.5).sum((1, 2, 3))  # noqa: E731
    theirs, ours = (one.attribute(images, feature_mask=mask) for one in peers("FeatureAblation", count))
    assert theirs.dtype == ours.dtype == torch.int64
    assert torch.equal(theirs, ours)
    theirs, ours = (one.attribute(images, (3, 2, 2), (3, 2, 2)) for one in peers("Occlusion", count))
    assert torch.equal(theirs, ours)


def test_nothing_to_leave_out() -> None:
    for inputs in (torch.zeros(0, 4), torch.zeros(3, 0), torch.zeros(0, 3, 4, 4), (torch.zeros(3, 0), torch.ones(3, 2))):
        function = lambda *several: sum(one.flatten(1).sum(1) for one in several)  # noqa: E731
        for together in (1, 2):
            theirs, ours = (
                one.attribute(inputs, perturbations_per_eval=together) for one in peers("FeatureAblation", function)
            )
            pairs = zip(theirs, ours, strict=True) if isinstance(inputs, tuple) else [(theirs, ours)]
            assert all(torch.equal(one, other) for one, other in pairs)
    tunnel = pysal.captum.NoiseTunnel(pysal.captum.Saliency(lambda x, y: x.sum(1) + y.sum(1)))
    empty, full = tunnel.attribute((torch.zeros(3, 0), torch.ones(3, 2)))
    assert empty.shape == (3, 0)
    assert torch.equal(full, torch.ones(3, 2))


TARGETS: dict[str, tuple[Any, int]] = {
    "a fraction": (1.0, 2),
    "fractions": ([1.0, 0.0], 2),
    "a fraction among whole numbers": ([1, 0.5], 2),
    "a tensor of fractions": (torch.tensor([1.0, 0.0]), 2),
    "a fraction as a tensor": (torch.tensor(1.0), 2),
    "one fraction for one example": (torch.tensor([1.0]), 1),
    "a fraction in a tuple": ((1.5,), 2),
    "fractions in tuples": ([(1.5,), (1,)], 2),
    "truth values": ([True, False], 2),
    "three for two": ([0, 1, 1], 2),
    "three for two in a tensor": (torch.tensor([0, 1, 1]), 2),
    "none for two": ([], 2),
    "a word": ("cat", 2),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_are_none(case: str) -> None:
    """Refused with captum's type of error, before the model runs."""
    target, rows = TARGETS[case]

    def call(package: Any, name: str, function: Callable[..., Tensor]) -> None:
        if name == "NoiseTunnel":
            package.NoiseTunnel(package.Saliency(function)).attribute(drawn(rows, 4), target=target)
        else:
            getattr(package, name)(function).attribute(drawn(rows, 4), target=target)

    def untouched(x: Tensor) -> Tensor:
        raise AssertionError("the model has run")

    # captum takes a single fraction for that of all steps, and says something else of it
    for name in ("Saliency", "FeatureAblation", "IntegratedGradients", "NoiseTunnel")[: 2 if rows == 1 else 4]:
        with pytest.raises(Exception) as theirs:
            call(captum.attr, name, lambda x: x.square())
        with pytest.raises(theirs.type, match=rf"^pysal\.captum\.{name}: target must"):
            call(pysal.captum, name, untouched)


def test_what_no_peer_names() -> None:
    images, sums = drawn(2, 3, 4, 4), lambda x: x.sum((1, 2, 3))
    with pytest.warns(RuntimeWarning):
        assert captum.attr.Occlusion(sums).attribute(images, (3, 2, 2), strides=0).isnan().any()
    for strides in (0, (1, 0, 1), -1):
        with pytest.raises(ValueError, match=r"^pysal\.captum\.Occlusion: strides must be whole numbers of at least 1, got"):
            pysal.captum.Occlusion(sums).attribute(images, (3, 2, 2), strides=strides)
    with pytest.raises(AssertionError, match="sliding_window_shapes must be whole numbers of at least 1"):
        pysal.captum.Occlusion(sums).attribute(images, (3, 0, 2))
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    for mode in ("lineal", None, 3):
        with pytest.raises(ValueError, match=r"^pysal\.captum\.GuidedGradCam: interpolate_mode must be one of 'nearest'"):
            pysal.captum.GuidedGradCam(model, model[0]).attribute(images, 1, interpolate_mode=mode)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"interpolate: interpolate_mode must be one of"):
            pysal.captum.LayerAttribution.interpolate(images, (8, 8), mode)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must fit 2 dimensions of space, got 'linear', which is for 1"):
        pysal.captum.LayerAttribution.interpolate(images, (8, 8), "linear")
    for output in ({"logits": images[:, 0, 0]}, (images[:, 0, 0],), None):
        for name in ("Saliency", "IntegratedGradients", "FeatureAblation"):
            with pytest.raises(AssertionError, match="the output must be a tensor"):
                getattr(pysal.captum, name)(lambda _x: output).attribute(images, target=1)  # noqa: B023 (called at once)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_model_without_gradients_inside(off: Any) -> None:
    def function(x: Tensor) -> Tensor:
        with off():
            return x.square().sum((1, 2, 3))

    model, images = Through(lambda _model, x: function(x).relu()).eval(), drawn(2, 3, 4, 4)
    for name in ("Saliency", "IntegratedGradients", "GuidedBackprop"):
        with pytest.raises(RuntimeError, match=rf"^pysal\.captum\.{name}: model must be differentiable"):
            getattr(pysal.captum, name)(model).attribute(images)
    theirs, ours = (one.attribute(images, (3, 2, 2), (3, 2, 2)) for one in peers("Occlusion", model))
    assert difference(theirs, ours) < 1e-6


@pytest.mark.parametrize("target", [1, [2, 0, 1, 1], torch.tensor([0, 1, 2, 0])])
@pytest.mark.parametrize("name", ["Saliency", "GuidedBackprop", "Deconvolution"])
def test_gradients_of_inputs_of_different_numbers_of_rows(name: str, target: Any) -> None:
    """A gradient knows no examples, so what is shared by all rows has one as well."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Through(
            lambda m, one, other, third: m.relu(m.a(one)) * other.exp() + third.sum(), a=nn.Linear(5, 3), relu=nn.ReLU()
        )
    inputs = (drawn(4, 5), drawn(1, 3, seed=1), drawn(2, 3, 2, seed=2).transpose(1, 2))
    theirs, ours = (one.attribute(inputs, target) for one in peers(name, model.double().eval()))
    assert difference(theirs, ours) < EXACT


@pytest.mark.parametrize("most", [None, 1, 3, 4, 7])
@pytest.mark.parametrize("name", ["a mean", "a mean of squares", "classes of all"])
def test_one_answer_for_all_rows_of_a_pass(name: str, most: int | None) -> None:
    """Which rows run together decides what such a function says, so passes are captum's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    functions: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {
        "a mean": (lambda x: net(x)[:, 1].mean().reshape(1), None),
        "a mean of squares": (lambda x: net(x).square().mean().reshape(1), None),
        "classes of all": (lambda x: net(x).mean(0, keepdim=True), 2),
    }
    forward, target = functions[name]
    theirs, ours = (
        one.attribute(drawn(3, 5), target=target, n_steps=5, internal_batch_size=most)
        for one in peers("IntegratedGradients", forward)
    )
    assert difference(theirs, ours) < 1e-6  # captum's weights are float32


@pytest.mark.parametrize("name", ["IntegratedGradients", "NoiseTunnel"])
def test_inputs_of_different_numbers_of_rows(name: str) -> None:
    """captum adds noise to each input's own rows, and multiplies rows of one with steps of the other."""
    method = getattr(pysal.captum, "Saliency" if name == "NoiseTunnel" else name)(lambda one, other: one.sum(1) * other.sum())
    method = pysal.captum.NoiseTunnel(method) if name == "NoiseTunnel" else method
    with pytest.raises(AssertionError, match=rf"^pysal\.captum\.{name}: inputs must have the same number of rows, got "):
        method.attribute((torch.rand(4, 5), torch.rand(1, 3)))


@pytest.mark.parametrize(
    ("function", "apart"),
    [
        (lambda x: x.pow(3).sum(1), True),
        (lambda x: (x.pow(3) + 1e-9 * x.mean(0)).sum(1), False),  # below half the digits of float64, far above its rounding
        (lambda x: (x / x.amax()).sum(1), False),
    ],
)
def test_rows_between_two_that_are_alike(function: Callable[[Tensor], Tensor], apart: bool) -> None:
    """The first and the last row tell nothing of each other where they are alike; those between them are not."""
    row, other = drawn(1, 5), drawn(1, 5, seed=1)
    inputs = torch.cat([row, other, row])
    found = _batches.independent(function, lambda rows, _copies: (inputs[rows],), 1, 3, (), torch.device("cpu"))
    assert found is apart


@pytest.mark.parametrize(("factor", "apart"), [(lambda _x: 1.0, True), (lambda x: x.mean(), False)])
def test_copies_of_a_batch_that_are_alike(factor: Callable[[Tensor], Any], apart: bool) -> None:
    """Where a table goes along with whole batches, two that are the same would not show that they act on each other."""
    inputs, table = drawn(3, 5), drawn(5, 2)
    function = lambda x, table: x @ table * factor(x)  # noqa: E731
    found = _batches.independent(function, lambda rows, _copies: (inputs[rows],), 1, 3, (table,), torch.device("cpu"))
    assert found is apart
