"""What an output is taken for, which number of it each kind of score means, and that everything follows one decision."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysal
from pysal import metrics, plots, viz
from pysal.engine.request.score import OUTPUTS, SCORE_KINDS, Look, how, saturation, settled
from tests.methods.calls import CALLS, Watched, request
from tests.methods.networks import images, linear, seeded

INPUTS = images(3, 3, 8, 8)


class Headed(nn.Module):
    """A small ReLU network (spatial layer "body.2") under a head: what a user may make of the last numbers."""

    def __init__(self, head: Callable[[Tensor], Tensor], columns: int, scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.last = nn.Linear(4, columns)
        self.head, self.scale = head, scale

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.scale * self.last(self.body(batch).mean((2, 3))))


def headed(head: Callable[[Tensor], Tensor], columns: int = 5, scale: float = 12.0) -> nn.Module:
    return seeded(lambda: Headed(head, columns, scale))


def regression(table: Tensor) -> Tensor:
    return 58 + table


HEADS: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "class logits": (lambda table: table, 5, "logits"),
    "two logits": (lambda table: table, 2, "logits"),
    "softmax": (lambda table: table.softmax(1), 5, "probabilities"),
    "softmax of two": (lambda table: table.softmax(1), 2, "probabilities"),
    "softmax at a temperature": (lambda table: (table / 3).softmax(1), 5, "probabilities"),
    "softmax in float16": (lambda table: table.softmax(1).half().float(), 5, "probabilities"),
    "softmax in bfloat16": (lambda table: table.softmax(1).bfloat16().float(), 5, "probabilities"),
    "mean of two softmaxes": (lambda table: (table.softmax(1) + (2 * table).softmax(1)) / 2, 5, "probabilities"),
    "log_softmax": (lambda table: table.log_softmax(1), 5, "log_probabilities"),
    "sigmoid of each": (lambda table: table.sigmoid(), 5, "labels"),
    "hinge": (lambda table: (1 - table).clamp_min(0), 5, "logits"),
    "evidence": (lambda table: 1 + nn.functional.softplus(table), 5, "logits"),
    "several regressions": (lambda table: -3 + table, 4, "logits"),
    "regression": (regression, 1, "numbers"),
    "flat regression": (lambda table: regression(table)[:, 0], 1, "numbers"),
    "negative regression": (lambda table: -regression(table), 1, "numbers"),
    "binary logit": (lambda table: table, 1, "numbers"),
    "binary sigmoid": (lambda table: table.sigmoid(), 1, "numbers"),
    "rectified regression in [0, 1]": (lambda table: table.clamp(0, 1), 1, "numbers"),
}


def expected(head: str, kind: str, table: Tensor) -> Tensor:
    """The score of every column, out of a model's own output (B, K)."""
    output = HEADS[head][2]
    probability = table.softmax(1) if output in ("logits", "log_probabilities") else table
    return {
        "auto": probability,
        "probability": probability,
        "log_probability": probability.log(),
        "logit": table,
        "raw": table,
        "softmax": table.softmax(1),
        "log_softmax": table.log_softmax(1),
        "sigmoid": table.sigmoid(),
        "log_sigmoid": table.sigmoid().log(),
    }[kind]


def allowed(head: str, kind: str) -> bool:
    one = HEADS[head][1] == 1
    if one and kind in ("softmax", "log_softmax"):
        return False
    outside = ("regression", "flat regression", "negative regression", "binary logit")
    return not (kind in ("probability", "log_probability") and head in outside)


@pytest.mark.filterwarnings("ignore:.*already")
@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_the_score_of_every_output(head: str, kind: str) -> None:
    make, columns, output = HEADS[head]
    model = headed(make, columns)
    if not allowed(head, kind):
        with pytest.raises(ValueError, match=r"^pysal\.leave_one_out: score must be 'raw', or 'sigmoid' for a logit, where "):
            pysal.leave_one_out(model, INPUTS, 0, segments=pysal.Grid(2, 2), score=kind)
        return
    plan = request(model, INPUTS, [0] * 3, score=kind)
    scores, table = plan.clean_scores()
    answer = model(INPUTS).detach().reshape(3, -1).double()
    torch.testing.assert_close(table.double(), expected(head, kind, answer), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.double(), expected(head, kind, answer)[:, 0], rtol=1e-5, atol=1e-6)
    assert plan.output == output


