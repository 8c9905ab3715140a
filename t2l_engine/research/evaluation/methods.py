"""The methods that an evaluation compares: a prompt with or without an adapter.

A *repeat* draws anew what a method may depend on: the description (number ``repeat`` modulo their count), the few-shot
examples, the other task of the shuffled-description baseline, the junk text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.engine import TextToLoRA
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.library import DescriptionIndex
from t2l_engine.lora.handle import attach
from t2l_engine.research.evaluation.answers import Adapters, Use
from t2l_engine.research.evaluation.library import TOP_K, Arrow, average
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import Example, Task
from t2l_engine.research.training.runs import ADAPTERS, INPUT_ALONE, MULTI_TASK, Prompt, prompt_of_run, settings_of
from t2l_engine.text.encoder import TextEncoder
from t2l_engine.text.llm_encoder import condition_text
from t2l_engine.text.prompts import CHAT, RAW

SHOTS = 3
#: The constant baseline: a description without information about the task.
CONSTANT = "Answer the question."

Key = Callable[[Task, Example, int], "str | None"]  # (task, example, repeat) -> key of the adapter, None if it has none
ANY: Key = lambda task, example, repeat: ""  # noqa: E731


@dataclasses.dataclass(frozen=True)
class Method:
    """One compared method.

    Attributes:
        name: in results.
        adapters: None: the base model.
        key: of the adapter in ``adapters``; None if it has none for the task.
        description: whether the prompt has the task description.
        shots: number of few-shot examples in the prompt.
        templates: candidate prompt templates; validation selects one.  Adapters have the one they were trained with.
        repeats: whether repeats differ; otherwise one is run.
    """

    name: str
    adapters: Adapters | None = None
    key: Key = ANY
    description: bool = False
    shots: int = 0
    templates: tuple[str, ...] = (CHAT,)
    repeats: bool = True


def description_of(task: Task, repeat: int) -> str:
    """The task's description of a repeat."""
    return task.descriptions[repeat % len(task.descriptions)]


def shots_of(
    task: Task, pool: Sequence[Example], repeat: int, count: int = SHOTS, asked: str | None = None
) -> list[tuple[str, str]]:
    """``count`` few-shot examples (input, answer) from ``pool``, drawn by task and repeat.

    Never the input ``asked``, nor one that differs from it in case and white space alone.
    """
    order = random.Random(f"shots/{task.name}/{repeat}").sample(range(len(pool)), min(count + 1, len(pool)))
    known = None if asked is None else normalise(asked)
    return [(pool[i].input, pool[i].outputs[0]) for i in order if normalise(pool[i].input) != known][:count]


def junk(task: Task, repeat: int) -> str:
    """Eight words of random letters, drawn by task and repeat: as long as a description, without meaning."""
    generator = random.Random(f"junk/{task.name}/{repeat}")
    word = lambda: "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9)))  # noqa: E731
    return " ".join(word() for _ in range(8)).capitalize() + "."


def partners(names: Sequence[str], repeat: int) -> dict[str, str]:
    """Task -> another task: a derangement drawn by repeat; ValueError for fewer than two tasks."""
    if len(names) < 2:
        raise ValueError(f"methods: the shuffled-description baseline needs at least two tasks, got {len(names)}")
    order = list(names)
    random.Random(f"shuffled/{repeat}").shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


# --- methods -------------------------------------------------------------------------------------------------------


def base_methods(shots: Sequence[int] = (SHOTS,)) -> list[Method]:
    """The base model: with the input alone, with the description, and with description and few-shot examples.

    ``shots``: numbers of few-shot examples, a method each.
    """
    both = (RAW, CHAT)
    return [
        Method("base", templates=both, repeats=False),
        Method("base-description", description=True, templates=both),
        *(Method("icl" + counted(n), description=True, shots=n, templates=both) for n in shots),
    ]


def counted(shots: int) -> str:
    """The end of the name of a method with ``shots`` examples."""
    return "" if shots == SHOTS else f"-{shots}"


def without_chat(methods: Sequence[Method]) -> list[Method]:
    """``methods`` for a tokenizer without chat template: those that may choose a template get "raw"."""
    return [dataclasses.replace(method, templates=(RAW,)) if RAW in method.templates else method for method in methods]


