"""Tables of serving many adapters in vLLM; a run needs vLLM, so there may be none on record."""

from __future__ import annotations

from collections.abc import Iterator

from bench.records import BASE, Result
from bench.report.tables import Line, said, table
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
            spread |= {"IQR %": 100 * timed["iqr_us"] / timed["median_us"]}
            step = {"ms a step": of["step_us"] / 1e3}
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
            about = {"case": row.case, "wrapped": row.shape["modules"], "beside": verdict.of}
            yield about | faster | {"met": verdict.met, "verdict": said(verdict)}


MODELS = {"base": "the base model", "known": "a known sentence", "new": "a new sentence"}


@table("serving-first-token", "Time to the first token of an answer, by the model that a request names", "serving")
def _first_token(result: Result) -> Iterator[Line]:
    times = {entry["of"]: entry["time"] for entry in result.records("first_token")}
    for name, time in times.items():
        beyond = {"ms beyond a known one": (time["median_us"] - times["known"]["median_us"]) / 1e3} if name == "new" else {}
        spread = {"ms": time["median_us"] / 1e3, "IQR ms": time["iqr_us"] / 1e3, "requests": time["rounds"]}
        yield {"model": MODELS[name], **spread, **beyond}


@table("serving-arriving", "Descriptions that arrive at the same moment, and the event loop beside them", "serving")
def _arriving(result: Result) -> Iterator[Line]:
    for entry in result.records("arriving"):
        made = {key: entry[key] for key in ("passes", "adapters", "seconds") if key in entry}
        loop = {"loop p99 ms": entry["loop_ms"]["p99"], "loop max ms": entry["loop_ms"]["max"]}
        yield {"descriptions": entry["texts"], "clients": entry["clients"] if made else 0, **made, **loop}


@table("serving-life", "A server's long life with few slots: answers, restart, memory", "serving")
def _life(result: Result) -> Iterator[Line]:
    for entry in result.records("life"):
        memory = [(one["API server"], sum(one.values()) - one["API server"]) for one in entry["rss_mib"]]
        (first_api, first_engine), (last_api, last_engine) = memory[1], memory[-1]
        tenths, half = len(memory) - 1, len(memory) // 2
        grown = 1000 * (last_engine - memory[half][1]) * tenths / (tenths - half) / entry["requests"]
        yield {
            "requests": entry["requests"], "sentences": entry["texts"], "slots": entry["slots"],
            "in memory": entry["cached"],
            "clients": entry["clients"], "tokens": entry.get("tokens", 1), "s": entry["seconds"],
            "not the nearest": entry["not_the_nearest"],
            "worst distance": entry["worst_distance"], "distance of others": entry["distance_of_others"][1],
            "same after a restart": f"{entry['restarted_same']} of {entry['restarted']}",
            "API MiB, first tenth": first_api, "API MiB, last": last_api,
            "engine MiB, first tenth": first_engine, "engine MiB, last": last_engine,
            "engine MiB a 1,000 requests, second half": grown,
        }  # fmt: skip
