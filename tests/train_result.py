"""A result of the suite ``train`` of few cases, with made-up times and peaks."""

CASES = (("q,v", 48, "float32"), ("all linears", 128, "bfloat16"))
#: Milliseconds of a step, and MiB at most, by way.
TIMES = {"base": 100.0, "ours": 108.0, "hooks": 216.0, "hooks, PEFT base": 240.0, "plain bmm": 104.0}
PEAKS = {"base": 900.0, "ours": 1000.0, "hooks": 1600.0, "hooks, PEFT base": 1700.0, "plain bmm": 1050.0}


def _timing(ms):
    return {"median_us": 1e3 * ms, "iqr_us": 1e3 * ms / 20, "rounds": 10}


def _row(case, group, shape, ms, baselines, bar=None):
    return {
        **{"case": case, "group": group, "shape": {"model": "SmolLM2-135M", **shape}, "threads": 2, "cache": None},
        **{"ours": _timing(ms), "floor": None, "bar": bar},
        "baselines": {name: _timing(of) for name, of in baselines.items()},
        "error": {"value": 1e-6, "bound": 1e-4, "measure": "gradient"},
    }


def _step(modules, tokens, dtype, ms):
    bar = {"ratio": 1.12, "of": "base", "met": ms <= 1.12 * TIMES["base"]}
    shape = {"samples": 8, "tokens": tokens, "modules": modules, "rank": 8, "dtype": dtype}
    others = {way: of for way, of in TIMES.items() if way != "ours"}
    return _row(f"{modules}, {tokens} tokens, {dtype}", "train", shape, ms, others, bar)


def _ways():
    return {way: {"loaded_mib": 800.0, "peak_mib": peak, "reset": True} for way, peak in PEAKS.items()}


def lists():
    """All but what files of every suite have; the caller may change it."""
    few, many = CASES
    rows = [_step(*few, TIMES["ours"]), _step(*many, 120.0)]
    cases = [row["case"] for row in rows]
    whole = {"variant": "L", "samples": 8, "tokens": 48, "dtype": "float32"}
    rows.append(_row("sft step L", "sft step", whole, 125.0, {"base": TIMES["base"]}))
    for tasks, one_by_one in ((1, 80.0), (8, 660.0)):
        shape = {"tasks": tasks, "samples": 8, "tokens": 48, "dtype": "float32"}
        title = f"{tasks} task{'s' if tasks > 1 else ''} x 8 samples"
        rows.append(_row(title, "library", shape, 79.0 if tasks == 1 else 600.0, {"one task at a time": one_by_one}))
    parts = {"model": 108.0, "hypernetwork": 12.5, "update": 4.0}
    return {
        "rows": rows,
        "train_memory": [{"case": case, "ways": _ways(), "absent": {}, "bar": 1.25} for case in cases],
        "train_parts": [{"case": "sft step L", "parts": {name: _timing(ms) for name, ms in parts.items()}}],
    }
