import dataclasses
import json
import math

import pytest

from t2l_engine import ConfigError, EncoderConfig, HyperNetworkConfig
from t2l_engine.files.errors import MAX_CONFIG_BYTES, MAX_LAYERS, MAX_RANK, short_repr
from t2l_engine.files.text import from_json, read_json, to_json

NETWORK = {
    "variant": "M", "modules": ["q_proj", "v_proj"], "in_features": [64, 64], "out_features": [64, 32], "num_layers": 3,
    "rank": 4, "embed_dim": 48, "latent_size": 32, "head_in_size": 40, "lora_alpha": 8.0, "scaling": "plain",
    "head_bias": False, "output_scale": 0.5, "task_encoder": "softmax",
    "paths": ["model.layers.{layer}.self_attn.q_proj", "h.{layer}.v"],
}  # fmt: skip
ENCODER = {
    "name": "minilm", "pooling": "mean", "max_length": 256, "full_stop": False, "template": "Query: {text}",
    "dtype": "bfloat16",
}  # fmt: skip
RECORDS = pytest.mark.parametrize(("cls", "values"), [(HyperNetworkConfig, NETWORK), (EncoderConfig, ENCODER)])


@RECORDS
def test_round_trip(cls, values):
    config = from_json(cls, values, "here")
    assert to_json(config) == values
    assert from_json(cls, json.loads(json.dumps(to_json(config))), "here") == config
    assert hash(config) == hash(from_json(cls, values, "here"))


@RECORDS
def test_fields_are_strict(cls, values):
    with pytest.raises(ConfigError, match="here: unknown field 'surprise'"):
        from_json(cls, values | {"surprise": 1}, "here")
    for field in dataclasses.fields(cls):
        rest = {key: value for key, value in values.items() if key != field.name}
        if field.default is dataclasses.MISSING:
            with pytest.raises(ConfigError, match=f"here: missing field '{field.name}'"):
                from_json(cls, rest, "here")
        else:
            assert getattr(from_json(cls, rest, "here"), field.name) == field.default
    for wrong in ([], None, "text", [values]):
        with pytest.raises(ConfigError, match=f"here: expected a JSON object for {cls.__name__}"):
            from_json(cls, wrong, "here")


def test_the_largest_sizes_are_allowed():
    config = from_json(HyperNetworkConfig, NETWORK | {"num_layers": MAX_LAYERS, "rank": MAX_RANK}, "here")
    assert (config.num_layers, config.rank) == (4096, 65536)
    with pytest.raises(ConfigError, match="here: num_layers: expected a positive integer of at most 4096, got 4097"):
        from_json(HyperNetworkConfig, NETWORK | {"num_layers": 4097}, "here")


def test_modules_without_a_known_place_need_paths():
    values = NETWORK | {"modules": ["fc1", "v_proj"]}
    path = "model.decoder.layers.{layer}.fc1"
    config = from_json(HyperNetworkConfig, values | {"paths": [path, "model.layers.{layer}.v_proj"]}, "here")
    assert config.module_paths == {"fc1": path, "v_proj": "model.layers.{layer}.v_proj"}
    with pytest.raises(ConfigError, match=r"here: paths: expected where .* since \['fc1'\] are none of"):
        from_json(HyperNetworkConfig, values | {"paths": None}, "here")


WRONG = {
    "variant": ["S", ["L"]],
    "modules": [[], "q_proj", ["q_proj", "q_proj"], ["q_proj", "self_attn.v_proj"], ["q_proj", 3], None, ["q_proj", "keys"],
                [f"m{i}" for i in range(257)], ["q_proj", "v" * 65]],
    "in_features": [[64], [64, 0], [64, 1 << 31]],
    "out_features": [[64, 32.0], [64, True]],
    "num_layers": [0, "3", 10**5000, MAX_LAYERS + 1],
    "rank": [-1, True, 1 << 17, 1 << 31],
    "embed_dim": [None],
    "latent_size": [3, 32.0],
    "head_in_size": [0],
    "lora_alpha": [0, math.inf, "8", 10**400, 1e10],
    "output_scale": [math.nan, -1.0, 1e-30],
    "scaling": ["rsLoRA", 0.0, True, None, 1e301, 1e10, 1e-60],  # 1e10: products would exceed float32
    "head_bias": [1],
    "task_encoder": ["cubic", ["linear"], None],
    "paths": ["h.{layer}.q", ["h.{layer}.q"], ["h.{layer}.q"] * 2, ["h.{layer}.q", 3],
              {"q_proj": "h.{layer}.q", "v_proj": "h.{layer}.v"},
              *(["h.{layer}.q", path] for path in ("h.v", "h.{layer}.{layer}.v", "../{layer}.v"))],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(f, value) for f, values in WRONG.items() for value in values], ids=short_repr)
def test_network_values(field, value):
    with pytest.raises(ConfigError, match=f"here: {field}: .*expected"):
        from_json(HyperNetworkConfig, NETWORK | {field: value}, "here")


def test_rotation_needs_an_even_width():
    sizes = {"variant": "S-rotary", "latent_size": 6}  # m = 3 + 1 + 1
    with pytest.raises(ConfigError, match="latent_size"):
        from_json(HyperNetworkConfig, NETWORK | sizes, "here")


@pytest.mark.parametrize(("variant", "rows", "latents"), [
    ("L", [512, 384], (1, 1)),
    ("M", [256, 256], (2, 1)),
    ("S-learnable", [64, 64], (2, 4)),
    ("S-rotary", [64, 64], (2, 4)),
    ("autoregressive-learnable", [128, 96], (1, 4)),
    ("autoregressive-rotary", [128, 96], (1, 4)),
])  # fmt: skip
def test_rows_of_heads(variant, rows, latents):
    config = from_json(HyperNetworkConfig, NETWORK | {"variant": variant}, "here")
    assert [config.head_rows(i) for i in range(2)] == rows
    assert (config.num_sides, config.num_ranks) == latents and config.rotary == variant.endswith("rotary")


def test_widths():
    config = from_json(HyperNetworkConfig, NETWORK | {"latent_size": 34}, "here")
    assert (config.task_width, config.depth_width, config.module_width, config.width) == (17, 8, 8, 33)
    discrete = NETWORK | {"task_encoder": "discrete", "latent_size": 129}
    config = from_json(HyperNetworkConfig, discrete, "here")
    assert (config.task_width, config.depth_width, config.module_width, config.width) == (64, 3, 2, 69)
    for latent_size in (127, 130):
        with pytest.raises(ConfigError, match=f"here: latent_size: expected 128 or 129 .*, got {latent_size}"):
            from_json(HyperNetworkConfig, discrete | {"latent_size": latent_size}, "here")


def test_read_json(tmp_path):
    path = tmp_path / "some.json"
    twice, deep = b'{"a": 1, "b": {"c": 1, "c": 2}}', b"[" * 100_000
    for content in (b"", b"{", twice, deep):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"some\.json: not valid JSON"):
            read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"some\.json: not UTF-8 text: .* at byte 7"):
        read_json(path)
    path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match=rf"some\.json: expected at most {MAX_CONFIG_BYTES} bytes"):
        read_json(path)
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}
