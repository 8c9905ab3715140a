"""An evaluation with answers from a script: what is asked, which form is chosen, what is left out, how answers score."""

import dataclasses
import math
import statistics

import pytest

from t2l_engine.files.errors import ConfigError
from t2l_engine.research.evaluation import sandbox
from t2l_engine.research.evaluation.answers import NOT_ACCEPTED, Answer
from t2l_engine.research.evaluation.methods import Method, Stored
from t2l_engine.research.evaluation.metrics import by_family, interval
from t2l_engine.research.evaluation.run import Evaluation, Settings, summary
from t2l_engine.research.tasks.folder import Example
from tests.research.evaluation.conftest import DESCRIPTIONS, random_stack, task
from tests.research.training.conftest import word_tokenizer


class Scripted:
    """Answers are ``reply(query, adapters)``: a text, or numbers where options are asked; tokens are words."""

    def __init__(self, reply=lambda query, adapters: "red"):
        self._reply, self.asked = reply, []

    def ask(self, queries, adapters, progress):
        self.asked.append((adapters, list(queries)))
        progress(len(queries))
        answers = []
        for query in queries:
            found = self._reply(query, adapters)
            text, likelihoods = ("", tuple(found)) if query.options else (found, ())
            answers.append(Answer(text, likelihoods, len(query.prompt.split())))
        return answers

    @property
    def prompts(self):
        return [query.prompt for _, queries in self.asked for query in queries]


def words(*inputs, split="test", answer="red", **changes):
    return tuple(Example(text, (answer,), split, **changes) for text in inputs)


def evaluation(answerer, tasks, methods=None, settings=None, **more):
    settings = settings or Settings(repeats=2)
    return Evaluation(answerer, word_tokenizer(), tasks, [Method("only")] if methods is None else methods, settings, **more)


def pools(*examples):
    return {name: examples for name in DESCRIPTIONS}


SHOWN = words("w1", "w2", "w3", "w4", split="train", answer="shown")
BOTH = ("raw", "chat")
BASE = Method("base", templates=BOTH, repeats=False)
DESCRIBED = Method("base-description", description=True, templates=BOTH)
ICL = Method("icl", description=True, shots=3, templates=BOTH)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_what_every_method_is_shown():
    tasks = [task("first", *words("x y", "y x")), task("last", *words("z"), descriptions=["Only."])]
    answerer = Scripted()
    told = []
    e = evaluation(answerer, tasks, [BASE, DESCRIBED, ICL, Method("adapted")], pools=pools(*SHOWN),
                   progress=lambda method, count: told.append((method, count)))  # fmt: skip
    result = e.run()
    base, described, icl, adapted = ([q.prompt for q in queries] for _, queries in answerer.asked)
    assert base == [f"Input: {text}\nOutput:" for text in ("x y", "y x", "z")]
    first, second = DESCRIPTIONS["first"]
    assert described == [
        f"{text}\n\nInput: {x}\nOutput:"
        for text, x in ((first, "x y"), (first, "y x"), ("Only.", "z"), (second, "x y"), (second, "y x"), ("Only.", "z"))
    ]
    assert len(icl) == 6
    for prompt, plain in zip(icl, described, strict=True):
        start, end = plain.split("Input:")
        assert prompt.startswith(start) and prompt.endswith(end) and prompt.count("Output: shown\n\n") == 3
    assert icl[0] != icl[3] and icl[2] != icl[5]  # other worked examples; "Only." is the description of both repeats
    # two repeats ask the same, where a method says that they differ
    assert adapted == 2 * [f"<user> {text} <bot> " for text in ("x y", "y x", "z")]
    assert told == [("base", 3), ("base-description", 6), ("icl", 6), ("adapted", 6)]
    assert e.answers == sum(count for _, count in told)
    assert result["items"] == {"first": 2, "last": 1} and result["left_out"] == {}
    of_last = result["details"]["icl"]["tasks"]["last"]
    assert of_last["prompt_tokens"] == statistics.fmean(len(icl[i].split()) for i in (2, 5))


# --- forms -----------------------------------------------------------------------------------------------------------


def by_form(right, split_of):
    """Right where the form of the prompt is ``right`` of the split of its input."""

    def reply(query, adapters):
        form = "raw" if "Input:" in query.prompt else "chat"
        text = next(name for name in split_of if name in query.prompt)
        return "red" if form == right[split_of[text]] else "blue"

    return reply


