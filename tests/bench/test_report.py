"""Pages, tables and figures from result files: nothing is edited by hand, nothing is old, no loss is left out."""

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest

from bench.records import Result, ResultError, load, memory_verdict, read
from bench.report import cells, figures, pages, tables
from bench.report.pages import Report
from bench.source import ROOT, bundled
from tests.bench.committed import copy_results

LORA, DECODE = "serve_64x64, 1 thread, warm", "decode 8 rows, q,v, float32"
MANY = "mistral-7b M bfloat16, 64 descriptions"


@pytest.fixture
def root(results_tree):
    return results_tree


@pytest.fixture(scope="module")
def once_written(tmp_path_factory):
    """A tree as ``root``'s, written, with figures that cost no drawing."""
    root = copy_results(tmp_path_factory.mktemp("written") / "tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "svg", figures.stamp)
        assert Report(root).write() == []
    return root


@pytest.fixture
def written(once_written, tmp_path, monkeypatch):
    """A copy of it, to be changed."""
    monkeypatch.setattr(figures, "svg", figures.stamp)
    return shutil.copytree(once_written, tmp_path / "written")


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def result_file(root, name):
    """The one of this suite."""
    (path,) = (path for path in (root / pages.RESULTS).iterdir() if path.name.partition(".")[0] == name)
    return path


def change(root, name, how):
    """Apply ``how`` to the list of a file's records, in place."""
    path = result_file(root, name)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    how(found)
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")


def row(found, case="serve_64x64", threads=1, cache="warm"):
    """The record of a row."""
    return next(r for r in found if (r.get("case"), r.get("threads"), r.get("cache")) == (case, threads, cache))


def problems(root, text):
    return [problem for problem in Report(root).check() if text in problem]


# --- what is written is what the results give ------------------------------------------------------------------------


def test_written_is_checked(written):
    assert Report(written).check() == []


def test_committed_pages_are_what_the_results_give():
    assert Report().check() == []


@pytest.mark.parametrize(
    "document", ["README.md", "docs/results/index.md", "docs/results/applying.md", "docs/results/tables/lora.csv"]
)
def test_hand_edit_is_found(written, document):
    text = (written / document).read_text(encoding="utf-8")
    begin = text.index("<!-- speed: begin") if document == "README.md" else 0
    figure = re.compile(r"\d\.\d\d").search(text, begin)
    (written / document).write_text(text[: figure.start()] + "9.99" + text[figure.end() :], encoding="utf-8")
    assert [problem.split(":")[0] for problem in Report(written).check()] == [document]


def test_a_value_that_a_result_lacks_is_not_printed(written, tmp_path_factory, monkeypatch):
    templates = tmp_path_factory.mktemp("templates")
    (templates / "results").mkdir()
    (templates / "results" / "page.md.j2").write_text("On {{ results['specs'][0].machine }}")
    environment = pages._environment().overlay(loader=jinja2.FileSystemLoader(templates))
    monkeypatch.setattr(pages, "_environment", lambda: environment)
    with pytest.raises(TypeError, match="None"):
        Report(written)._render("results/page.md.j2")


def test_markers_of_blocks(written):
    before = (written / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    change(written, "generate", lambda found: found[0].update(date="2030-01-01"))
    edit(written / "README.md", "<!-- speed: begin -->", "<!-- speed: begin -->\n<!-- speed: begin -->")
    (problem,) = Report(written).write()
    assert "README.md" in problem and "'speed'" in problem
    assert (written / "docs" / "results" / "index.md").read_text(encoding="utf-8") == before  # nothing is written


def test_what_nothing_makes_is_found_and_removed(written):
    strange = [written / pages.DRAWN / "old.svg", written / pages.PAGES / "tables" / "old.csv"]
    for path in strange:
        path.touch()
    assert len(problems(written, "nothing makes this file")) == 2
    assert Report(written).write() == [] and not any(path.exists() for path in strange)


def test_missing_result_is_named_once(written):
    result_file(written, "apply").unlink()
    assert Report(written).check() == ["bench/results/apply.*.jsonl: missing; run: python -m bench apply"]


def test_a_file_of_no_known_name_is_found(written):
    shutil.copy(result_file(written, "apply"), written / pages.RESULTS / "apply.jsonl")  # of which machine?
    assert Report(written).check() == ["bench/results/apply.jsonl: the name of no result"]


@pytest.mark.parametrize("name", pages.BUNDLED)
def test_results_of_another_checkpoint_are_found(written, name):
    path = result_file(written, name)
    edit(path, bundled(), "0" * 64)
    assert problems(written, f"bench/results/{path.name}: not of the bundled checkpoint")


def test_stale_figures_are_found(written):
    change(written, "apply", lambda found: row(found, DECODE, 2, None)["times"]["base"].update(median_us=1.0))
    (written / pages.DRAWN / "training.svg").unlink()
    old = "docs/figures/decode.svg: older than its data or drawing; run: python -m bench report"
    assert problems(written, "docs/figures") == [old, "docs/figures/training.svg: missing; run: python -m bench report"]


def test_figures_follow_their_code(written, monkeypatch):
    monkeypatch.setattr(figures, "__file__", __file__)
    assert len(problems(written, "older than its data or drawing")) == len(Report(written).figures)


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_figures_are_deterministic_and_on_a_page(name):
    lines = Report().lines(figures.FIGURES[name][1])
    first, second = (figures.svg(name, lines) for _ in range(2))
    assert first == second and figures.stamp(name, lines) in first
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / pages.PAGES).glob("*.md")]
    assert sum(f"(../figures/{name}.svg)" in text for text in texts) == 1
    assert all(text.count("](../figures/") <= 1 for text in texts)


