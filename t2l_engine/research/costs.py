"""FLOPs and bytes of answering by in-context examples and by generated adapters, from configurations alone (docs/icl.md).

A model is counted by torch's FLOP counter: the module of transformers runs once over two tokens on the meta device, without
weights.  Attention counts two products per unmasked pair of query and key, by each layer's own mask and sliding window,
whatever the length.  Each way to serve a task has a cost for the task's first question and one for each later question.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from t2l_engine.files.errors import MAX_SHOWN, ConfigError, short_repr
from t2l_engine.files.text import from_json, read_json
from t2l_engine.hypernetwork.config import POINTER, HyperNetworkConfig, PointerConfig
from t2l_engine.hypernetwork.network import hypernet_flops, num_parameters
from t2l_engine.hypernetwork.pointer import pointer_flops

#: "model" and "encoder" -> name -> configuration; of models of released and bundled checkpoints.
KNOWN: dict[str, dict[str, Any]] = read_json(Path(__file__).with_suffix(".json"))
#: Sizes of released hypernetworks for Mistral-7B (arXiv 2506.06105, appendix).
SIZES = {"variant": "L", "modules": ("q_proj", "v_proj"), "rank": 8, "latent_size": 128, "head_in_size": 512}
LANGUAGE_MODEL = "model"  # as an encoder
ALIASES = {"new": "gte"}  # model types of remote code -> the same model in transformers
UNREAD = ("model_type", "quantization_config", "auto_map", "dtype", "torch_dtype")
TOKENS, MAX_LAYERS, MAX_TOKENS = 2, 512, 1 << 20


class Attention(NamedTuple):
    """One layer.  ``cached``: entries of keys and values per token; ``window``: most keys per query, its own included."""

    pair_flops: int
    cached: int
    window: int | None
    causal: bool

    def pairs(self, tokens: int, before: int = 0) -> int:
        """Number of unmasked (query, key) pairs of ``tokens`` queries after ``before`` cached tokens."""
        window = self.window or tokens + before
        short = min(tokens, max(0, window - before))  # queries that the window does not limit
        causal = short * before + short * (short + 1) // 2 + (tokens - short) * window
        return causal if self.causal else 2 * causal - tokens


@dataclasses.dataclass(frozen=True)
class Model:
    """Counted sizes of a language model or text encoder.

    ``attention``: of each layer that attends.  ``token_flops``: of one token, without attention's pairs and logits;
    ``logit_flops``: of the logits at one position.  ``parameters``: a tied matrix counts once.  ``read``: weights that a
    pass over many tokens reads, without tables; among them ``expert_weights``, of which a token uses ``expert_share``.
    ``linears``: (in, out) features of the linears of one name in every layer.  ``dtype``: what the configuration states.
    """

    hidden: int
    vocabulary: int
    layers: int
    attention: tuple[Attention, ...]
    token_flops: int
    logit_flops: int
    parameters: int
    read: int
    expert_weights: int
    expert_share: float
    linears: Mapping[str, tuple[int, int]]
    dtype: Any

    def flops(self, tokens: int, before: int = 0, *, logits: int = 1) -> int:
        """FLOPs of ``tokens`` tokens of one sequence after ``before`` cached ones, with logits at ``logits`` positions.

        The same for one pass over a prompt and for decoding token by token (then ``logits=tokens``).
        """
        pairs = sum(layer.pair_flops * layer.pairs(tokens, before) for layer in self.attention)
        return tokens * self.token_flops + pairs + logits * self.logit_flops

    def weights(self, tokens: int) -> int:
        """Entries of weights that one pass over ``tokens`` tokens reads, each token drawing its experts uniformly."""
        return self.read - round(self.expert_weights * (1 - self.expert_share) ** tokens)

    def kept(self, tokens: int) -> int:
        """Entries of the KV cache of a sequence; a layer with a sliding window keeps only the window."""
        return sum(layer.cached * min(tokens, layer.window or tokens) for layer in self.attention)


def count(config: Any, *, head: bool = True, layers: int | None = None) -> Model:
    """The sizes of a language model, or without ``head`` of a text encoder (a pooler is not counted).

    ``layers``: count only the first, which a text encoder runs.

    ``config``: a transformers configuration, its values as a dict, or the path of a ``config.json`` or its folder.  Fields
    that are missing have the defaults of their class in transformers.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: transformers knows no such model, or cannot build or run it; the message names the file.
    """
    where, values = "config", config
    if isinstance(config, (str, Path)):
        where = Path(config, "config.json") if Path(config).is_dir() else Path(config)
        if not where.is_file():
            raise FileNotFoundError(f"{where}: expected the configuration of a transformers model, found no file")
        values = read_json(where)
    elif not isinstance(config, Mapping):
        values = config.to_dict()
    try:
        return _counted(json.dumps(values, default=str), head, layers)
    except Exception as error:  # classes of transformers raise anything for values that do not fit
        message = " ".join(str(error).split())
        raise ConfigError(f"{where}: {message[:MAX_SHOWN]}{'...' * (len(message) > MAX_SHOWN)}") from None


@functools.lru_cache(64)
def _counted(document: str, head: bool, layers: int | None) -> Model:
    """Of a configuration as JSON, which is hashable: no model is counted twice in a process."""
    from transformers import CONFIG_MAPPING, AttentionInterface, AutoModel, AutoModelForCausalLM

    values = json.loads(document)
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected a JSON object, got {type(values).__name__}")
    text = values.get("text_config")
    if isinstance(text, Mapping) and "model_type" in text:  # of a multimodal model
        values = {**text, **{k: values[k] for k in ("tie_word_embeddings", "dtype", "quantization_config") if k in values}}
    for name, value in values.items():
        if "layer" in name and isinstance(value, int) and value > MAX_LAYERS:
            raise ConfigError(f"{name}: expected at most {MAX_LAYERS}, got {short_repr(value)}")
    stated = values.get("model_type")
    kind = ALIASES.get(stated, stated) if isinstance(stated, str) else ""
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"model_type: expected one that transformers knows, got {short_repr(stated)}")
    config = CONFIG_MAPPING[kind].from_dict({name: value for name, value in values.items() if name not in UNREAD})
    kinds = getattr(config, "layer_types", None)
    seen: list[Attention] = []

    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, is_causal: Any = None, **given: Any) -> Any:
        widths, (_, heads, tokens, _) = key.shape[-1] + value.shape[-1], query.shape
        sliding = kinds is not None and kinds[module.layer_idx] == "sliding_attention"
        window = config.sliding_window if sliding else given.get("sliding_window")
        causal = module.is_causal if is_causal is None else is_causal
        seen.append(Attention(2 * heads * widths, key.shape[1] * widths, window or None, causal))
        return query.new_empty(1, tokens, heads, value.shape[-1]), None

    AttentionInterface.register("counted", attend)
    with torch.device("meta"):
        ways = {"attn_implementation": "counted", "experts_implementation": "batched_mm"}
        whole = (AutoModelForCausalLM if head else AutoModel).from_config(config, **ways).requires_grad_(False)
        body, matrix = whole.base_model, whole.get_output_embeddings() if head else None
        body.pooler = None
        if layers is not None:
            body.layers = body.layers[:layers]
        with FlopCounterMode(display=False) as counter:
            hidden = body(input_ids=torch.ones(1, TOKENS, dtype=torch.long), use_cache=False).last_hidden_state
        with FlopCounterMode(display=False) as of_logits:
            if matrix is not None:
                matrix(hidden[:, -1:])
    if not seen:
        raise ConfigError(f"model_type: {kind} does not attend by transformers' attention interface: it cannot be counted")
    flops, weights, linears = defaultdict(int), defaultdict(int), defaultdict(list)  # by the last part of a module's name
    for name, of in counter.get_flop_counts().items():
        flops[name.rpartition(".")[2]] += sum(of.values())
    for name, module in body.named_modules():
        weights[name.rpartition(".")[2]] += sum(p.numel() for p in module.parameters())
        if isinstance(module, torch.nn.Linear):
            linears[name.rpartition(".")[2]].append((module.in_features, module.out_features))
    parameters = sum(p.numel() for p in whole.parameters())
    tables = sum(m.weight.numel() for m in body.modules() if isinstance(m, torch.nn.Embedding))
    tied = matrix is not None and matrix.weight is whole.get_input_embeddings().weight and matrix.weight.numel()
    rotary = sum(of for name, of in flops.items() if "rotary" in name)  # a matrix product in transformers
    return Model(
        hidden.shape[-1], config.vocab_size, config.num_hidden_layers, tuple(seen),
        (counter.get_total_flops() - rotary) // TOKENS, of_logits.get_total_flops(),
        parameters, parameters - tables + tied,
        weights["experts"], flops["experts"] / (2 * TOKENS * weights["experts"]) if weights["experts"] else 0.0,
        {name: of[0] for name, of in linears.items() if of == of[:1] * config.num_hidden_layers},
        "quantized" if values.get("quantization_config") else values.get("dtype") or values.get("torch_dtype"),
    )  # fmt: skip


def hypernetwork_for(model: Model, encoder: Model, **sizes: Any) -> Any:
    """The configuration of a hypernetwork for ``model``, of a pointer network if the variant is "pointer".

    ``sizes``: its fields, else :data:`SIZES`.

    Raises ConfigError for a module that is missing in a layer of the model, or a field that is missing.
    """
    sizes = SIZES | sizes
    for name in sizes["modules"]:
        if name not in model.linears:
            raise ConfigError(f"modules: expected some of {', '.join(model.linears)}, got {short_repr(name)}")
    n_in, n_out = zip(*(model.linears[name] for name in sizes["modules"]), strict=True)
    fitting = {"in_features": n_in, "out_features": n_out, "num_layers": model.layers}
    if sizes["variant"] == POINTER:
        del sizes["head_in_size"]
        return from_json(PointerConfig, sizes | fitting, "hypernetwork")
    return HyperNetworkConfig(**{"lora_alpha": 2.0 * sizes["rank"]} | sizes | fitting | {"embed_dim": encoder.hidden})


@dataclasses.dataclass(frozen=True)
class Setup:
    """A language model with its text encoder and hypernetwork.  Item sizes in bytes per value: 2 = bfloat16, 0.5 = int4.

    ``itemsize``: of the language model's weights; ``cache_itemsize``: of keys and values; ``adapter_itemsize``: of the
    hypernetwork and its adapters; ``encoder_itemsize``: of the text encoder, 0 if it is the language model itself.
    """

    model: Model
    encoder: Model
    hypernet: HyperNetworkConfig | PointerConfig
    itemsize: float = 2
    cache_itemsize: float = 2
    adapter_itemsize: float = 2
    encoder_itemsize: float = 2

    @property
    def adapter_bytes(self) -> int:
        return round(self.hypernet.adapter_values * self.adapter_itemsize)

    @property
    def generator_bytes(self) -> int:
        """Bytes of text encoder and hypernetwork."""
        encoder = round(self.encoder.parameters * self.encoder_itemsize)
        return encoder + round(num_parameters(self.hypernet) * self.adapter_itemsize)

    def weights(self, tokens: int) -> int:
        """Bytes of the language model's weights that a pass over ``tokens`` tokens reads."""
        return round(self.model.weights(tokens) * self.itemsize)

    def kv(self, tokens: int) -> int:
        """Bytes of the KV cache of a sequence."""
        return round(self.model.kept(tokens) * self.cache_itemsize)