@pytest.mark.parametrize("better, worse", [("raw", "chat"), ("chat", "raw")])
def test_the_form_is_chosen_on_validation_examples_alone(better, worse):
    """Also where the other one is better on those that count."""
    tasks = [task("first", *words("t1", "t2"))]
    answerer = Scripted(by_form({"val": better, "test": worse}, {"t1": "test", "t2": "test", "v1": "val", "v2": "val"}))
    e = evaluation(answerer, tasks, [BASE, Method("adapted")], validation={"first": words("v1", "v2", split="val")})
    result = e.run()
    assert result["forms"] == {
        "base": {"form": better, "validation": {better: 100.0, worse: 0.0}}, "adapted": {"form": "chat", "validation": None},
    }  # fmt: skip
    assert result["tasks"]["first"]["base"] == 0.0
    asked = [[q.prompt for q in queries] for _, queries in answerer.asked]
    assert [len(prompts) for prompts in asked] == [2, 2, 2, 4]  # the forms of base on v1 and v2; then t1 and t2
    assert all("v1" in p or "v2" in p for p in asked[0] + asked[1]) and not any("v" in p for p in asked[2] + asked[3])
    assert e.answers == 10


@pytest.mark.parametrize("count", [1, 2])
def test_only_so_many_validation_examples_a_task(count):
    """Tasks count alike, whatever their number of examples; a tie is the first form's."""
    tasks = [task("first", *words("t1")), task("last", *words("t2")), task("again", *words("t3"))]
    answerer = Scripted(lambda query, adapters: "blue" if "v2" in query.prompt else "red")
    settings = Settings(repeats=1, validation_items=count)
    validation = {"first": words("v1", "v2", "v3", split="val"), "last": words("v1", split="val")}
    result = evaluation(answerer, tasks, [BASE], settings, validation=validation).run()
    mean = {1: 100.0, 2: 75.0}[count]
    assert result["forms"]["base"] == {"form": "raw", "validation": {"raw": mean, "chat": mean}}
    assert not any("v3" in prompt for prompt in answerer.prompts)


@pytest.mark.parametrize("validation", [{}, {"first": ()}, {"other": words("v1")}])
def test_without_validation_the_first_form_is_taken_and_the_result_says_so(validation):
    answerer = Scripted()
    e = evaluation(answerer, [task("first", *words("t1"))], [BASE], validation=validation)
    assert e.run()["forms"] == {"base": {"form": "raw", "validation": None}}
    assert len(answerer.asked) == 1 and e.answers == 1


def test_code_chooses_no_form(monkeypatch):
    monkeypatch.setattr(sandbox, "check_sandbox", lambda: None)
    monkeypatch.setattr(sandbox, "run_tests", lambda program, tests: "failed")
    held = words("v1", split="val", metric="pass", tests="assert f") + words("v2", split="val")
    e = evaluation(Scripted(), [task("first", *words("t1", metric="pass", tests="assert f"))], [BASE],
                   Settings(run_code=True), validation={"first": held})  # fmt: skip
    assert e.run()["forms"]["base"]["validation"] == {"raw": 100.0, "chat": 100.0} and e.answers == 3


# --- what is left out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest, kept", [
    (26, ["a", "b b b", "c c c c c c"]),  # icl: 6 words of the longer description, 12 of worked examples, 2 + 6
    (25, ["a", "b b b"]),
    (22, ["a"]),
])  # fmt: skip
def test_long_items_are_left_out_of_every_method_alike(longest, kept):
    """Of the base model's too, whose prompt is short."""
    tasks = [task("first", *words("a", "b b b", "c c c c c c"), descriptions=["Say it.", "Say it, said in more words."])]
    answerer = Scripted()
    settings = Settings(repeats=2, max_prompt_tokens=longest)
    result = evaluation(answerer, tasks, [BASE, ICL, Method("adapted")], settings, pools=pools(*SHOWN)).run()
    assert result["items"] == {"first": len(kept)}
    assert result["left_out"] == ({} if len(kept) == 3 else {"first": 3 - len(kept)})
    lengths = [len(p.split()) for p in answerer.prompts]
    assert len(lengths) == len(kept) * (1 + 2 + 2) and max(lengths) <= longest
    for _, queries in answerer.asked:
        assert {q.prompt.split("Input: ")[-1].split("\nOutput:")[0] if "Input" in q.prompt else q.prompt[7:-7]
                for q in queries} == set(kept)  # fmt: skip


