"""The README's section: costs at a glance, three doubts answered, and what real tasks say of speed and accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from bench.icl import measured, words
from bench.icl.words import ICL, KEPT, MEAN, OURS, PAPER, WARM, Entry, Linear, amount, entries, entry, ms, ratio, tflop, when
from bench.markdown import GAP, caption, everything, grid, number
from bench.rows import Result

MODEL = "mistral-7b"
#: As in ``t2l cost``, which has a longer answer by default.
COMMAND = f"t2l cost --model {MODEL} --answer 1"
RESULTS = "docs/results.md#examples-in-the-prompt-or-an-adapter"


def readme(result: Result) -> str:
    many = f"--users {MANY} --tasks {MANY}"
    over_questions = "All questions of a task beside an adapter kept for it, over their number"
    over_examples = "The first question of a task over the number of examples, counted and measured"
    held_by = "Keys and values over the length of a context beside an adapter, and a user's share of all that is held"
    parts = [
        _costs(result),
        _losses(result),
        *_doubt("What if my prompt is cached?", _cached(result), "icl-questions", over_questions, "--questions 100"),
        *_doubt(
            *("What if every user has another task?", _tasks(result), "icl-shots", over_examples),
            f"--questions {FEW} {many}",
        ),
        *_doubt("What about memory?", _memory(result), "icl-memory", held_by, many),
        f"**What do real tasks say?** {_answers(result)}",
        _real(result),
        caption(everything([result])),
    ]
    return "\n\n".join(parts)


# --- costs at a glance -----------------------------------------------------------------------------------------------


def _costs(result: Result) -> str:
    heads = [
        *("model", "lengths", "first question, ICL", "T2L", "ICL / T2L", "later question, ICL cached", "T2L", "ICL / T2L"),
        *("T2L costs less than a warm cache, questions", "a user's memory, ICL", "T2L", "adapter, in cached tokens"),
    ]
    at = [(MODEL, PAPER), *((model, MEAN) for model in words.models(result))]
    timed = {row.shape["model"] for row in result.rows}
    at += [(model, PAPER) for model in words.models(result) if words.title(model) in timed]
    lines = [_counted(entry(result, "costs", model=model, workload=workload)) for model, workload in at]
    lines += [_measured(result, found) for found in entries(result, "first_question")]
    return grid(heads, lines)


def _counted(found: Entry) -> list[str]:
    ways = found["ways"]
    icl, warm, ours = (ways[name] for name in ("icl", "icl-warm", "t2l-task"))
    return [
        words.title(found["model"]),
        _lengths(found),
        *(f"{tflop(way['first_token'])} TFLOP" for way in (icl, ours)),
        ratio(icl["first_token"] / ours["first_token"]),
        *(f"{tflop(way['later_token'])} TFLOP" for way in (warm, ours)),
        ratio(warm["later_token"] / ours["later_token"]),
        when(found["questions_won"]["t2l-task"]["icl-warm"]),
        *(amount(held(way, 1), "B") for way in (warm, ours)),
        str(found["adapter_tokens"]),
    ]


def _lengths(found: Entry) -> str:
    lengths = found["lengths"]
    name = "the paper's" if found["workload"] == PAPER else found["workload"]
    return f"{name}: {lengths['question']}, examples {lengths['shots']} x {lengths['shot']}"


def held(way: Entry, users: int) -> int:
    """Bytes beside the weights, and beside what is held once, of so many users with a task each."""
    return users * (way["per_user"] + way["per_task"])


def _measured(result: Result, found: Entry) -> list[str]:
    row, timed = measured.row_of(result, found), found["parts"]
    cost = {name: timed[name]["median_us"] for name in (OURS, ICL, WARM, KEPT)}
    return [
        f"{row.shape['model']}, measured, {found['dtype']}",
        f"the paper's: {row.shape['question']}, examples {row.shape['shots']} x {row.shape['shot']}",
        *(f"{ms(cost[name])} ms" for name in (ICL, OURS)),
        words.spread(found["measured"][ICL]),
        *(f"{ms(cost[name])} ms" for name in (WARM, KEPT)),
        ratio(cost[WARM] / cost[KEPT]),
        when(words.won(Linear(cost[OURS], cost[KEPT]), Linear(cost[WARM], cost[WARM]))),
        *[GAP] * 3,
    ]


def _losses(result: Result) -> str:
    """Where in-context learning costs less."""
    found = [c for c in entries(result, "costs") if c["workload"] in (PAPER, MEAN)]
    dearer = [c for c in found if c["ways"]["icl-warm"]["first_token"] < c["ways"]["t2l-task"]["first_token"]]
    bare = [c for c in entries(result, "costs") if not c["lengths"]["shot"]]
    lines = []
    if dearer:
        over = max(_over(c, "icl-warm") for c in dearer)
        lines.append(
            f"Where the examples are cached before a task's first question, that question costs T2L more, up to "
            f"{number(over)} times ({_named(dearer)})."
        )
    if bare:
        over = max(_over(c, "icl") for c in bare)
        lines.append(f"Without examples there is nothing to save: T2L costs up to {number(over)} times the question alone.")
    lines.append(_timed(result))
    return "\n".join(f"- {line}" for line in lines)


def _timed(result: Result) -> str:
    """The measured ratio of the first question beside its count, and its bars."""
    found = entries(result, "first_question")
    got = [f"{number(e['measured'][ICL]['median'])} ({e['dtype']})" for e in found]
    counted = dict.fromkeys(number(e["predicted"][ICL]["flops"]) for e in found)
    timed = [measured.row_of(result, e) for e in found]
    text = (
        f"Measured on {timed[0].shape['model']} the first question's ratio is {words.listed(got)}, by operations "
        f"{words.listed([*counted])}."
    )
    judged = [v for row in timed if (v := result.verdict(row))]
    missed = sum(not v.met for v in judged)
    return text + (
        f"  Bar: at least {number(1 / timed[0].bar['ratio'])}; {missed} of {len(judged)} missed." if judged else ""
    )


def _over(found: Entry, rival: str) -> float:
    return found["ways"]["t2l-task"]["first_token"] / found["ways"][rival]["first_token"]


def _named(found: Sequence[Entry]) -> str:
    by: dict[str, list[str]] = {}
    for c in found:
        lengths = "the paper's lengths" if c["workload"] == PAPER else "the mean lengths"
        by.setdefault(lengths, []).append(words.title(c["model"]))
    return "; ".join(f"{words.listed(models)} at {lengths}" for lengths, models in by.items())


# --- three doubts ----------------------------------------------------------------------------------------------------

FEW, MANY = 10, 64


def _doubt(question: str, answer: str, figure: str, shown: str, options: str) -> list[str]:
    image = f"[![{shown}](docs/figures/{figure}.png)]({RESULTS})"
    return [f"**{question}** {answer}  Your numbers: `{COMMAND} {options}`.", image]


def _cached(result: Result) -> str:
    found = entry(result, "costs", model=MODEL, workload=PAPER)
    ways, beats = found["ways"], found["questions_won"]
    warm, ours = ways["icl-warm"], ways["t2l-task"]
    return (
        f"Then a later question costs {tflop(warm['later'])} TFLOP with cached examples and {tflop(ours['later'])} with an "
        f"adapter ({words.title(MODEL)} at the paper's lengths).  T2L's first question costs "
        f"{tflop(ours['first'])}; in all T2L costs less than a warm cache "
        f"{words.when_said(beats['t2l-task']['icl-warm'])}, and than a cold one "
        f"{words.when_said(beats['t2l-task']['icl-cold'])}.  An adapter generated anew for every question "
        f"costs less than a cold cache {words.when_said(beats['t2l-request']['icl-cold'])} and than a warm one "
        f"{words.when_said(beats['t2l-request']['icl-warm'])}."
    )


def _tasks(result: Result) -> str:
    found = entry(result, "costs", model=MODEL, workload=PAPER)
    cold, ours = found["ways"]["icl-cold"], found["ways"]["t2l-task"]

    def over(questions: int) -> str:
        both = [words.Linear(way["first"], way["later"]).total(questions) for way in (cold, ours)]
        return number(both[0] / both[1])

    memory = [way["fixed"] + held(way, MANY) for way in (cold, ours)]
    return (
        f"Then no cache is warm.  In-context learning costs {over(1)} times as much as T2L if each task has one question, "
        f"{over(FEW)} times with {FEW} and {over(100)} times with 100 ({words.title(MODEL)} at the paper's lengths, "
        f"examples cached from the first question on).  {MANY} users with a task each hold {amount(memory[0], 'B')} beside "
        f"the weights, with T2L {amount(memory[1], 'B')}."
    )


def _memory(result: Result) -> str:
    found = entry(result, "costs", model=MODEL, workload=PAPER)
    lengths, ways = found["lengths"], found["ways"]
    least = [
        (words.title(model), entry(result, "costs", model=model, workload=PAPER)["tasks_to_win"]["t2l-task"]["icl-warm"])
        for model in words.models(result)
    ]
    from_on = words.listed([f"{name} {'at none' if tasks is None else tasks}" for name, tasks in least])
    return (
        f"An adapter for {words.title(MODEL)} is {amount(found['adapter_bytes'], 'B')}, less than the keys and values of "
        f"{found['adapter_tokens']} tokens; {lengths['shots']} examples of {lengths['shot']} tokens take "
        f"{amount(ways['icl-warm']['per_task'], 'B')}.  Text encoder and hypernetwork take "
        f"{amount(ways['t2l-task']['fixed'], 'B')} once, so T2L holds less only from a number of tasks at a time on, with a "
        f"user each: {from_on}."
    )


# --- real tasks ------------------------------------------------------------------------------------------------------


def _answers(result: Result) -> str:
    tasks = entries(result, "questions")
    model = result.rows[0].shape["model"]
    trained = "  It was not trained for the paper's benchmarks." if measured.BENCHMARK in measured.groups(result) else ""
    return (
        f"{model} with the bundled checkpoint, one question at a time: description and three examples in the prompt (ICL), "
        f"or the question alone and an adapter made of the description (T2L).{trained}  {measured.lost(tasks)}"
    )


def _real(result: Result) -> str:
    heads = [
        *("tasks", "prompt tokens, ICL / T2L", "accuracy, ICL", "description only", "T2L", "T2L, worded otherwise"),
        *("ms a question, ICL", "ICL cached", "T2L", "ms once, T2L", "first token of the first question, ICL / T2L"),
        *("all questions, ICL / T2L: no cache", "cold cache", "warm cache"),
    ]
    lines = []
    for name, tasks in measured.groups(result).items():
        tokens = [f"{measured.mean(tasks, lambda t, n=n: t['tokens'][n]):.0f}" for n in ("icl", "t2l")]
        lines.append(
            [
                f"mean of {len(tasks)} {name}",
                " / ".join(tokens),
                *(measured.accuracy(tasks, arm) for arm in ("icl", "description", "t2l-task")),
                measured.reworded(tasks),
                *(measured.question(tasks, arm) for arm in ("icl", "icl-warm", "t2l-task")),
                ms(measured.mean(tasks, lambda t: t["generate_us"])),
                *measured.ratios(tasks),
            ]
        )
    return grid(heads, lines) + "\n\n" + measured.conditions(entries(result, "questions"))
