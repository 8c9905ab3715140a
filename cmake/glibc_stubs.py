"""Writes linker stubs of an older glibc: ``python glibc_stubs.py DIR VERSION`` (2.28).

The linker binds a symbol to its newest version in this machine's glibc, and the result loads nowhere older.  A stub holds
the names of one library, each at its newest version up to VERSION and no code.  What is linked with ``-L DIR`` asks for
these versions; names that came later are undefined, which ``-z defs`` makes an error.  glibc keeps every version that it
has had, so the symbol tables of this machine's libraries are all that is needed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

#: What the linker calls a library: the library.
LIBRARIES = {
    "c": "libc.so.6",
    "m": "libm.so.6",
    "ld": "ld-linux-x86-64.so.2",
    "pthread": "libpthread.so.0",
    "dl": "libdl.so.2",
    "rt": "librt.so.1",
}
#: All but empty since glibc 2.34; before, what is in libc now was in them.
SEPARATE = ("pthread", "dl", "rt")
SYMBOL = re.compile(r" (?:FUNC|IFUNC|OBJECT|TLS|NOTYPE) +(?:GLOBAL|WEAK) +DEFAULT +\d+ (\w+)@@?GLIBC_([\d.]+)$", re.M)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def symbols(library: str, limit: str) -> dict[str, list[str]]:
    """Version -> names that have it as their newest one up to ``limit``."""
    table = subprocess.run(["readelf", "--dyn-syms", "--wide", library], capture_output=True, text=True, check=True).stdout
    newest: dict[str, str] = {}
    for name, version in SYMBOL.findall(table):
        if number(version) <= number(limit) and number(version) > number(newest.get(name, "0")):
            newest[name] = version
    by_version = defaultdict(list)
    for name, version in newest.items():
        by_version[version].append(name)
    return by_version


def library_file(compiler: str, name: str) -> str:
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{compiler} finds no {name}")
    return path


def write(compiler: str, folder: Path, short: str, name: str, by_version: dict[str, list[str]]) -> None:
    source, script = folder / f"{short}.s", folder / f"{short}.map"
    labels = (
        f".globl {symbol}\n.type {symbol}, @function\n{symbol}:\n" for names in by_version.values() for symbol in names
    )
    source.write_text(".text\n" + "".join(labels) + '.section .note.GNU-stack,"",@progbits\n')
    script.write_text("".join(f"GLIBC_{v} {{ {' '.join(f'{n};' for n in names)} }};\n" for v, names in by_version.items()))
    options = ["-shared", "-nostdlib", f"-Wl,-soname,{name}", f"-Wl,--version-script={script}"]
    subprocess.run([compiler, *options, str(source), "-o", str(folder / f"lib{short}.so")], check=True)


def main(folder: Path, limit: str, compiler: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for short, name in LIBRARIES.items():
        by_version = symbols(library_file(compiler, name), limit)
        if not by_version and short not in SEPARATE:
            raise SystemExit(f"{name}: found no symbol up to GLIBC_{limit}")
        write(compiler, folder, short, name, by_version)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "cc")
