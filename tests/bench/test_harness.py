"""Runs of the benchmarks: their file, what goes on where, and the suites of a card, dry on this CPU."""

import json
import shlex

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import cases, harness, models
from bench.__main__ import app, spelled
from bench.cases import LAYERS, Case, even, ragged, rows
from bench.ceilings import CpuCeilings
from bench.harness import OURS, BenchError, Context, Error, Target, Task, VerificationError, record, row, run, verify
from bench.icl import first
from bench.records import BASE, HOST
from bench.suites import apply, generate
from bench.timing import Dry, Timing


@pytest.mark.parametrize("words, text", [
    ("quality --work w --natural n --runs t2l --out o", "quality --work WORK --natural NATURAL --runs t2l"),
    ("generate --size full --only 'a b' --resume", "generate --only 'a b'"),
])  # fmt: skip
def test_the_command_of_a_result_is_one_that_runs(words, text):
    name, *arguments = shlex.split(words)
    command = typer.main.get_command(app).commands[name]
    assert spelled(command.make_context(name, arguments)) == f"python -m bench {text}"
    assert command.make_context(name, shlex.split(text)[1:])


class Rates(CpuCeilings):
    """Ceilings that nobody measures."""

    def probe(self, *_):
        return 100.0

    def survey(self, *_):
        self.gemm_at("float32")


@pytest.fixture
def context():
    """A dry run: a card's way on this CPU, one thread."""
    with_one = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Context("tiny", 1, Dry(), Rates(), (2, 5), 0.01, 0)
    torch.set_num_threads(with_one)


def cpu(size="tiny"):
    return Context(size, 1, harness.Cpu(), Rates(), (2, 3), 0.0, 0)


def a_row(context, **given):
    timings = {OURS: Timing.of([9.0, 10.0, 11.0]), "other": Timing.of([30.0, 30.0])}
    return row(context, "case", "group", {"n": 1}, timings, Error(1e-3, 4e-3), **given)


def test_verify():
    errors = {OURS: Error(1.0, 1.0), "close": Error(2.0, 1.0), "wrong": Error(float("nan"), 1.0)}
    verified, skipped = verify("case", dict.fromkeys(errors, print), errors)
    assert list(verified) == [OURS, "close"] and skipped.keys() == {"wrong"}
    with pytest.raises(VerificationError, match="case: error 2 beyond 1"):
        verify("case", {OURS: print}, {OURS: Error(2.0, 1.0)})
    assert harness.worst(errors.values()) is errors["wrong"]


def test_a_row_has_a_target_for_full_shapes_alone():
    least = harness.roofline(2000, 100, gflops=1.0, gbps=1.0)
    assert (least["us"], least["by"]) == (2.0, "flops")
    made = a_row(cpu("full"), least=least, target=Target(1.5), skipped={"peft": "why"})
    assert made["target"] == {"ratio": 1.5, "of": "roofline"} and made["times"]["other"]["median_us"] == 30.0
    assert made["skipped"] == {"peft": "why"}
    assert a_row(cpu(), target=Target(1.5))["target"] is None


def plan_of(*names, fails=(), seen=None):
    def task(name):
        def made():
            if seen is not None:
                seen.append(name)
            yield record("entry", of=name)
            if name in fails:
                raise RuntimeError("why\nmore")

        return Task(name, made)

    return lambda context: [task(name) for name in names]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_ends_early_goes_on(tmp_path):
    out, seen = tmp_path / "x.jsonl", []
    with pytest.raises(RuntimeError, match="why"):
        run("x", plan_of("a", "b", "c", fails=("b",), seen=seen), cpu(), command="x", out=out)
    assert [one["record"] for one in lines(out)] == ["run", "ceiling", "entry", "task"], "what came is kept"
    with out.open("a", encoding="utf-8") as file:
        file.write('{"record": "ta')  # where a write was cut off
    run("x", plan_of("a", "b", "c", seen=seen), cpu(), command="x", out=out, resume=True)
    assert seen == ["a", "b", "b", "c"] and lines(out)[0]["tasks"] == ["a", "b", "c"]
    assert [one["of"] for one in lines(out) if one["record"] == "entry"] == ["a", "b", "c"]
    assert [one["when"] for one in lines(out) if one["record"] == "ceiling"] == ["before", "after"]
    assert run("x", plan_of("a", "b", "c", fails="abc"), cpu(), command="x", out=out, resume=True) == lines(out)


