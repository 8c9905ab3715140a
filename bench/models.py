"""Language models, text encoders and adapters to measure with: a real small one, and random weights of any shape."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, LlamaConfig, NomicBertConfig
from transformers.cache_utils import Cache, DynamicLayer

import t2l_engine as t2l
from bench.harness import Context, Error, worst
from t2l_engine.lora.layer import LoRALinear
from t2l_engine.ops import reference
from t2l_engine.research.costs import KNOWN
from t2l_engine.research.evaluation.answers import cache_argument
from t2l_engine.testing import numerics
from t2l_engine.text import packaged

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Name of a set of adapters -> its modules.
MODULES = {"q,v": ("q_proj", "v_proj"), "all linears": LINEARS}
#: Configurations: of a 7B model (Llama-8B's, too, but for the vocabulary), of its text encoder, and of tiny ones.
MISTRAL, GTE = KNOWN["model"]["mistral-7b"]["config"], KNOWN["encoder"]["gte-large"]["config"]
TINY = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61,
    "hidden_size": 32, "intermediate_size": 48,
}  # fmt: skip
TINY_TEXT = {
    "model_type": "new", "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61, "hidden_size": 24,
    "intermediate_size": 32,
}  # fmt: skip
_SIZES = TINY.keys() - {"model_type"}
Forward = Callable[..., Any]


def load(context: Context, dtype: torch.dtype) -> tuple[str, nn.Module]:
    """The model, whose weights are bfloat16 numbers, in ``dtype``; at size tiny a random one of the same kind.

    Its parameters ask for gradients: without, torch's bfloat16 product of the last hidden states copies the whole output
    matrix for every row.
    """
    if context.full:
        return "SmolLM2-135M", packaged.load(torch.float32 if dtype == torch.float64 else dtype)[0].to(dtype)
    model = decoder(TINY, torch.device("cpu"), torch.float32).requires_grad_()
    for parameter in model.parameters():  # not buffers: rotary frequencies stay as they are
        parameter.data = parameter.data.bfloat16().to(dtype)
    return "tiny Llama", model


def decoder(values: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A Llama of the sizes of this configuration, random weights."""
    return _drawn(AutoModelForCausalLM, LlamaConfig, values, device, dtype)


