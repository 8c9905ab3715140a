"""Text that is no configuration: broken or overlong JSON and YAML, tags that would run code; and what is no file at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from t2l_engine.files.text import MAX_VALUES
from t2l_engine.research.tasks.folder import MAX_DESCRIPTIONS_BYTES
from t2l_engine.research.tasks.manifest import MAX_MANIFEST_BYTES
from t2l_engine.research.tasks.sni import MAX_FILE_BYTES
from tests.hostile.folders import MARKER, MIB, Case, Workshop
from tests.hostile.payloads import CODE, COMMAND

#: Loaders of a folder's JSON files.
JSON_FILES = [
    ("native", "config.json", "hypernetwork"),
    ("L-sft", "adapter_config.json", "hypernetwork"),
    ("adapter", "adapter_config.json", "adapters"),
    ("tasks", "descriptions.json", "tasks"),
    ("manifest", "manifest.json", "manifest"),
    ("sni", "task001_colours.json", "sni"),
]
#: YAML files, and lines in them of a flag (or another word), a word and a number.
YAML_FILES = [
    ("L-sft", "args.yaml", (b"shared_AB_head: false", b"training_task: sft", b"head_in_size: 40")),
    ("settings", "run.yaml", (b"prompt: input", b"schedule: linear", b"steps: 30")),
]

TAGS = {
    "system": f"!!python/object/apply:os.system ['{COMMAND}']",
    "eval": f'!!python/object/apply:builtins.eval ["{CODE}"]',
    "new": f"!!python/object/new:subprocess.Popen [['touch', '{MARKER}']]",
    "module": "!!python/module:os",
    "object": "!!python/object:types.SimpleNamespace {a: 1}",
    "local": "!surprise 1",
}

#: Good folder -> its JSON file of many texts, the most bytes that are read of it, a beginning that any text may follow, and
#: what costly values are put behind.
LARGE_FILES = {
    "tasks": ("descriptions.json", MAX_DESCRIPTIONS_BYTES, b'{"copy": [', [b'{"copy": [']),
    "manifest": ("manifest.json", MAX_MANIFEST_BYTES, b'{"format": "t2l_engine.tasks.v1", "about": ', [b'"tasks": ']),
    "sni": ("task001_colours.json", MAX_FILE_BYTES, b'{"Definition": ', [b'"Source": ', b'"input": ']),
}
#: Lists with nearly as many values as are read, and with more: they take many times the memory of the file.
COSTLY = {
    "objects": b"[" + b'{"":0},' * (MAX_VALUES // 3 - 100) + b"0]",
    "texts": b"[" + b'"ab",' * (MAX_VALUES // 2 - 100) + b"0]",
    "values": b"[" + b"[]," * MAX_VALUES + b"0]",
    "keys": b"{" + b",".join(b'"%d\xf0\x9f\x98\x80":999' % i for i in range(MAX_VALUES // 2 - 100)) + b"}",
}


def cases(shop: Workshop) -> Iterator[Case]:
    for base, file, loader in JSON_FILES:
        yield from _json(partial(shop.case, loader=loader), f"{base}-{loader}", base, file, shop.read(base, file))
    for base, file, lines in YAML_FILES:
        yield from _yaml(partial(shop.case, base=base, file=file), base, shop.read(base, file), *lines)
    yield from tags(shop)
    yield from _examples(shop)
    yield from _no_files(shop)
    for base, (file, most, start, places) in LARGE_FILES.items():
        yield from _large(shop, base, file, most, start, places)


def _json(case: Callable[..., Case], kind: str, base: str, file: str, whole: bytes) -> Iterator[Case]:
    start, deep = whole.rstrip()[:-1], b"[" * 100_000 + b"]" * 100_000  # the object without its end; nested lists
    broken = {
        "empty": b"", "text": b"no json", "list": b"[]", "null": b"null", "number": b"3", "string": b'"config"',
        "deep-list": deep,
        "deep-object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deep-inside": start + b', "deep": ' + deep + b"}",
        "digits": start + b', "r": ' + b"9" * 100_000 + b"}",
        "float-digits": start + b', "surprise": 1' + b"0" * 100_000 + b".5x}",
        "not-utf8": start + b', "surprise": "\xff\xfe"}', "utf16": whole.decode().encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + whole, "nul": whole + b"\0", "nul-inside": whole.replace(b'": ', b'\0": ', 1),
        "cut": whole[: len(whole) // 2], "two": whole + whole, "comma": start + b",}",
        "duplicate": start + b"," + whole.lstrip()[1:],
        "lone-surrogate-key": start + b', "\\ud800": 1, "\\ud800": 2}',
        "megabytes": start + b', "surprise": "' + b"x" * (3 * MIB) + b'"}',
    }  # fmt: skip
    if kind == "native-hypernetwork":
        broken["spaces"] = whole + b" " * (64 * MIB)
    if kind == "sni-sni":  # which may have further fields
        del broken["megabytes"]
    for name, content in broken.items():
        if content != whole:
            yield case(f"json-{kind}-{name}", base, file, content)


def tags(shop: Workshop) -> Iterator[Case]:
    """YAML tags that would run code."""
    for base, file, _ in YAML_FILES:
        for name, text in TAGS.items():
            yield shop.case(f"yaml-{base}-tag-{name}", base, file, b"{surprise: " + text.encode() + b"}")


def _yaml(case: Callable[..., Case], kind: str, whole: bytes, flag: bytes, word: bytes, number: bytes) -> Iterator[Case]:
    def instead(line: bytes, value: bytes) -> bytes:
        return whole.replace(line, line.partition(b" ")[0] + b" " + value)

    laughs = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 60))
    merges = b"m0: &m0 {a: 1}\n" + b"".join(b"m%d: &m%d\n  <<: [*m%d, *m%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40))
    for name, content in {
        "empty": b"", "list": b"- a\n- b\n", "text": b"just text", "unclosed": b"a: [1", "tabs": b"a:\n\t- b",
        "deep-list": b"a: " + b"[" * 100_000 + b"]" * 100_000, "deep-object": b"{a: " * 100_000 + b"1" + b"}" * 100_000,
        "deep-blocks": b"- " * 50_000 + b"a", "deep-keys": b"? " * 50_000 + b"a",
        "laughs-as-flag": laughs + instead(flag, b"*a59"), "laughs-as-task": laughs + instead(word, b"*a59"),
        "laughs-as-size": laughs + instead(number, b"*a59"), "laughs-as-key": laughs + b"? *a59\n: 1\n" + whole,
        "merges": merges + whole, "recursive": b"&a [*a]", "recursive-key": b"&a {*a : 1}",
        "recursive-value": instead(word, b"&a [*a]"), "alias-unknown": whole + b"a: *nowhere\n",
        "digits": instead(number, b"9" * 100_000), "sexagesimal": instead(number, b"1" + b":59" * 300_000),
        "sexagesimal-tagged": whole + b"a: !!int 1" + b":1" * 400_000, "two-documents": whole + b"---\n" + whole,
        "not-utf8": whole + b"a: \xff\xfe\n", "utf16-text": whole.decode().encode("utf-16-be")[1:],
        "nul": whole + b"a: \0\n", "control": whole + b"a: \x1b[2J\n", "directive": b"%YAML 9.9\n---\n" + whole,
        "duplicate": whole + instead(flag, b"true"), "unhashable-key": whole + b"? [a]\n: 1\n",
        "megabytes": whole + b"a: '" + b"x" * (3 * MIB) + b"'\n", "spaces": whole + b" " * (64 * MIB),
        "many-aliases": whole + b"a: &b x\nz: [" + b"*b ," * 200_000 + b"]\n",
        "many-pairs": whole + b"z: [" + b"a: ," * 250_000 + b"]\n",
        "many-keys": whole + b"".join(b"k%d: 1\n" % i for i in range(200_000)),
    }.items():  # fmt: skip
        yield case(f"yaml-{kind}-{name}", content=content)


def _no_files(shop: Workshop) -> Iterator[Case]:
    """Where a file is expected and something else is found.  For some loaders that is a file not found."""
    links = {"itself": None, "device": "/dev/zero", "unreadable": "/proc/self/pagemap"}  # a file; reading it fails
    for base, file in (
        ("L-sft", "hypermod.pt"), ("L-sft", "args.yaml"), ("L-sft", "adapter_config.json"), ("native", "config.json"),
        ("native", "hypernet.safetensors"), ("adapter", "adapter_config.json"), ("adapter", "adapter_model.safetensors"),
        ("tasks", "descriptions.json"), ("tasks", "copy.jsonl"), ("manifest", "manifest.json"),
        ("sni", "task001_colours.json"), ("settings", "run.yaml"),
    ):  # fmt: skip
        made = {f"link-to-{name}": lambda path, to=to: path.symlink_to(to or path.name) for name, to in links.items()}
        for name, make in {"directory": Path.mkdir, "fifo": os.mkfifo, **made}.items():
            yield shop.case(f"{name}-{base}-{file}", base, file, make, refusals=(ValueError, FileNotFoundError))
    yield shop.case("adapter-pickle-only", "adapter", "adapter_model.bin", _only_a_pickle)


def _only_a_pickle(path: Path) -> None:
    path.with_name("adapter_model.safetensors").unlink()
    path.write_bytes(b"cposix\nsystem\n(S'" + COMMAND.encode() + b"'\ntR.")


def _large(shop: Workshop, base: str, file: str, most: int, start: bytes, places: list[bytes]) -> Iterator[Case]:
    """``file`` with more than the ``most`` bytes that are read, or with fewer and costly; arguments as in LARGE_FILES."""
    whole = shop.read(base, file).rstrip()
    yield shop.case(f"{base}-too-large", base, file, lambda path: (path.write_bytes(whole), os.truncate(path, most + 1)))
    rare = start + '"\U0001f600'.encode()
    yield shop.case(f"{base}-wide", base, file, rare + b"a" * min(most - len(rare) - 9, 24 * MIB) + b'"')
    text = (b"a" * 1000 + "\\n\U0001f600".encode()) * (min(most, 16 * MIB) // 1100)
    yield shop.case(f"{base}-wide-escapes", base, file, rare + text + b'",}')
    yield shop.case(f"{base}-quotes", base, file, start + b'"' + b'\\"' * (min(most, 16 * MIB) // 2 - 500))
    yield shop.case(f"{base}-backslashes", base, file, start + b'"' + b"\\" * (min(most, 16 * MIB) - 999))
    for at, place in enumerate(places):
        before, found, after = whole.partition(place)
        assert found, place
        for name, value in COSTLY.items():
            yield shop.case(f"{base}-{name}-{at}", base, file, before + found + value + b"," + after)


def _examples(shop: Workshop) -> Iterator[Case]:
    """Lines that cost much, or come late."""
    good = b'{"input": "a", "output": ["a"], "split": "train"}\n'
    start, objects = good.strip()[:-1], b"[" + b'{"":0},' * 140_000 + b"0]"
    for name, line in {
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "digits": start.replace(b'"a"', b"9" * 100_000, 1) + b"}",
        "nul": b"\0",
        "two": good.strip() * 2,
        "long-text": b"x" * 1_000_000,
        "objects": start.replace(b'"a"', objects, 1) + b"}",
        "metric-long": start + b', "metric": "' + b"x" * 500_000 + b'"}',
        "options-objects": start + b', "metric": "options", "options": ' + objects + b"}",
        "late": good * (1 << 18) + b"{",
        "long-line": b" " * (48 * MIB) + b"{",
    }.items():
        yield shop.case(f"examples-{name}", "tasks", "copy.jsonl", good + line + b"\n" + good)
    yield shop.case("examples-none", "tasks", "copy.jsonl", b"")
    for line in (b"[]", b"no json", b"\0", b"[" * 100_000, b'{"raw": '):
        yield shop.case("benchmarks", "benchmarks", "mbpp.jsonl", shop.read("benchmarks", "mbpp.jsonl") + line)