def test_a_run_goes_on_with_no_other(tmp_path):
    out = tmp_path / "x.jsonl"
    run("x", plan_of("a", "b"), cpu(), command="x", out=out)
    with pytest.raises(BenchError, match="expected suite y, got x"):
        run("y", plan_of("a", "b"), cpu(), command="x", out=out, resume=True)
    with pytest.raises(BenchError, match="expected tasks"):
        run("x", plan_of("a", "b"), cpu(), command="x", only="b", out=out, resume=True)
    with pytest.raises(BenchError, match="a, b; got 'z'"):
        run("x", plan_of("a", "b"), cpu(), command="x", only="z")


class Card(Dry):
    """This CPU as a card: what failures then mean."""

    on_card = timed = True


def test_on_a_card_a_task_that_fails_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "machine", lambda context: {})
    out, device = tmp_path / "x.jsonl", Card()
    context = Context("full", 1, device, Rates(), (2, 3), 0.0, 0)
    run("x", plan_of("a", "b", fails=("a",)), context, command="x", out=out)
    (failed,) = (one for one in lines(out) if one["record"] == "failed")
    assert (failed["case"], failed["error"]) == ("a", "RuntimeError: why")
    assert [one["of"] for one in lines(out) if one["record"] == "entry"] == ["a", "b"]

    def spoils(context):
        def spoil():
            device.spoiled = True
            device.uncaptured["other"] = "why"
            yield record("entry", of="a")

        return [Task("a", spoil), *plan_of("b")(context)]

    with pytest.raises(BenchError, match="go on with --resume"):
        run("x", spoils, context, command="x", out=out)
    again = Card()
    run("x", plan_of("a", "b"), Context("full", 1, again, Rates(), (2, 3), 0.0, 0), command="x", out=out, resume=True)
    assert [one["of"] for one in lines(out) if one["record"] == "entry"] == ["a", "b"]
    assert again.uncaptured == {"other": "why"}, "it is not tried again"


def test_times_of_a_dry_run_are_not_written(context):
    plan = lambda c: [Task("a", lambda: [a_row(c, least=harness.roofline(1, 2, 1, 1))])]  # noqa: E731
    made = run("x", plan, context, command="x")
    (one,) = (one for one in made if one["record"] == "row")
    assert one["times"] == {OURS: {}, "other": {}} and one["roofline"] == {"flops": 1, "bytes": 2}
    assert one["error"]["value"] == 1e-3 and one["target"] is None


@pytest.mark.parametrize(("device", "says"), [("cuda", "expected CUDA kernels and a device"), ("emulator", "backend 'emu'")])
def test_a_device_that_is_not_here_is_refused(device, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cases.ops, "has_kernel", lambda name, backend: backend == "CPU")
    ended = CliRunner().invoke(app, ["generate", "--device", device])
    assert isinstance(ended.exception, BenchError) and says in str(ended.exception)


@pytest.mark.parametrize("layer, tokens, adapters, weights, activations, least_us, mflop", [
    ("7b", 1, 1, "0.21", "0.03", "0.07", "0.2"),
    ("7b", 64, 64, "13.6", "1.8", "4.6", "13.6"),
    ("7b", 2048, 4, "0.85", "58.7", "17.8", "436"),
    ("7b-all", 8192, 8, "10.5", "1845", "554", "10737"),
    ("2b", 64, 64, "7.9", "1.1", "2.7", "7.9"),
    ("1b", 64, 64, "6.8", "0.9", "2.3", "6.8"),
])  # fmt: skip
def test_bytes_and_flops(layer, tokens, adapters, weights, activations, least_us, mflop):
    """Closed forms as they were worked out by hand, at 3.35 TB/s."""
    case = Case(LAYERS[layer], rows(*range(tokens)) if tokens < 100 else even(tokens, adapters))
    values = {weights: case.layer.weight_bytes(adapters) / 1e6, activations: case.layer.activation_bytes(tokens) / 1e6}
    for text, value in (values | {least_us: case.bytes / 3.35e6, mflop: case.flops / 1e6}).items():
        unit = 10.0 ** -len(text.partition(".")[2])
        assert value == pytest.approx(float(text), abs=0.52 * unit), text
    assert (case.tokens, case.adapters) == (tokens, adapters)


