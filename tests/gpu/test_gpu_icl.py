"""The first question of a user without a GPU: what is timed is what it says, what is wrong is not timed, and its tables."""

import dataclasses

import pytest
import torch
from card import RATES, Card

from bench.gpu import cases, gte, icl, llama, model, tables
from bench.gpu.context import Context, Part
from bench.harness import OURS
from bench.rows import BASE
from t2l_engine.research import costs
from t2l_engine.testing import numerics

CPU = torch.device("cpu")


@pytest.fixture
def first(context):
    return icl.First(context)


def result_of(context, **fields):
    about = {"suite": "gpu", "size": "full", "date": "2026-01-02", "commit": "0123abc", "dirty": False, "steps": []}
    return about | context.part.data | fields


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_prefill_is_decoding_token_by_token():
    """In float64: no token of a prefill sees what comes after it, and each is at its place."""
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    whole = llama.make(model.TINY, 2, 5, CPU, torch.float64, new=5)
    exact = whole(tokens)
    for new in (1, 2, 4):
        last = model.shared(whole).reserve(2, 5, new)
        last.follow(whole)
        assert numerics.relative_frobenius(last(tokens[:, -new:]), exact) < numerics.EMBEDDING_FROBENIUS
    before = llama.make(model.TINY, 2, 4, CPU, torch.float64, new=4)
    before(tokens[:, :4])
    for mine, theirs in zip(before.model.layers, whole.model.layers, strict=True):
        torch.testing.assert_close(mine.self_attn.keys, theirs.self_attn.keys[:, :, :4])


def test_models_have_the_sizes_that_costs_are_made_of():
    setup = icl.TINY.setup
    decoder, encoder = llama.Llama(setup.decoder), gte.make(setup.encoder, 4, CPU, torch.bfloat16)
    assert sum(p.numel() for p in decoder.parameters()) == setup.decoder.num_parameters
    assert sum(p.numel() for p in encoder.parameters()) == setup.encoder.num_parameters
    made = encoder(torch.tensor([[1, 2, 3, 4]]))
    assert made.dtype == torch.float32 and made.norm() == pytest.approx(24**0.5)
    assert (icl.FULL.in_context, icl.FULL.setup.decoder) == (299, llama.MISTRAL)
    ways = costs.ways(icl.FULL.setup, icl.FULL.load)
    assert ways["icl"].first.flops() / ways["t2l-request"].first.flops() == pytest.approx(4.9, abs=0.05)


def test_weights_are_shared_but_for_those_that_are_merged_into():
    base = llama.make(model.TINY, 1, 3, CPU, torch.bfloat16)
    other = model.shared(base, own=("q_proj", "v_proj"))
    own = {name for (name, a), b in zip(base.named_parameters(), other.parameters(), strict=True) if a is not b}
    assert own == {f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 1) for name in ("q_proj", "v_proj")}
    assert torch.equal(base.model.layers[1].self_attn.q_proj.weight, other.model.layers[1].self_attn.q_proj.weight)


# --- verification ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_request_makes_the_adapter_that_it_uses(first):
    calls, base = first.calls(), first.base(first.question)
    made, kept = calls[OURS](), calls[icl.KEPT]()
    assert torch.equal(made, kept) and not torch.equal(made, base)
    first.description = first.description.flip(1)
    assert not torch.equal(calls[OURS](), made), "another description, another adapter, in the slots that are used"
    assert torch.equal(first.base(first.question), base), "the base model stays what it is"
    assert first.errors.keys() == {OURS, icl.KEPT, icl.MERGED, *icl.RIVALS} and not first.absent


@pytest.mark.parametrize("broken", ["kernel", "merge", "generation"])
def test_what_is_wrong_is_not_timed(context, monkeypatch, broken):
    changes = {
        "kernel": (cases.ops, "lora_add_", lambda y, *rest: y),
        "merge": (icl.t2l.LoRAHandle, "merge", lambda self, index: None),
        "generation": (cases.ops, "hypernet_heads_out_", lambda *_, **__: None),
    }
    monkeypatch.setattr(*changes[broken])
    context.attempt("first question", lambda: icl.questions(context, RATES, icl.First(context)))
    (failed,) = context.part.data["failed"]
    assert failed["error"].startswith("VerificationError: ") and "rows" not in context.part.data