def encoder(values: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Task embeddings ``[N, hidden]``, of norm sqrt(hidden), of tokens ``[N, n]`` by layers like gte-large-en-v1.5's."""
    model, width = _drawn(AutoModel, NomicBertConfig, values, device, dtype), values["hidden_size"]
    return lambda tokens: nn.functional.normalize(model(tokens)[0][:, 0].float(), dim=-1) * width**0.5


def _drawn(kind: Any, of: Any, values: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    sizes = {name: value for name, value in values.items() if name in _SIZES}
    config = of(**sizes, tie_word_embeddings=False, initializer_range=sizes["hidden_size"] ** -0.5)
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_config(config, dtype=dtype, attn_implementation="sdpa").requires_grad_(False).eval()


def shared(model: nn.Module, own: tuple[str, ...] = ()) -> nn.Module:
    """A copy around the same weights, so that they fill caches once; ``own``: modules whose weights are copied, too."""
    copied = {id(t) for name, module in model.named_modules() if name.endswith(own) for t in module.parameters()}
    kept = (t for t in itertools.chain(model.parameters(), model.buffers()) if not own or id(t) not in copied)
    return copy.deepcopy(model, {id(t): t for t in kept})


def linears(model: nn.Module, name: str) -> list[tuple[nn.Module, nn.Linear]]:
    """(parent, linear) of module ``name`` in every layer."""
    parents = [layer.mlp if hasattr(layer.mlp, name) else layer.self_attn for layer in model.model.layers]
    return [(parent, getattr(parent, name)) for parent in parents]


def random_adapters(model: nn.Module, names: Sequence[str], count: int, rank: int) -> t2l.AdapterStack:
    """Adapters in float32 whose deltas are a tenth of a linear's output or so."""
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(9)
    lora_A, lora_B = {}, {}
    for name in names:
        found = [linear for _, linear in linears(model, name)]
        n_in, n_out, size = found[0].in_features, found[0].out_features, (count, len(found), rank)
        lora_A[name] = torch.randn(*size, n_in, generator=generator, device=device) * n_in**-0.5
        scale = 0.1 * float(found[0].weight.detach().std()) * (n_in / rank) ** 0.5
        lora_B[name] = torch.randn(*size, n_out, generator=generator, device=device).mT * scale
    return t2l.AdapterStack(lora_A, lora_B, torch.ones(count, device=device))


def bundled_adapters(context: Context, model: nn.Module, count: int) -> t2l.AdapterStack:
    """Adapters for ``q_proj`` and ``v_proj``: of the paper's checkpoint, for task embeddings at random."""
    if not context.full:
        return random_adapters(model, MODULES["q,v"], count, 8)
    net = t2l.HyperNetwork.from_pretrained("smollm2-135m-paper")
    drawn = torch.randn(count, net.config.embed_dim, generator=torch.Generator().manual_seed(10))
    return net.generate(nn.functional.normalize(drawn, dim=-1) * net.config.embed_dim**0.5)


def merged(model: nn.Module, stack: t2l.AdapterStack, index: int) -> nn.Module:
    """:func:`shared` with one adapter added to weights of its own, by hand."""
    model = shared(model)
    for name in stack.lora_A:
        for layer, (parent, linear) in enumerate(linears(model, name)):
            exact = torch.promote_types(linear.weight.dtype, torch.float32)
            A, B = (side[name][index, layer].to(exact) for side in (stack.lora_A, stack.lora_B))
            other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            weight = linear.weight.to(exact) + stack.scaling[index].to(exact) * (B @ A)
            other.weight = nn.Parameter(weight.to(linear.weight.dtype))
            setattr(parent, name, other)
    return model


def peft_model(model: nn.Module, stack: t2l.AdapterStack) -> nn.Module:
    """PEFT's model around the same weights, adapter i under the name ``str(i)``; adapter 0 is active."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    (rank,) = {lora_A.shape[2] for lora_A in stack.lora_A.values()}
    of = {"r": rank, "target_modules": sorted(stack.lora_A), "init_lora_weights": False}
    configs = [LoraConfig(lora_alpha=scaling * rank, **of) for scaling in stack.scaling.tolist()]
    wrapped = PeftModel(shared(model), configs[0], adapter_name="0", autocast_adapter_dtype=False)
    for i, config in enumerate(configs):
        if i:
            wrapped.add_adapter(str(i), config, autocast_adapter_dtype=False)
        set_peft_model_state_dict(wrapped, stack.state_dict_peft(i), adapter_name=str(i))
    return wrapped.eval().requires_grad_()  # PEFT froze the base, whose parameters are everybody's: see load


def ours(model: nn.Module, stack: t2l.AdapterStack, ids: Sequence[int]) -> Forward:
    """Ours around the same weights, row i with adapter ``ids[i]``."""
    model = shared(model)
    t2l.attach(model, stack).set(list(ids))
    return model


def decode(forward: Forward, tokens: Tensor) -> Callable[[], Tensor]:
    """A call of one decode step, always the same one: the last of ``tokens [rows, n]`` after the others; its logits."""
    cache, prompt, token = DynamicCache(), tokens[:, :-1], tokens[:, -1:]
    model: Any = forward.func if isinstance(forward, functools.partial) else forward
    given = cache_argument(model.get_base_model() if hasattr(model, "get_base_model") else model, cache)
    forward(input_ids=prompt, use_cache=True, logits_to_keep=1, **given)

    def step() -> Tensor:
        logits = forward(input_ids=token, use_cache=True, logits_to_keep=1, **given).logits[:, -1]
        cache.crop(-1)
        return logits

    return step


def prefill(forward: Forward, tokens: Tensor) -> Callable[[], Tensor]:
    """A call that reads all but the last of ``tokens`` into a new cache; the logits after them."""
    prompt = tokens[:, :-1]
    return lambda: forward(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[:, -1]


def exact_logits(model: nn.Module, stack: t2l.AdapterStack | None, tokens: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
    """Logits after all and all but the last of ``tokens [rows, n]``, row i by itself with adapter ``ids[i]`` merged."""
    logits = []
    for i, one in zip(ids, tokens, strict=True):
        adapted = model if stack is None else merged(model, stack, i)
        logits.append(adapted(input_ids=one[None], logits_to_keep=2).logits[0])
    both = torch.stack(logits)
    return {"prefill": both[:, 0], "decode": both[:, 1]}


class _Reserved(DynamicLayer):
    """Keys and values of all tokens of a row, at random; the last ``new`` are written anew by every step, in place."""

    def __init__(self, like: Tensor, size: tuple[int, ...], new: int, generator: torch.Generator):
        super().__init__()
        self.keys, self.values = (like.new_empty(size).normal_(generator=generator) for _ in range(2))
        self.new, self.is_initialized = new, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -self.new :] = key_states
        self.values[:, :, -self.new :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - self.new


@dataclasses.dataclass(frozen=True)
class Step:
    """``step(tokens [rows, new])``: the logits ``[rows, vocabulary]`` after the last of them.

    Rows have all but the last ``new`` of ``context`` tokens cached.  Addresses are fixed, so a graph can hold it.
    """

    model: nn.Module
    cache: Cache
    mask: Tensor | None

    @staticmethod
    def of(model: nn.Module, rows: int, context: int, new: int = 1, seed: int = 1) -> Step:
        c, like = model.config, model.lm_head.weight
        generator = torch.Generator(like.device).manual_seed(seed)
        size = rows, c.num_key_value_heads, context, c.head_dim
        cache = Cache([_Reserved(like, size, new, generator) for _ in range(c.num_hidden_layers)])
        mask = None  # where one is not needed, kernels that know a causal one read none
        if 1 < new < context:
            mask = torch.ones(new, context, dtype=torch.bool, device=like.device).tril(context - new)[None, None]
        return Step(model, cache, mask)

    def __call__(self, tokens: Tensor) -> Tensor:
        given = cache_argument(self.model, self.cache) | {"attention_mask": self.mask}
        return self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **given).logits[:, -1]

    def on(self, model: nn.Module) -> Step:
        """The same step, in the same cache, of another model: whichever runs writes the new tokens of all layers."""
        return dataclasses.replace(self, model=model)

    def follow(self, other: Step) -> None:
        """All but the new tokens get the keys and values that ``other``, of as many tokens, has for them."""
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            cached = slice(0, -mine.new)
            mine.keys[:, :, cached] = theirs.keys[:, :, cached]
            mine.values[:, :, cached] = theirs.values[:, :, cached]

    @property
    def num_bytes(self) -> int:
        """What a step reads: every matrix and the cache once, and of the embeddings a few rows."""
        held = sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))
        weights = sum(p.nbytes for p in self.model.parameters())
        return held + weights - self.model.model.embed_tokens.weight.nbytes


def layer_error(step: Step, tokens: Tensor) -> Error:
    """The worst error over the adapted linears of the first and last layer in one step, added to the base in float64."""
    seen: list[tuple[LoRALinear, Tensor, Tensor]] = []

    def note(layer: LoRALinear, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((layer, inputs[0].clone(), output.clone()))

    blocks = step.model.model.layers
    found = [m for block in (blocks[0], blocks[-1]) for m in block.modules() if isinstance(m, LoRALinear)]
    hooks = [layer.register_forward_hook(note) for layer in found]
    step(tokens)
    for hook in hooks:
        hook.remove()
    errors = []
    for layer, x, y in seen:
        (module,) = layer.adapted_modules
        segments = layer._routing.segments(tokens.shape)
        exact = layer.base(x).double().flatten(0, 1)
        operands = (x.double().flatten(0, 1), module.lora_A.double(), module.lora_B.double(), module.scaling.double())
        routing = segments.seg_indptr, segments.seg_adapters, segments.max_seg_len, module.ranks
        reference.lora_add_(exact, *operands, *routing)
        errors.append(Error(numerics.relative_frobenius(y.flatten(0, 1), exact), numerics.lora_frobenius(y.dtype)))
    return worst(errors)
