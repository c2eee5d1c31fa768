"""Reads what ptxas reports of the CUDA kernels: refuses spills and keeps the table of docs/cuda_kernels.md.

Run by tests/cuda_check.sh: cuda_table.py REPORTS NVCC_RELEASE [--write]. REPORTS holds one <stem>.cu.txt per source, the
output of nvcc -Xptxas=-v. Without --write the committed table is checked: made by the same nvcc, it must be the same;
made by another, whose registers may differ, it must list the same kernels.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs/cuda_kernels.md"
BEGIN, END = "<!-- made by make cuda-table: begin -->", "<!-- made by make cuda-table: end -->"
ARCHITECTURES = ("sm_80", "sm_90")


class Use(NamedTuple):
    """What a kernel takes on one architecture: registers per thread, bytes of static shared memory, bytes spilled."""

    registers: int
    shared: int
    spilled: int


def demangled(symbols: list[str]) -> list[str]:
    """Return kernels as the source names them: map_kernel<float, true, false>."""
    names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    lines = names.stdout.splitlines()
    lines = [re.sub(r"pysal::cuda::|\(anonymous namespace\)::|c10::|^void ", "", line) for line in lines]
    return [re.sub(r"\([^()]*\)$", "", line) for line in lines]


def read(report: Path) -> dict[tuple[str, str], Use]:
    """Return (kernel, architecture) -> use of one source file."""
    entries = re.split(r"Compiling entry function ", report.read_text())[1:]
    heads = [re.match(r"'(\w+)' for '(\w+)'", entry) for entry in entries]
    if not all(heads):
        sys.exit(f"cannot read {report}")
    names = demangled([head[1] for head in heads if head])
    uses = {}
    for name, head, entry in zip(names, heads, entries, strict=True):
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers, shared = re.search(r"Used (\d+) registers", entry), re.search(r"(\d+) bytes smem", entry)
        if head is None or stack is None or registers is None:
            sys.exit(f"cannot read {report}: {entry}")
        uses[name, head[2]] = Use(int(registers[1]), int(shared[1]) if shared else 0, sum(map(int, stack.groups())))
    return uses


def table(uses: dict[str, dict[tuple[str, str], Use]], release: str) -> str:
    """Return the Markdown between the markers."""
    lines = [
        f"nvcc {release}, -O3. One number: the same on sm_80 and sm_90. Two numbers: sm_80 / sm_90.",
        "",
        "| source | kernel | registers | shared memory, bytes | spilled, bytes |",
        "|---|---|---|---|---|",
    ]
    for stem, kernels in sorted(uses.items()):
        for name in sorted({name for name, _ in kernels}):
            pair = [kernels[name, architecture] for architecture in ARCHITECTURES]
            cells = [" / ".join(dict.fromkeys(str(use[k]) for use in pair)) for k in range(3)]
            lines.append(f"| {stem} | `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def check(committed: str, made: str) -> None:
    """Exit where the committed table does not say what the kernels are."""
    if committed.splitlines()[:1] == made.splitlines()[:1]:
        current = committed == made
    else:
        current = listed(committed) == listed(made)
        print(f"the table of docs/{PAGE.name} was made by another compiler, so only its list of kernels is checked")
    if not current:
        gone, new = listed(committed) - listed(made), listed(made) - listed(committed)
        print(*(f"- {line}" for line in sorted(gone)), *(f"+ {line}" for line in sorted(new)), sep="\n")
        sys.exit(f"the table of docs/{PAGE.name} is not that of csrc/cuda: run make cuda-table and commit it")


def listed(text: str) -> set[str]:
    """Return `source kernel` of every row."""
    return {" ".join(row) for row in re.findall(r"^\| (\w+) \| `(.*)` \|", text, re.MULTILINE)}


def main(reports: Path, release: str, write: bool) -> None:
    """Check spills, then write or check the table."""
    uses = {path.name.removesuffix(".cu.txt"): read(path) for path in sorted(reports.glob("*.cu.txt"))}
    flat = [(stem, *key, use) for stem, kernels in uses.items() for key, use in kernels.items()]
    if not flat or not all(uses.values()):
        sys.exit(f"no kernels in {reports}")
    spilling = [f"spills or stack: {stem} {name} {arch}: {use}" for stem, name, arch, use in flat if use.spilled]
    most = max(flat, key=lambda row: row[3].registers)
    print(f"{len(flat)} kernels x architectures, {len(spilling)} with spills or stack;", end=" ")
    print(f"most registers: {most[3].registers} ({most[0]} {most[1]} {most[2]})")
    if spilling:
        sys.exit("\n".join(spilling))
    if not {row[2] for row in flat}.issuperset(ARCHITECTURES):
        print(f"not compiled for both {' and '.join(ARCHITECTURES)}: the table of docs/{PAGE.name} was not checked")
        return
    before, rest = PAGE.read_text().split(BEGIN)
    committed, after = rest.split(END)
    made = table(uses, release)
    if write:
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
    else:
        check(committed.strip(), made)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "--write" in sys.argv[3:])