def test_tasks_without_an_adapter_are_not_asked_and_absent():
    stack = random_stack(2)
    of = {"last": "last", "first": "first"}
    method = Method("oracle", Stored(stack, list(of)), lambda task, *_: of.get(task.name), repeats=False)
    answerer = Scripted()
    tasks = [task(name, *words("x")) for name in DESCRIPTIONS]
    result = evaluation(answerer, tasks, [Method("other", repeats=False), method]).run()
    assert result["tasks"] == {"again": {"other": 100.0}} | {n: {"other": 100.0, "oracle": 100.0} for n in ("first", "last")}
    assert result["details"]["oracle"]["tasks"].keys() == {"first", "last"} and result["no_adapter"] == {"oracle": 1}
    assert [(a, [q.adapter for q in queries]) for a, queries in answerer.asked] == [
        (None, ["", "", ""]), (method.adapters, ["first", "last"]),
    ]  # fmt: skip
    nobody = dataclasses.replace(method, key=lambda task, example, repeat: None)
    result = evaluation(Scripted(), tasks, [nobody]).run()
    assert result["details"] == {"oracle": {"tasks": {}}} and result["tasks"]["first"] == {}


# --- scores ----------------------------------------------------------------------------------------------------------


def scored(examples, reply, settings=None):
    """What is said of one task, and the queries."""
    answerer = Scripted(reply)
    method = Method("only", repeats=False)
    result = evaluation(answerer, [task("first", *examples)], [method], settings or Settings(max_new_tokens=7)).run()
    return result["details"]["only"]["tasks"]["first"], answerer.asked[0][1]


def options(texts, likelihoods, score, unnormalised):
    example = Example("x", (texts[1],), "test", metric="options", options=texts)
    return (example,), {"x": likelihoods}, {"score": score, "unnormalised": unnormalised}, {"options": texts}


