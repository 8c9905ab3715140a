"""``t2l chat``: interactive use of a base model with the adapter of a description or document, which can be changed."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from t2l_engine.cli.common import BaseDType, EngineOptions, named, say, standard_input
from t2l_engine.cli.desk import Desk, open_desk
from t2l_engine.files.errors import short_repr
from t2l_engine.files.text import headline, is_unicode
from t2l_engine.serving.side_by_side import Row

HELP = """\
Every line is an input; its answer goes to standard output.  Lines are independent: adapters are trained on single inputs.
  /task TEXT        use the adapter of another description
  /task name: TEXT  add one under a name in small letters, and use it; /task name uses it again
  /document FILE    as /task, with the text of a file, for a checkpoint that reads documents; or /document name: FILE
  /tasks            print names and descriptions
  /base             answer the last input again with the base model, without adapter and description
  /both             answer the last input again with the base model and all tasks, in one batch
  /save PATH        write the adapter in use as a PEFT folder, or to FILE.gguf
  /help             print this text
  /quit             quit; so do Ctrl-D and Ctrl-C
Begin a line with // for an input that begins with /."""

COMMANDS = list(dict.fromkeys(re.findall(r"^  (/\w+)", HELP, re.MULTILINE)))
#: Adapters in memory: the most tasks of a session.
SLOTS = 8
#: The task without a name of its own, and the base model.
TASK, BASE = "task", "base"
#: /task NAME: TEXT.  Names are lower case, since sentences begin with a capital letter.
_NAMED = re.compile(r"([a-z0-9_-]{1,16}):\s+(\S.*)")
_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))


