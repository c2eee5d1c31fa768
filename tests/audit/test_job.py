"""An audit finds what `pysal.explain` finds, writes it as docs/auditing.md says, and is the same bits whoever computes it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

import pysal
from pysal import annotations, models
from pysal.audit import Job, data, report, resume, status, verify
from pysal.explain import explain
from pysal.methods.registry import EVERY, METHODS
from tests.audit import tiny
from tests.audit.conftest import PHOTOS, contents

ROOT = Path(__file__).resolve().parents[2]
# every method but with few steps, and superpixels, for which there is a column
ALL = {
    "methods": "all",
    "method_options": {
        "leave_one_out": {"segments": "slic:6"},
        "smooth_grad": {"samples": 3},
        "integrated_gradients": {"steps": 3},
        "blur_integrated_gradients": {"steps": 3},
    },
}


def rows_of(out: Path, method: str) -> pa.Table:
    return pq.read_table(out / "shards", filters=[("method", "=", method)]).sort_by("id")


ROWS = 4


def images_of(found: Job) -> torch.Tensor:
    model = tiny.classifier()
    root = Path(found.manifest["data"]["root"])
    return torch.cat([pysal.read_image(root / path, model) for path in found.images["path"].to_pylist()])


def explained(images: torch.Tensor, options: dict) -> pysal.Explanation:
    """What `explain` says of the same images, in the batches of the audit, on the same prepared model."""
    model = pysal.prepare(tiny.classifier(), images[:1], batch_size=ROWS)
    chosen = {name: dict(given) for name, given in options["method_options"].items()}
    chosen["leave_one_out"]["segments"] = pysal.Slic(6)
    chosen["smooth_grad"]["image_ids"] = list(range(len(images)))
    return explain(model, images, methods=options["methods"], method_options=chosen, seed=5)


def no_further(found: np.ndarray, oracle: torch.Tensor, bound: float | np.ndarray = 0.0) -> bool:
    """Whether numbers are those of an oracle up to a bound and the rounding of float32, which another batch changes."""
    expected = oracle.double().numpy()
    rounding = 64 * np.finfo(np.float32).eps * np.abs(expected).max()
    return bool((np.abs(found - expected) <= bound + rounding).all())


def test_the_error_of_approximate_leave_one_out_is_kept(job) -> None:
    options = {"segments": "grid:4x3", "approximate": 0.25}
    planned = job(methods="leave_one_out", method_options={"leave_one_out": options})
    assert planned.run(engine="inline").complete
    images = images_of(planned)
    model = pysal.prepare(tiny.classifier(), images[:1], batch_size=ROWS)
    given = {"leave_one_out": {**options, "segments": pysal.Grid(4, 3)}}
    expected = explain(model, images, methods="leave_one_out", method_options=given)["leave_one_out"].details
    errors, largest = expected["approximation_error"], min(float(drops.abs().max()) for drops in expected["drops"])
    assert errors.max() > 1e-3
    bound = 64 * np.finfo(np.float32).eps / largest  # probabilities are rounded, and the error is a share of the largest drop
    assert no_further(rows_of(planned.out, "leave_one_out")["error"].to_numpy(), errors, bound)


@pytest.mark.parametrize("mode", ["in", "both"])
def test_of_other_modes_of_leave_one_out_the_values_of_the_map_are_kept(job, mode) -> None:
    planned = job(methods="leave_one_out", method_options={"leave_one_out": {"segments": "grid:4x3", "mode": mode}})
    assert planned.run(engine="inline").complete
    given = {"leave_one_out": {"segments": pysal.Grid(4, 3), "mode": mode}}
    expected = explain(tiny.classifier(), images_of(planned), methods="leave_one_out", method_options=given)["leave_one_out"]
    kept = rows_of(planned.out, "leave_one_out")["drops"].to_pylist()
    oracle = torch.stack(expected.details["gains" if mode == "in" else "means"])
    assert no_further(np.array(kept), oracle, bound=4 * np.finfo(np.float32).eps)  # the rounding of probabilities


NAMED: dict[str, dict[str, Any]] = {
    "guided_integrated_gradients": {"steps": 3},
    "xrai": {"steps": 2, "segments": "grid:3x3"},
    "shapley": {"segments": "grid:2x2"},
}


def test_methods_that_run_where_they_are_named(job) -> None:
    planned = job(methods=list(NAMED), method_options=NAMED, maps="float16", seed=5)
    assert planned.run(engine="inline").complete
    options = {name: dict(own) for name, own in NAMED.items()}
    options["xrai"]["segments"], options["shapley"]["segments"] = pysal.Grid(3, 3), pysal.Grid(2, 2)
    images = images_of(planned)
    model = pysal.prepare(tiny.classifier(), images[:1], batch_size=ROWS)
    expected = explain(model, images, methods=list(NAMED), method_options=options, seed=5)
    for name in NAMED:
        rows, result = rows_of(planned.out, name), expected[name]
        stored = rows[f"map_{name}"].combine_chunks().to_numpy_ndarray()
        scale = rows["map_scale"].to_numpy()[:, None, None]
        wanted = result.map.sum(1) if result.reduction == "sum" else result.map[:, 0]
        assert no_further(stored * scale, wanted, scale * 2.0**-12), name
        if "steps" in result.details:
            assert no_further(rows["steps"].to_numpy(), result.details["steps"])


@pytest.mark.parametrize("maps", ["uint8", "float16"])
def test_rows_and_maps_are_those_of_explain(job, maps) -> None:
    planned = job(**ALL, maps=maps, seed=5)
    assert planned.run(engine="inline").complete
    expected = explained(images_of(planned), ALL)
    for name in METHODS:
        rows, result = rows_of(planned.out, name), expected[name]
        assert rows["id"].to_pylist() == list(range(PHOTOS))
        assert rows["target"].to_pylist() == rows["predicted"].to_pylist() == expected.target.tolist()
        assert no_further(rows["probability"].to_numpy(), expected.probabilities)
        for figure in ("residual", "steps"):
            if figure in result.details:
                assert no_further(rows[figure].to_numpy(), result.details[figure])
            else:
                assert rows[figure].null_count == PHOTOS
        if name == "leave_one_out":
            for drops, wanted in zip(rows["drops"].to_pylist(), result.details["drops"], strict=True):
                assert no_further(np.array(drops), wanted)
            segments = rows["segments"].combine_chunks().to_numpy_ndarray()
            assert (segments == result.details["labels"].numpy()).all()
            continue
        stored = rows[f"map_{name}"].combine_chunks().to_numpy_ndarray()
        scale = rows["map_scale"].to_numpy()[:, None, None]
        wanted = result.details["native"] if name == "grad_cam" else result.map
        wanted = {"sum": wanted.sum(1), "max_abs": wanted.abs().amax(1), "none": wanted[:, 0]}[result.reduction]
        # uint8: half a step; float16: values up to `scale`, eleven bits
        bound = scale / 2 if maps == "uint8" else scale * 2.0**-12
        assert no_further(stored * scale, wanted, bound), name
        assert stored.shape[1:] == tuple(planned.manifest["methods"][name]["map_shape"])
    assert planned.manifest["methods"]["grad_cam"]["map_shape"] == [10, 8]
    errors = expected["smooth_grad"].details["standard_error"].double().square().mean((1, 2, 3)).sqrt()
    assert no_further(rows_of(planned.out, "smooth_grad")["standard_error"].to_numpy(), errors)


def test_the_score_is_the_one_each_method_explains(job) -> None:
    planned = job()
    planned.run(engine="inline")
    images = images_of(planned)
    logits = tiny.classifier()(images).detach().double()
    top = logits.amax(1)
    assert no_further(rows_of(planned.out, "gradient")["score"].to_numpy(), top)
    assert no_further(rows_of(planned.out, "leave_one_out")["score"].to_numpy(), logits.softmax(1).amax(1))


@pytest.mark.parametrize(
    ("head", "score", "output", "likely"),
    [
        (nn.Identity(), None, "logits", lambda table: table.softmax(1)),
        (nn.Softmax(1), None, "probabilities", lambda table: table),
        (nn.Sigmoid(), None, "labels", lambda table: table),
        (nn.LogSoftmax(1), None, "log_probabilities", lambda table: table.exp()),
        (nn.Identity(), "sigmoid", "logits", lambda table: table.sigmoid()),
        (nn.Identity(), "raw", "logits", lambda table: table.softmax(1)),
    ],
)
def test_what_the_output_is_taken_for_is_decided_for_the_whole_job(job, head, score, output, likely) -> None:
    model = models.Classifier(
        nn.Sequential(tiny.network(), head), name="headed", class_names=tiny.CLASSES, input_size=tiny.SIZE
    ).eval()
    planned = job(model=model, methods=["leave_one_out"], method_options={}, metrics=["deletion"], score=score, shard_size=1)
    assert planned.manifest["model"]["output"] == output
    planned.run(engine="inline")
    rows = rows_of(planned.out, "leave_one_out")
    table = model(images_of(planned)).detach().double()
    top = likely(table).amax(1)
    assert no_further(rows["probability"].to_numpy(), top)
    assert no_further(rows["score"].to_numpy(), table.amax(1) if score == "raw" else top)
    assert rows["fault"].null_count == len(rows)
    assert resume(planned.out, model=model).manifest["model"]["output"] == output


def test_engines_workers_and_order_give_the_same_bytes(job) -> None:
    job(out="inline", **ALL).run(engine="inline")
    job(out="pool", **ALL).run(engine="pool", workers=3)
    backwards = job(out="backwards", **ALL)
    backwards._computed, forwards = lambda engine, todo, *rest: forwards(engine, todo[::-1], *rest), backwards._computed
    backwards.run(engine="inline")
    outs = [job(out=name, **ALL).out for name in ("inline", "pool", "backwards")]
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])
    assert [verify(out, images=True) for out in outs] == [[], [], []]


def test_noise_belongs_to_the_image_and_not_to_its_shard(job) -> None:
    options = {"methods": ["smooth_grad"], "method_options": {"smooth_grad": {"samples": 2}}, "together": 1, "maps": "float16"}
    few, many = job(out="few", shard_size=2, **options), job(out="many", shard_size=100, **options)
    for planned in (few, many):
        planned.run(engine="inline")
    assert rows_of(few.out, "smooth_grad").equals(rows_of(many.out, "smooth_grad"))


def test_a_label_is_explained_where_it_is_the_target(job) -> None:
    planned = job(target="label", labels="folder")
    planned.run(engine="inline")
    rows = rows_of(planned.out, "gradient")
    assert rows["target"].to_pylist() == rows["label"].to_pylist()
    assert set(rows["label"].to_pylist()) == {0, 1}
    assert planned.manifest["data"]["labelled"] == PHOTOS
    frogs = job(target="frog", out="frogs")
    assert frogs.manifest["target"] == 2


def test_a_margin_is_explained_in_every_shard(job) -> None:
    """The score is that of one class minus that of the other; the row's class is the first."""
    only = {"methods": ["gradient"], "method_options": {}}
    planned = job(target="margin:frog/0", metrics=["deletion"], **only)
    assert planned.manifest["target"] == "margin:2/0"
    planned.run(engine="inline")
    margins, first, second = (
        rows_of(planned.out, "gradient"),
        *(rows_of(_done(job(target=name, out=str(name), **only)), "gradient") for name in (2, 0)),
    )
    assert set(margins["target"].to_pylist()) == {2}
    scores = (np.asarray(one["score"]) for one in (margins, first, second))
    margin, one, other = scores
    np.testing.assert_allclose(margin, one - other, rtol=1e-5, atol=1e-6)
    assert verify(planned.out, images=True) == []
    for target, message in (
        ("margin:0/0", "be a margin of two different classes, got 'margin:0/0'"),
        ("margin:0/3", "be in \\[0, 3\\), got 3"),
        ("pixel:1", "be like pixel:ROW,COLUMN or pixel:ROW,COLUMN/CLASS, got 'pixel:1'"),
    ):
        with pytest.raises(ValueError, match=f"target must {message}$"):
            job(target=target, out="wrong")


