"""Programs of a model: what an answer's program is, and that running one harms nothing."""

import functools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from t2l_engine.research.evaluation import sandbox as code
from t2l_engine.research.evaluation.sandbox import check_sandbox, extract, run_tests

PROMPT = 'from math import pi\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r):\n    """Of a circle."""\n'
WHOLE = "def area(r):\n    return pi * r * r\n"


@pytest.mark.parametrize("answer, prompt, program", [
    *((answer, PROMPT, PROMPT + "    return 1\n") for answer in (
        "    return 1\n", "Here:\n```python\n    return 1\n```\nDone.")),
    ("Here:\n```python\n    return 1\n```", PROMPT.rstrip(), PROMPT.rstrip() + "\n    return 1\n"),
    *((answer, PROMPT, PROMPT[: PROMPT.index("def area")] + WHOLE) for answer in (
        WHOLE, f"```Python\n{WHOLE}```\n```python\nx\n```")),
    ("def areas(r):\n    pass", PROMPT, PROMPT + "def areas(r):\n    pass"),
    ("async def area(r): ...", "async def area(r):\n", "async def area(r): ..."),
    *((answer, "Write x.", program) for answer, program in {
        "x = 1": "x = 1", "```\nx = 1\n```": "x = 1\n", "```bash\nls\n```\nthen\n```py\nx = 1\n": "x = 1\n",
        "```bash\nls\n```\n": "```bash\nls\n```\n", "": ""}.items()),
])  # fmt: skip
def test_program_of_an_answer(answer, prompt, program):
    assert extract(answer, prompt) == program


def test_extraction_takes_linear_time():
    """Milliseconds; were it the square of these sizes, hours, and the guard of all tests would end it."""
    for answer in ("```" * 2_000_000, "```\n" * 2_000_000, "```python\n" + " " * 5_000_000, "def f" * 2_000_000):
        extract(answer, PROMPT)


