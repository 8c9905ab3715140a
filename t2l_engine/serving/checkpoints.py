"""A checkpoint that a server generates with: keys, adapters and folders of prepared texts.

Disk and memory mode give the same bits: both call :func:`adapter` on what ``engine.embed`` gives for a text, its embedding
``[embed_dim]`` or its latents ``[chunks, *latent_shape]``, and round once to bfloat16.  The last bits of an
embedding depend on the batch that it is encoded in, so the folder of a key defines its adapter; no process encodes
its text again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import t2l_engine
from t2l_engine.adapters.peft import CONFIG_NAME
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.engine import TextToLoRA
from t2l_engine.files.text import to_json
from t2l_engine.files.weights import content_checksum, is_finite
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork
from t2l_engine.serving import names
from t2l_engine.serving.store import DTYPE, EMBEDDING, EMBEDDING_NAME, NOTE_NAME, AdapterStore
from t2l_engine.text.documents import DocumentEncoder
from t2l_engine.text.encoder import OneHotEncoder, check_list

#: Part of every key: adapters of another version may be rounded differently.
VERSION_OF_ADAPTERS = f"{t2l_engine.__version__}/1"
BATCH = 64  # texts in a pass of the encoder


@torch.inference_mode(False)
def adapter(hypernetwork: HyperNetwork | TokenHyperNetwork, embedding: Tensor) -> AdapterStack:
    """The adapter of one text's embedding, with the same bits in every process of a machine.

    Alone and on one thread: the rounding of the task encoder, torch's matrix product, depends on the number of rows and
    threads, and perhaps on the alignment of its operand.  The ops of the trunk and the heads do not depend on them.
    """
    threads = torch.get_num_threads()
    torch._C.set_num_threads(1)  # a worker of vLLM replaces torch.set_num_threads by a warning
    try:
        return hypernetwork.generate(embedding.clone()[None])
    finally:
        torch._C.set_num_threads(threads)


def fingerprint(hypernetwork: HyperNetwork | TokenHyperNetwork) -> str:
    """SHA-256 (hex) of a hypernetwork's configuration and tensors."""
    config = json.dumps(to_json(hypernetwork.config), sort_keys=True)
    return names.digest("hypernetwork", config, content_checksum(hypernetwork.state_dict()))


