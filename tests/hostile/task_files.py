"""Task folders, manifests and Super-NaturalInstructions files that parse and say what cannot be, or cost too much."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from functools import partial

from t2l_engine.files.text import MAX_VALUES
from t2l_engine.research.tasks.folder import MAX_DESCRIPTIONS_BYTES
from t2l_engine.research.tasks.manifest import MAX_MANIFEST_BYTES
from t2l_engine.research.tasks.sni import MAX_FILE_BYTES
from t2l_engine.research.tasks.specs import fixed
from t2l_engine.research.tasks.specs.suite import FAMILIES
from tests.hostile import Case, Workshop
from tests.hostile.config_files import FLAGS, HUGE, KEYS, LIST, NESTED, TEXT, field_cases

MIB = 1 << 20
#: Names that are none of a task.
NAMES = {
    "parent": "../base/tasks/copy", "absolute": "/etc/passwd", "empty": "", "dots": "..", "hidden": ".copy", "nul": "a\0b",
    "line": "a\nb", "surrogate": "\ud800", "long": "x" * 10_000, "long-in-bytes": "\u65e5" * 128,
}  # fmt: skip
SURROGATE = "\ud800"
#: Lists with nearly as many values as are read, and with more: the memory they take is many times that of the file.
COSTLY = {
    "objects": b"[" + b'{"":0},' * (MAX_VALUES // 3 - 100) + b"0]",
    "texts": b"[" + b'"ab",' * (MAX_VALUES // 2 - 100) + b"0]",
    "values": b"[" + b"[]," * MAX_VALUES + b"0]",
    "keys": b"{" + b",".join(b'"%d\xf0\x9f\x98\x80":999' % i for i in range(MAX_VALUES // 2 - 100)) + b"}",
}


def cases(shop: Workshop) -> Iterator[Case]:
    yield from _descriptions(shop)
    yield from _examples(shop)
    yield from _manifests(shop)
    yield from _instructions(shop)
    yield from _benchmarks(shop)


def _large(shop: Workshop, base: str, file: str, most: int, start: bytes, places: list[bytes]) -> Iterator[Case]:
    """``file`` larger than the ``most`` bytes that are read, or up to them and costly; values go after ``places``.

    ``start``: of a file whose next text may be as long as one likes.
    """
    whole = shop.read(base, file).rstrip()
    yield shop.case(f"{base}-too-large", base, file, lambda path: (path.write_bytes(whole), os.truncate(path, most + 1)))
    yield shop.case(f"{base}-sparse", base, file, lambda path: (path.write_bytes(whole), os.truncate(path, most // 2)))
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


def _descriptions(shop: Workshop) -> Iterator[Case]:
    case = partial(shop.case, base="tasks", file="descriptions.json")
    for name, value in {
        "empty": {},
        "no-texts": {"copy": []},
        "text": {"copy": "Repeat the input."},
        "blank": {"copy": ["  "]},
        "number": {"copy": [3]},
        "nested": {"copy": [["a"]]},
        "null": {"copy": None},
        "surrogate": {"copy": ["Repeat.", SURROGATE]},
        "long": {"copy": LIST},
        **{f"{name}-name": {key: ["Repeat."]} for name, key in NAMES.items()},
    }.items():
        yield case(f"descriptions-{name}", content=json.dumps(value).encode())
    late = b'{"copy": ["' + b"a" * (12 * MIB) + b'\\udfff"]}'
    yield case("descriptions-late-surrogate", content=late)
    many = ", ".join(f'"task{i}": ["Repeat."]' for i in range(MAX_VALUES // 12))
    yield case("descriptions-many-tasks", content=f'{{{many}, "z": [" "]}}'.encode())
    yield from _large(shop, "tasks", "descriptions.json", MAX_DESCRIPTIONS_BYTES, b'{"copy": [', [b'{"copy": ['])


def _examples(shop: Workshop) -> Iterator[Case]:
    good = b'{"input": "a", "output": ["a"], "split": "train"}\n'
    for name, line in {
        "empty-line-list": b"[]",
        "text": b"no json",
        "number": b"3",
        "null": b"null",
        "no-output": b'{"input": "a", "split": "train"}',
        "output-text": b'{"input": "a", "output": "a", "split": "train"}',
        "output-empty": b'{"input": "a", "output": [], "split": "train"}',
        "output-number": b'{"input": "a", "output": [1], "split": "train"}',
        "output-object": b'{"input": "a", "output": {"a": 1}, "split": "train"}',
        "output-null": b'{"input": "a", "output": null, "split": "train"}',
        "output-surrogate": b'{"input": "a", "output": ["\\udc80"], "split": "train"}',
        "input-number": b'{"input": 1, "output": ["a"], "split": "train"}',
        "input-list": b'{"input": ["a"], "output": ["a"], "split": "train"}',
        "split-null": b'{"input": "a", "output": ["a"], "split": null}',
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "digits": b'{"input": ' + b"9" * 100_000 + b', "output": ["a"], "split": "train"}',
        "not-utf8": b'{"input": "\xff", "output": ["a"], "split": "train"}',
        "nul": b"\0",
        "key-twice": good.strip()[:-1] + b', "input": "b"}',
        "two": good.strip() + good.strip(),
        "long-text": b"x" * 1_000_000,
        "long-list": b'{"input": ' + json.dumps(LIST).encode() + b', "output": ["a"], "split": "train"}',
        "objects": b'{"input": [' + b'{"":0},' * 140_000 + b'0], "output": ["a"], "split": "train"}',
    }.items():
        yield shop.case(f"examples-{name}", "tasks", "copy.jsonl", good + line + b"\n" + good)
    start, options = good.strip()[:-1], b', "metric": "options", "options": '
    for name, keys in {
        "metric-unknown": b', "metric": "rouge"',
        "metric-null": b', "metric": null',
        "metric-list": b', "metric": ["pass"]',
        "metric-long": b', "metric": "' + b"x" * 500_000 + b'"',
        "metric-surrogate": b', "metric": "\\ud800"',
        "number-none": b', "metric": "number"',
        "options-absent": b', "metric": "options"',
        "options-text": options + b'"ab"',
        "options-null": options + b"null",
        "options-numbers": options + b'["a", 1]',
        "options-lists": options + b'["a", ["b"]]',
        "options-objects": options + b"[" + b'{"":0},' * 140_000 + b'"a"]',
        "options-one": options + b'["a"]',
        "options-twice": options + b'["a", "b", "b"]',
        "options-blank": options + b'["a", " "]',
        "options-surrogate": options + b'["a", "\\udc80"]',
        "options-without-output": options + b'["b", "c"]',
        "options-many": options + json.dumps([f"{i:x}" for i in range(105_000) if i != 10]).encode(),
        "options-unasked": b', "options": ["a", "b"]',
        "tests-absent": b', "metric": "pass"',
        "tests-blank": b', "metric": "pass", "tests": "\\n"',
        "tests-null": b', "metric": "pass", "tests": null',
        "tests-list": b', "metric": "pass", "tests": ["assert a"]',
        "tests-surrogate": b', "metric": "pass", "tests": "\\ud800"',
        "tests-unasked": b', "tests": "assert a"',
    }.items():
        yield shop.case(f"examples-{name}", "tasks", "copy.jsonl", good + start + keys + b"}\n" + good)
    yield shop.case("examples-none", "tasks", "copy.jsonl", b"")
    yield shop.case("examples-other-split", "tasks", "copy.jsonl", good.replace(b"train", b"test"))
    short = b'{"input":"","output":[""],"split":"train"}\n' * (1 << 18)
    yield shop.case("examples-late", "tasks", "copy.jsonl", short + b"{\n")
    yield shop.case("examples-long-line", "tasks", "copy.jsonl", good + b" " * (48 * MIB) + b"{")


def _manifests(shop: Workshop) -> Iterator[Case]:
    whole = json.loads(shop.read("manifest", "manifest.json"))
    task = whole["tasks"]["copy"]
    count = iter(range(10_000))

    def case(field: str, values: object, *mentions: str) -> Case:
        name = f"manifest-{next(count)}-{field}"
        return shop.case(name, "manifest", "manifest.json", json.dumps(values).encode(), *mentions)

    def top(field: str, value: object) -> Case:
        return case(field, whole | {field: value}, field)

    def entry(field: str, value: object) -> Case:
        return case(field, whole | {"tasks": {"copy": task | {field: value}}}, "copy", field)

    def split(name: str, value: object) -> Case:
        return case(
            "split", whole | {"tasks": {"copy": task | {"splits": {"test": "MTIzNDU=", name: value}}}}, "copy", "splits"
        )

    texts = [None, "", " \n", 3, True, {}, [], ["a"], SURROGATE, HUGE, LIST, NESTED, KEYS]
    others = [None, [], 3, "copy", TEXT, HUGE, LIST, NESTED]
    specs = fixed.build(len(FAMILIES))
    wrong_specs = {
        "about": texts, "version": others, "seed": [None, [], True, "0", 1, TEXT, LIST, NESTED],
        "tiers": [*others, {}, KEYS, {"train": {}}], "surprise": [1],
    }  # fmt: skip
    yield from field_cases(lambda field, value: case(f"specs-{field}", specs | {field: value}), wrong_specs)
    yield case("specs-many", specs | {"tiers": {"train": {f"join-{i:06}": TEXT[:16] for i in range(100_000)}}})
    wrong_top = {"format": [*others, "t2l_engine.tasks.v0"], "about": texts, "tasks": [*others, {}], "surprise": [1]}
    yield from field_cases(top, wrong_top)
    yield case("surprises", whole | KEYS)
    yield from (case("missing", {k: v for k, v in whole.items() if k != field}, field) for field in whole)
    yield from (case(f"name-{name}", whole | {"tasks": {key: task}}, "tasks") for name, key in NAMES.items())
    yield from (case("entry", whole | {"tasks": {"good": task, "copy": value}}, "copy") for value in [*others, {}, KEYS])
    yield from (case("no", whole | {"tasks": {"copy": {k: v for k, v in task.items() if k != f}}}, f) for f in task)
    yield from field_cases(
        entry,
        {
            "skill": texts,
            "tier": [*others, "seen", {}, ["train"]],
            "source": texts,
            "licence": [*others, [3], [None], ["MIT", ""], [SURROGATE], {"MIT": 1}],
            "permissive": [*FLAGS, HUGE, NESTED],
            "splits": [*others, {}, ["train"], KEYS],
            "descriptions": [None, [], 3, HUGE, NESTED, KEYS],
            "surprise": [1],
            TEXT[:100] + "surprise": [1],
        },
    )
    codes = [
        None,
        3,
        [],
        {},
        ["MTIzNDU="],
        "",
        "MTIz",
        "MTIzNDU",
        "MTIzNDU=\n",
        "not base64",
        "\u65e5",
        SURROGATE,
        TEXT,
        HUGE,
    ]
    codes += ["QUFBQUFBQUFBQQ==", "MTIzNDU=", "=", "AAAA====", NESTED]  # the first has an example twice, the second test's
    yield from field_cases(split, {"train": codes, "../train": ["YWJjZGU="], "t" * 65: ["YWJjZGU="], "": ["YWJjZGU="]})
    most = (MAX_MANIFEST_BYTES - 1000) // 4 * 3 // 5 // 12 * 12
    prefixes = base64.b64encode(b"".join(i.to_bytes(5, "big") for i in range(most))).decode()
    yield case("many-examples", whole | {"tasks": {"copy": task | {"splits": {"train": prefixes}, "tier": "seen"}}}, "tier")
    half = prefixes[: len(prefixes) // 40 * 20]
    yield case("many-in-two", whole | {"tasks": {"copy": task | {"splits": {"train": half, "test": half}}}}, "splits")
    yield case("many-splits", whole | {"tasks": {"copy": task | {"splits": {f"s{i}": "MTIzNDU=" for i in range(100_000)}}}})
    yield case("many-tasks", whole | {"tasks": {f"task{i}": task for i in range(10_000)} | {"copy": None}}, "copy")
    start = b'{"format": "t2l_engine.tasks.v1", "about": '
    yield from _large(shop, "manifest", "manifest.json", MAX_MANIFEST_BYTES, start, [b'"tasks": ', b'"tier": '])


def _instructions(shop: Workshop) -> Iterator[Case]:
    file = "task001_colours.json"
    whole = json.loads(shop.read("sni", file))
    count = iter(range(10_000))

    def make(field: str, value: object) -> Case:
        content = json.dumps(whole | {field: value}).encode()
        return shop.case(f"sni-{next(count)}-{field.replace(' ', '-')}", "sni", file, content, field)

    good = whole["Instances"][0]
    texts = [None, 3, True, {}, {"a": "b"}, [1], [None], [["a"]], SURROGATE, ["a", SURROGATE], HUGE, LIST, NESTED, KEYS]
    labels = [*texts, "x" * MIB, ["word"] * 10_000, [""] * 20_000]
    outputs = [*texts, "x" * (2 * MIB), ["x" * 1000] * 1100, [""] * (MIB + 1)]
    inputs = [None, 3, ["a"], {}, SURROGATE, HUGE, NESTED, KEYS, "x" * (2 * MIB)]
    wrong = [None, 3, "grass", {"input": "grass", "output": ["green"]}, [None], [[]], ["grass"], [{}], LIST, [NESTED], KEYS]
    yield from field_cases(
        make,
        {
            "Source": labels,
            "Categories": labels,
            "Instance License": labels,
            "Definition": [*texts, "", [], [" ", "\n"], "x" * (2 * MIB)],
            "Instances": [
                *wrong,
                *([good, {"input": "coal"}], [good, {"output": ["black"]}]),
                *([good, good | {"input": value}] for value in inputs),
                *([good, good | {"output": value}] for value in outputs),
                [good] * 60_000 + [3],
                [good | {"output": "x" * MIB}] * 12 + [SURROGATE],
            ],
        },
    )
    for name in ("task001_a b", "task001_~"):
        yield shop.case(f"sni-name-{name[8:]}", "sni", f"{name}.json", shop.read("sni", file), "expected task names")
    no_file = partial(shop.case, base="sni", file="task002_folder.json", refusals=(FileNotFoundError,))
    yield no_file("sni-folder", content=lambda path: path.mkdir())
    yield no_file("sni-pipe", content=os.mkfifo)
    start = b'{"Definition": '
    yield from _large(shop, "sni", file, MAX_FILE_BYTES, start, [b'"Source": ', b'"Instances": ', b'"input": '])


def _benchmarks(shop: Workshop) -> Iterator[Case]:
    count = iter(range(10_000))

    def fields(name: str, wrong: dict[str, list[object]]) -> Iterator[Case]:
        file = f"{name}.jsonl"
        line = shop.read("benchmarks", file)
        row = json.loads(line)

        def make(field: str, value: object) -> Case:
            inner = {"raw": row["raw"] | {field: value}} if "raw" in row and field != "raw" else {field: value}
            content = line + json.dumps(row | inner).encode()
            return shop.case(f"benchmarks-{next(count)}-{field}", "benchmarks", file, content, field)

        yield from field_cases(make, wrong)

    texts = [None, 3, True, [], ["a"], {}, SURROGATE, HUGE, LIST, NESTED, KEYS]
    lists = [None, 3, "a", {}, [1], [None], [["a"]], ["a", SURROGATE], HUGE, LIST, NESTED, KEYS]
    choices = {"label": ["A", "B"], "text": ["hot", "cold"]}
    wrong = [*lists, *({**choices, key: value} for key in choices for value in lists), {"label": ["A"], "text": []}]
    yield from fields("openbookqa", {"question_stem": texts, "choices": wrong, "answerKey": [*texts, "C", "AB"]})
    labels = [None, True, 2, -2, 0.0, "2", "00", [], {}, HUGE, LIST, NESTED, KEYS]
    yield from fields("hellaswag", {"ctx": texts, "endings": lists, "label": labels, "raw": [None, 3, "a", []]})
    yield from fields("mbpp", {"text": texts, "code": texts, "test_list": lists, "test_setup_code": texts, "split": texts})
    for name, line in {"empty": b"[]", "text": b"no json", "nul": b"\0", "deep": b"[" * 100_000, "cut": b'{"raw": '}.items():
        yield shop.case(f"benchmarks-{name}", "benchmarks", "mbpp.jsonl", shop.read("benchmarks", "mbpp.jsonl") + line)
    yield shop.case("benchmarks-long-line", "benchmarks", "mbpp.jsonl", b" " * (48 * MIB) + b"{")
