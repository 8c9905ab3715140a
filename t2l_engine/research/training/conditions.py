"""What adapters are generated from: embeddings of texts, or hidden states that the LLM encoder's pooling attends to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import to_json
from t2l_engine.files.weights import write_text
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Task
from t2l_engine.research.training import discriminant
from t2l_engine.research.training.sampling import Group, seeded, trained_descriptions
from t2l_engine.research.training.settings import BASE_MODEL, ReconstructionSettings, SFTSettings
from t2l_engine.text.config import SAKANA_MAX_LENGTH, EncoderConfig, LLMEncoderConfig, OneHotConfig
from t2l_engine.text.encoder import MINILM, OneHotEncoder, TextEncoder
from t2l_engine.text.llm_encoder import AttentionPooling, LLMEncoder, condition_text, pad_states

#: Folder in that of a run, until the run is complete, and what is in it for each process.
STATES, STATES_FILE, INDEX = "states", "states.bin", "index.json"
#: One example set in this many has no description.
_WITHOUT_DESCRIPTION = 8
#: Tasks that are read together, between two saved indices, and the most texts of a batch.
CHUNK, BATCH = 16, 48


class Conditions(ABC):
    """What the adapters of groups are generated from, as the trained model takes it.

    ``train``, ``val``: of each task, indices of the descriptions used in training, and in validation (those that are held
    out, or those of training if none is).  ``encoder_config``: of the text encoder; ``embed_dim``: width of ``task_emb``.

    Raises ConfigError if all descriptions of a task are held out.
    """

    encoder_config: EncoderConfig | OneHotConfig | LLMEncoderConfig
    embed_dim: int

    def __init__(self, settings: SFTSettings | ReconstructionSettings, tasks: Sequence[Task], device: torch.device):
        self._settings, self._device, held_out = settings, device, settings.held_out_descriptions
        self.train: list[Sequence[int]] = [*trained_descriptions(tasks, held_out)]
        self.val = [range(len(of), len(of) + held_out) if held_out else of for of in self.train]

    @abstractmethod
    def clean(self, groups: Sequence[Group]) -> Any:
        """The conditions of the groups' descriptions or inputs, without augmentation."""

    @abstractmethod
    def augmented(self, groups: Sequence[Group]) -> Any:
        """As :meth:`clean`, with the settings' augmentation, drawn from a seed by each group's key."""

    @abstractmethod
    def initialise(self, linear: nn.Linear, pooling: AttentionPooling | None) -> None:
        """With ``task_init`` "discriminant", initialise the task encoder's ``linear`` by the training descriptions."""

    def pooling(self) -> AttentionPooling | None:
        """A new pooling with random parameters, on the CPU; None where conditions are ``task_emb`` themselves."""
        return None


class TaskEmbeddings(Conditions):
    """``task_emb [groups, embed_dim]``: the embedding of a group's description or, with ``condition`` "input", of its input.

    All descriptions are embedded here, after which the encoder is released; inputs are embedded when they are needed.
    With encoder "one-hot" only the tasks' names matter.
    """

    def __init__(self, settings: SFTSettings | ReconstructionSettings, tasks: Sequence[Task], device: torch.device):
        if settings.encoder == "one-hot":
            encoder = OneHotEncoder(OneHotConfig(tuple(task.name for task in tasks)))
            tasks = [dataclasses.replace(task, descriptions=(task.name,)) for task in tasks]
        super().__init__(settings, tasks, device)
        if settings.encoder != "one-hot":
            encoder = TextEncoder.from_pretrained(_encoder(settings), device=device)
        self.embed_dim, self.encoder_config = encoder.embed_dim, encoder.config
        by_input = isinstance(settings, SFTSettings) and settings.condition == "input"
        self._input_encoder = encoder if by_input else None
        # On the CPU, where mixes and noise are drawn.
        self._rows = [] if by_input else [encoder.encode(list(task.descriptions)).cpu() for task in tasks]

    def initialise(self, linear: nn.Linear, pooling: AttentionPooling | None = None) -> None:
        if self._settings.task_init == "discriminant":
            classes = [rows[: len(of)] for rows, of in zip(self._rows, self.train, strict=True)]
            discriminant.initialise(linear, classes, self._settings.seed)

    def clean(self, groups: Sequence[Group]) -> Tensor:
        return self._read(groups).to(self._device)

    def _read(self, groups: Sequence[Group]) -> Tensor:
        if self._input_encoder is None:
            return torch.stack([self._rows[g.task][g.description] for g in groups])
        # One at a time: rounding depends on the batch, and a resumed run would batch other texts together.
        return self._input_encoder.encode([g.samples[0].input for g in groups], batch_size=1).cpu()

    def augmented(self, groups: Sequence[Group]) -> Tensor:
        settings, rows = self._settings, []
        for g, row in zip(groups, self._read(groups), strict=True):
            generator = torch.Generator().manual_seed(seeded("task_emb", g.key))
            if settings.mix_descriptions:
                other = torch.randint(len(self.train[g.task]), (), generator=generator)
                weight = torch.rand((), generator=generator)
                row = weight * row + (1 - weight) * self._rows[g.task][other]
                row = row * (math.sqrt(row.numel()) / row.norm())
            if settings.embedding_noise:
                row = row + settings.embedding_noise * torch.randn(row.shape, generator=generator)
            rows.append(row)
        return torch.stack(rows).to(self._device)


