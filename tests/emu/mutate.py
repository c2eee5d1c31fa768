"""Seeds faults into the CUDA kernels, one at a time, and shows which check of the emulation sees each.

mutate.py [WORD...]: all faults, into docs/mutations.md; with words, only those whose source or name holds one of them,
printed. A fault is an exact piece of source and what stands there instead; a piece that is gone or no longer unique stops
the run, so faults cannot rot. Exits 1 if no check sees one of them.
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
HEADER = """# Faults that the emulation sees

`make mutate` seeds one fault at a time into the CUDA kernels, compiles them for the CPU and runs the cases of `tests/emu`:
with threads in three orders, under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer. `-` is a run
that noticed nothing; `diagnosed` means that the emulation itself refused, as for a barrier that not all threads reach.
"""


class Fault(NamedTuple):
    """A piece of csrc/cuda/<stem>.cu and what replaces it; nth counts from 1 where the piece is there more than once."""

    stem: str
    name: str
    old: str
    new: str
    nth: int = 0

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
        "tail of one element dropped",
        "kPerThread * whole < params.count",
        "kPerThread * whole + 1 < params.count",
        1,
    ),
    Fault(
        "guided_relu", "read past the end", "whole = params.count / kPerThread", "whole = (params.count + 7) / kPerThread", 2
    ),
    Fault("guided_relu", "words at any address", "aligned_to_16(params.input, params.output) ?", "true ?"),
    Fault("guided_relu", "bits of the gate reversed", "forward.gate(value)) << k", "forward.gate(value)) << (7 - k)"),
    Fault("guided_relu", "gate without its upper edge", "x > A(0) && x < upper", "x > A(0)"),
    Fault("guided_relu", "wrong rule masked", "kPositive = kRule != kPlain", "kPositive = kRule != kGuided"),
    Fault("gaussian_noise", "next counter not counted", "element / 4 + 1", "element / 4"),
    Fault("gaussian_noise", "nine rounds", "round < 10", "round < 9"),
    Fault("gaussian_noise", "high half of the id dropped", "static_cast<uint32_t>(static_cast<uint64_t>(id) >> 32)", "0"),
    Fault("gaussian_noise", "store one past the end", "if (4 * quad + k < size)", "if (4 * quad + k <= size)"),
    Fault("gaussian_noise", "words in images of any size", "words = size % 4 == 0 &&", "words ="),
    Fault(
        "gaussian_noise",
        "words at any address",
        "size % 4 == 0 && aligned_to_16(params.images, params.output)",
        "size % 4 == 0",
    ),
    Fault("gaussian_noise", "unchecked store of bits", "if (4 * quad + k < params.elements) ", ""),
    Fault("gaussian_noise", "one pixel too many", "if (pixel >= pixels) continue;", "if (pixel > pixels) continue;"),
    Fault("gaussian_noise", "unchecked row", "row >= 0 && row < params.batch", "row >= 0"),
    Fault("gaussian_scale_space", "no barrier in the tree", f"{BARRIER}\n    if (thread < half)", "if (thread < half)"),
    Fault(
        "gaussian_scale_space", "no barrier before the sum is read", f"{BARRIER}\n  const double total", "const double total"
    ),
    Fault("gaussian_scale_space", "no barrier after the load", f"{BARRIER}\n\n    // groups", "\n    // groups"),
    Fault(
        "gaussian_scale_space", "no barrier before the next load", f"{BARRIER}\n  }}\n\n  // transposed", "}\n\n  // transposed"
    ),
    Fault(
        "gaussian_scale_space",
        "no barrier before the store",
        f"{BARRIER}\n  for (int i = thread; i < kTile",
        "for (int i = thread; i < kTile",
    ),
    Fault(
        "gaussian_scale_space",
        "barrier in a branch",
        f"{BARRIER}\n\n    // groups",
        f"if (warp < 4) {BARRIER}\n\n    // groups",
    ),
    Fault(
        "gaussian_scale_space",
        "halo one short",
        "int end = last + reach < highest ? last + reach",
        "int end = last + reach < highest ? last + reach - 1",
    ),
    Fault("gaussian_scale_space", "reflection off by one", "k < 0 ? -1 - k", "k < 0 ? -k"),
    Fault("gaussian_scale_space", "outermost tap dropped", "values[x % 8] = j <= reach", "values[x % 8] = j < reach"),
    Fault(
        "gaussian_scale_space", "unchecked column", "line + row >= length || column + other >= columns", "line + row >= length"
    ),
    Fault("gaussian_scale_space", "wrong table", "windows[kNext].at(8 + r - q) * v", "windows[kLevel].at(8 + r - q) * v"),
    Fault("grad_cam", "no barrier before parts are read", f"{BARRIER}\n    const int mine", "const int mine"),
    Fault(
        "grad_cam",
        "no barrier before parts are reused",
        f"sum / static_cast<A>(pixels);\n    }}\n    {BARRIER}",
        "sum / static_cast<A>(pixels);\n    }",
    ),
    Fault("grad_cam", "no barrier after the taps", f"{BARRIER}\n\n    const auto pixel_of", "\n    const auto pixel_of"),
    Fault("grad_cam", "no barrier before slices are added", f"parts[thread] = sum;\n        {BARRIER}", "parts[thread] = sum;"),
    Fault("grad_cam", "a shuffle step left out", "int bits = kWarp / 2", "int bits = kWarp / 4"),
    Fault("grad_cam", "mask of half a warp", "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu"),
    Fault("grad_cam", "unchecked store of weights", "mine < kGroup && first + mine < channels", "mine < kGroup"),
    Fault("grad_cam", "words in planes of any size", "aligned = run % 8 == 0 &&", "aligned ="),
    Fault("grad_cam", "stored by every lane", "if (thread % kWarp == 0) samples[sample]", "samples[sample]"),
    Fault("grad_cam", "sample past the last", "rest == 0 || first + 1 == side.from", "rest == 0"),
    Fault("grad_cam", "ReLU of everything", "params.relu && sum < A(0)", "params.relu || sum < A(0)"),
    Fault("occlusion_masks", "no barrier before warps are counted", f"= __popc(votes);\n      {BARRIER}", "= __popc(votes);"),
    Fault("occlusion_masks", "no barrier before boxes are read", f"{BARRIER}\n      for (int i = 0", "for (int i = 0"),
    Fault("occlusion_masks", "no barrier before the next boxes", f"{BARRIER}\n    }}\n    if (y", "}\n    if (y"),
    Fault("occlusion_masks", "a box's place off by one", "votes & ((1u << lane) - 1)", "votes & ((2u << lane) - 1)"),
    Fault("occlusion_masks", "unchecked label", "labels[k] >= 0 && labels[k] < params.segments", "labels[k] >= 0"),
    Fault("occlusion_masks", "unchecked column", "y < params.height && x < params.width", "y < params.height"),
    Fault("occlusion_masks", "box closed at its end", "ys[k] < bottom", "ys[k] <= bottom"),
    Fault("occlusion_masks", "image of another row kept", "row != held", "held < 0"),
    Fault("occlusion_masks", "words at any address", "out_last && aligned_to_16(params.images, params.fills)", "out_last"),
    Fault("path_integral", "ballot past the end", "mine < count && rows[mine] == image", "rows[mine] == image"),
    Fault("path_integral", "sample not counted", "static_cast<A>(++seen)", "static_cast<A>(seen + 1)"),
    Fault("path_integral", "path of another row kept", "row != held", "held < 0"),
    Fault("path_integral", "NaN kept for the next row", "static_cast<A>(NAN);\n        held = -1;", "static_cast<A>(NAN);"),
    Fault("path_integral", "plain add by every lane", "if (lane == 0) params.counts[image]", "params.counts[image]"),
    Fault("path_integral", "row one past the batch", "row < 0 || row >= params.batch", "row < 0 || row > params.batch"),
    Fault("path_integral", "unchecked end of the image", "inside = place < size", "inside = place <= size", 1),
    Fault(
        "path_integral",
        "words at any address",
        "params.count % 8 == 0 && aligned_to_16(params.inputs, params.baselines) &&",
        "params.count % 8 == 0 &&",
    ),
    Fault("path_integral", "sum begun anew", "sums[k] = target[k]", "sums[k] = A(0)"),
]


def build(configuration: str) -> Path:
    """Compile what changed of the copy in WORK and return the program."""
    environment = os.environ | {
        "CSRC": str(WORK / "csrc"),
        "BUILD": str(WORK / "objects"),
        "BUILD_ONLY": "1",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(["bash", ROOT / "tests/emu/run.sh", configuration], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"does not compile:\n{done.stdout}{done.stderr}")
    return WORK / "objects" / configuration / "main"


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
        return [verdict(programs[name], order, fault.stem) for name, order in CHECKS.values()]
    finally:  # with their old times, so that nothing is compiled again
        for path, original in zip([source, *objects], [sound, *kept], strict=True):
            os.replace(original, path)


def main(words: list[str]) -> None:
    """Run the chosen faults; write the page where all of them ran."""
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
    lines = [f"| source | fault | {' | '.join(CHECKS)} |", f"|---|---|{'---|' * len(CHECKS)}"]
    print(*lines, sep="\n")
    unseen = []
    for fault in chosen:
        found = row(fault)
        lines.append(f"| {fault.stem} | {fault.name} | {' | '.join(found)} |")
        print(lines[-1], flush=True)
        if set(found) == {"-"}:
            unseen.append(f"{fault.stem}: {fault.name}")
    if not words:
        PAGE.write_text("\n".join([HEADER, *lines]) + "\n")
    if unseen:
        sys.exit(f"no check sees {len(unseen)} of {len(chosen)}:\n" + "\n".join(unseen))


if __name__ == "__main__":
    main(sys.argv[1:])
