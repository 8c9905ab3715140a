"""Closed forms of useful floating-point operations: 2 a multiply-add, no padding, true ranks.

Elementwise work (norms, activations, embeddings, softmax) is not counted, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

from t2l_engine.config import DISCRETE_HIDDEN, NUM_CLASSES, NUM_CODES, HyperNetworkConfig


def hypernet_flops(config: HyperNetworkConfig, num_tasks: int = 1) -> int:
    """Generating ``num_tasks`` adapters, the constant embeddings folded (kernels of this package; paper appendix).

    Trunk rows a task: n*K base rows through mixer and mlp1, times sides through mlp2, times ranks through mlp3 (and through
    mlp2, where ranks enter before it: again in S-rotary); heads only for the columns that are kept.
    """
    c = config
    m, h, t, n, k = c.width, c.head_in_size, c.task_width, c.num_layers, len(c.modules)
    rows = n * k
    encoder = {  # products of the task encoder; the nearest code of vq is no product
        "linear": c.embed_dim * t,
        "vq": c.embed_dim * 4 * t + 4 * t * t,
        "softmax": c.embed_dim * 4 * t + 4 * t * NUM_CODES + NUM_CODES * t,
        "discrete": c.embed_dim * DISCRETE_HIDDEN + DISCRETE_HIDDEN * NUM_CLASSES,
    }[c.task_encoder]
    per_task = 2 * encoder + 2 * t * 4 * m
    base = rows * (8 * m * m + 16 * m * m)  # second mixer matrix, mlp1
    passes = {"S-rotary": 1 + c.num_ranks}.get(c.variant, 1 if c.num_sides == 2 else c.num_ranks)
    mlp2 = 16 * m * m * rows * c.num_sides * passes
    mlp3 = (8 * m * m + 8 * m * h) * rows * c.num_sides * c.num_ranks
    heads = 2 * h * n * c.rank * (sum(c.in_features) + sum(c.out_features))
    return num_tasks * (per_task + base + mlp2 + mlp3 + heads)


def lora_flops(config: HyperNetworkConfig, num_tokens: int) -> int:
    """Applying one adapter to ``num_tokens`` tokens of all adapted layers."""
    width = sum(config.in_features) + sum(config.out_features)
    return 2 * num_tokens * config.num_layers * config.rank * width


def decoder_flops(model_config, prompt_tokens: int, new_tokens: int = 1, cached_tokens: int = 0) -> int:
    """A transformers decoder answering one prompt: ``prompt_tokens`` processed after ``cached_tokens`` whose keys and values
    are kept, vocabulary logits at the last prompt position, then ``new_tokens`` - 1 further tokens one by one.

    Covers gated MLPs with grouped-query attention (Llama, Mistral, Qwen, Gemma).  Attention counts the pairs a causal mask
    keeps.
    """
    c = model_config
    d, heads = c.hidden_size, c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or d // heads
    kv = c.num_key_value_heads
    per_token = (
        c.num_hidden_layers * 2 * (d * head_dim * (heads + 2 * kv) + heads * head_dim * d + 3 * d * c.intermediate_size)
    )
    logits = 2 * d * c.vocab_size

    def attention(tokens: int, before: int) -> int:
        pairs = tokens * before + tokens * (tokens + 1) // 2
        return c.num_hidden_layers * 4 * heads * head_dim * pairs

    total = prompt_tokens * per_token + attention(prompt_tokens, cached_tokens) + logits
    for i in range(max(0, new_tokens - 1)):
        total += per_token + attention(1, cached_tokens + prompt_tokens + i) + logits
    return total


def encoder_flops(model_config, tokens: int) -> int:
    """A BERT-style encoder over one text of ``tokens`` tokens."""
    c = model_config
    per_token = 2 * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size)
    return c.num_hidden_layers * (tokens * per_token + 4 * c.hidden_size * tokens * tokens)