def generated_methods(
    name: str,
    engine: TextToLoRA,
    tasks: Sequence[Task],
    *,
    pools: Mapping[str, Sequence[Example]] | None = None,
    shots: Sequence[int] = (SHOTS,),
    in_prompt: bool = False,
    from_input: bool = False,
) -> list[Method]:
    """A checkpoint's adapters, generated from the task's description, and their baselines.

    Args:
        tasks: all tasks of the evaluation; the shuffled-description baseline draws among them.
        pools: per task, the examples from which worked examples are drawn.  With them, a checkpoint that reads examples has
            the methods "-examples", generated from the description and the examples that few-shot prompts show, and
            "-examples-shuffled", from those of another task.
        shots: numbers of those examples; numbers above what the checkpoint reads have no method.
        in_prompt: whether the checkpoint was trained with the description in the prompt; every prompt then has the correct
            description, also those of baselines.
        from_input: whether it was trained to generate adapters from inputs; there are no baselines then.

    With a one-hot encoder, adapters are generated from names of known tasks, and "-shuffled" is the only baseline.
    """
    adapters, known = Generated(engine), getattr(engine.encoder.config, "tasks", None)
    by_name = {task.name: task for task in tasks if known is None or task.name in known}
    partners_of = functools.cache(lambda repeat: partners(list(by_name), repeat))

    def method(suffix: str, key: Key, repeats: bool = True) -> Method:
        return _asked(name + suffix, adapters, Prompt(engine.prompt_form, in_prompt), key, repeats or in_prompt)

    def generated_from(other: bool = False, count: int = 0) -> Key:
        """The text of the task, or of its partner (``other``), with ``count`` worked examples."""

        def key(task: Task, example: Example, repeat: int) -> str | None:
            if task.name not in by_name:
                return None
            of = by_name[partners_of(repeat)[task.name]] if other else task
            text = description_of(of, repeat) if known is None else of.name
            if not count:
                return text
            return condition_text(text, shots_of(of, pools[of.name], repeat, count, example.input))

        return key

    if from_input:
        return [method("", lambda task, example, repeat: example.input, repeats=False)]
    methods = [method("", generated_from(), known is None), method("-shuffled", generated_from(other=True))]
    if known is None:
        methods.append(method("-junk", lambda task, example, repeat: junk(task, repeat)))
        methods.append(method("-constant", lambda task, example, repeat: CONSTANT, repeats=False))
    for count in shots if pools else ():
        if count <= engine.encoder.max_examples:
            ending = f"-examples{counted(count)}"
            methods.append(method(ending, generated_from(count=count)))
            methods.append(method(f"{ending}-shuffled", generated_from(other=True, count=count)))
    return methods


def _asked(name: str, adapters: Adapters, prompt: Prompt, key: Key = ANY, repeats: bool | None = None) -> Method:
    """The method of adapters that were trained with ``prompt``; ``repeats``: None: where the prompt has a description."""
    repeats = prompt.described if repeats is None else repeats
    return Method(name, adapters, key, description=prompt.described, templates=(prompt.form,), repeats=repeats)


def per_task_method(stack: AdapterStack, names: Sequence[str], prompt: Prompt = INPUT_ALONE) -> Method:
    """A LoRA per task, trained on the task itself: method "oracle"; ``names``: tasks, in the order of ``stack``."""
    known = set(names)
    own = lambda task, example, repeat: task.name if task.name in known else None  # noqa: E731
    return _asked("oracle", Stored(stack, names), prompt, own)


def library_methods(stack: AdapterStack, prompt: Prompt = INPUT_ALONE) -> list[Method]:
    """The average of a library of adapters, and Arrow routing over it."""
    return [_asked("average", Stored(average(stack), [""]), prompt), _asked("arrow", Routed(stack), prompt)]


