"""Answers: kept on disk line by line, in batches that depend on the queries alone, each with its own adapter."""

import contextlib
import copy
import dataclasses
import functools
import itertools

import pytest
import torch

from t2l_engine.files.errors import ConfigError
from t2l_engine.lora.handle import attach
from t2l_engine.research.evaluation import answers
from t2l_engine.research.evaluation.answers import NOT_ACCEPTED, Answer, Answerer, Query, Store
from t2l_engine.research.evaluation.methods import Generated, Routed, Stored
from t2l_engine.testing.numerics import LOSS_ATOL
from t2l_engine.text.prompts import prompt_ids
from tests.research.evaluation.conftest import random_stack
from tests.research.training.conftest import WORDS

NAMES = ("first", "last", "other")
TEXTS = ("Say", "Repeat the word that comes first", "Say the last word.", "Say the last word. Repeat the word at the end")


def prompts():
    """Twelve different ones of three to seven tokens, not in order of length."""
    return [f"<user> {' '.join((WORDS * 3)[i : i + 1 + 7 * i % 5])} <bot>" for i in range(12)]


def queries(keys, **changes):
    return [Query(prompt, key, **{"max_new_tokens": 4} | changes) for prompt, key in zip(prompts(), itertools.cycle(keys))]


@pytest.fixture
def answerer(loaded):
    """Factory: an answerer of the tiny model."""

    def make(store=None, batch_size=4, model=None, tokenizer=None, identity="tiny"):
        model, tokenizer = model or loaded[0], tokenizer or loaded[1]
        return Answerer(model, tokenizer, identity=identity, store=store or Store(), batch_size=batch_size)

    return make


@pytest.fixture
def batches(loaded, monkeypatch):
    """The input ids of every batch that the model is given, generated from or scored."""
    seen = []

    def spy(name):
        original = getattr(loaded[0], name)

        @functools.wraps(original)
        def call(*args, **kwargs):
            if name == "generate" or kwargs.get("logits_to_keep", 0) > 1:
                seen.append(kwargs["input_ids"].tolist())
            return original(*args, **kwargs)

        monkeypatch.setattr(loaded[0], name, call)

    spy("generate")
    spy("forward")
    return seen


# --- kept on disk ----------------------------------------------------------------------------------------------------

ANSWERS = [Answer("naïve \u2028\r\n\ud800 {", (), 3), Answer("", (-1.5, -0.1, -1e-17), 0)]


def test_store_round_trip(tmp_path):
    path = tmp_path / "answers.jsonl"
    store = Store(path)
    assert store.get("a") is None and not path.exists()
    store.put("a", ANSWERS)
    store.put("b", ANSWERS[:1])
    assert path.read_bytes().count(b"\n") == 2
    for again in (store, Store(path)):
        assert again.get("a") == ANSWERS and again.get("b") == ANSWERS[:1] and again.get("c") is None
    Store(path).put("c", [])
    assert Store(path).get("c") == [] and Store(path).get("a") == ANSWERS
    (tmp_path / "empty").touch()
    assert Store(tmp_path / "empty").get("a") is None
    unsaved = Store()
    unsaved.put("a", ANSWERS)
    assert unsaved.get("a") == ANSWERS and Store().get("a") is None


def test_a_last_line_that_was_cut_is_dropped_wherever_it_was_cut(tmp_path):
    path = tmp_path / "answers.jsonl"
    store = Store(path)
    store.put("a", ANSWERS)
    first = path.read_bytes()
    store.put("b", ANSWERS)
    content = path.read_bytes()
    ends = (len(first) + 1, len(first) + 5, len(first) + 12, len(content) - 3, len(content) - 1)  # the last: its line break
    for end in ends:
        path.write_bytes(content[:end])
        read = Store(path)
        assert read.get("a") == ANSWERS and read.get("b") is None
        assert path.read_bytes() == first
        read.put("b", ANSWERS)
        assert path.read_bytes() == content
    path.write_bytes(first[:7])
    assert Store(path).get("a") is None and path.read_bytes() == b""


