"""Pages, tables and figures from result files: nothing is edited by hand, nothing is old, results are checked."""

import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
from typer.testing import CliRunner

from bench import harness
from bench.__main__ import app
from bench.records import OURS, ROOT, ResultError, bundled, cpu_class, load, read, stem
from bench.report import cells, data, figures, icl, pages, quality, tables
from bench.report.pages import Report
from t2l_engine.research.evaluation.metrics import Interval

LORA = "serve_64x64, 1 thread, warm"


@pytest.fixture(scope="module")
def once_written(tmp_path_factory):
    """A tree with the committed results and what is made of them; figures are stamps, which cost no drawing."""
    root = tmp_path_factory.mktemp("written") / "tree"
    shutil.copytree(ROOT / data.FOLDER, root / data.FOLDER)
    for document in pages.BLOCKS:
        (root / document).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / document, root / document)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "svg", figures.stamp)
        assert Report(root).write() == []
    return root


@pytest.fixture
def written(once_written, tmp_path, monkeypatch):
    """A copy of it, to be changed."""
    monkeypatch.setattr(figures, "svg", figures.stamp)
    return shutil.copytree(once_written, tmp_path / "written")


def change(root, name, how):
    """Apply ``how`` to the list of a file's records, in place; returns its path."""
    path = root / data.FOLDER / name
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    how(found)
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    return path


APPLY = "apply.intel-amx.jsonl"


def row(found, case="serve_64x64", threads=1, cache="warm"):
    """The record of a row."""
    return next(r for r in found if (r.get("case"), r.get("threads"), r.get("cache")) == (case, threads, cache))


def test_committed_pages_are_what_the_results_give():
    assert Report().check() == []


def test_a_result_changes_what_shows_it(written):
    case = ("decode 8 rows, q,v, bfloat16", 2, None)
    change(written, APPLY, lambda found: row(found, *case)["times"][OURS].update(median_us=1e5))
    (written / pages.DRAWN / "serving.svg").unlink()
    (written / pages.PAGES / "old.md").touch()
    training = written / pages.PAGES / "training.md"  # edited by hand
    training.write_text(training.read_text(encoding="utf-8").replace("# Training", "# Learning"), encoding="utf-8")
    assert {problem.split(":")[0] for problem in Report(written).check()} == {
        *("README.md", "docs/results/index.md", "docs/results/applying.md", "docs/figures/decode.svg"),
        *("docs/figures/serving.svg", "docs/results/old.md", "docs/results/training.md"),
    }
    assert Report(written).write() == [] and Report(written).check() == []
    assert "| 100 ms |" in (written / "README.md").read_text(encoding="utf-8")


def test_nothing_is_written_where_something_is_wrong(written):
    before = (written / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    readme = written / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("<!-- speed: begin -->", "", 1), encoding="utf-8")
    change(written, APPLY, lambda found: found[0].update(date="2030-01-01"))
    (written / data.FOLDER / "learn.jsonl").unlink()
    problems = Report(written).write()
    assert any("README.md: markers of block 'speed' are missing" in problem for problem in problems)
    assert "results/training.md.j2: bench/results/learn.jsonl: missing" in problems
    assert (written / "docs" / "results" / "index.md").read_text(encoding="utf-8") == before


def test_templates_print_no_none(monkeypatch, tmp_path):
    (tmp_path / "page.md.j2").write_text("On {{ results('kernels')[0].machine }}")
    environment = pages._environment().overlay(loader=jinja2.FileSystemLoader(tmp_path))
    monkeypatch.setattr(pages, "_environment", lambda: environment)
    with pytest.raises(TypeError, match="None"):
        Report()._render("page.md.j2")


def test_figures_are_deterministic():
    found = data.Data()
    first, second = (figures.svg("serving", found) for _ in range(2))
    assert first == second and figures.stamp("serving", found) in first


@pytest.mark.parametrize("ask, says", [
    (lambda d: d.rows("none"), "bench/results/none.jsonl: missing"),
    (lambda d: d.rows("apply", "arm"), "bench/results/apply.arm.jsonl: missing"),
    (lambda d: d.row("apply", "intel-amx", tokens=64), "expected one row with {'tokens': 64}"),
    (lambda d: d.records("kernels", "kernel", arch="x"), "no record 'kernel' with {'arch': 'x'}"),
    (lambda d: cells.row_grid(d.rows("apply", "intel-amx"), ["case"]), "at most 8 columns and 12 lines"),
    (lambda d: tables.lines(d, "none"), "got 'none'"),
])  # fmt: skip
def test_what_is_not_there_is_refused_by_name(ask, says):
    with pytest.raises(ResultError, match=re.escape(says)):
        ask(data.Data())


