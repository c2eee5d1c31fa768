"""Writes libraries to link against, in place of this machine's glibc: those of an older one, with no code in them.

A symbol is bound to the newest version of it that the library at hand has, so what is linked on a machine runs on no older
one. glibc keeps its old versions, though: here each symbol gets the newest that the older glibc had too. A symbol that it
had not is missing, so that whatever needs it fails to link.

    python wheels/old_glibc.py FOLDER 2.28
"""

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path

# What libc.so.6 has had only since glibc 2.34 was in libraries of its own before; all of them are still there, empty.
HOMES = {
    "libdl.so.2": r"dl|_dl",
    "librt.so.1": r"shm_|aio_|lio_|mq_|timer_",
    "libpthread.so.0": r"_?_?pthread_|sem_|__errno_location$",
}
COMPILER = shlex.split(os.environ.get("CC", "cc"))


def output_of(*command: str) -> str:
    """Return what a command printed."""
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}).stdout


def number(version: str) -> tuple[int, ...]:
    """Return a version, GLIBC_2.2.5, as what compares."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def exported(library: str) -> dict[str, dict[str, str]]:
    """Return what a library of this machine exports: symbol -> version -> FUNC or OBJECT."""
    path = output_of(*COMPILER, f"-print-file-name={library}").strip()
    found: dict[str, dict[str, str]] = {}
    for line in output_of("readelf", "--wide", "--dyn-syms", path).splitlines():
        # 12: 0000000000091b60   157 FUNC    GLOBAL DEFAULT   15 shm_open@@GLIBC_2.34
        match = re.search(r" (FUNC|IFUNC|OBJECT) +(?:GLOBAL|WEAK|UNIQUE) +DEFAULT +\d+ ([\w.]+)@@?(GLIBC_[\d.]+)$", line)
        if match:
            kind, name, version = match.groups()
            found.setdefault(name, {})[version] = "object" if kind == "OBJECT" else "function"
    return found


def home(name: str, versions: dict[str, str], library: str, oldest: tuple[int, ...]) -> str:
    """Return the library that a symbol of this machine's `library` was in."""
    moved = library == "libc.so.6" and max(map(number, versions)) > oldest
    return next((old for old, names in HOMES.items() if moved and re.match(names, name)), library)


def write(library: str, symbols: dict[str, tuple[str, str]], folder: Path) -> None:
    """Write a library of that name, with no code in it, and those symbols: name -> version, function or object."""
    lines, nodes = [".data"], sorted({version for version, _ in symbols.values()}, key=number)
    for name, (_, kind) in sorted(symbols.items()):
        lines += [f".globl {name}", f".type {name}, @{kind}", f".size {name}, 8", f"{name}: .quad 0"]
    lines += ['.section .note.GNU-stack,"",@progbits', ""]
    names = {node: "".join(f"{name};" for name, (version, _) in sorted(symbols.items()) if version == node) for node in nodes}
    source, script = folder / "stub.s", folder / "stub.map"
    source.write_text("\n".join(lines))
    script.write_text("\n".join(f"{node} {{ {names[node]} }};" for node in nodes))
    options = ["-shared", "-nostdlib", f"-Wl,-soname,{library},--version-script={script}"]
    subprocess.run([*COMPILER, *options, os.fspath(source), "-o", os.fspath(folder / library)], check=True)
    source.unlink()
    script.unlink()


def main() -> None:
    """Write the libraries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("version", help="of the older glibc: 2.28")
    arguments = parser.parse_args()
    folder, oldest = arguments.folder.resolve(), number(arguments.version)
    folder.mkdir(parents=True, exist_ok=True)
    libraries: dict[str, dict[str, tuple[str, str]]] = {library: {} for library in ("libc.so.6", "libm.so.6", *HOMES)}
    for library in ("libc.so.6", "libm.so.6"):
        for name, versions in exported(library).items():
            old = [version for version in versions if number(version) <= oldest]
            if old:
                newest = max(old, key=number)
                libraries[home(name, versions, library, oldest)][name] = newest, versions[newest]
    for library, symbols in libraries.items():
        write(library, symbols, folder)
        if library != "libc.so.6":
            (folder / f"{library.split('.so')[0]}.so").write_text(f"INPUT ( {folder / library} )\n")
    # glibc's own libc.so is a script too: the part of it that is linked statically is this machine's
    rest = output_of(*COMPILER, "-print-file-name=libc_nonshared.a").strip()
    loader = re.search(r"AS_NEEDED \([^)]*\)", Path(output_of(*COMPILER, "-print-file-name=libc.so").strip()).read_text())
    moved = " ".join(os.fspath(folder / library) for library in HOMES)
    parts = [os.fspath(folder / "libc.so.6"), rest, loader[0] if loader else "", f"AS_NEEDED ( {moved} )"]
    (folder / "libc.so").write_text(f"GROUP ( {' '.join(parts)} )\n")


if __name__ == "__main__":
    main()