@pytest.mark.parametrize("content, line", [
    *((text, 1) for text in (b"my notes", b"my notes\n", b'{"results": [1, 2]}', b'{"key": "a"}\n', b"\xff\n")),
    *((text, 1) for text in (b'{"key": "a", "answers": [{"text": "x"}]}\n', b"[" * 100_000 + b"\n")),
    *((text, 1) for text in (b'{"key": "v"}', b'{"key": "a", "text": "b"}', b'{"key": "a", "answers": 3')),
    (b'{"key": "a", "text": "b"}\n{"key": "b", "te', 1),
    (b'{"key": "a", "answers": []}\n[]\n', 2),
    (b'{"key": "a", "answers": []}\n\n', 2),
    (b'{"key": "a", "answers": []}\n{"key": "b", "ans\n{"key": "c", "answers": []}\n', 2),  # cut, but not the last
])  # fmt: skip
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content, line):
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"other\.jsonl:{line}: "):
        Store(path)
    assert path.read_bytes() == content


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_hold_one_kind_and_so_many_rows(answerer, batches, loaded):
    asked = [
        *queries([""]), *queries([""], max_new_tokens=2), *queries([""], one_line=False),
        *queries([""], options=("red", "blue", "green")), Query("red", options=WORDS),
    ]  # fmt: skip
    told = []
    answers = answerer(batch_size=5).ask(asked, None, told.append)
    # Those of one query stay together, even where they are more than a batch.
    assert sorted(map(len, batches)) == sorted([6] + 12 * [3] + 3 * [5, 5, 2])
    assert sum(told) == len(asked) == len(answers)
    for query, answer in zip(asked, answers, strict=True):
        assert answer.prompt_tokens == len(query.prompt.split())
        assert len(answer.likelihoods) == len(query.options) and (not query.options or answer.text == "")


def test_an_answer_ends_at_its_first_line_break_where_it_is_one_line(answerer, loaded, monkeypatch):
    monkeypatch.setattr(type(loaded[1]), "decode", lambda self, ids, **kwargs: "\n red\nblue\n")
    texts = [answerer().ask([Query("red", one_line=one)], None)[0].text for one in (True, False)]
    assert texts == ["red", "\n red\nblue\n"]


def test_what_is_kept_is_not_asked_again(answerer, batches, engine, tmp_path):
    """A run that was stopped computes what is missing, in the same batches and to the bit, and nothing else."""
    generated = lambda: Generated(engine)  # noqa: E731
    asked = [*queries(TEXTS), *queries(TEXTS, options=("red", "blue green cow"))]
    whole = answerer().ask(asked, generated())
    every = list(batches)
    assert len(every) == 3 + 6 and len({a.text for a in whole}) > 2

    def stop(count):
        if len(batches) == 5:
            raise KeyboardInterrupt

    batches.clear()
    with pytest.raises(KeyboardInterrupt):
        answerer(Store(tmp_path / "kept")).ask(asked, generated(), stop)
    kept = (tmp_path / "kept").read_bytes()
    assert kept.count(b"\n") == 5
    batches.clear()
    again = answerer(Store(tmp_path / "kept")).ask(asked, generated())
    assert batches == every[5:]
    assert [(a.text, a.likelihoods) for a in again] == [(a.text, a.likelihoods) for a in whole]
    batches.clear()
    assert answerer(Store(tmp_path / "kept")).ask(asked, generated()) == again and batches == []
    lines = kept.splitlines(keepends=True)
    (tmp_path / "holes").write_bytes(lines[1] + lines[3])
    answerer(Store(tmp_path / "holes")).ask(asked, generated())
    assert batches == [every[0], every[2], *every[4:]]


