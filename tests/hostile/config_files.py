"""Configurations that parse and say what cannot be: wrong types, huge sizes, contradictions, patterns that never end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

import yaml

from tests.hostile import MODELS, Case, Workshop


def cases(shop: Workshop) -> Iterator[Case]:
    yield from _native_fields(shop)
    yield from _reference_fields(shop)
    yield from _peft_fields(shop)
    yield from _models(shop)


def field_cases(make: Callable[[str, object], Case], wrong: dict[str, list]) -> Iterator[Case]:
    """A case of every wrong value of every field."""
    for field, values in wrong.items():
        for value in values:
            yield make(field, value)


TEXT, LIST, HUGE = "x" * 10_000, [[1]] * 10_000, 10**400
#: Values of which a message could show the beginning of each part and still have no end.
KEYS, NESTED = {f"{i}" + "k" * 150: 1 for i in range(5000)}, [[["x" * 50] * 16] * 16] * 16
NUMBERS = [None, True, "4", [4], 0, -1, 4.5, HUGE, 10**12, float("nan")]
FLAGS = [None, 1, "false", [], {"a": 1}]


def _native_fields(shop: Workshop) -> Iterator[Case]:
    blocks = json.loads(shop.read("native", "config.json"))
    count = iter(range(10_000))

    def make(field: str, value: object, loader: str = "hypernetwork", block: str = "hypernetwork") -> Case:
        text = json.dumps(blocks | {block: blocks[block] | {field: value}})
        return shop.case(f"config-{next(count)}-{field}", "native", "config.json", text.encode(), field, loader=loader)

    names = ["../../etc/passwd", "{layer.__class__}", "", "q" * 100_000, "q\nproj", "q.proj", "\0", "__class__.x", 3, None]
    yield from field_cases(
        make,
        {
            "variant": [None, 3, "XL", TEXT, LIST, KEYS, NESTED],
            "modules": [None, [], "q_proj", {}, ["q_proj", "q_proj"], ["q_proj"], LIST, [f"m{i}" for i in range(100_000)]],
            "in_features": [None, [], [64], *([64, value] for value in (0, -64, "64", 64.0, True, 10**12, HUGE))],
            "out_features": [None, [64, 32, 1], [10**12, 32], LIST],
            "num_layers": NUMBERS,
            "rank": NUMBERS,
            "embed_dim": NUMBERS,
            "latent_size": [*NUMBERS, 3],
            "head_in_size": NUMBERS,
            "lora_alpha": [None, "8", [], 0, -1, float("inf"), float("nan"), HUGE, True, 1e299, 1e-60],
            "scaling": [None, "rsLoRA", [], 0, -1.0, float("inf"), True, HUGE, TEXT, 1e39, 1e-60],
            "head_bias": FLAGS,
            "output_scale": [None, "1", 0, -1, float("inf"), HUGE, 1e39, 1e-60],
            "paths": [
                3,
                "h",
                [],
                {"q_proj": TEXT},
                LIST,
                *(["h.{layer}.q"] * n for n in (1, 2)),
                ["../{layer}.q", "h.{layer}.v"],
            ],
            "surprise": [1],
            TEXT[:100] + "surprise": [1],
        },
    )
    for field, value in (
        *(("variant", name) for name in ("L", "S-rotary")), ("out_features", [32, 64]), ("embed_dim", 49),
        *(("num_layers", n) for n in (4, 10**9)), *(("rank", n) for n in (5, 10**9)), ("latent_size", 36),
        ("head_in_size", 41), ("head_bias", True),
    ):  # fmt: skip
        text = json.dumps(blocks | {"hypernetwork": blocks["hypernetwork"] | {field: value}})
        name = f"contradiction-{field}-{value}".replace(" ", "")
        yield shop.case(name, "native", "config.json", text.encode(), contradiction=True)
    places = {"paths": ["h.{layer}.q", "h.{layer}.v"]}  # so that any name will do
    for name in ("_parameters", "_modules", "training", "forward", "items", "T_destination"):
        network = blocks["hypernetwork"] | places | {"modules": ["q_proj", name]}
        text = json.dumps(blocks | {"hypernetwork": network}).encode()
        yield shop.case(f"config-module-{name}", "native", "config.json", text, "modules", contradiction=True)
    for name in names:
        text = json.dumps(blocks | {"hypernetwork": blocks["hypernetwork"] | {"modules": ["q_proj", name]}})
        yield shop.case(f"config-{next(count)}-module", "native", "config.json", text.encode(), "modules")
    encoder = partial(make, loader="encoder", block="encoder")
    yield from field_cases(
        encoder,
        {
            "name": [None, "", 3, [], {"a": LIST}],
            "pooling": [None, "median", ["mean"], TEXT, KEYS, NESTED],
            "max_length": [None, "512", 0, -1, True, 1.5, HUGE],
            "full_stop": FLAGS,
            "template": ["no placeholder", 3, [], ""],
            "surprise": [1],
        },
    )
    for name, changes in {
        "format-missing": {"format": None},
        "format-other": {"format": "t2l_engine.hypernetwork.network.v0"},
        "format-long": {"format": TEXT},
        "format-list": {"format": LIST},
        "surprise": {"surprise": 1},
        "surprises": {f"surprise{i}": 1 for i in range(5000)},
        "hypernetwork-list": {"hypernetwork": []},
        "hypernetwork-null": {"hypernetwork": None},
    }.items():
        yield shop.case(f"blocks-{name}", "native", "config.json", json.dumps(blocks | changes).encode())
    for value in ([], 3, "minilm", {}):
        text = json.dumps(blocks | {"encoder": value})
        yield shop.case(f"encoder-block-{value!r:.4}", "native", "config.json", text.encode(), "encoder", loader="encoder")
    # Everything consistent with everything but the tensors: building it would take terabytes.
    big = {"in_features": [1 << 30] * 2, "out_features": [1 << 30] * 2, "rank": 1 << 10, "num_layers": 1 << 10}
    text = json.dumps(blocks | {"hypernetwork": blocks["hypernetwork"] | big})
    yield shop.case("config-terabytes", "native", "config.json", text.encode(), contradiction=True)


def _reference_fields(shop: Workshop) -> Iterator[Case]:
    count = iter(range(10_000))
    args = yaml.safe_load(shop.read("L-sft", "args.yaml"))
    peft = json.loads(shop.read("L-sft", "adapter_config.json"))

    def arg(field: str, value: object, base: str = "L-sft") -> Case:
        values = args if base == "L-sft" else yaml.safe_load(shop.read(base, "args.yaml"))
        content = yaml.safe_dump(values | {field: value}).encode()
        contradiction = field in ("mt_lora_path", "pred_z_score")  # with the biases in the tensors
        return shop.case(f"args-{next(count)}-{field}", base, "args.yaml", content, field, contradiction=contradiction)

    yield from field_cases(
        arg,
        {
            "training_task": [None, "rl", 3, [], TEXT, LIST, ["sft"], KEYS, NESTED],
            "shared_AB_head": [True, "false", "no", 0, [], {"a": 1}],
            "autoreg_gen": [True, "false", 1],
            "learnable_pos_emb": ["false", [1]],
            "pred_z_score": ["false", 3],
            "factorized": ["false", [2]],
            "hypernet_latent_size": [*NUMBERS, 36],
            "head_in_size": [*NUMBERS, 41],
            "delta_w_scaling": [None, "1", 0, -1, float("nan"), float("inf"), HUGE, [], True, 1e299, 1e-299],
            "mt_lora_path": ["somewhere", 3, [1]],
        },
    )
    yield from field_cases(partial(arg, base="M-recon-z"), {"factorized": [False, "true"], "pred_z_score": [False, 1]})
    yield from field_cases(partial(arg, base="S-pos-sft"), {"learnable_pos_emb": [False, 1], "shared_AB_head": [False]})
    yield from field_cases(partial(arg, base="S-rot-sft"), {"learnable_pos_emb": [True], "autoreg_gen": [False]})

    def config(field: str, value: object) -> Case:
        content = json.dumps(peft | {field: value}).encode()
        return shop.case(f"reference-peft-{next(count)}-{field}", "L-sft", "adapter_config.json", content, field)

    modules = [
        None,
        "q_proj|v_proj",
        [],
        ["q_proj"],
        ["q_proj", "q_proj", "v_proj"],
        ["q_proj", 3],
        LIST,
        {"q_proj": 1},
        TEXT,
    ]
    yield from field_cases(
        config,
        {
            "r": [None, 8, "4", 4.5, HUGE, TEXT, LIST],
            "lora_alpha": [None, 0, -8, "8", float("nan"), float("inf"), HUGE, True, LIST],
            "target_modules": [*modules, ["q_proj", "../../etc/passwd"], [f"m{i}" for i in range(10_000)]],
            "use_rslora": ["true", [1], TEXT],
        },
    )


def _peft_fields(shop: Workshop) -> Iterator[Case]:
    count = iter(range(10_000))
    values = json.loads(shop.read("adapter", "adapter_config.json"))

    def make(field: str, value: object) -> Case:
        content = json.dumps(values | {field: value}).encode()
        return shop.case(f"peft-{next(count)}-{field}", "adapter", "adapter_config.json", content, field)

    patterns = ["(a+)+$", "(a|aa)+$", "(.*)*x", "((a*)*)*", "(x+x+)+y", ".*" * 9 + "x"]
    patterns += ["(", "[", "*", "(?P<a", "\\", "a{99999999999999}"]
    ranks = [0, -1, "8", None, True, float("nan"), float("inf"), HUGE, 1e200, 1e-300, [1]]
    yield from field_cases(
        make,
        {
            "peft_type": [None, "IA3", "lora", 3, [], TEXT, LIST, KEYS, NESTED],
            "r": [None, 0, -4, "4", True, 4.5, float("nan"), HUGE, LIST],
            "lora_alpha": [None, 0, -4, "4", True, float("nan"), float("inf"), HUGE, 1e308, 1e200, 1e-300, TEXT],
            "use_rslora": ["false", [1]],
            "use_dora": [True, "false", 1],
            "bias": ["all", "lora_only", 3, True, LIST],
            "lora_bias": [True, "no"],
            "modules_to_save": [["lm_head"], "lm_head", LIST],
            "trainable_token_indices": [[3], {"embed_tokens": [1]}],
            "layer_replication": [[[0, 2]], 3],
            "alora_invocation_tokens": [[1], TEXT],
            "use_qalora": [True],
            "use_bdlora": [{"a": 1}],
            "target_parameters": [["experts.gate_up_proj"]],
            "megatron_config": [{"a": 1}],
            "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", TEXT, [1], 3],
            "alpha_pattern": [
                *({pattern: 8} for pattern in patterns),
                *({"q_proj": rank} for rank in ranks),
                {"q" * 100_000: 8},
                {f"m{i}": 8 for i in range(20_000)},
                {f"m{i}" + "[\u0100\u0202\u0404]" * 50: 8 for i in range(2300)},
                *(["q_proj"], "q_proj", 3),
            ],
            "layers_to_transform": ["all", [10**9], [-1], [[0]], LIST, 0, [0, 2]],
            "target_modules": [3, [3], {}, [], ["q_proj"], ["proj"], LIST],
            "exclude_modules": [3, [3], {}, ["v_proj"], ["self_attn.q_proj"], LIST],
        },
    )


def _models(shop: Workshop) -> Iterator[Case]:
    """Models whose costs are counted: every number of a configuration, and what contradicts itself."""
    count = iter(range(10_000))
    sizes = [True, "4", [4], 0, -1, 4.5, HUGE, 10**12, float("nan")]
    wrong = {
        "decoder": {
            "model_type": [None, 3, [], {}, TEXT, "mamba", LIST, KEYS, NESTED],
            "tie_word_embeddings": FLAGS[1:],
            "use_sliding_window": FLAGS[1:],
            "attention_bias": FLAGS[1:],
            "use_bidirectional_attention": [True, *FLAGS[1:]],
            "mlp_only_layers": [3, "0", {"0": 0}],
            "num_key_value_heads": [*sizes, 3],
            "num_experts_per_tok": [*sizes, 5],
            "num_hidden_layers": [*sizes, 1 << 20],
            **{
                field: sizes
                for field in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "head_dim")
            },
            **{field: sizes for field in ("num_experts", "moe_intermediate_size", "decoder_sparse_step", "sliding_window")},
        },
        "gemma": {
            "layer_types": ["full_attention", ["full_attention"], [[]] * 2, [{}, 1], ["full_attention", TEXT], LIST],
            "sliding_window": sizes,
        },
        "text encoder": {
            "model_type": [None, 3, {}, "llama", TEXT, KEYS, NESTED],
            "num_attention_heads": [*sizes, 3],
            "type_vocab_size": [True, "2", -1, HUGE],
            **{field: sizes for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")},
            "max_position_embeddings": sizes,
        },
    }
    for base, fields in wrong.items():

        def make(field: str, value: object, base: str = base) -> Case:
            text = json.dumps(MODELS[base] | {field: value})
            return shop.case(f"model-{next(count)}-{field}", base, "config.json", text.encode(), field)

        yield from field_cases(make, fields)
        texts = {"list": b"[]", "deep": b"[" * 100_000, "twice": b'{"model_type": "llama", "model_type": "llama"}'}
        for name, text in texts.items():
            yield shop.case(f"model-{base}-{name}", base, "config.json", text)