@pytest.mark.filterwarnings("ignore:.*already")
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("head", ["class logits", "softmax", "log_softmax", "sigmoid of each", "regression", "binary sigmoid"])
def test_every_method_explains_that_score(head: str, prepared: bool) -> None:
    """A method with a kind of score is the same method with a callable that computes it."""
    make, columns, _ = HEADS[head]
    model = headed(make, columns)
    runner = pysal.prepare(model, INPUTS[:1]) if prepared else model
    for method, call in CALLS.items():
        options: dict[str, Any] = {"layer": "body.2"} if "cam" in method else {}
        for kind in ("auto", "log_probability", "sigmoid"):
            if not allowed(head, kind) or (head, kind) == ("regression", "sigmoid"):  # which is 1, and 0 its gradient
                continue
            found = call(runner, INPUTS, 0, score=kind, **options)
            by_hand = call(runner, INPUTS, lambda out, kind=kind: expected(head, kind, out)[:, 0], **options)
            torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-9)
            assert found.abs().max() > 0


@pytest.mark.parametrize("method", CALLS)
def test_a_call_decides_once_for_all_its_images(method: str) -> None:
    """The logits of the first images all lie in [0, 1], the last's do not: all of them are logits, however they are chunked."""

    def model(batch: Tensor) -> Tensor:
        brightness = batch.mean((1, 2, 3))
        return torch.stack([brightness, brightness.square()], 1) * torch.where(brightness > 0.9, 7.0, 1.0)[:, None]

    if "cam" in method or method == "guided_backprop":
        pytest.skip("of a module alone")
    inputs = torch.cat([images(3, 3, 8, 8) * 0.8, torch.full((1, 3, 8, 8), 0.95, dtype=torch.float64)])
    options = {"image_ids": torch.arange(4)} if method == "smooth_grad" else {}
    together = CALLS[method](model, inputs, 0, score="probability", **options)
    for size in (1, 2, 3):
        apart = CALLS[method](model, inputs, 0, score="probability", batch_size=size, **options)
        torch.testing.assert_close(apart, together, rtol=1e-9, atol=1e-12)
    said = CALLS[method](model, inputs, 0, score="softmax", **options)
    torch.testing.assert_close(together, said, rtol=1e-9, atol=1e-12)


def test_class_gradients_decide_once() -> None:
    def model(batch: Tensor) -> Tensor:
        brightness = batch.mean((1, 2, 3))
        return torch.stack([brightness, brightness.square()], 1) * torch.where(brightness > 0.9, 7.0, 1.0)[:, None]

    inputs = torch.cat([images(3, 3, 8, 8) * 0.8, torch.full((1, 3, 8, 8), 0.95, dtype=torch.float64)])
    said = pysal.class_gradients(model, inputs, [0, 1], score="softmax")
    for size in (1, 2, None):
        assert torch.equal(pysal.class_gradients(model, inputs, [0, 1], score="probability", batch_size=size), said)


def test_no_pass_more_than_the_method_needs() -> None:
    """Finding out what the output is takes no pass of its own where the clean images are run anyhow."""

    def passes(kind: Any, size: int | None) -> list[int]:
        rows: list[int] = []
        model = Watched(headed(lambda table: table.softmax(1)), lambda batch: rows.append(len(batch)))
        pysal.gradient(model, INPUTS, 0, score=kind, batch_size=size)
        return rows

    for size in (None, 1):
        assert passes("probability", size) == passes("logit", size)


def test_rows_that_say_nothing() -> None:
    """NaN tells nothing, and of an image whose logits are masked by infinity it is known that they are logits."""
    look = Look()
    look.add(torch.tensor([[torch.nan, 0.5], [0.25, 0.75]]))
    assert look.output == "probabilities"
    look.add(torch.tensor([[-torch.inf, 0.5]]))
    assert look.output == "logits"
    empty = Look()
    empty.add(torch.full((2, 3), torch.nan))
    assert empty.output == "logits"


