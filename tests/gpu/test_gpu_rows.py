"""The GPU suite without a GPU: its arithmetic, its tables, and tiny dry rows."""

import dataclasses
import json

import pytest
import torch
from card import H100_L2, RATES, Card, timed

from bench.gpu import (
    cases,
    checks,
    energy,
    environment,
    generation,
    linear,
    lora,
    model,
    nvml,
    outputs,
    results,
    sanitizers,
    tables,
)
from bench.gpu.cases import LAYERS, Case, even, ragged, rows, zipf
from bench.gpu.context import Context, Skip
from bench.harness import OURS, Bar, Error
from bench.rows import BASE
from t2l_engine.testing import backends

# --- bytes and FLOPs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, tokens, adapters, weights, activations, floor_us, mflop, step_ms",
    [
        ("7b", 1, 1, "0.21", "0.03", "0.07", "0.2", "0.002"),
        ("7b", 8, 8, "1.7", "0.23", "0.58", "1.7", "0.018"),
        ("7b", 64, 64, "13.6", "1.8", "4.6", "13.6", "0.148"),
        ("7b", 64, 1, "0.21", "1.8", "0.61", "13.6", "0.020"),
        ("7b", 2048, 4, "0.85", "58.7", "17.8", "436", "0.57"),
        ("7b", 8192, 8, "1.7", "235", "70.6", "1745", "2.26"),
        ("7b-all", 1, 1, "1.3", "0.2", "0.46", "1.3", "0.015"),
        ("7b-all", 64, 64, "83.9", "14.4", "29.3", "84", "0.94"),
        ("7b-all", 8192, 8, "10.5", "1845", "554", "10737", "17.7"),
        ("2b", 64, 64, "7.9", "1.1", "2.7", "7.9", "0.069"),
        ("1b", 64, 64, "6.8", "0.9", "2.3", "6.8", "0.037"),
    ],
)
def test_bytes_and_flops(layer, tokens, adapters, weights, activations, floor_us, mflop, step_ms):
    """Closed forms as they were worked out by hand, at 3.35 TB/s."""
    segments = rows(*(i % adapters for i in range(tokens))) if tokens < 100 else even(tokens, adapters)
    case = Case(LAYERS[layer], segments, "")
    us = case.bytes / 3.35e6
    values = {
        weights: case.layer.weight_bytes(adapters) / 1e6,
        activations: case.layer.activation_bytes(tokens) / 1e6,
        floor_us: us,
        mflop: case.flops / 1e6,
        step_ms: us * case.layer.layers / 1e3,
    }
    for text, value in values.items():
        unit = 10.0 ** -len(text.partition(".")[2])
        assert value == pytest.approx(float(text), abs=0.52 * unit), text
    assert (case.tokens, case.adapters) == (tokens, adapters)


def test_rows_of_the_base_model_are_no_work():
    half = Case(LAYERS["7b"], rows(0, -1, 1, -1), "half base")
    assert half.bytes == Case(LAYERS["7b"], rows(0, 1), "").bytes and half.flops == half.layer.flops(2)
    assert half.shape()["tokens"] == 4 and half.shape()["adapters"] == 2


def test_patterns():
    assert sum(n for n, _ in ragged(8192, 8)) == 8192 and len(ragged(8192, 8)) == 8
    counts = [i for _, i in zipf(64)]
    assert len(counts) == 64 and max(counts) + 1 == len(set(counts)) < 64
    for full in (True, False):
        chosen = lora.decode_cases(full) + lora.prefill_cases(full)
        assert len({case.name for case in chosen}) == len(chosen)


# --- dry rows --------------------------------------------------------------------------------------------------------


def test_decode_and_prefill_rows(context):
    for group, chosen in (("decode", lora.decode_cases(False)), ("prefill", lora.prefill_cases(False))):
        for case in chosen:
            made = {row["cache"]: row for _, row in lora.compare(context, case, group, ("cold", "hot"), RATES, 0.01)}
            assert ("hot" in made) == (case.working_set <= context.device.l2_bytes), "what exceeds the cache is never hot"
            assert made["cold"]["floor"]["bytes"] == case.bytes and made["cold"]["floor"]["us"] > 0
            for row in made.values():
                assert (row["floor"] is None) == (row["floor_ratio"] is None) == (row["cache"] == "hot")
                assert row["bar"] is None and row["lost"] == [], "a dry run claims nothing"
                assert {"cuBLAS per adapter", "gather bmm", "copy", tables.APART} <= row["baselines"].keys()
                assert ("absent" in row["baselines"]["gather bmm"]) == (case.pattern == "half base")


