"""``t2l generate``: PEFT adapter folders from descriptions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.cli import common
from t2l_engine.cli.common import EngineOptions, Json, named
from t2l_engine.cli.export import GGUF, save_gguf
from t2l_engine.engine import TextToLoRA
from t2l_engine.files.weights import write_text
from t2l_engine.hypernetwork.checkpoint import describe
from t2l_engine.library import AdapterLibrary
from t2l_engine.text import packaged
from t2l_engine.text.base_model import config_of
from t2l_engine.text.prompts import read_examples

BATCH_SIZE = 64  # bounds the adapters in memory
INDEX_NAME = "index.json"
Format = common.choices("Format", ("peft", "gguf"))


@dataclasses.dataclass(frozen=True)
class Options:
    """Descriptions, where their adapters are taken from, and where they are written."""

    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the adapter; for several, of DIR/0, DIR/1, ... and index.json.")
    ]
    descriptions: Annotated[list[str], typer.Argument(help="Task descriptions, one adapter each.")] = ()
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A description per line; -: standard input.")] = None
    document: Annotated[list[Path], typer.Option(help="Text file to read as a whole, one adapter each.")] = ()
    examples: Annotated[Path | None, typer.Option(help="JSON Lines of worked examples for the encoder.")] = None
    form: Annotated[Format, typer.Option("--format", help="gguf: DIR/adapter.gguf, or DIR/0.gguf, ...")] = Format.peft
    library: Annotated[Path | None, typer.Option(help="Folder of stored adapters: take the nearest one from there.")] = None
    min_similarity: Annotated[
        float, typer.Option(min=-1, max=1, help="With --library: generate where the nearest has a lower cosine.")
    ] = -1.0
    as_json: Json = False

    @property
    def several(self) -> bool:
        """Whether adapters are DIR/0, DIR/1, ... with an index."""
        return self.file is not None or len(self.descriptions) + len(self.document) > 1


def generate(options: Options, engine_options: EngineOptions) -> None:
    """Write one PEFT adapter folder, or GGUF file, per description or document, replacing existing adapters.

    A single description as argument is written to DIR itself; several, or those of --file, to DIR/0, DIR/1, ..., with
    DIR/index.json as their index.  --json prints a list of objects with description, folder (of GGUF, file), rank, scaling,
    modules and parameters; with --library, also the stored adapter that it is, with its similarity, or null.
    --examples needs a checkpoint whose encoder reads examples, --document one that reads documents, which are stated by
    their files.  PEFT folders state --base-model, of which a name is enough.
    """
    _check(options, engine_options)
    given = enumerate(options.descriptions, start=1)
    lines = {f"description {i}": text for i, text in given} if options.file is None else _read(options.file)
    lines |= {str(file): common.read_text(file, "--document") for file in options.document}
    shots = None if options.examples is None else read_examples(options.examples)
    engine, folder = engine_options.load()
    if options.document:
        common.expect_documents("--document", engine)
    for line, text in lines.items():  # an error names file and line
        with named({"texts[0]": line, "examples[0]": "--examples"}):
            engine.encoder.prepare([text], None if shots is None else [shots])
    name, config, ending = engine_options.base_model or describe(folder).get("base_model"), None, ""
    base = name and packaged.hub_name(name)
    if options.form is Format.gguf:
        config, ending = config_of(common.base_model_of(folder, engine_options.base_model)), GGUF
    library = None if options.library is None else _open_library(options.library, base)
    texts, index, results = list(lines.values()), options.output / INDEX_NAME, []
    stated = list(lines) if options.document else texts  # of a document its file
    names = [f"{i}{ending}" for i in range(len(texts))] if options.several else [ending and f"adapter{ending}"]
    if options.several:  # there is no index while adapters are written
        index.unlink(missing_ok=True)
    adapters = _adapters(options, engine, texts, shots, library)
    for name, text, (stack, i, stored) in zip(names, stated, adapters, strict=True):
        path = options.output / name
        if config is None:
            stack.save_pretrained(path, adapter=i, base_model_name_or_path=base)
        else:
            save_gguf(stack, i, path, config, description=text, engine=engine)
        results.append(_about(text, path, options.form, stack, i, stored))
        if not options.as_json:
            typer.echo(_line(results[-1], path))
    if options.several:
        write_text(index, json.dumps(dict(zip(names, stated, strict=True)), indent=1, ensure_ascii=False) + "\n")
    if options.as_json:
        common.print_json(results)


def _check(options: Options, engine: EngineOptions) -> None:
    """Errors for options that do not go together, and for an output that is not to be replaced."""
    output, index, generates = options.output, options.output / INDEX_NAME, options.min_similarity != -1
    if [bool(options.descriptions), options.file is not None, bool(options.document)].count(True) != 1:
        raise typer.BadParameter("expected descriptions as arguments, --file or --document; one of them")
    if options.library is None and generates:
        raise typer.BadParameter("--min-similarity: expected --library too")
    if options.library is not None and options.examples is not None:
        raise ValueError("--examples: expected none with --library, whose adapters are found by their descriptions")
    for option, value in (("--scaling", engine.scaling), ("--encoder", engine.encoder)):
        if value and options.library is not None and not generates:
            raise ValueError(f"{option}: expected none with --library, unless --min-similarity lets adapters be generated")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output: {output}: expected a folder, got a file")
    if output.suffix.lower() == GGUF and not output.exists():
        raise ValueError(f"--output: expected a folder, got {output}; t2l export DESCRIPTION -o FILE{GGUF} writes a file")
    if options.several and index.exists() and not _is_index(index):
        expected = "expected an index of adapters, or none, got another file; choose another folder"
        raise FileExistsError(f"--output: {index}: {expected}")


def _open_library(folder: Path, base: str | None) -> AdapterLibrary:
    """The library in ``folder``, with a warning if its adapters are of another base model than ``base``."""
    library, theirs = AdapterLibrary.open(folder), common.stored_base(folder)
    if common.differ(base, theirs):
        stated = f"the adapters in {folder} are of {theirs}, and are written as of {base}"
        common.say(f"warning: {stated}; --base-model names another")
    return library


def _adapters(
    options: Options, engine: TextToLoRA, texts: list[str], shots: Any, library: AdapterLibrary | None
) -> Iterator[tuple[AdapterStack, int, dict[str, Any]]]:
    """(stack, index in it, what to say of a library) of the adapter of each text, made in batches."""
    for start in range(0, len(texts), BATCH_SIZE):
        some = texts[start : start + BATCH_SIZE]
        if library is None:
            stack, stored = engine.generate(some, shots and [shots] * len(some)), [{}] * len(some)
        else:
            stack, matches = engine.retrieve(some, library, options.min_similarity)
            stored = [{"stored": match and dataclasses.asdict(match)} for match in matches]
        yield from ((stack, i, of) for i, of in enumerate(stored))


def _about(text: str, path: Path, form: Format, stack: AdapterStack, i: int, stored: dict[str, Any]) -> dict[str, Any]:
    """What --json prints of an adapter."""
    ranks = {name: of[i] for name, of in stack.ranks.items()}
    return {
        "description": text,
        "folder" if form is Format.peft else "file": str(path),
        "rank": max(int(of.max()) for of in ranks.values()),
        "scaling": float(stack.scaling[i]),
        "modules": [name for name, of in ranks.items() if of.any()],
        "parameters": sum(int(of.sum()) * sum(stack.sizes[name][1:]) for name, of in ranks.items()),
    } | stored


def _line(about: dict[str, Any], path: Path) -> str:
    stored = about.get("stored")
    origin = f", stored: {stored['name']} ({stored['similarity']:.2f})" if stored else ", generated" * ("stored" in about)
    return f"{path}: rank {about['rank']}, scaling {about['scaling']:g}, {about['description']!r}{origin}"


def _is_index(file: Path) -> bool:
    """Whether ``file`` is what this command writes, which may be replaced."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        return isinstance(found, dict) and all(name.removesuffix(GGUF).isdecimal() for name in found)
    return False


def _read(file: Path) -> dict[str, str]:
    """The descriptions in ``file`` ("-": standard input), one per line, by "FILE:LINE"; blank lines are skipped."""
    source = "standard input" if str(file) == "-" else file
    text = common.standard_input().read() if str(file) == "-" else common.read_text(file, "--file")
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), start=1)
    found = {f"{source}:{number}": line.strip() for number, line in lines if line.strip()}
    if not found:
        raise ValueError(f"--file: {file}: expected one description a line, got none")
    return found
