"""The methods that an evaluation compares: a prompt with or without an adapter.

:class:`Candidates` has those that tasks, checkpoints and folders of adapters make possible.  A *repeat* draws anew what a
method may depend on: the description (number ``repeat`` modulo their count), the few-shot examples, the other task of the
shuffled-description baseline, the junk text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from t2l_engine.adapters.peft import CONFIG_NAME
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.engine import DocToLoRA, TextToLoRA
from t2l_engine.files.errors import ConfigError, short_repr
from t2l_engine.hypernetwork.checkpoint import describe
from t2l_engine.library import DescriptionIndex
from t2l_engine.lora.handle import attach
from t2l_engine.research.evaluation.answers import Adapters, Use
from t2l_engine.research.evaluation.library import arrow, average
from t2l_engine.research.tasks.examples import normalise
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Example, Task, family_of
from t2l_engine.research.training.runs import ADAPTERS, MULTI_TASK, Prompt, descriptions_of, prompt_of_run, settings_of
from t2l_engine.text.documents import condition_text
from t2l_engine.text.encoder import TextEncoder
from t2l_engine.text.prompts import CHAT, RAW

SHOTS = 3
#: The constant baseline: a description without information about the task.
CONSTANT = "Answer the question."
#: Baselines of another task's description: the end of their names -> (the group of a task, by name, in which the other one
#: is drawn; what they need).
OTHERS: dict[str, tuple[Callable[[str], str], str]] = {
    "-shuffled": (lambda name: "", "at least two tasks"),
    "-same-family": (family_of, "at least two tasks of one family"),
}

Key = Callable[[Task, Example, int], "str | None"]  # (task, example, repeat) -> key of the adapter, None if it has none
ANY: Key = lambda task, example, repeat: ""  # noqa: E731


@dataclasses.dataclass(frozen=True)
class Method:
    """One compared method.

    Attributes:
        adapters: None: the base model.
        key: of the adapter in ``adapters``.
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


