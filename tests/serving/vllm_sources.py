"""What the plugin expects of vLLM's functions, read from source archives of releases, without importing them.

``python -m tests.serving.vllm_sources vllm-0.33.0.tar.gz ...`` writes ``tests/data/vllm-parameters.json``; the archives are
the source distributions of a package index.
"""

import ast
import json
import re
import sys
import tarfile
from pathlib import Path

from t2l_engine.serving.vllm.hooks import PARAMETERS

DATA = Path(__file__).parents[1] / "data" / "vllm-parameters.json"
OPS = "vllm/lora/ops/torch_ops/lora_ops.py"
GUARDED = "vllm/entrypoints/serve/middleware/authenticate.py"
CPU = "vllm/platforms/cpu.py"


def parameters(source: str, name: str) -> dict[str, str]:
    """Functions of the class ``name`` -> their parameters after ``self``."""
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    made = {}
    for node in found.body:
        if isinstance(node, ast.FunctionDef):
            of = node.args
            every = [*of.posonlyargs, *of.args, *filter(None, [of.vararg]), *of.kwonlyargs, *filter(None, [of.kwarg])]
            made[node.name] = " ".join(one.arg for one in every if one.arg not in ("self", "cls"))
    return made


def read(archive: Path) -> dict:
    """``parameters`` of what PARAMETERS names; whether rows without an adapter are masked; what else is relied on."""
    with tarfile.open(archive) as tar:
        root = next(iter(tar)).name.partition("/")[0]

        def text(path: str) -> str:
            return tar.extractfile(f"{root}/{path}").read().decode()

        expected = {}
        for definer, functions in PARAMETERS.items():
            module, _, name = definer.partition(":")
            found = parameters(text(module.replace(".", "/") + ".py"), name)
            expected[definer] = {function: found.get(function) for function in functions}
        return {
            "parameters": expected,
            "base_rows_masked": "no_lora_mask" in text(OPS),
            "guarded_is_tuple": bool(re.search(r"GUARDED_PREFIX\s*(:[^=]*)?=\s*\(", text(GUARDED))),
            "uses_of_lora_config_on_cpu": text(CPU).count("lora_config"),
        }


if __name__ == "__main__":
    found = {path.name.removeprefix("vllm-").removesuffix(".tar.gz"): read(path) for path in map(Path, sys.argv[1:])}
    DATA.write_text(json.dumps(found, indent=1) + "\n")