def test_a_box_is_explained_where_it_is_found(job) -> None:
    """In workers too; an image without it is an error and says so, and nothing is said of classes."""
    given = {
        "model": "tests.audit.tiny:detector",
        "size": tiny.SIZE,
        "target": "box:0/2",
        "metrics": ["deletion"],
        "labels": "none",
        "methods": ["gradient", "leave_one_out"],
        "method_options": {"leave_one_out": {"segments": "grid:1x2"}},
    }
    planned = job(**given)
    planned.run(engine="pool", workers=1)
    photos = _images(planned, None)
    bright = {id: image for id, image in photos.items() if float(image[:, :, :, 5:].mean()) > 0.35}
    assert 0 < len(bright) < PHOTOS
    for method in planned.manifest["methods"]:
        rows = rows_of(planned.out, method)
        assert rows["id"].to_pylist() == sorted(bright)
        halves = torch.stack([bright[id][0, :, :, 5:].double().mean() for id in sorted(bright)])
        assert no_further(rows["score"].to_numpy(), halves)
        assert all(
            rows[name].null_count == len(rows) for name in ("predicted", "predicted_probability", "target", "probability")
        )
    drops = np.array(rows["drops"].to_pylist())
    assert np.array_equal(drops[:, 0], np.zeros(len(bright)))  # the left half says nothing of the right one
    assert no_further(drops[:, 1], halves)
    errors = pa.concat_tables([pq.read_table(path) for path in sorted((planned.out / "errors").iterdir())])
    assert sorted(errors["id"].to_pylist()) == sorted(set(photos) - set(bright))
    assert set(errors["reason"].to_pylist()) == {"the target is not found in it"}
    assert set(errors["detail"].to_pylist()) == {"target must be below the 0 detections in image 0 of class 2, got box 0"}
    assert verify(planned.out, images=True, recompute=1, allow_code=True) == []
    page = report(planned.out).read_text("utf-8")
    assert "box:0/2" in page
    assert "<h2>Classes</h2>" not in page  # there are none
    job(out="inline", **given).run(engine="inline")
    assert contents(planned.out) == contents(planned.out.parent / "inline")


