"""Seeds faults into the CUDA kernels, one at a time, and shows which check of the emulation sees each.

mutate.py [WORD...]: all faults, or those whose source or name holds a word; their rows go into docs/mutations.md. A fault
is an exact piece of source and what stands there instead; a piece that is gone or no longer unique stops the run, so faults
cannot rot. Exits 1 if no check sees one of them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build/mutate"
PAGE = ROOT / "docs/mutations.md"
# column -> configuration of run.sh and order of threads
CHECKS = {
    "forward": ("plain", "0"),
    "reverse": ("plain", "1"),
    "shuffled": ("plain", "7"),
    "ASan + UBSan": ("address", "0"),
    "TSan": ("thread", "0"),
}
# What nvcc makes of the kernels, run on the CPU: minutes a fault, so tried where the others have nothing to see.
PTX, NOT_TRIED = "PTX", "not tried"
COLUMNS = (*CHECKS, PTX)
HEADER = """# Which faults in a CUDA kernel the tests find

This table shows that the tests of the CUDA kernels find mistakes. `make mutate` puts one fault at a time into the kernels,
compiles them for the CPU and runs the cases of `tests/emu` in five ways: with the threads in three orders, under
AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

The last column is nvcc's code of the kernels, translated to C++ (`make ptx`). It is tried for faults in what only nvcc reads.

