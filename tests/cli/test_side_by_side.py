"""One input answered by a base model and by adapters, in one batch."""

import contextlib
import copy
import threading
import time
from concurrent.futures import CancelledError

import pytest

import t2l_engine as t2l
from t2l_engine.lora.layer import LoRALinear
from t2l_engine.serving import side_by_side
from t2l_engine.serving.side_by_side import Row, SideBySide

TASKS = ["Count the words.", "Name the capital.", "Write it in capital letters.", "Reverse it."]
TEXT = "one two"


@pytest.fixture
def desk(checkpoint, tiny_llama):
    """A function that makes one; all are closed."""
    model, tokenizer = tiny_llama
    engine, made = t2l.TextToLoRA.from_pretrained(checkpoint), []

    def make(**options):
        made.append(SideBySide(engine, copy.deepcopy(model), tokenizer, **options))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(RuntimeError):  # closed by the test
            one.close()


def last(desk, rows, text=TEXT, **options):
    return list(desk.answers(text, rows, **{"max_new_tokens": 6, **options}))[-1]


def adapted(*tasks):
    return [Row(task, adapted=True) for task in tasks]


def test_rows_answer_as_they_do_alone(desk):
    desk = desk()
    rows = [Row(), *adapted(*TASKS[:2])]
    together = last(desk, rows)
    assert together.texts == tuple(last(desk, [row]).texts[0] for row in rows) and len(set(together.texts)) == 3
    assert together.tokens == 3 * 6 and together.made.startswith("2 new adapters: encode ") and together.first > 0


def test_a_pointer_network_reads_sentences(tiny_llama):
    """In one chunk: slots have the rank of the checkpoint."""
    model, tokenizer = tiny_llama
    config = t2l.PointerConfig(
        variant="pointer", modules=("q_proj",), in_features=(12,), out_features=(20,), num_layers=2, rank=2, lora_alpha=4,
        feature_size=12, latent_size=8, first_layer=1,
    )  # fmt: skip
    reads = t2l.DocumentEncoderConfig("tiny", "last", 1, prefix="", suffix="")
    encoder = t2l.DocumentEncoder(copy.deepcopy(model), tokenizer, reads)
    desk = SideBySide(t2l.DocToLoRA(encoder, t2l.PointerHyperNetwork(config)), model, tokenizer)
    last(desk, [Row(), *adapted(*TASKS[:2])])
    (module,) = next(m for m in model.modules() if isinstance(m, LoRALinear)).adapted_modules
    assert not desk.documents and module.lora_A.shape[1] == 2
    desk.close()


def test_prompts(desk):
    """The base model may read the description; adapted rows do if the checkpoint was trained so."""
    rows = [Row(), Row(TASKS[0]), *adapted(TASKS[0])]
    plain, told = f"{TEXT} : ", f"{TASKS[0]}\n\n{TEXT} : "
    assert desk().prompts(TEXT, rows) == [plain, told, plain]
    one = desk()
    one.engine.description_in_prompt = True
    assert one.prompts(TEXT, rows) == [plain, told, told]
    one.engine.description_in_prompt = False
    assert last(one, rows).texts[1] == last(one, [rows[1]]).texts[0]  # shorter prompts are padded


def test_the_least_recently_used_makes_room(desk):
    desk = desk(slots=2)
    first = [last(desk, adapted(task)).texts for task in TASKS[:2]]
    assert last(desk, adapted(TASKS[0])).made == "adapters held already"
    assert last(desk, adapted(TASKS[2])).made.startswith("1 new adapter: ")
    assert list(desk._held) == [TASKS[0], TASKS[2]]
    again = last(desk, adapted(TASKS[1], TASKS[0]))
    assert again.made.startswith("1 new adapter: ") and list(desk._held) == [TASKS[0], TASKS[1]]
    assert again.texts == (*first[1], *first[0])