def find(kind: str, name: str) -> dict[str, Any]:
    """The entry of :data:`KNOWN` by its name, there or on the Hub; of a local folder or file one with the same fields.

    ``kind``: "model" or "encoder".  Raises FileNotFoundError for another name.
    """
    entries = KNOWN[kind]
    for known, entry in entries.items():
        if name in (known, entry["from"]):
            return entry
    if Path(name).exists():
        return {"config": name, "encoder": "gte-large", "hypernetwork": {}}
    raise FileNotFoundError(
        f"{kind}: {short_repr(name)}: no such folder or file, and nothing is downloaded; expected a local folder with a "
        f"config.json, the config.json, or one of {', '.join(entries)}"
    )


def known_setup(name: str, encoder: str = "", read: Sequence[int] = (), **sizes: Any) -> Setup:
    """A language model with its text encoder and hypernetwork, all with two bytes per value.

    ``name``, ``encoder``: as :func:`find` takes them; ``encoder`` may also be "model", the language model itself, or "", the
    one that the model's checkpoint has.  ``read``: its layers whose states a pointer network reads, the last that runs at
    the end; (): all run.  ``sizes``: of :func:`hypernetwork_for`, by default the checkpoint's.

    Raises FileNotFoundError for an unknown name, ConfigError for a configuration or a size that cannot be used.

    >>> num_parameters(known_setup("mistral-7b").hypernet)
    55424000
    """
    entry, itself = find("model", name), encoder == LANGUAGE_MODEL
    texts = entry if itself else find("encoder", encoder or entry["encoder"])
    counted, described = count(entry["config"]), count(texts["config"], head=False, layers=read[-1] if read else None)
    sizes |= {"feature_size": len(read) * described.hidden} if read else {}
    hypernet = hypernetwork_for(counted, described, **entry["hypernetwork"] | sizes)
    return Setup(counted, described, hypernet, encoder_itemsize=0 if itself else 2)