A cell says how that run failed. `-`: it noticed nothing. `diagnosed`: the emulation itself refused, for example at a barrier
that not all threads reach.
"""


KINDS = (
    *("missing barrier", "halo", "tail", "alignment", "wrong mask", "plain add", "off by one"),
    *("unchecked load", "unchecked store", "wrong counter", "launch bounds"),
)


class Fault(NamedTuple):
    """A piece of csrc/cuda/<stem>.cu and what replaces it; nth counts from 1 where the piece is there more than once."""

    stem: str
    kind: str
    name: str
    old: str
    new: str
    nth: int = 0
    nvcc: bool = False  # whether it is in what only nvcc reads

    def seeded(self, source: str) -> str:
        """Return the source with the fault in it."""
        count = source.count(self.old)
        if count != 1 and not 1 <= self.nth <= count:
            sys.exit(f"{self.stem}.cu has {count} times what the fault {self.name!r} replaces: {self.old}")
        at = -1
        for _ in range(max(self.nth, 1)):
            at = source.index(self.old, at + 1)
        return source[:at] + self.new + source[at + len(self.old) :]


BARRIER = "__syncthreads();"
FAULTS = [
    Fault(
        "guided_relu",
        "tail",
        "tail of one element dropped",
        "kPerThread * whole < params.count",
        "kPerThread * whole + 1 < params.count",
        1,
    ),
    Fault(
        "guided_relu",
        "off by one",
        "read past the end",
        "whole = params.count / kPerThread",
        "whole = (params.count + 7) / kPerThread",
        2,
    ),
    Fault(
        "guided_relu",
        "alignment",
        "words at any address",
        "aligned = aligned_to_16(params.input, params.output)",
        "aligned = true",
    ),
    Fault(
        "guided_relu", "wrong mask", "bits of the gate reversed", "forward.gate(value)) << k", "forward.gate(value)) << (7 - k)"
    ),
    Fault("guided_relu", "wrong mask", "gate without its upper edge", "!(x <= A(0)) && !(x >= bound)", "!(x <= A(0))"),
    Fault("guided_relu", "wrong mask", "wrong rule masked", "kPositive = kRule != kPlain", "kPositive = kRule != kGuided"),
    Fault("gaussian_noise", "wrong counter", "next counter not counted", "element / 4 + 1", "element / 4"),
    Fault("gaussian_noise", "off by one", "nine rounds", "round < 10", "round < 9"),
    Fault(
        "gaussian_noise",
        "wrong counter",
        "high half of the id dropped",
        "static_cast<uint32_t>(static_cast<uint64_t>(id) >> 32)",
        "0",
    ),
    Fault(
        "gaussian_noise", "unchecked store", "store one past the end", "if (4 * quad + k < size)", "if (4 * quad + k <= size)"
    ),
    Fault("gaussian_noise", "tail", "words in images of any size", "words = size % 4 == 0 &&", "words ="),
    Fault(
        "gaussian_noise",
        "alignment",
        "words at any address",
        "size % 4 == 0 && aligned_to_16(params.images, params.output)",
        "size % 4 == 0",
    ),
    Fault("gaussian_noise", "unchecked store", "unchecked store of bits", "if (4 * quad + k < params.elements) ", ""),
    Fault(
        "gaussian_noise", "off by one", "one pixel too many", "if (pixel >= pixels) continue;", "if (pixel > pixels) continue;"
    ),
    Fault("gaussian_noise", "unchecked load", "unchecked row", "row >= 0 && row < params.batch", "row >= 0"),
    Fault(
        "gaussian_scale_space",
        "missing barrier",
        "no barrier in the tree",
        f"{BARRIER}\n    if (thread < half)",
        "if (thread < half)",
    ),
    Fault(
        "gaussian_scale_space",
        "missing barrier",
        "no barrier before the sum is read",
        f"{BARRIER}\n  const double total",
        "const double total",
    ),
    Fault(
        "gaussian_scale_space", "missing barrier", "no barrier after the load", f"{BARRIER}\n\n    // groups", "\n    // groups"
    ),
    Fault(
        "gaussian_scale_space",
        "missing barrier",
        "no barrier before the next load",
        f"{BARRIER}\n  }}\n\n  // transposed",
        "}\n\n  // transposed",
    ),
    Fault(
        "gaussian_scale_space",
        "missing barrier",
        "no barrier before the store",
        f"{BARRIER}\n  for (int i = thread; i < kTile",
        "for (int i = thread; i < kTile",
    ),
    Fault(
        "gaussian_scale_space",
        "missing barrier",
        "barrier in a branch",
        f"{BARRIER}\n\n    // groups",
        f"if (warp < 4) {BARRIER}\n\n    // groups",
    ),
    Fault(
        "gaussian_scale_space",
        "halo",
        "halo one short",
        "int end = last + reach < highest ? last + reach",
        "int end = last + reach < highest ? last + reach - 1",
    ),
    Fault("gaussian_scale_space", "halo", "reflection off by one", "k < 0 ? -1 - k", "k < 0 ? -k"),
    Fault(
        "gaussian_scale_space", "off by one", "outermost tap dropped", "values[x % 8] = j <= reach", "values[x % 8] = j < reach"
    ),
    Fault(
        "gaussian_scale_space",
        "unchecked store",
        "unchecked column",
        "line + row >= length || column + other >= columns",
        "line + row >= length",
    ),
    Fault(
        "gaussian_scale_space",
        "wrong mask",
        "wrong table",
        "windows[kNext].at(8 + r - q) * v",
        "windows[kLevel].at(8 + r - q) * v",
    ),
    Fault(
        "grad_cam", "missing barrier", "no barrier before parts are read", f"{BARRIER}\n    const int mine", "const int mine"
    ),
    Fault(
        "grad_cam",
        "missing barrier",
        "no barrier before parts are reused",
        f"sum / static_cast<A>(pixels);\n    }}\n    {BARRIER}",
        "sum / static_cast<A>(pixels);\n    }",
    ),
    Fault(
        "grad_cam",
        "missing barrier",
        "no barrier after the taps",
        f"{BARRIER}\n\n    const auto pixel_of",
        "\n    const auto pixel_of",
    ),
    Fault(
        "grad_cam",
        "missing barrier",
        "no barrier before slices are added",
        f"parts[thread] = sum;\n        {BARRIER}",
        "parts[thread] = sum;",
    ),
    Fault("grad_cam", "tail", "a shuffle step left out", "int bits = kWarp / 2", "int bits = kWarp / 4"),
    Fault("grad_cam", "wrong mask", "mask of half a warp", "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu"),
    Fault(
        "grad_cam", "unchecked store", "unchecked store of weights", "mine < kGroup && first + mine < channels", "mine < kGroup"
    ),
    Fault("grad_cam", "tail", "words in planes of any size", "aligned = run % 8 == 0 &&", "aligned ="),
    Fault("grad_cam", "unchecked store", "stored by every lane", "if (thread % kWarp == 0) samples[sample]", "samples[sample]"),
    Fault("grad_cam", "halo", "sample past the last", "rest == 0 || first + 1 == side.from", "rest == 0"),
    Fault("grad_cam", "wrong mask", "ReLU of everything", "params.relu && sum < A(0)", "params.relu || sum < A(0)"),
    Fault(
        "occlusion_masks",
        "missing barrier",
        "no barrier before warps are counted",
        f"= __popc(votes);\n      {BARRIER}",
        "= __popc(votes);",
    ),
    Fault(
        "occlusion_masks",
        "missing barrier",
        "no barrier before boxes are read",
        f"{BARRIER}\n      for (int i = 0",
        "for (int i = 0",
    ),
    Fault(
        "occlusion_masks", "off by one", "a box's place off by one", "votes & ((1u << lane) - 1)", "votes & ((2u << lane) - 1)"
    ),
    Fault(
        "occlusion_masks",
        "unchecked load",
        "unchecked label",
        "labels[k] >= 0 && labels[k] < params.segments",
        "labels[k] >= 0",
    ),
    Fault(
        "occlusion_masks", "unchecked store", "unchecked column", "y < params.height && x < params.width", "y < params.height"
    ),
    Fault("occlusion_masks", "off by one", "box closed at its end", "ys[k] < bottom", "ys[k] <= bottom"),
    Fault("occlusion_masks", "wrong counter", "image of another row kept", "row != held", "held < 0"),
    Fault(
        "occlusion_masks",
        "alignment",
        "words at any address",
        "out_last && aligned_to_16(params.images, params.fills)",
        "out_last",
    ),
    Fault(
        "path_integral", "unchecked load", "ballot past the end", "mine < count && rows[mine] == image", "rows[mine] == image"
    ),
    Fault("path_integral", "wrong counter", "sample not counted", "static_cast<A>(++seen)", "static_cast<A>(seen + 1)"),
    Fault("path_integral", "wrong counter", "path of another row kept", "row != held", "held < 0"),
    Fault(
        "path_integral",
        "wrong counter",
        "NaN kept for the next row",
        "static_cast<A>(NAN);\n        held = -1;",
        "static_cast<A>(NAN);",
    ),
    Fault(
        "path_integral", "plain add", "plain add by every lane", "if (lane == 0) params.counts[image]", "params.counts[image]"
    ),
    Fault(
        "path_integral",
        "off by one",
        "row one past the batch",
        "row < 0 || row >= params.batch",
        "row < 0 || row > params.batch",
    ),
    Fault(
        "path_integral", "unchecked store", "unchecked end of the image", "inside = place < size", "inside = place <= size", 1
    ),
    Fault(
        "path_integral",
        "alignment",
        "words at any address",
        "params.count % 8 == 0 && aligned_to_16(params.inputs, params.baselines) &&",
        "params.count % 8 == 0 &&",
    ),
    Fault("path_integral", "wrong counter", "sum begun anew", "sums[k] = target[k]", "sums[k] = A(0)"),
    Fault("box_regions", "unchecked load", "line past the map", "y < 0 || y >= images.height ||", "y < 0 ||"),
    Fault("box_regions", "unchecked load", "sum past the map", "if (changed == nullptr) continue;", ""),
    Fault("box_regions", "off by one", "box closed at its end", "i < images.box_height && j", "i <= images.box_height && j"),
    Fault("box_regions", "alignment", "words of regions at any address", "aligned_to_16(params.out, nullptr);", "true;"),
    Fault("box_regions", "halo", "taps closer than they are", "left + q * params.column_dilation", "left + q"),
    Fault(
        "box_regions", "wrong counter", "corner of another row", "top = params.corners[2 * at.n]", "top = params.corners[at.n]"
    ),
    Fault(
        "guided_relu",
        "unchecked store",
        "output stored where only gates are wanted",
        "if constexpr (kStores) store_eight",
        "store_eight",
    ),
    Fault(
        "guided_relu", "wrong mask", "guided rule without its gate", "kGated = kRule != kDeconvnet", "kGated = kRule == kPlain"
    ),
    Fault(
        "guided_relu",
        "alignment",
        "words at any address, backward",
        "aligned_to_16(params.grad_output, params.grad_input)",
        "true",
    ),
    Fault(
        "grad_cam",
        "alignment",
        "words of activations at any address",
        "params.channels % 8 == 0 && aligned_to_16(params.activations, params.activations)",
        "params.channels % 8 == 0",
    ),
    Fault(
        "grad_cam", "alignment", "words of the map at any address", " && reinterpret_cast<uintptr_t>(params.out) % 16 == 0", ""
    ),
    Fault("occlusion_masks", "wrong counter", "another channel's mean", "params.mean[cursor.channel]", "params.mean[0]"),
    Fault(
        "occlusion_masks",
        "off by one",
        "channels counted too far",
        "++channel < params.channels",
        "++channel <= params.channels",
    ),
    Fault(
        "path_integral",
        "tail",
        "last of the rows under way not added",
        "sums[k] += terms[r][k]",
        "sums[k] += r < 3 ? terms[r][k] : 0",
    ),
    Fault(
        "path_integral",
        "wrong counter",
        "a row of two asked for",
        "votes &= votes - 1;",
        "votes &= votes - 1, votes &= votes - 1;",
    ),
    Fault(
        "path_integral", "alignment", "words of totals at any address", "aligned_to_16(params.totals, params.gradients) &&", ""
    ),
    Fault("path_integral", "alignment", "words of means at any address", "aligned_to_16(params.mean, params.squares) &&", ""),
    Fault(
        "epilogue",
        "tail",
        "tail of one element dropped",
        "kPerThread * whole < params.count",
        "kPerThread * whole + 1 < params.count",
        1,
    ),
    Fault(
        "epilogue",
        "alignment",
        "words of the result at any address",
        "aligned_to_16(params.x, params.shortcut) &&",
        "",
    ),
    Fault(
        "epilogue",
        "off by one",
        "a channel too many",
        "if (++channel == params.channels)",
        "if (channel++ == params.channels)",
        2,
    ),
    Fault("epilogue", "wrong mask", "leaky gate closed from a bound", "return rounded > A(0);", "return rounded > A(0.5);"),
    Fault(
        "epilogue",
        "unchecked load",
        "words of biases of any number",
        "params.channels % kPerThread == 0",
        "params.channels > 0",
    ),
    *(
        Fault(
            stem,
            "launch bounds",
            f"{kernel} compiled for half a block",
            f"__launch_bounds__(kBlock) {kernel}_kernel(",
            f"__launch_bounds__(kBlock / 2) {kernel}_kernel(",
            nvcc=True,
        )
        for stem, kernel in (("guided_relu", "guided_relu"), ("grad_cam", "mean_planes"), ("box_regions", "box_regions"))
    ),
]


def build(configuration: str, stems: str = "") -> Path:
    """Compile what changed of the copy in WORK, or some of its sources, and return the program."""
    environment = os.environ | {
        "STEMS": stems,
        "CSRC": str(WORK / "csrc"),
        "BUILD": str(WORK / "objects"),
        "BUILD_ONLY": "1",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(["bash", ROOT / "tests/emu/run.sh", configuration], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"does not compile:\n{done.stdout}{done.stderr}")
    return WORK / "objects" / (f"{configuration}-{os.environ.get('ARCH', '90')}" if stems else configuration) / "main"


def verdict(program: Path, order: str, stem: str) -> str:
    """Run the cases of one source, named for the last words of its stem, and say in a word how they ended."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66 halt_on_error=1",
    }
    try:
        done = subprocess.run(
            [program, order, stem.removeprefix("gaussian_")],
            env=os.environ | options,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        return "hang"
    said = done.stdout + done.stderr
    if done.returncode == 0:
        return "-"
    if found := re.search(r"(?:AddressSanitizer|ThreadSanitizer): ([\w-]+(?: race)?)", said):
        return found[1]
    if "runtime error" in said:
        return "undefined behaviour"
    if "EXCEPTION" in said:
        return "diagnosed"
    return f"signal {-done.returncode}" if done.returncode < 0 else "wrong result"


def row(fault: Fault) -> list[str]:
    """Seed a fault, run every check and take it out again."""
    source = WORK / f"csrc/cuda/{fault.stem}.cu"
    objects = [WORK / "objects" / name / f"{fault.stem}.cu.o" for name in dict(CHECKS.values())]
    sound = shutil.copy2(source, source.with_suffix(".sound"))
    kept = [shutil.copy2(path, path.with_suffix(".kept")) for path in objects]
    try:
        source.write_text(fault.seeded(source.read_text()))
        programs = {name: build(name) for name in dict(CHECKS.values())}
        found = [verdict(programs[name], order, fault.stem) for name, order in CHECKS.values()]
        return [*found, verdict(build("ptx", fault.stem), "0", fault.stem) if fault.nvcc else NOT_TRIED]
    finally:  # with their old times, so that nothing is compiled again
        for path, original in zip([source, *objects], [sound, *kept], strict=True):
            os.replace(original, path)


def committed() -> dict[tuple[str, str], str]:
    """Return the rows of the page, by source and fault."""
    text = PAGE.read_text() if PAGE.exists() else ""
    return {(m[1], m[2]): m[0] for m in re.finditer(r"^\| (\w+) \| [^|]+ \| ([^|]+) \|.*\|$", text, re.MULTILINE)}


def write(rows: dict[tuple[str, str], str]) -> None:
    """Write the page, in the order of FAULTS; rows of faults that are no more are left out."""
    known = [rows[fault.stem, fault.name] for fault in FAULTS if (fault.stem, fault.name) in rows]
    seen = sum(bool(set(line.split(" | ")[3:]) - {"-", "- |", NOT_TRIED, f"{NOT_TRIED} |"}) for line in known)
    count = f"{len(FAULTS)} faults; {len(known)} of them were tried on the sources as they are, and {seen} were found.\n"
    columns = f"| source | kind | fault | {' | '.join(COLUMNS)} |"
    PAGE.write_text("\n".join([HEADER, count, columns, f"|---|---|---|{'---|' * len(COLUMNS)}", *known]) + "\n")


def main(words: list[str]) -> None:
    """Run the chosen faults and write their rows of the page, each as soon as it is known."""
    chosen = [fault for fault in FAULTS if not words or any(word in f"{fault.stem} {fault.name}" for word in words)]
    if not chosen:
        sys.exit(f"no fault holds {' or '.join(words)}")
    for fault in FAULTS:  # before anything is compiled
        fault.seeded((ROOT / f"csrc/cuda/{fault.stem}.cu").read_text())
    shutil.rmtree(WORK / "csrc", ignore_errors=True)
    shutil.copytree(ROOT / "csrc", WORK / "csrc")
    for name, order in CHECKS.values():
        program = build(name)
        for stem in dict.fromkeys(fault.stem for fault in chosen):
            if (found := verdict(program, order, stem)) != "-":
                sys.exit(f"{stem} is not sound to begin with: {found} ({name}, order {order})")
    rows, unseen = committed(), []
    for fault in chosen:
        found = row(fault)
        rows[fault.stem, fault.name] = f"| {fault.stem} | {fault.kind} | {fault.name} | {' | '.join(found)} |"
        print(rows[fault.stem, fault.name], flush=True)
        write(rows)
        if set(found) <= {"-", NOT_TRIED}:
            unseen.append(f"{fault.stem}: {fault.name}")
    if unseen:
        sys.exit(f"no check sees {len(unseen)} of {len(chosen)}:\n" + "\n".join(unseen))


if __name__ == "__main__":
    main(sys.argv[1:])
