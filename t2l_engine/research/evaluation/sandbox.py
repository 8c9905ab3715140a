"""Runs Python that a model wrote, beside the tests it has to pass, in a sandbox made by bubblewrap.

What a program cannot do: reach a network, see, signal or trace processes of others, start processes or threads, write
anywhere but in a ``/tmp`` of its own (16 MiB of memory that vanish with it), read standard input or the environment, gain
rights or make namespaces, outlive the time limit, use more memory than it may.  Where any of that cannot be had, nothing is
run.

What it can do: read every file outside ``/tmp`` that the user may read, talk to services through named sockets of the file
system or, in a virtual machine, to its host through vsock, and attack the kernel, of which little is filtered.  This is
meant for the mistakes of a model; hostile code belongs into a container or a virtual machine.  Nor is a verdict proof
against cheating: the tests run in the process of the program, so that one written to pass them without solving anything can.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from typing import IO, Literal

Outcome = Literal["passed", "failed", "timeout"]

MIN_MEMORY_MB, MAX_SECONDS = 64, 3600.0
#: Bytes of one file and of all together, and open files, that a program may have.
_DISK, _OPEN = 16 << 20, 64
#: Seconds in which the sandbox starts, on a machine that does much else.
_GRACE = 60.0
#: No capability and no way to one; /proc of its own processes; of devices null, zero, random and the like.
_SANDBOX = (
    "--unshare-all --unshare-user --disable-userns --uid 65534 --gid 65534 --cap-drop ALL --new-session --die-with-parent "
    f"--ro-bind / / --proc /proc --dev /dev --remount-ro /dev --size {_DISK} --tmpfs /tmp --chdir /tmp"
).split()
#: By machine: its AUDIT_ARCH of linux/audit.h, and the numbers of clone, clone3, fork and vfork where it has them.
_FORKS = {"x86_64": (0xC000003E, (56, 435, 57, 58)), "aarch64": (0xC00000B7, (220, 435))}
#: What runs in it.  It says that it has begun, and at the end the nonce, where standard output was.
_INSIDE = """
import json, os, sys, types

job, out, null = json.load(sys.stdin.buffer), os.dup(1), os.open(os.devnull, os.O_RDWR)
for standard in range(3):
    os.dup2(null, standard)
module = sys.modules["program"] = types.ModuleType("program")
execute, write, leave = exec, os.write, os._exit  # before a program can replace them
write(out, b"!")
try:
    for code in [compile(job[name], name, "exec", dont_inherit=True) for name in ("program", "tests")]:
        execute(code, module.__dict__)
except BaseException:
    leave(1)
