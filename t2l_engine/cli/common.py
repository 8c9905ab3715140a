"""Options and functions shared by several commands."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer
from rich.console import Console

from t2l_engine.adapters.peft import CONFIG_NAME
from t2l_engine.engine import DocToLoRA, TextToLoRA
from t2l_engine.files.errors import short_repr
from t2l_engine.files.text import read_json
from t2l_engine.hypernetwork.checkpoint import describe
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.ops import native
from t2l_engine.text import dtypes, packaged

DEFAULT_CHECKPOINT = "smollm2-135m"


def choices(name: str, values: Iterable[str]) -> Any:
    """An enumeration of strings, the values that an option takes."""
    return enum.Enum(name, {value: value for value in values}, type=str)


DType = choices("DType", ("float32", "bfloat16"))
Checkpoint = Annotated[str, typer.Option("--checkpoint", "-c", help="Bundled checkpoint name, or a checkpoint folder.")]
BaseDType = Annotated[
    DType | None,
    typer.Option(
        "--dtype", help="Dtype of the base model; default: bfloat16, or float32 where this CPU multiplies that faster."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output; nothing on failure.")]


def base_dtype(given: DType | None, device: str = "cpu") -> torch.dtype:
    """``--dtype`` of a command."""
    return dtypes.preferred(device) if given is None else getattr(torch, given.value)


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees; no effect without glibc.

    glibc returns blocks above some 100 kB to the system.  The pages of every op's result are then mapped and zeroed again,
    which can take longer than the op.
    """
    import ctypes

    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def need_packages() -> None:
    """FileNotFoundError if packages for training and evaluation are missing, with the command to install them."""
    try:
        import t2l_engine.research.training  # noqa: F401
    except ImportError as error:
        raise FileNotFoundError(str(error)) from None


def say(text: str) -> None:
    """Print a one-line message to standard error."""
    typer.echo("t2l: " + " ".join(text.split()), err=True)


def standard_input() -> TextIO:
    """Standard input; ValueError if it is closed."""
    if sys.stdin is None:
        raise ValueError("standard input: expected one, but it is closed")
    return sys.stdin


def console() -> Console:
    """A rich console as wide as the terminal; if output is not a terminal, wide enough that no line is wrapped."""
    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 1000)


def json_text(value: Any) -> str:
    """``value`` as JSON that UTF-8 can hold: lone surrogates, of file names, are escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def printable(name: str, most: int = 120) -> str:
    """``name``, of a file or an option, as printable text; short if it has over ``most`` characters."""
    return name if name.isprintable() and len(name) <= most else short_repr(name)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON to standard output."""
    typer.echo(json_text(value))


@contextlib.contextmanager
def named(options: Mapping[str, str]) -> Iterator[None]:
    """Replace a parameter's name (key) at the start of an error by the option that the user typed (value)."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text, kind = str(error), FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        for parameter, option in options.items():
            if text.startswith(f"{parameter}:"):
                raise kind(option + text.removeprefix(parameter)) from None
        raise


def check_kernels() -> None:
    """Warn if there are no native kernels and nobody disabled them; ValueError for an invalid ``T2L_ISA``."""
    if native.is_loaded():
        if error := native.isa_error():
            raise ValueError(error)
    elif not native.is_disabled():
        say("warning: no native library was built: ops run their plain-torch reference, slower; see t2l info")


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The checkpoint that generates, and how it is loaded."""

    checkpoint: Checkpoint = DEFAULT_CHECKPOINT
    base_model: Annotated[str, typer.Option(help="Local transformers folder; default: the checkpoint's base model.")] = ""
    scaling: Annotated[str, typer.Option(help="LoRA scaling: rslora, plain or a number; default: as trained.")] = ""
    encoder: Annotated[str, typer.Option(help="Local folder of the text encoder; default: the checkpoint's.")] = ""
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow custom encoder code, including remote repositories.")
    ] = False
    max_chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut longer documents into chunks; default: as the checkpoint says.")
    ] = None

    def load(self, device: str = "cpu") -> tuple[TextToLoRA, Path]:
        """(engine, checkpoint folder).

        A checkpoint may encode texts with its base model.  If the folder that it names is gone, ``base_model`` is used.
        """
        from transformers.utils import logging

        check_kernels()
        logging.disable_progress_bar()  # keeps stderr for our own messages
        logging.set_verbosity_error()
        folder, encoder = resolve_checkpoint(self.checkpoint), self.encoder
        if self.base_model and not encoder:
            about = describe(folder)
            name = (about.get("encoder") or {}).get("name") or ""
            gone = name == (about.get("base_model") or "").rstrip("/") and not Path(packaged.resolve(name)).is_dir()
            if gone and Path(given := packaged.resolve(self.base_model)).is_dir():
                encoder = given
        scaling: str | float | None = self.scaling or None
        if scaling not in (None, "rslora", "plain"):
            with contextlib.suppress(ValueError):  # the engine refuses other words
                scaling = float(scaling)
        engine = TextToLoRA.from_pretrained(
            folder, encoder=encoder or None, scaling=scaling, device=device, trust_remote_code=self.trust_remote_code
        )
        if (most := self.max_chunk_tokens) is not None:
            reader = expect_documents("--max-chunk-tokens", engine).encoder
            reader.config = dataclasses.replace(reader.config, max_chunk_tokens=most)
        return engine, folder


def expect_documents(option: str, engine: TextToLoRA) -> DocToLoRA:
    """``engine``; ValueError, naming ``option``, unless it reads texts token by token, and so documents."""
    if not isinstance(engine, DocToLoRA):
        raise ValueError(f"{option}: expected a checkpoint that reads documents, got one that embeds descriptions")
    return engine


def read_text(file: Path, option: str) -> str:
    """The text of ``file``; errors name ``option``."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {file}: expected UTF-8 text: {error}") from None
    except OSError as error:
        raise OSError(f"{option}: {file}: {error.strerror}") from None


def expect_descriptions(folder: Path) -> None:
    """ValueError unless the checkpoint in ``folder`` generates adapters from descriptions."""
    if describe(folder).get("training", {}).get("condition") == "input":
        raise ValueError(f"--checkpoint: expected one trained on descriptions, got {folder}, which was trained on inputs")


def base_model_of(folder: Path, given: str) -> str:
    """``--base-model``, or the base model of the checkpoint in ``folder``.

    Raises ValueError if there is neither, FileNotFoundError if only the checkpoint names one and it is no local folder.
    """
    name = given or describe(folder).get("base_model")
    if not name:
        raise ValueError("--base-model: the checkpoint does not name one; give it here")
    if not given and packaged.own_name(name) != packaged.LANGUAGE_MODEL and not Path(name).is_dir():
        raise FileNotFoundError(f"--base-model: expected a folder of {name!r}, which the checkpoint names, got none")
    return name


def stored_base(folder: Path) -> str | None:
    """The base model that the first of the PEFT adapters in ``folder`` states, or those in folders of it."""
    config = next((path for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(depth + CONFIG_NAME))), None)
    stated = config and read_json(config)
    return stated.get("base_model_name_or_path") if isinstance(stated, dict) else None


def differ(base: str | None, other: str | None) -> bool:
    """Whether both name a base model, and not the same."""
    return bool(base and other) and packaged.own_name(base) != packaged.own_name(other)


def split_names(text: str) -> list[str]:
    """The names of a comma-separated option."""
    return [name.strip() for name in text.split(",") if name.strip()]
