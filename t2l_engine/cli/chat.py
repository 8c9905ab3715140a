"""``t2l chat``: talk to a base model with the adapter of a description, and change the description on the way."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from t2l_engine.cli.common import (
    DEFAULT_CHECKPOINT,
    BaseDType,
    BaseModel,
    Checkpoint,
    DType,
    Encoder,
    Scaling,
    TrustRemoteCode,
    base_model_of,
    load_engine,
    say,
    standard_input,
)
from t2l_engine.files.errors import short_repr
from t2l_engine.files.text import is_unicode

HELP = """\
A line is an input; its answer is on standard output.  Each line is answered by itself, without what was said before:
adapters are trained on the input alone.
  /task TEXT  the adapter of another description
  /base       answer the last input again with the base model, without adapter and description
  /help       this text
  /quit       leave; so do Ctrl-D and Ctrl-C
A line that begins with // is an input that begins with /."""

_ADAPTER, _BASE = 0, -1
_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))


class Chat:
    """A model with one slot for the adapter of the current description.

    ``interactive``: a person reads along; otherwise every answer is one line, its own line breaks become spaces.
    ``temperature`` 0 is greedy; otherwise every answer is drawn with ``seed`` anew.  Raises ValueError for an empty task.
    """

    def __init__(
        self, engine, model, tokenizer, *, task: str, interactive: bool, max_new_tokens: int, temperature: float, seed: int
    ):
        from t2l_engine.lora.handle import attach

        self.engine, self.model, self.tokenizer, self.interactive = engine, model, tokenizer, interactive
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.last: str | None = None
        self.lora = attach(model, engine.generate([task]))

    def switch(self, task: str) -> None:
        """Use the adapter of ``task`` from now on, in the same slot."""
        self.lora.put(_ADAPTER, self.engine.generate([task]))

    def answer(self, text: str, adapter: int) -> None:
        """Stream the answer to ``text`` and a line break to standard output.

        Raises ValueError for an input that leaves the model no room to answer.
        """
        import torch
        from transformers import TextStreamer

        table = {} if self.interactive else _LINE_BREAKS

        class Streamer(TextStreamer):
            begun = False

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                text = text if self.begun else text.lstrip(" ")  # after "Output:" an answer begins with one
                self.begun = self.begun or bool(text)
                typer.echo(text.translate(table), nl=stream_end)

        prompt = self.engine.prompt(self.tokenizer, text)
        batch = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
        length, limit = batch["input_ids"].shape[1], getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and self.max_new_tokens >= limit:
            raise ValueError(
                f"--max-new-tokens: expected fewer than the model's {limit} positions, got {self.max_new_tokens}"
            )
        if limit is not None and length + self.max_new_tokens > limit:
            raise ValueError(
                f"input: expected at most {limit - self.max_new_tokens} tokens (the model has {limit} positions, "
                f"{self.max_new_tokens} of them for the answer), got {length}"
            )
        how = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        torch.manual_seed(self.seed)
        with self.lora.use(adapter):
            self.model.generate(
                **batch, **how, max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id,
                streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )  # fmt: skip

    def line(self, line: str) -> bool:
        """Do what ``line`` says; False for /quit.  Raises ValueError for a command that cannot be followed."""
        if not is_unicode(line):
            raise ValueError(f"input: expected UTF-8 text, got {short_repr(line)}")
        command, rest = (line.split(maxsplit=1) + [""])[:2]
        if not line.startswith("/") or line.startswith("//"):
            self.last = line[1:] if line.startswith("//") else line
            self.answer(self.last, _ADAPTER)
        elif command == "/task":
            if not rest:
                raise ValueError("/task: expected a description after it, got none")
            self.switch(rest)
            if self.interactive:
                say("the adapter is that of the new description")
        elif command == "/base":
            if self.last is None:
                raise ValueError("/base: expected an input before it, got none")
            self.answer(self.last, _BASE)
        elif command == "/help":
            typer.echo(HELP, err=True)
        elif command == "/quit":
            return False
        else:
            raise ValueError(f"{command[:40]}: expected /task, /base, /help or /quit; // begins an input that begins with /")
        return True


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of standard input; with a prompt where a person types them."""
    if not interactive:
        yield from standard_input()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then has line editing and a history
    while True:
        # input() writes its prompt to stdout, which belongs to the answers unless it is the same screen.
        with contextlib.nullcontext() if sys.stdout.isatty() else contextlib.redirect_stdout(sys.stderr):
            try:
                line = input("t2l> ")
            except EOFError:
                return
        yield line


def chat(
    task: Annotated[str, typer.Option("--task", help="Task description; /task changes it.")],
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    base_model: BaseModel = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0: greedy; above: sampling.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every sampled answer.")] = 0,
    dtype: BaseDType = DType.float32,
    scaling: Scaling = "",
    encoder: Encoder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to the base model with the adapter of a description; /help lists what can be typed.

    Each line is answered by itself, without history: adapters are trained on the input alone as one user turn.  Lines may
    also come from a pipe: then there are no prompts, every answer is one line (line breaks in it become spaces), blank
    lines are skipped, and a command that cannot be followed ends the program with status 1.  Standard output carries the
    answers only.
    """
    from t2l_engine.text import base_model as models

    interactive = standard_input().isatty()
    engine, folder = load_engine(checkpoint, scaling, encoder, trust_remote_code)
    name = base_model_of(folder, base_model)
    model, tokenizer = models.load(name, dtype.torch)
    session = Chat(
        engine, model, tokenizer, task=task, interactive=interactive, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed,
    )  # fmt: skip
    if interactive:
        say(f"{name}, adapter of rank {engine.hypernetwork.config.rank}; /help lists what can be typed")
    try:
        for line in map(str.strip, _lines(interactive)):
            try:
                if line and not session.line(line):
                    break
            except ValueError as error:
                if not interactive:
                    raise
                say(str(error))
    except KeyboardInterrupt:
        if not interactive:  # the answers are not complete
            raise
        typer.echo(err=True)  # the other way to leave