@pytest.fixture(scope="module")
def sandbox():
    """Skips where bubblewrap says that this machine lets nothing be isolated; a sandbox that does not work fails."""
    needed = "--unshare-all --unshare-user --disable-userns --ro-bind / / --proc /proc --dev /dev".split()
    if shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap here")
    probe = subprocess.run(["bwrap", *needed, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"bubblewrap: {probe.stderr}")
    check_sandbox()


@pytest.fixture
def run(sandbox, monkeypatch):
    """``run_tests``; afterwards no process of its sessions is left."""
    processes = []
    popen = subprocess.Popen
    monkeypatch.setattr(code.subprocess, "Popen", lambda *a, **k: processes.append(popen(*a, **k)) or processes[-1])
    yield functools.partial(run_tests, seconds=600.0)
    sessions = {int(stat.rpartition(")")[2].split()[3]) for stat in _of_every_process("stat")}
    assert not sessions.intersection(process.pid for process in processes)


def _of_every_process(name):
    """A file of ``/proc/<pid>`` of each process."""
    for path in Path("/proc").glob(f"[0-9]*/{name}"):
        try:
            yield path.read_text()
        except OSError:  # it has ended
            continue


def refuses(statement, *errors):
    """A program that fails unless ``statement`` raises one of ``errors``."""
    return f"try:\n    {statement}\nexcept ({', '.join(errors)},):\n    pass\nelse:\n    raise AssertionError\n"


PASSING = [
    ("def f(): return 1", "assert f() == 1"),
    ("from typing import List\r\ndef f(x: List[int]):\r\n    return x", "assert f([1]) == [1]"),
    ("print('x' * 10_000_000)", "assert True"), (refuses("input()", "EOFError"), ""),
    ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int'", "assert A(1).x == 1"),
    ("if __name__ == '__main__':\n    raise ValueError", ""),
]  # fmt: skip
FAILING = [
    ("def f(): return 1", "assert f() == 2"), ("raise KeyError", "assert True"), ("def f(:", "assert True"),
    ("x = 1", "assert x =="), ("x = 1\n'''", "assert x == 2\n''''''"), ("x = '\ud800'", ""), ("\0", ""),
    ("(" * 100_000, ""), ("import sys\nsys.exit(0)", "assert True"), ("raise SystemExit", "assert True"),
    ("import os\nos._exit(0)", "assert True"), ("import os\nos.execv('/bin/true', ['true'])", "assert True"),
    ("import os\nfor i in range(64):\n    try: os.write(i, b'+' * 64)\n    except OSError: pass", "assert 0"),
    ("import builtins, os\nbuiltins.exec = os.write = os._exit = print", "assert 0"),
    ("import ctypes\nctypes.string_at(0)", ""), ("import numpy", ""),
]  # fmt: skip


@pytest.mark.parametrize("program, tests, outcome", [*((*case, "passed") for case in PASSING),
                                                     *((*case, "failed") for case in FAILING)])  # fmt: skip
def test_outcomes(run, program, tests, outcome):
    assert run(program, tests) == outcome


@pytest.mark.parametrize("program", [
    "while True: pass",
    "import signal, time\nfor i in {*range(1, 32)} - {9, 19}: signal.signal(i, signal.SIG_IGN)\ntime.sleep(60)",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
])  # fmt: skip
def test_time(run, program):
    began = time.monotonic()
    assert run(program, "", seconds=1) == "timeout"
    assert time.monotonic() - began >= 1


def test_a_program_that_became_another_is_ended(run):
    duration = f"60.{os.getpid()}"
    assert run(f"import os\nos.execv('/bin/sleep', ['sleep', '{duration}'])", "", seconds=1) == "timeout"
    assert not [arguments for arguments in _of_every_process("cmdline") if duration in arguments]


def test_memory(run, monkeypatch):
    """The limit binds bubblewrap's own first process too, which a program can reach."""
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))", "", seconds=60) == "failed"
    assert run("x = bytearray(200 << 20)", "") == "passed"
    read = "import re\nfound = re.search(r'address space +(\\d+)', open('/proc/1/limits').read())[1]"
    assert run(read, "assert found == str(512 << 20)") == "passed"
    monkeypatch.setattr(code, "MEMORY", 128 << 20)
    assert run("x = bytearray(200 << 20)", "") == "failed"


def test_processes_and_threads(run):
    assert run("import os\nwhile True: os.fork()", "") == "failed"
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, "", seconds=1) == "timeout"
    assert run("import os\n" + refuses("os.fork()", "BlockingIOError"), "") == "passed"
    assert run("import threading\n" + refuses("threading.Thread(target=print).start()", "RuntimeError"), "") == "passed"
    assert run("import subprocess\n" + refuses("subprocess.run(['true'])", "OSError"), "") == "passed"


def test_other_processes_are_out_of_reach(run):
    victim = subprocess.Popen(["sleep", "3600"])
    try:
        assert run("import os\n" + refuses("os.kill(-1, 9)", "ProcessLookupError"), "") == "passed"
        assert run(f"import os\n{refuses(f'os.kill({victim.pid}, 9)', 'ProcessLookupError')}", "") == "passed"
        assert run("import os\nos.kill(0, 9)", "") == "failed"
        assert run("import os\nfor number in (2, 9, 15, 17, 19): os.kill(1, number)", "") == "passed"
        assert run(refuses(f"open('/proc/{victim.pid}/environ').read()", "OSError"), "") == "passed"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_no_network(run):
    met = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(600)

        def accept():
            met.append(server.accept()[0].recv(8))

        waiting = threading.Thread(target=accept)
        waiting.start()
        port = server.getsockname()[1]
        connect = f"socket.create_connection(('127.0.0.1', {port}), 600).send(b'inside')"
        assert run("import socket\n" + refuses(connect, "OSError"), "") == "passed"
        assert run(f"import socket\n{connect}", "") == "failed"
        with socket.create_connection(("127.0.0.1", port)) as plain:  # the server does answer
            plain.send(b"outside")
            waiting.join()
    assert met == [b"outside"]


