"""Every broken or hostile file is refused, cheaply, by a clear error, and nothing in it runs."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2l_engine import AdapterStack, HyperNetwork, attach
from tests.hostile import fields, folders, safetensors_files, text_files, torch_files, zip_files
from tests.hostile.archive import dumps, pack, parts, raw
from tests.hostile.folders import GOLDEN, LOADERS, MARKER, Workshop, faults, judge
from tests.hostile.mutations import TARGETS, Mutations
from tests.hostile.payloads import CALLS, RAW

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def mutations(tmp_path_factory):
    return Mutations(Workshop(tmp_path_factory.mktemp("hostile")))


@settings(max_examples=150)
@given(target=st.sampled_from(TARGETS), draw=st.randoms(use_true_random=False))
def test_a_changed_file_is_read_or_refused(mutations, target, draw):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mutations.shop.directory)
        assert not mutations.judge(target, mutations.mutate(draw.choice(mutations.seeds(target)), draw))


def test_nothing_in_a_pickle_or_yaml_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop = Workshop(tmp_path)
    found = faults(itertools.chain(torch_files.calls(shop), text_files.tags(shop)))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize(
    "part", [torch_files, zip_files, safetensors_files, text_files, fields], ids=lambda part: part.__name__
)
def test_the_corpus_is_refused(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = faults(part.cases(Workshop(tmp_path)))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.release
def test_any_value_at_any_place_is_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = faults(fields.every_value(Workshop(tmp_path)), must_refuse=False)
    assert not found, "\n".join(found)


# --- the corpus itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CALLS, "global", "stack-global", "inst", "obj"])
def test_payloads_are_live(tmp_path, monkeypatch, name):
    """Read without restrictions, each payload runs: it is not refused because it is broken."""
    monkeypatch.chdir(tmp_path)
    try:
        pickle.loads(dumps(CALLS[name]) if name in CALLS else RAW[name])
    except TypeError:
        pass  # what it returns need not fit; it has run by then
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("write", [pack, lambda *file: raw(*file).finish(), lambda *file: raw(*file).finish64()])
def test_archives_made_by_hand_are_good_where_nothing_is_wrong(tmp_path, write):
    folder = GOLDEN / "L-sft"
    claims, records = parts(torch.load(folder / "hypermod.pt", weights_only=True))
    (tmp_path / "hypermod.pt").write_bytes(write(dumps(claims), records))
    for name in ("args.yaml", "adapter_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    first, second = HyperNetwork.from_pretrained(tmp_path), HyperNetwork.from_pretrained(folder)
    for key, tensor in second.state_dict().items():
        assert torch.equal(first.state_dict()[key], tensor), key


def test_the_judge_finds_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = Workshop(tmp_path).case("text", "L-sft", "hypermod.pt", b"no archive")
    assert judge(case) == []

    def says(result):
        def load(folder):
            if isinstance(result, Exception):
                raise result
            return result(folder)

        monkeypatch.setitem(LOADERS, case.loader, load)
        return judge(case)

    assert says(lambda folder: None) == ["accepted"]
    assert "RuntimeError" in says(RuntimeError("hypermod.pt"))[0]
    assert "not in the message" in says(ValueError("no name"))[0]
    assert "characters" in says(ValueError("hypermod.pt" + "x" * 2000))[0]
    assert "something was executed" in says(lambda folder: (tmp_path / MARKER).touch())
    monkeypatch.setattr(folders, "WORK", (0, 100))
    assert "function calls" in says(lambda folder: [abs(i) for i in range(1000)])[-1]


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
