"""Training of hypernetworks (fine-tuning, reconstruction) and of adapters, with exact resume.

May be imported: ``sft``, ``lora`` and ``reconstruction`` (each with ``train``), ``adapt``, ``loop``, ``settings``,
``runs``.  Imports ``tasks`` and the rooms of the engine.
"""

import importlib.util

_missing = [name for name in ("accelerate", "pydantic") if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f'training and evaluation need {", ".join(_missing)}; run: pip install "t2l_engine[train]"')
