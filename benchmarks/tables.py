"""Writes the tables of README.md and of pages in docs from the results: `python -m benchmarks.tables`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- speed: written by benchmarks/tables.py -->", "<!-- /speed -->"
NETWORKS = {"efficientnet_lite0": "EfficientNet-Lite0", "resnet50": "ResNet-50", "vit_small": "ViT-S"}
METHODS = {
    "leave_one_out_windows": "leave-one-out, 196 windows of 16",
    "leave_one_out_segments": "leave-one-out, about 100 superpixels",
    "integrated_gradients": "Integrated Gradients, 50 steps",
    "smooth_grad": "SmoothGrad, 50 samples",
    "blur_integrated_gradients": "Blur IG, 100 steps to sigma 50",
    "gradient": "gradient",
    "guided_backprop": "guided backprop",
    "grad_cam": "Grad-CAM",
    "guided_grad_cam": "Guided Grad-CAM",
    "four_methods": "the last four in one `explain`",
    "gradients_of_100_classes": "gradients of 100 classes",
}
# README's columns: heading -> the candidates that may stand there, the first that is in the results
COLUMNS = {
    "captum": ("captum", "captum, default", "captum, default and best"),
    "captum, best setting": ("captum, best", "captum, default and best", "captum"),
    "PAIR, best setting": ("PAIR, best", "PAIR"),
    "PyTorch by hand": ("by hand",),
    "pysal, unprepared": ("pysal, unprepared",),
}
OURS = "pysal"
BEGIN_NETWORKS, END_NETWORKS = "<!-- networks: written by benchmarks/tables.py -->", "<!-- /networks -->"
NETWORK_METHODS = {
    "gradient": "gradient",
    "integrated_gradients": "Integrated Gradients, 50 steps",
    "grad_cam": "Grad-CAM",
    "leave_one_out_windows": "leave-one-out, 49 windows",
    "leave_one_out_segments": "100 superpixels",
    "forward": "forward pass: torch, ONNX Runtime",
}
AUDIT = ("methods", "metrics", "growth")
DATASETS = (50_000, 1_000_000)
Row = Mapping[str, Any]


def latest() -> list[dict[str, Any]]:
    """The results of the newest version that has some for methods, one per network, in NETWORKS' order."""
    folders = {path.parent for path in RESULTS.glob("*/methods-*--*.json")}
    if not folders:
        return []
    newest = max(folders, key=lambda folder: [int(part) for part in folder.name.split(".")])
    found = [json.loads(path.read_text()) for path in newest.glob("methods-*--*.json")]
    return sorted(found, key=lambda result: list(NETWORKS).index(result["rows"][0]["network"]))


def latest_on_gpu() -> list[dict[str, Any]]:
    """The results on GPUs of the newest version that has some, one per device and network."""
    found = [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/gpu-*--*.json"))]
    found = [(path, result) for path, result in found if result["metadata"]["cuda"] is not None]  # not one of trying it out
    newest = max(
        (path.parent for path, _ in found), key=lambda folder: [int(part) for part in folder.name.split(".")], default=None
    )
    results = [result for path, result in found if path.parent == newest]
    order = list(NETWORKS)
    return sorted(results, key=lambda one: (one["metadata"]["cuda"]["name"], order.index(one["rows"][0]["network"])))


def by_candidate(result: Mapping[str, Any], method: str) -> dict[str, Row]:
    """The rows of one method: candidate -> row."""
    return {row["candidate"]: row for row in result["rows"] if row["method"] == method}


def times(row: Row | None, ours: Row) -> str:
    """How many times as long as ours, by the medians; bold where it is less; ✗ where the map is wrong."""
    if row is None or row["median_s"] is None:
        return "-"
    ratio = row["median_s"] / ours["median_s"]
    text = f"{ratio:.1f}" if ratio >= 1.995 else f"{ratio:.2f}"
    return (f"**{text}**" if ratio < 1 else text) + ("" if row["agrees"] else " ✗")


def seconds(value: float) -> str:
    if value < 0.01:
        return f"{1000 * value:.2g} ms"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(line) + " |" for line in body)]


