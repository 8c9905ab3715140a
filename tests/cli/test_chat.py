"""``t2l chat``: lines in, answers out; with a tiny model, and once with the real one."""

import copy
import functools
import io
import json
from importlib.util import find_spec

import pytest

import t2l_engine as t2l
from t2l_engine.hypernetwork.folder import Contents
from t2l_engine.text import base_model, packaged
from t2l_engine.text.prompts import prompt_of

TASK, OTHER = "Count the words.", "Name the capital."


class Terminal(io.StringIO):
    """Standard input where a person types; ``error`` comes after the last line."""

    def __init__(self, text, error=EOFError):
        super().__init__(text)
        self.error = error

    def isatty(self):
        return True

    def readline(self, *args):
        line = super().readline(*args)
        if not line and self.error is not EOFError:
            raise self.error
        return line


@pytest.fixture
def chat(run, checkpoint, tiny_llama, monkeypatch):
    """Run ``t2l chat`` with a tiny Llama: ``chat(stdin, *arguments)``; ``chat.answers(task, lines)``: what is right."""
    model, tokenizer = tiny_llama
    monkeypatch.setattr(base_model, "load", lambda name, dtype: (copy.deepcopy(model).to(dtype), tokenizer))

    def call(stdin, *arguments, task=TASK):
        options = ("-c", checkpoint, "--base-model", "tiny", "--dtype", "float32", "--max-new-tokens", 6)
        options += ("--task", task) if task else ()
        return run("chat", *options, *arguments, stdin=stdin)  # the last -c and --task count

    def answers(task, lines, form="chat", source=checkpoint, **cut):
        lora = t2l.attach(model, t2l.TextToLoRA.from_pretrained(source).generate([task or TASK], **cut))
        found = []
        for line in lines:
            ids = tokenizer(prompt_of(form, tokenizer, line), return_tensors="pt", add_special_tokens=False)["input_ids"]
            with lora.use(0 if task else -1):
                out = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
            found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        lora.detach()
        return found

    call.answers, call.model, call.tokenizer = answers, model, tokenizer
    return call


def test_raw_prompts(chat, monkeypatch):
    """A checkpoint that was trained on plain text is shown plain text; the space before an answer is not printed."""
    monkeypatch.setattr(Contents, "prompt_form", "raw")
    right = [chat.answers(task, ["one two"], form="raw")[0] for task in (TASK, None)]
    assert right[0] != chat.answers(TASK, ["one two"])[0]
    code, out, err = chat("one two\n/base")
    assert (code, err) == (0, "") and out.splitlines() == [text.lstrip(" ") for text in right]


def test_piped_lines(chat):
    """The adapter of the task in use answers, /base the base model, /both all in one batch; blank lines are skipped."""
    right = {task: chat.answers(task, ["one two", "/three"]) for task in (TASK, OTHER, None)}
    assert len({tuple(r) for r in right.values()}) == 3  # or the test shows nothing
    (mine, _), (other, _), (base, _) = right.values()
    script = {
        "one two\n": [mine], "/base\n\n": [base], "//three\n": [right[TASK][1]], "/base\n": [right[None][1]],
        f"/task\tb: {OTHER}\r\none two\n": [other], "/both\n": [base, mine, other], "/task task\none two\n": [mine],
        "/task b\none two\n": [other], f"/task {TASK}\none two": [mine],
    }  # fmt: skip
    code, out, err = chat("".join(script))
    assert (code, err, out.splitlines()) == (0, "", [line for lines in script.values() for line in lines])


def test_saved_adapters(chat, checkpoint, tmp_path, monkeypatch):
    """The one in use, as a PEFT folder; a model that llama.cpp's files know nothing of is refused."""
    code, out, err = chat(f"/task b: {OTHER}\n/save {tmp_path}/b\n/task {TASK}\n/save {tmp_path}/a\n")
    assert (code, out) == (0, "") and err.splitlines() == [f"t2l: wrote {tmp_path}/{name}" for name in "ba"]
    engine = t2l.TextToLoRA.from_pretrained(checkpoint)
    for name, task in (("a", TASK), ("b", OTHER)):
        saved, right = t2l.AdapterStack.from_peft(tmp_path / name), engine.generate([task])
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
        assert saved.lora_B["q_proj"].equal(right.lora_B["q_proj"])
    monkeypatch.setenv("HOME", str(tmp_path))  # as at a prompt of a shell; and endings of files in any case
    code, _, err = chat(f"/save ~/mine\n/save {tmp_path}/last.GGUF\n")
    assert code == 0 and err.startswith(f"t2l: wrote {tmp_path}/mine\n")
    assert (tmp_path / "mine" / "adapter_config.json").is_file() and (tmp_path / "last.GGUF").is_file()