def test_files(run, tmp_path):
    (tmp_path / "kept").write_text("kept")
    for statement in (
        f"open({str(tmp_path / 'new')!r}, 'w')", f"os.remove({str(tmp_path / 'kept')!r})",
        f"open({str(Path(__file__).parent / 'new')!r}, 'w')", f"os.utime({__file__!r})", "open('/dev/shm/new', 'w')",
        "open('/var/tmp/new', 'w')",
    ):  # fmt: skip
        assert run("import os\n" + refuses(statement, "OSError"), "") == "passed", statement
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    own = "import os, tempfile\nassert os.getcwd() == tempfile.gettempdir() == '/tmp' and os.listdir() == []\n"
    left = os.urandom(8).hex()  # a name that nothing outside has
    assert run(f"{own}open('{left}', 'w').write('x' * 1_000_000)", f"assert os.listdir() == ['{left}']") == "passed"
    assert not os.path.exists(f"/tmp/{left}")
    assert run("open('x', 'wb').write(bytes(100 << 20))", "") == "failed"
    assert run("for i in range(100): open(f'x{i}', 'wb').write(bytes(1 << 20))", "") == "failed"
    assert run("kept = [open('/dev/null') for _ in range(100)]", "") == "failed"


def test_no_rights(run, monkeypatch):
    monkeypatch.setenv("T2L_SECRET", "told")
    assert run("import os\nassert not os.environ.keys() - {'LC_CTYPE', 'PWD'}, os.environ", "") == "passed"
    assert run("assert not open('/proc/1/environ').read()", "") == "passed"
    held = "lines = open('/proc/thread-self/status').read().split('\\n')"
    assert run(held, "assert 'CapEff:\\t' + '0' * 16 in lines and 'NoNewPrivs:\\t1' in lines") == "passed"
    libc = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
    for flag in (0x10000000, 0x00020000, 0x40000000):
        assert run(f"{libc}assert libc.unshare({flag}) == -1", "") == "passed"
    assert run(f"{libc}assert libc.umount2(b'/tmp', 2) == -1", "") == "passed"
    for ids in ("0, 0, 0", "65534, 0, 0", "1000, 1000, 1000"):
        assert run("import os\n" + refuses(f"os.setresuid({ids})", "OSError"), "") == "passed"


@pytest.mark.parametrize("lacking", ["bwrap", "prlimit", "riscv64", "darwin"])
def test_on_other_machines_nothing_runs(monkeypatch, lacking):
    """Without a program, where system calls have other numbers, on another system."""
    if lacking == "riscv64":
        monkeypatch.setattr(code.platform, "machine", lambda: lacking)
    if lacking == "darwin":
        monkeypatch.setattr(sys, "platform", lacking)
    which = code.shutil.which
    monkeypatch.setattr(code.shutil, "which", lambda program: None if program == lacking else which(program) or program)
    monkeypatch.setattr(code.subprocess, "Popen", None)
    for call in (check_sandbox, lambda: run_tests("", "")):
        with pytest.raises(RuntimeError, match=f"sandbox: .*{lacking}"):
            call()


def test_without_namespaces_nothing_runs(sandbox):
    refusing = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    statement = f"import runpy; runpy.run_path({code.__file__!r})['run_tests']('', '')"
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", refusing, "sh", sys.executable, "-c", statement]
    found = subprocess.run(command, capture_output=True, text=True)
    assert "RuntimeError: sandbox: programs are only run isolated, which failed: " in found.stderr
    assert found.returncode == 1


def test_a_process_that_does_not_report(sandbox, monkeypatch):
    monkeypatch.setattr(code.sys, "executable", "/bin/true")
    with pytest.raises(RuntimeError, match="which failed: exit status 0, nothing began"):
        check_sandbox()