def where_and_when(result: Mapping[str, Any], *, threads: bool = True) -> str:
    about = result["metadata"]
    number = "" if not threads else "1 thread, " if about["threads"] == 1 else f"{about['threads']} threads, "
    commits = list(dict.fromkeys(row["commit"][:7] for row in result["rows"]))
    dates = sorted({row["date"][:10] for row in result["rows"]})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    plural = "commit" if len(commits) == 1 else "commits"
    return f"{about['processor']}, {number}torch {about['torch']}, {when}, {plural} {', '.join(commits)}"


def readme_section(results: Sequence[Mapping[str, Any]], on_gpu: Sequence[Mapping[str, Any]] = ()) -> str:
    """README's tables: our time, and the others' times divided by it; on a GPU in every arithmetic."""
    lines = [BEGIN, ""]
    for result in results:
        lines += [
            f"**{NETWORKS[result['rows'][0]['network']]}**, one image of 224 x 224, float32 ({where_and_when(result)}):",
            "",
        ]
        body = []
        for method, title in METHODS.items():
            rows = by_candidate(result, method)
            if OURS not in rows:
                continue
            cells = [next((rows[name] for name in names if name in rows), None) for names in COLUMNS.values()]
            ours = rows[OURS]
            body.append([title, seconds(ours["median_s"]), *(times(row, ours) for row in cells)])
        lines += [*table(["method", "pysal, prepared", *COLUMNS], body), ""]
    for result in on_gpu:
        about, most = result["metadata"], max(row["images"] for row in result["rows"])
        own = [row for row in result["rows"] if row["images"] == most]
        batch = "one image" if most == 1 else f"{most} images"
        lines += [f"**{NETWORKS[own[0]['network']]}**, {batch}, {about['cuda']['name']} (torch {about['torch']}):", ""]
        methods = [method for method in METHODS if any(row["method"] == method for row in own)]
        head = ["method", "arithmetic", "pysal, prepared", *COLUMNS]
        lines += [*table(head, [line for method in methods for line in gpu_ratios(method, own)]), ""]
    if not results:
        lines += ["Nothing has been measured for this version.", ""]
    else:
        lines += [
            "The first column is a time. The others are ratios, that tool's time divided by the first column's: 9.5 means 9.5",
            "times as long as pysal prepared. **Bold**: that tool is faster. ✗: its result is not this method's map. -: it has",
            "no such method. Medians of alternating runs; settings, spreads and memory: [Speed](docs/speed.md).",
            "",
        ]
    return "\n".join([*lines, END])


def latest_networks() -> dict[str, Any] | None:
    """The newest version's results on families of networks."""
    paths = sorted(RESULTS.glob("*/networks-*.json"), key=lambda path: [int(part) for part in path.parent.name.split(".")])
    return json.loads(paths[-1].read_text()) if paths else None


