"""Stored adapters, found by their descriptions: retrieval beside generation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine.adapters.peft import CONFIG_NAME
from t2l_engine.adapters.peft_write import check_place
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.files.text import MAX_DESCRIPTIONS_BYTES, is_unicode, read_json, read_texts, to_json
from t2l_engine.files.weights import content_checksum, read_safetensors, write_folder, write_text
from t2l_engine.ops.reference import without_autocast
from t2l_engine.text.encoder import MINILM, TextEncoder

DESCRIPTIONS, EMBEDDINGS, DIGESTS = "descriptions.json", "embeddings.safetensors", "embeddings.json"
MAX_NAME_BYTES = 255  # of a folder
#: Of the softmax over cosines that weighs the adapters of a mixture.
TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True)
class Match:
    """A stored adapter, the cosine of its descriptions to a text, and its weight in the mixture."""

    name: str
    similarity: float
    weight: float


class DescriptionIndex:
    """Finds the names whose descriptions are nearest to a text, by the cosine to the mean of their embeddings.

    Args:
        descriptions: name -> one or more descriptions.
        encoder: of sentences.
        means: mean embedding of each name's descriptions, ``[N, width]``; None: computed.
    """

    def __init__(self, descriptions: Mapping[str, Sequence[str]], encoder: TextEncoder, means: Tensor | None = None):
        if strings := [name for name, texts in descriptions.items() if isinstance(texts, str)]:
            raise ConfigError(f"descriptions: expected a list of them of every adapter, got one text of {strings[0]}")
        if without := [name for name, texts in descriptions.items() if not texts]:
            raise ConfigError(f"descriptions: expected some of every adapter, got none of {without[0]}")
        if not hasattr(encoder, "encode"):
            raise ValueError(f"encoder: expected one of sentences, such as a TextEncoder, got {type(encoder).__name__}")
        self.names, self.encoder = list(descriptions), encoder
        if means is None:
            means = torch.stack([encoder.encode(list(texts)).mean(dim=0).cpu() for texts in descriptions.values()])
        self.means = means
        self._unit = nn.functional.normalize(means, dim=-1)

    def nearest(self, texts: Sequence[str], top_k: int = 1) -> list[list[Match]]:
        """The ``top_k`` nearest names of each text, the nearest first; their weights sum to 1.

        Raises ValueError for another ``top_k`` than 1 to the number of names, or texts that the encoder refuses.
        """
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= len(self.names):
            raise ValueError(f"top_k: expected an int in [1, {len(self.names)}], got {short_repr(top_k)}")
        with without_autocast(self._unit.device):
            cosines = nn.functional.normalize(self.encoder.encode(texts).cpu(), dim=-1) @ self._unit.mT
        values, indices = cosines.topk(top_k)
        weights = (values / TEMPERATURE).softmax(dim=-1)
        rows = zip(indices.tolist(), values.tolist(), weights.tolist(), strict=True)
        return [[Match(self.names[i], v, w) for i, v, w in zip(*row, strict=True)] for row in rows]


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
    >>> library.nearest(["Give the last word of the list."])[0][0].name
    'last'
    >>> stack = engine.generate(["Give the list's last word.", "Count the vowels."], library=library, min_similarity=0.6)
    """

    def __init__(
        self,
        stack: AdapterStack,
        descriptions: Mapping[str, Sequence[str]],
        encoder: TextEncoder,
        means: Tensor | None = None,
    ):
        """``stack``: an adapter for each name of ``descriptions``, in their order; ``encoder``, ``means``: as
        :class:`DescriptionIndex` takes them.

        Raises ValueError if there are not as many, ConfigError for a name without descriptions.
        """
        if len(stack) != len(descriptions):
            raise ValueError(f"descriptions: expected those of {len(stack)} adapters, got {len(descriptions)}")
        self.stack, self.descriptions = stack, {name: list(texts) for name, texts in descriptions.items()}
        self.index = DescriptionIndex(descriptions, encoder, means)

    @classmethod
    def open(cls, folder: str | Path, encoder: TextEncoder | None = None) -> AdapterLibrary:
        """Open the PEFT folders that descriptions.json in ``folder`` names: ``{"NAME": ["...", ...], ...}``.

        Embeddings that :meth:`save` wrote are used if descriptions and encoder are still the same.

        Args:
            encoder: of sentences; None: all-MiniLM-L6-v2.

        Raises FileNotFoundError for a missing file, ConfigError for an invalid one, or without ``encoder`` for embeddings of
        another one than MiniLM, AdapterError for an adapter.
        """
        folder = Path(folder)
        descriptions = _descriptions(folder / DESCRIPTIONS)
        stated = read_json(folder / DIGESTS) if (folder / DIGESTS).is_file() else None
        stated = stated if isinstance(stated, dict) else {}
        if encoder is None:
            if (name := stated.get("encoder", MINILM.name)) != MINILM.name:
                raise ConfigError(
                    f"{folder / DIGESTS}: expected embeddings of {MINILM.name!r}, got those of {short_repr(name)}; pass "
                    "encoder=..., or remove this file to embed the descriptions anew"
                )
            encoder = TextEncoder.from_pretrained()
        known = stated.get("sha256") == _digest(descriptions, encoder) and (folder / EMBEDDINGS).is_file()
        means = _stored(folder / EMBEDDINGS, (len(descriptions), encoder.embed_dim)) if known else None
        return cls(AdapterStack.from_peft([folder / name for name in descriptions]), descriptions, encoder, means)

    def save(self, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
        """Write the adapters as PEFT folders, their descriptions and the embeddings, so that :meth:`open` computes none.

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
        encoder = self.index.encoder
        digest = {"sha256": _digest(self.descriptions, encoder), "encoder": encoder.config.name}
        write_folder(folder, EMBEDDINGS, {"means": self.index.means.contiguous()}, DIGESTS, digest)

    def __len__(self) -> int:
        return len(self.stack)

    def nearest(self, texts: Sequence[str], top_k: int = 1) -> list[list[Match]]:
        """The ``top_k`` nearest adapters of each text, which :meth:`retrieve` uses.  Raises as that does."""
        return self.index.nearest(texts, top_k)

    def retrieve(self, texts: Sequence[str], top_k: int = 1) -> AdapterStack:
        """One adapter per text: the nearest stored one, or the mixture of the ``top_k`` nearest.

        A mixture adds the weighted changes of the weights, see :func:`mixture`.

        Raises ValueError for another ``top_k`` than 1 to the number of adapters, or texts that the encoder refuses.
        """
        return self.mixed(self.nearest(texts, top_k))

    def mixed(self, matches: Sequence[Sequence[Match]]) -> AdapterStack:
        """One adapter for each row of ``matches``, the result of :meth:`nearest`."""
        places = {name: i for i, name in enumerate(self.descriptions)}
        rows = [[places[match.name] for match in row] for row in matches]
        if all(len(row) == 1 for row in rows):
            return self.stack[[i for (i,) in rows]]
        weights = [[match.weight for match in row] for row in matches]
        return AdapterStack.cat([mixture(self.stack[row], of) for row, of in zip(rows, weights, strict=True)])

    def adapters(
        self,
        texts: Sequence[str],
        generate: Callable[[list[str]], AdapterStack],
        top_k: int = 1,
        min_similarity: float = -1.0,
    ) -> tuple[AdapterStack, list[list[Match]]]:
        """One adapter per text, and the stored ones that each is made of; no stored ones for a generated adapter.

        A text with a cosine of ``min_similarity`` or more gets :meth:`retrieve`, others ``generate``.  All adapters have the
        wider dtype of those found and those generated.

        Raises ValueError for another ``min_similarity``, and as :meth:`retrieve`, ``generate`` and
        :meth:`AdapterStack.cat` do.
        """
        if not -1 <= min_similarity <= 1:
            raise ValueError(f"min_similarity: expected a cosine, -1 to 1, got {short_repr(min_similarity)}")
        matches = [row if row[0].similarity >= min_similarity else [] for row in self.nearest(texts, top_k)]
        known = [i for i, row in enumerate(matches) if row]
        new = [i for i, row in enumerate(matches) if not row]
        parts = [self.mixed([matches[i] for i in known])] if known else []
        parts += [generate([texts[i] for i in new])] if new else []
        if len(parts) == 1:
            return parts[0], matches
        dtype = functools.reduce(torch.promote_types, [part.dtype for part in parts])
        order = [*known, *new]
        stack = AdapterStack.cat([part.to(parts[-1].scaling.device, dtype) for part in parts])
        return stack[sorted(range(len(order)), key=order.__getitem__)], matches


def mixture(stack: AdapterStack, weights: Sequence[float]) -> AdapterStack:
    """One adapter that changes the weights of the model by ``sum_i w_i s_i B_i A_i``; its scaling is 1.

    Its rank is that of the stack's widest adapter, per module, times their number.  Weights and scalings go into B, which is
    rounded once to the dtype of the stack.

    Raises ValueError unless there is a weight for each adapter.
    """
    if len(weights) != len(stack):
        raise ValueError(f"weights: expected one for each of {len(stack)} adapters, got {len(weights)}")
    factors = stack.scaling * torch.tensor(weights, dtype=torch.float32, device=stack.scaling.device)
    clean, lora_A, lora_B, ranks = stack.zero_padded(), {}, {}, {}
    for name, of in stack.ranks.items():
        r = max(1, int(of.max()))
        a, b = clean.lora_A[name][:, :, :r], clean.lora_B[name][..., :r] * factors[:, None, None, None]
        lora_A[name] = a.transpose(0, 1).flatten(1, 2)[None]
        lora_B[name] = b.to(a.dtype).permute(1, 2, 0, 3).flatten(2)[None]
        ranks[name] = (of.amax(dim=0, keepdim=True) > 0).to(of.dtype) * len(stack) * r
    return AdapterStack(lora_A, lora_B, torch.ones_like(factors[:1]), ranks, stack.paths, partial=stack.partial)


def _check_name(name: str, where: str) -> None:
    reserved = (".", "..", DESCRIPTIONS, EMBEDDINGS, DIGESTS)
    wrong = not name or name in reserved or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES
    if wrong or "/" in name or "\0" in name or "\\" in name:
        raise ConfigError(f"{where}: expected names of folders, got {short_repr(name)}")


def _descriptions(path: Path) -> dict[str, list[str]]:
    """The checked contents of descriptions.json, each name with its PEFT folder."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a library has it beside its adapters")
    found = read_texts(path, MAX_DESCRIPTIONS_BYTES)
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


def _digest(descriptions: Mapping[str, Sequence[str]], encoder: TextEncoder) -> str:
    """A hash of everything that embeddings depend on: descriptions, and the encoder's configuration and weights."""
    checksum = content_checksum(encoder.weights())
    known: list[Any] = [to_json(encoder.config), checksum, *([name, list(of)] for name, of in descriptions.items())]
    return hashlib.sha256(json.dumps(known, ensure_ascii=False).encode()).hexdigest()


def _stored(path: Path, shape: tuple[int, int]) -> Tensor:
    """The embeddings in ``path``."""
    means = read_safetensors(path, ConfigError).get("means")
    if means is None or means.shape != shape:
        got = None if means is None else tuple(means.shape)
        raise ConfigError(f"{path}: means: expected shape {shape}, got {got}")
    return means.to(torch.float32, copy=True)  # not a view of the file
