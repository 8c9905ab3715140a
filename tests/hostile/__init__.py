"""Hostile and broken files: a corpus of folders that every loader must refuse.

A refusal is a ValueError whose message names the file, and the field or key where that makes sense, and stays short.  It
costs little memory and work, and executes nothing.  ``corpus(directory)`` writes the folders one by one; ``judge`` runs the
loader of one case and says what is wrong with the refusal.  ``python tests/hostile DIR`` keeps the corpus in DIR,
``python tests/hostile --judge`` prints two JSON lines a case, before and after, which is what ``test_hostile.py`` reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from t2l_engine import AdapterStack, HyperNetwork
from t2l_engine.hypernetwork.checkpoint import describe, read
from t2l_engine.research.costs import Decoder, Encoder
from t2l_engine.research.tasks import manifest
from t2l_engine.research.tasks.benchmarks import import_benchmarks
from t2l_engine.research.tasks.folder import load_tasks
from t2l_engine.research.tasks.sni import import_sni
from t2l_engine.research.training import settings

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
#: Created in the working directory by whatever a file manages to execute.
MARKER = "hostile_marker"
MESSAGE_LIMIT = 2000
#: Ends a case that would not end; no measure of how much a refusal costs.
HANG_SECONDS = 540.0
#: A refusal may take so many calls of functions a byte of the folder, and so many beside.
WORK = 40, 1 << 20
#: A refusal may take so many times the bytes of the folder, and so much for the interpreter and late imports.
MEMORY = 2, 32 << 20
#: Of JSON files that may be large: Python holds a text that has one rare character, and every value cut from it, in four
#: bytes a character, and the million values that a file may have in 100 MiB.
TEXTS_MEMORY = 8, 128 << 20
TEXTS = ("descriptions.json", "manifest.json", "task001_colours.json")

LOADERS: dict[str, Callable] = {
    "hypernetwork": HyperNetwork.from_pretrained,
    "adapters": lambda folder: AdapterStack.from_peft([folder]),
    "describe": describe,
    "encoder": lambda folder: read(folder).encoder_config(),
    "tasks": lambda folder: load_tasks(folder, "train"),
    "decoder": Decoder.from_config,
    "text encoder": Encoder.from_config,
    "manifest": lambda folder: manifest.read(folder / "manifest.json"),
    "sni": import_sni,
    "benchmarks": import_benchmarks,
    "settings": lambda folder: settings.read(settings.SFTSettings, folder / "run.yaml"),
}
#: What reads a good folder, where that is no hypernetwork.
LOADER_OF = {"tasks": "tasks", "manifest": "manifest", "sni": "sni", "settings": "settings", "adapter": "adapters"}
LOADER_OF |= {"benchmarks": "benchmarks", "decoder": "decoder", "gemma": "decoder", "text encoder": "text encoder"}
#: Configurations of models whose costs are counted: of every kind of field one.
MODELS = {
    "decoder": {"model_type": "qwen3_moe", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "tie_word_embeddings": True,
                "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0],
                "decoder_sparse_step": 1, "use_sliding_window": True, "sliding_window": 8, "attention_bias": True},
    "gemma": {"model_type": "gemma2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61,
              "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "text encoder": {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                     "vocab_size": 61, "num_attention_heads": 4, "max_position_embeddings": 16, "type_vocab_size": 2},
}  # fmt: skip
_COPY = {"skill": "letters", "tier": "train", "source": "made here", "licence": ["Apache-2.0"], "permissive": True,
         "splits": {"train": "MTIzNDVhYmNkZQ==", "test": "NTQzMjE="}}  # fmt: skip
_COLOURS = {
    "Source": ["colour_words"], "Categories": ["Word Semantics"], "Definition": ["Name the colour of the thing."],
    "Instance License": ["CC BY 4.0"],
    "Instances": [{"id": "task001-1", "input": "grass", "output": ["green"]},
                  {"id": "task001-2", "input": "coal", "output": ["black", "dark"]}],
}  # fmt: skip
_MANIFEST = {"format": manifest.FORMAT, "about": "A manifest of one task.", "tasks": {"copy": _COPY}}
#: Files of tasks and of training, as they are when nothing is wrong.
FILES = {
    "tasks": {
        "descriptions.json": '{"copy": ["Repeat the input."]}',
        "copy.jsonl": '{"input": "a", "output": ["a"], "split": "train"}\n' * 3
        + '{"input": "a", "output": ["a"], "split": "train", "metric": "options", "options": ["a", "b"]}\n'
        + '{"input": "a", "output": ["a = 1"], "split": "train", "metric": "pass", "tests": "assert a"}\n',
    },
    "manifest": {"manifest.json": json.dumps(_MANIFEST)},
    "sni": {"task001_colours.json": json.dumps(_COLOURS)},
    "benchmarks": {
        "openbookqa.jsonl": '{"question_stem": "Snow is", "choices": {"label": ["A", "B"], "text": ["hot", "cold"]}, '
        '"answerKey": "B"}\n',
        "hellaswag.jsonl": '{"raw": {"ctx": "He sits", "endings": ["down.", "up."], "label": "0"}, "split": "val"}\n',
        "mbpp.jsonl": '{"text": "Add.", "code": "a = 1", "test_list": ["assert a"], "test_setup_code": ""}\n',
    },
    "settings": {
        "run.yaml": "base_model: smollm2-135m\ntarget_modules: [q_proj, v_proj]\nschedule: linear\nsteps: 30\n"
        "mix_descriptions: false\nlearning_rate: 1e-3\nscaling: rslora\n"
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder that ``LOADERS[loader]`` must refuse.

    ``mentions``: what the message must contain; the first is the name of the broken file.
    ``same_as``: the folder this one was made from by a change that may mean nothing (a flipped bit): then loading it is fine
    where that gives the same tensors bit for bit.
    ``contradiction``: the file is fine by itself and contradicts another; the message may name either.
    ``refusals``: the exceptions that count as one.
    """

    name: str
    loader: str
    folder: Path
    mentions: tuple[str, ...]
    same_as: Path | None = None
    contradiction: bool = False
    refusals: tuple[type[Exception], ...] = (ValueError,)

    @property
    def file(self) -> Path:
        return self.folder / self.mentions[0]

    def digest(self) -> str:
        """A hash of the broken file, or of what stands in its place."""
        mode = self.file.lstat().st_mode
        if not stat.S_ISREG(mode):
            return f"{self.mentions[0]}: {stat.S_IFMT(mode):o}"
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def size(self) -> int:
        """Bytes of the folder's regular files."""
        return sum(p.stat().st_size for p in self.folder.iterdir() if p.is_file())

    def memory(self) -> int:
        """Bytes of memory that a refusal may take."""
        factor, allowance = TEXTS_MEMORY if self.mentions[0] in TEXTS else MEMORY
        return factor * self.size() + allowance