def networks_section(result: Mapping[str, Any] | None) -> str:
    """README's table of families: the peers' best time divided by ours, from the least to the most of a family's networks."""
    if result is None:
        return "\n".join([BEGIN_NETWORKS, "", "Nothing has been measured for this version.", "", END_NETWORKS])
    about, families = result["metadata"], list(dict.fromkeys(row["family"] for row in result["rows"]))
    body = []
    for family in families:
        rows = [row for row in result["rows"] if row["family"] == family]
        cells = [f"{family}: {', '.join(dict.fromkeys(row['network'] for row in rows))}"]
        for method in NETWORK_METHODS:
            own = [row["seconds"] for row in rows if row["method"] == method]
            names = ("torch", "onnxruntime") if method == "forward" else (None,)
            cells.append(", ".join(ratios([against(seconds, name) for seconds in own]) for name in names))
        body.append(cells)
    where = f"{about['processor']}, {about['threads']} thread, torch {about['torch']}, {about['date'][:10]}"
    return "\n".join(
        [
            BEGIN_NETWORKS,
            "",
            f"**Families of networks**, prepared, 224 x 224, float32, random weights but for MobileNetV2 ({where}):",
            "",
            *table(["family", *NETWORK_METHODS.values()], body),
            "",
            "Each number is the time of the fastest other tool (captum at its best setting, for Grad-CAM pytorch-grad-cam too)",
            "divided by pysal's on the prepared model. The last column has two numbers for a forward pass of four images:",
            "torch's and ONNX Runtime's, through which pysal makes these passes where it is faster. **Bold**: the other",
            "tool is faster.",
            "",
            "CPU time, the least of a few alternating runs on a machine that other programs kept busy",
            "(`python -m benchmarks.bench_networks`); each row of the results has its date and what it was measured with.",
            "",
            END_NETWORKS,
        ]
    )


