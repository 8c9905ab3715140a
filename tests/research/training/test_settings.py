"""Settings: what a file and overrides may say, and what every fault is told as."""

import json
import math
import re

import pytest
import yaml

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import settings
from t2l_engine.research.training.settings import LoRASettings, ReconstructionSettings, Settings, SFTSettings

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
    path = write("learning_rate: 1e-3\nweight_decay: 2\nscaling: 1e1\nsteps: 30")
    found = settings.read(SFTSettings, path, ["steps=40", " rank = 4", "steps=50", "target_modules=[k_proj]", "seed=1"])
    assert found.learning_rate == 1e-3 and found.weight_decay == 2.0 and found.scaling == 10.0
    assert (found.steps, found.rank, found.target_modules, found.seed) == (50, 4, ("k_proj",), 1)
    assert found.base_model == "x" and found.warmup_steps == SFTSettings.model_fields["warmup_steps"].default
    assert settings.read(ReconstructionSettings, None) == ReconstructionSettings()
    assert settings.read(ReconstructionSettings, None, ["learning_rate=2.5e-5"]).learning_rate == 2.5e-5
    assert settings.read(SFTSettings, None, ["base_model=x", "target_modules=[q_proj]"]).base_model == "x"


#: field -> values that it may not have, with what we expect instead.
WRONG = {
    "steps": {"0": "greater than 0", "1.5": "integer", "": "integer"},
    "scaling": {"1e-12": "", "big": "'plain' or 'rslora'"}, "seed": {"99999999999999999999": "less than"},
    "learning_rate": {"fast": "valid number", ".nan": "finite"}, "schedule": {"cosine": "'linear' or 'constant'"},
    "latent_size": {"3": "equal to 4"}, "base_model": {"7": "string"},
    "target_modules": {"q_proj": "", "[]": "at least 1 item", "[q_proj, q_proj]": "distinct"},
}  # fmt: skip
#: Values that no field of a type may have.
NEVER = {
    int: [-1, 1.5, 1 << 64, True, None], float: [-1, math.nan, math.inf, True, None],
    str: [-7, True, None, "\ud800"], tuple: [[], [None], "q_proj", None],
}  # fmt: skip
POINTER = {"encoder": "llm", "variant": "pointer", "llm_layers": [0, 1]}
FLAT = {"encoder": "llm", "variant": "perceiver-flat", "llm_layers": [1]}
BY_INPUT = {"encoder": "base-model", "condition": "input"}
#: What the encoder and the condition of a run ask for: field -> (what does not fit, what is expected instead).
UNFIT = [
    ({"encoder": "one-hot"}, {
        "held_out_descriptions": (2, "0 with encoder 'one-hot', got 2"), "prompt": ("description", "'input'")}),
    ({}, {
        "llm_layers": ([0, 1], ".0, 10, 20. with encoder 'minilm', got .0, 1."), "example_share": (0.5, 0.0),
        "max_examples": (2, 6), "llm_mlps": (2, 1), "copied": (["q_proj"], r"\(\) with encoder 'minilm', got"),
        "first_layer": (1, 0)}),
    (POINTER, {
        "condition": ("input", "'description'"), "llm_queries": (4, "8 with pointer"),
        "llm_layers": ([1, 0], "increasing numbers, got .1, 0."), "encoder": ("minilm", "'llm' with variant pointer"),
        "variant": ("L", "one of perceiver-layers, perceiver-flat, pointer with encoder 'llm', got 'L'")}),
    (POINTER | {"copied": ["v_proj"]}, {"llm_layers": ([1, 2], "0 first, what is copied, got .1, 2.")}),
    (FLAT, {
        "llm_layers": ([0, 1], "one number with perceiver-flat"), "llm_heads": (2, "4"),
        "example_share": (0.5, 0.0), "copied": (["q_proj"], r"\(\) with perceiver-flat, got"), "first_layer": (1, 0)}),
    (BY_INPUT, {
        "samples_per_task": (2, "1 with condition 'input', got 2"), "encoder": ("one-hot", "one that reads text"),
        "held_out_descriptions": (1, 0)}),
    ({"validate_every": 0}, {"patience": (1, "0 with validate_every 0, got 1")}),
    ({}, {"decay_steps": (1, "at most 0 with schedule linear, got 1")}),
    ({"schedule": "constant", "steps": 20, "warmup_steps": 5}, {"decay_steps": (16, "at most 15 with schedule constant")}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "expected"), [(f, *item) for f, found in WRONG.items() for item in found.items()]
)
def test_faults_of_a_file(write, field, value, expected):
    """Place, field, what was expected and what came."""
    path = write(f"{field}: {value}")
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}: {field}: ')}.*{re.escape(expected)}") as caught:
        settings.read(SFTSettings, path)
    got = value if value == "1e-12" else repr(yaml.safe_load(value))  # a number here, to YAML 1.1 a string
    assert str(caught.value).endswith(f", got {got}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_refuses_what_is_out_of_range(kind):
    whole = kind(**needed(kind))
    for name in kind.model_fields:
        for value in NEVER[type(default := getattr(whole, name))][default == () :]:  # the first is an empty list
            with pytest.raises(ConfigError, match=f"settings: {name}: .*, got "):
                settings.build(kind, needed(kind) | {name: value})


@pytest.mark.parametrize("of_run, changes", UNFIT)
def test_fields_that_do_not_fit_each_other(of_run, changes):
    settings.build(SFTSettings, NEEDED | of_run)
    for field, (value, expected) in changes.items():
        with pytest.raises(ConfigError, match=f"^settings: {field}: expected {expected}"):
            settings.build(SFTSettings, NEEDED | of_run | {field: value})


@pytest.mark.parametrize("encoder", ["base-model", "llm"])
def test_reconstruction_has_no_base_model(encoder):
    with pytest.raises(ConfigError, match=f"^settings: encoder: expected no base model, .*, got '{encoder}'"):
        settings.build(ReconstructionSettings, {"encoder": encoder})


@pytest.mark.parametrize("text, message", [
    ("steps", "^--set: .*'steps'"), ("steps=", "^--set: steps: .*, got None"), ("steps=0", "^--set: steps: .*, got 0"),
    ("stepz=3", "^--set: unknown field 'stepz'; .*'accumulation', .*'weighting'"), ("=3", "^--set: unknown field ''"),
    ("steps=2024-13-45", "^--set steps: .*'2024-13-45'"),  # no such month
    ("steps=" + "9" * 5000, "^--set: steps: .*an integer.*, got '999"),
    *((f"steps={value}", "^--set steps: ") for value in ("[1", "!!python/name:os.system", "[" * 5000)),
])  # fmt: skip
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


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "word", "a: [", "steps: 1\nsteps: 2", "\x00", "1: 3", "steps: &a 3\nb: {<<: *a}"]
)
def test_files_that_are_no_mapping(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = f"^{re.escape(str(path))}: (expected a mapping of fields, got|expected field names|not plain YAML)"
    with pytest.raises(ConfigError, match=message):
        settings.read(SFTSettings, path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml: no such file; packaged settings: \['mini-lora', "):
        settings.read(SFTSettings, tmp_path / "nowhere.yaml")
    message = "^settings: missing field 'base_model': .*; settings: missing field 'target_modules'"
    with pytest.raises(ConfigError, match=message):
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
            value = getattr(values, name)
            assert default == (", ".join(map(str, value)) if isinstance(value, tuple) else str(value))


@pytest.mark.parametrize("changes", [
    {}, {"base_model": "yes: no\n'é\u2028", "target_modules": ["null", "1e3"]},
    {"learning_rate": 1e-300, "scaling": 1e3, "seed": 2**63 - 1}, {"scaling": "rslora"},
], ids=str)  # fmt: skip
def test_what_is_written_is_read_again(tmp_path, changes):
    found, path = SFTSettings(**NEEDED | changes), tmp_path / "run.yaml"
    path.write_text(settings.to_yaml(found), encoding="utf-8")
    assert settings.read(SFTSettings, path) == found
    assert list(yaml.safe_load(settings.to_yaml(found))) == list(SFTSettings.model_fields)


def test_differences_name_both_sides():
    ours = SFTSettings(**NEEDED, steps=7)
    theirs = SFTSettings(**NEEDED | {"target_modules": ["o_proj"]}, steps=9)
    assert settings.differences(ours, theirs.model_dump(mode="json")) == [
        "steps: 9 then, 7 now",
        "target_modules: ['o_proj'] then, ['q_proj', 'v_proj'] now",
    ]
    older = json.loads(ours.model_dump_json())
    del older["bucket_steps"]
    assert settings.differences(ours, older | {"gone": 1}) == ["gone: 1 then, None now"]  # its run had the default
    other = SFTSettings(**NEEDED, steps=7, bucket_steps=4)
    assert settings.differences(other, older) == ["bucket_steps: 8 then, 4 now"]