def test_every_table_is_printed():
    found = data.Data()
    for name in tables.names(found):
        assert tables.to_terminal(name, tables.lines(found, name)).row_count
    lines = tables.lines(found, "apply.lora")
    assert {line["machine"] for line in lines} >= {"Intel Xeon (amx)", "AMD EPYC (avx512_bf16)"}
    shown = CliRunner().invoke(app, ["table", "apply.model"], catch_exceptions=False).output
    assert "decode 8 rows, q,v, float32" in shown and "1.05 x base" in shown and "threads: 2" in shown
    assert "quality" in CliRunner().invoke(app, ["table"], catch_exceptions=False).output.split()


def test_cells():
    assert [cells.number(x) for x in (1234.5, 12.345, 0.012345, 0, None)] == ["1,234", "12.3", "0.0123", "0", cells.GAP]
    assert [cells.duration(us) for us in (3.62, 1500, 2.5e6)] == ["3.62 us", "1.50 ms", "2.50 s"]
    assert cells.points(Interval(2.04, -0.01, 4.0)) == "+2.0 [+0.0, +4.0]"
    made = cells.grid(["a", "b", "c"], [["x", 2, True], ["y", None, "<"]])  # numbers are set to the right
    assert made == "| a | b | c |\n|---|---:|---|\n| x | 2 | yes |\n| y | – | &lt; |"


def test_the_best_baseline_does_the_same_work():
    found = data.Data()
    step = found.row("apply", "intel-amx", case="decode 8 rows, all linears, bfloat16")
    assert {"base", "merged", "PEFT single"} <= step.times.keys() and step.best == "PEFT mixed"
    assert step.target_text == "1.15 x base"
    lora = found.row("apply", "intel-amx", case="serve_64x64", threads=1, cache="warm")
    assert lora.target_text == "1.5 x roofline + 3 us"


def test_calls_from_the_host_are_compared_with_ours_called_so():
    us = {"ours": (True, 10.0), "ours, from the host": (False, 30.0), "graphed": (True, 20.0), "called": (False, 45.0)}
    times = {name: {"graph": graph, "median_us": median, "iqr_us": 0.0} for name, (graph, median) in us.items()}
    measured = data.Data().rows("apply")[0]
    object.__setattr__(measured, "times", times)
    assert measured.rivals() == {"graphed": 2.0, "called": 1.5}


def test_differences_are_of_tasks_that_both_methods_answered():
    found = {"a-1": {"x": 80.0, "y": 20.0}, "a-2": {"x": 60.0, "y": 20.0}, "b-1": {"x": 0.0}}
    assert quality.mean(found, "x") == pytest.approx(140 / 3) and quality.mean(found, "none") is None
    assert quality.gap(found, "x", "y").mean == 50 and quality.gap(found, "x", "none") is None
    of_families = {"a-1": {"x": 0.0, "y": 0.0}, "a-2": {"x": 0.0, "y": 0.0}, "b-1": {"x": 9.0, "y": 0.0}}
    over = quality.gap(of_families, "x", "y")
    assert (over.mean, over.low, over.high) == (3, 0, 9)  # of one family alone 0 or 9


def test_examples_in_the_prompt_are_compared_with_an_adapter():
    """Of two tasks: ICL takes 60 and 40 ms to the first token, T2L 10 once and 30."""
    arms = lambda icl, right: {  # noqa: E731
        name: {"accuracy": accuracy, "first_token_us": {"median": 1e3 * ms}}
        for name, accuracy, ms in (("icl", 40.0, icl), ("icl-warm", 40.0, 36.0), ("t2l-task", right, 30.0))
    }
    about = {"generate_us": 1e4, "tokens": {"icl": 90, "t2l": 20}}
    tasks = [{"arms": arms(icl, right), **about} for icl, right in ((60, 70), (40, 30))]
    found = icl.measured(tasks)
    assert (found["first"], found["later"], found["accuracy"]) == ((50, 40), (36, 30), (40, 50))
    assert found["tokens"] == "90 against 20 tokens"
    lines = {(line["what"], line["lengths"]): line for line in tables.lines(data.Data(), "prompt-or-adapter")}
    paper = lines["Mistral-7B, counted, TFLOP", "59 + 3 x 80 tokens"]
    assert paper["ICL / T2L"] == pytest.approx(4.9, abs=0.01)  # the paper: 4.88


def _after(found):
    return next(r for r in found if r["record"] == "ceiling" and r["when"] == "after")