def test_rivals_that_throw_are_absent(context, monkeypatch):
    def throws(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(lora.BUILDERS, "cuBLAS per adapter", lambda operands: throws)
    monkeypatch.setitem(generation.WAYS, "cuBLAS", throws)
    monkeypatch.setattr(linear, "PEFT_ABSENT", None)
    monkeypatch.setattr(linear, "peft_linear", lambda base, member: throws)
    (_, first), *_ = lora.compare(context, lora.decode_cases(False)[0], "decode", ("cold",), RATES, 0.01)
    (_, second), *_ = generation.rows_of(context, RATES, "tiny", "float32", (1,))
    ((_, third),) = linear.compare(context, Case(linear.TINY, rows(0), ""))
    for row, name in ((first, "cuBLAS per adapter"), (second, "cuBLAS"), (third, "PEFT mixed"), (third, "PEFT single")):
        assert row["baselines"][name] == {"absent": "RuntimeError: no such kernel"}
    assert "median_us" in first["baselines"]["gather bmm"] and "median_us" in second["baselines"]["eager"]


def test_what_the_compiler_makes_is_verified(context, monkeypatch):
    def broken(generate, dynamic):
        return lambda task_emb: {name: (a + 1, b) for name, (a, b) in generate(task_emb).items()}

    for compiler, words in ((broken, "wrong: error"), (lambda f, dynamic: lambda _: 1 / 0, "ZeroDivisionError")):
        monkeypatch.setattr(torch, "compile", compiler)
        ((_, row),) = generation._compiled(context)
        assert row["baselines"]["torch.compile"]["absent"].startswith(words)
    monkeypatch.setattr(torch, "compile", lambda generate, dynamic: generate)
    ((_, row),) = generation._compiled(context)
    assert "median_us" in row["baselines"]["torch.compile"]


def test_a_wrong_kernel_is_not_timed(context, monkeypatch):
    monkeypatch.setattr(cases.ops, "lora_add_group_", lambda y, *rest: y)
    monkeypatch.setattr(cases.ops, "lora_add_", lambda y, *rest: y)
    context.attempt("wrong", lambda: lora.compare(context, lora.decode_cases(False)[0], "decode", ("hot",), RATES, 0.01))
    assert "VerificationError" in context.part.data["failed"][0]["error"] and "rows" not in context.part.data


def test_generation_rows(context):
    for dtype in ("float32", "bfloat16"):
        for _, row in generation.rows_of(context, RATES, "tiny", dtype, (1, 2)):
            ways = {"cuBLAS", "reference", "eager", "eager, captured", tables.OPS, tables.EAGER, "copy"}
            assert row["baselines"].keys() == ways and not any("absent" in b for b in row["baselines"].values())
            assert row["error"]["value"] <= row["error"]["bound"]


def test_linear_and_model_rows(context):
    linear.run(context)
    shape = dataclasses.replace(model.TINY, layers=1)
    assert model.llama.make(shape, 2, 4, torch.device("cpu"), torch.bfloat16)(torch.tensor([[0], [1]])).shape == (2, 61)
    context.part.data["rows"].extend(row for _, row in model.steps(context, RATES, "all linears", 4, (1, 4)))
    one, *steps = context.part.data["rows"]
    assert {BASE, tables.EAGER, "PEFT single"} <= one["baselines"].keys() and "failed" not in context.part.data
    assert [row["shape"]["adapters"] for row in steps] == [1, 4] and all(BASE in row["baselines"] for row in steps)
    assert steps[1]["floor"]["bytes"] > steps[0]["floor"]["bytes"]


def test_graph_checks(context):
    for index, name in enumerate(("lora_add_group_", "lora_add_")):
        ((_, entry),) = checks.lora_graph(context, name, index, torch.bfloat16)
        assert entry["passed"], entry
    context.device.capture = lambda run: lambda: None  # a graph that has kept what it read
    ((_, entry),) = checks.lora_graph(context, "baked", 0, torch.bfloat16)
    assert not entry["passed"] and "other ids" in entry["detail"] and "the base model alone" not in entry["detail"]


class Clock:
    """A millisecond passes whenever somebody asks."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds):
        self.now += seconds


def test_energy(context, monkeypatch):
    clock = Clock()
    for module in (energy, nvml):  # a dry meter's joules are seconds
        monkeypatch.setattr(module, "time", clock)
    energy.run(context)
    idle, *others = context.part.data["energy"]
    assert all(entry["watts"] == 1.0 and entry["seconds"] > 0 for entry in (idle, *others)) and len(others) == 2
    assert all(entry["sm_mhz"] == 1 for entry in others) and "one layer" in others[-1]["case"]


def test_outputs_keep_the_strides_of_their_operands(monkeypatch):
    case = next(c for c in outputs.HYPER_CASES if c.name == "L")
    right = case.make_heads(outputs.SEED)["latent"]

    def call(arguments):
        there = backends.placed(arguments, torch.device("meta"))["latent"]
        assert (there.stride(), there.storage_offset()) == (right.stride(), right.storage_offset())
        return []

    monkeypatch.setattr(outputs, "table", lambda few: {"case": (lambda device: case.make_heads(outputs.SEED), call)})
    assert not right.is_contiguous() and outputs.compute(torch.device("cpu")) == {"case": []}


FAKE_SANITIZER = """#!/bin/sh
case "$2 $*" in
racecheck*) echo "========= Error: Device not supported. See the documentation"; exit 1 ;;
synccheck*) echo "========= ERROR SUMMARY: 3 errors"; exit 9 ;;
initcheck*) echo "========= ERROR SUMMARY: 0 errors"; exit 0 ;;
memcheck*--report-api-errors\\ no*) ;;
*) exit 2 ;;
esac
for word; do [ "$last" = --out ] && : > "$word"; last=$word; done
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_sanitizers(on_card, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_SANITIZER.replace("\\\\", "\\"))
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizers, "find_cuda_tool", lambda name: str(tool))
    for name in sanitizers.TOOLS:
        getattr(sanitizers, name)(on_card)
    verdicts = {entry["check"]: (entry["passed"], entry["detail"]) for entry in on_card.part.data["checks"]}
    assert verdicts == {
        "memcheck": (True, "ERROR SUMMARY: 0 errors"),
        "synccheck": (False, "ERROR SUMMARY: 3 errors; the cases gave no outputs"),
        "initcheck": (False, "ERROR SUMMARY: 0 errors; the cases gave no outputs"),
    }
    assert on_card.part.data["left_out"] == [{"case": "racecheck", "why": "racecheck: Device not supported"}]
    monkeypatch.setattr(sanitizers, "find_cuda_tool", lambda name: None)
    with pytest.raises(Skip, match="no compute-sanitizer"):
        sanitizers.memcheck(on_card)


