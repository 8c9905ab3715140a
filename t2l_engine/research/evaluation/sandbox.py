"""Runs Python that a model wrote, beside the tests it has to pass.

A run is a process of its own, in namespaces of its own, on Linux.  What it cannot do: reach a network, signal or trace other
processes, start processes or threads, write anywhere but in a ``/tmp`` of its own (a few MiB of memory that vanish with it),
read standard input or the environment, outlive the time limit, use more memory than it may.  Where any of that cannot be
had, nothing is run.

What it can do: read every file outside ``/tmp`` that the user may read, talk to services through named sockets of the file
system or, in a virtual machine, to its host through vsock, and attack the kernel, of which nothing is filtered.  This is
meant for the mistakes of a model; hostile code belongs into a container or a virtual machine.  Nor is a verdict proof
against cheating: the tests run in the process of the program, so that one written to pass them without solving anything can.

This file is also the script that the process runs: it imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from typing import Any, Literal, NoReturn

Outcome = Literal["passed", "failed", "timeout"]

MIN_MEMORY_MB, MAX_SECONDS = 64, 3600.0
#: Bytes of one file and of all together, and open files, that a program may have.
_DISK, _OPEN = 16 << 20, 64
#: Seconds in which the process starts and ends, on a machine that does much else.
_GRACE = 60.0
#: Exit status where the program ended (not 0, which anything that is run instead may give) and where time was up; what is
#: written after the nonce.
_ENDED, _TIME_UP, _PASSED, _REFUSED = 93, 94, b"+", b"!"
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
        RuntimeError: the system is not Linux, or does not let this process isolate the program; nothing was run.
    """
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"seconds: expected a number in (0, {MAX_SECONDS:.0f}], got {seconds!r}")
    if memory_mb < MIN_MEMORY_MB:
        raise ValueError(f"memory_mb: expected at least {MIN_MEMORY_MB}, got {memory_mb!r}")
    if sys.platform != "linux":
        raise RuntimeError(f"sandbox: expected Linux, got {sys.platform}")
    nonce = os.urandom(16).hex()
    job = {"nonce": nonce, "program": program, "tests": tests, "seconds": seconds, "memory": memory_mb << 20}
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(job).encode())
        file.seek(0)
        status, said = _run(file, seconds + _GRACE)
    if said.startswith(nonce.encode() + _REFUSED):
        reason = said[len(nonce) + 1 :].decode(errors="replace")
        raise RuntimeError(
            f"sandbox: programs are only run isolated, which failed: {reason}; "
            "expected Linux 5.12 or later that lets this user make namespaces (containers often forbid it)"
        )
    if status not in (_ENDED, _TIME_UP):
        raise RuntimeError(f"sandbox: expected its process to report, got exit status {status}")
    if status == _TIME_UP:
        return "timeout"
    return "passed" if said == nonce.encode() + _PASSED else "failed"


def _run(job: Any, seconds: float) -> tuple[int | None, bytes]:
    """Exit status (None where it had to be killed) of this file run on ``job``, and the start of what it wrote."""
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", os.path.abspath(__file__)]
    with subprocess.Popen(
        command, env={}, cwd="/", stdin=job, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        status = None
        try:
            # The pipe is read afterwards: a program that writes more than it holds waits for its own end.
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return status, os.read(process.stdout.fileno(), 1 << 10)


# What follows runs in the process of its own: a launcher makes the namespaces; the first process in them keeps the time, and
# when it ends the kernel ends all others in them; the second one runs the program.

_NEW_USER, _NEW_OTHERS = 0x10000000, 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, IPC, processes, network
_NOBODY = 65534


def _call(name: str, *args: Any) -> None:
    """A function of libc; OSError names it where it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) == -1:
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")


def _isolate() -> None:
    """Namespaces of its own for this process and its children; every mount read-only, an empty ``/tmp``."""
    if os.geteuid() == 0:
        # The number of processes of root is not limited.  The effective user, whose files are read, stays.
        _call("setresuid", _NOBODY, -1, -1)
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _NEW_USER | _NEW_OTHERS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    read_only_private = (ctypes.c_uint64 * 4)(1, 0, 1 << 18, 0)  # struct mount_attr
    mount_setattr, here, recursive = ctypes.c_long(442), ctypes.c_int(-100), ctypes.c_uint(0x8000)
    size = ctypes.c_size_t(ctypes.sizeof(read_only_private))
    _call("syscall", mount_setattr, here, b"/", recursive, ctypes.byref(read_only_private), size)
    no_setuid_no_devices = ctypes.c_ulong(2 | 4)
    _call("mount", b"tmpfs", b"/tmp", b"tmpfs", no_setuid_no_devices, b"size=%d,nr_inodes=1024,mode=700" % _DISK)
    os.chdir("/tmp")


def _limit(seconds: float, memory: int) -> None:
    """Limits of this process, and no capability, nor a way to one."""
    import resource

    _call("unshare", _NEW_USER)  # in which no user is mapped: it can neither become one nor make further namespaces
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    for name, most in {
        "CPU": math.ceil(seconds) + 1,
        "AS": memory,
        "FSIZE": _DISK,
        "NOFILE": _OPEN,
        "NPROC": 0,
        "CORE": 0,
    }.items():
        which = getattr(resource, f"RLIMIT_{name}")
        held = resource.getrlimit(which)[1]
        most = most if held == resource.RLIM_INFINITY else min(most, held)
        resource.setrlimit(which, (most, most))


def _launch() -> NoReturn:
    job = json.load(sys.stdin.buffer)
    out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    try:
        _isolate()
        first = os.fork()
    except OSError as error:
        os.write(out, job["nonce"].encode() + _REFUSED + str(error).encode()[:400])
        os._exit(1)
    if first == 0:
        _keep_time(job, out)
    status = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    os._exit(_TIME_UP if status == _TIME_UP else _ENDED)


def _keep_time(job: dict[str, Any], out: int) -> NoReturn:
    # Blocked and waited for: Python's own handler would not run where SIGINT comes just before the wait.
    awaited = {signal.SIGCHLD, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    program = os.fork()
    if program == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        _work(job, out)
    end = time.monotonic() + job["seconds"]
    while os.waitpid(program, os.WNOHANG)[0] == 0:
        left = end - time.monotonic()
        if left <= 0:
            os._exit(_TIME_UP)
        came = signal.sigtimedwait(awaited, left)
        if came and came.si_signo == signal.SIGINT:  # of the program: with this process all others end
            os._exit(1)
    os._exit(0)


def _work(job: dict[str, Any], out: int) -> NoReturn:
    os.setsid()  # else it could signal the launcher, which is of the same group
    nonce = job["nonce"].encode()
    try:
        _limit(job["seconds"], job["memory"])
    except OSError as error:
        os.write(out, nonce + _REFUSED + str(error).encode()[:400])
        os._exit(1)
    module = sys.modules["program"] = types.ModuleType("program")
    execute, write, leave = exec, os.write, os._exit  # before a program can replace them
    try:
        for code in [compile(job[name], name, "exec", dont_inherit=True) for name in ("program", "tests")]:
            execute(code, module.__dict__)
    except BaseException:
        leave(1)
    write(out, nonce + _PASSED)
    leave(0)


if __name__ == "__main__":
    _launch()
