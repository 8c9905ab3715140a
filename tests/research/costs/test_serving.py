"""Break-even points against brute force, memory by hand, and what a workload may be."""

import dataclasses
import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2l_engine.research.costs import (
    WAYS,
    Phase,
    Request,
    Setup,
    Way,
    Workload,
    count,
    hypernetwork_for,
    known_setup,
    questions_won,
    shots_to_win,
    tasks_to_win,
    tokens_of_adapter,
    ways,
)

LOAD = Workload(question=6, answer=5, shots=2, shot=4, description=11, instruction=3, system=2)
PAPER = Workload(question=59, answer=4, shots=3, shot=80, description=35, system=10)
costs, few = st.integers(0, 12), st.integers(-6, 6)


def way(first: int = 0, later: int = 0, per_user: int = 0, per_task: int = 0, fixed: int = 0) -> Way:
    requests = [Request((Phase("prompt", {"x": cost}, {}),)) for cost in (first, later)]
    return Way("made", *requests, per_user, per_task, fixed, 0, 0)


# --- questions, shots, tasks -----------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(costs, costs, costs, costs)
def test_questions_won(first, later, rival_first, rival_later):
    """Every sign of what the first question and each later one save; beyond 40 questions nothing changes."""
    ours, rival = way(first, later), way(rival_first, rival_later)
    won = [n for n in range(1, 41) if ours.total(n) < rival.total(n)]
    got = questions_won(ours, rival)
    if not won:
        assert got is None
    else:
        assert got == (won[0], None if won[-1] == 40 else won[-1])
        assert won == list(range(won[0], won[-1] + 1))


def test_questions_won_by_bytes_and_by_time():
    """Other measures, also ones with fractions."""
    request = lambda flops, moved: Request((Phase("prompt", {"x": flops}, {"x": moved}),))  # noqa: E731
    ours = Way("ours", request(10, 40), request(1, 1), 0, 0, 0, 0, 0)
    rival = Way("rival", request(2, 2), request(2, 2), 0, 0, 0, 0, 0)
    assert questions_won(ours, rival) == (10, None)  # 10 + (n - 1) < 2 n
    assert questions_won(ours, rival, lambda r: sum(p.bytes["x"] for p in r.phases)) == (40, None)
    assert questions_won(ours, rival, lambda r: r.seconds(4.0, 16.0)) == (10, None)  # 2.5 + (n - 1) / 4 < n / 2
    assert questions_won(ours, rival, lambda r: r.seconds(1e9, 0.5)) == (40, None)
    assert ours.first.seconds(4.0, 16.0) == 2.5 and ours.first.seconds(4.0, 8.0) == 5.0  # whichever takes longer


SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
}  # fmt: skip
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7}
TINY = count({"model_type": "ministral", "num_key_value_heads": 2, "head_dim": 20, **SIZES, **SLIDING})
TINY_ENCODER = count({"model_type": "bert", "max_position_embeddings": 101, **SIZES}, head=False)
HYPERNET = hypernetwork_for(TINY, TINY_ENCODER, rank=2, latent_size=16, head_in_size=12)
SETUP = Setup(TINY, TINY_ENCODER, HYPERNET)


@functools.cache
def ways_at(shots):
    return ways(SETUP, dataclasses.replace(LOAD, shots=shots))


@pytest.mark.parametrize("questions", [1, 3, 50])
@pytest.mark.parametrize(("name", "rival"), itertools.product(("t2l-request", "t2l-task", "t2l-merged"), WAYS))
def test_shots_to_win(name, rival, questions):
    """The first number of shots from which on it stays so."""
    wins = []
    for shots in range(41):
        made = ways_at(shots)
        wins.append(made[name].total(questions) < made[rival].total(questions))
    expected = None if not wins[-1] else max((i + 1 for i, won in enumerate(wins) if not won), default=0)
    assert shots_to_win(SETUP, LOAD, name, rival, questions=questions, limit=40) == expected


@settings(max_examples=100)
@given(few, few, few, st.integers(1, 3))
def test_tasks_to_win(per_user, per_task, fixed, users):
    """Of memory: ours beside a rival whose shares lie around ours; beyond 40 tasks nothing changes."""
    ours, rival = (
        way(per_user=10, per_task=10, fixed=10),
        way(per_user=10 + per_user, per_task=10 + per_task, fixed=10 + fixed),
    )
    less = [ours.memory(n * users, n) < rival.memory(n * users, n) for n in range(1, 41)]
    expected = None if not less[-1] else max((i + 2 for i, won in enumerate(less) if not won), default=1)
    assert tasks_to_win(ours, rival, users) == expected


# --- memory and bytes, by hand for Mistral-7B ------------------------------------------------------------------------

MISTRAL = known_setup("mistral-7b")
KV = 2 * 32 * 8 * 128 * 2  # keys and values of a token: layers, heads, width, two bytes
ADAPTER = 32 * 8 * ((4096 + 4096) + (4096 + 1024)) * 2  # layers, rank, A and B of q and v, two bytes
MERGED = 32 * 4096 * (4096 + 1024) * 2


