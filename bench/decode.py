"""A whole language model: decode steps and prefills without adapters, with ours, and with the other ways to have them."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import t2l_engine as t2l
from bench.baselines import PEFT_ABSENT
from bench.harness import OURS, Bar, Context, Error, Task, admit, logits_error, row
from t2l_engine.text import packaged

ROWS, CACHED = 8, 64
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Name of a set of adapters -> its bar.
BARS = {"q,v": Bar(1.05, of="base"), "all linears": Bar(1.15, of="base")}
Forward = Callable[..., Any]
Entries = Iterator[tuple[str, dict[str, Any]]]


def plan(context: Context) -> list[Task]:
    tasks = []
    for dtype in ("float32", "bfloat16"):
        tasks.append(Task(f"model {dtype}", functools.partial(steps, context, getattr(torch, dtype))))
        tasks.append(Task(f"model sweep {dtype}", functools.partial(sweep, context, getattr(torch, dtype))))
    return tasks


# --- models and adapters ---------------------------------------------------------------------------------------------


def load(context: Context, dtype: torch.dtype) -> tuple[str, nn.Module]:
    """The model, whose weights are bfloat16 numbers, in ``dtype``; at size tiny a random one of the same kind.

    Its parameters ask for gradients, as transformers loads them: without, torch's bfloat16 product of a slice of hidden
    states (the last one of every row) copies the whole output matrix for every row.
    """
    if context.full:
        if dtype == torch.float64:
            return "SmolLM2-135M", packaged.load(torch.float32)[0].double()
        return "SmolLM2-135M", packaged.load(dtype)[0]
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=128, initializer_range=0.2))
    for parameter in model.parameters():  # not buffers: rotary frequencies stay as they are
        parameter.data = parameter.data.bfloat16().to(dtype)
    return "tiny Llama", model.eval()


def shared(model: nn.Module) -> nn.Module:
    """The same model around the same weights: what is attached to it does not touch ``model``, nor fill the caches twice."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): t for t in tensors})


def linears(model: nn.Module, name: str) -> list[tuple[nn.Module, nn.Linear]]:
    """(parent, linear) of module ``name`` in every layer."""
    parents = [layer.mlp if hasattr(layer.mlp, name) else layer.self_attn for layer in model.model.layers]
    return [(parent, getattr(parent, name)) for parent in parents]


def random_adapters(model: nn.Module, names: Sequence[str], count: int, rank: int) -> t2l.AdapterStack:
    """Adapters whose deltas are a tenth of a linear's output or so."""
    generator = torch.Generator().manual_seed(9)
    lora_A, lora_B = {}, {}
    for name in names:
        found = [linear for _, linear in linears(model, name)]
        n_in, n_out = found[0].in_features, found[0].out_features
        lora_A[name] = torch.randn(count, len(found), rank, n_in, generator=generator) * n_in**-0.5
        scale = 0.1 * float(found[0].weight.detach().std()) * (n_in / rank) ** 0.5
        lora_B[name] = torch.randn(count, len(found), rank, n_out, generator=generator).mT * scale
    return t2l.AdapterStack(lora_A, lora_B, torch.ones(count))


