"""FLOPs and bytes of encoders, hypernetworks, language models and adapters, computed from configurations (docs/icl.md).

May be imported: the names below, and ``decoder``, ``encoder``, ``known``, ``serving``.  Imports ``files`` and
``hypernetwork.config``.
"""

from t2l_engine.research.costs.counts import (
    adapter_values,
    cache_bytes,
    decoder_flops,
    encoder_flops,
    hypernet_flops,
    lora_flops,
    merge_flops,
    merged_values,
    pass_bytes,
    steps_bytes,
)
from t2l_engine.research.costs.decoder import Decoder, Experts
from t2l_engine.research.costs.encoder import Encoder
from t2l_engine.research.costs.known import known_setup, known_setups
from t2l_engine.research.costs.serving import (
    LABELS,
    WAYS,
    Phase,
    Request,
    Setup,
    Way,
    Workload,
    questions_won,
    shots_to_win,
    tasks_to_win,
    tokens_of_adapter,
    ways,
)
from t2l_engine.research.costs.terms import Cost, Term

__all__ = [
    "LABELS",
    "WAYS",
    "Cost",
    "Decoder",
    "Encoder",
    "Experts",
    "Phase",
    "Request",
    "Setup",
    "Term",
    "Way",
    "Workload",
    "adapter_values",
    "cache_bytes",
    "decoder_flops",
    "encoder_flops",
    "hypernet_flops",
    "known_setup",
    "known_setups",
    "lora_flops",
    "merge_flops",
    "merged_values",
    "pass_bytes",
    "questions_won",
    "shots_to_win",
    "steps_bytes",
    "tasks_to_win",
    "tokens_of_adapter",
    "ways",
]
