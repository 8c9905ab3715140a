"""The methods that tasks, checkpoints and folders of adapters make possible."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from t2l_engine.adapters.peft import CONFIG_NAME
from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.engine import TextToLoRA
from t2l_engine.hypernetwork.checkpoint import describe
from t2l_engine.research.evaluation import methods
from t2l_engine.research.evaluation.methods import Method, counted
from t2l_engine.research.tasks.folder import DESCRIPTIONS_NAME, Example, Task
from t2l_engine.research.training.runs import descriptions_of, prompt_of_run


class Checkpoint(NamedTuple):
    """A checkpoint under the name of its methods."""

    name: str
    engine: TextToLoRA
    folder: Path


class Candidates:
    """Possible methods, in the order in which they are added, and why others are left out.

    Args:
        tasks: of the evaluation.
        pools: per task, the examples from which few-shot examples are drawn.
        shots: numbers of few-shot examples.
        pool_asked: whether the pools are the evaluated examples, of which a prompt never shows its own.
        held_out: number of last descriptions, which alone are asked; 0: all.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        pools: Mapping[str, Sequence[Example]],
        shots: Sequence[int],
        *,
        pool_asked: bool = False,
        held_out: int = 0,
    ):
        self.methods: list[Method] = []
        self.left_out: dict[str, str] = {}  # name of a method -> reason
        self._tasks, self._pools, self._held_out = list(tasks), pools, held_out
        self._short: dict[int, str] = {}  # number of few-shot examples -> why there are fewer
        for count in shots:
            needed = count + pool_asked
            if lacking := [task.name for task in tasks if len(pools.get(task.name, ())) < needed]:
                self._short[count] = f"fewer than {needed} examples of split 'train' of task {lacking[0]}"
        self._shots = [count for count in shots if count not in self._short]

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Its adapters and their baselines.

        Raises ValueError if it has a one-hot encoder that knows none of the tasks.  Warns of held-out descriptions that it
        was trained on.
        """
        name, engine, folder = checkpoint
        training = describe(folder).get("training", {})
        kept = training.get("held_out_descriptions")
        if isinstance(kept, int) and self._held_out > kept:
            warnings.warn(
                f"held_out_descriptions: {folder} held out {kept} descriptions of each task, so that some of the "
                f"{self._held_out} were trained on",
                stacklevel=2,
            )
        known = getattr(engine.encoder.config, "tasks", None)
        answered = [task for task in self._tasks if known is None or task.name in known]
        if not answered:
            raise ValueError(f"{folder}: its one-hot encoder knows none of the tasks")
        found = methods.generated_methods(
            name, engine, self._tasks, pools=self._pools, shots=self._shots, in_prompt=engine.description_in_prompt,
            from_input=training.get("condition") == "input",
        )  # fmt: skip
        if most := engine.encoder.max_examples:
            reasons = self._short | {n: f"the checkpoint reads at most {most} examples" for n in self._shots if n > most}
            self.left_out |= {f"{name}-examples{counted(n)}": reason for n, reason in reasons.items()}
        if len(answered) < 2:
            shuffled = [method.name for method in found if method.name.endswith("-shuffled")]
            self.left_out |= dict.fromkeys(shuffled, "it needs at least two tasks")
            found = [method for method in found if method.name not in shuffled]
        self.methods += found

    def add_per_task(self, folders: Sequence[Path]) -> None:
        """The LoRAs in ``folders`` that are named as tasks.

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
        stack = AdapterStack.from_peft(list(paths.values()))
        self.methods.append(methods.per_task_method(stack, list(paths), next(iter(prompts.values()))))

    def add_library(self, folder: Path) -> None:
        """The average of the adapters in ``folder``, Arrow routing and, with descriptions, retrieval."""
        paths = _adapters("library", folder)
        stack, prompt = AdapterStack.from_peft(paths), prompt_of_run(folder)
        self.methods += methods.library_methods(stack, prompt)
        if (folder / DESCRIPTIONS_NAME).is_file():
            described = descriptions_of(folder, self._held_out)
            self.methods.append(methods.nearest_method(stack, [path.name for path in paths], described, prompt))
        else:
            self.left_out["nearest"] = f"no {DESCRIPTIONS_NAME} in {folder}"

    def add_multi_task(self, folder: Path) -> None:
        """One adapter for all tasks."""
        self.methods.append(methods.multi_task_method(folder))

    def add_base(self) -> None:
        """The base model, prompted."""
        self.methods += methods.base_methods(self._shots)
        self.left_out |= {f"icl{counted(n)}": reason for n, reason in self._short.items()}

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


def _adapters(option: str, folder: Path) -> list[Path]:
    """The PEFT folders in ``folder``, sorted by name."""
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not found:
        raise FileNotFoundError(f"{option}: {folder}: expected folders of PEFT adapters, found none")
    return found