def every_network_section(result: Mapping[str, Any] | None) -> str:
    """docs/speed.md's table of networks: a line for each, what `networks_section` has of its family."""
    if result is None:
        return "\n".join([BEGIN_NETWORKS, "", "Nothing has been measured for this version.", "", END_NETWORKS])
    body = []
    for network in dict.fromkeys(row["network"] for row in result["rows"]):
        rows = {row["method"]: row for row in result["rows"] if row["network"] == network}
        cells = [network]
        for method in NETWORK_METHODS:
            if method not in rows:
                cells.append("-")
                continue
            own = rows[method]["seconds"]
            names = ("torch", "onnxruntime") if method == "forward" else (None,)
            cells.append(f"{', '.join(ratios([against(own, name)]) for name in names)} ({seconds(own[OURS])})")
        dates = sorted({row["date"][:10] for row in rows.values()})
        commits = dict.fromkeys(row["commit"][:7] for row in rows.values())
        body.append([*cells, f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {', '.join(commits)}"])
    about = result["metadata"]
    where = f"{about['processor']}, {about['threads']} thread, torch {about['torch']}"
    head = ["network", *NETWORK_METHODS.values(), "date, commits"]
    lines = [BEGIN_NETWORKS, "", "## Every network", ""]
    lines += [f"What README.md's table of families is made of ({where}): ratios, and in brackets pysal's time.", ""]
    return "\n".join([*lines, *table(head, body), "", END_NETWORKS])


def against(seconds: Mapping[str, float], name: str | None) -> float | None:
    """A tool's time divided by ours; of several, the fastest that is not ours."""
    if name is not None:
        return seconds[name] / seconds[OURS] if name in seconds else None
    return min(value for tool, value in seconds.items() if tool not in (OURS, "pysal alone", "unprepared")) / seconds[OURS]


def ratios(found: Sequence[float | None]) -> str:
    """The least and the most of some ratios; bold where one is less than 1."""
    known = sorted(one for one in found if one is not None)
    if not known:
        return "-"
    text = " to ".join(dict.fromkeys(f"{one:.1f}" if one >= 0.995 else f"{one:.2f}" for one in (known[0], known[-1])))
    return f"**{text}**" if known[0] < 0.995 else text


def docs_section(results: Sequence[Mapping[str, Any]], on_gpu: Sequence[Mapping[str, Any]] = ()) -> str:
    """docs/speed.md's tables: every candidate with its setting, spread, memory and difference; and the claims; and on a GPU."""
    lines = [BEGIN, ""]
    for result in results:
        about = result["metadata"]
        lines += [f"## {NETWORKS[result['rows'][0]['network']]}", ""]
        lines += [f"{where_and_when(result)}; clock `{about['clock']}`, load average {about['load_average'][0]}.", ""]
        for method, title in METHODS.items():
            rows = by_candidate(result, method)
            if OURS not in rows:
                continue
            lines += [f"### {title[0].upper()}{title[1:]}", ""]
            head = ["candidate", "setting", "runs", "median", "time / pysal prepared (IQR)", "peak memory", "difference"]
            lines += [*table(head, [docs_line(row, rows[OURS]) for row in rows.values()]), ""]
        lines += ["### Claims", ""]
        claims = [
            [one["claim"], f"{one['value']:.2f}", "" if one["at_most"] is None else f"{one['at_most']:g}"]
            for one in result["claims"]
        ]
        lines += [*table(["figure", "measured", "aim, at most"], claims), ""]
    if not results:
        lines += ["Nothing has been measured for this version.", ""]
    return "\n".join([*lines, *gpu_lines(on_gpu), END])


def gpu_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tables of GPUs: for each batch of a network the ratios, then every candidate in every arithmetic."""
    lines = ["## On a GPU", ""]
    if not results:
        return [*lines, "Nothing has been measured on a GPU yet; `make gpu` on a machine that has one writes this section.", ""]
    lines += [
        "Wall clock between two points where the device has finished all its work; medians of alternating rounds, of the whole",
        "batch. **error**: relative l2 distance of our map, or of a peer's without noise of its own, from ours in float64, of",
        "the first and the last image; **outside**: share of the time outside forward and input gradient of the bare engine in",
        "the same chunks (aim: at most 5 %); **peak**: memory above what was held before, CUDA graphs included.",
        "Peers run with the TF32 flags that pysal sets for itself, for matrix products and cuDNN: off for float32, on for",
        "tf32. A map that is further away than rounding explains is marked ✗; outside float32 that is half its size.",
        "",
    ]
    for result in results:
        about, rows = result["metadata"], result["rows"]
        for images in sorted({row["images"] for row in rows}):
            own = [row for row in rows if row["images"] == images]
            batch = "one image" if images == 1 else f"{images} images"
            lines += [f"### {NETWORKS[rows[0]['network']]}, {batch}, {about['cuda']['name']}", ""]
            when = where_and_when({"metadata": about | {"processor": about["cuda"]["name"]}, "rows": own}, threads=False)
            lines += [f"{when}, CUDA {about['cuda']['runtime']}.", ""]
            methods = [method for method in METHODS if any(row["method"] == method for row in own)]
            head = ["method", "arithmetic", "pysal, prepared", *COLUMNS]
            body = [line for method in methods for line in gpu_ratios(method, own)]
            lines += [*table(head, body), ""]
            head = [
                "method",
                "candidate",
                "arithmetic",
                "setting",
                "runs",
                "median",
                "time / pysal prepared (IQR)",
                "outside",
                "error",
                "peak",
            ]
            body = [gpu_line(row) for method in methods for row in own if row["method"] == method]
            lines += [*table(head, body), ""]
    return lines


def gpu_ratios(method: str, rows: Sequence[Row]) -> list[list[str]]:
    """A line for each arithmetic that ours has: its time, and how many times as long others take in the same one."""
    lines = []
    for ours in (row for row in rows if row["method"] == method and row["candidate"] == OURS and row["median_s"] is not None):
        same = {one["candidate"]: one for one in rows if (one["method"], one["precision"]) == (method, ours["precision"])}
        cells = [next((same[name] for name in names if name in same), None) for names in COLUMNS.values()]
        wrong = "" if ours["agrees"] else " ✗"
        lines.append(
            [METHODS[method], ours["precision"], seconds(ours["median_s"]) + wrong, *(times(one, ours) for one in cells)]
        )
    return lines


def gpu_line(row: Row) -> list[str]:
    start = [METHODS[row["method"]], row["candidate"], row["precision"]]
    if row["median_s"] is None:
        return [*start, f"not run: {row['failed']}", *[""] * 6]
    ratio = "" if row["times_as_long_as_ours"] is None else f"{row['times_as_long_as_ours']:.2f}"
    spread = ratio and f"{ratio} ({row['times_as_long_as_ours_iqr']:.2f})"
    outside = "" if row["outside_model"] is None else f"{100 * row['outside_model']:.1f} %"
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    memory = "" if row["peak_mem_bytes"] is None else f"{row['peak_mem_bytes'] / 2**20:.0f} MiB"
    setting = f"`{row['setting']}`" if "=" in row["setting"] else row["setting"]
    cells = [setting, str(row["samples"]), seconds(row["median_s"]), spread, outside, error, memory]
    return [*start, *cells[:-2], cells[-2] + ("" if row["agrees"] else " ✗"), cells[-1]]


def faces_section(results: Sequence[Mapping[str, Any]]) -> str:
    """docs/migrating.md's table: the time of each peer's class divided by that of the class that replaces it."""
    lines = [BEGIN, ""]
    for result in results:
        names = [name for name in dict.fromkeys(row["method"] for row in result["rows"]) if "." in name]
        body = []
        for name in names:
            rows = by_candidate(result, name)
            peer, same, fast = rows[name.split(".")[0]], rows["pysal, unprepared"], rows[OURS]
            body.append([f"`{name}`", seconds(peer["median_s"]), times(peer, same), times(peer, fast)])
        if body:
            measured = dict(result, rows=[row for row in result["rows"] if row["method"] in names])
            head = ["class", "captum's or PAIR's time", "divided by pysal's", "divided by pysal's, model prepared"]
            lines += [f"{NETWORKS[result['rows'][0]['network']]}, defaults of each class ({where_and_when(measured)}):", ""]
            lines += [*table(head, body), ""]
    return "\n".join([*lines, END])


def audit_section(results: Sequence[Mapping[str, Any]]) -> str:
    """docs/auditing.md's tables: images per second of an audit, and what 50,000 and 1,000,000 images take by them."""
    lines = [BEGIN, ""]
    for result in results:
        about, rows = result["metadata"], result.get("methods", [])
        commits = ", ".join(dict.fromkeys(row["commit"][:7] for kind in AUDIT for row in result.get(kind, [])))
        lines += [
            f"EfficientNet-Lite0, 224 x 224, float32 ({about['processor']}, a thread for each worker, torch {about['torch']}, "
            f"{about['date'][:10]}, commits {commits}; load average {about['load_average'][0]}).",
            "",
        ]
        for workers in dict.fromkeys(row["workers"] for row in rows):
            own = [row for row in rows if row["workers"] == workers]
            head = ["method", "the engine alone", "pool of 1", f"{workers} engines side by side", f"pool of {workers}"]
            head += [f"pool / {workers} x the engine", f"pool / {workers} side by side", f"pool / {workers} x a pool of 1"]
            head += ["read and write a photo", f"Ray, {workers} workers"]
            lines += ["Images per second:", "", *table(head, [audit_line(row, workers) for row in own]), ""]
            head = ["method", *(f"{images:,} images, {who}" for images in DATASETS for who in (f"{workers} cores", "64 cores"))]
            head += ["maps as uint8, 1,000,000 images"]
            body = [estimate_line(row, workers) for row in own]
            lines += [
                f"Estimated from the pool of {workers}; 64 cores count as {64 // workers} such pools, if memory keeps up:",
                "",
                *table(head, body),
                "",
            ]
        if result.get("metrics"):
            body = [[f"`{row['metric']}`", f"{row['seconds']:.2f} s", f"{1 / row['seconds']:.2f}"] for row in result["metrics"]]
            lines += ["Metrics of one map:", "", *table(["metric", "one core", "images per second"], body), ""]
        if result.get("growth"):
            head = ["images", "to plan", "to run", "images per second", "memory of the job", "of a worker", "on disk"]
            body = [growth_line(row) for row in sorted(result["growth"], key=lambda row: row["images"])]
            lines += ["Growth with the dataset (gradient, no maps, a model that takes no time):", "", *table(head, body), ""]
        lines += ["No rate on a GPU has been measured yet, so none is estimated.", ""]
    if not results:
        lines += ["Nothing has been measured for this version.", ""]
    return "\n".join([*lines, END])


def audit_line(row: Row, workers: int) -> list[str]:
    rates = row["images_per_second"]
    alone, together, pool = rates["bare 1"], rates[f"bare {workers}"], rates[f"pool {workers}"]
    cells = [f"{rate:.2f}" for rate in (alone, rates["pool 1"], together, pool)]
    stages = row["seconds_of_a_processor_per_image"]
    cells += [f"{100 * pool / whole:.0f} %" for whole in (workers * alone, together, workers * rates["pool 1"])]
    cells += [f"{1e3 * (stages['read'] + stages['encode']):.1f} ms", f"{rates[f'ray {workers}']:.2f}"]
    return [f"`{row['method']}`", *cells]


def estimate_line(row: Row, workers: int) -> list[str]:
    rate = row["images_per_second"][f"pool {workers}"]
    times = [long(images / rate * workers / cores) for images in DATASETS for cores in (workers, 64)]
    return [f"`{row['method']}`", *times, f"{1e6 * row['bytes_per_image'] / 2**30:.0f} GiB"]


def long(value: float) -> str:
    """A duration in the unit that people say it in."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}" if value < 20 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} s"


def growth_line(row: Row) -> list[str]:
    memory = [f"{row[name] / 2**20:.0f} MiB" for name in ("peak_bytes", "worker_peak_bytes", "stored_bytes")]
    times = [long(row["plan_seconds"]), long(row["run_seconds"]), f"{row['images_per_second']:.0f}"]
    return [f"{row['images']:,}", *times, *memory]


def latest_audits() -> list[dict[str, Any]]:
    """The results of audits of the newest version that has some, one per device."""
    folders = {path.parent for path in RESULTS.glob("*/audit--*.json")}
    newest = max(folders, key=lambda folder: [int(part) for part in folder.name.split(".")], default=None)
    return [] if newest is None else [json.loads(path.read_text()) for path in sorted(newest.glob("audit--*.json"))]


def docs_line(row: Row, ours: Row) -> list[str]:
    if row["median_s"] is None:
        return [row["candidate"], f"not run: {row['failed']}", "", "", "", "", ""]
    spread = f"{times(row, ours)} ({row['times_as_long_as_ours_iqr']:.2f})"
    difference = f"{row['difference']:.0e}" if row["agrees"] else f"{row['difference']:.0e}, wrong"
    memory = f"{row['peak_mem_bytes'] / 2**20:.0f} MiB"
    setting = f"`{row['setting']}`" if "=" in row["setting"] else row["setting"]
    return [row["candidate"], setting, str(row["samples"]), seconds(row["median_s"]), spread, memory, difference]


def replaced(page: str, section: str) -> str:
    """The page with another section between the marks."""
    before, rest = page.split(BEGIN)
    return before + section + rest.split(END)[1]


def pages() -> dict[Path, str]:
    """What each page with tables should say."""
    results = latest()
    sections = {
        ROOT / "README.md": readme_section(results, latest_on_gpu()),
        ROOT / "docs/speed.md": docs_section(results, latest_on_gpu()),
        ROOT / "docs/migrating.md": faces_section(results),
        ROOT / "docs/auditing.md": audit_section(latest_audits()),
    }
    found = {path: replaced(path.read_text(), section) for path, section in sections.items()}
    networks = latest_networks()
    for path, section in (
        (ROOT / "README.md", networks_section(networks)),
        (ROOT / "docs/speed.md", every_network_section(networks)),
    ):
        before, rest = found[path].split(BEGIN_NETWORKS)
        found[path] = before + section + rest.split(END_NETWORKS)[1]
    return found


def main() -> None:
    for path, page in pages().items():
        path.write_text(page)


if __name__ == "__main__":
    main()
