"""Break-even points against brute force, memory by hand, and what a workload may be."""

import dataclasses
import doctest
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2l_engine import ConfigError, HyperNetwork, HyperNetworkConfig
from t2l_engine.hypernetwork.config import TASK_ENCODERS, VARIANTS
from t2l_engine.hypernetwork.network import hypernet_flops, num_parameters
from t2l_engine.research.costs import (
    KNOWN,
    PAPER,
    Request,
    Setup,
    Way,
    Workload,
    count,
    hypernetwork_for,
    known_setup,
    questions_won,
    tasks_to_win,
    ways,
)
from tests.hypernetwork.plain_network import MODULES
from tests.networks import SHAPES
from tests.research.costs.flop_counter import counted

LOAD = Workload(question=59, answer=4, shots=3, shot=80, description=35, system=10)
PARAMETERS = {  # of the language model, and of its hypernetwork
    "mistral-7b": (7_241_732_096, 55_424_000),
    "llama-3.1-8b": (8_030_261_248, 230_027_264),
    "gemma-2-2b": (2_614_341_888, 137_706_752),
    "smollm2-135m": (134_515_008, 2_281_008),
}
costs, few = st.integers(0, 12), st.integers(-6, 6)


def way(first: int = 0, later: int = 0, held: tuple[int, int, int] = (0, 0, 0)) -> Way:
    return Way(*(Request({"prompt": (cost, 2 * cost)}) for cost in (first, later)), held, (0, 0, 0))


# --- what is known ---------------------------------------------------------------------------------------------------


def test_known_setups():
    assert list(KNOWN["model"]) == list(PARAMETERS)
    for name, counts in PARAMETERS.items():
        setup = known_setup(name)
        assert (setup.model.parameters, num_parameters(setup.hypernet)) == counts, name
        assert setup.hypernet == SHAPES[name].config(), name  # as the benchmarks have it
    assert setup.encoder.parameters == 22_565_376 and MISTRAL.encoder.parameters == 434_139_136
    assert hypernetwork_for(MISTRAL.model, MISTRAL.encoder, modules=("up_proj",)).out_features == (14336,)
    with pytest.raises(ConfigError, match="modules: expected some of q_proj, .*, got 'c_attn'"):
        hypernetwork_for(MISTRAL.model, MISTRAL.encoder, modules=("c_attn",))


def test_the_papers_cells():
    """TFLOP of the first question on Mistral-7B (arXiv 2506.06105, appendix I): 0.856 by an adapter, 4.177 by examples."""
    made = ways(MISTRAL, PAPER)
    for way, tflop in (("t2l-task", 0.856), ("icl", 4.177)):
        assert made[way].first.flops(first_token=True) / 1e12 == pytest.approx(tflop, rel=0.005)


@pytest.mark.parametrize("encoder", TASK_ENCODERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hypernetworks(variant, encoder):
    """Of every variant and task encoder, as ``generate`` runs on the CPU, in new memory and in memory used before."""
    config = HyperNetworkConfig(
        variant=variant, task_encoder=encoder, modules=tuple(MODULES), in_features=(24, 24, 41), out_features=(41, 24, 19),
        num_layers=3, rank=4, embed_dim=14, latent_size=128 if encoder == "discrete" else 20, head_in_size=18,
        lora_alpha=8.0,
    )  # fmt: skip
    net, task_emb = HyperNetwork(config), torch.randn(5, 14)
    stack = net.generate(task_emb)  # folds what does not depend on the task
    one = sum(hypernet_flops(config).values())
    assert counted(lambda: net.generate(task_emb)) == counted(lambda: net.generate(task_emb, out=stack)) == 5 * one
    assert hypernet_flops(config)["heads"] == 2 * 18 * config.adapter_values


@pytest.mark.parametrize("name", ["research.costs", "ops.flops"])
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"t2l_engine.{name}")).failed == 0


# --- questions and tasks ---------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(costs, costs, costs, costs)
def test_questions_won(first, later, rival_first, rival_later):
    """Every sign of what the first question and each later one save; beyond 40 questions nothing changes."""
    ours, rival = way(first, later), way(rival_first, rival_later)
    won = [n for n in range(1, 41) if first + (n - 1) * later < rival_first + (n - 1) * rival_later]
    got = questions_won(ours, rival)
    if not won:
        assert got is None
    else:
        assert got == (won[0], None if won[-1] == 40 else won[-1])
        assert won == list(range(won[0], won[-1] + 1))


def test_roofline_times():
    """Of each phase whichever takes longer; the answer is not awaited for a first token."""
    request = Request({"prompt": (10, 40), "answer": (8, 1)})
    assert request.seconds(4.0, 16.0) == 2.5 + 2.0 and request.seconds(4.0, 8.0, first_token=True) == 5.0


