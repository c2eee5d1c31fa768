"""The layer Grad-CAM takes by default depends on the image and on the score that is asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pysal
from tests.methods.networks import images, seeded

INPUTS = images(2, 3, 32, 48)
CELLS = (4, 6)  # of patches of 8 x 8 pixels
WIDTH = 10


def found(model: Any, target: Any, inputs: Tensor = INPUTS, **options: Any) -> Any:
    return pysal.explain(model, inputs, target, methods=["grad_cam"], **options)["grad_cam"]


def layer_of(model: Any, target: Any, inputs: Tensor = INPUTS, **options: Any) -> str:
    return str(found(model, target, inputs, **options).details["layer"])


def step(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU(inplace=True))


class Block(nn.Module):
    """A block of a transformer, over tokens (N, L, K) or, with sequence_first, (L, N, K)."""

    def __init__(self, sequence_first: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=not sequence_first)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


class Layout(nn.Module):
    """A transformer whose row has `before` and `after` tokens beside its patches, which lie in `order`; their mean is read.

    With `late` the tokens are added after the first block.
    """

    def __init__(self, before: int = 0, after: int = 0, order: str = "rows", sequence_first: bool = False, late: bool = False):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.before, self.after = nn.Parameter(torch.randn(before, WIDTH)), nn.Parameter(torch.randn(after, WIDTH))
        cells = torch.arange(CELLS[0] * CELLS[1])
        orders = {"rows": cells, "columns": cells.view(CELLS).T.flatten(), "windows": cells.view(2, 2, 2, 3).transpose(1, 2)}
        self.order = orders[order].flatten().argsort()  # the token of each cell
        self.layout, self.sequence_first, self.late = order, sequence_first, late
        self.blocks = nn.ModuleList(Block(sequence_first) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4, bias=False)

    def tokens(self, inputs: Tensor) -> Tensor:
        """Return what the last block makes of the patches, (N, L, K) in the order of the cells."""
        maps = self.patches(inputs)
        if self.layout == "columns":
            maps = maps.transpose(2, 3)
        if self.layout == "windows":
            maps = maps.unflatten(3, (2, 3)).unflatten(2, (2, 2)).transpose(3, 4)
        row = maps.flatten(2).transpose(1, 2)
        if self.late:
            row = self.blocks[0](row)
        row = torch.cat([self.before.expand(len(row), -1, -1), row, self.after.expand(len(row), -1, -1)], 1)
        row = row.transpose(0, 1) if self.sequence_first else row
        for block in self.blocks[int(self.late) :]:
            row = block(row)
        row = row.transpose(0, 1) if self.sequence_first else row
        return row[:, len(self.before) : len(self.before) + len(self.order)]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.tokens(inputs).mean(1))


LAYOUTS: dict[str, dict[str, Any]] = {
    "patches alone": {},
    "a class token first": {"before": 1},
    "a class token last": {"after": 1},
    "registers on both sides": {"before": 5, "after": 7},
    "as many others as patches": {"before": 1, "after": 24},
    "column by column": {"order": "columns", "before": 1},
    "window by window": {"order": "windows"},
    "sequence first": {"sequence_first": True, "before": 1},
    "added after the first block": {"late": True, "before": 1, "after": 11},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_averaged_patches_it_is_the_exact_split(layout: str) -> None:
    """The score is a sum over the last block's patches: each cell's share of it is known, wherever its token lies."""
    model = seeded(lambda: Layout(**LAYOUTS[layout]))
    with torch.no_grad():
        tokens = model.tokens(INPUTS)[:, model.order]  # type: ignore[operator]
        share = (tokens @ model.head.weight[1]).unflatten(1, CELLS)[:, None] / tokens.shape[1]
    for sign in (1, -1):  # one of the two has a positive part

        def score(output: Tensor, sign: int = sign) -> Tensor:
            return sign * output[:, 1]

        result = found(model, score)
        assert result.details["layer"] == "blocks.1"
        torch.testing.assert_close(result.details["native"], (sign * share).clamp_min(0), rtol=1e-9, atol=1e-12)
        # what is reported can be asked for
        again = found(model, score, method_options={"grad_cam": {"layer": "blocks.1"}})
        assert torch.equal(again.map, result.map)


REARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "picked": lambda row: row[:, torch.arange(24).mul(7) % 24],
    "backwards": lambda row: row.flip(1),
    "rolled": lambda row: row.roll(5, 1),
    "in units": lambda row: row.unflatten(1, (2, 2, 2, 3)).transpose(2, 3).flatten(1, 4),
    "twice": lambda row: row.flip(1).roll(5, 1),
    "pooled to a smaller map": lambda row: row.unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2),
    "pooled by the largest": lambda row: row.unflatten(1, (2, 2, 3, 2)).amax((2, 4)).flatten(1, 2).flip(1),
}


@pytest.mark.parametrize("way", REARRANGED)
def test_tokens_rearranged_between_blocks_are_put_back(way: str) -> None:
    """Each cell's share of the score is known; where its token went is asked of the rearrangement itself."""
    rearrange = REARRANGED[way]

    class Rearranging(Layout):
        def tokens(self, inputs: Tensor) -> Tensor:
            row = self.blocks[0](self.patches(inputs).flatten(2).transpose(1, 2))
            return self.blocks[1](rearrange(row))

    model = seeded(Rearranging)
    numbers = rearrange(torch.arange(24.0).view(1, 24, 1)).flatten()
    rows, columns = CELLS if len(numbers) == 24 else (CELLS[0] // 2, CELLS[1] // 2)
    with torch.no_grad():
        tokens = model.tokens(INPUTS)[:, numbers.argsort()]  # type: ignore[operator]
        share = (tokens @ model.head.weight[1]).unflatten(1, (rows, columns))[:, None] / tokens.shape[1]
    for sign in (1, -1):

        def score(output: Tensor, sign: int = sign) -> Tensor:
            return sign * output[:, 1]

        result = found(model, score)
        assert result.details["layer"] == "blocks.1"
        torch.testing.assert_close(result.details["native"], (sign * share).clamp_min(0), rtol=1e-9, atol=1e-12)


class Tower(nn.Module):
    """Returns all tokens and the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, WIDTH, 8, 8), nn.Parameter(torch.randn(1, WIDTH))
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        row = self.patches(inputs).flatten(2).transpose(1, 2)
        row = self.norm(self.blocks(torch.cat([self.token.expand(len(row), -1, -1), row], 1)))
        return {"tokens": row, "embedding": row[:, 0]}


def test_it_is_the_last_whose_patches_move_a_callables_score() -> None:
    model = seeded(Tower)
    maps = [found(model, lambda output, s=sign: s * output["embedding"][:, 1]) for sign in (1, -1)]
    assert [one.details["layer"] for one in maps] == ["blocks.1.norm1"] * 2
    assert max(float(one.map.max()) for one in maps) > 0


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(step(3, 4, 2), nn.Conv2d(4, 5, 3), nn.ReLU())

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (self.shared(one).mean((2, 3)) * self.shared(other).mean((2, 3))).sum(1)


def test_a_run_on_another_image_is_no_layer_of_this_one() -> None:
    model, others = seeded(Siamese), images(2, 3, 32, 48).flip(3)

    def score(output: Tensor) -> Tensor:
        return output

    assert layer_of(model, score, extra_inputs=[pysal.PerImage(others)]) == "shared.2@0"
    for run in ("1", "-1"):
        with pytest.raises(ValueError) as error:
            pysal.grad_cam(model, INPUTS, score, layer=f"shared.2@{run}", extra_inputs=[pysal.PerImage(others)])
        assert str(error.value) == (
            f"pysal.grad_cam: layer 'shared.2@{run}' must run on the images that are explained (did you mean 'shared.2@0'?), "
            "got a run on other inputs alone"
        )


class TwoHeads(nn.Module):
    """Two branches of 3 and 4 classes, which are one table or two."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.body, self.first, self.second = step(3, 6), step(6, 3), step(6, 4)
        self.joined = joined

    def forward(self, inputs: Tensor) -> Any:
        features = self.body(inputs)
        scores = self.first(features).mean((2, 3)), self.second(features).mean((2, 3))
        return torch.cat(scores, 1) if self.joined else scores


@pytest.mark.parametrize("prepared", [False, True])
def test_it_is_a_layer_of_the_head_that_is_asked(prepared: bool) -> None:
    model: Any = seeded(lambda: TwoHeads(joined=True))
    model = pysal.prepare(model, INPUTS[:1], batch_size=1) if prepared else model
    for _ in range(2):  # also where it was found before
        assert layer_of(model, 1) == "first.1"
        assert layer_of(model, 4) == "second.1"
        assert layer_of(model, lambda output: output[:, 2]) == "first.1"
    apart = seeded(lambda: TwoHeads(joined=False))
    assert layer_of(apart, 1) == "first.1"
    assert layer_of(apart, lambda output: output[1][:, 1]) == "second.1"


def test_all_methods_of_a_model_with_an_unused_head() -> None:
    result = pysal.explain(seeded(lambda: TwoHeads(joined=False)), INPUTS, target=1, score="logit", method_options=FEW)
    assert "grad_cam" in result.results


FEW: dict[str, Any] = {
    "integrated_gradients": {"steps": 2},
    "blur_integrated_gradients": {"steps": 2},
    "smooth_grad": {"samples": 2},
    "leave_one_out": {"segments": pysal.Grid(2, 2)},
}


@pytest.mark.parametrize("prepared", [False, True])
def test_images_whose_scores_come_from_different_layers_are_refused(prepared: bool) -> None:
    model: Any = seeded(lambda: TwoHeads(joined=True))
    model = pysal.prepare(model, INPUTS[:1], batch_size=1) if prepared else model
    with pytest.raises(pysal.NotApplicable) as error:
        pysal.grad_cam(model, INPUTS, [1, 4])
    assert str(error.value) == (
        "pysal.grad_cam: the last layer that moves the score must be the same for all images, "
        "got 'second.1' of image 1 beside 'first.1'; explain them apart, or pass layer="
    )


class Segmenter(nn.Module):
    """Maps of scores: alone, softened, or the sum of two that were made beside one another."""

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.down, self.deep, self.up = step(3, 4), step(4, 8, 2), step(12, 6)
        self.out, self.beside, self.ending = nn.Conv2d(6, 3, 1), nn.Conv2d(4, 3, 1), ending

    def forward(self, inputs: Tensor) -> Tensor:
        fine = self.down(inputs)
        deep = F.interpolate(self.deep(fine), scale_factor=2, mode="bilinear")
        output = self.out(self.up(torch.cat([fine, deep], 1)))
        if self.ending == "sum":
            output = output + self.beside(fine)
        output = output.softmax(1) if self.ending == "softmax" else output
        return F.interpolate(output, scale_factor=2) if self.ending == "enlarged" else output


@pytest.mark.parametrize("ending", ["", "softmax", "enlarged", "sum"])
def test_a_prediction_does_not_explain_itself(ending: str) -> None:
    model = seeded(lambda: Segmenter(ending))
    assert layer_of(model, lambda output: output[:, 1, 4:9, 4:9].sum((1, 2))) == "up.1"


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = step(3, 6, 4), step(6, 6, 2)
        self.heads = nn.ModuleList([nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)])

    def forward(self, inputs: Tensor) -> Tensor:
        fine = self.fine(inputs)
        maps = self.heads[0](fine), self.heads[1](self.coarse(fine))
        return torch.cat([one.sigmoid().flatten(2).transpose(1, 2) for one in maps], 1)


