"""The paper's table of operations (arXiv 2506.06105, appendix I) beside the closed forms: what cells imply, and if they fit.

The paper gives no token counts.  Each cell is a number printed with so many digits, so it stands for an interval.  Of the
counts of ``research.costs.known.PAPER``, 59 and 299 fit best where a token costs two operations a weight and no more;
with attention and logits, which are counted here, the cells imply fractions of tokens beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from bench.harness import Record, record
from t2l_engine.research import costs
from t2l_engine.research.costs import Setup
from t2l_engine.research.costs.known import PAPER, hypernetwork_for

TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Cell:
    """``printed``: TFLOP as in the paper, the last digit being ``unit``."""

    name: str
    printed: float
    unit: float


BASE = Cell("language model, question alone", 0.827, 1e-3)
ENCODER = Cell("text encoder (gte-large)", 0.029, 1e-3)
HYPERNET = Cell("hypernetwork (variant M)", 0.000005, 1e-6)
T2L = Cell("T2L in all", 0.856, 1e-3)
ICL = Cell("3-shot in-context learning", 4.177, 1e-3)


def implied(cell: Cell, cost: Callable[[int], int]) -> float:
    """The number of tokens, with its fraction, at which ``cost`` meets the cell."""
    low, high = 0, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) > cell.printed * TERA else (middle, high)
    return low + (cell.printed * TERA - cost(low)) / (cost(high) - cost(low))


def entries() -> Iterator[Record]:
    """Every cell beside the closed form at the stated counts, with the tokens that meet it exactly."""
    setup = costs.known_setup("mistral-7b")
    shared_heads = dataclasses.replace(setup, hypernet=hypernetwork_for(setup.decoder, setup.encoder, variant="M"))
    prompt = PAPER.question + PAPER.prefix

    def decoder(tokens: int) -> int:
        return costs.decoder_flops(setup.decoder, tokens).total

    def encoder(tokens: int) -> int:
        return costs.encoder_flops(setup.encoder, tokens).total

    generate = costs.hypernet_flops(shared_heads.hypernet).total
    whole = decoder(PAPER.question) + encoder(PAPER.description)
    adapted = costs.lora_flops(setup.hypernet, PAPER.question).total
    ours = [
        (BASE, decoder(PAPER.question), implied(BASE, decoder), PAPER.question),
        (ENCODER, encoder(PAPER.description), implied(ENCODER, encoder), PAPER.description),
        (HYPERNET, generate, None, None),
        (T2L, whole + generate + adapted, None, None),
        (ICL, decoder(prompt), implied(ICL, decoder), prompt),
    ]
    for cell, value, tokens, stated in ours:
        yield record(
            "paper",
            cell=cell.name,
            printed_tflop=cell.printed,
            ours_tflop=value / TERA,
            tokens=stated,
            implied_tokens=None if tokens is None else round(tokens, 2),
            off_percent=round(100 * (value / TERA / cell.printed - 1), 3),
            rounding_percent=round(50 * cell.unit / cell.printed, 3),
        )
    yield record("hypernetwork", **dict(_hypernetwork(shared_heads)))
    yield record(
        "ratio",
        printed=round(ICL.printed / T2L.printed, 4),
        corrected=round(ICL.printed * TERA / (T2L.printed * TERA + generate), 4),
        ours=round(decoder(prompt) / (whole + generate + adapted), 4),
    )


def _hypernetwork(setup: Setup) -> Iterator[tuple[str, float]]:
    """What the hypernetwork's cell may have left out."""
    cost, config = costs.hypernet_flops(setup.hypernet), setup.hypernet
    trunk = cost.total - cost["heads"]
    padded = sum(max(sizes) for sizes in zip(config.in_features, config.out_features, strict=True)) * len(config.modules)
    executed = cost["heads"] * padded // sum(config.in_features + config.out_features)
    yield "ours_tflop", cost.total / TERA
    yield "with_padded_columns_tflop", (trunk + executed) / TERA
    yield "heads_percent", round(100 * cost["heads"] / cost.total, 2)
    yield "times_printed", round(cost.total / TERA / HYPERNET.printed, 1)
    one_layer = dataclasses.replace(config, num_layers=1)
    of_one = costs.hypernet_flops(one_layer)
    yield "trunk_of_one_layer_tflop", (of_one.total - of_one["heads"]) / TERA
