"""Good folders of every kind, copies of them with one broken file, and what is expected of a loader that reads a copy.

A refusal is a ValueError of one line that names the file, and the field or key where that makes sense.  It takes a bounded
number of function calls and bytes of memory for each byte of the folder, and nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import cProfile
import ctypes
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from t2l_engine import AdapterStack, HyperNetwork
from t2l_engine.hypernetwork.checkpoint import describe, read
from t2l_engine.hypernetwork.convert import convert
from t2l_engine.hypernetwork.network import build
from t2l_engine.research.tasks import manifest
from t2l_engine.research.tasks.benchmarks import import_benchmarks
from t2l_engine.research.tasks.folder import load_tasks
from t2l_engine.research.tasks.sni import import_sni
from t2l_engine.research.training import settings

MIB = 1 << 20
GOLDEN = Path(__file__).parent.parent / "data" / "golden"
DOCUMENTS = GOLDEN.parent / "doc_to_lora" / "mistral-down-shared"
#: Created in the working directory by whatever a file manages to execute.
MARKER = "hostile_marker"
MESSAGE_LIMIT = 2000
#: Function calls that a load may take: so many for a byte of the folder, and so many beside.
WORK = 40, 1 << 20
#: Bytes of memory that a load may take: so many for a byte of the folder, and so many for late imports.
MEMORY = 2, 32 << 20
#: The same for large JSON files.  Python holds a text with one rare character in four bytes a character.
TEXTS_MEMORY = 8, 128 << 20
TEXTS = ("descriptions.json", "manifest.json", "task001_colours.json")

LOADERS: dict[str, Callable] = {
    "hypernetwork": HyperNetwork.from_pretrained,
    "documents": lambda folder: build(read(folder)),
    "adapters": lambda folder: AdapterStack.from_peft([folder]),
    "describe": describe,
    "encoder": lambda folder: read(folder).encoder_config(),
    "tasks": lambda folder: load_tasks(folder, "train"),
    "manifest": lambda folder: manifest.read(folder / "manifest.json"),
    "sni": import_sni,
    "benchmarks": import_benchmarks,
    "settings": lambda folder: settings.read(settings.SFTSettings, folder / "run.yaml"),
}
#: Good folder -> its loader, where that is not "hypernetwork".
LOADER_OF = {name: name for name in LOADERS} | {"adapter": "adapters"}

_TASK = {"skill": "letters", "task_split": "train", "source": "made here", "licence": ["Apache-2.0"], "permissive": True,
         "splits": {"train": "MTIzNDVhYmNkZQ==", "test": "NTQzMjE="}}  # fmt: skip
_COLOURS = {
    "Source": ["colour_words"], "Categories": ["Word Semantics"], "Definition": ["Name the colour of the thing."],
    "Instance License": ["CC BY 4.0"],
    "Instances": [{"id": "task001-1", "input": "grass", "output": ["green"]},
                  {"id": "task001-2", "input": "coal", "output": ["black", "dark"]}],
}  # fmt: skip
#: Files of tasks and of training, as they are when nothing is wrong.
FILES = {
    "tasks": {
        "descriptions.json": '{"copy": ["Repeat the input."]}',
        "copy.jsonl": '{"input": "a", "output": ["a"], "split": "train"}\n' * 3
        + '{"input": "a", "output": ["a"], "split": "train", "metric": "options", "options": ["a", "b"]}\n'
        + '{"input": "a", "output": ["a = 1"], "split": "train", "metric": "pass", "tests": "assert a"}\n',
    },
    "manifest": {"manifest.json": json.dumps({"format": manifest.FORMAT, "about": "One task.", "tasks": {"copy": _TASK}})},
    "sni": {"task001_colours.json": json.dumps(_COLOURS)},
    "benchmarks": {
        "openbookqa.jsonl": '{"question_stem": "Snow is", "choices": {"label": ["A", "B"], "text": ["hot", "cold"]}, '
        '"answerKey": "B"}\n',
        "hellaswag.jsonl": '{"raw": {"ctx": "He sits", "endings": ["down.", "up."], "label": "0"}, "split": "val"}\n',
        "mbpp.jsonl": '{"text": "Add.", "code": "a = 1", "test_list": ["assert a"], "test_setup_code": ""}\n',
    },
    "settings": {
        "run.yaml": "base_model: smollm2-135m\ntarget_modules: [q_proj, v_proj]\nschedule: linear\nsteps: 30\n"
        "prompt: input\nlearning_rate: 0.001\nscaling: rslora\n"
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder for ``LOADERS[loader]`` whose ``file`` is broken.

    ``mentions``: what the message must contain beside the file's name.
    ``good``: the folder this one was made from, where the change may mean nothing, such as a flipped bit; loading it is
    fine if that gives the same tensors bit for bit.
    ``contradiction``: the file is fine by itself and contradicts another; the message may name either.
    ``refusals``: the exceptions that count as a refusal.
    """

    name: str
    loader: str
    folder: Path
    file: str
    mentions: tuple[str, ...] = ()
    good: Path | None = None
    contradiction: bool = False
    refusals: tuple[type[Exception], ...] = (ValueError,)


