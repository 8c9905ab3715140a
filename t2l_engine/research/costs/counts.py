"""Closed forms of useful work and of the bytes it must move, as sums of named terms.

Operations: two a multiply-add, no padding, true ranks, the pairs a causal mask keeps.  Elementwise work (norms, activations,
softmax, rotations, embeddings) is not counted, as in ``torch.utils.flop_counter``.  Bytes: weights, keys and values,
adapters; activations, which stay in caches, are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from t2l_engine.hypernetwork.config import DISCRETE_HIDDEN, NUM_CLASSES, NUM_CODES, HyperNetworkConfig
from t2l_engine.research.costs.decoder import Decoder
from t2l_engine.research.costs.encoder import Encoder
from t2l_engine.research.costs.terms import Cost, byte, flop, total

_LINEAR = "2 a weight and token (Kaplan et al. 2020, arXiv 2001.08361, table 1)"
_GATED = "2 * 3 * hidden * intermediate a token and layer (gated MLP: arXiv 2002.05202)"
_PAIRS = "4 * heads * head_dim a layer and pair of query and key that the mask keeps (arXiv 1706.03762, section 3.2.1)"
_LOGITS = "2 * hidden * vocabulary a position whose logits are asked for"
_EXPERTS = "2 * 3 * hidden * intermediate an expert chosen, token and layer (arXiv 2401.04088)"
_LORA = "2 * rank * (in + out) a token and adapted linear (arXiv 2106.09685, section 4.1)"
_TRUNK = "arXiv 2506.06105, section 3 and appendix; rows are layers x modules (x sides x ranks), 2 a weight and row"
_CACHE = "2 * kv_heads * head_dim a token and layer that a window still holds (arXiv 2305.13245)"


def pairs(tokens: int, cached: int, window: int | None) -> int:
    """Pairs of a query and a key it sees, of ``tokens`` queries one after another, ``cached`` before them.

    A query sees itself and what is before it, at most ``window`` keys in all.

    >>> pairs(3, 10, None), pairs(3, 10, 12)
    (36, 35)
    """
    short = tokens if window is None else min(tokens, max(0, window - cached))  # queries that see all before them
    return short * cached + short * (short + 1) // 2 + (tokens - short) * (window or 0)


def decoder_flops(decoder: Decoder, tokens: int, *, cached: int = 0, logits: int = 1) -> Cost:
    """``tokens`` of one sequence, with ``cached`` before them in the cache; ``logits`` at so many positions.

    One pass over a prompt, or one token after another (then ``logits=tokens``): the operations are the same.
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
    """One text of ``tokens`` tokens through a text encoder, or through a language model up to its last hidden state."""
    if isinstance(encoder, Decoder):
        return decoder_flops(encoder, tokens, logits=0)
    c = encoder
    matrices, source = (3, _GATED) if c.gated else (2, _LINEAR)
    return total(
        [
            flop("attention projections", 2 * tokens * c.layers * 4 * c.hidden**2, _LINEAR),
            flop("MLP", 2 * tokens * c.layers * matrices * c.hidden * c.intermediate, source),
            flop("attention", 4 * c.layers * c.hidden * tokens**2, "4 * hidden a layer and pair of tokens"),
        ]
    )


def hypernet_flops(config: HyperNetworkConfig, num_tasks: int = 1) -> Cost:
    """Generating ``num_tasks`` adapters, the constant embeddings folded (kernels of this package; paper appendix).

    Trunk rows a task: n*K base rows through mixer and mlp1, times sides through mlp2, times ranks through mlp3 (and through
    mlp2, where ranks enter before it: again in S-rotary); heads only for the columns that are kept.
    """
    c = config
    m, h, t, n = c.width, c.head_in_size, c.task_width, c.num_layers
    rows = n * len(c.modules)
    encoder = {  # products of the task encoder; the nearest code of vq is no product
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
        flop("heads", 2 * h * adapter_values(c), "2 * head_in_size an entry of A and B that is kept"),
    ]
    return total(per_task) * num_tasks


def lora_flops(config: HyperNetworkConfig, num_tokens: int) -> Cost:
    """Applying one adapter beside the base linears to ``num_tokens`` tokens."""
    return flop("LoRA", 2 * num_tokens * adapter_values(config), _LORA)


def merge_flops(config: HyperNetworkConfig) -> Cost:
    """Adding one adapter to the weights: the products B A; the additions are elementwise."""
    source = "2 * rank * in * out an adapted linear (arXiv 2106.09685, section 4.1)"
    return flop("merge", 2 * config.rank * merged_values(config), source)


# --- values and bytes ------------------------------------------------------------------------------------------------


def adapter_values(config: HyperNetworkConfig) -> int:
    """Entries of A and B of one adapter."""
    return config.num_layers * config.rank * sum(config.in_features + config.out_features)


def merged_values(config: HyperNetworkConfig) -> int:
    """Weights that an adapter changes where it is merged."""
    products = (n_in * n_out for n_in, n_out in zip(config.in_features, config.out_features, strict=True))
    return config.num_layers * sum(products)


def cache_bytes(decoder: Decoder, tokens: int, itemsize: float = 2) -> int:
    """Keys and values of a sequence of ``tokens`` tokens; a layer with a window keeps no more than the window."""
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
    """One forward pass over ``new`` tokens of every sequence; ``contexts``: how many tokens of each are in the cache.

    Weights are read once, the embedding by rows (not counted, unless it is the output matrix too, and ``logits`` are asked
    for); of a mixture the experts that so many tokens need on average.
    """
    windows = _windows(decoder)
    read = sum(_kept(tokens, window) * count for tokens in contexts for window, count in windows.items())
    written = len(contexts) * sum(_kept(new, window) * count for window, count in windows.items())
    return _moved(decoder, _weights(decoder, new * len(contexts), logits), read, written, itemsize, cache_itemsize)


def steps_bytes(decoder: Decoder, steps: int, cached: int, *, itemsize: float = 2, cache_itemsize: float = 2) -> Cost:
    """``steps`` tokens of one sequence, one pass each, the first with ``cached`` tokens in the cache."""
    # A query sees itself beside what is in the cache, so these are the pairs of the tokens one place before.
    read = sum(pairs(steps, cached - 1, window) * count for window, count in _windows(decoder).items())
    return _moved(decoder, steps * _weights(decoder, 1), read, steps * decoder.layers, itemsize, cache_itemsize)


def _weights(decoder: Decoder, tokens: int, logits: bool = True) -> int:
    """Weights that a pass over so many tokens reads."""
    parts = decoder.parameters
    if not (decoder.tied and logits):
        del parts["embeddings"]
    if not logits:
        del parts["logits"]
    if decoder.experts is not None:
        parts["experts"] = round(parts["experts"] * decoder.experts.hit(tokens) / decoder.experts.count)
    return sum(parts.values())


def _moved(decoder: Decoder, weights: int, read: int, written: int, itemsize: float, cache_itemsize: float) -> Cost:
    """``read``, ``written``: tokens in the cache, over all layers."""
    unit = 2 * decoder.kv_heads * decoder.head_dim * cache_itemsize
    return total(
        [
            byte("weights", round(weights * itemsize), "every weight once a pass"),
            byte("KV cache read", round(unit * read), _CACHE),
            byte("KV cache written", round(unit * written), _CACHE),
        ]
    )


def _windows(decoder: Decoder) -> dict[int | None, int]:
    """How many layers have each window."""
    return {window: decoder.windows.count(window) for window in dict.fromkeys(decoder.windows)}


def _kept(tokens: int, window: int | None) -> int:
    return tokens if window is None else min(tokens, window)