def test_a_sanitizer_that_is_late(on_card, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho begun\nexec sleep 600\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizers, "find_cuda_tool", lambda name: str(tool))
    sanitizers.memcheck(Context(Card(), on_card.part, 2.0))
    assert on_card.part.data["failed"] == [{"case": "memcheck", "error": "TimeoutError: it came to no end"}]


def test_outputs_beside_an_emulator():
    few = outputs.compute(torch.device("cpu"), few=True)
    assert {name.split(", ")[0] for name in few} >= {"lora_add_", "lora_delta", "lora_add_group_", "hypernet_heads"}
    other = {name: [t.clone() for t in tensors] for name, tensors in few.items()}
    assert all(entry["passed"] for _, entry in outputs.compare(few, other))
    broken = ("lora_add_, mixed_rows", "lora_add_group_, qkv", "hypernet_trunk, L", "hypernet_heads, L")
    for name in broken:
        other[name][0][..., 1] += 1
    verdicts = {entry["check"].split()[0]: entry["passed"] for _, entry in outputs.compare(few, other)}
    assert verdicts == {op: op == "lora_delta" for op in verdicts}


# --- rows and tables -------------------------------------------------------------------------------------------------


def made_row(context, bar=None, unit=None, **others):
    timings = {OURS: timed(10.0), **others}
    least = results.floor(RATES, 1000, 20_000_000, torch.bfloat16)
    error, given = Error(1e-3, 4e-3), {"cache": "cold", "absent": {"PEFT mixed": "peft is not installed"}}
    shape = {"tokens": 64, "adapters": 64}
    return results.row(context, "case", "decode", shape, timings, error, least=least, bar=bar, unit_us=unit, **given)[1]


