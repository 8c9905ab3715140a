"""Tables of generating and applying adapters, and of what every suite has: targets, misses, losses, ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from bench.records import BASE, OURS, PREALLOCATED, Result, Row, Verdict, ceiling_key, memory_verdict
from bench.report.cells import Times
from bench.report.tables import Line, Make, Table, beside_base, beside_roofline, each, end, flat, start, table

SUITES = ("generate", "apply", "train", "icl", "serving")
#: Of whose rows every other time is that of a rival.  In icl others answer a later question, which is less work.
COMPARED = ("generate", "apply", "train", "serving")


def rows(group: str, line: Callable[..., Line], unit: str, keep: Callable[[Row], bool] = lambda row: True) -> Make:
    """A line for each row of a group for which ``keep`` holds."""
    return lambda result: [line(row, unit) for row in result.rows if row.group == group and keep(row)]


# --- generating and applying --------------------------------------------------------------------------------------------


@table("generate", "Generating adapters, from task embedding to A and B", "generate")
def _generate(result: Result) -> Iterator[Line]:
    for row in result.rows:
        if row.group == "generate":
            more = {"output": "preallocated" if PREALLOCATED in row.case else "fresh"}
            more |= {"ms an adapter": row.us / 1e3 / row.shape["descriptions"]}
            more |= {"x FMA peak": row.over_peak if result.peaks_hold else None}
            yield beside_roofline(row, "ms", **more)


@table("generate-memory", "Peak memory of generating", "generate")
def _memory(result: Result) -> Iterator[Line]:
    for entry in result.records("memory"):
        of = memory_verdict(entry)
        yield flat(entry, "target") | {"peak / (weights + adapters)": of.ratio, "target": of.target, "met": of.met}


table("bf16-weights", "Adapters from bfloat16 weights", "generate")(each("bf16_weights"))


@table("split", "From a sentence to its first use, part by part", "generate")
def _split(result: Result) -> Iterable[Line]:
    requests: dict[str, Line] = {}
    for row in result.rows:
        if row.group == "split":
            about = {key: value for key, value in row.shape.items() if key != "part"} | {"threads": row.threads}
            requests.setdefault(str(about), about)[f"{row.shape['part']} ms"] = row.us / 1e3
    for request in requests.values():
        request["sum ms"] = sum(value for head, value in request.items() if head.endswith(" ms"))
    return requests.values()


def _rate(row: Row, unit: str) -> Line:
    return beside_roofline(row, unit, bytes=row.roofline["bytes"], **{"GB/s": row.roofline["bytes"] / row.us / 1e3})


table("lora", "The LoRA op alone: every token with the adapter of its row", "apply")(
    rows("lora", beside_roofline, "us", lambda row: BASE not in row.times)
)
table("linear", "A linear with its adapters, beside the linear alone", "apply")(
    rows("lora", beside_base, "us", lambda row: BASE in row.times)
)
table("model", "A step of a whole model with an adapter per row, beside the model without", "apply")(
    rows("model", beside_base, "ms", lambda row: "adapters" not in row.shape)
)
table("model-sweep", "Decode steps over the number of different adapters in the batch", "apply")(
    rows("model", beside_base, "ms", lambda row: "adapters" in row.shape)
)
table("sweep", "The same tokens with more and more different adapters", "apply")(rows("sweep", _rate, "us"))
table("backward", "Forward and backward, with gradients in x, A and B", "apply")(rows("backward", beside_roofline, "us"))


# --- instruction sets ---------------------------------------------------------------------------------------------------


@table("levels", "Every instruction set of a CPU, and the fastest of several ways in eager torch", "levels")
def _levels(result: Result) -> Iterator[Line]:
    """The chosen one holds where no other is faster by more than the larger interquartile range of the two."""
    (known,) = result.records("levels")
    chosen = known["chosen"]
    for row in result.rows:
        levels = {level: row.times[level] for level in known["available"]}
        ways = {name: time for name, time in row.times.items() if name not in (OURS, *levels)}
        fastest, way = (min(of, key=lambda name: of[name]["median_us"]) for of in (levels, ways))
        best, ours = levels[fastest], levels[chosen]
        behind = ours["median_us"] / best["median_us"] - 1
        holds = ours["median_us"] - best["median_us"] <= max(ours["iqr_us"], best["iqr_us"])
        told = "" if fastest == chosen else ", within noise" if holds else f", by {100 * behind:.0f} %"
        line = {"group": row.group, **start(row), "chosen": chosen, "fastest": fastest + told, "chosen holds": holds}
        line |= {f"{level} us": time["median_us"] for level, time in levels.items()}
        line |= {f"{level} IQR us": time["iqr_us"] for level, time in levels.items()}
        line |= {"torch us": ways[way]["median_us"], "torch": way}
        yield line | {"torch / chosen": Times(ways[way]["median_us"] / ours["median_us"])} | end(row)


# --- every suite --------------------------------------------------------------------------------------------------------


def _rivals(*results: Result) -> list[tuple[Row, str, float]]:
    return [(row, name, s) for result in results for row in result.rows for name, s in row.rivals().items()]


@table("misses", "Every target that is missed, the farthest first", *SUITES)
def _misses(*results: Result) -> Iterator[Line]:
    missed = [(v, result.machine) for result in results for v in result.verdicts() if not v.met]
    for v, machine in sorted(missed, key=lambda one: -one[0].over):
        line = {"machine": machine, "group": v.group, "case": v.name, "measured": v.value, "allowed": v.limit}
        line |= {"unit": v.unit or "x", "ratio": v.ratio, "of": v.of, "target": v.target}
        yield line | {"over by %": 100 * (v.over - 1), "within noise": v.near}


@table("groups", "Targets by group: those met on every machine, and the case farthest from its own", *SUITES)
def _groups(*results: Result) -> Iterator[Line]:
    """``over by %`` is negative where even the farthest is met."""
    judged: dict[str, list[tuple[Verdict, str | None]]] = {}
    for result in results:
        for v in result.verdicts():
            judged.setdefault(v.group, []).append((v, result.machine))
    for group, found in judged.items():
        targets = {(v.name, v.target) for v, _ in found}
        missed = {(v.name, v.target) for v, _ in found if not v.met}
        worst, machine = max(found, key=lambda one: one[0].over)
        line = {"group": group, "targets": len(targets), "met": len(targets - missed), "case": worst.name}
        line |= {"ratio": worst.ratio, "of": worst.of, "target": worst.target, "over by %": 100 * (worst.over - 1)}
        yield line | {"within noise": worst.near, "machine": machine}


@table("losses", "Every case in which another way is faster, the largest loss first", *COMPARED)
def _losses(*results: Result) -> Iterator[Line]:
    for row, name, speedup in sorted(_rivals(*results), key=lambda c: c[2]):
        if speedup < 1:
            line = {"machine": row.machine, "group": row.group, "case": row.name, "baseline": name}
            yield line | {"ours us": row.us, "baseline us": row.us * speedup, "ours / baseline": 1 / speedup}


@table("totals", "Targets and comparisons by suite; of all, those missed and lost on any machine", *SUITES)
def _totals(*results: Result) -> Iterator[Line]:
    for result in results:
        yield {"suite": result.run["suite"], "machine": result.machine, **_counts(result)}
    yield {"suite": "all", "machine": None, **_counts(*results)}


def _counts(*results: Result) -> Line:
    """A target is met, and a comparison won, only where it is on every machine that has a result."""
    met: dict[tuple, bool] = {}
    won: dict[tuple, bool] = {}
    for result in results:
        suite = result.run["suite"]
        for v in result.verdicts():
            key = suite, v.group, v.name, v.target
            met[key] = v.met and met.get(key, True)
        for row, name, speedup in _rivals(result) if suite in COMPARED else ():
            key = suite, row.group, row.name, name
            won[key] = speedup >= 1 and won.get(key, True)
    line = {"targets": len(met), "missed": list(met.values()).count(False)}
    return line | {"comparisons": len(won), "lost": list(won.values()).count(False)}


@table("beaten", "Baselines that are faster than ours somewhere, on any machine", *COMPARED)
def _beaten(*results: Result) -> Iterator[Line]:
    cases: dict[tuple[str, str], list[tuple[float, str, str | None]]] = {}
    for row, name, speedup in _rivals(*results):
        cases.setdefault((row.group, name), []).append((speedup, row.name, row.machine))
    for (group, name), found in cases.items():
        worst, case, machine = min(found)
        if worst < 1:
            counts = [len({case for s, case, _ in found if s < most}) for most in (float("inf"), 1)]
            line = {"group": group, "baseline": name, "cases": counts[0], "lost": counts[1]}
            yield line | {"ours / baseline at most": 1 / worst, "case": case, "machine": machine}


@table("ceilings", "What the machine reached before and after each run", *SUITES)
def _ceilings(*results: Result) -> Iterator[Line]:
    for result in results:
        after = {ceiling_key(c): c for c in result.records("ceiling") if c["when"] == "after"}
        for c in result.records("ceiling"):
            if c["when"] == "before":
                unit = "gflops" if "gflops" in c else "gbps"
                later = after.get(ceiling_key(c), {}).get(unit)
                what = {key: c.get(key) for key in ("kind", "dtype", "bytes", "threads")}
                rates = {"unit": unit, "before": c[unit], "after": later}
                drift = {"drift %": later and 100 * (later / c[unit] - 1)}
                peak = {"is a peak": result.peaks_hold if c["kind"] == "fma" else None}
                yield {"suite": result.run["suite"], "machine": result.machine} | what | rates | drift | peak


_ENCODER, _LAYER = "the text encoder runs by a forward pass of our own", "an adapted linear calls less Python"
_GRADIENTS, _SAMPLES = "a faster kernel for gradients of A and B", "fast ways get more samples than slow ones"
_WIDENED = "bfloat16 weights are widened in blocks, the next ones prefetched (avx2, avx512, avx512_bf16_wide)"
_HEADS = "heads are rounded before they are transposed, fresh memory is faulted in by whole ranges"
#: What has changed in what is timed since a run: by its suite and commit.  A run that replaces it needs no entry.
SINCE = {
    ("generate", "e6ccb19"): f"{_ENCODER}; {_HEADS}; {_SAMPLES}",
    ("generate", "2186fd9"): _SAMPLES,
    ("generate", "08f053e"): _WIDENED,
    ("levels", "db9bc2f"): _WIDENED,
    ("levels", "08f053e"): _WIDENED,
    ("apply", "f6bb1c3"): f"{_LAYER}; {_GRADIENTS}; {_SAMPLES}",
    ("apply", "2186fd9"): f"{_GRADIENTS}; {_SAMPLES}",
    ("train", "5066742"): f"a frozen linear and its adapters are one node of autograd; {_GRADIENTS}; {_SAMPLES}",
    ("icl", "fa97c57"): f"{_ENCODER}; {_LAYER}",
}


@table("machines", "What the results are of", *SUITES, "levels")
def _machines(*results: Result) -> Iterator[Line]:
    for result in results:
        run = result.run
        line = {"machine": result.machine, "suite": run["suite"]} | flat(run["machine"])
        line |= {key: run[key] for key in ("date", "commit")}
        yield line | {"changed since": SINCE.get((run["suite"], run["commit"]))}


def _of_any(kind: str, *fields: str) -> Make:
    return lambda *results: [
        {"machine": result.machine} | {field: entry.get(field) for field in fields}
        for result in results
        for entry in result.others.get(kind, [])
    ]


_POWER = _of_any("energy", "case", "unit", "count", "us_each", "mj_each", "watts", "sm_mhz", "memory_mhz")
_CHECK = _of_any("cross_check", "case", "cache", "ours_us", "do_bench_cudagraph_us")


def _profile(*results: Result) -> Iterator[Line]:
    for result in results:
        for entry in result.others.get("profile", []):
            waits = ", ".join(f"{reason} {warps:g}" for reason, warps in entry["stalls"].items())
            yield {"machine": result.machine} | flat(entry, "stalls") | {"warps that wait": waits}


#: Tables that only runs of a card have.
OF_A_CARD = (
    Table("energy", "Power, clocks and millijoules on a card", SUITES, _POWER),
    Table("cross-check", "Our times beside triton's do_bench_cudagraph", SUITES, _CHECK),
    Table("profile", "Counters of each kernel, alone and with cold caches", ("profile",), _profile),
)
