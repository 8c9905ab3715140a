"""What several test files share.  Nothing here reaches the network."""

import gc
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and PEFT read it
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is loaded: workers that share cores would wait for each other
    _share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _share)))

import pytest
import torch
import yaml

from t2l_engine import AdapterStack
from tests import backends

try:
    import hypothesis
except ImportError:  # on a machine for the GPU suite alone
    pass
else:  # the same examples in every run; how long one takes decides nothing
    hypothesis.settings.register_profile(
        "t2l", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    # Of `make fuzz`: others in every run, each read or refused within ten seconds.
    hypothesis.settings.register_profile(
        "fuzz", hypothesis.settings.get_profile("t2l"), max_examples=12_000, deadline=10_000, derandomize=False
    )
    hypothesis.settings.load_profile("t2l")


def pytest_addoption(parser):
    parser.addoption("--backend", choices=backends.NAMES, default="cpu", help="what runs the ops, in tests of ops")
    parser.addoption("--library", type=Path, help="native library in place of the package's; of emu, else it is built")


def pytest_configure(config):
    """Operands lie on the device of the backend, by torch's default device."""
    config.addinivalue_line("markers", "kernel_case: values of a kernel, for every way to run it")
    try:
        device = backends.select(config.getoption("--backend"), config.getoption("--library"))
    except (RuntimeError, OSError) as error:
        raise pytest.UsageError(f"--backend: {error}") from None
    if device.type != "cpu":
        torch.set_default_device(device)


def pytest_collection_modifyitems(config, items):
    """What builds, trains or downloads for minutes has no guard of time."""
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if any(item.get_closest_marker(name) for name in ("compat", "slow", "emu")):
                item.add_marker(pytest.mark.timeout(0))


def pytest_collection_finish(session):
    """What has been imported and collected stays to the end: collections of garbage, one a training run, pass it over."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def backend(request):
    """Name of what runs the ops: "cpu", "cuda" or "emu"."""
    return request.config.getoption("--backend")


@pytest.fixture
def golden():
    """Folder of checkpoints in Sakana format, each with the adapters that SakanaAI's code generated from it."""
    return Path(__file__).parent / "data" / "golden"


@pytest.fixture
def edit(golden, tmp_path):
    """Factory: a copy of a golden case; ``state`` maps its tensors to others, ``args`` and ``peft`` replace fields."""

    def make(case, state=None, args=None, peft=None):
        folder = tmp_path / f"{case}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(golden / case, folder)
        if state is not None:
            torch.save(state(torch.load(folder / "hypermod.pt", weights_only=True)), folder / "hypermod.pt")
        for name, changes in (("args.yaml", args), ("adapter_config.json", peft)):
            if changes is not None:
                values = yaml.safe_load((folder / name).read_text()) | changes
                (folder / name).write_text(json.dumps(values))  # JSON is YAML too
        return folder

    return make


@pytest.fixture
def make_stack():
    """Factory of random stacks; ``shapes``: module name -> (in, out) features; every adapter has its own scaling."""

    def make(shapes, num_adapters=3, num_layers=2, rank=4, seed=0, dtype=torch.float32, **kwargs):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return (torch.randn(num_adapters, num_layers, *shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        return AdapterStack(
            {name: randn(rank, n_in) for name, (n_in, _) in shapes.items()},
            {name: randn(rank, n_out).mT for name, (_, n_out) in shapes.items()},
            torch.linspace(0.5, 2.0, num_adapters),
            **kwargs,
        )

    return make


@pytest.fixture
def stack_for(make_stack):
    """Factory of random stacks that fit ``model``; ``names``: its linears to adapt."""

    def make(model, names, **kwargs):
        found = [(path.split("."), module) for path, module in model.named_modules()]
        linears = {path[-1]: (module.in_features, module.out_features) for path, module in found if path[-1] in names}
        return make_stack({name: linears[name] for name in names}, num_layers=len(model.model.layers), **kwargs)

    return make


@pytest.fixture(scope="session")
def tiny_model():
    """Factory of random causal language models in eval mode: ``tiny_model("Llama", head_dim=32)``."""
    import transformers

    names = {"GPT2": ("GPT2Config", "GPT2LMHeadModel"), "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}

    def make(family, dtype=torch.float32, **kwargs):
        sizes = {
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,  # logits of order 1, so that an absolute tolerance means something
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(0)
        config, model = names.get(family, (f"{family}Config", f"{family}ForCausalLM"))
        return getattr(transformers, model)(getattr(transformers, config)(**sizes | kwargs)).to(dtype).eval()

    return make


@pytest.fixture
def left_tokenizer():
    """A decoder's tokenizer: pads on the left and knows no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import WORDS

    backend = Tokenizer(models.WordLevel({"?": 0, "</s>": 1} | {w: i + 2 for i, w in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?", padding_side="left")