@pytest.mark.parametrize(
    ("rows", "output"),
    [
        ([[0.25, 0.75]], "probabilities"),
        ([[0.25, 0.75], [0.25, 0.5]], "labels"),
        ([[0.25, 0.75], [0.25, 1.5]], "logits"),
        ([[1.0, 0.0]], "probabilities"),
        ([[1.0000001, 0.0]], "probabilities"),
        ([[0.0, 0.0]], "labels"),
        ([[-0.5, 1.5]], "logits"),
        ([[-0.6931472, -0.6931472]], "log_probabilities"),
        ([[0.0, -torch.inf]], "log_probabilities"),
        ([[-0.6931472, -0.8]], "logits"),
        ([[0.5]], "numbers"),
        ([[-7.0]], "numbers"),
    ],
)
def test_what_numbers_are_taken_for(rows: list[list[float]], output: str) -> None:
    look = Look()
    look.add(torch.tensor(rows))
    assert look.output == output
    apart = Look()
    for row in rows:
        apart.add(torch.tensor([row]))
    assert apart.output == output
    assert OUTPUTS[output]


def said_once(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.filename == __file__ for one in caught), "the line shown is the caller's"
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("method", [*CALLS, "class_gradients"])
def test_a_softmax_of_a_softmax_is_only_taken_where_it_is_asked_for_and_said(method: str) -> None:
    model = headed(lambda table: table.softmax(1))
    call: Callable[..., Any] = getattr(pysal, method) if method == "class_gradients" else CALLS[method]
    target = [0] if method == "class_gradients" else 0
    again = "takes its softmax again; score='probability' takes it as it is"
    assert said_once(lambda: call(model, INPUTS, target, score="softmax")) == [
        f"pysal.{method}: the model's output already sums to 1, and score='softmax' {again}"
    ]
    assert said_once(lambda: call(model, INPUTS, target)) == []
    assert said_once(lambda: call(model, INPUTS, target, score="probability")) == []
    labels = headed(lambda table: table.sigmoid())
    again = "takes its sigmoid again; score='probability' takes it as it is"
    assert said_once(lambda: call(labels, INPUTS, target, score="sigmoid")) == [
        f"pysal.{method}: the model's output already lies in [0, 1], and score='sigmoid' {again}"
    ]


def test_a_guess_from_few_numbers_is_said() -> None:
    def model(batch: Tensor) -> Tensor:
        return torch.stack([batch.mean((1, 2, 3)), batch.square().mean((1, 2, 3))], 1)

    taken = "lie in [0, 1] and are taken for probabilities of independent labels"
    other = "score='softmax' or 'sigmoid' takes them for logits, 'raw' for plain numbers"
    options = {"leave_one_out": {"segments": pysal.Grid(1, 2)}}
    call = lambda **more: pysal.explain(model, INPUTS, 0, methods=["gradient", "leave_one_out"], method_options=options, **more)  # noqa: E731
    assert said_once(call) == [f"pysal.leave_one_out: the model's 6 outputs {taken}; {other}"]
    assert said_once(lambda: call(score="probability")) == [f"pysal.explain: the model's 6 outputs {taken}; {other}"]
    for kind in ("softmax", "sigmoid", "raw", "logit"):
        assert said_once(lambda kind=kind: call(score=kind)) == []
    assert said_once(lambda: pysal.leave_one_out(model, images(9, 3, 8, 8), segments=pysal.Grid(1, 2))) == []


def test_refusals() -> None:
    one = headed(regression, 1)
    for method in (pysal.gradient, pysal.leave_one_out):
        where = f"pysal.{method.__name__}"
        answer = float(one(INPUTS).detach()[(one(INPUTS) - 0.5).abs().argmax()])
        with pytest.raises(ValueError) as caught:
            method(one, INPUTS, score="probability")
        no_probability = "where the model's one output per image is no probability"
        assert str(caught.value) == (
            f"{where}: score must be 'raw', or 'sigmoid' for a logit, {no_probability}, "
            f"got 'probability' of an output of {answer:.4g}"
        )
        with pytest.raises(ValueError) as caught:
            method(one, INPUTS, score="log_softmax")
        column = "where the model's output is one column"
        assert str(caught.value) == f"{where}: score must be 'raw', or 'sigmoid' for a logit, {column}, got 'log_softmax'"


