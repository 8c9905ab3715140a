"""Names that the suite writes into its file and that tables and figures read there."""

from __future__ import annotations

from t2l_engine.research.costs import LABELS

#: Workloads of the records ``costs`` that are no benchmark.
PAPER, MEAN = "paper", "mean of ten benchmarks"
MODELS = {
    "mistral-7b": "Mistral-7B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "gemma-2-2b": "Gemma-2-2B",
    "smollm2-135m": "SmolLM2-135M",
}
#: What is timed beside ours, the first question of a task by a new adapter.
ICL, WARM, ALONE = LABELS["icl"], LABELS["icl-warm"], "question alone"
KEPT, MERGED = (f"{LABELS[way]}, later question" for way in ("t2l-task", "t2l-merged"))