def test_every_table_is_a_csv_that_a_page_links(written):
    texts = "".join(path.read_text(encoding="utf-8") for path in (written / pages.PAGES).glob("*.md"))
    for name in Report(written).tables:
        path = written / pages.PAGES / "tables" / f"{name}.csv"
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        assert len(lines) > 1 and len({len(line) for line in lines}) == 1
        assert f"(tables/{name}.csv)" in texts, name


# --- what pages may ask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda r: r.grid("none", ["us"]), "'none'"),
        (lambda r: r.grid("lora", ["no such"]), "'no such'"),
        (lambda r: r.grid("lora", ["us"], {"tokens": 3}), "'tokens': 3"),
        (lambda r: r.grid("lora", ["us"]), "at most 8 columns and 15 lines"),
        (lambda r: r.grid("lora", {f"us {i}": "us" for i in range(9)}, first=1), "at most 8 columns and 15 lines"),
        (lambda r: r.value("lora", "us", {"tokens": 64}), "expected one"),
        (lambda r: r.value("generate", "over eager", {"case": f"{MANY}, beside one"}), "eager"),
    ],
)
def test_what_is_not_there_is_refused_by_name(root, ask, says):
    with pytest.raises(ResultError, match=re.escape(says)):
        ask(Report(root))


def test_a_page_without_its_row_is_a_problem(written):
    change(written, "apply", lambda found: found.remove(row(found)))
    assert {"results/applying.md.j2", "speed.md.j2"} <= {problem.split(":")[0] for problem in Report(written).write()}


def test_a_table_is_printed(capsys):
    pages.show("model")
    shown = capsys.readouterr().out
    assert DECODE in shown and "57.5" in shown and "threads: 2" in shown
    with pytest.raises(ResultError, match="expected one of adapt, .*; got 'none'"):
        pages.show("none")


def test_cells():
    assert [cells.number(x) for x in (1234.5, 12.345, 0.012345, 0, None)] == ["1,234", "12.3", "0.0123", "0", cells.GAP]
    assert [cells.duration(us) for us in (3.62, 1500, 2.5e6)] == ["3.62 us", "1.50 ms", "2.50 s"]
    shown = ["yes", "**no**", "2.00 x", "**0.500 x**"]
    assert [cells.cell(v) for v in (True, False, cells.Times(2), cells.Times(0.5))] == shown
    marked = {"yes, within noise": "yes, within noise", "no": "**no**", "no, within noise": "**no**, within noise"}
    assert [cells.cell(cells.Met(text)) for text in marked] == list(marked.values())
    texts = ["yes", "", "1.235", "123457", "x", "5 -"]
    assert [cells.plain(v) for v in (True, None, 1.23456, 123456.7, "x", [5, None])] == texts
    made = cells.grid(["a", "b", "c"], [["1 x", 2, True], ["3", None, False]])  # numbers are set to the right
    assert made == "| a | b | c |\n|---|---:|---|\n| 1 x | 2 | yes |\n| 3 | – | **no** |"


def test_lines_of_records():
    entry = {"record": "k", "model": "m", "shots": [0, 1], "ratio": {"icl": [3.0, 4.0]}, "cosines": [1, 2, 3]}
    result = Result(Path("x.jsonl"), {}, (), {"k": [entry]})
    assert tables.each("k", "cosines")(result) == [{"model": "m", "shots": [0, 1], "ratio icl": [3.0, 4.0]}]
    lines = [{"model": "m", "shots": 0, "ratio icl": 3.0}, {"model": "m", "shots": 1, "ratio icl": 4.0}]
    assert list(tables.series("k", "cosines")(result)) == lines


