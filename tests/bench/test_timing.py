"""Timers and ceilings of the benchmarks: what is called, in which order, and what a failed capture means."""

import contextlib

import pytest
import torch

from bench import ceilings, timing
from bench.ceilings import Ceilings, CpuCeilings, CudaCeilings
from bench.records import OURS
from bench.timing import Candidate, Cpu, Dry, NotCaptured, Timing, measure, tolerant
from t2l_engine.text import dtypes


def test_timing():
    one = Timing.of([10.0 * i for i in range(1, 102)], graph=True)
    assert (one.median_us, one.iqr_us, one.rounds) == (510.0, 500.0, 101)
    assert one.to_json() == {"median_us": 510.0, "iqr_us": 500.0, "rounds": 101, "graph": True}
    assert Timing.of([1.0, 2.0]).to_json().keys() == {"median_us", "iqr_us", "rounds"}


def test_rounds_begin_with_another_candidate_and_the_first_is_discarded(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "SAMPLE_US", 0.0)
    monkeypatch.setattr(timing, "WARM_CALLS", 2)
    names = ("a", "b")
    timings = measure(Cpu(), {n: lambda n=n: seen.append(n) for n in names}, rounds=(2, 2), seconds=0.0)
    assert "".join(seen[4:]) == "aaabbb" + "bbbaaa" + "aaabbb", "two untimed calls before each sample"
    assert {n: t.rounds for n, t in timings.items()} == {"a": 2, "b": 2}


def test_cold_sets_take_turns_and_half_of_them_rid_the_caches(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "SAMPLE_US", 0.0)
    measure(Cpu(), {"a": Candidate([lambda i=i: seen.append(i) for i in range(4)])}, rounds=(2, 2), seconds=0.0)
    assert seen[-6:] == [2, 3, 0, 1, 2, 3]


def test_a_slow_model_leaves_the_others_their_samples(monkeypatch):
    """Each has the same time; samples of the slow one are spread over the rounds."""
    seen, took = [], {"fast": 30e3, "slow": 300e3, "short": 3.0}
    monkeypatch.setattr(
        timing, "elapsed_us", lambda run: (before := len(seen), run(), sum(took[name] for name in seen[before:]))[2]
    )
    calls = {name: lambda name=name: seen.append(name) for name in ("fast", "slow")}
    timings = measure(Cpu(), calls, rounds=(2, 50), seconds=1.2)
    assert {n: t.rounds for n, t in timings.items()} == {"fast": 20, "slow": 2}
    assert seen.index("slow", 6) < len(seen) - 1, "not at the end"
    timings = measure(Cpu(), calls | {"short": lambda: seen.append("short")}, rounds=(2, 3), seconds=60.0)
    assert {t.rounds for t in timings.values()} == {3}


def test_number_of_sets_exceeds_the_cache():
    device = Dry()
    for size in (1, 1000, device.l2_bytes, 3 * device.l2_bytes, 3 * device.l2_bytes + 1, 1 << 30):
        assert device.num_sets(size) * size > 3 * device.l2_bytes
    assert device.num_sets(1 << 30) == 1


def test_what_is_slow_on_a_card_gets_fewer_samples():
    seen, device = [], Dry()
    device.capture = lambda run: run
    device.elapsed_us = lambda run, covered: (run(), 10.0 if "slow" not in seen[-1] else 1e6)[1]
    calls = {name: Candidate([lambda n=name, i=i: seen.append(f"{n} {i}") for i in range(3)]) for name in ("a", "slow")}
    device.replays = 20
    timings = measure(device, calls, seconds=0.1)
    assert timings["a"].rounds == 20 and timings["slow"].rounds == device.least_replays
    assert {one[-1] for one in seen} == {"0", "1", "2"} and not timings["a"].graph, "no graph but on a card"


def test_a_baseline_that_throws_costs_only_itself():
    skipped = {}
    with tolerant("baseline", skipped):
        raise ValueError("why\nmore")
    with tolerant("graph", skipped):
        raise NotCaptured("CUDA error: operation not permitted when stream is capturing")
    assert skipped["baseline"] == "ValueError: why" and skipped["graph"].startswith("NotCaptured: CUDA error: operation")
    for name, text, where in ((OURS, "why", {}), ("baseline", "CUDA error: unspecified", {}), ("baseline", "why", None)):
        with pytest.raises(RuntimeError), tolerant(name, where):
            raise RuntimeError(text)


class FakeGraph:
    """Records in order what is done to it."""

    seen: list = []

    def __init__(self):
        self.capture_end, self.replay = (lambda name=name: self.seen.append(name) for name in ("end", "replay"))

    def capture_begin(self, capture_error_mode):
        self.seen.append("begin")