@pytest.mark.parametrize("maker, changed, seed, expected", [
    ({"identity": "other"}, lambda q: q, 0, 3), ({"batch_size": 3}, lambda q: q, 0, 4), ({}, lambda q: q, 1, 3),
    *(({}, lambda q, of=of: dataclasses.replace(q, **of(q)), 0, expected) for of, expected in (
        (lambda q: {"prompt": f"<user> {q.prompt}"}, 3), (lambda q: {"adapter": "first"}, 3),
        (lambda q: {"options": ("red", "blue")}, 6), (lambda q: {"max_new_tokens": 3}, 3),
        (lambda q: {"one_line": False}, 3))),
])  # fmt: skip
def test_another_question_is_asked_anew(answerer, batches, maker, changed, seed, expected):
    store, asked = Store(), queries(NAMES)
    answerer(store).ask(asked, Stored(random_stack(3), NAMES))
    batches.clear()
    answerer(store, **maker).ask([changed(q) for q in asked], Stored(random_stack(3, seed=seed), NAMES))
    assert len(batches) == expected
    batches.clear()
    answerer(store).ask(asked, Stored(random_stack(3), NAMES))
    assert batches == []


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stored", "generated"])
def test_many_adapters_in_one_batch_are_each_adapter_alone(answerer, batches, engine, kind):
    keys = NAMES if kind == "stored" else TEXTS
    held = Stored(random_stack(3), NAMES) if kind == "stored" else Generated(engine)
    asked = queries(keys)
    together = [a.text for a in answerer(batch_size=12).ask(asked, held)]
    assert len(batches) == 1
    assert together == [answerer(batch_size=1).ask([q], held)[0].text for q in asked]
    base = [a.text for a in answerer().ask(asked, None)]
    turned = [a.text for a in answerer().ask(queries(keys[1:] + keys[:1]), held)]
    assert sum(a != b for a, b in zip(together, base, strict=True)) > 2
    assert sum(a != b for a, b in zip(together, turned, strict=True)) > 2


@pytest.mark.parametrize("kind", ["stored", "generated", "routed"])
def test_the_model_is_afterwards_what_it_was(answerer, engine, loaded, kind):
    model = loaded[0]
    stack = random_stack(3)
    held = {"stored": Stored(stack, NAMES), "generated": Generated(engine), "routed": Routed(stack)}[kind]
    ids = torch.tensor([[3, 9, 10]])
    before, modules = model(ids).logits, [type(m) for m in model.modules()]
    asked = queries(NAMES if kind == "stored" else TEXTS)
    first = answerer().ask(asked, held)

    def fail(count):
        raise OSError("for the test")

    with pytest.raises(OSError, match="for the test"):
        answerer().ask(asked, held, fail)
    assert torch.equal(model(ids).logits, before) and [type(m) for m in model.modules()] == modules
    again, base = ([a.text for a in answerer().ask(asked, adapters)] for adapters in (held, None))
    assert again == [a.text for a in first] != base


# --- options ---------------------------------------------------------------------------------------------------------


def char_tokenizer():
    """One token a character, so that a leading space is one; pads on the left."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *"\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.,?<>"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


@torch.no_grad()
def naive(model, tokenizer, prompt, option):
    """Log-likelihood of an option after a prompt, alone, out of all logits, in the model's dtype; and its tokens."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(option, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    return sum(float(logits[len(ids) + i - 1, token]) for i, token in enumerate(answer)), len(answer)


