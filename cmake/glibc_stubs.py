"""Writes linker stubs of an older glibc: ``python glibc_stubs.py DIR VERSION COMPILER [LIBTORCH_CPU]`` (2.28).

The linker binds a symbol to its newest version in this machine's glibc, and the result loads nowhere older.  A stub holds
the names of one library, each at its newest version up to VERSION and no code.  What is linked with ``-L DIR`` asks for
these versions; names that came later are undefined, which ``-z defs`` makes an error.  glibc keeps every version that it
has had, so the symbol tables of the compiler's own libraries are all that is needed.

With a libtorch_cpu.so, of whatever processor, also a stub of it, with its C interface: the same names on all of them.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

#: What the linker calls a library: the library.
LIBRARIES = {
    "c": "libc.so.6",
    "m": "libm.so.6",
    "pthread": "libpthread.so.0",
    "dl": "libdl.so.2",
    "rt": "librt.so.1",
}
#: "ld", by the compiler's processor.
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
#: All but empty since glibc 2.34; before, what is in libc now was in them.
SEPARATE = ("pthread", "dl", "rt")
TORCH = re.compile(r" FUNC +GLOBAL +DEFAULT +\d+ ((?:aoti_)?torch_\w+)$", re.M)
SYMBOL = re.compile(r" (?:FUNC|IFUNC|OBJECT|TLS|NOTYPE) +(?:GLOBAL|WEAK) +DEFAULT +\d+ (\w+)@@?GLIBC_([\d.]+)$", re.M)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def versions(library: str, limit: str) -> dict[str, list[str]]:
    """Version -> names that have it as their newest one up to ``limit``."""
    newest: dict[str, str] = {}
    for name, version in SYMBOL.findall(output("readelf", "--dyn-syms", "--wide", library)):
        if number(version) <= number(limit) and number(version) > number(newest.get(name, "0")):
            newest[name] = version
    by_version = defaultdict(list)
    for name, version in newest.items():
        by_version[version].append(name)
    return by_version


def library_file(compiler: str, name: str) -> str:
    path = output(compiler, f"-print-file-name={name}").strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{compiler} finds no {name}")
    return path


def write(compiler: str, folder: Path, name: str, library: str, symbols: Iterable[str], *options: str) -> None:
    """``lib<name>.so`` in place of ``library``."""
    source = folder / f"{name}.s"
    labels = (f".globl {symbol}\n.type {symbol}, @function\n{symbol}:\n" for symbol in symbols)
    source.write_text(".text\n" + "".join(labels) + '.section .note.GNU-stack,"",@progbits\n')
    options = ("-shared", "-nostdlib", f"-Wl,-soname,{library}", *options)
    subprocess.run([compiler, *options, str(source), "-o", str(folder / f"lib{name}.so")], check=True)


def main(folder: Path, limit: str, compiler: str, torch: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    processor = output(compiler, "-dumpmachine").partition("-")[0]
    for name, library in {**LIBRARIES, "ld": LOADERS[processor]}.items():
        by_version = versions(library_file(compiler, library), limit)
        if not by_version and name not in SEPARATE:
            raise SystemExit(f"{library}: found no symbol up to GLIBC_{limit}")
        script = folder / f"{name}.map"
        script.write_text(
            "".join(f"GLIBC_{v} {{ {' '.join(f'{n};' for n in names)} }};\n" for v, names in by_version.items())
        )
        symbols = itertools.chain.from_iterable(by_version.values())
        write(compiler, folder, name, library, symbols, f"-Wl,--version-script={script}")
    if torch:
        write(
            compiler, folder, "torch_cpu", Path(torch).name, TORCH.findall(output("readelf", "--dyn-syms", "--wide", torch))
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
