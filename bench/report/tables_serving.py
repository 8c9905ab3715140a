"""Tables of serving many adapters in vLLM; a run needs vLLM, so there may be none on record."""

from __future__ import annotations

from collections.abc import Iterator

from bench.records import BASE, Result
from bench.report.tables import Line, table
from bench.serving_arms import ARMS


@table("serving", "Tokens per second of every way to serve a batch, and what it took", "serving")
def _serving(result: Result) -> Iterator[Line]:
    known = {(entry["case"], entry["arm"]): entry for entry in result.records("arm")}
    cases = {case for case, _ in known}
    for row in (row for row in result.rows if row.case in cases):  # the others are of the same calls
        tokens, base = row.shape["requests"] * row.shape["new"], row.times[BASE]["median_us"]
        about = {"case": row.case, **{key: row.shape[key] for key in ("requests", "adapters", "slots", "prompt", "new")}}
        for name in (name for name in ARMS if name in row.times):
            timed, of = row.times[name], known[row.case, name]
            rates = {"tokens/s": tokens / timed["median_us"] * 1e6, "x base": base / timed["median_us"]}
            spread = {"ms": timed["median_us"] / 1e3, "IQR ms": timed["iqr_us"] / 1e3, "calls": timed["rounds"]}
            step = {"ms a step": of["step"]["median_us"] / 1e3, "IQR ms a step": of["step"]["iqr_us"] / 1e3}
            plain, alike = of["plain_rows"], of["plain_rows_alike"]
            rows = {"base rows as without LoRA": f"{alike} of {plain}"} if plain and name != BASE else {}
            error = {f"error {key}".removesuffix(" value"): value for key, value in of["error"].items()}
            yield (
                about
                | {"arm": name, "what": ARMS[name].about}
                | rates
                | step
                | {"MiB": of["rss_mib"]}
                | spread
                | rows
                | error
            )
        for name, why in row.skipped.items():
            yield about | {"arm": name, "what": ARMS[name].about, "skipped": why}


@table("serving-targets", "Tokens per second of ours over those of others, and how many times as many are wanted", "serving")
def _targets(result: Result) -> Iterator[Line]:
    for row in result.rows:
        for verdict in row.verdicts:
            faster = {"x tokens/s": 1 / verdict.ratio, "at least": verdict.over / verdict.ratio}
            yield {"case": row.case, "wrapped": row.shape["modules"], "beside": verdict.of, **faster, "met": verdict.met}
