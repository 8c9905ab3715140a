"""What the plugin expects of vLLM, against the sources of releases that no test can install."""

import json

import pytest

from t2l_engine.serving.vllm.hooks import PARAMETERS, signature
from tests.serving.vllm_sources import DATA

RELEASES = json.loads(DATA.read_text())


@pytest.mark.parametrize("release", RELEASES)
def test_functions_have_the_expected_parameters(release):
    for definer, functions in PARAMETERS.items():
        for name, expected in functions.items():
            assert signature(RELEASES[release]["parameters"][definer][name].split()) == expected, f"{definer}.{name}"


@pytest.mark.parametrize("release", RELEASES)
def test_what_else_is_relied_on(release):
    """The platform asks for LoRA only where it turns compilation off; rows of the base model are as docs/vllm.md says."""
    found = RELEASES[release]
    assert found["uses_of_lora_config_on_cpu"] == 1 and found["guarded_is_tuple"]
    assert found["base_rows_masked"] == (tuple(map(int, release.split("."))) >= (0, 33))
