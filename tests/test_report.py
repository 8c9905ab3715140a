"""Tables and figures from result files: nothing is edited by hand, nothing is old, no loss is left out."""

import json
import re
import shutil

import icl_result
import pytest
import train_result

from bench import figures, report, tables
from bench.source import bundled

PARTS = {"encoder": 4000.0, "trunk": 6000.0, "head": 20000.0, "apply": 900.0}


def row(case, group, shape, us, *, floor=None, bar=None, met=True, cache=None, threads=1, baselines=None, flops=None):
    """A row in the schema of the suites; ``floor`` in microseconds, ``bar``: (ratio, plus_us, of)."""
    flops = flops or 2e6
    return {
        "case": case,
        "group": group,
        "shape": shape,
        "threads": threads,
        "cache": cache,
        "ours": {"median_us": us, "iqr_us": us / 50, "rounds": 30},
        "floor": floor and {"us": floor, "by": "bytes", "flops": flops, "bytes": 1e6, "gflops": 100.0, "gbps": 20.0},
        "ratio": floor and us / floor,
        "bar": bar and {"ratio": bar[0], "plus_us": bar[1], "of": bar[2], "met": met},
        "baselines": baselines or {},
        "error": {"value": 1e-3, "bound": 4e-3, "measure": "relative Frobenius against float64"},
    }


def timed(us, ours):
    return {"median_us": us, "iqr_us": us / 50, "rounds": 30, "speedup": us / ours}


def result(suite, rows, **fields):
    rates = {
        "gemm": [{"dtype": d, "threads": 1, "gflops": g} for d, g in (("float32", 100.0), ("bfloat16", 220.0))],
        "fma": [{"dtype": "float32", "threads": 1, "gflops": 120.0}],
        "read": [{"bytes": 2**n, "threads": 1, "gbps": g} for n, g in ((15, 150.0), (20, 80.0), (28, 19.0))],
        "copy": [{"bytes": 2**28, "threads": 1, "gbps": 21.0}],
    }
    after = {
        kind: [e | {k: 0.9 * v for k, v in e.items() if k in ("gflops", "gbps")} for e in es] for kind, es in rates.items()
    }
    return {
        "suite": suite,
        "size": "full",
        "command": f"python -m bench {suite}",
        "date": "2026-01-02",
        "commit": "0123abc",
        "dirty": False,
        "checkpoint": bundled(),
        "machine": {
            **{"cpu": "Some CPU", "cores": 2, "threads": 2, "isa": "avx512"},
            **{"memory_gib": 8.0, "l2_mib": 1.0, "l3_mib": 32.0},
        },
        "versions": {"t2l_engine": "0.1.0", "torch": "2.11", "python": "3.12", "compiler": "g++ 14", "peft": None},
        "ceilings": {"before": rates, "after": after},
        "rows": rows,
        **fields,
    }


def generation():
    made = []
    for dtype, us in (("float32", 40e3), ("bfloat16", 20e3)):
        for n in (1, 64):
            shape = {"model": "mistral-7b", "variant": "L", "dtype": dtype, "descriptions": n}
            floor, eager = us * n * 0.8, {"eager": timed(2.5 * us * n, us * n)}
            made.append(
                row(
                    f"mistral-7b L {dtype} {n}",
                    "generate",
                    shape,
                    us * n,
                    floor=floor,
                    bar=(1.3, 0, "floor"),
                    baselines=eager,
                )
            )
    parts = [
        row(f"split {p}", "split", {"model": "mistral-7b", "descriptions": 1, "part": p}, us) for p, us in PARTS.items()
    ]
    made.append(
        {**made[1], "case": "64, beside one", "floor": None, "bar": {"ratio": 1, "of": "one description", "met": True}}
    )
    made[-1]["baselines"] = {}
    for dtype in ("float32", "bfloat16"):  # the same speed over earlier adapters
        shape = {"model": "mistral-7b", "variant": "L", "dtype": dtype, "descriptions": 64}
        made.append(row(f"{dtype} 64, kept memory", "generate", shape, 1e6, baselines={"fresh memory": timed(1e6, 1e6)}))
    weights = [{"model": "mistral-7b", "variant": "L", "relative_frobenius": 3e-3}]
    memory = [
        {"what": "64 descriptions", "peak_mib": 300.0, "weights_mib": 110.0, "adapters_mib": 140.0, "ratio": 1.1, "bar": 1.2}
    ]
    return result("generate", made + parts, memory=memory, bf16_weights=weights)