class Workshop:
    """Makes cases: copies of good folders in which one file is another."""

    def __init__(self, directory: Path):
        self.directory, self._numbers = directory, itertools.count()
        (directory / "good").mkdir()
        self.good = {path.name: path for path in GOLDEN.iterdir()} | {"documents": DOCUMENTS}
        for name in ("native", "adapter", "perceiver", *FILES):
            self.good[name] = directory / "good" / name
        net = HyperNetwork.from_pretrained(GOLDEN / "M-recon-z")  # it has offsets too
        net.save_pretrained(self.good["native"], {"encoder": {"name": "minilm", "pooling": "mean"}, "base_model": "tiny"})
        convert(DOCUMENTS, self.good["perceiver"])
        draw = torch.Generator().manual_seed(0)
        a = {name: torch.randn(1, 3, 4, 64, generator=draw) for name in ("q_proj", "v_proj")}
        b = {name: torch.randn(1, 3, n, 4, generator=draw) for name, n in (("q_proj", 64), ("v_proj", 32))}
        AdapterStack(a, b, torch.ones(1)).save_pretrained(self.good["adapter"])
        for name, files in FILES.items():
            self.good[name].mkdir()
            for file, text in files.items():
                (self.good[name] / file).write_text(text)

    def read(self, base: str, file: str) -> bytes:
        return (self.good[base] / file).read_bytes()

    def case(
        self, name: str, base: str, file: str, content, *mentions: str, loader=None, harmless=False, **keywords
    ) -> Case:
        """A copy of ``base`` whose ``file`` holds the bytes ``content``, or is made by ``content(path)``."""
        folder = self.directory / str(next(self._numbers))
        folder.mkdir()
        for source in filter(Path.is_file, self.good[base].iterdir()):
            if source.name not in (file, "expected.safetensors", "meta.json"):
                shutil.copyfile(source, folder / source.name)
        if callable(content):
            content(folder / file)
        else:
            (folder / file).write_bytes(content)
        good = self.good[base] if harmless else None
        loader = loader or LOADER_OF.get(base, "hypernetwork")
        return Case(name, loader, folder, file, mentions, good, **keywords)


def faults(cases: Iterator[Case], must_refuse: bool = True) -> list[str]:
    """What is wrong with how ``cases`` are refused, a line for each; folders are removed when they are judged."""
    found = []
    for case in cases:
        found += [f"{case.loader} {case.name}: {fault}" for fault in judge(case, must_refuse)]
        shutil.rmtree(case.folder)
    return found


def judge(case: Case, must_refuse: bool = True) -> list[str]:
    """Everything that is wrong with how ``case`` is refused; not ``must_refuse``: it may also be loaded."""
    measured = _reset_peak()
    before, error, result, found = _status("VmRSS"), None, None, []
    with cProfile.Profile() as work:
        try:
            result = LOADERS[case.loader](case.folder)
        except Exception as caught:
            error = caught
    calls = sum(entry.callcount for entry in work.getstats())
    peak = _status("VmHWM") - before if measured else 0
    if error is not None:
        found += _judge_error(case, error)
    elif case.good is not None:
        found += [] if equal(result, LOADERS[case.loader](case.good)) else ["accepted with other values"]
    elif must_refuse:
        found.append("accepted")
    size = sum(path.stat().st_size for path in case.folder.iterdir() if path.is_file())
    factor, allowance = TEXTS_MEMORY if case.file in TEXTS else MEMORY
    if calls > WORK[0] * size + WORK[1]:
        found.append(f"{calls} function calls for {size} bytes")
    if peak > factor * size + allowance:
        found.append(f"{peak >> 20} MiB of memory for {size >> 20} MiB of files")
    if os.path.exists(MARKER):
        os.remove(MARKER)
        found.append("something was executed")
    return found


def _judge_error(case: Case, error: Exception) -> list[str]:
    message = str(error)
    if not isinstance(error, case.refusals):
        return [f"{type(error).__name__}: {message[:300]}"]
    wanted = (case.file, *case.mentions)
    if case.contradiction and any(path.name in message for path in case.folder.iterdir()):
        wanted = ()
    found = [f"{text!r} not in the message: {message[:300]}" for text in wanted if text not in message]
    if len(message) >= MESSAGE_LIMIT or "\n" in message:
        found.append(f"a message of {len(message)} characters: {message[:100]}")
    return found


def _status(field: str) -> int:
    """A memory figure of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def _reset_peak() -> bool:
    """Set VmHWM to the memory now in use; False where the kernel does not offer it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is cached on the heap would hide a peak
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def equal(first: object, second: object) -> bool:
    """Whether two hypernetworks or two stacks hold the same bits (NaN equals NaN)."""
    if isinstance(first, HyperNetwork):
        a, b = first.state_dict(), second.state_dict()
        plain = first.config == second.config
    else:
        a, b = (s.lora_A | {f"{k}.B": v for k, v in s.lora_B.items()} | {"scaling": s.scaling} for s in (first, second))
        plain = first.paths == second.paths and all(torch.equal(r, second.ranks.get(k)) for k, r in first.ranks.items())
    same = a.keys() == b.keys() and all(t.shape == b[k].shape and t.dtype == b[k].dtype for k, t in a.items())
    return plain and same and all(_bits(t) == _bits(b[k]) for k, t in a.items())


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
