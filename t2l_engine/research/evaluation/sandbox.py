"""Runs model-written Python with its tests in a bubblewrap sandbox.

A program cannot access a network; see, signal or trace other processes; start processes or threads; write outside its own
``/tmp`` (16 MiB of memory, discarded afterwards); read standard input or the environment; gain privileges or create
namespaces; exceed its time or memory limit.  If any of this cannot be enforced, nothing is run.

A program can read every file outside ``/tmp`` that the user can read, connect to named sockets in the file system or, in a
virtual machine, to the host through vsock, and make most system calls.  The sandbox is meant for faulty programs; run
hostile code in a container or a virtual machine.  A program can also pass without solving its task: the tests run in its
process.
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

#: Bytes of memory (address space) that a program may have.
MEMORY = 512 << 20
#: Bytes of one file and of all together, and open files, that a program may have.
_DISK, _OPEN = 16 << 20, 64
#: Seconds allowed for the sandbox to start, on a busy machine.
_GRACE = 60.0
#: No capabilities, no new namespaces, its own /proc, a minimal /dev.
_SANDBOX = (
    "--unshare-all --unshare-user --disable-userns --uid 65534 --gid 65534 --cap-drop ALL --new-session --die-with-parent "
    f"--ro-bind / / --proc /proc --dev /dev --remount-ro /dev --size {_DISK} --tmpfs /tmp --chdir /tmp"
).split()
#: Machine -> AUDIT_ARCH of linux/audit.h and the system call numbers of clone, clone3, fork and vfork.
_FORKS = {"x86_64": (0xC000003E, (56, 435, 57, 58)), "aarch64": (0xC00000B7, (220, 435))}
#: Program that runs in the sandbox; writes "!" to standard output when it starts and the nonce when the tests passed.
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
    """The program in a model's ``answer``: its first fenced block of Python (or without language), else the whole answer.

    If ``prompt`` begins a function (its last ``def`` at the start of a line) that the program does not define, the program
    is appended to the prompt; otherwise the text before that ``def`` (imports, helpers) is prepended to the program.

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
    """Check that programs can be run on this machine; RuntimeError with the reason otherwise."""
    outcome = run_tests(
        "import bisect, collections, decimal, heapq, itertools, math, re, typing", "assert True", seconds=60.0
    )
    if outcome != "passed":
        raise RuntimeError(f"sandbox: expected imports of the standard library to work in it, got {outcome!r}")


def run_tests(program: str, tests: str, *, seconds: float = 10.0) -> Outcome:
    """Run ``program``, then ``tests`` in its namespace, in the sandbox with the standard library.

    Both are Python source and compiled separately.  ``__name__`` is not ``"__main__"``.  Output is discarded.

    ``seconds``: wall-clock limit.

    Returns "passed" if both ran to their end, "timeout" if the time limit was reached, else "failed": an exception, a syntax
    error, an exit with any status, a crash, the memory limit.

    Raises RuntimeError if the system is not Linux on x86-64 or arm64, lacks bubblewrap, or does not allow the isolation;
    nothing was run.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"sandbox: expected Linux, got {sys.platform}")
    prlimit, bwrap = _program("prlimit", "util-linux"), _program("bwrap", "bubblewrap")
    if platform.machine() not in _FORKS:
        raise RuntimeError(f"sandbox: expected one of the machines {', '.join(_FORKS)}, got {platform.machine()}")
    nonce = os.urandom(16).hex()
    limits = {"cpu": math.ceil(seconds) + 1, "as": MEMORY, "fsize": _DISK, "nofile": _OPEN, "core": 0}
    sandbox = [prlimit, *(f"--{name}={limit}" for name, limit in limits.items()), bwrap, *_SANDBOX]
    with _file(json.dumps({"nonce": nonce, "program": program, "tests": tests}).encode()) as job:
        output = _run(sandbox, job, seconds)
    return "timeout" if output is None else "passed" if output == nonce.encode() else "failed"


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
    """A seccomp filter under which starting a process or thread fails with EAGAIN; RLIMIT_NPROC would not apply to root."""
    machine, forks = _FORKS[platform.machine()]
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06  # BPF, linux/bpf_common.h
    allow, kill, again = 0x7FFF0000, 0x80000000, 0x50000 | errno.EAGAIN  # SECCOMP_RET_*, linux/seccomp.h
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (leave, 0, 0, kill), (load, 0, 0, 0)]  # struct seccomp_data: nr, arch
    code += [(at_least, 0, 1, 1 << 30), (leave, 0, 0, kill)]  # x32 system calls have other numbers
    for number in forks:
        code += [(equal, 0, 1, number), (leave, 0, 0, again)]
    return b"".join(struct.pack("HBBI", *step) for step in [*code, (leave, 0, 0, allow)])


def _run(sandbox: list[str], job: IO[bytes], seconds: float) -> bytes | None:
    """Output of the sandboxed process after its start mark; None if it was killed at the time limit."""
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", "-c", _INSIDE]
    with _file(_no_processes()) as forbidden, _file() as info:
        files = ["--seccomp", str(forbidden.fileno()), "--info-fd", str(info.fileno()), "--"]
        process = subprocess.Popen(
            [*sandbox, *files, *python],
            env={},  # bubblewrap's environment is visible in the sandbox's /proc
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
                process.kill()  # kills the whole sandbox (--die-with-parent)


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
        # The init process of the sandbox: its end kills all others, then bubblewrap exits.
        os.kill(json.loads(os.pread(info.fileno(), 1 << 10, 0))["child-pid"], signal.SIGKILL)
        process.wait()
        return None
    return process.stdout.read()  # not earlier: a program that fills the pipe blocks until the time limit
