"""Stored adapters, found by their descriptions: retrieval beside generation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from t2l_engine.adapters.peft import CONFIG_NAME
from t2l_engine.adapters.peft_write import check_place
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, is_unicode, read_json
from t2l_engine.files.weights import write_text
from t2l_engine.ops.reference import without_autocast
from t2l_engine.text.encoder import TextEncoder

DESCRIPTIONS = "descriptions.json"
MAX_NAME_BYTES = 255  # of a folder


@dataclasses.dataclass(frozen=True)
class Match:
    """A stored adapter, and the cosine of its descriptions to a text."""

    name: str
    similarity: float


class DescriptionIndex:
    """Finds the name whose descriptions are nearest to a text, by the cosine to the mean of their embeddings.

    Args:
        descriptions: name -> one or more descriptions.
        encoder: of sentences.
    """

    def __init__(self, descriptions: Mapping[str, Sequence[str]], encoder: TextEncoder):
        if strings := [name for name, texts in descriptions.items() if isinstance(texts, str)]:
            raise ConfigError(f"descriptions: expected a list of them of every adapter, got one text of {strings[0]}")
        if without := [name for name, texts in descriptions.items() if not texts]:
            raise ConfigError(f"descriptions: expected some of every adapter, got none of {without[0]}")
        if not hasattr(encoder, "encode"):
            raise ValueError(f"encoder: expected one of sentences, such as a TextEncoder, got {type(encoder).__name__}")
        self.names, self.encoder = list(descriptions), encoder
        means = torch.stack([encoder.encode(list(texts)).mean(dim=0).cpu() for texts in descriptions.values()])
        self._unit = nn.functional.normalize(means, dim=-1)

    def nearest(self, texts: Sequence[str]) -> list[Match]:
        """The nearest name of each text; ValueError for texts that the encoder refuses."""
        with without_autocast(self._unit.device):
            cosines = nn.functional.normalize(self.encoder.encode(texts).cpu(), dim=-1) @ self._unit.mT
        values, indices = cosines.max(dim=-1)
        return [Match(self.names[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]


class AdapterLibrary:
    """Adapters of one base model with descriptions.

    >>> import tempfile
    >>> import t2l_engine as t2l
    >>> engine = t2l.TextToLoRA.from_pretrained("smollm2-135m-paper")
    >>> texts = {"last": ["Return the last element of the list."], "past": ["Answer with the past tense of the verb."]}
    >>> stack = engine.generate([of[0] for of in texts.values()])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     t2l.AdapterLibrary(stack, texts, engine.encoder).save(folder)
    ...     library = t2l.AdapterLibrary.open(folder)
    >>> library.nearest(["Give the last word of the list."])[0].name
    'last'
    >>> stack, matches = engine.retrieve(["Give the list's last word.", "Count the vowels."], library, min_similarity=0.6)
    """

    def __init__(self, stack: AdapterStack, descriptions: Mapping[str, Sequence[str]], encoder: TextEncoder):
        """``stack``: an adapter for each name of ``descriptions``, in their order; ``encoder``: of sentences.

        Raises ValueError if there are not as many, ConfigError for a name without descriptions.
        """
        if len(stack) != len(descriptions):
            raise ValueError(f"descriptions: expected those of {len(stack)} adapters, got {len(descriptions)}")
        self.stack, self.descriptions = stack, {name: list(texts) for name, texts in descriptions.items()}
        self.index = DescriptionIndex(descriptions, encoder)

    @classmethod
    def open(cls, folder: str | Path, encoder: TextEncoder | None = None) -> AdapterLibrary:
        """Open the PEFT folders that descriptions.json in ``folder`` names: ``{"NAME": ["...", ...], ...}``.

        Args:
            encoder: of sentences; None: all-MiniLM-L6-v2.

        Raises FileNotFoundError for a missing file, ConfigError for an invalid one, AdapterError for an adapter.
        """
        folder = Path(folder)
        descriptions = _descriptions(folder / DESCRIPTIONS)
        stack = AdapterStack.from_peft([folder / name for name in descriptions])
        return cls(stack, descriptions, encoder or TextEncoder.from_pretrained())

    def save(self, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
        """Write the adapters as PEFT folders, and their descriptions.

        Raises ValueError for names that are no names of folders and adapters that cannot be saved, FileExistsError for a
        folder with a model; nothing changes then.
        """
        folder = Path(folder)
        for i, name in enumerate(self.descriptions):
            _check_name(name, "descriptions")
            check_place(folder / name)
            self.stack.peft_config(i, base_model_name_or_path)
            self.stack.state_dict_peft(i)
        (folder / DESCRIPTIONS).unlink(missing_ok=True)  # so that a failure leaves no library instead of a mixed one
        for i, name in enumerate(self.descriptions):
            self.stack.save_pretrained(folder / name, i, base_model_name_or_path)
        write_text(folder / DESCRIPTIONS, json.dumps(self.descriptions, indent=1, ensure_ascii=False) + "\n")

    def __len__(self) -> int:
        return len(self.stack)

    def nearest(self, texts: Sequence[str]) -> list[Match]:
        """The nearest adapter of each text; ValueError for texts that the encoder refuses."""
        return self.index.nearest(texts)

    def adapters(
        self, texts: Sequence[str], generate: Callable[[list[str]], AdapterStack], min_similarity: float = -1.0
    ) -> tuple[AdapterStack, list[Match | None]]:
        """One adapter per text, and the stored one that it is; None for a generated adapter.

        A text with a cosine of ``min_similarity`` or more gets the nearest stored adapter, others ``generate``.  All
        adapters have the wider dtype of those found and those generated.

        Raises ValueError for another ``min_similarity``, and as :meth:`nearest`, ``generate`` and :meth:`AdapterStack.cat`
        do.
        """
        if not -1 <= min_similarity <= 1:
            raise ValueError(f"min_similarity: expected a cosine, -1 to 1, got {short_repr(min_similarity)}")
        matches = [match if match.similarity >= min_similarity else None for match in self.nearest(texts)]
        places = {name: place for place, name in enumerate(self.descriptions)}
        known = {i: places[match.name] for i, match in enumerate(matches) if match is not None}
        new = [i for i in range(len(texts)) if i not in known]
        if not new:
            return self.stack[[*known.values()]], matches
        made = generate([texts[i] for i in new])
        if not known:
            return made, matches
        stored = self.stack[[*known.values()]]
        dtype = torch.promote_types(stored.dtype, made.dtype)
        stack = AdapterStack.cat([part.to(made.scaling.device, dtype) for part in (stored, made)])
        order = [*known, *new]
        return stack[sorted(range(len(order)), key=order.__getitem__)], matches


def _check_name(name: str, where: str) -> None:
    wrong = not name or name in (".", "..", DESCRIPTIONS) or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES
    if wrong or "/" in name or "\0" in name or "\\" in name:
        raise ConfigError(f"{where}: expected names of folders, got {short_repr(name)}")


def _descriptions(path: Path) -> dict[str, list[str]]:
    """The checked contents of descriptions.json, each name with its PEFT folder."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a library has it beside its adapters")
    found = read_json(path, MAX_DESCRIPTIONS_BYTES)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path}: expected an object of names and descriptions, got {short_repr(found)}")
    for name, texts in found.items():
        _check_name(name, str(path))
        strings = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        if not strings or not all(text.strip() and is_unicode(text) for text in texts):
            raise ConfigError(f"{path}: {name}: expected a list of descriptions, got {short_repr(texts)}")
        if not (path.parent / name / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{path.parent / name / CONFIG_NAME}: not found, but {path.name} names {name}")
    return found