def test_memory_of_mistral():
    made = ways(MISTRAL, PAPER)
    generator = 2 * (MISTRAL.encoder.parameters + 55_424_000)
    assert (MISTRAL.kv(1), MISTRAL.adapter_bytes, MISTRAL.generator_bytes) == (KV, ADAPTER, generator) == (
        131_072, 6_815_744, generator
    )  # fmt: skip
    system, examples, own = 10, 3 * 80, 59 + 4
    parts = {name: (w.per_user, w.per_task, w.fixed) for name, w in made.items()}
    assert parts == {
        "icl": ((system + examples + own) * KV, 0, 0),
        "icl-cold": (own * KV, examples * KV, system * KV),
        "icl-warm": (own * KV, examples * KV, system * KV),
        "t2l-request": ((system + own) * KV + ADAPTER, 0, generator),
        "t2l-task": (own * KV, system * KV + ADAPTER, generator),
        "t2l-merged": (own * KV, system * KV + MERGED, generator),
    }
    assert made["t2l-task"].memory(users=8, tasks=3) == generator + 8 * own * KV + 3 * (system * KV + ADAPTER)
    assert tokens_of_adapter(MISTRAL) == 53 and ADAPTER == 52 * KV  # larger, not as large
    won = tasks_to_win(made["t2l-task"], made["icl-warm"])
    assert won == (generator - system * KV) // ((examples - system - 52) * KV) + 1


def test_bytes_of_a_step():
    """Weights once, of every row its keys and values, of every task its adapter; merged weights in place of the model's."""
    made = ways(MISTRAL, PAPER)
    weights, whole = 2 * (7_241_732_096 - 32000 * 4096), (10 + 240 + 59 + 4) * KV
    assert made["icl"].step_bytes(MISTRAL, 8, 3) == made["icl-warm"].step_bytes(MISTRAL, 8, 3) == weights + 8 * whole
    short = whole - 240 * KV
    assert made["t2l-request"].step_bytes(MISTRAL, 8, 3) == weights + 8 * (short + ADAPTER)
    assert made["t2l-task"].step_bytes(MISTRAL, 8, 3) == weights + 8 * short + 3 * ADAPTER
    assert made["t2l-merged"].step_bytes(MISTRAL, 8, 1) == weights + 8 * short
    assert made["t2l-merged"].step_bytes(MISTRAL, 8, 3) == weights + 8 * short + 2 * MERGED


def test_bytes_of_a_request():
    made = ways(MISTRAL, PAPER)
    weights = 2 * (7_241_732_096 - 32000 * 4096)
    moved = {phase.name: sum(phase.bytes.values()) for phase in made["t2l-merged"].first.phases}
    encoder = MISTRAL.encoder
    assert moved["describe"] == 2 * (encoder.parameters - encoder.embeddings)  # rows of the embeddings
    assert moved["generate"] == 2 * 55_424_000 + ADAPTER
    assert moved["merge"] == 2 * MERGED + ADAPTER
    assert moved["prompt"] == weights + 69 * KV
    steps = [69, 70, 71]  # tokens in the cache at each; one more is written
    assert moved["answer"] == 3 * weights + (sum(steps) + 3) * KV
    beside = {phase.name: sum(phase.bytes.values()) for phase in made["t2l-task"].later.phases}
    assert beside["prompt"] == weights + 10 * KV + 59 * KV + ADAPTER
    assert beside["answer"] == moved["answer"] + 3 * ADAPTER


@given(st.integers(0, 60), st.integers(0, 30), st.integers(0, 30))
def test_what_is_shared_stays_beyond_a_window(prefix, system, own):
    """What a sequence holds alone is what it adds, also where a window has passed all that came before."""
    load = Workload(question=own + 1, answer=1, shots=1, shot=prefix, description=1, system=system)
    made = ways(SETUP, load)
    unit, added = 2 * 2 * 20 * 2, own + 2
    for name in ("icl-warm", "t2l-task", "t2l-merged"):
        assert made[name].per_user == unit * (added + min(added, 7))  # a full layer and one with a window of 7
    assert made["icl-warm"].per_task == unit * (prefix + min(prefix, 7))
    assert made["icl-warm"].fixed == unit * (system + min(system, 7))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Workload)])
@pytest.mark.parametrize("value", [-1, 2.0, True])
def test_bad_workloads(field, value):
    least = 1 if field in ("question", "answer", "description") else 0
    with pytest.raises(ValueError, match=f"{field}: expected a number of tokens of at least {least}, got {value!r}"):
        dataclasses.replace(LOAD, **{field: value})
    if least:
        with pytest.raises(ValueError, match=f"{field}: expected a number of tokens of at least 1, got 0"):
            dataclasses.replace(LOAD, **{field: 0})