write(out, job["nonce"].encode())
leave(0)
"""
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_DEF = re.compile(r"^(?:async[ \t]+)?def[ \t]+(\w+)", re.M)


def extract(answer: str, prompt: str) -> str:
    """The program of a model's ``answer``: its first fenced block of Python (or of no language), else all of it.

    Where ``prompt`` begins a function (its last ``def`` at the start of a line) that the program does not define, the
    program continues the prompt; where it does, what stands before that ``def`` (imports, helpers) goes before it.

    >>> extract("    return x + 1", "def next(x):\\n")
    'def next(x):\\n    return x + 1'
    """
    blocks = (block[2] for block in _FENCE.finditer(answer) if block[1].lower() in ("", "py", "python", "python3"))
    program = next(blocks, None)
    fenced = program is not None
    program = program if fenced else answer
    started = list(_DEF.finditer(prompt))
    if not started:
        return program
    if started[-1][1] in (found[1] for found in _DEF.finditer(program)):
        return prompt[: started[-1].start()] + program
    return prompt + ("\n" if fenced and not prompt.endswith("\n") else "") + program


def check_sandbox() -> None:
    """RuntimeError, saying why, where programs cannot be run here; to be called before there are any."""
    outcome = run_tests(
        "import bisect, collections, decimal, heapq, itertools, math, re, typing", "assert True", seconds=60.0
    )
    if outcome != "passed":
        raise RuntimeError(f"sandbox: expected imports of the standard library to work in it, got {outcome!r}")


def run_tests(program: str, tests: str, *, seconds: float = 10.0, memory_mb: int = 512) -> Outcome:
    """Run ``program``, then ``tests`` in its namespace, with nothing but the standard library; nothing of it is left behind.

    Both are Python source, compiled one by one.  ``__name__`` is not ``"__main__"``.  What they print is discarded.

    Args:
        seconds: of wall clock, up to 3600.
        memory_mb: address space of the process, at least 64.

    Returns "passed" where both ran to their end, "timeout" where the time was up before, "failed" otherwise: an exception, a
    syntax error, an exit (whatever its status), a crash, too much memory.

    Raises:
        ValueError: a limit is out of range.
        RuntimeError: the system is not Linux on x86-64 or arm64, has no bubblewrap, or does not let it isolate the program;
            nothing was run.
    """
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"seconds: expected a number in (0, {MAX_SECONDS:.0f}], got {seconds!r}")
    if memory_mb < MIN_MEMORY_MB:
        raise ValueError(f"memory_mb: expected at least {MIN_MEMORY_MB}, got {memory_mb!r}")
    if sys.platform != "linux":
        raise RuntimeError(f"sandbox: expected Linux, got {sys.platform}")
    prlimit, bwrap = _program("prlimit", "util-linux"), _program("bwrap", "bubblewrap")
    if platform.machine() not in _FORKS:
        raise RuntimeError(f"sandbox: expected one of the machines {', '.join(_FORKS)}, got {platform.machine()}")
    nonce = os.urandom(16).hex()
    limits = {"cpu": math.ceil(seconds) + 1, "as": memory_mb << 20, "fsize": _DISK, "nofile": _OPEN, "core": 0}
    sandbox = [prlimit, *(f"--{name}={most}" for name, most in limits.items()), bwrap, *_SANDBOX]
    with _file(json.dumps({"nonce": nonce, "program": program, "tests": tests}).encode()) as job:
        said = _run(sandbox, job, seconds)
    return "timeout" if said is None else "passed" if said == nonce.encode() else "failed"


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"sandbox: expected the program {name} (package {package}) on PATH, found none")
    return path


def _file(content: bytes = b"") -> IO[bytes]:
    file = tempfile.TemporaryFile()
    file.write(content)
    file.seek(0)
    return file


def _no_processes() -> bytes:
    """A seccomp filter: starting a process or thread fails with EAGAIN, for root too, whom RLIMIT_NPROC does not bind."""
    machine, forks = _FORKS[platform.machine()]
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06  # BPF, linux/bpf_common.h
    allow, kill, again = 0x7FFF0000, 0x80000000, 0x50000 | errno.EAGAIN  # SECCOMP_RET_*, linux/seccomp.h
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (leave, 0, 0, kill), (load, 0, 0, 0)]  # struct seccomp_data: nr, arch
    code += [(at_least, 0, 1, 1 << 30), (leave, 0, 0, kill)]  # x32 calls by other numbers
    for number in forks:
        code += [(equal, 0, 1, number), (leave, 0, 0, again)]
    return b"".join(struct.pack("HBBI", *step) for step in [*code, (leave, 0, 0, allow)])


def _run(sandbox: list[str], job: IO[bytes], seconds: float) -> bytes | None:
    """What the process in ``sandbox`` wrote after it began; None where it was ended when its time was up."""
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", _INSIDE]
    with _file(_no_processes()) as forbidden, _file() as info:
        files = ["--seccomp", str(forbidden.fileno()), "--info-fd", str(info.fileno()), "--"]
        process = subprocess.Popen(
            [*sandbox, *files, *python],
            env={},  # /proc of the sandbox shows that of bubblewrap itself
            cwd="/",
            stdin=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[forbidden.fileno(), info.fileno()],
            start_new_session=True,
        )
        with process:
            try:
                return _watch(process, info, seconds)
            finally:
                process.kill()  # with it all others die


def _watch(process: subprocess.Popen[bytes], info: IO[bytes], seconds: float) -> bytes | None:
    began = select.select([process.stdout], [], [], _GRACE)[0] and os.read(process.stdout.fileno(), 1)
    if not began:
        process.kill()
        reason = process.stderr.read().decode(errors="replace").strip() or f"exit status {process.wait()}, nothing began"
        raise RuntimeError(
            f"sandbox: programs are only run isolated, which failed: {reason}; "
            "expected bubblewrap 0.8 or later on a Linux that lets this user make namespaces (containers often forbid it)"
        )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        # The first process inside: all others end before it, and bubblewrap after it.
        os.kill(json.loads(os.pread(info.fileno(), 1 << 10, 0))["child-pid"], signal.SIGKILL)
        process.wait()
        return None
    return process.stdout.read()  # not before: a program that writes more than a pipe holds waits for its own end