def nearest_method(
    stack: AdapterStack,
    names: Sequence[str],
    descriptions: Mapping[str, Sequence[str]],
    prompt: Prompt = INPUT_ALONE,
    encoder: TextEncoder | None = None,
) -> Method:
    """The adapter of a library whose descriptions are nearest to the task's: retrieval instead of generation.

    Args:
        names: of the adapters, in the order of ``stack``.
        descriptions: of each of them.
        encoder: of sentences; None: all-MiniLM-L6-v2, loaded when first asked.

    Raises ConfigError if an adapter has no descriptions.
    """
    if without := [name for name in names if not descriptions.get(name)]:
        raise ConfigError(f"descriptions: expected some of every adapter, got none of {without[0]}")
    known = {name: descriptions[name] for name in names}
    index = functools.cache(lambda: DescriptionIndex(known, encoder or TextEncoder.from_pretrained()))
    key = lambda task, example, repeat: index().nearest([description_of(task, repeat)])[0][0].name  # noqa: E731
    return _asked("nearest", Stored(stack, names), prompt, key, repeats=True)


def multi_task_method(folder: Path) -> Method:
    """One adapter for all tasks: the run of ``t2l train lora`` with mode multi-task in ``folder``.

    "multi-task-description" if the run's prompts had the description, else "multi-task".  Raises FileNotFoundError if no run
    has finished there, ConfigError if it was one of another mode.
    """
    settings = settings_of(folder)
    if settings is None:
        raise FileNotFoundError(f"{folder}: expected the folder of a finished run of t2l train lora, found none")
    if settings.get("mode") != MULTI_TASK:
        raise ConfigError(f"{folder}: expected a run with mode multi-task, got {short_repr(settings.get('mode'))}")
    stack, prompt = AdapterStack.from_peft(folder / ADAPTERS / MULTI_TASK), prompt_of_run(folder / ADAPTERS)
    return _asked(MULTI_TASK + "-description" * prompt.described, Stored(stack, [""]), prompt)


# --- adapters ------------------------------------------------------------------------------------------------------


class _Attached:
    """Attaches, for each batch, the adapters that it needs; :meth:`_stack` makes them."""

    identity: str

    def _stack(self, keys: Sequence[str]) -> AdapterStack:
        """One adapter per key."""
        raise NotImplementedError

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[Use]:
        yield lambda keys: self._use(model, keys)

    @contextlib.contextmanager
    def _use(self, model: nn.Module, keys: Sequence[str]) -> Iterator[None]:
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        handle = attach(model, self._stack(list(numbers)).to(next(model.parameters()).device))
        try:
            with handle.use([numbers[key] for key in keys]):
                yield
        finally:
            handle.detach()


class Generated(_Attached):
    """Adapters generated by a checkpoint; keys are descriptions, for an LLM encoder with their examples."""

    def __init__(self, engine: TextToLoRA):
        self._engine, self._embeddings = engine, {}
        state = [*engine.hypernetwork.state_dict().values(), *engine.encoder.weights().values()]
        self.identity = digest(state, repr(engine.encoder.config), repr(engine.hypernetwork.scaling))

    def _stack(self, keys: Sequence[str]) -> AdapterStack:
        for text in keys:  # one by one: rounding depends on the batch
            if text not in self._embeddings:
                self._embeddings[text] = self._engine.encoder.encode([text])[0]
        return self._engine.hypernetwork.generate(torch.stack([self._embeddings[text] for text in keys]))


class Stored(_Attached):
    """Adapters of ``stack`` by name."""

    def __init__(self, stack: AdapterStack, names: Sequence[str]):
        self._adapters, self._numbers = stack, {name: i for i, name in enumerate(names)}
        self.identity = digest(_tensors(stack), *names)

    def _stack(self, keys: Sequence[str]) -> AdapterStack:
        return self._adapters[[self._numbers[name] for name in keys]]


class Routed:
    """A library with Arrow routing of every token; ignores keys."""

    def __init__(self, stack: AdapterStack):
        self._stack, self.identity = stack, digest(_tensors(stack), "arrow")

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[Use]:
        with Arrow(model, self._stack, min(TOP_K, len(self._stack))):
            yield lambda keys: contextlib.nullcontext()


def _tensors(stack: AdapterStack) -> list[torch.Tensor]:
    return [*stack.lora_A.values(), *stack.lora_B.values(), stack.scaling]


def digest(tensors: Iterable[torch.Tensor], *parts: str) -> str:
    """SHA-256 of the values, dtypes and shapes of ``tensors``, and of ``parts``, in hex digits."""
    found = hashlib.sha256("\0".join(parts).encode())
    for tensor in tensors:
        found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