class Workshop:
    """Makes cases: copies of good folders in which one file is another."""

    def __init__(self, directory: Path, seed: int):
        self.directory = directory
        self.random = random.Random(seed)
        self.bases = {path.name: path for path in GOLDEN.iterdir()}
        self.bases["native"] = directory / "base" / "native"
        net = HyperNetwork.from_pretrained(GOLDEN / "M-recon-z")  # it has offsets too
        net.save_pretrained(self.bases["native"], {"encoder": {"name": "minilm", "pooling": "mean"}, "base_model": "tiny"})
        self.bases["adapter"] = directory / "base" / "adapter"
        draw = torch.Generator().manual_seed(seed)
        a = {name: torch.randn(1, 3, 4, 64, generator=draw) for name in ("q_proj", "v_proj")}
        b = {name: torch.randn(1, 3, n, 4, generator=draw) for name, n in (("q_proj", 64), ("v_proj", 32))}
        AdapterStack(a, b, torch.ones(1)).save_pretrained(self.bases["adapter"])
        for name, files in (FILES | {name: {"config.json": json.dumps(values)} for name, values in MODELS.items()}).items():
            self.bases[name] = directory / "base" / name
            self.bases[name].mkdir()
            for file, text in files.items():
                (self.bases[name] / file).write_text(text)
        self.names: set[str] = set()
        for name in MODELS:  # which import what they need of transformers: no work of the first refusal
            LOADERS[LOADER_OF[name]](self.bases[name])

    def read(self, base: str, file: str) -> bytes:
        return (self.bases[base] / file).read_bytes()

    def case(
        self,
        name: str,
        base: str,
        file: str,
        content: bytes | Callable[[Path], object],
        *mentions: str,
        loader: str | None = None,
        harmless: bool = False,
        contradiction: bool = False,
        refusals: tuple[type[Exception], ...] = (ValueError,),
    ) -> Case:
        """A copy of ``base`` whose ``file`` holds ``content``, or is made by ``content(path)``."""
        assert name not in self.names, name
        self.names.add(name)
        folder = self.directory / name
        folder.mkdir()
        for source in self.bases[base].iterdir():
            if source.name not in (file, "expected.safetensors", "meta.json"):
                _link(source, folder / source.name)
        if callable(content):
            content(folder / file)
        else:
            (folder / file).write_bytes(content)
        if loader is None:
            loader = LOADER_OF.get(base, "hypernetwork")
        same_as = self.bases[base] if harmless else None
        return Case(name, loader, folder, (file, *mentions), same_as, contradiction, refusals)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def corpus(directory: str | Path, seed: int = 0, keep: bool = False) -> Iterator[Case]:
    """Cases in ``directory``, the same ones for the same ``seed``; each folder is removed when the next is asked for, unless
    ``keep``."""
    from tests.hostile import config_files, safetensors_files, settings_files, task_files, text_files, torch_files

    shop = Workshop(Path(directory), seed)
    for part in (torch_files, safetensors_files, text_files, config_files, task_files, settings_files):
        for case in part.cases(shop):
            yield case
            if not keep:
                shutil.rmtree(case.folder)


def judge(case: Case) -> list[str]:
    """Everything that is wrong with how ``case`` is refused; empty for a good refusal."""
    try:
        result = LOADERS[case.loader](case.folder)
    except Exception as error:
        return _judge_error(case, error)
    if case.same_as is None:
        return ["accepted"]
    same = equal(result, LOADERS[case.loader](case.same_as))
    return [] if same else ["accepted with other values"]


def _judge_error(case: Case, error: Exception) -> list[str]:
    message = str(error)
    if not isinstance(error, case.refusals):
        return [f"{type(error).__name__}: {message[:300]}"]
    wanted = case.mentions
    if case.contradiction and any(p.name in message for p in case.folder.iterdir()):
        wanted = ()
    wrong = [f"{text!r} not in the message: {message[:300]}" for text in wanted if text not in message]
    if len(message) >= MESSAGE_LIMIT:
        wrong.append(f"a message of {len(message)} characters: {message[:100]}")
    return wrong


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