def bundled_adapters(context: Context, model: nn.Module, count: int) -> t2l.AdapterStack:
    """Adapters for ``q_proj`` and ``v_proj``: of the bundled checkpoint, for task embeddings at random."""
    if not context.full:
        return random_adapters(model, ("q_proj", "v_proj"), count, 8)
    net = t2l.HyperNetwork.from_pretrained(t2l.checkpoint_folder.resolve_checkpoint("smollm2-135m"))
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
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    wrapped, names = None, sorted(stack.lora_A)
    for i, scaling in enumerate(stack.scaling.tolist()):
        r = int(max(ranks[i].max() for ranks in stack.ranks.values()))
        config = LoraConfig(r=r, lora_alpha=scaling * r, target_modules=names, init_lora_weights=False)
        if wrapped is None:
            wrapped = get_peft_model(shared(model), config, adapter_name=str(i), autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(str(i), config, autocast_adapter_dtype=False)
        set_peft_model_state_dict(wrapped, stack.state_dict_peft(i), adapter_name=str(i))
    wrapped.set_adapter("0")
    return wrapped.eval().requires_grad_()  # PEFT froze the base, whose parameters are everybody's: see load


def ours(model: nn.Module, stack: t2l.AdapterStack, ids: Sequence[int]) -> Forward:
    """Ours around the same weights, row i with adapter ``ids[i]``."""
    model = shared(model)
    t2l.attach(model, stack).set(list(ids))
    return model


# --- steps -----------------------------------------------------------------------------------------------------------


def decode(forward: Forward, prompt: Tensor, token: Tensor) -> Callable[[], Tensor]:
    """A call of one decode step after ``prompt [rows, n]``, always the same one; its logits ``[rows, vocabulary]``."""
    cache = DynamicCache()
    forward(input_ids=prompt, cache=cache, use_cache=True, logits_to_keep=1)

    def step() -> Tensor:
        logits = forward(input_ids=token, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        cache.crop(-1)
        return logits

    return step


def prefill(forward: Forward, prompt: Tensor, token: Tensor) -> Callable[[], Tensor]:
    """A call that reads ``prompt`` into a new cache; the logits after its last token."""
    return lambda: forward(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[:, -1]


PHASES = {"decode": decode, "prefill": prefill}


def exact_logits(model: nn.Module, stack: t2l.AdapterStack | None, tokens: Tensor, ids: Sequence[int]) -> dict[str, Tensor]:
    """Logits of either phase where the last of ``tokens [rows, n + 1]`` is decoded and the others are the prompt.

    Row i by itself, through ``model`` with adapter ``ids[i]`` merged; in float64 this is the oracle.  None: no adapters.
    """
    logits = []
    for i, one in zip(ids, tokens, strict=True):
        adapted = model if stack is None else merged(model, stack, i)
        logits.append(adapted(input_ids=one[None], logits_to_keep=2).logits[0])
    both = torch.stack(logits)
    return {"prefill": both[:, 0], "decode": both[:, 1]}


def _tokens(model: nn.Module, rows: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, count), generator=generator)


def steps(context: Context, dtype: torch.dtype) -> Entries:
    """Both phases for eight rows with eight adapters: of q and v, and of all linears."""
    (name, model), (_, wide) = load(context, dtype), load(context, torch.float64)
    ids, alike = range(ROWS), [0] * ROWS
    sets = {
        "q,v": bundled_adapters(context, wide, ROWS).to(dtype=dtype),
        "all linears": random_adapters(wide, LINEARS, ROWS, 16).to(dtype=dtype),
    }
    fresh, timed = (_tokens(model, ROWS, CACHED + 1, seed) for seed in (1, 0))
    chosen = {of: _ways(context, model, stack) for of, stack in sets.items()}
    with torch.inference_mode():
        rights = {
            (of, single): _reference(wide, model, stack, fresh, alike if single else ids)
            for of, stack in sets.items()
            for single in (False, True)
        }
        base = _reference(wide, model, None, fresh, ids)
        del wide
        for phase, make in PHASES.items():
            functions, admitted, errors = {}, {}, {}
            for of, (ways, absent) in chosen.items():
                judged = {way: (forward, rights[of, way in SINGLE]) for way, forward in ways.items()}
                judged["base"] = model, base
                errors[of] = {
                    way: logits_error(make(forward, fresh[:, :-1], fresh[:, -1:])(), *right[phase])
                    for way, (forward, right) in judged.items()
                }
                calls = {way: make(forward, timed[:, :-1], timed[:, -1:]) for way, (forward, _) in judged.items()}
                calls, wrong = admit(f"{phase} {of} {dtype}", calls, errors[of])
                admitted[of] = list(calls), absent | wrong
                functions |= {("base" if way == "base" else (of, way)): call for way, call in calls.items()}
            timings = context.time(functions, context.threads, factor=20)
            for of, (ways, absent) in admitted.items():
                mine = {way: timings["base" if way == "base" else (of, way)] for way in ways}
                shape = {"model": name, "phase": phase, "rows": ROWS, "modules": of, "rank": _rank(sets[of])}
                yield _row(context, f"{phase} {ROWS} rows, {of}", shape, dtype, mine, errors[of][OURS], absent, BARS[of])


#: Ways that give every row adapter 0.
SINGLE = ("PEFT single", "merged")


def _rank(stack: t2l.AdapterStack) -> int:
    return next(iter(stack.lora_A.values())).shape[2]


def _reference(
    wide: nn.Module, model: nn.Module, stack: t2l.AdapterStack | None, tokens: Tensor, ids: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By phase the float64 logits, and those of the merged models in the dtype of ``model``."""
    exact, other = (exact_logits(m, stack, tokens, ids) for m in (wide, model))
    return {phase: (exact[phase], other[phase]) for phase in PHASES}


def _ways(context: Context, model: nn.Module, stack: t2l.AdapterStack) -> tuple[dict[str, Forward], dict[str, str]]:
    """Ways to run ``stack``, row i with adapter i, but for those of SINGLE; and what is absent."""
    ways: dict[str, Forward] = {OURS: ours(model, stack, range(ROWS)), "merged": merged(model, stack, 0)}
    why = PEFT_ABSENT or (None if context.full else "left out at this size")
    if why:
        return ways, dict.fromkeys(("PEFT mixed", "PEFT single"), why)
    peft = peft_model(model, stack)
    names = [str(i) for i in range(ROWS)]
    return ways | {"PEFT mixed": functools.partial(peft, adapter_names=names), "PEFT single": peft}, {}


def sweep(context: Context, dtype: torch.dtype) -> Entries:
    """Decode steps of many rows over the number of adapters among them, in the same rounds."""
    (name, model), (_, wide) = load(context, dtype), load(context, torch.float64)
    count, short = (64, 8) if context.full else (8, 4)
    stack = bundled_adapters(context, wide, count).to(dtype=dtype)
    choices = {2**i: [row % 2**i for row in range(count)] for i in range(count.bit_length())}
    attached = {n: ours(model, stack[:n], ids) for n, ids in choices.items()}
    timed = _tokens(model, count, CACHED + 1, seed=0)
    # Every row reads the same: then the oracle needs a row an adapter, whichever rows use it.
    fresh = _tokens(model, 1, short + 1, seed=1).expand(count, -1)
    with torch.inference_mode():
        exact, other = _reference(wide, model, stack, fresh, range(count))["decode"]
        plain = _reference(wide, model, None, fresh[:1], [0])["decode"]
        del wide

        def check(case: str, forward: Forward, exact: Tensor, other: Tensor) -> tuple[Callable[[], Tensor], Error]:
            error = logits_error(decode(forward, fresh[:, :-1], fresh[:, -1:])(), exact, other)
            calls, _ = admit(case, {OURS: decode(forward, timed[:, :-1], timed[:, -1:])}, {OURS: error})
            return calls[OURS], error

        checked = {"base": check("base", model, *(t.expand(count, -1) for t in plain))}
        for n, ids in choices.items():
            checked[n] = check(f"{n} adapters", attached[n], exact[ids], other[ids])
        timings = context.time({n: call for n, (call, _) in checked.items()}, context.threads, factor=20)
    for n in choices:
        mine = {OURS: timings[n], "base": timings["base"]}
        shape = {"model": name, "phase": "decode", "rows": count, "adapters": n, "modules": "q,v", "rank": _rank(stack)}
        yield _row(context, f"decode {count} rows, {n} adapters", shape, dtype, mine, checked[n][1], {}, None)


def _row(context, case, shape, dtype, timings, error, absent, bar) -> tuple[str, dict[str, Any]]:
    dtype = str(dtype).removeprefix("torch.")
    unit = timings["base"].median_us
    case, shape = f"{case}, {dtype}", shape | {"dtype": dtype}
    bar = bar if context.full else None  # stated for the real model
    return "rows", row(case, "model", shape, context.threads, timings, error, absent=absent, bar=bar, unit_us=unit)
