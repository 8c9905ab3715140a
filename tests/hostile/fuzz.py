"""Fuzzing of everything that reads files: ``python tests/hostile/fuzz.py [--seconds 600] [--seed 0] [--only LOADER ...]``.

One file of a good folder is replaced by a mutated one and the folder is loaded.  An input names a target (folder, file and
loader), a form and a payload.  The form says what the payload is: the whole file, the pickle of a torch archive whose
checksums are made to fit, or the header of a safetensors file; so mutations reach what a checksum would hide.  With atheris
installed they are guided by coverage, otherwise they are random.

A failure is an exception other than ValueError and FileNotFoundError, an unbounded message, a crash, more than 10 seconds,
more memory than a refusal may take, or anything executed.  The folder is then kept, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import pkgutil
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import yaml

try:
    import atheris
except ImportError:
    atheris = None

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["t2l_engine"]) if atheris else contextlib.nullcontext():
    import t2l_engine
    from tests.hostile import (
        LOADER_OF,
        LOADERS,
        MARKER,
        MESSAGE_LIMIT,
        MODELS,
        Workshop,
    )
    from tests.hostile.__main__ import reset_peak, status
    from tests.hostile.archive import dumps, pack, parts
    from tests.hostile.payloads import CALLS, RAW
    from tests.hostile.safetensors_files import join, split

    for module in pkgutil.iter_modules(t2l_engine.__path__, "t2l_engine."):
        if not module.ispkg and module.name.rpartition(".")[2] not in ("_C", "_core", "__main__"):
            importlib.import_module(module.name)  # else those imported late would not be followed

#: An input that takes longer is a finding.
SECONDS_LIMIT = 10.0
REFERENCE = [("hypermod.pt", "hypernetwork"), ("args.yaml", "hypernetwork"), ("adapter_config.json", "hypernetwork")]
NATIVE = [("config.json", loader) for loader in ("hypernetwork", "describe", "encoder")]
TARGETS = [
    *((base, *target) for base in ("L-sft", "M-recon-z", "S-pos-sft") for target in REFERENCE),
    *(("native", *target) for target in [*NATIVE, ("hypernet.safetensors", "hypernetwork")]),
    *(("adapter", file, "adapters") for file in ("adapter_config.json", "adapter_model.safetensors")),
    *(("tasks", file, "tasks") for file in ("descriptions.json", "copy.jsonl")),
    *((base, "config.json", LOADER_OF[base]) for base in MODELS),
    ("manifest", "manifest.json", "manifest"),
    ("sni", "task001_colours.json", "sni"),
    *(("benchmarks", f"{name}.jsonl", "benchmarks") for name in ("openbookqa", "hellaswag", "mbpp")),
    ("settings", "run.yaml", "settings"),
]
WHOLE, INNER = 0, 1  # the form: the file, or the pickle or header inside it
MAX_PAYLOAD = 1 << 19
#: What replaces a value in a configuration or header.
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 5000]
VALUES += [
    "../../etc/passwd",
    "{layer.__class__}",
    "(a+)+$",
    ".*.*.*x",
    [],
    [[]],
    [0, 1 << 62],
    {},
    {"q_proj": 8},
    "F64",
    "M",
]


class Failure(Exception):
    """What is wrong with how a folder was read."""


class Harness:
    """Folders, one after another, each with a mutated file."""

    def __init__(self, directory: Path, seed: int):
        self.directory = directory
        self.random = random.Random(seed)
        self.shop = Workshop(directory, seed)
        self.good = {base: {p.name: p.read_bytes() for p in folder.iterdir()} for base, folder in self.shop.bases.items()}
        self.records = {}
        for base in {base for base, file, _ in TARGETS if file == "hypermod.pt"}:
            claims, records = parts(torch.load(self.shop.bases[base] / "hypermod.pt", weights_only=True))
            self.records[base] = dumps(claims), records
        self.runs = self.loaded = 0

    def seeds(self, loaders: list[str]) -> list[bytes]:
        """Inputs to begin with, of ``loaders`` (empty: of all)."""
        inputs = []
        for index, (base, file, loader) in enumerate(TARGETS):
            if loaders and loader not in loaders:
                continue
            content = self.good[base][file]
            inputs.append(bytes([index, WHOLE]) + content)
            if file == "hypermod.pt":
                pickles = [self.records[base][0], *RAW.values(), *(dumps({"mixer.4.bias": call}) for call in CALLS.values())]
                inputs += [bytes([index, INNER]) + pickled for pickled in pickles if len(pickled) < MAX_PAYLOAD]
            if file.endswith(".yaml"):  # JSON is YAML, and its values can be replaced
                inputs.append(bytes([index, WHOLE]) + json.dumps(yaml.safe_load(content)).encode())
            if file.endswith(".safetensors"):
                inputs.append(bytes([index, INNER]) + json.dumps(split(content)[0]).encode())
        return inputs

    def content(self, base: str, file: str, form: int, payload: bytes) -> bytes:
        if form == INNER and file == "hypermod.pt":
            return pack(payload, self.records[base][1])
        if form == INNER and file.endswith(".safetensors"):
            return join(payload, split(self.good[base][file])[1])
        return payload

    def run(self, data: bytes) -> None:
        """Load the folder that ``data`` describes; raise Failure where it is neither loaded nor refused properly."""
        if len(data) < 2:
            return
        base, file, loader = TARGETS[data[0] % len(TARGETS)]
        shutil.rmtree(self.directory / "case", ignore_errors=True)
        self.shop.names.clear()
        case = self.shop.case("case", base, file, self.content(base, file, data[1] % 2, data[2:]))
        measured = reset_peak()
        before = status("VmRSS") if measured else 0
        start = time.perf_counter()
        try:
            LOADERS[loader](case.folder)
            self.loaded += 1
        except (ValueError, FileNotFoundError) as error:
            if len(str(error)) >= MESSAGE_LIMIT:
                raise Failure(f"a message of {len(str(error))} characters") from error
        except Exception as error:
            raise Failure(f"{type(error).__name__}: {str(error)[:300]}") from error
        self.runs += 1
        if time.perf_counter() - start > SECONDS_LIMIT:
            raise Failure(f"{time.perf_counter() - start:.1f} s")
        if measured and status("VmHWM") - before > case.memory():
            raise Failure(f"{(status('VmHWM') - before) >> 20} MiB for {case.size() >> 10} KiB of files")
        if os.path.exists(MARKER):
            raise Failure(f"{MARKER} was created: something was executed")

    def mutate(self, data: bytes, generator: random.Random) -> bytes:
        """``data`` with a few changes: of values where the payload is JSON, else of bytes."""
        head, payload = data[:2], data[2:]
        for _ in range(generator.choice((1, 1, 2, 4))):
            changed = _mutate_json(payload, generator) if generator.random() < 0.6 else None
            payload = _mutate_bytes(payload, generator) if changed is None else changed
        return head + payload[:MAX_PAYLOAD]


def _mutate_json(payload: bytes, generator: random.Random) -> bytes | None:
    """The JSON in ``payload`` with one value replaced, removed, repeated or renamed; None where it is none."""
    if payload[:1] not in b"{[" or len(payload) > 1 << 16:
        return None
    try:
        top = json.loads(payload)
        places, open_ = [], [top]
        while open_:
            node = open_.pop()
            items = list(node.items() if isinstance(node, dict) else enumerate(node))
            places += [(node, key) for key, _ in items]
            open_ += [value for _, value in items if isinstance(value, (dict, list))]
        if not places:
            return None
        node, key = generator.choice(places)
        kind = generator.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[generator.choice([str(v) for v in VALUES if isinstance(v, str)])] = node.pop(key)
        elif kind == 2:
            other, place = generator.choice(places)
            node[key] = json.loads(json.dumps(other[place]))
        else:
            node[key] = generator.choice(VALUES)
        return json.dumps(top).encode()
    except (ValueError, RecursionError, KeyError, IndexError):
        return None


def _mutate_bytes(payload: bytes, generator: random.Random) -> bytes:
    content = bytearray(payload)
    at = generator.randrange(len(content) + 1)
    if generator.random() < 0.5:  # where the structure is: at the ends
        at = (
            min(at, generator.randrange(600))
            if generator.random() < 0.5
            else max(at, len(content) - generator.randrange(600))
        )
    size = min(1 << generator.randrange(8), len(content) - at) if at < len(content) else 0
    kind = generator.randrange(6)
    if kind == 0 and size:
        content[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        content[at : at + size] = generator.randbytes(size)
    elif kind == 2:
        del content[at : at + size]
    elif kind == 3:
        content[at:at] = content[at : at + size] * generator.choice((1, 2, 100))
    elif kind == 4:
        value = generator.choice((0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1))
        content[at : at + 8] = value.to_bytes(8, "little")[: generator.choice((1, 2, 4, 8))]
    else:
        content[at:at] = generator.choice(
            (b"[" * 3000, b"9" * 5000, b"\0", b"\xff", b'"', b"q\x00h\x00\x86", b"&a *a ", b"\n")
        )
    return bytes(content)


def _fuzz(directory: Path, seconds: float, seed: int, loaders: list[str]) -> None:
    """The fuzzing process; it ends with the first failure."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(directory)
    harness = Harness(directory, seed)
    seeds = harness.seeds(loaders)
    if atheris is None:
        print(f"atheris is not installed: random mutations of {len(seeds)} inputs", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            faulthandler.dump_traceback_later(SECONDS_LIMIT, exit=True)
            harness.run(harness.mutate(harness.random.choice(seeds), harness.random))
        faulthandler.cancel_dump_traceback_later()
        print(f"{harness.runs} folders read, {harness.loaded} of them loaded")
        return
    kept = directory / "inputs"
    kept.mkdir()
    for index, data in enumerate(seeds):
        (kept / f"{index:03}").write_bytes(data)

    def custom_mutator(data: bytes, max_size: int, number: int) -> bytes:
        generator = random.Random(number)
        if generator.random() < 0.5 or len(data) < 2:
            return atheris.Mutate(data, max_size)
        return harness.mutate(data, generator)[:max_size]

    options = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", f"-max_len={MAX_PAYLOAD}", "-rss_limit_mb=8192"]
    options += [f"-timeout={int(SECONDS_LIMIT)}", "-print_final_stats=1", f"-artifact_prefix={directory}/", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, str(kept)], harness.run, custom_mutator=custom_mutator)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz everything that reads files.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], choices=sorted(LOADERS), help="what loads the files; default: all")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="where the folder of a failure is kept")
    parser.add_argument("--in", dest="directory", type=Path, help=argparse.SUPPRESS)  # the fuzzing process itself
    arguments = parser.parse_args()
    if arguments.directory is not None:
        _fuzz(arguments.directory, arguments.seconds, arguments.seed, arguments.only)
        return 0
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        options = ["--seconds", str(arguments.seconds), "--seed", str(arguments.seed), "--in", directory]
        options += ["--only", *arguments.only] if arguments.only else []
        status_ = subprocess.run([sys.executable, __file__, *options]).returncode
        if status_ == 0:
            return 0
        arguments.failures.mkdir(parents=True, exist_ok=True)
        kept = arguments.failures / f"seed-{arguments.seed}-{int(time.time())}"
        if (Path(directory) / "case").is_dir():
            shutil.copytree(Path(directory) / "case", kept)
            print(f"failed with status {status_}; the folder that was being read is kept in {kept}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
