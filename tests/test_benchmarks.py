"""The tables say what the committed results say, and what is timed by hand is right."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import pysal
from benchmarks import bench_calls, bench_faces, bench_methods, bench_networks, by_hand, common, networks, tables
from benchmarks.bench_ops import CASES, Case
from pysal import _library

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def model() -> nn.Module:
    """A small network in float64, in which two right computations differ by rounding only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU6(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(900, 5)).double().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("path", ["README.md", "docs/speed.md", "docs/migrating.md", "docs/auditing.md"])
def test_the_tables_are_those_of_the_results(path: str) -> None:
    page = tables.pages()[ROOT / path]
    assert (ROOT / path).read_text() == page, f"{path} is out of date: python -m benchmarks.tables"


def row(candidate: str, median: float, agrees: bool = True) -> dict[str, object]:
    return {
        "method": "gradient", "network": "resnet50", "candidate": candidate, "setting": "", "samples": 3, "median_s": median,
        "times_as_long_as_ours_iqr": 0.0, "peak_mem_bytes": 2**20, "difference": 0.0, "agrees": agrees, "failed": None,
        "commit": "0123456", "date": "2026-01-01",
    }  # fmt: skip


def test_losses_and_wrong_maps_are_shown() -> None:
    about = {"processor": "P", "threads": 1, "torch": "2", "clock": "c"}
    rows = [row("pysal", 0.2), row("captum", 0.1), row("by hand", 0.5), row("PAIR", 0.4, agrees=False)]
    result = {"metadata": about | {"load_average": [0]}, "rows": rows, "claims": []}
    assert "| gradient | 200 ms | **0.50** | **0.50** | 2.0 ✗ | 2.5 | - |" in tables.readme_section([result])
    assert "wrong" in tables.docs_section([result])


def test_a_table_of_networks_has_a_family_in_a_line_and_each_network_in_another() -> None:
    def line(network: str, method: str, **seconds: float) -> dict[str, object]:
        about = {"commit": "0123456789", "date": "2026-01-02T00:00"}
        return {"network": network, "family": "CNNs", "method": method, "seconds": {"pysal": 0.5, **seconds}} | about

    rows = [line("one", "gradient", captum=1.0), line("other", "gradient", captum=0.4, unprepared=0.1)]
    rows.append(line("one", "forward", torch=2.0, onnxruntime=0.45))
    about = {"processor": "P", "torch": "2", "threads": 1, "date": "2026-01-02T00:00"}
    result = {"metadata": about, "rows": rows}
    assert "| CNNs: one, other | **0.80 to 2.0** | - | - | - | - | 4.0, **0.90** |" in tables.networks_section(result)
    page = tables.every_network_section(result)
    assert "| one | 2.0 (500 ms) | - | - | - | - | 4.0, **0.90** (500 ms) | 2026-01-02, 0123456 |" in page
    assert "| other | **0.80** (500 ms) | - | - | - | - | - | 2026-01-02, 0123456 |" in page


def test_what_is_left_to_measure_of_a_network() -> None:
    there = [
        {"network": "vgg16", "method": "gradient", "commit": "new"},
        {"network": "vgg16", "method": "forward", "commit": "old"},
    ]
    assert bench_networks.left("vgg16", ["forward", "gradient", "grad_cam"], there, "new") == ["forward", "grad_cam"]
    assert bench_networks.left("deit_tiny", ["gradient", "grad_cam"], there, "new") == ["gradient"]  # it has no last map


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_gives_its_op_every_argument(case: Case) -> None:
    schema = torch._C.parse_schema(f"pysal::{case.op}{_library.SCHEMAS[case.op]}")
    assert len(case.build(torch.device("cpu"))) == len(schema.arguments)


def test_what_an_audit_takes_is_worked_out_from_its_rates() -> None:
    about = {"processor": "P", "torch": "2", "date": "2026-01-01", "load_average": [0]}
    rates = {"bare 1": 10.0, "pool 1": 9.0, "bare 2": 19.0, "pool 2": 18.0, "ray 2": 17.0}
    stages = {"read": 0.0023, "encode": 0.0004, "model": 0.1}
    case = {"commit": "0123456", "workers": 2, "method": "gradient", "images_per_second": rates, "bytes_per_image": 2**20}
    case["seconds_of_a_processor_per_image"] = stages
    page = tables.audit_section([{"metadata": about, "methods": [case]}])
    assert "| `gradient` | 10.00 | 9.00 | 19.00 | 18.00 | 90 % | 95 % | 100 % | 2.7 ms | 17.00 |" in page
    # 50,000 / 18 per second, by 32 on 64 cores; 1,000,000 is 20 times as many
    assert "| `gradient` | 46 min | 87 s | 15.4 h | 29 min | 977 GiB |" in page


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-9 * expected.abs().max())


def test_by_hand_is_the_method(model: nn.Module, image: torch.Tensor) -> None:
    layer = model[2]
    labels = torch.arange(32)[:, None] // 8 * 4 + torch.arange(32) // 8
    occluded = pysal.leave_one_out(model, image, 3, segments=pysal.Window(8), score="logit")
    assert close(by_hand.occlusion(model, image, 3, 8), occluded)
    assert close(by_hand.ablation(model, image, 3, labels), occluded)
    assert close(by_hand.gradient(model, image, 3), pysal.gradient(model, image, 3))
    assert close(by_hand.guided_backprop(model, image, 3), pysal.guided_backprop(model, image, 3))
    assert close(by_hand.grad_cam(model, image, 3, layer), pysal.grad_cam(model, image, 3, layer=layer))
    assert close(by_hand.guided_grad_cam(model, image, 3, layer), pysal.guided_grad_cam(model, image, 3, layer=layer))
    whole = pysal.integrated_gradients(model, image, 3, steps=12, quadrature="gauss_legendre", placement="uniform")
    assert close(by_hand.integrated_gradients(model, image, 3, 12), whole)
    each = torch.cat([pysal.gradient(model, image, target) for target in range(5)])
    assert close(by_hand.gradients_of_classes(model, image, range(5)), each)