def test_nothing_follows_what_is_not_verified(context, monkeypatch):
    monkeypatch.setattr(cases.ops, "lora_add_", lambda y, *rest: y)
    icl.run(context)
    assert [entry["case"] for entry in context.part.data["failed"]] == ["first question", "decode step"]
    assert "rows" not in context.part.data and "energy" not in context.part.data


def test_a_wrong_rival_is_absent(context, monkeypatch):
    monkeypatch.setattr(llama.Llama, "follow", lambda self, other: None)  # random keys and values instead
    first = icl.First(context)
    assert first.absent[icl.WARM].startswith("wrong: error")
    (_, row), *_ = icl.questions(context, RATES, first)
    assert row["baselines"][icl.WARM] == {"absent": first.absent[icl.WARM]} and "median_us" in row["baselines"][BASE]


# --- rows and tables -------------------------------------------------------------------------------------------------


def test_rows_and_tables(context):
    icl.run(context)
    data = context.part.data
    assert "failed" not in data and "left_out" not in data
    request, cached, merged, decode = data["rows"]
    names = (tables.PER_REQUEST, icl.KEPT, icl.MERGED)
    assert [row["case"] for row in (request, cached, merged)] == [tables.first_question(name) for name in names]
    assert request["baselines"].keys() == {BASE, tables.ENCODER, *icl.RIVALS}
    assert decode["baselines"].keys() == {BASE, tables.THREE_SHOT} and decode["shape"]["rows"] == icl.TINY.rows
    assert request["floor"]["flops"] > cached["floor"]["flops"] > merged["floor"]["flops"] > 0
    assert all(row["error"]["value"] <= row["error"]["bound"] and row["lost"] == [] for row in data["rows"])
    assert [(e["case"], e["unit"], e["count"]) for e in data["energy"]] == [
        (tables.first_question(name), "question", 1) for name in (tables.PER_REQUEST, tables.THREE_SHOT)
    ]
    text = tables.whole(result_of(context))
    for words in (
        "#### The first question of a user",
        tables.NOTES["icl"],
        "memory a user",
        "text encoder, us",
        "1 question",
    ):
        assert words in text
    assert "First question of a user, 7B-shaped model: " in tables.summary(result_of(context))


def test_a_form_that_could_not_be_timed_has_failed(context, first, monkeypatch):
    timed = icl.measure

    def without(device, candidates, seconds, absent):
        absent[icl.MERGED] = "NotCaptured: why"
        return timed(device, {name: one for name, one in candidates.items() if name != icl.MERGED}, seconds, absent)

    monkeypatch.setattr(icl, "measure", without)
    entries = list(icl.questions(context, RATES, first))
    assert [kind for kind, _ in entries] == ["rows", "rows", "failed"]
    assert entries[-1][1] == {"case": tables.first_question(icl.MERGED), "error": "NotCaptured: why"}
    assert "absent" not in str(entries[0][1]["baselines"]), "of rivals alone"


def test_the_line_of_the_readme():
    row = {"case": tables.first_question(tables.PER_REQUEST), "ours": {"median_us": 6000.0}}
    row |= {"baselines": {tables.THREE_SHOT: {"median_us": 9000.0}}}
    spent = [
        {"case": tables.first_question(way), "unit": "question", "mj_each": mj}
        for way, mj in ((tables.PER_REQUEST, 3000.0), (tables.THREE_SHOT, 4800.0))
    ]
    idle = {"case": "idle", "unit": None}
    assert tables.question({}) is None and tables.question({"rows": [row | {"baselines": {}}]}) is None
    without = tables.question({"rows": [row], "energy": [idle, spent[0]]})
    assert "6.00 ms with a description" in without and without.endswith("1.50 x the time.")
    whole = tables.question({"rows": [row], "energy": [idle, *spent]})
    assert "6.00 ms and 3.00 J with" in whole and "9.00 ms and 4.80 J with three" in whole
    assert whole.endswith("1.50 x the time, 1.60 x the energy.")


def test_sizes_of_a_card(tmp_path):
    assert icl.Sizes.of(Context(Card(), Part(tmp_path / "part.json"), 1.0)) is icl.FULL
    ways = costs.ways(icl.FULL.setup, dataclasses.replace(icl.FULL.load, answer=icl.FULL.answered))
    ours, theirs = (icl._beside_icl(ways, "t2l-task", 0)[name] for name in ("user_bytes", "user_bytes_in_context"))
    token, adapter = 2 * 32 * 8 * 128 * 2, 2 * 32 * 8 * (4096 + 4096 + 4096 + 1024)
    assert (ours, theirs) == (75 * token + adapter, 315 * token)