def test_rows_of_the_base_model_are_no_work():
    half = Case(LAYERS["7b"], rows(0, -1, 1, -1), "half base")
    assert half.bytes == Case(LAYERS["7b"], rows(0, 1)).bytes and half.flops == half.layer.flops(2)
    assert half.shape()["tokens"] == 4 and half.shape()["adapters"] == 2


@pytest.mark.parametrize("full", [True, False])
def test_cases_of_a_card_have_names_of_their_own(full):
    chosen = apply.decode_cases(full) + apply.prefill_cases(full)
    assert len({case.name for case in chosen}) == len(chosen)
    assert sum(n for n, _ in ragged(8192, 8)) == 8192 and len(ragged(8192, 8)) == 8


def test_decode_and_prefill_rows(context):
    for group, chosen in (("decode", apply.decode_cases(False)), ("prefill", apply.prefill_cases(False))):
        for case in chosen:
            made = {one["cache"]: one for one in apply.lora(context, case, group, ("cold", "warm"), 1)}
            assert ("warm" in made) == (case.working_set <= context.device.l2_bytes), "what exceeds the cache is never warm"
            assert made["cold"]["roofline"]["bytes"] == case.bytes
            for one in made.values():
                assert (one["roofline"] is None) == (one["cache"] == "warm")
                assert {"cuBLAS per adapter", "copy", apply.APART} <= one["times"].keys()
                assert ("gather bmm" in one["skipped"]) == (case.pattern == "half base")


def test_baselines_that_throw_are_skipped(context, monkeypatch):
    def throws(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(apply.CUDA_BUILDERS, "cuBLAS per adapter", lambda operands: throws)
    monkeypatch.setitem(generate.WAYS, "cuBLAS", throws)
    applied, *_ = apply.lora(context, apply.decode_cases(False)[0], "decode", ("cold",), 1)
    made, *_ = generate.cuda(context, "tiny", "float32", (1,))
    for one, name in ((applied, "cuBLAS per adapter"), (made, "cuBLAS")):
        assert one["skipped"][name] == "RuntimeError: no such kernel" and name not in one["times"]
    assert "gather bmm" in applied["times"] and "eager" in made["times"]


def test_a_wrong_kernel_is_not_timed(context, monkeypatch):
    monkeypatch.setattr(cases.ops, "lora_add_group_", lambda y, *rest: y)
    monkeypatch.setattr(cases.ops, "lora_add_", lambda y, *rest: y)
    case = apply.decode_cases(False)[0]
    with pytest.raises(VerificationError, match=f"^{case.name}: error .* beyond .*: relative Frobenius"):
        list(apply.lora(context, case, "decode", ("warm",), 1))


def test_generation_rows(context):
    for dtype in ("float32", "bfloat16"):
        for one in generate.cuda(context, "tiny", dtype, (1, 2)):
            ways = {OURS, "cuBLAS", "reference", "eager", "eager, captured", HOST, "copy"}
            assert one["times"].keys() == ways and not one["skipped"]
            assert one["error"]["value"] <= one["error"]["bound"]


def test_model_rows(context):
    steps = list(apply.cuda(context, "all linears", 4, (1, 4)))
    assert [row["shape"]["adapters"] for row in steps] == [1, 4] and all(BASE in row["times"] for row in steps)
    assert steps[1]["roofline"]["bytes"] > steps[0]["roofline"]["bytes"]


@torch.inference_mode()
def test_steps_at_fixed_addresses_are_those_of_the_model():
    model = models.decoder(models.TINY, torch.device("cpu"), torch.float64)
    tokens = torch.randint(61, (2, 6))
    expected = model(input_ids=tokens).logits[:, -1]
    torch.testing.assert_close(first.exact_logits(model, tokens), expected)
    whole = models.Step.of(model, 2, 6, new=6)
    torch.testing.assert_close(whole(tokens), expected)
    for new in (1, 2):
        step = models.Step.of(model, 2, 6, new=new)
        step.follow(whole)
        addresses = [layer.keys.data_ptr() for layer in step.cache.layers]
        for _ in range(2):
            torch.testing.assert_close(step(tokens[:, -new:]), expected)
        assert addresses == [layer.keys.data_ptr() for layer in step.cache.layers]