def application():
    def lora(t, a, us, floor, **kwargs):
        shape = {"tokens": t, "adapters": a, "rank": 8, "dtype": "bfloat16", "layout": "r_out"}
        return row(f"{t}x{a}", "lora", shape, us, floor=floor, bar=(1.5, 3.0, "floor"), cache="hot", flops=t * 1e5, **kwargs)

    cold = {"tokens": 64, "adapters": 64, "rank": 8, "dtype": "bfloat16", "layout": "r_out"}
    made = [
        lora(8, 8, 20.0, 12.0, baselines={"mm loop": timed(600.0, 20.0), "peft": {"absent": "not installed"}}),
        lora(64, 64, 200.0, 100.0, met=False, baselines={"mm loop": timed(4000.0, 200.0), "merged": timed(100.0, 200.0)}),
        lora(512, 8, 1500.0, 1200.0, baselines={"mm loop": timed(5900.0, 1500.0)}),
        row("cold", "lora", cold, 300.0, floor=250.0, cache="cold", baselines={"mm loop": timed(4000.0, 300.0)}),
        row("linear", "lora", {"tokens": 8}, 40.0, cache="hot", baselines={"base": timed(30.0, 40.0)}),
        row("4 adapters", "sweep", {"distinct": 4}, 30.0, floor=20.0),
        row("8 tokens", "backward", {"tokens": 8}, 90.0, floor=70.0),
    ]
    for phase, base, ours in (("decode", 70e3, 73e3), ("prefill", 1000e3, 1100e3)):
        baselines = {"base": timed(base, ours), "PEFT mixed": timed(1.5 * base, ours), "merged": timed(base, ours)}
        bar = {"bar": (1.05, None, "base"), "met": ours <= 1.05 * base}
        shape = {"phase": phase, "modules": "q,v", "dtype": "float32"}
        made.append(row(f"SmolLM2 {phase}", "model", shape, ours, baselines=baselines, **bar))
        both = {"dtype": "bfloat16", "modules": "all linears"}
        for other in ({"dtype": "bfloat16"}, {"modules": "all linears"}, both):
            made.append(row(f"{phase} {other}", "model", shape | other, base, baselines={"base": timed(base, base)}))
    many = {"phase": "decode", "adapters": 64}
    made.insert(5, row("64 adapters", "model", many, 80e3, threads=2, baselines={"base": timed(70e3, 80e3)}))
    return result("apply", made)