@settings(max_examples=100)
@given(few, few, few, st.integers(1, 3))
def test_tasks_to_win(per_user, per_task, fixed, users):
    """Of memory: ours beside a rival whose shares lie around ours; beyond 40 tasks nothing changes."""
    ours, rival = way(held=(10, 10, 10)), way(held=(10 + per_user, 10 + per_task, 10 + fixed))
    less = [0 < n * users * per_user + n * per_task + fixed for n in range(1, 41)]
    expected = None if not less[-1] else max((i + 2 for i, won in enumerate(less) if not won), default=1)
    assert tasks_to_win(ours, rival, users) == expected


# --- memory and bytes, by hand for Mistral-7B ------------------------------------------------------------------------

MISTRAL = known_setup("mistral-7b")
KV = 2 * 32 * 8 * 128 * 2  # keys and values of a token: layers, heads, width, two bytes
ADAPTER = 32 * 8 * ((4096 + 4096) + (4096 + 1024)) * 2  # layers, rank, A and B of q and v, two bytes
MERGED, WEIGHTS = 32 * 4096 * (4096 + 1024) * 2, 2 * (7_241_732_096 - 32000 * 4096)


def test_memory_of_mistral():
    """Held per user, per task and once."""
    made = ways(MISTRAL, LOAD)
    generator = 2 * (MISTRAL.encoder.parameters + 55_424_000)
    assert (MISTRAL.kv(1), MISTRAL.adapter_bytes, MISTRAL.generator_bytes) == (KV, ADAPTER, generator)
    system, examples, own = 10, 3 * 80, 59 + 4
    assert {name: way.held for name, way in made.items()} == {
        "icl": ((system + examples + own) * KV, 0, 0),
        "icl-cold": (own * KV, examples * KV, system * KV),
        "icl-warm": (own * KV, examples * KV, system * KV),
        "t2l-request": ((system + own) * KV + ADAPTER, 0, generator),
        "t2l-task": (own * KV, system * KV + ADAPTER, generator),
        "t2l-merged": (own * KV, system * KV + MERGED, generator),
    }
    won = tasks_to_win(made["t2l-task"], made["icl-warm"])
    assert won == (generator - system * KV) // ((examples - system - 52) * KV) + 1


def test_bytes_of_a_step():
    """Weights once, of every row its keys and values, of every task its adapter; merged weights in place of the model's."""
    whole, short = (10 + 240 + 59 + 4) * KV, (10 + 59 + 4) * KV
    assert MISTRAL.weights(8) == WEIGHTS
    assert {name: way.step for name, way in ways(MISTRAL, LOAD).items()} == {
        **dict.fromkeys(("icl", "icl-cold", "icl-warm"), (whole, 0, 0)),
        "t2l-request": (short + ADAPTER, 0, 0),
        "t2l-task": (short, ADAPTER, 0),
        "t2l-merged": (short, MERGED, -MERGED),
    }


def test_bytes_of_a_request():
    made = ways(MISTRAL, LOAD)
    moved = {name: moved for name, (_, moved) in made["t2l-merged"].first.phases.items()}
    assert moved["describe"] == 2 * MISTRAL.encoder.weights(35)  # rows of the embeddings
    assert moved["generate"] == 2 * 55_424_000 + ADAPTER
    assert moved["merge"] == 2 * MERGED + ADAPTER
    assert moved["prompt"] == WEIGHTS + 69 * KV
    steps = [69, 70, 71]  # tokens in the cache at each; one more is written
    assert moved["answer"] == 3 * WEIGHTS + (sum(steps) + 3) * KV
    beside = {name: moved for name, (_, moved) in made["t2l-task"].later.phases.items()}
    assert beside == {"prompt": WEIGHTS + 10 * KV + 59 * KV + ADAPTER, "answer": moved["answer"] + 3 * ADAPTER}


SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
}  # fmt: skip
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7}
TINY = count({"model_type": "ministral", "num_key_value_heads": 2, "head_dim": 20, **SIZES, **SLIDING})
TINY_ENCODER = count({"model_type": "bert", "max_position_embeddings": 101, **SIZES}, head=False)
SETUP = Setup(TINY, TINY_ENCODER, hypernetwork_for(TINY, TINY_ENCODER, rank=2, latent_size=16, head_in_size=12))


@given(st.integers(0, 60), st.integers(0, 30), st.integers(0, 30))
def test_what_is_shared_stays_beyond_a_window(prefix, system, own):
    """What a sequence holds alone is what it adds, also where a window has passed all that came before."""
    load = Workload(question=own + 1, answer=1, shots=1, shot=prefix, description=1, system=system)
    made = ways(SETUP, load)
    unit, added = 2 * 2 * 20 * 2, own + 2
    parts = tuple(unit * (tokens + min(tokens, 7)) for tokens in (added, prefix, system))  # a full layer and a window of 7
    assert made["icl-warm"].held == parts
    assert made["t2l-task"].held[0] == made["t2l-merged"].held[0] == parts[0]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Workload)])
def test_bad_workloads(field):
    least = 1 if field in ("question", "answer", "description") else 0
    for value in (least - 1, 2.0, True):
        with pytest.raises(ValueError, match=f"{field}: expected a number of tokens of at least {least}, got {value!r}"):
            dataclasses.replace(LOAD, **{field: value})