@pytest.mark.parametrize(
    ("model", "target", "expected"),
    [
        ("segmenter", "pixel:3,4/1", lambda image, _: 2 * image[0, 1, 3, 4]),
        ("classifier", "label:tree frog", lambda image, scores: scores[2]),
        ("classifier", "contrast:1", lambda image, z: z[1] - (z[[0, 2]].softmax(0) * z[[0, 2]]).sum()),
        ("classifier", "norm", lambda image, scores: scores.norm()),
        ("classifier", "output:-1", lambda image, scores: scores[2]),
    ],
)
def test_what_the_command_line_can_spell_is_explained(job, model, target, expected) -> None:
    size = None if model == "classifier" else tiny.SIZE
    planned = job(model=f"tests.audit.tiny:{model}", size=size, target=target, methods=["gradient"], method_options={})
    planned.run(engine="inline")
    assert planned.manifest["target"] == target
    network = tiny.classifier()
    images = _images(planned, network if model == "classifier" else None)
    wanted = torch.stack([expected(image, network(image)[0].detach()) for image in images.values()])
    assert no_further(rows_of(planned.out, "gradient")["score"].to_numpy(), wanted, bound=64 * np.finfo(np.float32).eps)
    assert verify(planned.out) == []
    assert resume(planned.out, allow_code=True).manifest["target"] == target


