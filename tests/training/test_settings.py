"""Settings: what a file and overrides may say, and what every fault is told as."""

import json
import re

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import settings
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings, Settings, SFTSettings

EXAMPLES = examples(max_examples=50, deadline=None, derandomize=True, database=None)
KINDS = [SFTSettings, LoRASettings, ReconstructionSettings]
NEEDED = {"base_model": "x", "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def write(tmp_path):
    """Factory: a YAML file of what an SFT run needs and of ``text``, whose fields come first."""

    def make(text="", needed=NEEDED):
        given = {line.partition(":")[0] for line in text.splitlines()}
        rest = "".join(f"{name}: {json.dumps(value)}\n" for name, value in needed.items() if name not in given)
        path = tmp_path / "run.yaml"
        path.write_text(f"{text}\n{rest}")
        return path

    return make


def needed(kind):
    return NEEDED if issubclass(kind, (SFTSettings, LoRASettings)) else {}


def test_a_file_with_overrides(write):
    """YAML 1.1 reads 1e-3 as a string; it is a number all the same.  What is given last counts."""
    path = write("learning_rate: 1e-3\nweight_decay: 2\nscaling: 1e1\nmix_descriptions: yes\nsteps: 30")
    found = settings.read(SFTSettings, path, ["steps=40", " rank = 4", "steps=50", "target_modules=[k_proj]", "seed=1"])
    assert found.learning_rate == 1e-3 and found.weight_decay == 2.0 and found.scaling == 10.0 and found.mix_descriptions
    assert (found.steps, found.rank, found.target_modules, found.seed) == (50, 4, ("k_proj",), 1)
    assert found.base_model == "x" and found.warmup_steps == SFTSettings.model_fields["warmup_steps"].default
    assert settings.read(ReconstructionSettings, None) == ReconstructionSettings()
    assert settings.read(ReconstructionSettings, None, ["learning_rate=2.5e-5"]).learning_rate == 2.5e-5
    assert settings.read(SFTSettings, None, ["base_model=x", "target_modules=[q_proj]"]).base_model == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 0", "steps: .*greater than 0, got 0"),
        ("steps: 1.5", "steps: .*a valid integer.*, got 1.5"),
        ("steps:", "steps: .*a valid integer, got None"),
        ("steps: true", "steps: .*, got True"),
        ("scaling: true", "scaling: .*, got True"),
        ("seed: -1", "seed: .*greater than or equal to 0, got -1"),
        ("seed: 99999999999999999999", "seed: .*less than .*, got 99999999999999999999"),
        ("learning_rate: fast", "learning_rate: .*a valid number.*, got 'fast'"),
        ("learning_rate: .nan", "learning_rate: .*a finite number, got nan"),
        ("grad_clip: .inf", "grad_clip: .*a finite number, got inf"),
        ("weight_decay: [1]", r"weight_decay: .*a valid number, got \[1\]"),
        ("schedule: cosine", "schedule: .*'linear' or 'constant', got 'cosine'"),
        ("variant: XL", "variant: .*'L', 'M', .*, got 'XL'"),
        ("dtype: float64", "dtype: .*'float32' or 'bfloat16', got 'float64'"),
        ("scaling: big", "scaling: .*'plain' or 'rslora', got 'big'"),
        ("scaling: 1e-12", "scaling: .*, got 1e-12"),
        ("lora_dropout: 1", "lora_dropout: .*less than 1, got 1"),
        ("label_smoothing: -0.5", "label_smoothing: .*greater than or equal to 0, got -0.5"),
        ("latent_size: 3", "latent_size: .*greater than or equal to 4, got 3"),
        ("base_model: 7", "base_model: .*a valid string, got 7"),
        ("target_modules: q_proj", "target_modules: .*, got 'q_proj'"),
        ("target_modules: []", r"target_modules: .*at least 1 item.*, got \[\]"),
        ("target_modules: [q_proj, q_proj]", r"target_modules: expected distinct names, got \['q_proj', 'q_proj'\]"),
        ("mix_descriptions: 3", "mix_descriptions: .*a valid boolean.*, got 3"),
        ("encoder: one-hot\nmix_descriptions: true", "mix_descriptions: expected False with encoder one-hot, got True"),
        ("encoder: one-hot\nheld_out_descriptions: 2", "held_out_descriptions: expected 0 with encoder one-hot, got 2"),
        (
            "encoder: one-hot\ntask_init: discriminant",
            "task_init: expected 'random' with encoder one-hot, got 'discriminant'",
        ),
        ("encoder: one-hot\nembedding_noise: 0.5", "embedding_noise: expected 0.0 with encoder one-hot, got 0.5"),
        ("stepz: 3", r"unknown field 'stepz'; expected some of \['accumulation', .*'weighting'\]"),
        ("1: 3", "expected field names"),
    ],
)
def test_faults_of_a_file(write, text, message):
    """Place, field, what was expected and what came."""
    path = write(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {message}"):
        settings.read(SFTSettings, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "^--set: expected name=value, got 'steps'"),
        ("steps=", "^--set: steps: .*a valid integer, got None"),
        ("steps=0", "^--set: steps: .*greater than 0, got 0"),
        ("stepz=3", "^--set: unknown field 'stepz'; expected some of"),
        ("=3", "^--set: unknown field ''"),
        ("steps=[1", r"^--set steps: expected a YAML value, got '\[1'"),
        ("steps=!!python/name:os.system", "^--set steps: expected a YAML value"),
        ("steps=2024-13-45", "^--set steps: expected a YAML value, got '2024-13-45'"),  # no such month
        ("steps=" + "9" * 5000, "^--set: steps: .*an integer.*, got '999"),
        ("steps=" + "[" * 5000, "^--set steps: expected a YAML value"),
    ],
)
def test_faults_of_an_override(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        settings.read(SFTSettings, write(), [text])
    assert len(str(caught.value)) < 1000


def test_every_fault_is_told_with_its_place(write):
    path = write("steps: 0\nrank: -2\nnonsense: 1", needed={"base_model": "x"})
    with pytest.raises(ConfigError) as caught:
        settings.read(SFTSettings, path, ["seed=-1"])
    faults = str(caught.value).split("; ")
    for place, what in (
        (path, "steps: .*, got 0"),
        (path, "rank: .*, got -2"),
        (path, "unknown field 'nonsense'"),
        ("--set", "seed: .*, got -1"),
        (path, "missing field 'target_modules': names of the adapted linears"),
    ):
        assert any(re.fullmatch(f"{re.escape(str(place))}: {what}", fault) for fault in faults), what


@pytest.mark.parametrize("text", ["", "[1, 2]", "word", "a: [", "steps: 1\nsteps: 2", "\x00", "steps: &a 3\nb: {<<: *a}"])
def test_files_that_are_no_mapping(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: (expected a mapping of fields, got|not plain YAML)"):
        settings.read(SFTSettings, path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml: no such file"):
        settings.read(SFTSettings, tmp_path / "nowhere.yaml")
    with pytest.raises(
        ConfigError, match="^settings: missing field 'base_model': .*; settings: missing field 'target_modules'"
    ):
        settings.read(SFTSettings, None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_sentence(kind):
    shown = settings.fields(kind)
    assert [name for name, _, _ in shown] == list(kind.model_fields)
    assert all(sentence for _, _, sentence in shown)
    assert {name for name, default, _ in shown if default == "required"} == set(needed(kind))
    assert set(Settings.model_fields) <= set(kind.model_fields)
    values = kind(**needed(kind))
    for name, default, _ in shown:  # a default passes the field's own checks and is shown as it is
        if default != "required":
            assert settings.build(kind, needed(kind) | {name: getattr(values, name)}) == values
            assert default == str(getattr(values, name))


def test_rows_say_who_set_a_field(write):
    rows = {name: rest for name, *rest in settings.rows(settings.read(SFTSettings, write("steps: 1000"), ["rank=4"]))}
    assert list(rows) == list(SFTSettings.model_fields)
    assert rows["steps"] == ["1000", "", "optimiser steps"]  # set, though to the default
    assert rows["rank"] == ["4", "", "of the adapters"]
    assert rows["seed"][:2] == ["0", "default"]
    assert rows["target_modules"][:2] == ["q_proj, v_proj", ""]


@EXAMPLES
@given(
    st.builds(
        SFTSettings,
        base_model=st.text(max_size=8),
        target_modules=st.lists(st.text(max_size=4), min_size=1, max_size=3, unique=True).map(tuple),
        learning_rate=st.floats(0, exclude_min=True, allow_infinity=False),
        lora_alpha=st.floats(1e-3, 1e3),
        scaling=st.sampled_from(["plain", "rslora"]) | st.floats(1e-3, 1e3),
        seed=st.integers(0, 2**63 - 1),
        schedule=st.sampled_from(["linear", "constant"]),
        mix_descriptions=st.booleans(),
    )
)
def test_what_is_written_is_read_again(tmp_path_factory, found):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(settings.to_yaml(found), encoding="utf-8")
    again = settings.read(SFTSettings, path)
    assert again == found
    assert settings.differences(found, again.model_dump_json()) == []
    assert list(yaml.safe_load(settings.to_yaml(found))) == list(SFTSettings.model_fields)


def test_differences_name_both_sides():
    ours = SFTSettings(**NEEDED, steps=7)
    theirs = SFTSettings(**NEEDED | {"target_modules": ["o_proj"]}, steps=9)
    assert settings.differences(ours, theirs.model_dump_json()) == [
        "steps: 9 then, 7 now",
        "target_modules: ['o_proj'] then, ['q_proj', 'v_proj'] now",
    ]
    older = json.loads(ours.model_dump_json())
    del older["bucket_steps"]
    assert settings.differences(ours, json.dumps(older | {"gone": 1})) == [
        "bucket_steps: None then, 8 now",
        "gone: 1 then, None now",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_do_not_change(kind):
    made = kind(**needed(kind), tasks_per_batch=3, accumulation=4)
    assert made.tasks_per_step == 12
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        made.steps = 3
