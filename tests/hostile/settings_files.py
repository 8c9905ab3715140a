"""Settings of training runs that parse and say what cannot be; ``text_files`` has those that are no YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.hostile import Case, Workshop
from tests.hostile.config_files import HUGE, KEYS, NESTED, TEXT, field_cases

MANY = [[1]] * 2000  # fewer than YAML may have
NAN, INF = float("nan"), float("inf")


def cases(shop: Workshop) -> Iterator[Case]:
    file = "run.yaml"
    whole = shop.read("settings", file)
    given = {line.partition(":")[0]: line for line in whole.decode().splitlines()}
    count = iter(range(10_000))

    def make(field: str, value: object) -> Case:
        lines = given | {field: f"{field}: {json.dumps(value)}"}
        name = f"settings-{next(count)}-{field[:40]}"
        return shop.case(name, "settings", file, "\n".join(lines.values()).encode(), field[:40])

    counts = [None, True, [4], {}, "four", -1, 4.5, 10**30, HUGE, NAN, INF, TEXT, MANY]
    numbers = [None, [1.0], {}, "fast", -1, NAN, INF, HUGE, TEXT, MANY]
    choices = [None, 3, True, "other", "", ["linear"], {}, "\ud800", HUGE, TEXT, MANY, KEYS, NESTED]
    texts = [None, 3, True, ["a"], {}, "\ud800", MANY]
    positive = ("steps", "tasks_per_batch", "accumulation", "save_every", "rank", "samples_per_task", "max_tokens")
    positive += ("bucket_steps", "validation_samples", "head_in_size")
    yield from field_cases(make, dict.fromkeys(positive, [*counts, 0]) | {"latent_size": [*counts, 0, 3]})
    not_negative = ("warmup_steps", "seed", "validate_every", "held_out_descriptions")
    yield from field_cases(make, dict.fromkeys(not_negative, counts))
    yield from field_cases(make, dict.fromkeys(("learning_rate", "lora_alpha"), [*numbers, 0]))
    not_negative = ("weight_decay", "grad_clip", "neftune_alpha", "embedding_noise", "generated_l2")
    yield from field_cases(make, dict.fromkeys(not_negative, numbers))
    yield from field_cases(make, dict.fromkeys(("label_smoothing", "lora_dropout"), [*numbers, 1]))
    yield from field_cases(make, dict.fromkeys(("schedule", "dtype", "prompt", "weighting", "variant"), choices))
    yield from field_cases(
        make,
        {
            "scaling": [None, True, "big", [], {}, 0, -1, 1e39, 1e-60, NAN, INF, HUGE, TEXT, MANY],
            "base_model": texts,
            "encoder": texts,
            "mix_descriptions": [None, 3, "maybe", [], {}, HUGE, TEXT, MANY],
            "target_modules": [
                *(None, 3, "q_proj", [], {}, [3], [None], [["q_proj"]], ["\ud800"], ["q_proj", "q_proj"], MANY),
                ["q_proj"] * 9000,
                [f"m{i}" for i in range(9000)] + ["m0"],
                ["x" * 100_000] * 2,
            ],
            "surprise": [1, None, [], MANY],
            "x" * 1000: [1],
            "__class__": [1],
            "model_config": [{"extra": "allow"}],
            "self": [1],
        },
    )
    for name, lines in {
        "number-key": b"1: 3\n",
        "null-key": b"null: 3\n",
        "flag-key": b"yes: 3\n",
        "date-key": b"2024-01-01: 3\n",
        "bytes-key": b"!!binary aGk=: 3\n",
        "surrogate-key": b'"\\ud800": 3\n',
        "bytes": b"encoder: !!binary /w==\n",
        "date": b"rank: 2024-01-01\n",
        "set": b"variant: !!set {L}\n",
        "pairs": b"lora_dropout: !!pairs [a: 1]\n",
        "many-fields": b"".join(b"k%d: 1\n" % i for i in range(9000)),
        "many-long-fields": b"".join(b"k%d%s: 1\n" % (i, b"k" * 1000) for i in range(900)),
        "many-faults": b"rank: 0\nseed: -1\nlatent_size: 1\ndtype: int8\nvariant: XL\nweighting: no\ntempo: 3\n"
        + b"".join(b"%s: -1\n" % name for name in (b"warmup_steps", b"grad_clip", b"weight_decay", b"lora_dropout")),
    }.items():
        yield shop.case(f"settings-{name}", "settings", file, whole + lines)
    for field in ("base_model", "target_modules"):
        rest = "\n".join(line for name, line in given.items() if name != field)
        yield shop.case(f"settings-without-{field}", "settings", file, rest.encode(), field)
    for field, value in {"mix_descriptions": "true", "held_out_descriptions": "2", "embedding_noise": "0.5"}.items():
        lines = given | {"encoder": "encoder: one-hot", field: f"{field}: {value}"}
        yield shop.case(f"settings-one-hot-{field}", "settings", file, "\n".join(lines.values()).encode(), field)