@pytest.mark.parametrize("how, says", [
    (lambda r: row(r)["error"].update(value=0.1), f"{LORA}: error 0.1 is beyond its bound"),
    (lambda r: row(r)["error"].update(value=float("nan")), "error nan is beyond its bound"),
    (lambda r: r.append(row(r)), f"{LORA}: two rows"),
    (lambda r: r[0].update(size="tiny"), "got suite 'apply' of size 'tiny'"),
    (lambda r: r[0].update(dirty=True), "uncommitted changes"),
    (lambda r: r[0].update(command="python -m bench apply --only 8x8"), "expected a whole suite"),
    (lambda r: r[0].update(tasks=["lora", "model"]), "without: lora, model"),
    (lambda r: r[0]["machine"].update(flags=["avx2"]), "expected a run on intel-amx, got one on intel-avx2"),
    (lambda r: row(r).pop("times"), "TypeError: Row.__init__() missing 1 required positional argument: 'times'"),
    (lambda r: r.remove(_after(r)), "was not measured again"),
    (lambda r: r.pop(0), "KeyError: 'suite'"),
], ids="error nan doubled tiny dirty part unended machine broken ceiling headless".split())  # fmt: skip
def test_broken_results_are_refused(once_written, tmp_path, how, says):
    shutil.copytree(once_written / data.FOLDER, tmp_path / data.FOLDER)
    path = change(tmp_path, APPLY, how)
    with pytest.raises(ResultError, match=f"{path.name}: .*{re.escape(says)}"):
        load(path)
    assert [problem for problem in data.Data(tmp_path).problems if says in problem]


def test_results_of_another_checkpoint_or_of_no_machine_are_refused(once_written, tmp_path):
    folder = tmp_path / data.FOLDER
    shutil.copytree(once_written / data.FOLDER, folder)
    (folder / APPLY).rename(folder / "apply.jsonl")
    other = "0" * 64
    path = change(tmp_path, "quality.jsonl", lambda found: (found[0].update(checkpoint=other), found[1].update(paper=other)))
    assert bundled() not in path.read_text(encoding="utf-8")
    refused = [problem.split(":")[0] for problem in data.Data(tmp_path).problems]
    assert refused == ["bench/results/apply.jsonl", "bench/results/quality.jsonl"]


@pytest.mark.parametrize("vendor, flags, name", [
    ("GenuineIntel", ["amx_bf16", "avx512_bf16", "avx512f", "avx2"], "intel-amx"),
    ("AuthenticAMD", ["avx2"], "amd-avx2"),
    ("Other", [], "other-generic"),
])  # fmt: skip
def test_a_class_of_cpus_is_vendor_and_widest_instruction_set(vendor, flags, name):
    machine = {"vendor": vendor, "flags": flags}
    assert cpu_class(machine) == name
    assert (stem("generate", machine), stem("quality", machine)) == (f"generate.{name}", "quality")
    assert stem("generate", machine | {"gpu": "A card"}) == "generate-cuda"


def test_a_run_says_which_cpu_it_is(monkeypatch):
    text = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: f"{text}\nprocessor\t: 1\nmodel name\t: another\n")
    found = harness._cpu()
    assert found == {"cpu": "AMD EPYC", "vendor": "AuthenticAMD", "flags": ["avx512f", "avx2"]}
    monkeypatch.undo()
    monkeypatch.setattr(harness, "Path", lambda *_: Path("/no such file"))
    assert cpu_class(harness._cpu()).endswith("-generic")


def test_a_whole_run_never_replaces_that_of_another_machine(tmp_path, monkeypatch):
    seen = []
    machine = {"cpu": "Other(R) Chip(TM) 64-Core Processor @ 2.10GHz", "vendor": "GenuineIntel", "flags": ["amx_bf16"]}
    monkeypatch.setattr("bench.__main__.RESULTS", tmp_path)
    monkeypatch.setattr(harness, "machine", lambda context: machine)
    monkeypatch.setattr(harness, "run", lambda *_, out, **__: seen.append(out) or [{"command": "", "record": "run"}])
    for options in ([], ["--size", "tiny"]):
        assert CliRunner().invoke(app, ["generate", *options], catch_exceptions=False).exit_code == 0
    assert seen == [tmp_path / "generate.intel-amx.jsonl", None]
    head = {"record": "run", "suite": "generate", "machine": machine}
    (tmp_path / "generate.intel-amx.jsonl").write_text(json.dumps(head) + "\n")
    assert read(tmp_path / "generate.intel-amx.jsonl").machine == "Other Chip (amx)"


def test_runs_on_a_gpu_are_shown(written):
    page = written / "docs" / "results" / "cuda.md"
    assert "No GPU has run these kernels" in page.read_text(encoding="utf-8")
    shutil.copy(written / data.FOLDER / APPLY, written / data.FOLDER / "apply-cuda.jsonl")

    def on_a_card(found):
        found[0] |= {"device": "cuda", "tasks": ["lora", "model"], "machine": found[0]["machine"] | {"gpu": "A card"}}
        found.append({"record": "task", "name": "lora", "seconds": 1.0})
        found.append({"record": "failed", "case": "decode", "error": "out of memory"})
        found.remove(_after(found))

    change(written, "apply-cuda.jsonl", on_a_card)
    assert Report(written).write() == []
    text = page.read_text(encoding="utf-8")
    assert "No GPU" not in text and all(t in text for t in ("A card", "Not measured: model", "decode: out of memory"))
