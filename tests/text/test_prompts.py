"""Prompts as text and as ids."""

import json
from types import SimpleNamespace

import pytest

import t2l_engine as t2l
from t2l_engine.text.prompts import (
    answer_ids,
    answer_in,
    answer_of,
    chat_prompt,
    continuation,
    prompt_ids,
    prompt_of,
    raw_prompt,
    read_examples,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[UNK]", "<s>", "</s>", "Input", ":", "Output", "one", "two", "user", "a"]


def tokenizer(template=None, chat=None):
    """Of words; ``template``: what it puts around a text, as those of Llama and BERT do."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template:
        special = [(word, WORDS.index(word)) for word in ("<s>", "</s>")]
        made.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    found.chat_template = chat
    return found


@pytest.mark.parametrize("template, begins", [(None, []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", [])])
def test_ids_begin_as_the_tokenizer_begins_a_text(template, begins):
    """And end as the prompt does, which an answer continues."""
    own = tokenizer(template)
    prompts = [raw_prompt("", "one"), raw_prompt("", "one two")]
    plain = [own(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    assert prompt_ids(own, prompts) == [begins + ids for ids in plain] and prompt_ids(own, []) == []


def test_ids_of_a_chat_have_one_beginning():
    own = tokenizer("<s> $A", "<s>{% for m in messages %}user : {{ m['content'] }}{% endfor %}")
    (ids,) = prompt_ids(own, [chat_prompt(own, "one")])
    assert own.convert_ids_to_tokens(ids) == ["<s>", "user", ":", "one"]


@pytest.mark.parametrize("form", ["raw", "chat"])
@pytest.mark.parametrize("prepends", [True, False])
def test_an_answer_is_read_as_it_stands_after_the_prompt(form, prepends):
    """By tokenizers that put a space before every text, as those of Llama 2 and Mistral do, and by others."""
    words = ["<unk>", "▁", "▁Paris", "▁Output", "Output", ":", "▁of", "Paris", "</s>", "▁Input", "Input", "\n"]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -len(words[0])) for word in words], unk_id=0))
    spaces = tokenizers.normalizers.Replace(" ", "▁")
    first = tokenizers.normalizers.Prepend("▁")
    made.normalizer = tokenizers.normalizers.Sequence([first, spaces]) if prepends else spaces
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    own.chat_template = "{{ messages[0]['content'] }}"
    for answer, tokens in (("Paris", ["▁Paris"]), ("Paris of Paris", ["▁Paris", "▁of", "▁Paris"])):
        if form == "chat" and not prepends:
            tokens = ["Paris", *tokens[1:]]
        ids = answer_ids(own, answer_of(form, answer))
        assert own.convert_ids_to_tokens(ids) == tokens
        if form == "raw":
            prompt = prompt_of(form, own, "Paris")
            assert prompt_ids(own, [prompt + answer_of(form, answer)]) == [prompt_ids(own, [prompt])[0] + ids]


@pytest.mark.parametrize("prepends", [True, False])
@pytest.mark.parametrize("answer", ["Paris of Paris", " of Paris", "Paris\n  of", "", "\nParis"])
def test_a_generated_answer_is_read_as_it_was_meant(prepends, answer):
    """Indentation is part of a program: neither the space after "Output:" is, nor may another one go."""
    words = ["<unk>", "▁", "▁Paris", "▁Output", "Output", ":", "▁of", "Paris", "of", "</s>", "\n"]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -len(words[0])) for word in words], unk_id=0))
    spaces = tokenizers.normalizers.Replace(" ", "▁")
    whole = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse()]
    if prepends:
        spaces = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), spaces])
        whole.append(tokenizers.decoders.Strip(" ", 1, 0))
    made.normalizer, made.decoder = spaces, tokenizers.decoders.Sequence(whole)
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    prompt = raw_prompt("", "Paris")
    ids = [*answer_ids(own, answer_of("raw", answer)), own.eos_token_id]
    assert answer_in("raw", continuation(own, prompt, ids)) == answer
    if prepends:  # alone the first space goes, and with it one level of a program's lines
        assert own.decode(ids, skip_special_tokens=True) != answer_of("raw", answer) or not answer
    assert continuation(own, "Paris", ids) == own.decode(ids, skip_special_tokens=True)


DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%H:%M:%S.%f') %}{% endif %}{{ date_string }}"


@pytest.mark.parametrize("template, expected", [
    (DATED + " {{ messages[0]['content'] }}", "26 Jul 2024 one"),  # as of Llama 3
    ("{{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }}", "26 Jul 2024 one"),
    # Those of Qwen3 and SmolLM3 think unless told not to.
    ("{{ messages[0]['content'] }}{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}", "one"),
])  # fmt: skip
def test_chat_prompts_are_the_same_every_day_and_answer_at_once(template, expected):
    assert chat_prompt(tokenizer(chat=template), "one") == expected


@pytest.mark.parametrize("described", [False, True])
def test_the_prompts_of_a_checkpoint(described):
    network = SimpleNamespace(config=SimpleNamespace(embed_dim=2))
    engine = t2l.TextToLoRA(SimpleNamespace(embed_dim=2), network, "raw", description_in_prompt=described)
    assert engine.prompt(None, "one", "Do.") == "Do.\n\nInput: one\nOutput:"
    if described:
        with pytest.raises(ValueError, match="^description: expected the task's, for the checkpoint was trained with it in"):
            engine.prompt(None, "one")
    else:
        assert engine.prompt(None, "one") == "Input: one\nOutput:"


def test_examples_file(tmp_path):
    path = tmp_path / "shots.jsonl"
    rows = [
        {"input": "a", "output": "b"},
        {"input": "c", "output": ["d", "e"], "split": "train"},
        {"input": "a", "output": "b"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_examples(path) == [("a", "b"), ("c", "d")]
    for text, match in (
        ("", "expected at least one example, got none"),
        ('{"input": "a"}', r"shots.jsonl:1: output: expected a non-empty text, got None"),
        ('{"input": " ", "output": "b"}', r"shots.jsonl:1: input: expected a non-empty text, got ' '"),
        ('{"input": "a", "output": []}', r"shots.jsonl:1: output: expected a non-empty text, got \[\]"),
    ):
        path.write_text(text)
        with pytest.raises(t2l.ConfigError, match=match):
            read_examples(path)
    with pytest.raises(FileNotFoundError, match="none.jsonl: not found"):
        read_examples(tmp_path / "none.jsonl")
