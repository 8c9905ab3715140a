"""Names of adapters: the grammar, and that different requests have different names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2l_engine.serving import names
from t2l_engine.serving.names import parse


@pytest.mark.parametrize("model, asked", [
    ("t2l/small:Name it: now.", ("small", "Name it: now.")), ("t2l: two\nlines ", (None, " two\nlines ")),
    ("t2l:t2l:x", (None, "t2l:x")), ("t2l:a/b", (None, "a/b")),
    ("t2l", None), ("t2l/a/b:c", None), ("t2l-0123456789abcdef", None), ("T2L:x", None), (" t2l:x", None), ("", None),
    ("t2l/owner", None),  # a repository of that owner
])  # fmt: skip
def test_grammar(model, asked):
    assert parse(model) == asked


@pytest.mark.parametrize("model, message", [
    ("t2l:", "got an empty one"), ("t2l: \n", "got an empty one"), ("t2l/:x", "no checkpoint's name"),
    ("t2l:a\0b", "without NUL"), ("t2l:\ud800", "Unicode"), ("t2l:" + "x" * 4001, "at most 4000 characters, got 4001"),
])  # fmt: skip
def test_what_describes_nothing_is_refused(model, message):
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        names.check_text("model", parse(model)[1])
    names.check_text("model", "x" * 4000)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@given(st.one_of(st.none(), st.from_regex(r"[a-z0-9.-]{1,8}", fullmatch=True)), texts.filter(str.strip))
def test_a_name_says_what_was_asked_for(checkpoint, description):
    model = f"t2l:{description}" if checkpoint is None else f"t2l/{checkpoint}:{description}"
    assert parse(model) == (checkpoint, description)


@given(st.lists(texts, max_size=4), st.lists(texts, max_size=4))
def test_digests_of_different_lists_differ(first, second):
    assert (names.digest(*first) == names.digest(*second)) == (first == second)


def test_shapes_of_names():
    key = names.key("c", "e", "v", "text")
    assert len(key) == 32 and int(key, 16)
    assert len({names.key(*parts) for parts in ("abcd", "xbcd", "axcd", "abxd", "abcx")}) == 5, "each part counts"
    assert names.adapter_id(key) == "t2l-" + key[:16]
    name = names.lora_name("t2l:text", "c")
    assert name.startswith("t2lq-") and len(name) == 21 and "text" not in name
    assert len({name, names.lora_name("t2l:other", "c"), names.lora_name("t2l:text", "d")}) == 3
