"""DocumentEncoder: texts of any length to chunks of tokens, and chunks to the hidden states of a frozen language model."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from t2l_engine.files.errors import ConfigError, positive_int, short_repr
from t2l_engine.text.config import DocumentEncoderConfig
from t2l_engine.text.encoder import Modules, WorkedExamples, check_list, check_text, load, pad, positions, refuse_examples
from t2l_engine.text.prompts import worked_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Bytes of hidden states that are read at once, of all layers and chunks.
READ_BYTES = 1 << 29
EPS = 1e-6  # of the normalisation of hidden states


class DocumentEncoder:
    """Reads documents token by token with a frozen language model, without an LM head.

    :meth:`chunks` tokenizes and cuts; :meth:`read` gives hidden states of many chunks in padded batches.

    Source: arXiv 2602.15902.

    >>> from t2l_engine import DocumentEncoder, DocumentEncoderConfig
    >>> encoder = DocumentEncoder.from_config(DocumentEncoderConfig("smollm2-135m", "last", 4, prefix="", suffix=""))
    >>> contexts = encoder.chunks(["It rains.", "The bakery opens at seven."], max_chunk_tokens=4)
    >>> [[len(chunk) for chunk in chunks] for chunks in contexts]
    [[3], [3, 3]]
    >>> [(indices, states.shape) for indices, states, mask in encoder.read(contexts)]
    [([0, 1, 2], torch.Size([3, 3, 576]))]
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: DocumentEncoderConfig):
        """``model``: a transformers decoder, set to eval mode; ``tokenizer``: its tokenizer, or None to read ids alone.

        Raises ConfigError if ``model`` is no decoder with layers and a final norm, or has fewer than ``num_layers``.
        """
        self.config, self.tokenizer, self.max_examples = config, tokenizer, config.max_examples
        self.model = (model.get_decoder() if hasattr(model, "get_decoder") else model).eval()
        layers = getattr(self.model, "layers", None)
        self.norm: Any = getattr(self.model, "norm", None)  # the final one
        if not isinstance(layers, nn.ModuleList) or not isinstance(self.norm, nn.Module):
            raise ConfigError(f"encoder: expected a decoder with layers and a final norm, got {type(self.model).__name__}")
        self._layers = layers
        count = len(layers) - 1 if config.num_layers is None else config.num_layers
        if count > len(layers):
            raise ConfigError(f"encoder.num_layers: expected at most the {len(layers)} of {config.name!r}, got {count}")
        first, last = {"all": (0, count), "embeddings": (0, 0)}.get(config.states, (count, count))
        self._read_layers: Sequence[int] = config.layers or range(first, last + 1)
        if self._read_layers[-1] > len(layers):
            raise ConfigError(f"encoder.layers: expected at most the {len(layers)} of {config.name!r}, got {config.layers}")
        self._lock = threading.Lock()
        self._modules, self._positions = Modules(self.model), positions(self.model)

    @classmethod
    def from_config(
        cls,
        config: DocumentEncoderConfig,
        *,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
    ) -> DocumentEncoder:
        """Load the language model that ``config`` names; raises as :meth:`TextEncoder.from_pretrained`.

        Without tokenizer files only ids can be read.  ``dtype``: of the weights; None: the configuration's, but not bfloat16
        on a CPU that multiplies float32 faster.
        """
        model, tokenizer = load(config, dtype, device, trust_remote_code, needs_tokenizer=False)
        return cls(model, tokenizer, config)

    @property
    def feature_size(self) -> int:
        """Width of the states of a token: the language model's hidden size, or with states "layers" that of all of them."""
        return self.model.config.get_text_config().hidden_size * len(self.config.layers or (0,))

    @property
    def num_states(self) -> int:
        """Hidden states of a token that are read."""
        return len(self._read_layers) if self.config.states == "all" else 1

    def weights(self) -> dict[str, Tensor]:
        """All tensors of the language model, by name."""
        return dict(self.model.state_dict())

    def prepare(self, texts: Sequence[str], examples: WorkedExamples = None) -> list[str]:
        """Each text with its examples, as it is tokenized, without prefix and suffix.

        Raises ValueError for anything but a list of texts with a list of examples or None for each, an empty text without
        examples, and more examples than it reads.
        """
        check_list(texts)
        if not self.max_examples:
            refuse_examples(self.config.name, examples)
        given = [None] * len(texts) if examples is None else examples
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(texts):
            got = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
            raise ValueError(f"examples: expected a list of {len(texts)}, one entry a text, got {got}")
        prepared = []
        for i, (text, shots) in enumerate(zip(texts, given, strict=True)):
            if not (shots and text == ""):
                check_text(f"texts[{i}]", text, "text")
            prepared.append(condition_text(text, _checked(f"examples[{i}]", shots, self.max_examples)))
        return prepared

    def chunks(
        self, texts: Sequence[str], max_chunk_tokens: int | None = None, examples: WorkedExamples = None
    ) -> list[list[list[int]]]:
        """Token ids of the chunks of each text, with prefix and suffix; ``max_chunk_tokens``: None: as configured.

        ``examples``: of each text, worked examples (input, answer) or None; they follow the text.

        Raises ValueError for an empty list or text, without a tokenizer, and for a text that is longer than the model's
        positions and is not cut.
        """
        texts = self.prepare(texts, examples)
        most = self.config.max_chunk_tokens if max_chunk_tokens is None else max_chunk_tokens
        if most is not None:
            positive_int("max_chunk_tokens", most)
        prefix, suffix = self.affixes()
        cut = []
        for text in texts:
            # As SakanaAI's code: the tokens with prefix and suffix are cut, then every chunk gets what it lacks of both.
            ids = self._ids(prefix + text + suffix)
            count = math.ceil(len(ids) / (most or len(ids)))
            size = math.ceil(len(ids) / count)
            parts = [ids[j : j + size] for j in range(0, len(ids), size)]
            start, end = (self._ids(affix) for affix in (prefix, suffix)) if len(parts) > 1 else ([], [])
            last = len(parts) - 1
            cut.append([(start if j else []) + part + (end if j < last else []) for j, part in enumerate(parts)])
        self._check("texts", cut)
        return cut

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def affixes(self) -> tuple[str, str]:
        """Prefix and suffix of every chunk; ValueError without a tokenizer, or if its chat template does not give them."""
        if self.tokenizer is None:
            raise ValueError(f"encoder {self.config.name!r}: expected files of a tokenizer; give ids to embed_ids()")
        if self.config.prefix is not None and self.config.suffix is not None:
            return self.config.prefix, self.config.suffix
        mark = "\u2063text\u2063"  # invisible separators, which no template has
        chat = [{"role": "system", "content": ""}, {"role": "user", "content": mark}]
        try:
            prefix, _, suffix = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            ).partition(mark)
        except Exception as error:  # templates raise what they like
            raise ValueError(
                f"encoder {self.config.name!r}: its chat template takes no system message ({short_repr(str(error))}); "
                "state encoder.prefix and encoder.suffix in config.json"
            ) from None
        return prefix, suffix

    def _check(self, name: str, contexts: Sequence[Sequence[Sequence[int]]]) -> None:
        def is_filled(value: object) -> bool:
            return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0

        if not is_filled(contexts):
            raise ValueError(f"{name}: expected one or more, each a list of chunks of token ids, got {short_repr(contexts)}")
        limit, words = self._positions, self.model.config.get_text_config().vocab_size
        for i, chunks in enumerate(contexts):
            if not is_filled(chunks) or not all(map(is_filled, chunks)):
                raise ValueError(f"{name}[{i}]: expected one or more chunks of token ids, got {short_repr(chunks)}")
            if not all(isinstance(token, int) and 0 <= token < words for chunk in chunks for token in chunk):
                raise ValueError(f"{name}[{i}]: expected token ids below {words}, got {short_repr(chunks)}")
            longest = max(map(len, chunks))
            if limit is not None and longest > limit:
                raise ValueError(
                    f"{name}[{i}]: expected chunks of at most the {limit} tokens that {self.config.name!r} reads, got "
                    f"{longest}; cut it: max_chunk_tokens={limit // 2}"
                )

    def read(self, contexts: Sequence[Sequence[Sequence[int]]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """``(indices, states, mask)`` of batches of chunks; indices count the chunks of all contexts in order.

        States are ``[chunks, num_states, L, hidden]``, or ``[chunks, L, hidden]`` unless all are read; mask ``[chunks, L]``
        bool.  A batch has at most READ_BYTES of states, and its longest chunk at most twice the tokens of its shortest.

        Raises ValueError for a context without chunks or a chunk without ids or longer than the model's positions,
        RuntimeError if adapters are in use on the model.
        """
        self._check("contexts", contexts)
        chunks = [torch.tensor(chunk, dtype=torch.long) for context in contexts for chunk in context]
        of_token = self.num_states * self.feature_size * self.model.dtype.itemsize
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i]))
        while order:
            count, most = 1, 2 * len(chunks[order[0]])
            while count < len(order) and len(chunks[order[count]]) <= min(most, READ_BYTES // of_token // (count + 1)):
                count += 1
            batch, order = order[:count], order[count:]
            yield batch, *self._states([chunks[i] for i in batch])

    @torch.no_grad()
    def _states(self, chunks: list[Tensor]) -> tuple[Tensor, Tensor]:
        self._modules = self._modules.current(self.model)
        self._modules.refuse_adapters(self.config.name)
        ids, mask = (of.to(self.model.device) for of in pad(chunks))
        with self._lock, recorded(self._layers, self._read_layers) as outputs:
            self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        states = [outputs[i].to(ids.device) for i in self._read_layers]
        if self.config.states == "layers":
            return torch.cat([rms_norm(state, state.shape[-1:], eps=EPS) for state in states], dim=-1), mask
        if self.config.states != "embeddings":
            states[-1] = self.norm(states[-1])
        return torch.stack(states, dim=1) if self.config.states == "all" else states[0], mask


class _LastLayer(Exception):
    """The last layer that is read has run."""


@contextlib.contextmanager
def recorded(layers: nn.ModuleList, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Hidden states, by index, of a forward pass in this thread, which ends after the last of them.

    0: what the first of ``layers`` gets; i: the output of the i-th, before the final norm.  By hooks of our own:
    transformers' ``output_hidden_states`` runs all layers, and leaves hooks in the model.
    """
    outputs: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def record(index: int, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:  # another thread may run the model meanwhile
            return
        outputs[index] = (output[0] if isinstance(output, tuple) else output) if index else args[0]
        if index == indices[-1]:
            raise _LastLayer

    with contextlib.ExitStack() as hooks, contextlib.suppress(_LastLayer):
        for i in indices:
            hooks.enter_context(layers[max(i - 1, 0)].register_forward_hook(functools.partial(record, i)))
        yield outputs


def condition_text(text: str, examples: Sequence[tuple[str, str]] = ()) -> str:
    """The text that is read: ``text`` and worked examples (input, answer), as in a raw prompt."""
    parts = [text.strip(), *(worked_example(x.strip(), y.strip()) for x, y in examples)]
    return "\n\n".join(part for part in parts if part)


def _checked(name: str, examples: Any, most: int) -> list[tuple[str, str]]:
    """The worked examples of one text; ValueError unless they are a list of at most ``most`` pairs of texts."""
    if examples is None:
        return []
    if isinstance(examples, str) or not isinstance(examples, Sequence):
        raise ValueError(f"{name}: expected a list of (input, answer), got {short_repr(examples)}")
    if len(examples) > most:
        raise ValueError(f"{name}: expected at most {most}, with which this encoder was trained, got {len(examples)}")
    for i, pair in enumerate(examples):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name}[{i}]: expected (input, answer), got {short_repr(pair)}")
        for j, what in enumerate(("input", "answer")):
            check_text(f"{name}[{i}][{j}]", pair[j], what)
    return [(x, y) for x, y in examples]
