"""The page as a person uses it, in Chromium: sentences, answers, downloads, mistakes, two windows, a closed tab."""

import re
import time
import types
import zipfile

import pytest

import t2l_engine as t2l
from t2l_engine.serving import side_by_side

GGUF = pytest.importorskip("t2l_engine.serving.page", reason='pip install "t2l_engine[ui]"').GGUF

WHO = "Extract the name of the person."
FILE = "File the sentence under computers, cooking or law."
TEXT = "On Monday Clara talked about the recipe."
RIGHT = {WHO: "Clara", FILE: "cooking"}


def fill(window, descriptions, text, tokens=24):
    window.locator("#descriptions textarea").fill("\n".join(descriptions))
    window.locator("#input textarea").fill(text)
    window.locator("#tokens input[type=number]").fill(str(tokens))
    window.locator("#tokens input[type=number]").press("Tab")


def start(window):
    window.evaluate("document.querySelector('#state')?.remove()")  # of the answers before
    window.locator("#answer").click()


def wait(window):
    window.wait_for_function("document.querySelector('#state')?.textContent === 'done'")


def ask(window, descriptions, text, tokens=24):
    """The table of answers, by who gave them."""
    fill(window, descriptions, text, tokens)
    start(window)
    wait(window)
    cells = window.locator("#answers td").all_inner_texts()
    return dict(zip(cells[::2], cells[1::2], strict=True))


def message(window):
    """What the newest notice says; it is dismissed."""
    notice = window.locator("[data-testid=toast-body]").first
    text = notice.inner_text()
    window.locator("[data-testid=toast-close]").first.click()
    notice.wait_for(state="detached")
    return text


def test_generate_and_compare(window):
    answers = ask(window(), [WHO, FILE], TEXT)
    assert list(answers) == [
        "base model, the input alone",
        *(f"base model, told: {task}" for task in (WHO, FILE)),
        *(f"adapter: {task}" for task in (WHO, FILE)),
    ]
    assert {task: answers[f"adapter: {task}"] for task in RIGHT} == RIGHT


def test_times(window, desk):
    one = window()
    ask(one, [WHO], TEXT)
    new = "Write the word after the colour."
    ask(one, [new], TEXT)
    said = one.locator("#times").inner_text()
    assert re.search(r"1 new adapter: encode \d+ ms, generate \d+ ms, attach \d+ ms; 3 rows in one batch: first", said), said
    assert new in desk.side_by_side._held
    ask(one, [new], TEXT)
    assert one.locator("#times").inner_text().startswith("adapters held already")


def test_markup_is_text(window):
    """Sentences and inputs are shown as they are, never as HTML of the page."""
    one, text = window(), "<img src=x onerror=document.title='broken'> &amp; <b>bold</b>"
    answers = ask(one, [text], text, tokens=4)
    assert f"adapter: {text}" in answers and one.title() == "Text-to-LoRA"


def download(window, form, tmp_path):
    window.get_by_role("tab", name="Download").click()
    window.get_by_label(form).check()
    window.locator("#make").click()
    with window.expect_download() as waited:
        window.locator("#file a[download]").first.click()
    target = tmp_path / waited.value.suggested_filename
    waited.value.save_as(target)
    return target


def test_download(window, desk, tmp_path):
    one = window()
    ask(one, [WHO], TEXT)
    right = desk.side_by_side.engine.generate([WHO])
    archive = download(one, "PEFT folder (.zip)", tmp_path)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "adapter")
    stack = t2l.AdapterStack.from_peft(tmp_path / "adapter")
    assert all(stack.lora_B[name].equal(right.lora_B[name]) for name in right.lora_B)
    gguf = pytest.importorskip("gguf")
    one.reload()
    one.get_by_role("button", name="Answer").wait_for()
    ask(one, [WHO], TEXT)
    reader = gguf.GGUFReader(download(one, GGUF, tmp_path))
    assert reader.fields["adapter.lora.task_name"].contents() == WHO


@pytest.mark.parametrize("descriptions, text, said", [
    ([], TEXT, "Task descriptions: expected at least one line, got none."),
    ([WHO], " ", "Input: expected a text, got none."),
    (["x" * 10_000], TEXT, "Task descriptions: expected at most 1,000 characters a line, got 10,000."),
    ([WHO], "x " * 5_000, "Input: expected at most 4,000 characters, got 10,000."),
    ([f"Write the number {i}." for i in range(5)], TEXT, "Task descriptions: expected at most 4 lines, got 5."),
])  # fmt: skip
def test_mistakes(window, descriptions, text, said):
    """A readable message; the page goes on."""
    one = window()
    fill(one, descriptions, text)
    one.locator("#answer").click()
    assert said in message(one)
    assert ask(one, [WHO], TEXT)[f"adapter: {WHO}"] == RIGHT[WHO]


@pytest.fixture
def endless(desk, monkeypatch):
    """Answers are as long as they may be; ``passes``: through the model; each takes ``pause`` seconds more."""
    found, model = types.SimpleNamespace(passes=0, pause=0.0), desk.side_by_side.model
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(side_by_side, "NEXT_EXAMPLE", "\0")

    def count(*_):
        found.passes += 1
        time.sleep(found.pause)

    handle = model.register_forward_pre_hook(count)
    yield found
    handle.remove()


def test_a_closed_tab_and_the_stop_button_end_an_answer(window, desk, endless):
    one = window()
    ask(one, [WHO], TEXT, tokens=60)
    assert endless.passes == 60
    endless.pause = 0.25  # else a busy machine could end the answer before it hears that nobody waits
    for leave in (lambda one: one.close(), lambda one: one.locator("#stop").click()):
        one = window()
        fill(one, [WHO], TEXT, tokens=200)
        endless.passes = 0
        start(one)
        one.wait_for_function("document.querySelector('#answers td:last-child')?.textContent.length > 3")
        leave(one)
        desk.side_by_side.run(lambda: None)  # after the question at hand
        assert 1 < endless.passes < 200


def test_nothing_comes_from_elsewhere(chromium, address):
    """A page for machines without a network: every request goes to its own server."""
    context = chromium.new_context()
    asked, one = [], context.new_page()
    one.on("request", lambda request: asked.append(request.url))
    one.goto(address)
    one.get_by_role("button", name="Answer").wait_for()
    context.close()
    assert asked and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