def as_result(*made, **fields):
    given = {"suite": "gpu", "size": "full", "date": "2026-01-02", "commit": "0123abc", "dirty": False, "steps": []}
    machine, versions = {"gpu": "Some Card"}, {"torch": "2.11", "driver": "580", "triton": None}
    return {**given, "machine": machine, "versions": versions, "rows": list(made), **fields}


def test_rows_say_what_is_met_and_what_is_lost(on_card):
    context = on_card
    rivals = {"cuBLAS": timed(30.0), "gather bmm": timed(8.0), tables.REFERENCE: timed(1.0)}
    row = made_row(context, Bar(1.35, of="copy"), 8.0, copy=timed(8.0), **rivals)
    assert row["bar"]["met"] and row["copy_ratio"] == 1.25 and row["lost"] == ["gather bmm"]
    assert row["floor_ratio"] == pytest.approx(10 / (20 / 3.35), rel=1e-3) and row["baselines"]["cuBLAS"]["speedup"] == 3.0
    late = made_row(context, Bar(0.0, plus_us=5.0), None, **{tables.EAGER: timed(40.0, False), "PEFT": timed(60.0, False)})
    assert not late["bar"]["met"] and late["baselines"]["PEFT"]["speedup"] == 1.5, "both from the host"
    text = tables.group_table(as_result(row, late), "decode")
    for words in (
        "1.35 x copy",
        "met; **lost** to gather bmm",
        "5 us",
        "**not met**",
        "peft is not installed",
        "1.50 x (host)",
    ):
        assert words in text
    whole = tables.whole(as_result(row, late, failed=[{"step": "decode", "case": "c", "error": "E: why"}]))
    assert "Some Card, torch 2.11, driver 580; 2026-01-02, commit 0123abc." in whole and "- decode: c: E: why" in whole


def test_nothing_is_claimed_without_a_card(context, tmp_path):
    row = made_row(context, Bar(1.35, of="copy"), 100.0, copy=timed(8.0), cuBLAS=timed(1.0))
    assert row["bar"] is None and row["lost"] == []
    dry = as_result(row, size="dry")
    assert tables.bars(dry) == tables.NOT_MEASURED and tables.DRY in tables.whole(dry)
    path = tmp_path / "gpu.json"
    nothing = tables.committed(path)
    assert tables.summary(nothing) == tables.everything(nothing) == tables.NOT_MEASURED
    path.write_text(json.dumps(dry))
    with pytest.raises(ValueError, match=r"gpu.json: expected the result of a card, got one of size 'dry'"):
        tables.committed(path)


def test_bars_without_a_row_are_named(on_card):
    on_card.device.l2_bytes = H100_L2
    expected = environment._expected(on_card)
    names = {(bar["group"], bar["case"], bar["cache"]) for bar in expected}
    assert len(names) == len(expected) == 20
    assert ("decode", "Mistral-7B / Llama-8B q,v, 64 x 64", "hot") in names
    assert ("decode", "Llama-8B all linears, 64 x 64", "cold") in names
    assert ("decode", "Llama-8B all linears, 64 x 64", "hot") not in names, "98 MB are never hot"
    assert ("model", "decode step, 64 rows, q,v, 64 adapters", "as it comes") in names
    row = made_row(on_card, lora.MANY, 8.0, copy=timed(8.0))
    expected = [
        results.expected("decode", "case", "cold", lora.MANY),
        results.expected("decode", "other", "hot", lora.SINGLE),
    ]
    text = tables.bars(as_result(row, expected=expected))
    assert "| other | hot | – | – | 5 us | not measured |" in text and text.count("not measured") == 1
    assert "not measured" in tables.summary(as_result(expected=expected))


def test_load(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(as_result()))
    assert tables.load(path)["suite"] == "gpu"
    path.write_text(json.dumps({"suite": "apply"}))
    with pytest.raises(ValueError, match=r"gpu.json: expected a result of bench/gpu_suite.sh"):
        tables.load(path)