def _images(planned: Any, model: Any) -> dict[int, torch.Tensor]:
    """Return the images (1, 3, H, W) of a job by id, as its model is given them."""
    found = planned._data
    items = [item for shard in range(found.shards) for item in found.items(shard, 3)]
    return {item.id: data.decode(data.read_bytes(found.root, item), model, tiny.SIZE, 3) for item in items}


def _done(planned: Any) -> Any:
    planned.run(engine="inline")
    return planned.out


def test_a_target_by_name_of_a_model_that_is_no_classifier(job) -> None:
    model = tiny.network()
    model.class_names = tiny.CLASSES
    assert job(model=model, size=tiny.SIZE, target="tree").manifest["target"] == 2
    model.class_names = [*tiny.CLASSES, "cow"]
    with pytest.raises(
        ValueError, match=r"target must be a class index where the model names 4 classes and answers 3, got a name$"
    ):
        job(model=model, size=tiny.SIZE, target="tree", out="four")
    with pytest.raises(ValueError, match=r"target must name a class \(did you mean tree frog \(2\)\?\), got 'tere'$"):
        job(target="tere", out="near")


@pytest.mark.parametrize("head", [nn.Identity(), nn.Sigmoid()])
def test_one_column_is_a_number_with_its_own_unit(job, head) -> None:
    """A regression, or a binary classifier: there is no class to predict, and nothing to be sure of."""
    network = nn.Sequential(*tiny.network()[:-1], nn.Linear(6, 1), head).eval()
    model = models.Classifier(network, name="years", class_names=["age"], input_size=tiny.SIZE).eval()
    planned = job(model=model, metrics=["deletion"], labels="none")
    planned.run(engine="inline")
    assert planned.manifest["model"]["output"] == "numbers"
    for method in ("gradient", "leave_one_out"):
        rows = rows_of(planned.out, method)
        assert no_further(rows["score"].to_numpy(), model(images_of(planned)).detach().double()[:, 0])
        assert all(
            rows[name].null_count == len(rows) for name in ("predicted", "predicted_probability", "probability", "fault")
        )
        assert set(rows["target"].to_pylist()) == {0}
        assert np.isfinite(rows["deletion"].to_numpy()).all()


