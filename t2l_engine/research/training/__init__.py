"""Training of hypernetworks and adapters; never imported by the core."""

import importlib.util

_missing = [name for name in ("accelerate", "matplotlib", "pydantic") if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f'training needs {", ".join(_missing)}; run: pip install ".[train]" in a clone of t2l_engine')