def _encoder(settings: SFTSettings | ReconstructionSettings) -> str | EncoderConfig:
    """Name or configuration of the text encoder."""
    name = settings.encoder
    if name == BASE_MODEL:
        # A second copy of the base model: the run's may use another attention than one loaded from the checkpoint.
        return EncoderConfig(settings.base_model.rstrip("/"), "last", SAKANA_MAX_LENGTH, dtype=settings.dtype)
    if name != MINILM.name and not Path(name).is_dir():
        raise ConfigError(
            f"encoder: expected 'minilm', {BASE_MODEL!r}, 'one-hot' or a local sentence-transformers folder, got {name!r}"
        )
    return name


class HiddenStates(Conditions):
    """Hidden states of what adapters are generated from: of each task, its descriptions and some *example sets*.

    An example set is one of the task's training descriptions, or none, with 1 to ``max_examples`` of its training examples.
    All are read once, at the start, into a file, which a resumed run reads.  Batches are formed in the tasks' order, so
    states do not depend on the order of training.

    ``tasks``: with the examples that sets are drawn from, if any (a reconstruction has no sets); ``folder``: of the file,
    which :func:`remove_states` removes.

    Raises ConfigError if all descriptions of a task are held out, or if encoder and base model do not fit together.
    """

    def __init__(
        self,
        settings: SFTSettings | ReconstructionSettings,
        tasks: Sequence[Task],
        base_model: str,
        device: torch.device,
        folder: Path,
    ):
        super().__init__(settings, tasks, device)
        self._example_share, self._token_dropout = 0.0, 0.0
        if isinstance(settings, SFTSettings):
            self._example_share, self._token_dropout = settings.example_share, settings.token_dropout
        if settings.llm_descriptions:
            self.train = [self._sampled(task, of) for task, of in zip(tasks, self.train, strict=True)]
        if not settings.held_out_descriptions:
            self.val = self.train
        read = self.val if settings.validate_every else self.train
        #: Of each task, number of each description that is read in the order of its texts; example sets follow.
        self._numbers = [
            {i: n for n, i in enumerate(dict.fromkeys([*t, *v]))} for t, v in zip(self.train, read, strict=True)
        ]
        self._sets = [self._example_sets(task, of) for task, of in zip(tasks, self.train, strict=True)]
        texts = [
            [condition_text(task.descriptions[i]) for i in numbers] + [text for text, _ in sets]
            for task, numbers, sets in zip(tasks, self._numbers, self._sets, strict=True)
        ]
        self.encoder_config = LLMEncoderConfig(
            base_model.rstrip("/"), settings.llm_layers, settings.llm_queries, settings.llm_width,
            settings.llm_heads, settings.llm_blocks,
            dtype=settings.dtype if isinstance(settings, SFTSettings) else "bfloat16",
            max_examples=settings.max_examples if self._example_share else 0,
        )  # fmt: skip
        # A second copy of the base model: that of the run may use another attention than one loaded from the checkpoint.
        with torch.random.fork_rng(devices=[]):
            try:
                encoder = LLMEncoder.from_config(self.encoder_config, device=device, cache_size=0)
            except ConfigError as error:  # of a model with fewer layers
                raise ConfigError(str(error).replace("encoder.layers", "llm_layers")) from error
        self._hidden_size = encoder.model.config.get_text_config().hidden_size
        self.embed_dim = self.encoder_config.embed_dim
        self._states, self._places = read_states(encoder, texts, folder)

    def pooling(self) -> AttentionPooling:
        return AttentionPooling(self.encoder_config, self._hidden_size)

    @torch.no_grad()
    def initialise(self, linear: nn.Linear, pooling: AttentionPooling | None) -> None:
        """By LDA of what ``pooling`` makes of the descriptions: with untrained queries most of that is common to all."""
        if self._settings.task_init == "random" or pooling is None:
            return
        read = [[(task, self._numbers[task][i]) for i in indices] for task, indices in enumerate(self.train)]
        classes = [pooling(*self._states_of(chosen)) for chosen in read]
        centre = torch.stack([rows.mean(dim=0) for rows in classes]).mean(dim=0)
        scale = torch.cat([rows - centre for rows in classes]).square().mean().sqrt()
        discriminant.initialise(linear, classes, self._settings.seed, float(scale))

    def _sampled(self, task: Task, descriptions: Sequence[int]) -> Sequence[int]:
        """``llm_descriptions`` of a task's training descriptions."""
        s = self._settings
        draw, count = random.Random(seeded(s.seed, "read", task.name)), s.llm_descriptions
        return sorted(draw.sample(descriptions, count)) if count < len(descriptions) else descriptions

    def _example_sets(self, task: Task, descriptions: Sequence[int]) -> list[tuple[str, frozenset[str]]]:
        """Text and normalised inputs of each example set."""
        s, sets = self._settings, []
        if not isinstance(s, SFTSettings) or not s.example_share:
            return sets
        for i in range(s.example_sets):
            draw = random.Random(seeded(s.seed, "example set", task.name, i))
            chosen = draw.sample(task.examples, min(draw.randint(1, s.max_examples), len(task.examples)))
            about = task.descriptions[draw.choice(descriptions)]
            if draw.randrange(_WITHOUT_DESCRIPTION) == 0:
                about = ""
            text = condition_text(about, [(e.input, e.outputs[0]) for e in chosen])
            sets.append((text, frozenset(normalise(e.input) for e in chosen)))
        return sets

    def clean(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """States and mask of the groups' descriptions."""
        return self._gathered([(g.task, self._numbers[g.task][g.description]) for g in groups])

    def augmented(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """As :meth:`clean`; ``example_share`` of groups read an example set, ``token_dropout`` of tokens are masked."""
        states, mask = self._gathered([(g.task, self._drawn(g)) for g in groups])
        if self._token_dropout:
            generators = [torch.Generator().manual_seed(seeded("token dropout", g.key)) for g in groups]
            kept = torch.stack([torch.rand(mask.shape[1], generator=of) >= self._token_dropout for of in generators])
            mask = mask & kept.to(mask.device)
        return states, mask

    def _drawn(self, group: Group) -> int:
        """Number of the text that ``group`` reads: an example set never has an example that the group learns from."""
        draw, numbers = random.Random(seeded("condition", group.key)), self._numbers[group.task]
        learnt = {normalise(sample.input) for sample in group.samples}
        sets = [i for i, (_, inputs) in enumerate(self._sets[group.task]) if not inputs & learnt]
        if not sets or draw.random() >= self._example_share:
            return numbers[group.description]
        return len(numbers) + draw.choice(sets)

    def _states_of(self, chosen: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Padded states and mask of texts (task, number), on the CPU."""
        places = [self._places[task][number] for task, number in chosen]
        return pad_states([self._states[start:end] for start, end in places])

    def _gathered(self, chosen: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        states, mask = self._states_of(chosen)
        return states.to(self._device), mask.to(self._device)


def remove_states(folder: Path) -> None:
    """Remove the file of hidden states in ``folder`` and, with the last process's, the folder around it."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # no such folder, or another process has not finished
        folder.parent.rmdir()


def read_states(
    encoder: LLMEncoder, texts: Sequence[Sequence[str]], folder: Path
) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    """States ``[tokens, width]`` of the texts of each task, mapped from a file in ``folder``, and the rows of each text."""
    places, end = [], 0
    for of_task in texts:
        ends = list(itertools.accumulate(encoder.lengths(of_task), initial=end))
        places.append(list(itertools.pairwise(ends)))
        end = ends[-1]
    width = encoder.pooling.project.in_features
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps([to_json(encoder.config), CHUNK, BATCH, texts]).encode()).hexdigest()
    index: dict[str, Any] = {"sha256": digest, "tasks": 0}
    if (folder / STATES_FILE).is_file() and (folder / INDEX).is_file():
        found = json.loads((folder / INDEX).read_text())
        index = found if found.get("sha256") == digest else index
    if not index["tasks"]:  # an old index must not describe states that are overwritten from here on
        (folder / INDEX).unlink(missing_ok=True)
    states = torch.from_file(str(folder / STATES_FILE), shared=True, size=end * width, dtype=torch.bfloat16).view(end, width)
    with tqdm(total=len(texts), initial=index["tasks"], desc="reading", unit="task") as bar:
        while index["tasks"] < len(texts):
            chunk = slice(index["tasks"], index["tasks"] + CHUNK)
            pending = [pair for pairs in map(zip, texts[chunk], places[chunk]) for pair in pairs]
            pending.sort(key=lambda pair: pair[1][1] - pair[1][0])
            for start in range(0, len(pending), BATCH):
                batch = pending[start : start + BATCH]
                for read, (_, (first, last)) in zip(encoder.states([text for text, _ in batch]), batch, strict=True):
                    states[first:last] = read.cpu()
            index["tasks"] = min(chunk.stop, len(texts))
            with (folder / STATES_FILE).open("rb+") as file:  # before the index names them
                os.fsync(file.fileno())
            write_text(folder / INDEX, json.dumps(index))
            bar.update(index["tasks"] - bar.n)
    return states, places