def test_blur_by_hand_is_the_method_but_for_its_difference_quotient(model: nn.Module, image: torch.Tensor) -> None:
    found = by_hand.blur_integrated_gradients(model, image, 3, 6, 5.0)
    expected = pysal.blur_integrated_gradients(model, image, 3, steps=6, max_sigma=5.0, quadrature="left", placement="uniform")
    assert bool((found - expected).abs().max() <= 1e-9 * expected.abs().max())


class Pedantic:
    """What is used of pytest-benchmark's fixture."""

    def pedantic(self, call: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            call()


@pytest.mark.parametrize(
    ("first", "order", "counts"),
    [
        (0.1, "bcabca", {"a": 2, "b": 2, "c": 2}),  # short: the first runs are the warm-up
        (100.0, "ba", {"a": 2, "b": 2, "c": 1}),  # long: they count, and "c" is not run again
    ],
)
def test_candidates_are_timed_in_turn(first: float, order: str, counts: dict[str, int]) -> None:
    ran: list[str] = []
    runs = {name: partial(ran.append, name) for name in "abc"}
    samples = common.alternate_methods(Pedantic(), runs, dict.fromkeys("abc", first), ["a", "b"], 2)
    assert "".join(ran) == order
    assert {name: len(seconds) for name, seconds in samples.items()} == counts


def test_the_peak_is_seen_although_the_memory_is_given_back() -> None:
    found, seconds, peak = common.first_run(lambda: torch.ones(2**24).sum())  # 64 MiB
    assert found == 2**24
    assert seconds > 0
    assert 60 * 2**20 < peak < 200 * 2**20


def test_resnet50_is_the_published_one() -> None:
    with torch.device("meta"):
        model = networks.ResNet50()
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    names = dict(model.named_parameters())
    assert names["layer3.0.downsample.0.weight"].shape == (1024, 512, 1, 1)
    assert model.layer2[0].conv2.stride == (2, 2)
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)


@pytest.fixture(scope="module")
def small_subject() -> Iterator[bench_methods.Subject]:
    """A network and an image that every face takes a moment for."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).eval()
        network[-1].weight.data.abs_()  # all channels speak for the class, so that no map is empty
        patch.setitem(bench_methods.NETWORKS, "resnet50", lambda: network)
        patch.setitem(bench_methods.LAYERS, "resnet50", "3")
        patch.setattr(bench_methods, "photo", lambda name: torch.rand(1, 3, 32, 32))
        yield bench_methods.Subject("resnet50")


@pytest.mark.parametrize("name", bench_faces.FACES)
@pytest.mark.filterwarnings("ignore")  # the peers'
def test_every_face_gives_the_map_it_is_timed_for(name: str, small_subject: bench_methods.Subject) -> None:
    comparison = bench_faces.comparison(name, small_subject)
    assert comparison.reference is not None
    expected = comparison.reference()
    for candidate in comparison.candidates:
        if name in bench_faces.APART and not candidate.name.startswith(bench_methods.OURS):
            continue
        found = candidate.run()
        assert found.shape == expected.shape
        assert (comparison.distance or bench_methods.relative)(found, expected) <= comparison.bound


@pytest.mark.parametrize("call", bench_calls.CALLS)
@pytest.mark.filterwarnings("ignore")  # captum's
def test_calls_on_small_inputs_answer_as_captum_does(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = next(one for one in ("LeNet, 1 digit", *bench_calls.NETWORKS) if bench_calls.fits(call, one))
    for name in ("ROUNDS", "MOST_ROUNDS"):
        monkeypatch.setattr(bench_calls, name, 1)
    row = bench_calls.measured(network, call)
    # of a path of 50 steps or 10 samples, each of which has a hundred roundings at most
    assert row.difference <= 100 * torch.finfo(torch.float32).eps
    assert row.captum_over_pysal > 0


def test_ops_on_a_gpu_are_timed_as_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "SAMPLING_SECONDS", 1e-3)
    monkeypatch.setattr(common, "WARM_UP_SECONDS", 1e-4)
    inside: list[str] = []

    class Graph:
        def replay(self) -> None:
            inside.append("replay")

    @contextlib.contextmanager
    def graph(_: Graph) -> Iterator[None]:
        inside.append("record")
        yield

    def waiting(_: int) -> None:
        if inside and inside[-1] == "record":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    candidates = {"reference": waiting, "pysal": lambda _: None}
    samples, _, replayed = common.alternate(Pedantic(), candidates, [(1,), (2,)], torch.device("cuda"))
    assert replayed == {"pysal"}
    assert inside.count("record") == 2
    assert inside.count("replay") == 1 + len(samples["pysal"])
    rows = common.as_rows(
        samples, {}, 1, 1.0, {}, replayed, op="op", case="", dtype="", device="cuda", bytes_moved=1
    )  # fmt: skip
    assert {row.backend: row.replayed for row in rows} == {"reference": False, "pysal": True}
    assert common.alternate(Pedantic(), candidates, [(1,)], torch.device("cpu"))[2] == set()