@pytest.mark.parametrize("size", [None, (8, 9)])
def test_a_model_of_grey_images_is_given_grey_images(job, photos, size) -> None:
    """Also one that is no `Classifier`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    model = network if size else models.Classifier(network, name="grey", class_names=["a", "b"], input_size=tiny.SIZE).eval()
    planned = job(model=model, size=size)
    planned.run(engine="inline")
    assert planned.manifest["model"]["channels"] == 1
    names = sorted(planned.images["path"].to_pylist())
    own = None if size else model
    images = torch.cat([models.read_image(photos / path, own, size=size, channels=1) for path in names])
    rows = rows_of(planned.out, "gradient").sort_by("path")
    assert no_further(rows["score"].to_numpy(), model(images).detach().double().amax(1))


def test_an_object_is_a_model_too(job) -> None:
    model = tiny.classifier()
    planned = job(model=model, out="object")
    planned.run(engine="pool", workers=1)
    named = job(out="named")
    named.run(engine="inline")
    assert contents(planned.out) == contents(named.out)
    with pytest.raises(ValueError, match=r"^pysal.audit.resume: model must be given again for a job that was given an object"):
        resume(planned.out)
    assert resume(planned.out, model=model).run(engine="inline").complete


def test_a_model_without_a_size_is_given_one(job) -> None:
    planned = job(model="tests.audit.tiny:network", size=(8, 9), maps="float16")
    planned.run(engine="inline")
    assert rows_of(planned.out, "gradient")["map_gradient"].combine_chunks().to_numpy_ndarray().shape == (PHOTOS, 8, 9)
    with pytest.raises(ValueError, match=r"size must be given for a model that is no pysal.models.Classifier, got None"):
        job(model="tests.audit.tiny:network")


def test_what_models_load_loads_is_a_model_with_its_options(job) -> None:
    spec = f"{ROOT / 'tests/audit/tiny.py'}:network"
    options = {"size": list(tiny.SIZE), "normalize": "none", "allow_code": True, "class_names": tiny.CLASSES}
    planned, named = job(model=spec, model_options=options, labels="folder"), job(out="named", labels="folder")
    planned.run(engine="pool", workers=1)
    named.run(engine="inline")
    assert contents(planned.out) == contents(named.out)
    assert planned.manifest["model"]["options"] == {key: value for key, value in options.items() if key != "allow_code"}
    assert resume(planned.out, allow_code=True).run(engine="inline").complete
    with pytest.raises(PermissionError, match=r"allow_code"):
        job(model=spec)
    with pytest.raises(
        ValueError, match=r"^pysal.audit.Job: model_options must hold arguments out of weights, .*, got 'device'$"
    ):
        job(model=spec, model_options={"device": "cpu"})


def test_status_counts(job) -> None:
    planned = job()
    with pytest.raises(
        ValueError, match=r"^pysal.audit.status: out must be the folder of an audit, got .*no manifest.json in it"
    ):
        status(planned.out)
    stopping = iter(range(3))

    def stop(done: int, total: int) -> None:
        assert total == PHOTOS
        if next(stopping) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planned.run(engine="inline", progress=stop)
    found = status(planned.out)
    assert (found.shards, found.shards_done, found.images, found.explained, found.failed) == (4, 2, PHOTOS, 6, 0)
    assert not found.complete
    assert found.running == ""
    assert verify(planned.out) == ["shard 2 is missing", "shard 3 is missing"]
    assert planned.run(engine="inline").complete


# --- what others read


def test_others_read_it(job) -> None:
    planned = job(methods=["gradient", "grad_cam"], method_options={}, maps="float16", labels="folder")
    planned.run(engine="inline")
    shards = str(planned.out / "shards" / "*.parquet")
    ids = duckdb.sql(f"select id, method, map_scale * list_max(map_gradient) from '{shards}' order by method, id").fetchall()
    assert [(id, method) for id, method, _ in ids] == [(id, m) for m in ("grad_cam", "gradient") for id in range(PHOTOS)]
    frame = pd.read_parquet(planned.out / "shards")
    own = frame[frame.method == "gradient"].sort_values("id")
    largest = [scale * float(map.max()) for scale, map in zip(own.map_scale, own.map_gradient, strict=True)]
    assert largest == [value for _, method, value in ids if method == "gradient"]
    wrong = duckdb.sql(f"select label, avg((predicted <> label)::int) from '{shards}' where method = 'gradient' group by 1")
    assert dict(wrong.fetchall()) == own.assign(wrong=own.predicted != own.label).groupby("label").wrong.mean().to_dict()
    assert duckdb.sql(f"select count(*) from '{planned.out}/errors/*.parquet'").fetchall() == [(0,)]
    assert duckdb.sql(f"select sum(images) from '{planned.out}/timings/*.parquet' where stage = 'read'").fetchall() == [
        (PHOTOS,)
    ]


def test_the_page_lists_the_columns_and_the_keys(job) -> None:
    page = (ROOT / "docs" / "auditing.md").read_text()
    planned = job(**ALL)
    planned.run(engine="inline")
    for folder in ("shards", "errors", "timings"):
        for name in pq.read_schema(planned.out / folder / "00000.parquet").names:
            assert f"`{'map_<method>' if name.startswith('map_') and name != 'map_scale' else name}`" in page, name
    for name in pq.read_schema(planned.out / "plan.parquet").names:
        assert f"`{name}`" in page, name
    manifest = json.loads((planned.out / "manifest.json").read_text())
    for key in [*manifest, *manifest["model"], *manifest["data"], *manifest["created"], *manifest["methods"]["gradient"]]:
        assert f"`{key}`" in page, key


def test_the_queries_of_the_page_run(job) -> None:
    planned = job(methods=["gradient"], method_options={}, metrics=["deletion"], labels="folder", maps="float16")
    planned.run(engine="inline")
    page = (ROOT / "docs" / "auditing.md").read_text().replace("DIR/", f"{planned.out}/")
    queries = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    results = [duckdb.sql(query).fetchall() for query in queries[0].split(";") if query.strip()]
    deletion = rows_of(planned.out, "gradient")["deletion"].to_numpy()
    ((method, count, mean, median),) = results[0]
    assert (method, count, median) == ("gradient", PHOTOS, np.median(deletion))
    assert abs(mean - deletion.mean()) <= PHOTOS * np.finfo(np.float64).eps
    assert sorted(label for label, _ in results[1]) == [0, 1]
    assert results[2] == []
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.partition("### Reading it")[2], re.DOTALL):
        exec(block, names)
    assert names["maps"].shape == (PHOTOS, *tiny.SIZE)
    assert names["maps"].dtype == np.float64
    assert len(names["rows"]) == PHOTOS


def test_row_groups_are_methods(job) -> None:
    planned = job()
    planned.run(engine="inline")
    file = pq.ParquetFile(planned.out / "shards" / "00000.parquet")
    groups = [file.read_row_group(n)["method"].to_pylist() for n in range(file.num_row_groups)]
    assert groups == [["gradient"] * 3, ["leave_one_out"] * 3]


# --- what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"methods": []}, "methods must name at least one method, got none"),
        ({"methods": ["nonsense"]}, f"methods must be 'all' or names out of {', '.join(EVERY)}, got 'nonsense'"),
        ({"maps": "int4"}, "maps must be one of none, uint8, float16 (did you mean 'uint8'?), got 'int4'"),
        ({"target": -1}, "target must be 'predicted', 'label', a class index or a text of pysal.targets.parse, got -1"),
        ({"target": 3}, "target must be below the model's 3 classes, got 3"),
        ({"target": "label"}, "labels must be known where target is 'label', got none of 11 images has one"),
        ({"shard_size": 0}, "shard_size must be a whole number of at least 1, got 0"),
        ({"size": (3, 3)}, "size must be left out for a model that has one, (12, 10), got (3, 3)"),
        ({"model": 3}, "model must be a name, 'module:function' or an nn.Module, got int"),
        ({"model": "tests.audit.tiny:missing"}, "model must name a function of that module, got 'tests.audit.tiny:missing'"),
        ({"source": "/nowhere"}, "data must be there, got /nowhere (no such file or folder)"),
        (
            {"method_options": {"gradient": {"steps": 3}}},
            "method_options['gradient'] must hold options out of none, got 'steps'",
        ),
        (
            {"methods": ["smooth_grad"], "method_options": {"smooth_grad": {"seed": 3}}},
            "method_options['smooth_grad'] must leave seed and image_ids to the job, got 'seed'",
        ),
        (
            {"method_options": {"leave_one_out": {"segments": pysal.Slic(6, compactness=2.0)}}},
            "method_options['leave_one_out']['segments'] must be like grid:3x3, window:16/8 or slic:100, "
            "got Slic(n_segments=6, compactness=2.0, sigma=1.0)",
        ),
    ],
)  # fmt: skip
def test_errors(job, tmp_path, options, sentence) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        job(**options)
    assert str(caught.value) == f"pysal.audit.Job: {sentence}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"engine": "magic"}, "engine must be one of pool, inline, ray, got 'magic'"),
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
        ({"address": "auto"}, "address must be given with engine='ray' only, got 'auto'"),
    ],
)
def test_errors_of_run(job, options, sentence) -> None:
    planned = job()
    with pytest.raises(ValueError, match=r".") as caught:
        planned.run(**options)
    assert str(caught.value) == f"pysal.audit.Job: {sentence}"
    assert not planned.out.exists()


def test_what_a_method_refuses_is_refused_when_the_job_is_planned(job) -> None:
    with pytest.raises(ValueError, match=r"^pysal.leave_one_out: segments|^pysal.segments.Grid: rows and cols must be at most"):
        job(method_options={"leave_one_out": {"segments": "grid:99x99"}})


def test_without_pyarrow_the_extra_is_named(tmp_path) -> None:
    (tmp_path / "hide.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'pyarrow' else find(name, *rest)\n"
    )
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import hide, pysal.audit"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert found.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: pysal: import must find the packages of what is imported, got pysal.audit without the package "
        "pyarrow (run: pip install 'pysal-saliency[audit]')"
    )


def test_figures_are_those_of_metrics(job) -> None:
    planned = job(
        metrics=["deletion", "infidelity", "max_sensitivity"],
        methods=["gradient", "smooth_grad"],
        method_options={"smooth_grad": {"samples": 2}},
        seed=3,
        together=PHOTOS,
        shard_size=PHOTOS,
    )
    planned.run(engine="inline")
    images, ids = images_of(planned), list(range(PHOTOS))
    model = pysal.prepare(tiny.classifier(), images[:1], batch_size=ROWS)
    for name, options in (("gradient", {}), ("smooth_grad", {"samples": 2, "seed": 3, "image_ids": ids})):
        maps = explain(model, images, methods=[name], method_options={name: options}).maps[name]
        rows = rows_of(planned.out, name)
        for metric in planned.manifest["metrics"]:
            expected = pysal.metrics.per_image(
                metric, model, images, maps, seed=3, image_ids=ids, method=name, method_options=options
            )
            assert no_further(rows[metric].to_numpy(), expected), (name, metric)
    with pytest.raises(
        ValueError, match=r"^pysal.audit.Job: annotations must be given for pointing_game \(--annotations\), got None$"
    ):
        job(metrics=["pointing_game"])


def test_figures_of_masks(job, photos, tmp_path) -> None:
    masks = tmp_path / "masks"
    for n in range(1, PHOTOS):  # the first photo has none
        place = masks / ("cat" if n % 2 else "dog") / f"{n:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        inside = np.random.default_rng(n).integers(0, 2, (24, 20 + n), dtype=np.uint8)
        Image.fromarray(inside).save(place)
    Image.new("L", (5, 5), 1).save(masks / "dog/04.png")  # of another size
    planned = job(metrics=["mass_in_mask"], annotations=masks, methods=["gradient"], method_options={})
    planned.run(engine="inline")
    rows = rows_of(planned.out, "gradient")
    boxes, model = annotations.read(masks), tiny.classifier()
    expected = {}
    for n in range(PHOTOS):
        path = photos / ("cat" if n % 2 else "dog") / f"{n:02d}.png"
        if n != 4:
            image, mask = models.read_image(path, model), None if n == 0 else boxes.mask(path, model)
            share = (
                None if mask is None else pysal.metrics.mass_in_mask(pysal.gradient(model, image), mask, reduction="max_abs")
            )
            expected[f"{path.parent.name}/{path.name}"] = None if share is None else float(share)
    found = dict(zip(rows["path"].to_pylist(), rows["mass_in_mask"].to_pylist(), strict=True))
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] is None] == ["dog/00.png"]
    assert all(value is None or found[path] == pytest.approx(value, abs=1e-5) for path, value in expected.items())
    assert rows["fault"].null_count == len(rows), "an image that nobody has marked is no fault"
    tables = [pq.read_table(path) for path in (planned.out / "errors").iterdir()]
    [error] = pa.concat_tables(tables).to_pylist()
    assert "must have the size of dog/04.png, 24 x 24 (height x width), got 5 x 5" in error["detail"]
    again = resume(planned.out, model=None, allow_code=True)
    assert again.manifest["annotations"] == str(masks)
    with pytest.raises(ValueError, match=r"annotations was .*, is null"):
        job(metrics=[], methods=["gradient"], method_options={})
    Image.new("L", (24, 24), 1).save(masks / "dog/04.png")
    with pytest.raises(ValueError, match=r"where annotations_sha256 was '?[0-9a-f.]+'?, is '?[0-9a-f.]+'?$"):
        resume(planned.out, model=None, allow_code=True)
    Image.new("L", (5, 5), 1).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"annotations must be of the images, by name, got 'b' \.\.\. for "):
        job(metrics=["mass_in_mask"], annotations=tmp_path / "b.png", out="other")
    with pytest.raises(ValueError, match="annotations must lie outside of data, where they are taken for photos, got "):
        job(metrics=["mass_in_mask"], annotations=photos, out="third")


def test_a_model_whose_rows_depend_on_each_other_is_refused_before_any_work(job) -> None:
    with pytest.raises(ValueError, match=re.escape("model must answer for each row of a pass as if it were alone, got ")):
        job(model="tests.audit.tiny:coupled", methods=["gradient"], method_options={}).run(engine="inline")