def _tokenizer(tokenizer: Any) -> str:
    """A tokenizer as JSON: its ``tokenizer.json``, or its vocabulary if it has none."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    # Truncation and padding are left over from the last call.
    told = tokenizer.get_vocab() if fast is None else json.loads(fast.to_str()) | {"truncation": None, "padding": None}
    return json.dumps(told, sort_keys=True)


@dataclasses.dataclass
class Checkpoint:
    """An engine and what its adapters are named after.

    ``hash``: :func:`fingerprint`; ``encoder``: digest of the text encoder's configuration, weights and tokenizer.
    """

    name: str
    engine: TextToLoRA
    hash: str
    encoder: str
    _configs: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict, repr=False)  # of PEFT, by chunks

    @classmethod
    def load(cls, name: str, source: str) -> Checkpoint:
        """The checkpoint ``source`` as ``TextToLoRA.from_pretrained`` takes it; raises as that does."""
        return cls.of(TextToLoRA.from_pretrained(source), name)

    @classmethod
    def of(cls, engine: TextToLoRA, name: str) -> Checkpoint:
        """The checkpoint of a loaded engine."""
        encoder = engine.encoder
        # Of a chat template, which tokenizer.json does not hold.
        affixes = json.dumps(encoder.affixes()) if isinstance(encoder, DocumentEncoder) else ""
        tokenizer = "" if isinstance(encoder, OneHotEncoder) else _tokenizer(encoder.tokenizer)
        config, weights = json.dumps(to_json(encoder.config), sort_keys=True), content_checksum(encoder.weights())
        described = names.digest("encoder", config, weights + tokenizer + affixes)
        return cls(name, engine, fingerprint(engine.hypernetwork), described)

    def prepare(self, argument: str, text: str) -> tuple[str, str, int]:
        """(text as it is tokenized, its key, its adapter's rank); ValueError, naming ``argument``, if it cannot be read."""
        encoder, config = self.engine.encoder, self.engine.hypernetwork.config
        try:
            (prepared,), rank = encoder.prepare([text]), config.rank
            if isinstance(encoder, DocumentEncoder):
                rank = config.total_rank(len(encoder.chunks([text])[0]))
        except ValueError as error:
            raise ValueError(str(error).replace("texts[0]", argument, 1)) from None
        return prepared, names.key(self.hash, self.encoder, VERSION_OF_ADAPTERS, prepared), rank

    def folders(self, texts: Sequence[str], store: AdapterStore, argument: str = "texts") -> list[tuple[str, Path]]:
        """(key, folder) of each of ``texts``; those that ``store`` lacks are written, BATCH in a pass.

        Raises ValueError, naming ``argument``, for anything but a list of texts that the encoder takes, Unavailable where
        there is no room.
        """
        check_list(texts, argument)
        keys = [self.prepare(f"{argument}[{i}]", text)[1] for i, text in enumerate(texts)]
        found, _ = self.make(list(zip(texts, keys, strict=True)), store)
        for result in found.values():
            if not isinstance(result, Path):
                raise result
        return [(key, found[key]) for key in keys]

    def make(self, jobs: Sequence[tuple[str, str]], store: AdapterStore) -> tuple[dict[str, Path | Exception], int]:
        """(folder or error of each key, number of adapters that were generated); ``jobs``: pairs (text, key).

        Raises Unavailable if the store cannot be read.
        """
        found: dict[str, Path | Exception] = {key: path for _, key in jobs if (path := store.find(key)) is not None}
        lacking = [(key, text) for key, text in {key: text for text, key in jobs}.items() if key not in found]
        for start in range(0, len(lacking), BATCH):
            batch = lacking[start : start + BATCH]
            for (key, _), embedding in zip(batch, self.engine.embed([text for _, text in batch]), strict=True):
                try:
                    found[key] = self._write(key, embedding, store)
                except Exception as error:  # the others are still written
                    found[key] = error
        return found, sum(isinstance(found[key], Path) for key, _ in lacking)

    def _write(self, key: str, embedding: Tensor, store: AdapterStore) -> Path:
        if not store.memory:
            stack = adapter(self.engine.hypernetwork, embedding)
            return store.write(key, lambda folder: stack.save_pretrained(folder, 0, dtype=DTYPE, fold=True))
        if not is_finite(embedding):
            raise ValueError("embedding: holds NaN or infinite values")
        chunks = len(embedding) if embedding.dim() > 1 else 1  # what the rank depends on
        if chunks not in self._configs:
            self._configs[chunks] = adapter(self.engine.hypernetwork, embedding).peft_config(0, fold=True)

        def fill(folder: Path) -> None:
            note = {"checkpoint": self.name, "sha256": self.hash, "key": key}
            save_file({EMBEDDING: embedding.float().cpu().contiguous()}, folder / EMBEDDING_NAME)
            for name, value in ((CONFIG_NAME, self._configs[chunks]), (NOTE_NAME, note)):
                (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

        return store.write(key, fill)

    def length(self, text: str) -> tuple[int, int]:
        """(tokens of a prepared text, tokens of it that the encoder uses); (0, 0) where none can be left out."""
        encoder = self.engine.encoder
        if isinstance(encoder, (OneHotEncoder, DocumentEncoder)):
            return 0, 0
        if text.isascii() and len(text) + encoder.tokenizer.num_special_tokens_to_add() <= encoder.max_length:
            return 0, 0  # a token has a character or more
        tokens = len(encoder.tokenizer(text, verbose=False)["input_ids"])
        return tokens, min(tokens, encoder.max_length)
