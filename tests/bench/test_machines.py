"""Results of two classes of CPUs side by side: no run replaces another's, no page claims for one what the other has."""

import csv
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import harness
from bench.__main__ import app
from bench.records import OF_A_CPU, OURS, ResultError, cpu_class, load, read, stem
from bench.report import figures, pages
from bench.report.pages import Report
from bench.source import ROOT

OTHER = {"cpu": "Other(R) Chip(TM) 64-Core Processor @ 2.10GHz", "vendor": "GenuineIntel", "flags": ["amx_bf16", "avx2"]}
THERE = "Other Chip (amx)"
ONE = "mistral-7b L bfloat16, 1 description, 2 threads"


@pytest.fixture
def root(results_tree, monkeypatch):
    """Suites of the committed results on one machine, and half as fast on another, but for training steps."""
    monkeypatch.setattr(figures, "svg", figures.stamp)
    for path in (results_tree / pages.RESULTS).glob("*.intel-amx.jsonl"):
        path.unlink()
    for suite in ("generate", "apply", "icl", "costs"):
        (path,) = (results_tree / pages.RESULTS).glob(f"{suite}.*.jsonl")
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[0]["machine"] |= OTHER
        for row in harness.rows_of(found):
            row["times"][OURS]["median_us"] *= 2
        other = path.with_name(f"{stem(suite, found[0]['machine'])}.jsonl")
        other.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    return results_tree


def here(root):
    return Report(root).of(["train"])[0].machine


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vendor, flags, name",
    [
        ("GenuineIntel", ["amx_bf16", "avx512_bf16", "avx512f", "avx2"], "intel-amx"),
        ("AuthenticAMD", ["avx512_bf16", "avx512f", "avx2"], "amd-avx512_bf16"),
        ("AuthenticAMD", ["avx2"], "amd-avx2"),
        ("Other", [], "other-generic"),
    ],
)
def test_a_class_is_vendor_and_widest_instruction_set(vendor, flags, name):
    machine = {"vendor": vendor, "flags": flags}
    assert cpu_class(machine) == name
    assert (stem("generate", machine), stem("study", machine)) == (f"generate.{name}", "study")
    assert stem("generate", machine | {"gpu": "A card"}) == "generate-cuda"


def test_a_run_says_which_cpu_it_is(monkeypatch):
    text = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: f"{text}\nprocessor\t: 1\nmodel name\t: another\n")
    found = harness._cpu()
    assert found == {**dict(cpu="AMD EPYC", vendor="AuthenticAMD", family="26", model="2"), "flags": ["avx512f", "avx2"]}
    assert cpu_class(found) == "amd-avx512"


def test_a_run_without_cpuinfo_says_what_it_can(monkeypatch):
    monkeypatch.setattr(harness, "Path", lambda *_: Path("/no such file"))
    found = harness._cpu()
    assert found["cpu"] and found["vendor"] and found["flags"] == [] and cpu_class(found).endswith("-generic")


