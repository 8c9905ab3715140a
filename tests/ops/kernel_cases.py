"""How many tests the kernel cases are, by which a run of pytest in another process shows that it ran them."""

from t2l_engine.testing.cases import GROUP_CASES, HYPER_CASES, LORA_CASES

#: In names of cases: shapes of real models, which take most of the time.
LARGE = ("serve", "smollm2")
#: Those whose trunk also encodes tasks, from embeddings of each of these widths.
ENCODED = [case for case in HYPER_CASES if case.position != "rotary" and not case.name.startswith("nine")]
EMBED_DIMS = (24, 37, 300)


def at_least(*without: str) -> int:
    """Tests of cases whose names have none of the words: three a case of LoRA or of the hypernetwork, one a group, one for
    each width that is encoded."""
    count = lambda cases: sum(not any(word in case.name for word in without) for case in cases)  # noqa: E731
    return 3 * count(LORA_CASES) + count(GROUP_CASES) + 3 * count(HYPER_CASES) + len(EMBED_DIMS) * count(ENCODED)
