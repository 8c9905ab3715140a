"""``t2l generate``: PEFT adapter folders from descriptions."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2l_engine.cli.common import (
    DEFAULT_CHECKPOINT,
    Checkpoint,
    Encoder,
    Json,
    Scaling,
    TrustRemoteCode,
    base_model_of,
    differ,
    load_engine,
    named,
    print_json,
    say,
    standard_input,
    stored_base,
)

if TYPE_CHECKING:
    from t2l_engine.engine import TextToLoRA

BATCH_SIZE = 64  # bounds the adapters in memory; a mixture is as large as those that it is made of
INDEX_NAME = "index.json"


class Format(str, enum.Enum):
    """Formats of adapters."""

    peft = "peft"
    gguf = "gguf"


def generate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the adapter; for several, of DIR/0, DIR/1, ... and index.json.")
    ],
    descriptions: Annotated[list[str] | None, typer.Argument(help="Task descriptions, one adapter each.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="File of descriptions, one per line; -: standard input."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="JSON Lines of worked examples, input and output, which the adapters are generated from too."),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="peft: folders; gguf: DIR/adapter.gguf or DIR/0.gguf, ..., for llama.cpp.")
    ] = Format.peft,
    library: Annotated[
        Path | None, typer.Option(help="Folder of stored adapters with descriptions.json: take the nearest one from there.")
    ] = None,
    top_k: Annotated[
        int, typer.Option("--top-k", min=1, help="With --library: mix the nearest ones, weighted by nearness.")
    ] = 1,
    min_similarity: Annotated[
        float,
        typer.Option(
            "--min-similarity", min=-1, max=1, help="With --library: generate where the nearest has a lower cosine."
        ),
    ] = -1.0,
    base_model: Annotated[
        str,
        typer.Option(
            "--base-model",
            help="Name or folder that the adapters state; default: the checkpoint's base model.  For GGUF a local folder.",
        ),
    ] = "",
    checkpoint: Checkpoint = DEFAULT_CHECKPOINT,
    scaling: Scaling = "",
    encoder: Encoder = "",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write one PEFT adapter folder, or GGUF file, per description, replacing existing adapters.

    A single description as argument is written to DIR itself; several, or those of --file, to DIR/0, DIR/1, ..., with
    DIR/index.json as their index.  --json prints a list of objects with description, folder (of GGUF, file), rank, scaling,
    modules and parameters; with --library, also the stored adapters that were used, with similarity and weight.  With
    --examples, a checkpoint whose encoder reads examples generates from these, too.
    """
    from t2l_engine.cli import export
    from t2l_engine.files.weights import write_text
    from t2l_engine.hypernetwork import checkpoint as checkpoints
    from t2l_engine.library import AdapterLibrary
    from t2l_engine.text import packaged
    from t2l_engine.text.base_model import config_of
    from t2l_engine.text.examples import read_examples

    if bool(descriptions) == (file is not None):
        raise typer.BadParameter("expected descriptions as arguments, or --file; not both")
    if library is None and (top_k != 1 or min_similarity != -1):
        raise typer.BadParameter("--top-k and --min-similarity: expected --library too")
    if library is not None and examples is not None:
        raise ValueError("--examples: expected none with --library, whose adapters are found by their descriptions")
    if library is not None and min_similarity == -1:
        for option, value in (("--scaling", scaling), ("--encoder", encoder)):
            if value:
                raise ValueError(
                    f"{option}: expected none with --library, unless --min-similarity lets adapters be generated"
                )
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output: {output}: expected a folder, got a file")
    if output.suffix.lower() == export.GGUF and not output.exists():
        raise ValueError(
            f"--output: expected a folder, got {output}; t2l export DESCRIPTION -o FILE{export.GGUF} writes a file"
        )
    several, index = file is not None or len(descriptions) > 1, output / INDEX_NAME
    if several and index.exists() and not _is_index(index):
        raise FileExistsError(
            f"--output: {index}: expected an index of adapters, or none, got another file; choose another folder"
        )
    lines = {} if file is None else _read(file)
    texts = list(lines.values()) or descriptions
    shots = None if examples is None else read_examples(examples)
    engine, folder = load_engine(checkpoint, scaling, encoder, trust_remote_code, base_model)
    _check(engine, lines or {f"description {i}": text for i, text in enumerate(texts, start=1)}, shots)
    base = base_model or checkpoints.describe(folder).get("base_model")
    with named({"base_model": "--base-model"}):
        base_config = config_of(base_model_of(folder, base_model)) if form is Format.gguf else None
    base = base and packaged.hub_name(base)
    results = []
    shown = None if shots is None else [shots] * len(texts)
    if library is None:
        known, task_emb = None, engine.encoder.encode(texts, examples=shown)
    else:
        known, task_emb = AdapterLibrary.open(library), None
        theirs = stored_base(library)
        if differ(base, theirs):
            said = f"the adapters in {library} are of {theirs}, and are written as of {base}"
            say(f"warning: {said}; --base-model names another")
        if top_k > len(known):
            raise ValueError(f"--top-k: expected at most the {len(known)} adapters of the library, got {top_k}")
    if several:
        index.unlink(missing_ok=True)  # invalid until all adapters are written
    size = max(1, BATCH_SIZE // top_k)
    for start in range(0, len(texts), size):
        batch = texts[start : start + size]
        if known is None:
            stack, matches = engine.hypernetwork.generate(task_emb[start : start + size]), []
        else:
            stack, matches = engine.retrieve(batch, known, top_k, min_similarity)
        for i, text in enumerate(batch):
            if form is Format.gguf:
                target = output / (f"{start + i}.gguf" if several else "adapter.gguf")
                export.save(stack, i, target, base_config, None, text, export.prompt_prefix(engine, text))
            else:
                target = output / str(start + i) if several else output
                stack.save_pretrained(target, adapter=i, base_model_name_or_path=base)
            ranks = {name: of[i] for name, of in stack.ranks.items()}
            result = {
                "description": text,
                "folder" if form is Format.peft else "file": str(target),
                "rank": max(int(of.max()) for of in ranks.values()),
                "scaling": float(stack.scaling[i]),
                "modules": [name for name, of in ranks.items() if of.any()],
                "parameters": sum(int(of.sum()) * sum(stack.sizes[name][1:]) for name, of in ranks.items()),
            }
            said = ""
            if known is not None:
                result["stored"] = [dataclasses.asdict(match) for match in matches[i]]
                said = ", ".join(f"{m.name} ({m.similarity:.2f})" for m in matches[i])
                said = f", {'stored: ' + said if said else 'generated'}"
            results.append(result)
            if not as_json:
                typer.echo(f"{target}: rank {result['rank']}, scaling {result['scaling']:g}, {text!r}{said}")
    if several:
        ending = "" if form is Format.peft else export.GGUF
        names = {f"{i}{ending}": text for i, text in enumerate(texts)}
        write_text(index, json.dumps(names, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        print_json(results)


def _check(engine: TextToLoRA, texts: dict[str, str], shots: list[tuple[str, str]] | None) -> None:
    """ValueError, naming the key in ``texts``, such as file and line, for a text or examples that the encoder rejects."""
    for name, text in texts.items():
        with named({"texts[0]": name, "examples[0]": "--examples", "examples": "--examples"}):
            engine.encoder.prepare([text], None if shots is None else [shots])


def _is_index(file: Path) -> bool:
    """Whether ``file`` is what this command writes, which may be replaced."""
    from t2l_engine.cli.export import GGUF

    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(name.removesuffix(GGUF).isdecimal() for name in found)


def _read(file: Path) -> dict[str, str]:
    """The descriptions in ``file`` ("-": standard input), one per line, by "FILE:LINE"; blank lines are skipped."""
    source = "standard input" if str(file) == "-" else file
    try:
        text = standard_input().read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file: {file}: expected UTF-8 text: {error}") from None
    except OSError as error:
        raise OSError(f"--file: {file}: {error.strerror}") from None
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), start=1)
    found = {f"{source}:{number}": line.strip() for number, line in lines if line.strip()}
    if not found:
        raise ValueError(f"--file: {file}: expected one description a line, got none")
    return found