@pytest.mark.parametrize("rows, text, options, message", [
    ([], TEXT, {}, "rows: expected at least one"),
    (adapted(*TASKS[:3]), TEXT, {}, "descriptions: expected at most 2, as many as there are slots, got 3"),
    (adapted(""), TEXT, {}, "text"),
    ([Row()], "word " * 130, {}, "input: expected at most 122 tokens"),
    ([Row()], TEXT, {"max_new_tokens": 500}, "max_new_tokens: expected fewer than the model's 128 positions, got 500"),
])  # fmt: skip
def test_errors_leave_it_usable(desk, rows, text, options, message):
    desk = desk(slots=2)
    before = last(desk, adapted(TASKS[0])).texts
    with pytest.raises(ValueError, match=message):
        last(desk, rows, text, **options)
    assert last(desk, adapted(TASKS[0])).texts == before


def test_closing_the_answers_stops_the_model(desk):
    desk, calls = desk(), []
    desk.model.register_forward_pre_hook(lambda *_: calls.append(1))
    answers = desk.answers(TEXT, [Row()], max_new_tokens=100)
    held, go = desk.model.forward, threading.Event()

    def wait(*args, **kwargs):
        if len(calls) == 3:
            assert go.wait(60)
        return held(*args, **kwargs)

    desk.model.forward = wait
    next(answers)
    next(answers)
    leaving = threading.Thread(target=answers.close)
    leaving.start()
    assert desk._stop.wait(60)
    go.set()
    leaving.join()
    assert len(calls) <= 4
    desk.model.forward = held
    assert last(desk, [Row()]).tokens == 6


def test_an_answer_ends(desk, monkeypatch):
    """At an end token; in plain text, where the next worked example would begin; others go on."""
    desk = desk()
    rows, said = [Row(), *adapted(TASKS[0])], []
    decode = desk.tokenizer.decode
    monkeypatch.setattr(desk.tokenizer, "decode", lambda ids, **options: said.append(ids) or decode(ids, **options))
    last(desk, rows)
    base, other = said[-2:]
    end = next(i for i, token in enumerate(base) if token not in other)
    desk.model.generation_config.eos_token_id = [base[end]]
    assert last(desk, rows).tokens == end + 1 + 6  # of the base model, of the adapter
    desk.model.generation_config.eos_token_id = None
    desk.engine = copy.copy(desk.engine)
    desk.engine.prompt_form = "raw"
    words = ["", "   if x:", "   if x:\n\n", "   if x:\n\ny", "   if x:\n\ny\n\nInput:", "   if x:\n\ny\n\nInput: no"]
    monkeypatch.setattr(side_by_side, "continuation", lambda tokenizer, prompt, ids: words[len(ids) - 1])
    ended = last(desk, [Row()])
    assert ended.texts == ("  if x:\n\ny",) and ended.tokens == 5, "as evaluation reads answers: blank lines, indentation"


def test_a_character_in_several_tokens(desk, monkeypatch):
    desk, texts = desk(), ["caf\ufffd", "café"]
    monkeypatch.setattr(desk.tokenizer, "decode", lambda ids, **options: texts[len(ids) - 1])
    assert [answers.texts for answers in desk.answers(TEXT, [Row()], max_new_tokens=2)] == [("caf",), ("café",)]


def test_two_threads_at_once(desk):
    """Their questions are answered one after the other, each with its own adapters."""
    desk = desk(slots=1)
    right = {task: last(desk, adapted(task)).texts for task in TASKS[:2]}
    found = {task: [] for task in right}

    def ask(task):
        for _ in range(3):
            found[task].append(last(desk, adapted(task)).texts)

    threads = [threading.Thread(target=ask, args=(task,)) for task in right]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {task: [texts] * 3 for task, texts in right.items()}


def test_closing_ends_what_runs_and_what_waits(desk):
    one, calls, go = desk(), [], threading.Event()
    ended = []

    def wait(*_):
        calls.append(1)
        assert go.wait(60)

    one.model.register_forward_pre_hook(wait)

    def ask():
        try:
            last(one, [Row()], max_new_tokens=100)
        except CancelledError:
            ended.append("cancelled")
        else:
            ended.append("answered")

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not calls or one._thread._work_queue.qsize() < 2:
        time.sleep(0.01)
    closing = threading.Thread(target=one.close)
    closing.start()
    assert one._stop.wait(60)
    go.set()
    for thread in (*threads, closing):
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(ended) == ["answered", "cancelled", "cancelled"] and len(calls) <= 2
    assert not any(isinstance(module, LoRALinear) for module in one.model.modules())
    with pytest.raises(CancelledError):
        last(one, [Row()])