#: Relative positions, and absolute ones.
FAMILIES = {"Llama": {}, "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likelihood_of_an_option(tiny_model, answerer, family):
    model, tokenizer = tiny_model(family, **FAMILIES[family]), char_tokenizer()
    exact = copy.deepcopy(model).double()
    asked = [
        Query("Where do fish live?\n", options=("in water", "in trees or so", "x")),
        Query("Input: red\nOutput:", options=(" red", " R")),
        Query("A", options=("b", "a long one, longer than most are.")),
    ]
    found = answerer(model=model, tokenizer=tokenizer, batch_size=32).ask(asked, None)
    for query, answer in zip(asked, found, strict=True):
        for option, value in zip(query.options, answer.likelihoods, strict=True):
            expected, tokens = naive(exact, tokenizer, query.prompt, option)
            other, _ = naive(exact, tokenizer, query.prompt, f" {option}")
            assert abs(value - expected) <= tokens * LOSS_ATOL < abs(other - expected)


def test_verified_is_what_decoding_gives(tiny_model, answerer):
    """Of the accepted texts the one that is generated, if the line then ends."""
    tokenizer = char_tokenizer()
    model = tiny_model("Llama", vocab_size=len(tokenizer))
    maker = answerer(model=model, tokenizer=tokenizer, batch_size=32)
    asked = [Query(f"{word}\n") for word in ("the", "red", "cat", "is", "on", "blue", "mats", "today")]
    texts = []
    for query in asked:
        ids = tokenizer(query.prompt, return_tensors="pt")["input_ids"]
        new = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        texts.append("".join(tokenizer.convert_ids_to_tokens(new)))  # decoding puts spaces between
    whole = [len(text) == 3 and text == text.strip() and "\n" not in text for text in texts]
    assert sum(whole) > 3
    pairs = [(query, text) for query, text, fits in zip(asked, texts, whole, strict=True) if fits]
    right = [dataclasses.replace(query, accepted=("red", text, "blue")) for query, text in pairs]
    wrong = [dataclasses.replace(query, accepted=(text[:2] + "?", "blue")) for query, text in pairs]
    maker.__dict__["_ends"] = set(range(len(tokenizer)))  # a line may end before any token
    assert [answer.text for answer in maker.ask(right, None)] == [text for _, text in pairs]
    assert {answer.text for answer in maker.ask(wrong, None)} == {NOT_ACCEPTED}
    maker = answerer(model=model, tokenizer=tokenizer, batch_size=32)
    maker.__dict__["_ends"] = set()  # or never does
    assert {answer.text for answer in maker.ask(right, None)} == {NOT_ACCEPTED}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_common_prefix_is_computed_once(tiny_model, answerer, stack_for, family, monkeypatch):
    """The same answers as one by one, from fewer tokens; of Llama with an adapter."""
    tokenizer = char_tokenizer()
    model, seen = tiny_model(family, vocab_size=len(tokenizer), **FAMILIES[family]), []
    lora = attach(model, stack_for(model, ["q_proj"])) if family == "Llama" else None
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    tasks = ("Say the colour of the thing: ", "Repeat what comes after: ")
    words = ("the", "red", "cats", "is", "on", "blue thing")
    queries = [Query(f"{task}{word}\n", accepted=("a", "b?", "cde", *"xyzXYZ")) for task in tasks for word in words]
    use = lambda keys: lora.use([1] * len(keys)) if lora else contextlib.nullcontext()  # noqa: E731
    found = []
    for size, few in ((9, 10**9), (64, 4)):
        maker = answerer(model=model, tokenizer=tokenizer, batch_size=size)
        monkeypatch.setattr(answers, "FEWEST_SHARED", few)
        seen.clear()
        rows = {}
        prompts = prompt_ids(tokenizer, [query.prompt for query in queries])
        for indices in maker._batches(queries, prompts):
            batch = [queries[i] for i in indices]
            logits = iter([row for row, _ in maker._logits(batch, [prompts[i] for i in indices], use)])
            rows |= {(i, text): next(logits) for i in indices for text in queries[i].accepted}
        found.append((rows, sum(seen)))
    (alone, many), (together, few) = found
    assert len(alone) == len(together) == 9 * len(queries) and few < 0.6 * many
    for key, row in alone.items():
        assert (together[key] - row).abs().max() <= LOSS_ATOL, key


def test_ends_of_a_line(answerer, tiny_model):
    model, tokenizer = tiny_model("Llama"), char_tokenizer()
    model.generation_config.eos_token_id = 3
    ends = answerer(model=model, tokenizer=tokenizer)._ends
    assert ends >= {3, *tokenizer("\n", add_special_tokens=False)["input_ids"]}
    assert not ends & set(tokenizer("ab .", add_special_tokens=False)["input_ids"])