@pytest.fixture
def root(tmp_path):
    """A tree with the documents of the project and results of its own, tables and figures written."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for document in {t.document for t in report.TABLES}:
        (tmp_path / document).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(report.ROOT / document, tmp_path / document)
    for name in (report.study.FILE, report.learn_tables.FILE):
        shutil.copy(report.ROOT / "bench" / "results" / name, results)
    save(tmp_path, generation())
    save(tmp_path, application())
    save(tmp_path, result("icl", **icl_result.lists()))
    save(tmp_path, result("train", **train_result.lists()))
    shutil.copy(report.ROOT / "bench" / "results" / "lengths.json", results)
    return tmp_path


def test_what_is_learned_is_told_with_its_shares():
    found = json.loads((report.ROOT / "bench" / "results" / report.learn_tables.FILE).read_text(encoding="utf-8"))
    for text in (report.learn_tables.summary(found), report.learn_tables.whole(found)):
        for of in found["reconstruction"].values():
            assert f"{of['kept']['exact_match']:.1f} %" in text and f"{of['kept']['loss']:.1f} %" in text
    del found["library"]
    assert "was not measured" in report.learn_tables.summary(found)


@pytest.fixture
def drawn(root, monkeypatch):
    """The same, written, with figures that cost no drawing."""
    monkeypatch.setattr(figures, "files", lambda name, _, stamp: {f"{name}{s}": stamp.encode() for s in (".svg", ".png")})
    assert report.Report(root).write() == []
    return root


def save(root, made):
    (root / "bench" / "results" / f"{made['suite']}.json").write_text(json.dumps(made))


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def loaded(root, suites=("generate", "apply")):
    sources = [report.SOURCES[suite] for suite in suites]
    return [source.load(root / "bench" / "results" / source.file) for source in sources]


def check(root):
    return report.Report(root).check()


def test_written_is_checked(drawn):
    assert check(drawn) == []


@pytest.mark.parametrize(
    "document, number",
    [
        *(("README.md", number) for number in ("73.0 ms", "3.50 x (3.15–3.85)", "question costs 0.857;")),
        *(("docs/results.md", number) for number in ("| 20.0 (0.400) |", "| 0.000005 |", "| 4,197 (14.3) |")),
    ],
)
def test_hand_edit_is_found(drawn, document, number):
    edit(drawn / document, number, re.sub(r"\d", "9", number))
    assert check(drawn) == [f"{document}: a table differs from bench/results; run: python -m bench.report"]


def test_markers(drawn):
    edit(drawn / "docs" / "results.md", "<!-- lora: end -->", "")
    edit(drawn / "README.md", "<!-- speed: begin -->", "<!-- fast: begin -->\n<!-- fast: end -->\n<!-- speed: begin -->")
    problems = check(drawn)
    assert "docs/results.md: markers of table 'lora' are missing, doubled or out of order" in problems
    assert "README.md: markers of 'fast', which is no table" in problems
    before = (drawn / "docs" / "results.md").read_text(encoding="utf-8")
    assert report.Report(drawn).write() == problems
    assert (drawn / "docs" / "results.md").read_text(encoding="utf-8") == before


def test_missing_result_is_named(drawn):
    (drawn / "bench" / "results" / "apply.json").unlink()
    assert check(drawn) == ["bench/results/apply.json: missing; run: python -m bench apply"]


def test_results_of_another_checkpoint_are_found(drawn):
    for name, command in (("icl", "icl --tasks TASKS"), ("study", report.SOURCES["study"].command.split("bench ")[1])):
        edit(drawn / "bench" / "results" / f"{name}.json", bundled(), "0" * 64)
        assert f"bench/results/{name}.json: not of the bundled checkpoint; run: python -m bench {command}" in check(drawn)


def test_stale_figures_are_found(drawn):
    save(drawn, generation() | {"date": "2026-01-03"})
    assert report.Report(drawn).problems == []
    old = [p for p in check(drawn) if "older" in p]
    assert [p.split(":")[0] for p in old] == [
        f"docs/figures/{name}.{suffix}" for name in ("roofline", "latency-split") for suffix in ("svg", "png")
    ]
    (drawn / "docs" / "figures" / "decode.png").unlink()
    assert "docs/figures/decode.png: missing; run: python -m bench.report" in check(drawn)


def test_figures_follow_their_code(drawn, monkeypatch):
    monkeypatch.setattr(figures, "drawing_version", lambda name: "another")
    assert len([p for p in check(drawn) if "older than its data or drawing" in p]) == 2 * len(figures.FIGURES)


def test_misses_are_the_unmet_rows(root):
    made = generation()
    made["memory"][0]["ratio"] = 1.5
    save(root, made)
    table = tables.misses(*loaded(root))
    missed = [line.split(" | ")[1] for line in table.splitlines()[2:] if line.startswith("|")]
    assert missed == ["64x64, 1 thread, hot", "64 descriptions", "SmolLM2 prefill, 1 thread"]  # the farthest first
    assert all(over in table for over in ("+30.7%", "+25.0%", "+4.8%"))
    assert "3 of 11 bars are missed." in table


def test_losses_reach_the_readme(root):
    table = tables.losses(*loaded(root))
    assert table.count("| merged |") == 3 and "A baseline is faster in 3 of 13 comparisons." in table
    summary = tables.speed(*loaded(root))
    assert (
        "Farthest from its bar: lora, 64x64, 1 thread, hot, at 2.00 x floor where 1.5 x floor + 3 us is the bar" in summary
    )
    assert "- Faster than ours: lora, merged, in 1 of 1 cases, at most 2.00 times (64x64, 1 thread, hot)." in summary
    assert "- Faster than ours: model, merged, in 2 of 2 cases" in summary


def test_absent_baselines_say_why(root):
    table = tables.lora(*loaded(root))
    assert "\n– peft (not installed), " in table and "over peft" in table


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r["rows"][1]["bar"].update(met=True), "64x64, 1 thread, hot: the file says met = True"),
        (lambda r: r["rows"][0]["error"].update(value=0.1), "8x8, 1 thread, hot: error 0.1 is beyond its bound 0.004"),
        (lambda r: r["rows"].append(r["rows"][0]), "8x8, 1 thread, hot: two rows"),
        (lambda r: r.update(size="tiny"), "expected suite 'apply' of size 'full', got suite 'apply' of size 'tiny'"),
        (lambda r: r.update(command="python -m bench apply --only 8x8"), "expected a whole suite"),
        (lambda r: r["rows"][-4]["baselines"].pop("base"), "a bar of 'base', which the file does not hold"),
        (lambda r: r["rows"][0].pop("ours"), "KeyError: 'ours'"),
        (lambda r: r["rows"].pop(0), "no row of group 'lora' with tokens 8, adapters 8"),
        (lambda r: r["ceilings"]["after"]["read"].pop(), "was not measured again"),
    ],
    ids=["verdict", "error", "doubled", "tiny", "part", "bar", "broken", "headline", "ceiling"],
)
def test_results_are_not_just_believed(drawn, change, says):
    made = application()
    change(made)
    save(drawn, made)
    assert any(p.startswith("bench/results/") and "apply.json" in p and says in p for p in check(drawn)), check(drawn)


def test_one_description(root):
    (generate, _) = results = loaded(root)
    (beside,) = [r for r in generate.rows if r.case == "64, beside one"]
    assert generate.verdict(beside).limit == pytest.approx(64 * generate.rows[0].us)
    assert "| 1.00 x one description | 1 x one description | yes |" in tables.generate(generate)
    assert "one description" not in tables.speed(*results).partition("\n\n")[0]  # the row with baselines is shown


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_deterministic(root, name):
    results = loaded(root, figures.FIGURES[name].sources)
    first, second = (figures.files(name, results, "stamp of the data") for _ in range(2))
    assert first == second and set(first) == {f"{name}.svg", f"{name}.png"}
    assert all(b"stamp of the data" in data for data in first.values())