@pytest.mark.parametrize("before, task", [("\ufeff", OTHER), ("", "Translate: the word to French.")], ids=["mark", "colon"])
def test_descriptions_that_look_like_more(chat, before, task):
    """A byte order mark is no input, and a sentence with a colon no name."""
    code, out, err = chat(f"{before}/task {task}\none two\n")
    assert (code, err, out.splitlines()) == (0, "", chat.answers(task, ["one two"]))


def test_what_goes_wrong_ends_no_session(chat, tmp_path):
    """At a terminal: the old task stays, and a folder that cannot be written is said."""
    (tmp_path / "file").write_text("")
    code, out, err = chat(Terminal(f"/save {tmp_path}/file/adapter\n/task base: Count.\none two\n"))
    assert code == 0 and out.splitlines()[-1] == chat.answers(TASK, ["one two"])[0] and f"{tmp_path}/file" in err


def test_a_description_that_the_encoder_refuses(chat, monkeypatch):
    prepare = t2l.TextEncoder.prepare

    def refuses(self, texts, examples=None):
        if texts == ["unknown"]:
            raise ValueError("texts[0]: expected a known one")
        return prepare(self, texts, examples)

    monkeypatch.setattr(t2l.TextEncoder, "prepare", refuses)
    code, out, err = chat(Terminal("/task unknown\n"))
    assert code == 0 and "/task: expected a known one" in err and "texts[0]" not in err


def test_a_line_that_is_not_utf8_is_told_when_it_comes(chat):
    stdin = io.TextIOWrapper(io.BytesIO(b"one two\ncaf\xe9\n"), encoding="utf-8")
    code, out, err = chat(stdin)
    assert code == 1 and out == chat("one two\n")[1] and "t2l: input: expected UTF-8 text, got 'caf\\udce9'" in err


def test_an_answer_is_one_line(chat, monkeypatch):
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids, **options: "a\nb\u2028c\r"[: 2 * len(ids)])
    code, out, _ = chat("one\n")
    assert code == 0 and out == "a b c \n"


def test_a_person_at_a_terminal(chat):
    lines = f"/help\none two\n/base\n/nonsense\n/task\n/task b: {OTHER}\n/both\n/tasks\n/quit\nnever\n"
    code, out, err = chat(Terminal(lines))
    answers = {name: chat.answers(task, ["one two"])[0] for name, task in (("base", None), ("task", TASK), ("b", OTHER))}
    both = [f"{name}: {answer}" for name, answer in answers.items()]
    assert code == 0 and out.splitlines() == [answers["task"], answers["base"], *both]
    said = ("t2l> ", "Lines are independent", "t2l: /nonsense: expected", "t2l: /task: expected a description", "encode ")
    assert all(text in err for text in (*said, " tokens/s")) and "never" not in err
    lines = [line.removeprefix("t2l> ") for line in err.splitlines()]
    assert f"t2l: * b: {OTHER}" in lines and f"t2l: task: {TASK}" in lines


@pytest.mark.parametrize("error", [EOFError, KeyboardInterrupt])
def test_leaving(chat, error):
    code, out, _ = chat(Terminal("one two\n", error))
    assert code == 0 and out.count("\n") == 1


def test_an_interrupted_script_is_not_done(chat, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.model, "generate", interrupt)
    assert chat("one two\n")[0] == 130
    assert chat(None)[0] == 1  # no standard input


TEXTS = {"one.txt": "The code of the lock\nis 4417. " * 5, "two.md": "Clara keeps her boat in Lisbon."}