def _length(default: int, text: str, least: int = 0) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "min": least, "max": MAX_TOKENS})


@dataclasses.dataclass(frozen=True)
class Workload:
    """Lengths in tokens; ValueError names one that is out of range."""

    question: int = _length(59, "Tokens of a question with its chat template.", 1)
    answer: int = _length(16, "Tokens of an answer.", 1)
    shots: int = _length(3, "Few-shot examples in the prompt of in-context learning.")
    shot: int = _length(80, "Tokens of one few-shot example.")
    description: int = _length(35, "Tokens of the task's description, in the text encoder's tokenizer.", 1)
    instruction: int = _length(0, "Tokens of a description in the prompt of in-context learning.")
    system: int = _length(0, "Tokens of a system prompt, the same for all tasks.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), field.metadata["min"]
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{field.name}: expected a number of tokens of at least {low}, got {value!r}")

    @property
    def prefix(self) -> int:
        """Tokens of the in-context prompt that all questions of a task share, without ``system``."""
        return self.instruction + self.shots * self.shot


#: Lengths implied by the paper's appendix I: a question 59, with three shots 299, a description 35 tokens.
PAPER = Workload(question=59, answer=1, shots=3, shot=80, description=35)


class Request(NamedTuple):
    """One question, from its arrival to the last token of its answer.

    ``phases``: some of describe, generate, merge, prompt, answer -> (FLOPs, bytes of memory traffic).
    """

    phases: dict[str, tuple[int, int]]

    def until(self, first_token: bool) -> list[tuple[int, int]]:
        """What its phases take, without the answer if only ``first_token`` is of interest."""
        return [cost for phase, cost in self.phases.items() if not (first_token and phase == "answer")]

    def flops(self, *, first_token: bool = False) -> int:
        return sum(flops for flops, _ in self.until(first_token))

    def seconds(self, flops_per_second: float, bytes_per_second: float, *, first_token: bool = False) -> float:
        """Roofline time: of each phase the larger of compute time and memory time at these rates."""
        return sum(max(flops / flops_per_second, moved / bytes_per_second) for flops, moved in self.until(first_token))


class Way(NamedTuple):
    """A way to serve a task: requests of its first and of each later question.

    ``held``: bytes beside the base model for each active sequence, for each of their tasks, and once; ``step``: bytes that a
    decode step reads so, beside :meth:`Setup.weights`.
    """

    first: Request
    later: Request
    held: tuple[int, int, int]
    step: tuple[int, int, int]


#: Way -> its label in tables and figures.
LABELS = {
    "icl": "ICL, no cache", "icl-cold": "ICL, cold cache", "icl-warm": "ICL, warm cache",
    "t2l-request": "T2L per request", "t2l-task": "T2L per task", "t2l-merged": "T2L merged",
}  # fmt: skip


def ways(setup: Setup, load: Workload) -> dict[str, Way]:
    """Every way of :data:`LABELS`, for one model and workload.

    A prefix cache holds the keys and values of what precedes the question: of system prompt and examples for in-context
    learning; of the system prompt for adapters, where they depend on the adapter and are computed per task.
    """
    net, encoder, adapter, generator = setup.hypernet, setup.encoder, setup.adapter_bytes, setup.generator_bytes
    changed = net.num_adapted * sum(a * b for a, b in zip(net.in_features, net.out_features, strict=True))
    weights, table = round(changed * setup.itemsize), setup.encoder_itemsize or setup.itemsize
    if isinstance(net, PointerConfig):
        made = pointer_flops(net, load.description)
    else:
        made = sum(hypernet_flops(net).values())
    make = {
        "describe": (encoder.flops(load.description), round(encoder.weights(load.description) * table)),
        "generate": (made, round(num_parameters(net) * setup.adapter_itemsize) + adapter),
    }
    merge = {"merge": (2 * net.rank * changed, 2 * weights + adapter)}
    head, before = load.system, load.system + load.prefix
    ask = functools.partial(_ask, setup, load)
    every, warm = ask({}, 0, before), ask({}, before, before)
    new, kept = ask(make, 0, head, adapter=True), ask({}, head, head, adapter=True)
    merged, bare = ask(make | merge, 0, head), ask({}, head, head)
    # Bytes of keys and values: of a whole sequence (with and without examples), and of its parts.  Parts are no differences:
    # a shared prefix stays in memory for other sequences even when the sliding window of this one has passed it.
    own = load.question + load.answer
    whole, short = setup.kv(before + own), setup.kv(head + own)
    rest, examples, system = setup.kv(own), setup.kv(load.prefix), setup.kv(head)
    shared, alone, adapted = (rest, examples, system), (whole, 0, 0), short + adapter
    return {
        "icl": Way(every, every, alone, alone),
        "icl-cold": Way(ask({}, head, before), warm, shared, alone),
        "icl-warm": Way(warm, warm, shared, alone),
        "t2l-request": Way(new, new, (adapted, 0, generator), (adapted, 0, 0)),
        "t2l-task": Way(new, kept, (rest, system + adapter, generator), (short, adapter, 0)),
        # Merged weights are read in place of the base model's.
        "t2l-merged": Way(merged, bare, (rest, system + weights, generator), (short, weights, -weights)),
    }


def _ask(setup: Setup, load: Workload, first: dict[str, Any], cached: int, before: int, adapter: bool = False) -> Request:
    """Phases ``first``, then a question after ``before`` tokens, of which ``cached`` are in the KV cache."""
    model, context = setup.model, before + load.question
    read, steps = context - cached, load.answer - 1  # the prompt gives the first token
    lora_flops, lora_bytes = (2 * setup.hypernet.adapter_values, setup.adapter_bytes) if adapter else (0, 0)
    # A query's own key is not read from the cache, hence the pairs with one cached token less.
    keys = sum(layer.cached * layer.pairs(steps, context - 1) for layer in model.attention) + steps * model.kept(1)
    prompt_bytes = setup.weights(read) + lora_bytes + setup.kv(cached) + setup.kv(read)
    answer_bytes = steps * (setup.weights(1) + lora_bytes) + round(keys * setup.cache_itemsize)
    prompt = model.flops(read, cached) + read * lora_flops
    answer = model.flops(steps, context, logits=steps) + steps * lora_flops
    return Request(first | {"prompt": (prompt, prompt_bytes), "answer": (answer, answer_bytes)})


def questions_won(way: Way, rival: Way) -> tuple[int, int | None] | None:
    """The range (first, last) of numbers of questions of one task for which ``way`` takes fewer FLOPs than ``rival``.

    last None: unbounded.  None: never.  Both totals are linear, so the range has no gaps.
    """
    ahead = rival.first.flops() - way.first.flops()
    saved = rival.later.flops() - way.later.flops()  # per later question
    if saved > 0:
        return (1 if ahead > 0 else -ahead // saved + 2), None
    if ahead <= 0:
        return None
    return 1, None if saved == 0 else -(-ahead // -saved)


def tasks_to_win(way: Way, rival: Way, users_per_task: float | Fraction = 1) -> int | None:
    """The fewest concurrent tasks, each with ``users_per_task`` users, from which ``way`` needs less memory; None: never."""
    user, task, fixed = (theirs - ours for ours, theirs in zip(way.held, rival.held, strict=True))  # bytes saved
    saved = users_per_task * user + task
    if saved == 0:
        return 1 if fixed > 0 else None
    return None if saved < 0 else max(1, int(-fixed // saved) + 1)