def test_figures_follow_the_same_rule() -> None:
    """A faithful order of a regression's pixels makes it fall; a sigmoid of 58 would not move."""
    size = 8
    model = linear(3, size, size, 1)

    def aged(batch: Tensor) -> Tensor:
        return 58 + 20 * model(batch)

    inputs = images(2, 3, size, size)
    maps = model[1].weight.detach().unflatten(1, (3, size, size)) * inputs
    for figure in (metrics.deletion, metrics.insertion):
        curve = figure(aged, inputs, maps, substrate="zero", steps=4)
        assert torch.equal(curve.scores, figure(aged, inputs, maps, lambda out: out[:, 0], substrate="zero", steps=4).scores)
        assert curve.scores.min() > 1
    found = metrics.infidelity(aged, inputs, 20 * maps)
    torch.testing.assert_close(found, torch.zeros(2, dtype=torch.float64), atol=1e-18, rtol=0)


def explained(head: str, **more: Any) -> pysal.Explanation:
    make, columns, _ = HEADS[head]
    options = {"leave_one_out": {"segments": pysal.Grid(2, 2)}, "integrated_gradients": {"steps": 4}}
    methods = ["leave_one_out", "gradient", "integrated_gradients"]
    return pysal.explain(headed(make, columns), INPUTS, 0, methods=methods, method_options=options, **more)


@pytest.mark.parametrize(
    ("head", "kind", "words", "verdict", "units"),
    [
        ("class logits", None, "class logits", "class 0, {p}", ("probability", "logit")),
        ("class logits", "logit", "class logits", "class 0, {p}, logit {s}", ("logit", "logit")),
        ("class logits", "raw", "plain numbers", "output 0 = {s}", ("output", "output")),
        ("class logits", "sigmoid", "logits of independent labels", "label 0, {p}", ("probability", "probability")),
        ("class logits", "log_softmax", "class logits", "class 0, {p}, log probability {s}", ("log probability",) * 2),
        ("softmax", None, "class probabilities", "class 0, {p}", ("probability", "probability")),
        ("softmax", "log_probability", "class probabilities", "class 0, {p}, log probability {s}", ("log probability",) * 2),
        ("log_softmax", None, "class log-probabilities", "class 0, {p}", ("probability", "log probability")),
        ("log_softmax", "logit", "class log-probabilities", "class 0, {p}, log probability {s}", ("log probability",) * 2),
        ("sigmoid of each", None, "probabilities of independent labels", "label 0, {p}", ("probability", "probability")),
        ("regression", None, "plain numbers", "output 0 = {s}", ("output", "output")),
        ("negative regression", "logit", "plain numbers", "output 0 = {s}", ("output", "output")),
        ("binary logit", "sigmoid", "logits of independent labels", "label 0, {p}", ("probability", "probability")),
        ("binary sigmoid", None, "plain numbers", "output 0 = {s}", ("output", "output")),
        ("binary sigmoid", "probability", "probabilities of independent labels", "label 0, {p}", ("probability",) * 2),
    ],
)
def test_words_of_an_explanation(head: str, kind: Any, words: str, verdict: str, units: tuple[str, str]) -> None:
    found = explained(head, score=kind)
    assert found.table().splitlines()[0].endswith(f" s, output taken for {words}")
    shown = {"s": f"{float(found.scores[1]):.4g}"}
    if found.probabilities is not None:
        shown["p"] = viz.percent(float(found.probabilities[1]))
    assert f"image 1: {verdict.format(**shown)}" in found.table().splitlines()
    assert found.panel("leave_one_out").unit == f"drop of {units[0]}"
    assert found.panel("gradient").unit == f"|d {units[1]} / d value|"
    assert found.panel("integrated_gradients").unit == f"{units[1]} per pixel"
    assert found.panel("leave_one_out").percent == (units[0] == "probability")
    before = found.panel("leave_one_out", 1).score
    assert before is not None
    plan = request(headed(*HEADS[head][:2]), INPUTS, 0, score=kind or "auto")
    assert before == pytest.approx(float(plan.clean_scores()[0][1]))


def test_words_of_a_margin() -> None:
    model = headed(*HEADS["class logits"][:2])
    options = {"leave_one_out": {"segments": pysal.Grid(2, 2)}}
    for kind, unit in ((None, "probability"), ("logit", "logit"), ("log_softmax", "log probability")):
        found = pysal.explain(model, INPUTS, pysal.Margin(1, 2), methods="leave_one_out", method_options=options, score=kind)
        line = f"image 0: class 1 minus class 2, difference of {unit} {float(found.scores[0]):.4g}"
        assert line in found.table().splitlines()
        assert "where little changes it" not in found.table()


