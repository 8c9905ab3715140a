"""Every file of the hostile corpus is refused, cheaply, by a clear error, and nothing in it runs."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2l_engine import AdapterStack, HyperNetwork, attach
from tests.hostile import GOLDEN, LOADERS, MARKER, WORK, corpus, judge
from tests.hostile.archive import dumps, pack, parts
from tests.hostile.payloads import CALLS, RAW
from tests.hostile.zip_files import plain_zip, wide_zip

WHOLE = pytest.param(1, id="all", marks=[pytest.mark.slow, pytest.mark.release])


@pytest.fixture(scope="module", params=[pytest.param(9, id="a ninth"), WHOLE])
def share(request):
    """One case of so many is judged."""
    return request.param


@pytest.fixture(scope="module")
def results(share, tmp_path_factory):
    """What another process says of the cases."""
    return verdicts(tmp_path_factory.mktemp("hostile"), f"0/{share}")


def verdicts(directory, part):
    """What it says of a part of the cases; where a case ends it, the next one goes on after that case."""
    command = [sys.executable, str(Path(__file__).parent), str(directory), "--judge", "--part", part, "--after"]
    judged, after = {}, ""
    while True:
        run = subprocess.run([*command, after], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.endswith("}")]
        judged |= {line["name"]: line for line in lines if "wrong" in line}
        if run.returncode == 0:
            return judged
        began = lines[-1]["name"] if lines else after
        assert began != after and began not in judged, run.stderr[-2000:]  # the corpus itself failed
        judged[began] = {"wrong": [f"the process ended: {run.returncode}: {run.stderr[-500:]}"]}
        after = began


def listed(wrong):
    return "\n".join(f"{name}: {what}" for name, what in wrong.items())


def finished(results):
    return {name: line for name, line in results.items() if "digest" in line}


def test_every_file_is_refused_by_a_clear_error(results):
    wrong = {name: line["wrong"] for name, line in results.items() if line["wrong"]}
    assert not wrong, listed(wrong)


def test_nothing_is_executed(results):
    assert not [name for name, line in finished(results).items() if line["executed"]]


def test_refusals_take_little_work(results):
    """Calls of functions, Python's own included, grow with the bytes of a folder at most.  What is done inside one of them
    is bounded by what it is given, but for regular expressions, whose steps test_adapter_folders.py bounds."""
    calls = {name: line["calls"] for name, line in finished(results).items()}
    over = {name: n for name, n in calls.items() if n > WORK[0] * finished(results)[name]["bytes"] + WORK[1]}
    assert not over, listed(over)
    assert sorted(calls.values())[len(calls) * 9 // 10] < WORK[1] // 8  # most files are refused long before their end


def test_refusals_take_little_memory(results):
    if any(line["peak"] is None for line in finished(results).values()):
        pytest.skip("this kernel does not reset the peak of a process's memory")
    over = {
        name: f"{line['peak'] >> 20} MiB for {line['bytes'] >> 20} MiB of files"
        for name, line in finished(results).items()
        if line["peak"] > line["memory"]
    }
    assert not over, listed(over)


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("share", [1], ids=["all"], indirect=True)
def test_files_are_many_and_distinct(results):
    assert len({line["digest"] for line in finished(results).values()}) >= 2400
    large = sum(line["bytes"] >= 48 << 20 for line in finished(results).values())
    assert large >= 4  # where the factor means something


def test_corpus_is_deterministic(tmp_path, results, share):
    """The same files in this process as in the other."""
    here = {case.name: case.digest() for case in itertools.islice(corpus(tmp_path), 300) if case.name in finished(results)}
    other = {name: name for name, digest in here.items() if results[name]["digest"] != digest}
    assert len(here) > 200 / share and not other, listed(other)


@pytest.mark.parametrize("name", CALLS)
def test_payloads_are_live(tmp_path, monkeypatch, name):
    """Read without restrictions, each payload runs: what the corpus shows is not that it was broken."""
    monkeypatch.chdir(tmp_path)
    try:
        pickle.loads(dumps(CALLS[name]))
    except TypeError:
        pass  # what it returns need not fit; it has run by then
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("name", ["global", "stack-global", "inst", "obj"])
def test_opcodes_are_live(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pickle.loads(RAW[name])
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("write", [pack, plain_zip, wide_zip], ids=lambda write: write.__name__)
def test_the_archives_made_by_hand_are_good_where_nothing_is_wrong(tmp_path, write):
    """Else the corpus would be refused for a reason of its own."""
    folder = GOLDEN / "L-sft"
    state = torch.load(folder / "hypermod.pt", weights_only=True)
    claims, records = parts(state)
    (tmp_path / "hypermod.pt").write_bytes(write(dumps(claims), records))
    for name in ("args.yaml", "adapter_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    first, second = HyperNetwork.from_pretrained(tmp_path), HyperNetwork.from_pretrained(folder)
    for key, tensor in second.state_dict().items():
        assert torch.equal(first.state_dict()[key], tensor), key


def test_judge_finds_what_is_wrong(tmp_path, monkeypatch):
    case = next(iter(corpus(tmp_path)))
    assert judge(case) == []

    def raises(error):
        def load(folder):
            raise error

        return load

    def says(load):
        monkeypatch.setitem(LOADERS, case.loader, load)
        return judge(case)

    assert says(lambda folder: None) == ["accepted"]
    assert "RuntimeError" in says(raises(RuntimeError("hypermod.pt")))[0]
    assert "not in the message" in says(raises(ValueError("no name")))[0]
    assert "characters" in says(raises(ValueError("hypermod.pt" + "x" * 2000)))[0]


# --- adapters of another model -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "mentions"),
    [
        ({"hidden_size": 32, "head_dim": 8}, "q_proj"),
        ({"num_hidden_layers": 3}, "layers"),
        ({"num_hidden_layers": 1}, "layers"),
        ({"num_key_value_heads": 4}, "v_proj"),
    ],
)
def test_adapters_of_another_base_model_are_refused(tiny_model, stack_for, tmp_path, sizes, mentions):
    stack_for(tiny_model("Llama"), ("q_proj", "v_proj")).save_pretrained(tmp_path)
    other = tiny_model("Llama", **sizes)
    before = dict(other.named_modules())
    with pytest.raises(ValueError, match=mentions):
        attach(other, AdapterStack.from_peft([tmp_path]))
    assert dict(other.named_modules()) == before  # a refusal leaves the model as it was