class Chat:
    """Inputs and commands, line by line.

    ``interactive``: False: every answer is printed as one line, with line breaks replaced by spaces.  ``options``: those of
    :meth:`SideBySide.answers`.
    """

    def __init__(self, desk: Desk, task: str, interactive: bool, **options: float):
        self.desk, self.interactive, self.options = desk, interactive, options
        self.tasks: dict[str, str] = {}  # name -> description or document
        self.use(TASK, task)
        self.last: str | None = None

    def answer(self, text: str, *names: str) -> None:
        """Print the answers of tasks, or of the base model; one answer alone is streamed.

        Raises ValueError for an input that is too long for the model's context.
        """
        rows = [Row() if name == BASE else Row(self.tasks[name], adapted=True) for name in names]
        printed, last = "", None
        with contextlib.closing(self.desk.side_by_side.answers(text, rows, **self.options)) as answers:
            for last in answers:
                if len(rows) == 1:  # without the last word, which the next token may continue
                    words = last.texts[0].rpartition(" ")[0]
                    self._print(words[len(printed) :])
                    printed = max(printed, words, key=len)
        if last is None:
            return
        for name, answer in zip(names, last.texts, strict=True):
            self._print((f"{name}: " if len(rows) > 1 and self.interactive else "") + answer[len(printed) :], end=True)
        if self.interactive:
            say(last.times)

    def _print(self, text: str, end: bool = False) -> None:
        typer.echo(text.translate({} if self.interactive else _LINE_BREAKS), nl=end)

    def line(self, line: str) -> bool:
        """Execute ``line``, an input or a command; False for /quit.  Raises ValueError for an invalid command."""
        if not is_unicode(line):
            raise ValueError(f"input: expected UTF-8 text, got {short_repr(line)}")
        command, rest = (line.split(maxsplit=1) + [""])[:2]
        if not line.startswith("/") or line.startswith("//"):
            self.last = line.removeprefix("/")
            self.answer(self.last, self.current)
        elif command in ("/task", "/document"):
            self.change(command, rest)
        elif command in ("/base", "/both"):
            if self.last is None:
                raise ValueError(f"{command}: expected an input before it, got none")
            self.answer(self.last, BASE, *(self.tasks if command == "/both" else ()))
        elif command == "/save":
            if not rest:
                raise ValueError("/save: expected a folder or FILE.gguf after it, got none")
            path = Path(rest).expanduser()
            self.desk.save(self.tasks[self.current], path)
            say(f"wrote {path}")
        elif command == "/tasks":
            for name, description in self.tasks.items():
                say(f"{'*' if name == self.current else ' '} {name}: {headline(description)}")
        elif command == "/help":
            typer.echo(HELP, err=True)
        elif command != "/quit":
            raise ValueError(f"{command[:40]}: expected one of {', '.join(COMMANDS)}; // begins an input that begins with /")
        return command != "/quit"

    def use(self, name: str, description: str) -> None:
        """Use ``description`` as the task ``name``, and make its adapter; ValueError if the encoder refuses it."""
        if name not in self.tasks and len(self.tasks) == SLOTS:
            raise ValueError(f"/task: expected at most {SLOTS} tasks, got one more; give it the name of another")
        made = self.desk.side_by_side.hold([description])
        self.current, self.tasks[name] = name, description
        if self.interactive:
            say(f"the adapter is that of: {headline(description)} ({made})")

    def change(self, command: str, text: str) -> None:
        """``/task``: a description, one with a name, or a name alone; ``/document``: a file, or one with a name."""
        name, description, document = TASK, text, command == "/document"
        if not text:
            raise ValueError(f"{command}: expected a {'file' if document else 'description'} after it, got none")
        if text == BASE and not document:
            raise ValueError(f"/task: expected a description or the name of a task, got {BASE}; /base asks the base model")
        if text in self.tasks and not document:
            name, description = text, self.tasks[text]
        elif match := _NAMED.fullmatch(text):
            name, description = match.groups()
            if name in (TASK, BASE):
                raise ValueError(f"{command}: expected another name than {TASK} and {BASE}, got {name}")
        if document:
            description = self.desk.read(Path(description).expanduser(), command)
        with named({"texts[0]": command}):
            self.use(name, description)


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of standard input, with a prompt if ``interactive``."""
    if not interactive:
        for i, line in enumerate(standard_input()):
            yield line.removeprefix("\ufeff") if i == 0 else line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history
    while True:
        # input() writes its prompt to stdout, which is for answers unless it is a terminal.
        with contextlib.nullcontext() if sys.stdout.isatty() else contextlib.redirect_stdout(sys.stderr):
            try:
                line = input("t2l> ")
            except EOFError:
                return
        yield line


def chat(
    engine: EngineOptions,
    task: Annotated[str, typer.Option(help="Task description; change it with /task.")] = "",
    document: Annotated[Path | None, typer.Option(help="Text file that a checkpoint of documents reads; /document.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0: greedy decoding.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed of sampling, the same for all answers.")] = 0,
    dtype: BaseDType = None,
) -> None:
    """Chat with the base model and the adapters of descriptions or documents; /help lists the commands.

    Every line is answered independently, without history: adapters are trained on single user turns.  Standard output has
    the answers only.  From a pipe, every answer is printed as one line, and an invalid command exits with status 1.
    """
    if bool(task) == (document is not None):
        raise typer.BadParameter("expected --task or --document; one of them")
    source = standard_input()
    if hasattr(source, "reconfigure"):
        source.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are reported with their line
    interactive = source.isatty()
    desk = open_desk(engine, slots=SLOTS, max_new_tokens=max_new_tokens, dtype=dtype)
    option = "--task" if document is None else "--document"
    with named({"texts[0]": option}):
        text = task if document is None else desk.read(document, option)
        session = Chat(desk, text, interactive, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if interactive:
        say(f"{desk.base_model}; /help lists the commands")
    try:
        for line in map(str.strip, _lines(interactive)):
            try:
                if line and not session.line(line):
                    break
            except (ValueError, OSError) as error:
                if not interactive:
                    raise
                say(str(error))
    except KeyboardInterrupt:
        if not interactive:  # the output is incomplete
            raise
        typer.echo(err=True)  # Ctrl-C quits