def test_lines_that_differ_have_the_headings_of_all():
    made = tables.Table("t", "", (), lambda: [{"a": 1, "c": 2}, {"a": 3, "b": 4, "c": 5}, {"d": 6}])
    heads, none = ["d", "a", "b", "c"], None
    expected = [[none, 1, none, 2], [none, 3, 4, 5], [6, none, none, none]]
    assert made.lines([]) == [dict(zip(heads, values, strict=True)) for values in expected]
    with pytest.raises(ResultError, match="nothing for table 't'"):
        tables.Table("t", "", (), lambda: []).lines([])


# --- targets, misses and losses --------------------------------------------------------------------------------------


def test_misses_are_the_unmet_targets(root):
    change(root, "generate", lambda found: [r.update(peak_mib=5000.0) for r in found if r["record"] == "memory"])
    report = Report(root)
    judged = [v for results in report.results.values() for result in results for v in result.verdicts()]
    missed = [v for v in judged if v.value > v.limit]
    lines = report.lines("misses")
    assert sorted((line["group"], line["case"]) for line in lines) == sorted((v.group, v.name) for v in missed)
    assert lines[0]["group"] == "memory" and lines[0]["over by %"] == pytest.approx(100 * (5000 / 521.9 / 1.2 - 1))
    assert [line["over by %"] for line in lines] == sorted((line["over by %"] for line in lines), reverse=True)
    assert report.value("totals", "missed", {"suite": "all"}) == len(missed)


def test_groups_name_the_case_farthest_from_its_target(root):
    report = Report(root)
    lines, worst = report.lines("groups"), report.lines("misses")[0]
    every = report.lines("totals", {"suite": "all"})[0]
    assert sum(line["targets"] for line in lines) == every["targets"]
    assert sum(line["targets"] - line["met"] for line in lines) == every["missed"]
    assert {line["group"]: line["case"] for line in lines}[worst["group"]] == worst["case"]


def test_a_target_within_noise_is_marked(root):
    def near(found):
        one = row(found, DECODE, 2, None)["times"]
        one["ours"] |= {"median_us": 1.06 * one["base"]["median_us"], "iqr_us": 0.02 * one["base"]["median_us"]}

    change(root, "apply", near)
    assert Report(root).value("model", "verdict", {"case": DECODE}) == "no, within noise"
    assert Report(root).lines("misses", {"case": f"{DECODE}, 2 threads"})[0]["within noise"]


def test_a_loss_reaches_the_readme(root):
    before = Report(root).lines("totals", {"suite": "all"})[0]
    ours = Report(root).row("apply", LORA).us
    change(root, "apply", lambda found: row(found)["times"]["mm loop"].update(median_us=ours / 2))
    report = Report(root)
    assert report.lines("losses")[0]["baseline"] == "mm loop" and report.lines("losses")[0]["ours / baseline"] == 2
    assert report.lines("beaten", {"baseline": "mm loop"})[0]["case"] == LORA
    assert report.lines("totals", {"suite": "all"})[0]["lost"] == before["lost"] + 1
    assert f"faster in {before['lost'] + 1} of {before['comparisons']}" in report.texts()[Path("README.md")]


def test_the_model_without_adapters_is_nobodys_competitor():
    names = {name for result in Report().of(["generate", "apply"]) for r in result.rows for name in r.rivals()}
    assert "PEFT mixed" in names and not {"base", "fresh output"} & names


def test_skipped_baselines_say_why(root):
    why = "holds one adapter; the batch has several"
    assert Report(root).value("linear", "skipped", {"case": "linear_64x64"}) == f"merged: {why}; PEFT single: {why}"


def test_targets_of_what_a_row_holds(root):
    report, many = Report(root), "mistral-7b L bfloat16, 64 descriptions, beside one, 2 threads"
    one, lora = report.row("generate", "mistral-7b L bfloat16, 1 description, 2 threads"), report.row("apply", LORA)
    assert one.verdict.limit == pytest.approx(one.target["ratio"] * one.roofline["us"])
    assert report.row("generate", many).verdict.limit == pytest.approx(64 * one.us)
    assert lora.verdict.limit == pytest.approx(1.5 * lora.roofline["us"] + 3)