@pytest.mark.parametrize("head", ["class logits", "sigmoid of each", "regression"])
def test_an_explanation_is_written_with_what_the_output_was_taken_for(head: str, tmp_path: Any) -> None:
    found = explained(head)
    found.save(tmp_path, pictures=False)
    again = pysal.Explanation.load(tmp_path / "explanation.npz")
    assert again.output == found.output == HEADS[head][2]
    assert again.table() == found.table()


@pytest.mark.parametrize("kind", [None, "sigmoid", "raw", "logit"])
@pytest.mark.parametrize("head", ["two logits", "softmax", "sigmoid of each", "regression"])
@pytest.mark.filterwarnings("ignore:.*already")
def test_plots_that_run_the_model_again_explain_the_same_score(head: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, model = explained(head, score=kind), headed(*HEADS[head][:2])
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "curves", lambda sides, **words: drawn.update(sides=sides, **words))
    monkeypatch.setattr(plots, "convergence", lambda found, **words: drawn.update(found=found, **words))
    path = {"methods": ["integrated_gradients"], "model": model}
    found.plot(1, kind="deletion_insertion", options={"steps": 2}, **path)
    start = float(drawn["sides"][0].scores["integrated_gradients"][0])
    number = kind == "raw" or (head == "regression" and kind != "sigmoid")
    whole = found.scores if number else found.probabilities
    assert start == pytest.approx(float(whole[1]))
    assert drawn["percent"] != number
    found.plot(1, kind="convergence", options={"steps": (2, 4), "reference": 64}, **path)
    first = request(model, torch.zeros_like(INPUTS), 0, score=settled(kind or "logit", found.output))
    first.score.look.output = "logits"  # which of the two black images nobody has to find out
    assert drawn["unit"] in found.panel("integrated_gradients").unit
    method = request(model, INPUTS, 0, score=kind or "logit").clean_scores()[0]
    assert drawn["found"][0].change == pytest.approx(float(method[1] - first.clean_scores()[0][1]))


def test_a_saturated_probability_is_noted() -> None:
    near_one = headed(lambda table: table * 0 + torch.tensor([20.0, 0.0, 0.0, 0.0, 0.0]).to(table))
    options = {"leave_one_out": {"segments": pysal.Grid(1, 2)}}
    found = pysal.explain(near_one, INPUTS, 0, methods="leave_one_out", method_options=options)
    assert "probability near 1, where little changes it: score='logit' shows more" in found.table()
    found = pysal.explain(near_one, INPUTS, 1, methods="leave_one_out", method_options=options)
    assert "probability near 0, where little changes it: score='log_probability' shows more" in found.table()
    found = pysal.explain(near_one, INPUTS, 1, methods="leave_one_out", method_options=options, score="logit")
    assert "where little changes it" not in found.table()


@pytest.mark.parametrize(
    ("kind", "output", "score", "note"),
    [
        ("probability", "logits", 0.5, ""),
        ("raw", "numbers", 1.0, ""),
        ("logit", "numbers", 0.99999, ""),
        ("log_probability", "logits", -1e-6, ""),
        ("sigmoid", "label_logits", 1e-6, "probability near 0, where little changes it: score='log_sigmoid' shows more"),
        ("softmax", "logits", 1e-6, "probability near 0, where little changes it: score='log_softmax' shows more"),
        (
            "probability",
            "labels",
            0.99999,
            "probability near 1, where little changes it: the logits before the model's last layer show more",
        ),
    ],
)
def test_notes_on_saturation(kind: str, output: str, score: float, note: str) -> None:
    assert saturation(kind, output, score) == note


@pytest.mark.parametrize("kind", SCORE_KINDS)
@pytest.mark.parametrize("output", ["numbers", "probabilities", "labels", "logits", "log_probabilities"])
def test_a_settled_kind_needs_no_look(kind: Any, output: Any) -> None:
    """It does the same whatever the single image looks like; what is in [0, 1] looks so alone, too."""
    again = settled(kind, output)
    single = "probabilities" if output in ("probabilities", "labels") else "numbers" if output == "numbers" else None
    assert how(again, single or output) == how(kind, output)
    if output in ("logits", "log_probabilities") and kind not in ("logit", "raw"):
        assert how(again, "labels") == how(kind, output)
