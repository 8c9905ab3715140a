"""FLOPs and bytes of answering by in-context examples and by generated adapters, from configurations alone (docs/icl.md).

May be imported: the names below.  Imports ``files``, ``hypernetwork``, torch and transformers.
"""

from t2l_engine.research.costs.known import (
    PAPER,
    hypernetwork_for,
    known_encoder,
    known_entries,
    known_model,
    known_setup,
)
from t2l_engine.research.costs.model import Model, Parts, config_values, count
from t2l_engine.research.costs.serving import (
    LABELS,
    WAYS,
    Phase,
    Request,
    Setup,
    Way,
    Workload,
    adapter_values,
    hypernet_flops,
    questions_won,
    shots_to_win,
    tasks_to_win,
    tokens_of_adapter,
    ways,
)

__all__ = [
    "LABELS", "PAPER", "WAYS", "Model", "Parts", "Phase", "Request", "Setup", "Way", "Workload", "adapter_values",
    "config_values", "count", "hypernet_flops", "hypernetwork_for", "known_encoder", "known_entries",
    "known_model", "known_setup",
    "questions_won", "shots_to_win", "tasks_to_win", "tokens_of_adapter", "ways",
]  # fmt: skip
