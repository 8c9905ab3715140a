"""Every broken or hostile file is refused, cheaply, by a clear error, and nothing in it runs."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2l_engine import HyperNetwork
from tests.hostile import fields, folders, safetensors_files, text_files, torch_files, zip_files
from tests.hostile.archive import dumps, pack, parts
from tests.hostile.folders import GOLDEN, LOADERS, MARKER, Workshop, equal, faults, judge
from tests.hostile.mutations import TARGETS, Mutations
from tests.hostile.payloads import CALLS, RAW

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path)


@pytest.fixture(scope="module")
def mutations(tmp_path_factory):
    return Mutations(Workshop(tmp_path_factory.mktemp("hostile")))


@settings(max_examples=max(150, settings.default.max_examples))  # more in `make fuzz`
@given(target=st.sampled_from(TARGETS), draw=st.randoms(use_true_random=False))
def test_a_changed_file_is_read_or_refused(mutations, target, draw):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mutations.shop.directory)
        assert not mutations.judge(target, mutations.mutate(draw.choice(mutations.seeds(target)), draw))


def test_nothing_in_a_pickle_or_yaml_file_is_executed(shop):
    found = faults(itertools.chain(torch_files.calls(shop), text_files.tags(shop)))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize(
    "part", [torch_files, zip_files, safetensors_files, text_files, fields], ids=lambda part: part.__name__
)
def test_the_corpus_is_refused(part, shop):
    found = faults(part.cases(shop))
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


def test_archives_made_by_hand_are_good_where_nothing_is_wrong(shop):
    claims, records = parts(torch.load(GOLDEN / "L-sft" / "hypermod.pt", weights_only=True))
    case = shop.case("good", "L-sft", "hypermod.pt", pack(dumps(claims), records))
    assert equal(HyperNetwork.from_pretrained(case.folder), HyperNetwork.from_pretrained(GOLDEN / "L-sft"))


def test_the_judge_finds_what_is_wrong(shop, monkeypatch):
    case = shop.case("text", "L-sft", "hypermod.pt", b"no archive")
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
    assert "something was executed" in says(lambda folder: (shop.directory / MARKER).touch())
    monkeypatch.setattr(folders, "WORK", (0, 100))
    assert "function calls" in says(lambda folder: [abs(i) for i in range(1000)])[-1]
