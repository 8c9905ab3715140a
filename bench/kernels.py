"""Registers, local memory and instructions of the compiled CUDA kernels, compared with a committed table.

Makes the table or compares with it (``--check``), without a device.  A kernel that breaks a rule (:func:`_faults`) fails.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench import records
from bench.harness import BenchError, record
from bench.records import ROOT

FILE = ROOT / "bench" / "results" / "kernels.jsonl"
COMMAND = "python -m bench kernels"
SOURCES = ("csrc/cuda/lora.cu", "csrc/cuda/hypernet.cu")
#: Architecture -> how nvcc compiles for it; after sm_90a from PTX, as drivers do.
ARCHS = {
    "sm_80": "-arch=sm_80",
    "sm_90a": "-arch=sm_90a",
    "sm_100": "-gencode=arch=compute_90,code=sm_100",
    "sm_120": "-gencode=arch=compute_90,code=sm_120",
}
#: Where ncu may be, which the toolkit's own folders lack in some installations.
NSIGHT_COMPUTE = "/opt/nvidia/nsight-compute/*"
FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-Icsrc", "-Icsrc/cuda", "-Werror", "all-warnings")
PTXAS_FLAGS = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"

THREADS, REGISTERS = 256, 64 * 1024  # of a block; of an SM, which gives them to threads in eights
#: Registers that a kernel may gain over the table, with the same nvcc and with another one.
SLACK, SLACK_OF_OTHERS = 8, 24
#: How much longer its code may be: a lost unrolling or a new division shows here.
GROWTH = 1.15
#: Of the LoRA kernels of decode steps, at most.
DECODE_INSTRUCTIONS = 1200
#: Tensor core instructions by the dtype of both operands.
PRODUCTS = {"bf16": "HMMA.16816.F32.BF16", "f16": "HMMA.16816.F32", "float": "HMMA.1688.F32.TF32"}

#: Of one kernel: ``registers`` of a thread, ``blocks`` of an SM by registers alone, ``static_shared`` bytes of a block,
#: ``stack`` and ``spills`` bytes of a thread (spills: stored and loaded); the rest are numbers of instructions.
Usage = dict[str, Any]


class Table(NamedTuple):
    """``nvcc``: its version; ``kernels``: by arch and the kernel as the sources name it, ``lora_kernel<bf16, 1, 2, 0>``."""

    nvcc: str
    kernels: dict[tuple[str, str], Usage]


class KernelError(BenchError):
    """No compiler, or it refuses the kernels; the message says what to do, or what it said."""


def find(tool: str) -> str:
    """Path of a program of the CUDA toolkit."""
    home, beside = os.environ.get("CUDA_HOME", "/usr/local/cuda"), os.path.dirname(os.environ.get("CUDACXX", ""))
    packages = os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    newest = sorted(glob.glob(NSIGHT_COMPUTE), reverse=True)
    places = [beside, os.path.join(home, "bin"), os.environ.get("PATH"), packages]
    path = shutil.which(tool, path=os.pathsep.join(filter(None, [*places, *newest])))
    if path is None:
        raise KernelError(f"{tool}: not found; install the CUDA toolkit 13, or pip install '.[cuda-check]'")
    return path


def run(tool: str, *arguments: str) -> str:
    """Output of a program of the toolkit, both streams; KernelError with its errors where it fails."""
    command, streams = [find(tool), *arguments], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    path = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(find("nvdisasm"))])  # cuobjdump starts it
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, text=True, **streams)
    if done.returncode:
        complaints = [line for line in demangled(done.stdout).splitlines() if not _REMARK.match(line)]
        raise KernelError("\n".join([f"{' '.join(command)}: exit status {done.returncode}", *complaints]))
    return done.stdout


def measured(jobs: int) -> Table:
    """Every kernel on every arch, from ``jobs`` compilers at a time."""
    version = re.search(r"release .*, V([\d.]+)", run("nvcc", "--version"))[1]
    units = [(source, arch) for arch in ARCHS for source in SOURCES]

    def compiled(unit: tuple[str, str]) -> dict[str, Usage]:
        source, arch = unit
        out = os.path.join(folder, f"{Path(source).stem}.{arch}")
        said = run("nvcc", "-cubin", PTXAS_FLAGS, ARCHS[arch], *FLAGS, source, "-o", out)
        return usages(said, run("cuobjdump", "-sass", out))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        found = zip(units, pool.map(compiled, units), strict=True)
        return Table(version, {(arch, name): usage for (_, arch), made in found for name, usage in made.items()})


_MANGLED = re.compile(r"_ZN3t2l6device\d+(\w+?_kernel)I(?:NS0_\d+(bf16|f16)E|f)((?:L[ib]\d+E)*)EEv\w+")
_NAME = re.compile(r"(lora|lora_grad|trunk|head)_kernel<(bf16|f16|float)((?:, \d+)*)>")
_PTXAS = re.compile(
    r"(?s)Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?"
)
_REMARK = re.compile(r"ptxas info|    \d+ bytes stack frame")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)")
#: griddepcontrol.wait of the PTX ISA, and what peek() of csrc/cuda/primitives.cuh is.
_WAIT, _PEEK = "ACQBULK", "LDG.E.STRONG.GPU"


def demangled(text: str) -> str:
    """``text`` with its kernels named as the sources name them."""
    return _MANGLED.sub(lambda m: f"{m[1]}<{', '.join([m[2] or 'float', *re.findall('[0-9]+', m[3])])}>", text)


def usages(ptxas: str, sass: str) -> dict[str, Usage]:
    """The kernels of a cubin, from the output of ``ptxas -v`` and ``cuobjdump -sass``."""
    code = dict(part.split("\n", 1) for part in sass.split("Function : ")[1:])
    properties = {said["name"]: said for said in _PTXAS.finditer(ptxas)}
    if code.keys() != properties.keys():
        raise KernelError(f"ptxas names {sorted(properties)}, cuobjdump {sorted(code)}")
    found = {}
    for name, said in properties.items():
        instructions = _INSTRUCTION.findall(code[name])
        opcodes = Counter(instructions)
        families = Counter(opcode.split(".")[0] for opcode in opcodes.elements())
        found[demangled(name)] = {
            "registers": int(said["registers"]),
            "blocks": blocks(int(said["registers"])),
            "static_shared": int(said["shared"] or 0),
            "stack": int(said["stack"]),
            "spills": int(said["stores"]) + int(said["loads"]),
            "local": families["LDL"] + families["STL"],
            "global_atomics": sum(families[family] for family in ("ATOM", "ATOMG", "RED", "REDG")),
            "async_copies": families["LDGSTS"],
            "cluster_barriers": families["UCGABAR_ARV"],
            "pdl_waits": families[_WAIT],
            "pdl_releases": families["PREEXIT"],
            "pdl_accesses": _accesses(instructions[: instructions.index(_WAIT)]) if _WAIT in instructions else 0,
            "instructions": families.total(),
            "products": {opcode: n for opcode, n in opcodes.items() if opcode.split(".")[0].endswith("MMA")},
        }
    return found


def _accesses(instructions: Sequence[str]) -> int:
    """Loads and stores of global memory other than peek(): before the PDL wait, earlier launches may still write there."""
    kinds = ("LD.", "LDG.", "LDGSTS", "ST.", "STG.", "ATOM", "RED")
    return sum(opcode.startswith(kinds) and opcode != _PEEK for opcode in instructions)


def blocks(registers: int) -> int:
    """Blocks that an SM has registers for."""
    return REGISTERS // (THREADS * -(-registers // 8) * 8)


def parts(kernel: str) -> tuple[str, str, list[int]]:
    """Kind, dtype and tiles of a kernel."""
    match = _NAME.fullmatch(kernel)
    if match is None:
        raise KernelError(f"{kernel}: a kernel that bench/kernels.py has no rules for")
    return match[1], match[2], [int(n) for n in match[3].split(", ")[1:]]


def designed_blocks(kernel: str) -> int:
    """Blocks of an SM that csrc/cuda/config.h cuts the work for."""
    kind, dtype, tiles = parts(kernel)
    small = {"lora": tiles[:1] == [1], "lora_grad": True, "head": tiles[:1] == [2], "trunk": False}
    return 2 if dtype != "float" and small[kind] else 1


def broken_rules(made: Table) -> list[str]:
    """A line for every rule that a kernel breaks."""
    found = made.kernels.items()
    return [f"{arch} {name}: {fault}" for (arch, name), usage in found for fault in _faults(arch, name, usage)]


def _faults(arch: str, kernel: str, usage: Usage) -> Iterator[str]:
    kind, dtype, tiles = parts(kernel)
    of_hopper = {"cluster_barriers": ("trunk", "lora"), "pdl_waits": ("lora", "head"), "pdl_releases": ("trunk",)}
    for key, kinds in of_hopper.items():
        if bool(usage[key]) != (wanted := kind in kinds and arch != "sm_80"):
            yield f"{usage[key]} {key.replace('_', ' ')}, expected {'some' if wanted else 'none'}"
    if usage["pdl_accesses"]:
        yield f"{usage['pdl_accesses']} accesses of memory before it waits for earlier launches, expected none"
    if usage["spills"] or usage["stack"] or usage["local"]:
        yield f"{usage['spills']} bytes of spills, {usage['stack']} of stack, {usage['local']} LDL and STL; expected none"
    if kind == "lora" and tiles[-1] == 1 and usage["instructions"] > DECODE_INSTRUCTIONS:
        yield f"{usage['instructions']} instructions, expected {DECODE_INSTRUCTIONS} at most (in a model its code is cold)"
    if usage["global_atomics"]:
        yield f"{usage['global_atomics']} atomic operations on global memory, expected none"
    if kind == "head" and not usage["async_copies"]:
        yield "no LDGSTS, expected asynchronous copies"
    # LoRA expands in TF32, and its gradients are sums in TF32.
    expected = {"lora": {PRODUCTS[dtype], PRODUCTS["float"]}, "lora_grad": {PRODUCTS["float"]}}.get(kind, {PRODUCTS[dtype]})
    if usage["products"].keys() != expected:
        yield f"products: {' and '.join(sorted(usage['products'])) or 'none'}, expected {' and '.join(sorted(expected))}"
    if usage["blocks"] < (wanted := designed_blocks(kernel)):
        yield f"{usage['registers']} registers leave room for {usage['blocks']} blocks, expected {wanted}"


def differences(made: Table, known: Table) -> list[str]:
    """A line for every kernel that only one side has, and for every one that gained more registers or code than it may."""
    slack = SLACK if made.nvcc == known.nvcc else SLACK_OF_OTHERS
    faults = []
    for key in sorted(made.kernels.keys() | known.kernels.keys()):
        title = " ".join(key)
        if key not in made.kernels:
            faults.append(f"{title}: in the table, but not compiled")
        elif key not in known.kernels:
            faults.append(f"{title}: not in the table; look at it, then {COMMAND}")
        elif (now := made.kernels[key]["registers"]) > (most := (was := known.kernels[key]["registers"]) + slack):
            faults.append(f"{title}: was {was} registers, is {now}, expected at most {most}")
        elif (now := made.kernels[key]["instructions"]) > GROWTH * (was := known.kernels[key]["instructions"]):
            faults.append(f"{title}: was {was} instructions, is {now}; look at it, then {COMMAND}")
    return faults


def read(file: Path) -> Table:
    if not file.is_file():
        raise KernelError(f"{file}: no such file; make it with {COMMAND}")
    result = records.read(file)
    own = ("record", "arch", "kernel")
    kernels = {(r["arch"], r["kernel"]): {k: v for k, v in r.items() if k not in own} for r in result.records("kernel")}
    return Table(result.run["versions"]["nvcc"], kernels)


def command(check: bool, jobs: int, file: Path = FILE) -> str:
    """Compiles, and compares with the table in ``file`` or writes it; a summary, or KernelError with a line a fault."""
    known = read(file) if check else None
    made = measured(jobs)
    if faults := broken_rules(made) + (differences(made, known) if known else []):
        raise KernelError("\n".join(faults))
    if not check:
        run = record("run", suite="kernels", command=COMMAND, versions={"nvcc": made.nvcc})
        kernels = (record("kernel", arch=arch, kernel=name, **of) for (arch, name), of in sorted(made.kernels.items()))
        file.write_text("".join(json.dumps(one) + "\n" for one in (run, *kernels)), encoding="utf-8")
    said = f"{len(made.kernels)} kernels of nvcc {made.nvcc} keep the rules"
    if known and made.nvcc != known.nvcc:
        said += f"; the table is of nvcc {known.nvcc}: {SLACK_OF_OTHERS} more registers are allowed, not {SLACK}"
    return said