def test_memory_of_training_steps_is_judged_by_the_hooks():
    entry = {"record": "train_memory", "case": "c", "ways": {"ours": {"peak_mib": 80.0}, "hooks": {"peak_mib": 100.0}}}
    assert memory_verdict(entry) is None
    assert memory_verdict(entry | {"target": {"ratio": 1.25}}).met
    assert not memory_verdict(entry | {"target": {"ratio": 1.26}}).met


def test_calls_from_the_host_are_compared_with_ours_called_so():
    us = {"ours": (True, 10.0), "ours, from the host": (False, 30.0), "graphed": (True, 20.0), "called": (False, 45.0)}
    times = {name: {"graph": graph, "median_us": median, "iqr_us": 0.0} for name, (graph, median) in us.items()}
    measured = dataclasses.replace(Report().row("apply", LORA), times=times)
    assert measured.rivals() == {"graphed": 2.0, "called": 1.5}


# --- what is not believed --------------------------------------------------------------------------------------------


def _after(found):
    return next(r for r in found if r["record"] == "ceiling" and r["when"] == "after")


@pytest.mark.parametrize(
    "how, says",
    [
        (lambda r: row(r)["error"].update(value=0.1), f"{LORA}: error 0.1 is beyond its bound"),
        (lambda r: row(r)["error"].update(value=float("nan")), "error nan is beyond its bound"),
        (lambda r: r.append(row(r)), f"{LORA}: two rows"),
        (lambda r: r[0].update(size="tiny"), "got suite 'apply' of size 'tiny'"),
        (lambda r: r[0].update(suite="train"), "got suite 'train'"),
        (lambda r: r[0].update(device="cuda"), "on 'cuda'"),
        (lambda r: r[0].update(dirty=True), "uncommitted changes"),
        (lambda r: r[0].update(command="python -m bench apply --only 8x8"), "expected a whole suite"),
        (lambda r: r[0].update(tasks=["lora", "model"]), "without: lora, model"),
        (lambda r: row(r).update(target={"ratio": 1.0, "of": "base"}), "a target of 'base', which the file does not hold"),
        (lambda r: row(r).pop("times"), "TypeError: Row.__init__() missing 1 required positional argument: 'times'"),
        (lambda r: r.remove(_after(r)), "was not measured again"),
        (lambda r: r.pop(0), "KeyError: 'suite'"),
    ],
    ids="error nan doubled tiny suite device dirty part unended target broken ceiling headless".split(),
)
def test_results_are_not_just_believed(root, how, says):
    change(root, "apply", how)
    path = result_file(root, "apply")
    with pytest.raises(ResultError, match=f"{path.name}: .*{re.escape(says)}"):
        load(path)
    assert any(problem.startswith(f"bench/results/{path.name}") and says in problem for problem in Report(root).problems)


# --- a card ----------------------------------------------------------------------------------------------------------


def test_no_number_of_a_card_without_a_run(written):
    assert "No run on a card is on record" in (written / "docs" / "results" / "cuda.md").read_text(encoding="utf-8")
    assert not [name for name in Report(written).tables if "-cuda" in name]


def test_runs_of_a_card_are_shown_by_the_same_tables(root):
    shutil.copy(result_file(root, "apply"), root / pages.RESULTS / "apply-cuda.jsonl")

    def carded(found):
        found[0] |= {"device": "cuda", "tasks": ["lora", "model"], "machine": found[0]["machine"] | {"gpu": "A card"}}
        found.append({"record": "task", "name": "lora", "seconds": 1.0})
        found.append({"record": "failed", "case": "decode", "error": "out of memory"})
        found.append({"record": "energy", "case": "idle", "unit": None, "count": 0, "watts": 71.5})
        found.remove(_after(found))

    change(root, "apply-cuda", carded)
    counters = {"record": "profile", "case": "apply", "kernel": "lora_kernel", "us": 1.0, "stalls": {"barrier": 2.5}}
    counters |= dict.fromkeys(("dram_percent", "l2_percent", "l2_hits_percent", "tensor_percent", "issue_percent"), 50.0)
    head = read(result_file(root, "apply-cuda")).run | {"suite": "profile", "tasks": []}
    lines = [head, counters]
    (root / pages.RESULTS / "profile-cuda.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = Report(root)
    page = report.texts()[Path("docs/results/cuda.md")]
    assert report.problems == [] and "lora-cuda" in report.tables and "generate-cuda" not in report.tables
    texts = ("A card", "Not measured: model", "decode: out of memory", "| 71.5 |", "barrier 2.5")
    assert all(text in page for text in texts)
    assert "No run on a card" not in page
