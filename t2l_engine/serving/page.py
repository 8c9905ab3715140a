"""The page in the browser: adapters of sentences or a document answer an input beside the base model.  Needs Gradio."""

from __future__ import annotations

import html
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from t2l_engine.files.errors import ConfigError
from t2l_engine.files.text import headline, read_text
from t2l_engine.serving.side_by_side import Answers, Row, SideBySide

#: Most characters of a description, a document and an input.
MAX_DESCRIPTION, MAX_DOCUMENT, MAX_INPUT = 1000, 200_000, 4000
#: Files kept for downloads; seconds for which Gradio keeps its copies of them.
FILES, KEEP_COPIES = 8, 3600
#: Most questions that wait, and rows of earlier answers.
WAITING, HISTORY = 32, 50
PEFT, GGUF = "PEFT folder (.zip)", "GGUF file for llama.cpp"

_STYLE = """
.answers { width: 100%; border-collapse: collapse; table-layout: fixed; border: none !important; }
.answers tr, .answers td { border: none !important; }
.answers td { padding: .5rem .75rem; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.answers td:first-child { width: 46%; color: var(--body-text-color); opacity: .75; }
.answers td:last-child { font-family: var(--font-mono); }
"""


class Page:
    """The functions that the page's elements call; :meth:`blocks` lays the elements out.

    For an engine that reads documents, what is called a description is a document, one a question.

    Args:
        desk: answers.
        save: writes the adapter of a description to a folder in PEFT's format, or to FILE.gguf.
        title: names checkpoint and base model.
        max_new_tokens: limit of an answer's length.
    """

    def __init__(self, desk: SideBySide, save: Callable[[str, Path], None], *, title: str, max_new_tokens: int = 256):
        self.desk, self.save, self.title, self.max_new_tokens = desk, save, title, max_new_tokens
        self._files = tempfile.TemporaryDirectory(prefix="t2l-ui-")  # removed with this object
        self._folders: deque[Path] = deque()

    def answer(
        self, descriptions: str, text: str, beside: bool, tokens: float, history: list[list[str]]
    ) -> Iterator[tuple[str, str, list[list[str]], list[list[str]], Any]]:
        """(table of answers, times, history for the session and its table, choices for a download), after every token."""
        wanted = self.descriptions(descriptions)
        if not text.strip():
            raise gr.Error("Input: expected a text, got none.")
        if len(text) > MAX_INPUT:
            raise gr.Error(f"Input: expected at most {MAX_INPUT:,} characters, got {len(text):,}.")
        rows = [Row(), *(Row(d) for d in wanted if beside), *(Row(d, adapted=True) for d in wanted)]
        last: Answers | None = None
        kept = gr.skip(), gr.skip(), gr.skip()
        yield _table(rows, [""] * len(rows), "waiting"), "", *kept
        answers = self.desk.answers(text, rows, max_new_tokens=int(tokens))
        try:
            for last in answers:
                yield _table(rows, last.texts, "answering"), last.times, *kept
        except ValueError as error:
            yield _table(rows, [""] * len(rows), "not answered"), "", *kept
            raise gr.Error(str(error)) from None
        finally:
            answers.close()  # the tab may have been closed
        if last is not None:
            new = [[text, _who(row), answer] for row, answer in zip(rows, last.texts, strict=True)]
            history = [*new, *history][:HISTORY]
            choices = gr.Dropdown([(headline(one), one) for one in wanted], value=wanted[0])
            yield _table(rows, last.texts, "done"), last.times, history, history, choices

    def descriptions(self, text: str) -> list[str]:
        """The lines of ``text``, or the document that it is; gr.Error for none, too many or too long ones."""
        documents = self.desk.documents
        box, most, of = ("Document", MAX_DOCUMENT, "") if documents else ("Task descriptions", MAX_DESCRIPTION, " a line")
        lines = [text] if documents else text.splitlines()
        found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not found:
            raise gr.Error(f"{box}: expected {'a text' if documents else 'at least one line'}, got none.")
        if len(found) > self.desk.slots:
            raise gr.Error(f"{box}: expected at most {self.desk.slots} lines, got {len(found)}.")
        for line in found:
            if len(line) > most:
                raise gr.Error(f"{box}: expected at most {most:,} characters{of}, got {len(line):,}.")
        return found

    @staticmethod
    def document(file: str) -> str:
        """The text of an uploaded file; gr.Error for one that is too large or no UTF-8."""
        try:
            return read_text(Path(file), 4 * MAX_DOCUMENT)
        except ConfigError as error:
            raise gr.Error(f"Document: {str(error).removeprefix(f'{file}: ')}.") from None

    def file(self, description: str | None, form: str) -> str:
        """A new file with the adapter of ``description``; Gradio serves a copy of it."""
        if not description:
            raise gr.Error("Download: expected an adapter that has answered; ask something first.")
        description = self.descriptions(description)[0]
        folder = Path(tempfile.mkdtemp(dir=self._files.name))
        self._folders.append(folder)
        while len(self._folders) > FILES:
            shutil.rmtree(self._folders.popleft())
        try:
            if form == GGUF:
                self.save(description, target := folder / "adapter.gguf")
            else:
                self.save(description, folder / "adapter")
                target = Path(shutil.make_archive(str(folder / "adapter"), "zip", folder / "adapter"))
        except (ValueError, OSError) as error:
            raise gr.Error(str(error)) from None
        return str(target)

    def blocks(self, descriptions: Sequence[str], text: str) -> gr.Blocks:
        """The page, with ``descriptions`` and input ``text`` filled in."""
        name, told, label = "Text-to-LoRA", "each description", f"Task descriptions, one a line, at most {self.desk.slots}"
        if self.desk.documents:
            name, told, label = "Doc-to-LoRA", "the document", f"Document, at most {MAX_DOCUMENT:,} characters"
        with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(KEEP_COPIES, KEEP_COPIES)) as blocks:
            gr.Markdown(f"## {name}\n{self.title}")
            history = gr.State([])
            with gr.Row():
                with gr.Column():
                    tasks = gr.Textbox("\n".join(descriptions), label=label, lines=4, elem_id="descriptions")
                    if self.desk.documents:
                        upload = gr.File(label="Text file", file_types=[".txt", ".md"], height=90, elem_id="upload")
                        upload.upload(self.document, [upload], [tasks])
                    given = gr.Textbox(text, label="Input", lines=2, elem_id="input")
                    beside = gr.Checkbox(True, label=f"Ask the base model too, with {told} in its prompt")
                    tokens = gr.Slider(
                        1, self.max_new_tokens, min(32, self.max_new_tokens), step=1, label="Longest answer, tokens",
                        elem_id="tokens",
                    )  # fmt: skip
                    with gr.Row():
                        ask = gr.Button("Answer", variant="primary", elem_id="answer")
                        stop = gr.Button("Stop", elem_id="stop")
                with gr.Column():
                    answers = gr.HTML(elem_id="answers")
                    times = gr.Markdown(elem_id="times")
            with gr.Tab("Download"):
                chosen = gr.Dropdown(label="Adapter", choices=[], elem_id="chosen")
                form = gr.Radio([PEFT, GGUF], value=PEFT, label="Format", elem_id="format")
                make = gr.Button("Make the file", elem_id="make")
                made = gr.File(label="File", elem_id="file", interactive=False)
            with gr.Tab("Earlier answers"):
                earlier = gr.Dataframe(headers=["input", "by", "answer"], elem_id="earlier", interactive=False, wrap=True)
            one_by_one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "desk"}  # others wait in Gradio's queue
            running = gr.on(
                [ask.click, given.submit], self.answer, [tasks, given, beside, tokens, history],
                [answers, times, history, earlier, chosen], show_progress="minimal", trigger_mode="once", **one_by_one,
            )  # fmt: skip
            stop.click(None, cancels=[running])
            make.click(self.file, [chosen, form], [made], **one_by_one)
        return blocks.queue(max_size=WAITING)

    @staticmethod
    def launch_options() -> dict[str, Any]:
        """For ``launch``: a theme that loads nothing from elsewhere."""
        fonts = ["system-ui", "sans-serif"]
        theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
        off = {"footer_links": [], "share": False, "show_error": False, "ssr_mode": False}
        return {"theme": theme, "css": _STYLE, "max_file_size": 4 * MAX_DOCUMENT, **off}


def _who(row: Row) -> str:
    if row.adapted:
        return f"adapter: {headline(row.description)}"
    return f"base model, told: {headline(row.description)}" if row.description else "base model, the input alone"


def _table(rows: Sequence[Row], texts: Sequence[str], state: str) -> str:
    cells = [(html.escape(_who(row)), html.escape(text)) for row, text in zip(rows, texts, strict=True)]
    lines = "".join(f"<tr><td>{who}</td><td>{said}</td></tr>" for who, said in cells)
    return f'<table class="answers">{lines}</table><p id="state">{state}</p>'
