"""The suite of serving without vLLM: what is compared, what is refused; servers are made up."""

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch

import t2l_engine as t2l
from bench import harness
from bench.harness import OURS, BenchError, Context, Error, VerificationError
from bench.records import BASE, COMPILED, OURS_ALL
from bench.serving_methods import EIGHT, FULL, HALF, MERGED, METHODS, NONE, STOCK, STOCK_TARGET, Case
from bench.suites import serving, serving_life
from bench.suites.serving import Measured
from t2l_engine.hypernetwork import checkpoint
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.text.packaged import LANGUAGE_MODEL

CASES = {case.name: case for load in FULL for case in load.cases}
#: Seconds a token of a row, by method.
SECONDS = dict.fromkeys(METHODS, 0.02) | {BASE: 0.0095, OURS: 0.01, OURS_ALL: 0.012, STOCK_TARGET: 0.016, STOCK: 0.04}


class Served:
    """Tokens say which adapter made them; ``wrong``: rows without one get the last one's if any other row has one."""

    def __init__(self, name, wrong=False):
        self.name, self.wrong, self.asked = name, wrong, []

    def generate(self, case, inputs, new):
        rows = case.rows(self.name)
        last = [i for i in rows if i is not None][-1:] if self.wrong else []
        self.asked.append(new)
        tokens = [[row if row is not None else last[0] if last else -1] * new for row in rows]
        return SECONDS[self.name] * new * case.requests, tokens, 2000.0


class Inputs:
    modules = ("q_proj",)
    stack = t2l.AdapterStack({"q_proj": torch.zeros(1, 1, 2, 4)}, {"q_proj": torch.zeros(1, 1, 4, 2)}, torch.ones(1))
    prompts, rank, folders, dtype = torch.zeros(64, 64), 8, ("adapter",) * 64, torch.bfloat16


@pytest.fixture
def context():
    return Context("full", 2, harness.Cpu(), None, (2, 3), 0.0, 0)


def measured(case, wrong=()):
    one = Measured(case, FULL[0].tokens)
    one.errors = dict.fromkeys(case.methods, Error(0.01, 0.02))
    servers = {name: Served(name, name in wrong) for name in case.methods}
    one.time(servers, Inputs, 1)
    return one, servers


def test_without_vllm_one_line_says_how_to_get_it(monkeypatch, context):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match="^serving: vllm is not installed .*make serve .*$"):
        serving.plan(context)


def test_vllm_is_told_every_linear_that_the_adapters_have():
    """Of an adapter with others, vLLM serves a part and says nothing."""
    adapted = checkpoint.read(resolve_checkpoint(LANGUAGE_MODEL)).config.modules
    stack = t2l.AdapterStack(*(dict.fromkeys(adapted, torch.zeros(1, 1, *of)) for of in ((2, 4), (4, 2))), torch.ones(1))
    inputs = serving.Inputs(Path(), stack, (), torch.zeros(1, 1), False)
    with mock.patch.object(serving.Process, "__init__"), mock.patch.object(serving.packaged, "convert"):
        for name in (OURS, STOCK_TARGET, OURS_ALL, STOCK):
            with mock.patch.object(serving.Server, "_call", return_value=serving.WRAPPER * METHODS[name].kernels) as call:
                serving.Server(name, 2, inputs)
            assert call.call_args_list[0].kwargs["modules"] == ([*adapted] if name in (OURS, STOCK_TARGET) else None)


def test_rows_of_a_case():
    assert CASES[HALF].rows(OURS) == [i if i % 2 == 0 else None for i in range(64)]
    assert CASES[HALF].rows(BASE) == CASES[NONE].rows(OURS) * 8 == [None] * 64
    assert CASES[EIGHT].rows(MERGED) == [0] * 8 and CASES[EIGHT].rows(STOCK) == list(range(8))


def test_a_case_has_what_its_rows_without_an_adapter_are_compared_with():
    for case in CASES.values():
        assert {METHODS[name].reference for name in case.methods if METHODS[name].vllm} <= {*case.methods}, case.name


def test_calls_go_forth_and_back_with_all_tokens_and_half(context):
    one, servers = measured(CASES[EIGHT])
    assert servers[OURS].asked == [64, 32, 64, 64]
    row, *arms = one.records(context, {}, Inputs)
    assert row["target"] == {"ratio": pytest.approx(1 / 0.95, rel=1e-3), "of": COMPILED}, "a share of tokens per second"
    assert row["times"][OURS]["median_us"] == pytest.approx(64 * 8 * SECONDS[OURS] * 1e6)
    assert {arm["arm"]: arm["step_us"] for arm in arms}[STOCK] == pytest.approx(8 * SECONDS[STOCK] * 1e6)


def test_rows_without_an_adapter_that_change_are_told_of_others_and_refused_of_ours(context):
    _, *arms = measured(CASES[HALF], wrong=[STOCK, OURS_ALL])[0].records(context, {}, Inputs)
    assert {a["arm"]: (a["plain_rows_alike"], a["plain_rows"]) for a in arms if a["arm"] in (OURS, STOCK)} == {
        OURS: (32, 32),
        STOCK: (0, 32),
    }
    with pytest.raises(VerificationError, match=f"{HALF}, {OURS}: 32 of 32 rows without an adapter"):
        measured(CASES[HALF], wrong=[OURS])


def test_an_arm_that_fails_is_left_out_unless_it_is_ours():
    case = Case("case", 2, (BASE, OURS, STOCK))

    class Broken(Served):
        def logits(self, case, inputs, rows):
            raise BenchError(f"{self.name}: out of memory")

    one = Measured(case, 4)
    assert serving._verified(None, [one], {STOCK: Broken(STOCK)}, oracle=None) == {STOCK: "BenchError: vLLM: out of memory"}
    with pytest.raises(BenchError, match="ours: out of memory"):
        serving._verified(None, [one], {OURS: Broken(OURS)}, oracle=None)


def test_the_server_of_a_long_life_has_the_flags_of_its_checkpoint(monkeypatch, tmp_path):
    server = mock.Mock()
    monkeypatch.setattr(serving_life, "VllmServer", server)
    monkeypatch.setattr(serving_life.packaged, "convert", lambda: "model")
    with serving_life.served(8, 16, tmp_path):
        model, flags, environment, _ = server.call_args.args
        server().stop.assert_not_called()
    server().stop.assert_called_once()
    assert (model, environment["T2L_VLLM_CHECKPOINT"]) == ("model", "smollm2-135m")
    assert "--max-loras 8 --max-cpu-loras 16 " in " ".join(flags) and "q_proj v_proj" in " ".join(flags)
