"""LLMEncoder: descriptions and worked examples to task embeddings, by attention pooling of a language model's states."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.text.config import LLMEncoderConfig
from t2l_engine.text.encoder import CACHE_SIZE, TextEncoder, WorkedExamples, check_list, check_text, load, pad_states
from t2l_engine.text.prompts import worked_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EPS = 1e-6  # of the normalisation of hidden states


class _Block(nn.Module):
    """Queries attend to tokens and to each other, then pass an MLP (pre-norm, residual)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        n, count, width = queries.shape
        query = self.query(self.norm1(queries)).view(n, count, self.heads, -1).transpose(1, 2)
        seen = self.key_value(self.norm2(torch.cat((tokens, queries), dim=1)))
        key, value = seen.view(n, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        pooled = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        queries = queries + self.out(pooled.transpose(1, 2).reshape(n, count, width))
        return queries + self.linear2(silu(self.linear1(self.norm3(queries))))


class AttentionPooling(nn.Module):
    """Learned queries that attend to the tokens of a text: ``task_emb`` from normalised hidden states.

    The trained part of an :class:`LLMEncoder` (attention pooling with a fixed number of latent queries, as in Perceiver,
    arXiv 2103.03206).  It has its own parameters in a checkpoint, and no kernel: its cost is that of a few rows of the
    language model.
    """

    def __init__(self, config: LLMEncoderConfig, hidden_size: int):
        super().__init__()
        self.project = nn.Linear(len(config.layers) * hidden_size, config.width)
        # Small beside what attention adds, so that texts differ from the start; the norm before attention undoes the scale.
        self.queries = nn.Parameter(torch.randn(config.queries, config.width) * 0.02)
        self.blocks = nn.ModuleList(_Block(config.width, config.heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """``task_emb [N, queries * width]`` of ``states [N, L, layers * hidden]``, as :meth:`LLMEncoder.states` gives them.

        ``mask [N, L]``: bool, the tokens of each text.
        """
        tokens = self.project(states.to(self.project.weight.dtype))
        queries = self.queries.expand(len(states), -1, -1)
        seen = pad(mask, (0, len(self.queries)), value=True)[:, None, None]
        for block in self.blocks:
            queries = block(queries, tokens, seen)
        return self.norm(queries).flatten(1)


class LLMEncoder(TextEncoder):
    """LLM encoder with attention pooling: embeds descriptions and worked examples by a frozen language model.

    Used as a :class:`TextEncoder`.  An :class:`AttentionPooling` of the hidden states at every token makes ``task_emb``, so
    it depends on names, numbers and strings in a description.  Hidden states are normalised to RMS 1 per token and layer;
    ``task_emb`` is layer-normalised per query, not L2-normalised.

    Source: paper section 3, with pooling by latent queries (Perceiver, arXiv 2103.03206) in place of one vector.

    >>> import t2l_engine as t2l
    >>> from t2l_engine.text.llm_encoder import AttentionPooling
    >>> config = t2l.LLMEncoderConfig("smollm2-135m", layers=(0, 20), queries=4, width=64, max_examples=6)
    >>> encoder = t2l.LLMEncoder.from_config(config, AttentionPooling(config, 576))
    >>> encoder.encode(["Give the antonym."], examples=[[("hot", "cold"), ("up", "down")]]).shape
    torch.Size([1, 256])
    """

    config: LLMEncoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: LLMEncoderConfig,
        pooling: AttentionPooling,
        *,
        cache_size: int = CACHE_SIZE,
    ):
        """``model``: a decoder; ``pooling``: on its device; else as :class:`TextEncoder`.

        Raises ConfigError if ``model`` lacks a layer, or ``pooling`` is of another width.
        """
        text_config = model.config.get_text_config()
        depth, width = text_config.num_hidden_layers, len(config.layers) * text_config.hidden_size
        if config.layers[-1] > depth:
            raise ConfigError(f"encoder.layers: expected at most the {depth} layers of {config.name!r}, got {config.layers}")
        if pooling.project.in_features != width:
            raise ConfigError(
                f"encoder: expected a pooling of hidden states of width {pooling.project.in_features} as it was trained "
                f"with, got {width} from {config.name!r}"
            )
        # What the methods of TextEncoder that are kept read of a configuration, both have.
        super().__init__(model, tokenizer, config, cache_size=cache_size)  # pyright: ignore[reportArgumentType]
        self.pooling, self.max_examples = pooling.eval(), config.max_examples
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        """TypeError: an LLM encoder has a trained pooling; the message says how to load one."""
        raise TypeError(
            "LLMEncoder: expected from_config(config, pooling), or TextToLoRA.from_pretrained(checkpoint).encoder"
        )

    from_model = from_pretrained

    @classmethod
    def from_config(
        cls,
        config: LLMEncoderConfig,
        pooling: AttentionPooling | None = None,
        *,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        cache_size: int = CACHE_SIZE,
    ) -> LLMEncoder:
        """Load the language model that ``config`` names; raises as :meth:`TextEncoder.from_pretrained`.

        ``pooling``: None: a new one with random parameters.
        """
        model, tokenizer = load(config.name, config.dtype, device, trust_remote_code)
        if pooling is None:
            pooling = AttentionPooling(config, model.config.get_text_config().hidden_size)
        return cls(model, tokenizer, config, pooling.to(device), cache_size=cache_size)

    def weights(self) -> dict[str, Tensor]:
        return super().weights() | {f"pooling.{name}": tensor for name, tensor in self.pooling.state_dict().items()}

    @property
    def embed_dim(self) -> int:
        """Width of ``task_emb``."""
        return self.config.embed_dim

    def prepare(self, texts: Sequence[str], examples: WorkedExamples = None) -> list[str]:
        """Each description with its examples, as it is tokenized; raises ValueError as :meth:`encode`.

        A description may be empty where there are examples.
        """
        return with_examples(texts, examples, self.max_examples)

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """Hidden states ``[tokens, layers * hidden]`` in bfloat16 of each prepared text, computed in one batch; not kept.

        Raises RuntimeError if adapters are in use on the model.
        """
        return self._states(self._inputs(texts)) if texts else []

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens that are read of each prepared text."""
        return [len(inputs["input_ids"]) for inputs in self._inputs(texts)]

    def _inputs(self, texts: Sequence[str]) -> list[dict[str, list[int]]]:
        if not texts:
            return []
        found = self._tokenize({text: i for i, text in enumerate(texts)}, texts)
        return [found[text] for text in texts]

    def _embed(self, tokens: list[dict[str, list[int]]]) -> Tensor:
        return self.pooling(*pad_states(self._states(tokens)))

    @torch.no_grad()
    def _states(self, tokens: list[dict[str, list[int]]]) -> list[Tensor]:
        self._current_modules()  # raises if adapters are in use
        batch, mask = self._padded(tokens)
        with self._lock, recorded(self.model, self.config.layers) as outputs:
            self.model(**batch, attention_mask=mask.long(), use_cache=False)
        states = [outputs[i] for i in self.config.layers]  # on several devices, where the model is
        read = torch.stack([state[mask.to(state.device)].float().to(mask.device) for state in states], dim=1)
        read = read * (read.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
        return list(read.flatten(1).to(torch.bfloat16).split(mask.sum(dim=1).tolist()))


class _LastLayer(Exception):
    """The last layer that is read has run."""


@contextlib.contextmanager
def recorded(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Outputs of ``layers``, by index, of a forward pass in this thread, which ends after the last of them.

    0: what the first layer gets; i: the output of the i-th, before the final norm.  By hooks of our own: transformers'
    ``output_hidden_states`` runs all layers, and leaves hooks in the model.
    """
    depth = model.config.get_text_config().num_hidden_layers
    # Not of a vision model beside the text model, which may have as many.
    text = getattr(model, "get_decoder", lambda: None)() or model
    stack = next((m for m in text.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    outputs: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def record(index: int, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:  # another thread may run the model meanwhile
            return
        outputs[index] = (output[0] if isinstance(output, tuple) else output) if index else args[0]
        if index == layers[-1]:
            raise _LastLayer

    places = [] if stack is None else [(i, stack[max(i - 1, 0)]) for i in layers]
    hooks = [module.register_forward_hook(functools.partial(record, i)) for i, module in places]
    try:
        with contextlib.suppress(_LastLayer):
            yield outputs
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) < len(layers):
        raise ConfigError(f"encoder: expected a decoder with a list of its {depth} layers, got {type(model).__name__}")


def with_examples(texts: Sequence[str], examples: WorkedExamples, most: int, what: str = "description") -> list[str]:
    """The :func:`condition_text` of each text and its examples, of which it may have ``most``; ``what``: a text, in errors.

    Raises ValueError for anything but a list of texts with a list of examples or None for each, and for an empty text
    without examples.
    """
    check_list(texts)
    given = [None] * len(texts) if examples is None else examples
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(texts):
        got = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
        raise ValueError(f"examples: expected a list of {len(texts)}, one entry a text, got {got}")
    prepared = []
    for i, (text, shots) in enumerate(zip(texts, given, strict=True)):
        if not (shots and text == ""):
            check_text(f"texts[{i}]", text, what)
        prepared.append(condition_text(text, _checked(f"examples[{i}]", shots, most)))
    return prepared


def condition_text(description: str, examples: Sequence[tuple[str, str]] = ()) -> str:
    """The text that is embedded: the description and worked examples (input, answer), as in a raw prompt."""
    parts = [description.strip(), *(worked_example(x.strip(), y.strip()) for x, y in examples)]
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