class FakeStream:
    synchronize = staticmethod(lambda: None)

    def wait_stream(self, other):
        FakeGraph.seen.append("wait")


class FakeEvent:
    synchronize = staticmethod(lambda: None)

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeGraph.seen.append("event")

    def elapsed_time(self, end):
        return 0.25  # ms


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(FakeGraph, "seen", [])
    stands_in = {
        "current_device": lambda: 0,
        "get_device_properties": lambda device: type("Properties", (), {"L2_cache_size": 50 << 20}), "Stream": FakeStream,
        "Event": FakeEvent, "CUDAGraph": FakeGraph, "current_stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda: None,
    }  # fmt: skip
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return timing.Cuda()


def capturing():
    return FakeGraph.seen.count("begin") > FakeGraph.seen.count("end")


def uncapturable():
    if capturing():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


def test_replays_are_timed_behind_an_untimed_one(card):
    one = measure(card, {"one": lambda: FakeGraph.seen.append("call")}, seconds=0.1)["one"]
    assert one.graph and one.rounds == card.replays
    assert one.median_us == 125.0, "two calls fill a pass of 500 us"
    assert FakeGraph.seen[:5] == ["wait", "call", "begin", "call", "end"]
    assert FakeGraph.seen[-4:] == ["replay", "event", "replay", "event"]


def test_what_cannot_be_captured_is_called_from_the_host(card):
    timings = measure(card, {OURS: uncapturable, "two": Candidate([uncapturable], graph=False)}, seconds=0.1)
    assert FakeGraph.seen.count("begin") == FakeGraph.seen.count("end") == 1, "the capture is ended"
    assert not timings[OURS].graph and "not permitted" in timings[OURS].note
    assert not timings["two"].graph and timings["two"].note is None
    assert card.spoiled and not card.uncaptured, "ours is tried again in the next process"


def test_a_baseline_that_cannot_be_captured_is_skipped_and_not_tried_again(card):
    for begun in (2, 3):
        skipped = {}
        assert list(measure(card, {OURS: lambda: None, "other": uncapturable}, seconds=0.1, skipped=skipped)) == [OURS]
        assert skipped["other"].startswith("NotCaptured") and card.spoiled
        assert len([one for one in FakeGraph.seen if one == "begin"]) >= begun
    assert card.uncaptured.keys() == {"other"}


def test_ceilings_are_kept_written_and_read(monkeypatch):
    probes = []
    monkeypatch.setattr(CpuCeilings, "probe", lambda self, *key: probes.append(key) or float(len(probes)))
    one = CpuCeilings()
    assert one.gemm_at("float32", 2) == one.gemm_at("float32", 2) == 1.0
    assert one.bandwidth_at(1 << 20, 1) == one.bandwidth_at((1 << 20) + 5000, 1) == 2.0, "by size in steps of an eighth"
    written = list(one.records("before"))
    assert written[0] == {
        "record": "ceiling", "when": "before", "kind": "gemm", "dtype": "float32", "threads": 2, "gflops": 1.0
    }  # fmt: skip
    assert list(one.records("before", one.rates)) == []
    other = CpuCeilings()
    other.load(written)
    assert other.rates == one.rates and other.again().rates != one.rates and len(probes) == 4


@pytest.mark.parametrize(("rate", "right"), [(16.0, 130.0), (400.0, 400.0)])
def test_bfloat16_has_the_roofline_of_float32_where_that_is_faster(monkeypatch, rate, right):
    monkeypatch.setattr(dtypes, "gflops", lambda: {"float32": 130.0, "bfloat16": rate})
    made = CpuCeilings(rates={("gemm", "float32", 2): 130.0, ("gemm", "bfloat16", 2): rate})
    assert made.gemm_at("bfloat16", 2) == right and made.gemm_at("float32", 2) == 130.0


def test_rooflines_of_a_card_take_the_faster_way(monkeypatch):
    device = Dry()
    us = {"sum": 10.0, "product": 20.0, "copy by copy": 40.0, "copy by kernel": 16.0, "mm": 1.0}
    monkeypatch.setattr(ceilings, "measure", lambda device, ways, seconds: {n: Timing.of([us[n]] * 2) for n in ways})
    made = CudaCeilings(device=device)
    assert made.bandwidth_at() == pytest.approx(2 * (1 << 20) / 16.0 / 1e3), "a copy moves twice the bytes"
    made.rates |= {("gemm", "float32", 1): 50e3, ("gemm", "tf32", 1): 420e3, ("gemm", "bfloat16", 1): 989e3}
    assert made.gemm_at("bfloat16") == 989e3 and made.gemm_at("float32") == 140e3, "three products in TF32"
    assert torch.get_float32_matmul_precision() == "highest" and isinstance(made, Ceilings)
