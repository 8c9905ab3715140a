"""What one pass of a transformers model computes and reads, counted by torch's FLOP counter on the meta device.

The real module runs once over two tokens, without weights.  FLOPs: two per multiply-add of matrix products; elementwise
operations, rotary embeddings and embedding lookups are not counted.  Of a mixture of experts, the experts that a token uses
count.  Attention counts as in every kernel's useful work: two products per unmasked pair of query and key, by each layer's
own mask and sliding window, whatever the length.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2l_engine.files.errors import MAX_SHOWN, MAX_SIZE, ConfigError, short_repr
from t2l_engine.files.text import read_json

if TYPE_CHECKING:
    import torch

Parts = dict[str, int]  #: Name of a part -> FLOPs or bytes.
#: Model types of remote code -> the same model in transformers.
ALIASES = {"new": "gte"}
#: Fields that hold a size, and those of them that cannot be 0; the largest value by the beginning of a name.
SIZES = re.compile(r"(num|n)_\w+|(?!use_)\w+_(size|dim|window|step)|max_position_embeddings")
POSITIVE = re.compile(r"(hidden|intermediate|vocab)_size|num_(hidden_layers|attention_heads|key_value_heads)")
LARGEST = {"num_hidden_layers": 512, "n_layer": 512, "num_layers": 512, "num_": 4096, "": MAX_SIZE}
UNREAD = ("model_type", "quantization_config", "auto_map", "dtype", "torch_dtype")
TOKENS = 2


@dataclasses.dataclass(frozen=True)
class Attention:
    """One layer.  ``cached``: entries of keys and values per token; ``window``: most keys per query, its own included."""

    pair_flops: int
    cached: int
    window: int | None
    causal: bool

    def pairs(self, tokens: int, before: int = 0) -> int:
        """Number of unmasked (query, key) pairs of ``tokens`` queries after ``before`` cached tokens.

        >>> Attention(1, 1, None, True).pairs(3, 10), Attention(1, 1, 12, True).pairs(3, 10)
        (36, 35)
        """
        window = tokens + before if self.window is None else self.window
        short = min(tokens, max(0, window - before))  # queries that the window does not limit
        causal = short * before + short * (short + 1) // 2 + (tokens - short) * window
        return causal if self.causal else 2 * causal - tokens

    def kept(self, tokens: int) -> int:
        """Entries of keys and values that stay cached of ``tokens`` tokens."""
        return self.cached * (tokens if self.window is None else min(tokens, self.window))


@dataclasses.dataclass(frozen=True)
class Model:
    """Counted sizes of a language model or text encoder.

    ``attention``: of each layer that attends.  ``token_flops``: of one token, without attention's pairs and logits;
    ``logit_flops``: of the logits at one position.  ``parameters``: a tied matrix counts once.  Among them ``embeddings``:
    tables, read by rows; ``logits``: the output matrix, tied to a table or not; ``expert_weights``: of ``experts`` routed
    experts, of which a token uses ``experts_per_token``.  ``linears``: (in, out) features of the linears of one name in
    every layer.
    """

    model_type: str
    hidden: int
    vocabulary: int
    layers: int
    attention: tuple[Attention, ...]
    token_flops: int
    logit_flops: int
    parameters: int
    embeddings: int
    logits: int
    tied: bool
    expert_weights: int
    experts: int
    experts_per_token: int
    linears: Mapping[str, tuple[int, int]]

    def flops(self, tokens: int, before: int = 0, *, logits: int = 1) -> Parts:
        """FLOPs of ``tokens`` tokens of one sequence after ``before`` cached ones, with logits at ``logits`` positions.

        The same for one pass over a prompt and for decoding token by token (then ``logits=tokens``).
        """
        return {
            "matrix products": tokens * self.token_flops,
            "attention": sum(layer.pair_flops * layer.pairs(tokens, before) for layer in self.attention),
            "logits": logits * self.logit_flops,
        }

    def weights(self, tokens: int, *, logits: bool = True) -> int:
        """Entries of weights that one pass over ``tokens`` tokens reads, each token drawing its experts uniformly."""
        unused = (1 - self.experts_per_token / self.experts) ** tokens if self.experts else 0
        read = self.parameters - self.embeddings - round(self.expert_weights * unused)
        if self.tied:
            return read + logits * self.logits
        return read - (not logits) * self.logits

    def kept(self, tokens: int) -> int:
        """Entries of the KV cache of a sequence; a layer with a sliding window keeps only the window."""
        return sum(layer.kept(tokens) for layer in self.attention)

    def read_by_steps(self, steps: int, before: int) -> int:
        """Entries of the KV cache that ``steps`` decoding passes read, the first with ``before`` cached tokens."""
        # A query's own key is not read from the cache, hence the pairs with one cached token less.
        return sum(layer.cached * layer.pairs(steps, before - 1) for layer in self.attention)


def count(config: Any, *, head: bool = True) -> Model:
    """The sizes of a language model, or without ``head`` of a text encoder (a pooler is not counted).

    ``config``: a transformers configuration, its values as a dict, or the path of a ``config.json`` or its folder.  Fields
    that are missing have the defaults of their class in transformers.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: transformers knows no such model, or cannot build or run it; the message names the file.

    >>> count({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 97,
    ...     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}).linears["v_proj"]
    (64, 32)
    """
    values, where = config_values(config)
    _check_sizes(values, where)
    try:
        return _counted(values, head)
    except Exception as error:  # classes of transformers raise anything for values that do not fit
        message = " ".join(str(error).split())
        raise ConfigError(f"{where}: {message[:MAX_SHOWN]}{'...' * (len(message) > MAX_SHOWN)}") from None


def config_values(config: Any) -> tuple[dict[str, Any], str]:
    """(values, name for error messages) of any ``config`` that :func:`count` takes; of a multimodal model its text part."""
    if isinstance(config, (str, Path)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such configuration; expected a config.json or a folder with one")
        values, where = read_json(path), str(path)
    else:
        values, where = config if isinstance(config, Mapping) else config.to_dict(), "config"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, got {type(values).__name__}")
    text = values.get("text_config")
    if isinstance(text, Mapping) and "model_type" in text:
        shared = {key: values[key] for key in ("tie_word_embeddings", "dtype", "quantization_config") if key in values}
        return {**text, **shared}, f"{where}: text_config"
    return dict(values), where


def _check_sizes(values: Mapping[str, Any], where: str) -> None:
    """ConfigError for a size that is none, or that would make building the module slow."""
    for name, value in values.items():
        if not SIZES.fullmatch(name) or not isinstance(value, (int, float)):
            continue  # transformers checks other types
        low, high = bool(POSITIVE.fullmatch(name)), next(most for start, most in LARGEST.items() if name.startswith(start))
        if isinstance(value, (bool, float)) or not low <= value <= high:
            raise ConfigError(f"{where}: {name}: expected an integer from {low:d} to {high}, got {short_repr(value)}")


def _counted(values: dict[str, Any], head: bool) -> Model:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CONFIG_MAPPING, AttentionInterface, AutoModel, AutoModelForCausalLM

    stated = values.get("model_type")
    kind = ALIASES.get(stated, stated) if isinstance(stated, str) else ""
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type: expected one that transformers knows, got {short_repr(stated)}")
    config = CONFIG_MAPPING[kind].from_dict({name: value for name, value in values.items() if name not in UNREAD})
    kinds = getattr(config, "layer_types", None)
    seen: list[Attention] = []

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **given: Any) -> Any:
        if query.shape[1] % key.shape[1]:
            heads = f"{query.shape[1]} attention heads, got {key.shape[1]}"
            raise ValueError(f"num_key_value_heads: expected a divisor of {heads}")
        widths = query.shape[-1] + value.shape[-1]
        cached = key.shape[1] * (key.shape[-1] + value.shape[-1])
        causal = module.is_causal if given.get("is_causal") is None else given["is_causal"]
        sliding = kinds is not None and kinds[module.layer_idx] == "sliding_attention"
        window = config.sliding_window if sliding else given.get("sliding_window")
        seen.append(Attention(2 * query.shape[1] * widths, cached, window, causal))
        return query.new_empty(1, TOKENS, query.shape[1], value.shape[-1]), None

    AttentionInterface.register("counted", attend)
    with torch.device("meta"), torch.no_grad():
        ways = {"attn_implementation": "counted", "experts_implementation": "batched_mm"}
        whole = (AutoModelForCausalLM if head else AutoModel).from_config(config, **ways)
        body = whole.base_model
        body.pooler = None
        experts = _experts(body, config)
        with FlopCounterMode(display=False) as counter:
            hidden = body(input_ids=torch.ones(1, TOKENS, dtype=torch.long), use_cache=False).last_hidden_state
        matrix = whole.get_output_embeddings() if head else None
        with FlopCounterMode(display=False) as of_logits:
            if matrix is not None:
                matrix(hidden[:, -1:])
    if not seen:
        raise ValueError(f"model_type: {kind} does not attend by transformers' attention interface, so it cannot be counted")
    return Model(
        values["model_type"],
        hidden.shape[-1],
        config.vocab_size,
        config.num_hidden_layers,
        tuple(seen),
        (counter.get_total_flops() - _rotary(counter)) // TOKENS,
        of_logits.get_total_flops(),
        parameters=sum(p.numel() for p in whole.parameters()),
        embeddings=sum(m.weight.numel() for m in body.modules() if isinstance(m, torch.nn.Embedding)),
        logits=0 if matrix is None else matrix.weight.numel(),
        tied=matrix is not None and matrix.weight is whole.get_input_embeddings().weight,
        **experts,
        linears=_linears(body, config.num_hidden_layers),
    )


def _rotary(counter: Any) -> int:
    """FLOPs of the products inside rotary embeddings, which transformers forms by a matrix product."""
    found = (ops for name, ops in counter.get_flop_counts().items() if "rotary" in name.rpartition(".")[2])
    return sum(sum(ops.values()) for ops in found)


def _experts(body: torch.nn.Module, config: Any) -> dict[str, int]:
    number = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    modules = [m for name, m in body.named_modules() if name.endswith("experts") and "shared" not in name]
    weights = sum(p.numel() for module in modules for p in module.parameters())
    if not weights:
        return {"expert_weights": 0, "experts": 0, "experts_per_token": 0}
    if config.num_experts_per_tok > number:
        raise ValueError(f"num_experts_per_tok: expected at most {number}, got {config.num_experts_per_tok}")
    return {"expert_weights": weights, "experts": number, "experts_per_token": config.num_experts_per_tok}


def _linears(body: torch.nn.Module, layers: int) -> dict[str, tuple[int, int]]:
    import torch

    found = defaultdict(list)
    for name, module in body.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name.rpartition(".")[2]].append((module.in_features, module.out_features))
    return {name: of[0] for name, of in found.items() if len(of) == layers and len(set(of)) == 1}
