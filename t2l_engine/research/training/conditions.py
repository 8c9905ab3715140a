"""Training with an LLM encoder: hidden states of descriptions and of worked examples, which its pooling attends to."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import to_json
from t2l_engine.files.weights import write_text
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Task
from t2l_engine.research.training import discriminant
from t2l_engine.research.training.descriptions import Conditions
from t2l_engine.research.training.sampling import Group, seeded, trained_descriptions
from t2l_engine.research.training.settings import ReconstructionSettings, SFTSettings
from t2l_engine.text.config import LLMEncoderConfig
from t2l_engine.text.llm_encoder import AttentionPooling, LLMEncoder, condition_text, pad_states

#: Folder in that of a run, until the run is complete, and what is in it for each process.
STATES, STATES_FILE, INDEX = "states", "states.bin", "index.json"
#: One example set in this many has no description.
_WITHOUT_DESCRIPTION = 8
#: Tasks that are read together, between two saved indices, and the most texts of a batch.
CHUNK, BATCH = 16, 48


class PooledHyperNetwork(nn.Module):
    """Pooling and hypernetwork, which are trained together: hidden states to adapters."""

    def __init__(self, pooling: AttentionPooling, hypernetwork: HyperNetwork):
        super().__init__()
        self.pooling, self.hypernetwork = pooling, hypernetwork

    def forward(self, condition: tuple[Tensor, Tensor]) -> AdapterStack:
        """Adapters with gradients of ``condition``: states and mask, as :class:`AttentionPooling` takes them."""
        return self.hypernetwork(self.pooling(*condition))


class HiddenStates(Conditions):
    """Hidden states of what adapters are generated from: of each task, its descriptions and some *example sets*.

    An example set is one of the task's training descriptions, or none, with 1 to ``max_examples`` of its training examples.
    All are read once, at the start, into a file, which a resumed run reads.  Batches are formed in the tasks' order, so
    states do not depend on the order of training.

    Args:
        settings: of the run; a reconstruction has no example sets.
        tasks: with their descriptions, and with the examples that sets are drawn from.
        base_model: whose hidden states are read.
        folder: of the file; :func:`remove_states` removes it.

    Raises ConfigError if all descriptions of a task are held out, or if encoder and language model do not fit together.
    """

    def __init__(
        self,
        settings: SFTSettings | ReconstructionSettings,
        tasks: Sequence[Task],
        base_model: str,
        device: torch.device,
        folder: Path,
    ):
        self._settings, self._device = settings, device
        self._example_share, self._token_dropout = 0.0, 0.0
        if isinstance(settings, SFTSettings):
            self._example_share, self._token_dropout = settings.example_share, settings.token_dropout
        self._train = [self._train_descriptions(task) for task in tasks]
        self._val = [self._val_descriptions(task) for task in tasks]
        self._sets = [self._example_sets(task, chosen) for task, chosen in zip(tasks, self._train, strict=True)]
        #: Of each task, number of each description that is read in the order of its texts; example sets follow.
        self._numbers = [{i: n for n, i in enumerate(t + v)} for t, v in zip(self._train, self._val, strict=True)]
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
        classes = []
        for task, indices in enumerate(self._train):
            states, mask = self._rows([(task, self._numbers[task][i]) for i in indices])
            classes.append(pooling(states, mask))
        centre = torch.stack([rows.mean(dim=0) for rows in classes]).mean(dim=0)
        scale = torch.cat([rows - centre for rows in classes]).square().mean().sqrt()
        discriminant.initialise(linear, classes, self._settings.seed, float(scale))

    def _train_descriptions(self, task: Task) -> list[int]:
        s = self._settings
        found = trained_descriptions(task.name, len(task.descriptions), s.held_out_descriptions)
        if not 0 < s.llm_descriptions < len(found):
            return list(found)
        return sorted(random.Random(seeded(s.seed, "read", task.name)).sample(found, s.llm_descriptions))

    def _val_descriptions(self, task: Task) -> list[int]:
        held_out, count = self._settings.held_out_descriptions, len(task.descriptions)
        return list(range(count - held_out, count)) if held_out and self._settings.validate_every else []

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

    def train_indices(self, task: int) -> Sequence[int]:
        return self._train[task]

    def val_indices(self, task: int) -> Sequence[int]:
        return self._val[task] or self._train[task]

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

    def _rows(self, chosen: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        places = [self._places[task][index] for task, index in chosen]
        return pad_states([self._states[start:end] for start, end in places])

    def _gathered(self, chosen: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        states, mask = self._rows(chosen)
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