def test_documents(chat, document_checkpoint, tmp_path):
    """A file is read as a whole and cut; documents have names as tasks have; each answers by its own adapter."""
    one, two = TEXTS.values()
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    cut = {"source": document_checkpoint, "max_chunk_tokens": 20}
    mine, other, base = (chat.answers(text, ["what code"], **cut)[0] for text in (one, two, ""))
    assert len({mine, other, base}) == 3  # or the test shows nothing
    script = f"what code\n/document b: {tmp_path}/two.md\nwhat code\n/both\n/task {two}\nwhat code\n/tasks\n"
    script += f"/save {tmp_path}/a.gguf"
    call = functools.partial(chat, task=None)
    options = ("-c", document_checkpoint, "--document", tmp_path / "one.txt", "--max-chunk-tokens")
    code, out, err = call(script, *options, 20)
    assert code == 0 and out.splitlines() == [mine, other, base, mine, other, other], err
    assert err.splitlines() == [f"t2l: * task: {two}", f"t2l: b: {two}", f"t2l: wrote {tmp_path}/a.gguf"]
    for stdin, size, message in (
        (f"/document {tmp_path}/none\n", 20, f"/document: {tmp_path}/none: No such file"),
        ("/document\n", 20, "/document: expected a file after it"),
        ("", 3, "--document: expected a document of at most 8 chunks, as slots hold, got"),
    ):
        code, out, err = call(stdin, *options, size)
        assert (code, out) == (1, "") and err.startswith(f"t2l: {message}") and err.count("\n") == 1, err


def test_a_checkpoint_of_descriptions_reads_no_documents(chat, tmp_path):
    (tmp_path / "file").write_text(TASK)
    for stdin, command, options in (
        (f"/document {tmp_path}/file\n", "/document", ()), ("", "--max-chunk-tokens", ("--max-chunk-tokens", 8)),
    ):  # fmt: skip
        code, out, err = chat(stdin, *options)
        assert (code, out) == (1, "") and err.startswith(f"t2l: {command}: expected a checkpoint that reads documents"), err
    assert chat("", "--document", tmp_path / "file")[0] == 2  # beside --task


SCRIPTS = [
    ("/nonsense\n", "/nonsense: expected one of /task, /document, /tasks, /base, /both, /save, /help, /quit; //"),
    ("/base\n", "/base: expected an input before it"),
    ("/both\n", "/both: expected an input before it"),
    ("/task  \n", "/task: expected a description after it"),
    ("/save\n", "/save: expected a folder or FILE.gguf after it"),
    ("/task base: Count.\n", "/task: expected another name than task and base, got base"),
    ("/task base\n", "/task: expected a description or the name of a task, got base"),
    ("".join(f"/task t{i}: Count {i}.\n" for i in range(8)), "/task: expected at most 8 tasks, got one more"),
    ("word " * 130, "input: expected at most 122 tokens (the model has 128 positions"),
    ("one\n", "--task: expected a non-empty description", "--task", " "),
    ("one\n", "--max-new-tokens: expected fewer than the model's 128 positions, got 128", "--max-new-tokens", 128),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_gets_a_status(chat, script):
    stdin, message, *options = script
    code, out, err = chat(stdin, *options)
    assert code == 1 and out == "" and err.startswith(f"t2l: {message}"), err


def test_sampling_follows_the_seed(chat):
    def sample(seed):
        code, out, _ = chat("one two\none two\n", "--temperature", "1.5", "--seed", seed)
        first, second = out.splitlines()
        assert code == 0 and first == second  # every answer is drawn anew
        return first

    greedy = chat.answers(TASK, ["one two"])[0]
    first = sample(0)
    assert first == sample(0) and first != sample(1) and first != greedy


@pytest.mark.skipif(find_spec(packaged.PACKAGE) is None, reason="make setup installs the model package")
def test_the_real_model(run):
    packaged.convert()  # the first time shows its progress
    task = "Give the antonym of the word."
    code, out, err = run("chat", "--task", task, "--max-new-tokens", 4, stdin="early\n/base\n")
    assert (code, err) == (0, "")
    adapted, base = out.splitlines()
    assert adapted == "late" != base
