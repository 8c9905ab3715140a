"""Closed forms of FLOPs and of memory traffic in bytes, as sums of named terms.

FLOPs: two per multiply-add; no padding, true ranks, only unmasked pairs of attention.  Elementwise operations (norms,
activations, softmax, rotary embeddings, embedding lookups) are not counted, as in ``torch.utils.flop_counter``.  Bytes:
weights, keys and values, adapters; activations are assumed to stay in cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from t2l_engine.hypernetwork.config import DISCRETE_HIDDEN, NUM_CLASSES, NUM_CODES, HyperNetworkConfig
from t2l_engine.research.costs.decoder import Decoder
from t2l_engine.research.costs.encoder import Encoder
from t2l_engine.research.costs.terms import Cost, byte, flop, total

_LINEAR = "2 per weight and token (Kaplan et al. 2020, arXiv 2001.08361, table 1)"
_GATED = "2 * 3 * hidden * intermediate per token and layer (gated MLP: arXiv 2002.05202)"
_PAIRS = "4 * heads * head_dim per layer and unmasked pair of query and key (arXiv 1706.03762, section 3.2.1)"
_LOGITS = "2 * hidden * vocabulary per position with logits"
_EXPERTS = "2 * 3 * hidden * intermediate per chosen expert, token and layer (arXiv 2401.04088)"
_LORA = "2 * rank * (in + out) per token and adapted linear (arXiv 2106.09685, section 4.1)"
_TRUNK = "arXiv 2506.06105, section 3 and appendix; rows are layers x modules (x sides x ranks), 2 per weight and row"
_CACHE = "2 * kv_heads * head_dim per layer and token within the window (arXiv 2305.13245)"


def pairs(tokens: int, cached: int, window: int | None) -> int:
    """Number of unmasked (query, key) pairs of ``tokens`` consecutive queries after ``cached`` tokens, with a causal mask.

    ``window``: maximum number of keys per query, its own included; None: no limit.

    >>> pairs(3, 10, None), pairs(3, 10, 12)
    (36, 35)
    """
    short = tokens if window is None else min(tokens, max(0, window - cached))  # queries that the window does not limit
    return short * cached + short * (short + 1) // 2 + (tokens - short) * (window or 0)


def decoder_flops(decoder: Decoder, tokens: int, *, cached: int = 0, logits: int = 1) -> Cost:
    """FLOPs of ``tokens`` of one sequence after ``cached`` tokens in the KV cache, with logits at ``logits`` positions.

    The same for one pass over a prompt and for decoding token by token (then ``logits=tokens``).
    """
    d, e = decoder, decoder.experts
    moe, dense = sum(d.sparse), d.layers - sum(d.sparse)
    seen = sum(pairs(tokens, cached, window) * count for window, count in _windows(d).items())
    parts = [
        flop("attention projections", 2 * tokens * d.layers * d.attention_weights, _LINEAR),
        flop("MLP", 2 * tokens * dense * 3 * d.hidden * d.intermediate, _GATED),
        flop("attention", 4 * d.heads * d.head_dim * seen, _PAIRS),
        flop("logits", 2 * logits * d.hidden * d.vocabulary, _LOGITS),
    ]
    if e is not None:
        widths = e.per_token * e.intermediate + e.shared
        shared_gate = d.hidden if e.shared else 0
        parts.append(flop("experts", 2 * tokens * moe * 3 * d.hidden * widths, _EXPERTS))
        parts.append(flop("router", 2 * tokens * moe * (d.hidden * e.count + shared_gate), _LINEAR))
    return total(parts)


def encoder_flops(encoder: Encoder | Decoder, tokens: int) -> Cost:
    """FLOPs of a text of ``tokens`` tokens through a text encoder, or a language model up to its last hidden state."""
    if isinstance(encoder, Decoder):
        return decoder_flops(encoder, tokens, logits=0)
    c = encoder
    matrices, source = (3, _GATED) if c.gated else (2, _LINEAR)
    return total(
        [
            flop("attention projections", 2 * tokens * c.layers * 4 * c.hidden**2, _LINEAR),
            flop("MLP", 2 * tokens * c.layers * matrices * c.hidden * c.intermediate, source),
            flop("attention", 4 * c.layers * c.hidden * tokens**2, "4 * hidden per layer and pair of tokens"),
        ]
    )


def hypernet_flops(config: HyperNetworkConfig, num_tasks: int = 1) -> Cost:
    """FLOPs of generating ``num_tasks`` adapters with folded constants, as the kernels of this package do.

    Trunk rows per task: n*K base rows through mixer and mlp1, times sides through mlp2, times ranks through mlp3 (and
    through mlp2 in variants where ranks enter before it); heads only for the columns that are used.
    """
    c = config
    m, h, t, n = c.width, c.head_in_size, c.task_width, c.num_layers
    rows = n * len(c.modules)
    encoder = {  # matrix products only, without vq's search of the nearest code
        "linear": c.embed_dim * t,
        "vq": c.embed_dim * 4 * t + 4 * t * t,
        "softmax": c.embed_dim * 4 * t + 4 * t * NUM_CODES + NUM_CODES * t,
        "discrete": c.embed_dim * DISCRETE_HIDDEN + DISCRETE_HIDDEN * NUM_CLASSES,
    }[c.task_encoder]
    passes = {"S-rotary": 1 + c.num_ranks}.get(c.variant, 1 if c.num_sides == 2 else c.num_ranks)
    per_task = [
        flop("task encoder", 2 * encoder, _TRUNK),
        flop("mixer", 2 * t * 4 * m + rows * 8 * m * m, _TRUNK),
        flop("mlp1", 16 * m * m * rows, _TRUNK),
        flop("mlp2", 16 * m * m * rows * c.num_sides * passes, _TRUNK),
        flop("mlp3", (8 * m * m + 8 * m * h) * rows * c.num_sides * c.num_ranks, _TRUNK),
        flop("heads", 2 * h * adapter_values(c), "2 * head_in_size per entry of A and B"),
    ]
    return total(per_task) * num_tasks


def lora_flops(config: HyperNetworkConfig, num_tokens: int) -> Cost:
    """FLOPs of applying one unmerged adapter to ``num_tokens`` tokens."""
    return flop("LoRA", 2 * num_tokens * adapter_values(config), _LORA)


def merge_flops(config: HyperNetworkConfig) -> Cost:
    """FLOPs of merging one adapter into the weights: the products B A, without the elementwise additions."""
    source = "2 * rank * in * out per adapted linear (arXiv 2106.09685, section 4.1)"
    return flop("merge", 2 * config.rank * merged_values(config), source)


# --- values and bytes ------------------------------------------------------------------------------------------------


def adapter_values(config: HyperNetworkConfig) -> int:
    """Number of entries of A and B of one adapter."""
    return config.num_layers * config.rank * sum(config.in_features + config.out_features)


def merged_values(config: HyperNetworkConfig) -> int:
    """Number of weights that merging an adapter changes."""
    products = (n_in * n_out for n_in, n_out in zip(config.in_features, config.out_features, strict=True))
    return config.num_layers * sum(products)


def cache_bytes(decoder: Decoder, tokens: int, itemsize: float = 2) -> int:
    """Bytes of the KV cache of a sequence of ``tokens`` tokens; a layer with a sliding window keeps only the window."""
    kept = sum(_kept(tokens, window) * count for window, count in _windows(decoder).items())
    return round(2 * decoder.kv_heads * decoder.head_dim * kept * itemsize)


def pass_bytes(
    decoder: Decoder,
    contexts: Sequence[int],
    new: int = 1,
    *,
    itemsize: float = 2,
    cache_itemsize: float = 2,
    logits: bool = True,
) -> Cost:
    """Bytes of one forward pass over ``new`` tokens of every sequence; ``contexts``: cached tokens of each sequence.

    Weights are read once; of a mixture of experts, as many experts as that many tokens use on average.  The embedding matrix
    is counted only if it is also the output matrix and ``logits`` are computed.
    """
    windows = _windows(decoder)
    read = sum(_kept(tokens, window) * count for tokens in contexts for window, count in windows.items())
    written = len(contexts) * sum(_kept(new, window) * count for window, count in windows.items())
    return _moved(decoder, _weights(decoder, new * len(contexts), logits), read, written, itemsize, cache_itemsize)


def steps_bytes(decoder: Decoder, steps: int, cached: int, *, itemsize: float = 2, cache_itemsize: float = 2) -> Cost:
    """Bytes of decoding ``steps`` tokens of one sequence, one pass each, the first with ``cached`` tokens in the cache."""
    # Cached keys exclude the query's own, hence the pairs with one cached token less.
    read = sum(pairs(steps, cached - 1, window) * count for window, count in _windows(decoder).items())
    return _moved(decoder, steps * _weights(decoder, 1), read, steps * decoder.layers, itemsize, cache_itemsize)


def _weights(decoder: Decoder, tokens: int, logits: bool = True) -> int:
    """Number of weights that a pass over ``tokens`` tokens reads."""
    parts = decoder.parameters
    if not (decoder.tied and logits):
        del parts["embeddings"]
    if not logits:
        del parts["logits"]
    if decoder.experts is not None:
        parts["experts"] = round(parts["experts"] * decoder.experts.hit(tokens) / decoder.experts.count)
    return sum(parts.values())


def _moved(decoder: Decoder, weights: int, read: int, written: int, itemsize: float, cache_itemsize: float) -> Cost:
    """``read``, ``written``: tokens of the KV cache, summed over layers."""
    unit = 2 * decoder.kv_heads * decoder.head_dim * cache_itemsize
    return total(
        [
            byte("weights", round(weights * itemsize), "every weight once per pass"),
            byte("KV cache read", round(unit * read), _CACHE),
            byte("KV cache written", round(unit * written), _CACHE),
        ]
    )


def _windows(decoder: Decoder) -> dict[int | None, int]:
    """Window -> number of layers."""
    return {window: decoder.windows.count(window) for window in dict.fromkeys(decoder.windows)}


def _kept(tokens: int, window: int | None) -> int:
    return tokens if window is None else min(tokens, window)