def partners(names: Iterable[str], repeat: int, group: Callable[[str], str] = lambda name: "") -> dict[str, str]:
    """Task -> another task of its group: a derangement of each group of at least two, drawn by repeat."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group(name), []).append(name)
    for name, order in groups.items():
        random.Random(f"shuffled/{repeat}{name}").shuffle(order)
    pairs = (zip(order, order[1:] + order[:1], strict=True) for order in groups.values() if len(order) > 1)
    return dict(itertools.chain.from_iterable(pairs))


# --- adapters ------------------------------------------------------------------------------------------------------


class _Attached:
    """Attaches, for each batch, the adapters that it needs; :meth:`_stack` makes one per key."""

    identity: str
    _stack: Callable[[Sequence[str]], AdapterStack]

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[Use]:
        @contextlib.contextmanager
        def use(keys: Sequence[str]) -> Iterator[None]:
            numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
            handle = attach(model, self._stack(list(numbers)).to(next(model.parameters()).device))
            try:
                with handle.use([numbers[key] for key in keys]):
                    yield
            finally:
                handle.detach()

        yield use


class Generated(_Attached):
    """Adapters generated by a checkpoint; keys are descriptions or documents, or either with its examples."""

    def __init__(self, engine: TextToLoRA):
        self._engine = engine
        # One by one: rounding depends on the batch.
        self._embedding = functools.cache(lambda text: engine.embed([text])[0])
        state = [*engine.hypernetwork.state_dict().values(), *engine.encoder.weights().values()]
        self.identity = digest(state, repr(engine.encoder.config), repr(engine.hypernetwork.config.scaling_value))

    def _stack(self, keys: Sequence[str]) -> AdapterStack:
        found = [self._embedding(text) for text in keys]
        return self._engine.hypernetwork.generate(found if isinstance(self._engine, DocToLoRA) else torch.stack(found))


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
        with arrow(model, self._stack):
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


# --- what is possible --------------------------------------------------------------------------------------------------


class Candidates:
    """Possible methods, in the order in which they are added, and why others are left out (``left_out``, by name).

    Args:
        tasks: of the evaluation; the shuffled-description baseline draws among them.
        pools: per task, the examples from which few-shot and worked examples are drawn.
        shots: numbers of these examples, a method each.
        pool_asked: whether the pools are the evaluated examples, of which a prompt never shows its own.
        held_out: number of last descriptions, which alone are asked; 0: all.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        pools: Mapping[str, Sequence[Example]],
        shots: Sequence[int] = (SHOTS,),
        *,
        pool_asked: bool = False,
        held_out: int = 0,
    ):
        self.methods: list[Method] = []
        self.left_out: dict[str, str] = {}
        self._tasks, self._pools, self._held_out = list(tasks), pools, held_out
        first = {n: next((t.name for t in tasks if len(pools.get(t.name, ())) < n + pool_asked), None) for n in shots}
        self._shots = [count for count, task in first.items() if task is None]
        self._short = {
            count: f"fewer than {count + pool_asked} examples of split 'train' of task {task}"
            for count, task in first.items()
            if task is not None
        }

    def chosen(self, names: Sequence[str]) -> list[Method]:
        """The methods ``names``, or all.  Raises ValueError for an unknown name, or two methods of one name."""
        known = [method.name for method in self.methods]
        if twice := [name for name in known if known.count(name) > 1]:
            raise ValueError(f"also: expected methods with names of their own, got two called {twice[0]!r}")
        for name in names:
            if name not in known:
                why = f": {self.left_out[name]}" if name in self.left_out else ""
                raise ValueError(f"methods: expected some of {known}, got {name!r}{why}")
        return [method for method in self.methods if method.name in names or not names]

    def add_base(self) -> None:
        """The base model: with the input alone, with the description, and with description and few-shot examples."""
        both = (RAW, CHAT)
        self.methods.append(Method("base", templates=both, repeats=False))
        self.methods.append(Method("base-description", description=True, templates=both))
        for count in self._shots:
            self.methods.append(Method(f"icl{_counted(count)}", description=True, shots=count, templates=both))
        self.left_out |= {f"icl{_counted(count)}": reason for count, reason in self._short.items()}

    def add_checkpoint(self, name: str, engine: TextToLoRA, folder: Path) -> None:
        """A checkpoint's adapters, generated from the task's description, and their baselines.

        One that was trained with condition "input" has the input's adapter and no baselines; one with a one-hot encoder
        those of the tasks that it knows, and no baselines but OTHERS.  One that reads examples also has "-examples",
        generated from description and few-shot examples, and its OTHERS.

        Raises ValueError for a one-hot encoder that knows none of the tasks.  Warns of held-out descriptions that the
        checkpoint was trained on.
        """
        training, known = describe(folder).get("training", {}), getattr(engine.encoder.config, "tasks", None)
        kept = training.get("held_out_descriptions")
        if isinstance(kept, int) and self._held_out > kept:
            warnings.warn(
                f"held_out_descriptions: {folder} held out {kept} descriptions of each task, so that some of the "
                f"{self._held_out} were trained on",
                stacklevel=2,
            )
        by_name = {task.name: task for task in self._tasks if known is None or task.name in known}
        if not by_name:
            raise ValueError(f"{folder}: its one-hot encoder knows none of the tasks")
        prompt = Prompt(engine.prompt_form, engine.description_in_prompt)
        add = functools.partial(self._add, adapters=Generated(engine), prompt=prompt)
        if training.get("condition") == "input":
            return add(name, key=lambda task, example, repeat: example.input)
        partner_of = functools.cache(functools.partial(partners, by_name))

        def text_of(task: Task, example: Example, repeat: int, group: Callable | None, count: int) -> str | None:
            """The text of the task, or of its partner in the group, with ``count`` worked examples."""
            name = partner_of(repeat, group).get(task.name) if group else task.name
            if name not in by_name:
                return None
            of = by_name[name]
            text = description_of(of, repeat) if known is None else of.name
            shots = shots_of(of, self._pools[of.name], repeat, count, example.input) if count else []
            return condition_text(text, shots) if count else text

        counts = {"": 0}
        if most := engine.encoder.max_examples:
            counts |= {f"-examples{_counted(n)}": n for n in self._shots if n <= most}
            reasons = self._short | {n: f"the checkpoint reads at most {most} examples" for n in self._shots if n > most}
            self.left_out |= {f"{name}-examples{_counted(n)}": reason for n, reason in reasons.items()}
        for ending, count in counts.items():
            add(name + ending, key=functools.partial(text_of, group=None, count=count), repeats=known is None)
            for other, (group, needs) in OTHERS.items():
                if partner_of(0, group):
                    add(name + ending + other, key=functools.partial(text_of, group=group, count=count), repeats=True)
                else:
                    self.left_out[name + ending + other] = f"it needs {needs}"
            if not ending and known is None:
                add(f"{name}-junk", key=lambda task, example, repeat: junk(task, repeat), repeats=True)
                add(f"{name}-constant", key=lambda task, example, repeat: CONSTANT)

    def add_per_task(self, folders: Sequence[Path]) -> None:
        """The LoRAs in ``folders`` that are named as tasks, each trained on its task: method "oracle".

        Raises FileNotFoundError if a folder has no adapters, ValueError if none is named as a task or their prompts differ.
        """
        wanted = {task.name for task in self._tasks}
        paths = {path.name: path for folder in folders for path in _adapters("oracle", folder) if path.name in wanted}
        if not paths:
            raise ValueError(f"oracle: none of the adapters in {', '.join(map(str, folders))} is named as a task")
        prompts = {path.parent: prompt_of_run(path.parent) for path in paths.values()}
        if len(set(prompts.values())) > 1:
            stated = ", ".join(f"{path} {form}{' with description' * has}" for path, (form, has) in prompts.items())
            raise ValueError(f"oracle: expected adapters trained with one prompt_form and prompt, got {stated}")
        adapters = Stored(AdapterStack.from_peft(list(paths.values())), list(paths))
        own = lambda task, example, repeat: task.name if task.name in paths else None  # noqa: E731
        self._add("oracle", adapters, next(iter(prompts.values())), own)

    def add_library(self, folder: Path, encoder: TextEncoder | None = None) -> None:
        """The average of the adapters in ``folder``, Arrow routing and, with descriptions, the nearest adapter by these.

        ``encoder``: of sentences; None: all-MiniLM-L6-v2, loaded when first asked.
        """
        paths = _adapters("library", folder)
        names, stack, prompt = [path.name for path in paths], AdapterStack.from_peft(paths), prompt_of_run(folder)
        self._add("average", Stored(average(stack), [""]), prompt)
        self._add("arrow", Routed(stack), prompt)
        if not (folder / DESCRIPTIONS_NAME).is_file():
            self.left_out["nearest"] = f"no {DESCRIPTIONS_NAME} in {folder}"
            return
        described = descriptions_of(folder, self._held_out)
        if without := [name for name in names if not described.get(name)]:
            raise ConfigError(f"descriptions: expected some of every adapter, got none of {without[0]}")
        texts = {name: described[name] for name in names}
        index = functools.cache(lambda: DescriptionIndex(texts, encoder or TextEncoder.from_pretrained()))
        nearest = lambda task, example, repeat: index().nearest([description_of(task, repeat)])[0].name  # noqa: E731
        self._add("nearest", Stored(stack, names), prompt, nearest, repeats=True)

    def add_multi_task(self, folder: Path) -> None:
        """One LoRA for all tasks: the run of ``t2l train lora`` with mode multi-task in ``folder``.

        Raises FileNotFoundError if no run has finished there, ConfigError if it was one of another mode.
        """
        settings = settings_of(folder)
        if settings is None:
            raise FileNotFoundError(f"{folder}: expected the folder of a finished run of t2l train lora, found none")
        if settings.get("mode") != MULTI_TASK:
            raise ConfigError(f"{folder}: expected a run with mode multi-task, got {short_repr(settings.get('mode'))}")
        prompt = prompt_of_run(folder / ADAPTERS)
        adapters = Stored(AdapterStack.from_peft(folder / ADAPTERS / MULTI_TASK), [""])
        self._add(MULTI_TASK + "-description" * prompt.described, adapters, prompt)

    def _add(self, name: str, adapters: Adapters, prompt: Prompt, key: Key = ANY, repeats: bool = False) -> None:
        """Adapters that were trained with ``prompt``; a description in it makes repeats differ too."""
        repeats = repeats or prompt.described
        self.methods.append(Method(name, adapters, key, prompt.described, templates=(prompt.form,), repeats=repeats))


def without_chat(methods: Sequence[Method]) -> list[Method]:
    """``methods`` for a tokenizer without chat template: those that may choose a template get "raw"."""
    return [dataclasses.replace(method, templates=(RAW,)) if RAW in method.templates else method for method in methods]


def _counted(shots: int) -> str:
    """The end of the name of a method with ``shots`` examples."""
    return "" if shots == SHOTS else f"-{shots}"


def _adapters(option: str, folder: Path) -> list[Path]:
    """The PEFT folders in ``folder``, sorted by name."""
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not found:
        raise FileNotFoundError(f"{option}: {folder}: expected folders of PEFT adapters, found none")
    return found
