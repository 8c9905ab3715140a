"""``t2l chat``: interactive use of a base model with the adapter of a description, which can be changed."""

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
Every line is an input; its answer goes to standard output.  Lines are independent, without history: adapters are trained
on single inputs.
  /task TEXT  use the adapter of another description
  /base       answer the last input again with the base model, without adapter and description
  /help       print this text
  /quit       quit; so do Ctrl-D and Ctrl-C
Begin a line with // for an input that begins with /."""

_ADAPTER, _BASE = 0, -1
_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))


class Chat:
    """A model with one slot for the adapter of the current description.

    Args:
        interactive: False: every answer is printed as one line, with line breaks replaced by spaces.
        temperature: 0: greedy decoding; otherwise sampling, with ``seed`` for every answer.

    Raises ValueError for an empty task.
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
        """Replace the adapter by that of ``task``, in the same slot."""
        self.lora.put(_ADAPTER, self.engine.generate([task]))

    def answer(self, text: str, adapter: int) -> None:
        """Stream the answer to ``text``, and a line break, to standard output.

        Raises ValueError for an input that is too long for the model's context.
        """
        import torch
        from transformers import TextStreamer

        table = {} if self.interactive else _LINE_BREAKS

        class Streamer(TextStreamer):
            begun = False

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                text = text if self.begun else text.lstrip(" ")  # the space after "Output:"
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
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        torch.manual_seed(self.seed)
        with self.lora.use(adapter):
            self.model.generate(
                **batch, **sampling, max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id,
                streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )  # fmt: skip

    def line(self, line: str) -> bool:
        """Execute ``line``, an input or a command; False for /quit.  Raises ValueError for an invalid command."""
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
    """Lines of standard input; with a prompt if ``interactive``."""
    if not interactive:
        yield from standard_input()
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
    task: Annotated[str, typer.Option("--task", help="Task description; change it with /task.")],
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    base_model: BaseModel = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0: greedy decoding; otherwise sampling.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed of every sampled answer.")] = 0,
    dtype: BaseDType = DType.float32,
    scaling: Scaling = "",
    encoder: Encoder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with the base model and the adapter of a description; /help lists the commands.

    Every line is answered independently, without history: adapters are trained on single user turns.  Input may also be a
    pipe: then there is no prompt, every answer is printed as one line, blank lines are skipped, and an invalid command ends
    the program with status 1.  Standard output has the answers only.
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
        say(f"{name}, adapter of rank {engine.hypernetwork.config.rank}; /help lists the commands")
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
        if not interactive:  # the output is incomplete
            raise
        typer.echo(err=True)  # Ctrl-C quits