def test_a_whole_run_is_written_beside_those_of_other_machines(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("bench.__main__.RESULTS", tmp_path)
    monkeypatch.setattr(harness, "machine", lambda context: OTHER)
    monkeypatch.setattr(harness, "run", lambda *_, out, **__: seen.append(out) or [{"command": "", "record": "run"}])
    assert CliRunner().invoke(app, ["generate"], catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(app, ["generate", "--size", "tiny"], catch_exceptions=False).exit_code == 0
    assert seen == [tmp_path / "generate.intel-amx.jsonl", None]


def test_a_run_of_another_machine_is_refused_under_the_name_of_this(root):
    path = root / pages.RESULTS / "apply.intel-amx.jsonl"
    other = path.rename(path.with_name("apply.amd-avx2.jsonl"))
    with pytest.raises(ResultError, match="expected a run on amd-avx2, got one on intel-amx"):
        load(other)
    assert len(Report(root).problems) == 1


# --- pages -----------------------------------------------------------------------------------------------------------


def test_both_are_written_and_checked(root):
    assert Report(root).write() == [] and Report(root).check() == []


@pytest.mark.parametrize("name, each", [("generate", 86), ("lora", 30), ("icl-first", 18), ("model", 8)])
def test_tables_have_the_rows_of_both(root, name, each):
    lines = Report(root).lines(name)
    machines = [line["machine"] for line in lines]
    assert machines == [here(root)] * each + [THERE] * each and next(iter(lines[0])) == "machine"


def test_what_is_counted_stands_there_once(root):
    report = Report(root)
    assert "machine" not in report.lines("icl-costs")[0] and len(report.lines("icl-costs")) == 48
    counted = [line["machine"] for line in report.lines("icl-summary") if "counted" in line["what"]]
    assert counted == [None] * 6 and len(report.lines("icl-summary")) == 6 + 2 * 5


def test_a_target_is_met_where_it_is_on_every_machine(root):
    report = Report(root)
    every = {suite: report.of([suite]) for suite in ("generate", "apply", "icl", "train")}
    cases = {(suite, v.group, v.name, v.target) for suite, results in every.items() for r in results for v in r.verdicts()}
    missed = {(s, v.group, v.name, v.target) for s, rs in every.items() for r in rs for v in r.verdicts() if not v.met}
    line = report.lines("totals", {"suite": "all"})[0]
    assert (line["targets"], line["missed"]) == (len(cases), len(missed))
    by_machine = {(line["suite"], line["machine"]): line for line in report.lines("totals")}
    assert by_machine["generate", THERE]["missed"] > by_machine["generate", here(root)]["missed"]
    assert {line["machine"] for line in report.lines("misses")} == {here(root), THERE}
    assert ("train", THERE) not in by_machine


def test_the_readme_shows_where_it_is_worst(root):
    report = Report(root)
    row = report.row("generate", ONE)
    assert row.machine == THERE and not row.verdict.met
    assert report.row("train", "q,v, 128 tokens, bfloat16, 2 threads").machine == here(root)
    readme = report.texts()[Path("README.md")]
    cells = {line.split(" | ")[0]: line for line in readme.splitlines() if line.startswith("| ")}
    assert THERE in next(line for start, line in cells.items() if start.startswith("| Adapters for Mistral-7B"))
    training = next(line for start, line in cells.items() if start.startswith("| Training step"))
    assert here(root) in training and THERE not in training
    judged, kind = training.removesuffix(" |").split(" | ")[3:]
    assert judged.endswith(", met") and re.fullmatch(r"0\.965 x; [0-4] of 4", kind)


def test_each_figure_of_the_readme_is_of_the_machine_where_it_is_worst(root):
    """Slower there, but with a larger speedup, and nearer to its target."""
    path = root / pages.RESULTS / "generate.intel-amx.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in harness.rows_of(found):
        for name in row["times"].keys() - {OURS}:
            row["times"][name]["median_us"] *= 10
        if row["roofline"]:
            row["roofline"]["us"] *= 4
    path.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    report = Report(root)
    machines = [report.row("generate", ONE, by).machine for by in ("time", "eager", "target")]
    assert machines == [THERE, here(root), here(root)]
    (line,) = (text for text in report.texts()[Path("README.md")].splitlines() if text.startswith("| Adapters for"))
    for cell, machine, other in zip(line.split(" | ")[1:4], machines, [here(root), THERE, THERE], strict=True):
        assert machine in cell and other not in cell
    with pytest.raises(ResultError, match="no row '.*' with 'no such way'"):
        report.row("generate", ONE, "no such way")


def test_what_is_met_is_met_on_every_machine(root):
    path = root / pages.RESULTS / "generate.intel-amx.jsonl"
    (first,) = (root / pages.RESULTS).glob("generate.amd*")
    run, (_, *records) = (p.read_text(encoding="utf-8").splitlines(keepends=True) for p in (path, first))
    path.write_text("".join([run[0], *records]), encoding="utf-8")  # as fast as here
    (line,) = (text for text in Report(root).texts()[Path("README.md")].splitlines() if text.startswith("| Adapters for"))
    assert line.split(" | ")[3].endswith(", met")


def test_sentences_say_of_which_machine_they_are(root):
    page = Report(root).texts()[Path("docs/results/generating.md")]
    parts = page.split("## What it says of ")[1:]
    assert [part.partition("\n")[0] for part in parts] == [here(root), THERE]
    times = [part.partition("One adapter for Mistral-7B takes ")[2].split()[0] for part in parts]
    assert float(times[1]) == pytest.approx(2 * float(times[0]), rel=0.01)
    assert "| machine | dtype |" in page


def test_one_machine_alone_needs_no_column(results_tree, root):
    several = "the machine with the worst result"
    assert several in Report(root).texts()[Path("README.md")]
    for path in (root / pages.RESULTS).glob("*.intel-amx.jsonl"):
        path.unlink()
    report = Report(root)
    texts = report.texts()
    assert report.problems == [] and "| machine |" not in texts[Path("docs/results/generating.md")]
    assert several not in texts[Path("README.md")] and f"on {here(root)}" in texts[Path("README.md")]
    written = texts[Path("docs/results/tables/generate.csv")].splitlines()
    assert {line["machine"] for line in csv.DictReader(written)} == {here(root)}


def test_figures_tell_machines_apart(root):
    lines = Report(root).lines("model")
    assert figures._on_machines([line["case"] for line in lines], lines)[-1].endswith(THERE)
    assert figures._on_machines(["a"], [{"case": "a", "machine": "m"}]) == ["a"]


def test_files_of_every_suite_have_the_name_of_their_class():
    for path in (ROOT / pages.RESULTS).glob("*.jsonl"):
        name, _, of = path.stem.partition(".")
        assert bool(of) == (name in OF_A_CPU), path.name
        machine = read(path).run.get("machine") or {}
        assert not of or "flags" not in machine or of == cpu_class(machine)
