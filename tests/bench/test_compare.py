"""Two trees beside each other."""

import pytest

from bench import compare
from bench.compare import Compared
from bench.harness import BenchError
from bench.records import ROOT
from t2l_engine import ops


def test_samples_are_taken_old_new_new_old(monkeypatch):
    monkeypatch.setattr(compare, "ROUNDS", 2)
    seen = []

    def side(name):
        return lambda case: seen.append(f"{case}{name}") or float(len(seen))

    pairs = compare.compare(side("o"), side("n"), ["x", "y"])
    assert seen[:8] == ["xo", "xn", "xn", "xo", "yo", "yn", "yn", "yo"] and len(seen) == 24
    assert pairs["x"] == [(9, 10), (12, 11), (17, 18), (20, 19)], "the first round is discarded"


def test_what_is_slower_than_the_limit_fails():
    drift = [1.0 + 0.5 * i for i in range(8)]  # a machine that slows down for both
    found = {ratio: Compared.of([(us, ratio * us) for us in drift]) for ratio in (0.9, 1.14, 1.16)}
    assert compare.slower(found, 1.15) == [1.16]
    one = Compared.of([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)])
    assert (one.old_us, one.new_us, one.ratio, one.low, one.high) == (1.0, 2.0, 2.0, 1.5, 2.5)


def test_what_is_slower_is_measured_once_more():
    seen, busy = [], {"a": [1.0], "b": [1.3, 1.0], "c": [1.3, 1.3]}

    def measure(cases):
        seen.append(list(cases))
        return {case: Compared.of([(1.0, busy[case].pop(0))] * 2) for case in cases}

    found = compare.confirmed(measure, ["a", "b", "c"], 1.15)
    assert seen == [["a", "b", "c"], ["b", "c"]] and list(found) == ["a", "b", "c"]
    assert compare.slower(found, 1.15) == ["c"]


def test_trees_that_cannot_be_measured_are_refused(tmp_path):
    with pytest.raises(BenchError, match="neither a folder nor a revision"), compare.tree("no-such-revision"):
        pass
    with pytest.raises(BenchError, match="no t2l_engine/_C.so"), compare.tree(str(tmp_path)):
        pass
    with pytest.raises(BenchError, match="got 'no such case'"):
        compare.trees((str(ROOT), ""), (str(ROOT), ""), 1, "no such case", 1.15)


@pytest.mark.skipif(not ops.NATIVE, reason="no native library")
@pytest.mark.slow
def test_a_worker_times_the_tree_it_runs_in(monkeypatch):
    monkeypatch.setattr(compare, "STARTS", 1)
    monkeypatch.setattr(compare, "ROUNDS", 1)
    (found,) = compare.trees((str(ROOT), ""), (str(ROOT), ""), 1, "lora_add_ 8x8", 1.15).values()
    assert found.old_us > 0 and found.new_us > 0
