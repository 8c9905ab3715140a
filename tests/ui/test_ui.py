"""The page's functions without a browser, and the command that opens it."""

import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import t2l_engine as t2l

TASK, TEXT = "Write the second word.", "one two three"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fifty_adapters_in_a_row(page):
    """Memory is that of the slots: what an adapter needs, fifty times, is not added."""

    def answer(i):
        return list(page.answer(f"{TASK} {i}", TEXT, False, 1, []))[-1]

    for i in range(8):
        answer(i)
    before = resident()
    for i in range(8, 58):
        answer(i)
    assert resident() - before < 24e6  # an adapter in float32: 3.7 MB


def test_earlier_answers(page):
    *_, (table, times, history, shown, _) = page.answer(TASK, TEXT, True, 4, [["a", "b", "c"]])
    rows = ("base model, the input alone", f"base model, told: {TASK}", f"adapter: {TASK}")
    assert [row[:2] for row in history] == [*([TEXT, row] for row in rows), ["a", "b"]]
    assert shown == history and history[2][2] in table and "first token after" in times


def test_files_are_few(page):
    import gradio as gr

    from t2l_engine.serving.page import FILES, PEFT

    made = [page.file(TASK, PEFT) for _ in range(FILES + 2)]
    assert [Path(path).is_file() for path in made] == [False] * 2 + [True] * FILES
    for nothing in (None, ""):
        with pytest.raises(gr.Error, match="ask something first"):
            page.file(nothing, PEFT)


@pytest.fixture
def documents(document_checkpoint, tiny_llama, page):
    """A page for documents, on a tiny model."""
    from t2l_engine.serving.page import Page
    from t2l_engine.serving.side_by_side import SideBySide

    desk = SideBySide(t2l.TextToLoRA.from_pretrained(document_checkpoint), *tiny_llama, slots=2)
    yield Page(desk, page.save, title="Documents", max_new_tokens=8)
    desk.close()


def test_a_document(documents, tmp_path):
    """One text of several lines, as it was uploaded; the base model reads it too, if it fits."""
    import gradio as gr

    files, text = [str(tmp_path / name) for name in "abc"], "The code of the lock\nis 4417.\n"
    for file, content in zip(files, (text.encode(), b"\xff", b"x" * 800_001), strict=True):
        Path(file).write_bytes(content)
    assert documents.document(files[0]) == text
    *_, (table, times, history, _, chosen) = documents.answer(text, "what code", True, 4, [])
    who = "The code of the lock is 4417."
    assert [row[1] for row in history] == ["base model, the input alone", f"base model, told: {who}", f"adapter: {who}"]
    assert "1 new adapter" in times and f"adapter: {who}" in table and chosen.choices == [(who, text.strip())]
    *_, (table, _, history, _, _) = documents.answer("word " * 100, "what code", False, 4, [])
    assert len(history) == 2 and history[1][1] == "adapter: " + "word " * 39 + "word\u2026"
    labels = {getattr(block, "label", "") for block in documents.blocks([text], "what code").blocks.values()}
    assert {"Document, at most 200,000 characters", "Text file"} <= labels
    for call, message in (
        (lambda: next(documents.answer(" ", "a", True, 4, [])), "Document: expected a text, got none"),
        (lambda: next(documents.answer("x" * 200_001, "a", True, 4, [])), "Document: expected at most 200,000 char"),
        (lambda: list(documents.answer("word " * 100, "x " * 40, True, 4, [])), "with what the base model is told"),
        (lambda: list(documents.answer("word " * 200, "a", False, 4, [])), "expected chunks of at most the 128 tokens"),
        (lambda: documents.document(files[1]), "Document: not UTF-8 text"),
        (lambda: documents.document(files[2]), "Document: expected at most 800000 bytes, got more"),
    ):
        with pytest.raises(gr.Error, match=message):
            call()


def command(*arguments):
    return [sys.executable, "-m", "t2l_engine", "ui", *map(str, arguments)]


@pytest.fixture
def port():
    """One that is free, as the default need not be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_command(run, port):
    """It says where the page is, which answers, and ends when it is told to; a port in use is an error."""
    process = subprocess.Popen(command("--port", port), stderr=subprocess.PIPE, text=True)
    try:
        said = next(line for line in process.stderr if "the page is at" in line)
        url = re.search(r"http://\S+?(?=;)", said)[0]
        assert url == f"http://127.0.0.1:{port}" and "Text-to-LoRA" in urllib.request.urlopen(url).read().decode()
        code, _, err = run("ui", "--port", port)
        assert code == 1 and err.count("\n") == 1
        assert err.startswith(f"t2l: --host, --port: expected a free IPv4 address, got 127.0.0.1:{port}: Address already"), (
            err
        )
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_an_address_that_cannot_be_opened(run, port):
    code, _, err = run("ui", "--port", port, "--host", "::1")
    assert code == 1 and err.startswith("t2l: --host, --port: expected a free IPv4 address, got ::1:"), err
    assert err.count("\n") == 1