def test_it_is_of_the_scale_that_the_box_comes_from() -> None:
    model = seeded(Detector)
    assert layer_of(model, lambda output: output[:, -1, 4]) == "coarse.1"
    assert layer_of(model, lambda output: output[:, 20, 4]) == "fine.1"


class Queries(nn.Module):
    """Learned queries, as many as patches, that read the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, WIDTH, 8, 8), nn.LayerNorm(WIDTH)
        self.queries = nn.Parameter(torch.randn(CELLS[0] * CELLS[1], WIDTH))
        self.read, self.itself = (nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))
        self.after, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.norm(self.patches(inputs).flatten(2).transpose(1, 2))
        rows = self.queries.expand(len(tokens), -1, -1)
        rows = self.after(rows + self.read(rows, tokens, tokens)[0])
        return self.head(rows + self.itself(rows, rows, rows)[0])


def test_queries_are_no_patches() -> None:
    model = seeded(Queries)

    def score(output: Tensor) -> Tensor:
        return output[:, 3, 1]

    assert layer_of(model, score) == "norm"
    with pytest.raises(ValueError) as error:
        pysal.grad_cam(model, INPUTS, score, layer="after")
    assert str(error.value) == (
        "pysal.grad_cam: layer 'after' must return tokens that are cells of the image, or be read with tokens='vit' or a "
        "callable, got shape (1, 24, 10) of one image"
    )


def test_a_score_that_nothing_changes_has_a_map_of_zeros() -> None:
    model = seeded(lambda: nn.Sequential(step(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    result = found(model, lambda output: output[:, 1] * 0)
    assert result.details["layer"] == "0.1"
    assert not bool(result.map.any())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_sentences_where_no_layer_counts() -> None:
    def mean(output: Tensor) -> Tensor:
        return output.mean((1, 2, 3))

    cases: list[tuple[nn.Module, Callable[[Tensor], Tensor], str]] = [
        (
            nn.Sequential(nn.Conv2d(3, 2, 3)),
            mean,
            "no layer's map that is not the model's own output moves the score; "
            "pass layer= and, where it returns tokens, tokens=",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(4608, 2)),
            lambda output: output[:, 0],
            "the model has no layer with a spatial map (N, C, h, w); pass layer= and tokens=",
        ),
        (
            torch.jit.script(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh())),
            mean,
            "model must have layers that Python runs, which can be captured, got TorchScript",
        ),
    ]
    for model, target, sentence in cases:
        model = model.double().eval()
        with pytest.raises(pysal.NotApplicable) as error:
            pysal.grad_cam(model, INPUTS, target)
        assert str(error.value) == f"pysal.grad_cam: {sentence}"


def test_looking_leaves_nothing_behind() -> None:
    model = seeded(Tower)
    pysal.grad_cam(model, INPUTS, lambda output: output["embedding"][:, 1])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter(mode: Callable[[], Any]) -> None:
    model = seeded(Tower)
    with mode():
        assert layer_of(model, lambda output: output["embedding"][:, 1]) == "blocks.1.norm1"