#: (examples, answers by input, scores, what every query asks for) of a task.
JUDGED = {
    "a text has three scores": (
        (Example("x", ("the red cat", "cat"), "test"), Example("y", ("dog",), "test")), {"x": " cat ", "y": "A dog!"},
        {"score": 50.0, "containment": 100.0, "rouge_l": 100 * (1 + 2 / 3) / 2}, {"max_new_tokens": 7, "one_line": True}),
    "a number may be reasoned to": (
        words("x", "y", answer="1,200", metric="number"), {"x": "3 x 400\nso 1200.", "y": "1200 or 7"}, {"score": 50.0},
        {"max_new_tokens": 99, "one_line": False}),
    "by the likelihood a byte, -1.33 and -1.0": options(("cat", "elephants"), (-4.0, -9.0), 100.0, 0.0),
    "the first is likelier": options(("cat", "elephants"), (-1.0, -9.0), 0.0, 0.0),
    "two bytes a letter": options(("ab", "éé"), (-5.0, -8.0), 100.0, 0.0),
    "of equal lengths": options(("ab", "cd"), (-5.0, -4.0), 100.0, 100.0),
    "a tie is the first's": options(("ab", "cd"), (-4.0, -4.0), 0.0, 0.0),
    "each measure is a mean over the examples that have it": (
        (*words("x", answer="7", metric="number"), *words("z"), *options(("a", "b"), (), 0, 0)[0][:1]),
        {"x": "red", "z": "red"}, {"score": 100 / 3, "containment": 100.0, "rouge_l": 100.0, "unnormalised": 0.0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("examples, answers, expected, asked", JUDGED.values(), ids=JUDGED)
def test_scores(examples, answers, expected, asked):
    def reply(query, adapters):
        found = answers[query.prompt.split()[1]]
        return (-1.0, -2.0) if query.options and isinstance(found, str) else found

    found, queries = scored(examples, reply, Settings(max_new_tokens=7, max_long_tokens=99))
    assert found.pop("by_repeat") == [found["score"]] and found.pop("prompt_tokens") == 3.0
    assert found == pytest.approx(expected)
    assert all(getattr(query, name) == value for query in queries for name, value in asked.items())


def test_an_answer_of_several_lines_is_not_cut():
    """Its first line counts where an accepted answer has one."""
    outputs = ("red\ncat",), ("dog",), ("red", "cat\ndog")
    examples = tuple(Example(text, of, "test") for text, of in zip("xyz", outputs, strict=True))
    found, queries = scored(examples, lambda query, adapters: "dog" if query.one_line else " red\ncat\n")
    assert found["score"] == 100.0 and sorted(q.one_line for q in queries) == [False, False, True]


def test_tasks_with_few_answers_are_chosen_among_them():
    """The score is that of the likeliest one, and probabilities are judged too; others are answered as ever."""
    few = task("first", *words("a", "b", answer="yes"), *words("c", answer="no"))
    many = task("last", *(words(text, answer=text)[0] for text in "abcdefghi"))
    likelihoods = {"a": (-0.1, -1.5), "b": (-3.0, -0.2), "c": (-0.4, -0.5)}  # of "no", "yes"
    answerer = Scripted(lambda query, adapters: likelihoods[query.prompt.split()[1]] if query.options else "a")
    result = evaluation(answerer, [few, many], settings=Settings(repeats=1, choose=True)).run()
    assert {q.options for _, queries in answerer.asked for q in queries} == {("no", "yes"), ()}
    assert {name: of["only"] for name, of in result["tasks"].items()} == pytest.approx({"first": 200 / 3, "last": 100 / 9})
    found = result["details"]["only"]["calibration"]
    assert found["items"] == 3 and found["brier"] == pytest.approx(
        2 * sum((1 + math.exp(d)) ** -2 for d in (-1.4, 2.8, 0.1)) / 3
    )


@pytest.mark.parametrize("template, asked", [("chat", ("ab", "cd")), ("raw", (" ab", " cd"))])
def test_options_continue_the_prompt_as_training_does(template, asked):
    answerer = Scripted(lambda query, adapters: (-1.0, -2.0))
    example = Example("x", ("ab",), "test", metric="options", options=("ab", "cd"))
    evaluation(answerer, [task("first", example)], [Method("only", templates=(template,))], Settings(repeats=1)).run()
    assert [query.options for _, queries in answerer.asked for query in queries] == [asked]


@pytest.mark.parametrize("template, score", [("raw", 100.0), ("chat", 0.0)])
def test_an_answer_to_a_raw_prompt_ends_where_the_next_example_begins(template, score):
    """A base model goes on with one; in chat a turn ends by a token."""
    answerer = Scripted(lambda query, adapters: " so 18.\n\nInput: another\nOutput: 34")
    example, method = Example("x", ("18",), "test", metric="number"), Method("only", templates=(template,))
    result = evaluation(answerer, [task("first", example)], [method], Settings(repeats=1)).run()
    assert result["details"]["only"]["tasks"]["first"]["score"] == score


def test_no_accepted_answer_is_not_the_empty_one():
    example = Example("x", ("",), "test")
    for text, score in ((NOT_ACCEPTED, 0.0), ("", 100.0)):
        found, (query,) = scored([example], lambda query, adapters, text=text: text, Settings(verify=True))
        assert found["score"] == score and query.accepted == ("",)


def test_code_is_run_where_that_is_wanted(monkeypatch):
    ran = []

    def run_tests(program, tests):
        ran.append((program, tests))
        return "passed" if "x + 1" in program else "timeout" if "while" in program else "failed"

    monkeypatch.setattr(sandbox, "check_sandbox", lambda: ran.append("checked"))
    monkeypatch.setattr(sandbox, "run_tests", run_tests)
    heads = [f"def {name}(x):\n" for name in "abc"]
    examples = [Example(head, ("    return x + 1",), "test", metric="pass", tests=f"assert {head[4]}(1) == 2")
                for head in heads]  # fmt: skip
    replies = dict(zip("abc", ("    return x + 1", "```python\ndef b(x):\n    while True: pass\n```", "    y"), strict=True))
    found, queries = scored(examples, lambda query, adapters: replies[query.prompt.split("def ")[1][0]],
                            Settings(run_code=True, max_long_tokens=50))  # fmt: skip
    assert found["score"] == pytest.approx(100 / 3) and all((q.max_new_tokens, q.one_line) == (50, False) for q in queries)
    assert ran == [
        "checked",
        (heads[0] + "    return x + 1", "assert a(1) == 2"),
        ("def b(x):\n    while True: pass\n", "assert b(1) == 2"),
        (heads[2] + "    y", "assert c(1) == 2"),
    ]


def test_code_is_refused_otherwise(monkeypatch):
    tasks = [task("first", *words("x")), task("last", *words("y", metric="pass", tests="assert x"))]
    monkeypatch.setattr(sandbox, "run_tests", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="^run_code: expected to be set, since some answers are code that has to be run"):
        evaluation(Scripted(), tasks)

    def fail():
        raise RuntimeError("sandbox: expected Linux, got plan9")

    monkeypatch.setattr(sandbox, "check_sandbox", fail)
    with pytest.raises(ValueError, match="^run_code: sandbox: expected Linux, got plan9"):
        evaluation(Scripted(), tasks, settings=Settings(run_code=True))
    evaluation(Scripted(), tasks[:1], settings=Settings(run_code=True)).run()


def test_repeats():
    asked = []

    def reply(query, adapters):
        asked.append(query)
        return "red" if len(asked) in (1, 2, 3, 5) else "blue"

    tasks = [task("first", *words("x", "y"))]
    method = Method("only", description=True)
    result = evaluation(Scripted(reply), tasks, [method], Settings(repeats=3)).run()
    of = result["details"]["only"]
    assert of["tasks"]["first"]["by_repeat"] == [100.0, 50.0, 50.0]
    assert result["tasks"]["first"]["only"] == of["tasks"]["first"]["score"] == pytest.approx(200 / 3)


def test_methods_and_settings_that_do_not_fit():
    tasks = [task("first", *words("x")), task("last", *words("y y y y"))]
    with pytest.raises(ConfigError, match="^max_prompt_tokens: no item of task last has prompts of at most 4 tokens in"):
        evaluation(Scripted(), tasks, [BASE], Settings(max_prompt_tokens=4)).run()


# --- summaries -------------------------------------------------------------------------------------------------------


def test_differences_are_paired_on_the_tasks_that_both_answered():
    scores = {
        "a": {"t2l": 50.0, "base": 40.0, "oracle": 90.0},
        "b": {"t2l": 70.0, "base": 20.0},
        "c": {"t2l": 10.0, "base": 30.0, "oracle": 60.0},
        "d": {"base": 100.0, "oracle": 100.0},
    }
    found = summary(scores, {"all": list("abcd"), "few": ["b"], "without": ["d"]}, "t2l")
    assert list(found) == ["all", "few", "without"]
    every = found["all"]
    assert every["tasks"] == 4 and list(every["mean"]) == ["t2l", "base", "oracle"]
    assert every["mean"] == pytest.approx({"t2l": 130 / 3, "base": 47.5, "oracle": 250 / 3})
    assert every["difference"] == {
        "base": {"tasks": 3, **dataclasses.asdict(interval([10.0, 50.0, -20.0]))},
        "oracle": {"tasks": 2, **dataclasses.asdict(interval([-40.0, -50.0]))},
    }
    assert found["few"] == {
        "tasks": 1, "mean": {"t2l": 70.0, "base": 20.0},
        "difference": {"base": {"tasks": 1, "mean": 50.0, "low": 50.0, "high": 50.0}},
    }  # fmt: skip
    assert found["without"]["difference"] == {}
    assert summary(scores, {"all": list("abcd")}, "base")["all"]["difference"]["t2l"]["mean"] == pytest.approx(-40 / 3)


def test_intervals_over_families():
    """Where two families have several tasks, of a method's own tasks; beside intervals over tasks with the same means."""
    rows = {
        f"{family}-{i:03}": {"t2l": 10.0 * i + 40 * (family == "b"), "base": 5.0 * i} for family in "ab" for i in range(3)
    }
    rows["c-000"] = {"t2l": 100.0, "base": 0.0}
    rows = {name: of | ({} if name in ("b-001", "b-002") else {"few": 0.0}) for name, of in rows.items()}
    found = summary(rows, {"all": list(rows), "one": [name for name in rows if name[0] != "b"]}, "t2l")
    assert found["one"].keys() == {"tasks", "mean", "difference"}
    of = found["all"]
    assert {statistic: list(over) for statistic, over in of["over_families"].items()} == {
        "mean": ["t2l", "base"], "difference": ["base"],
    }  # fmt: skip
    over = of["over_families"]["difference"]["base"]
    paired = {name: of["t2l"] - of["base"] for name, of in rows.items()}
    assert over == {"families": 3, **dataclasses.asdict(interval(*by_family(paired)))}
    assert over["mean"] == pytest.approx(of["difference"]["base"]["mean"]) and of["difference"]["base"]["tasks"] == 7
    assert of["over_families"]["mean"]["t2l"]["mean"] == pytest.approx(of["mean"]["t2l"])
