"""What both ways to train a hypernetwork share: what adapters are generated from, the trained modules, the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.research.tasks.folder import Task
from t2l_engine.research.training import loop
from t2l_engine.research.training.conditions import HiddenStates, PooledHyperNetwork
from t2l_engine.research.training.descriptions import Conditions, TaskEmbeddings
from t2l_engine.research.training.settings import LLM, ReconstructionSettings, SFTSettings
from t2l_engine.text.llm_encoder import AttentionPooling


def conditions_of(
    settings: SFTSettings | ReconstructionSettings,
    tasks: Sequence[Task],
    base_model: str | None,
    device: torch.device,
    folder: Path,
    *,
    by_input: bool = False,
) -> Conditions:
    """What the adapters of ``tasks`` are generated from; ``folder``: for the file of hidden states of encoder "llm"."""
    if settings.encoder == LLM:
        assert base_model is not None
        return HiddenStates(settings, tasks, base_model, device, folder)
    return TaskEmbeddings(settings, [(task.name, task.descriptions) for task in tasks], device, by_input=by_input)


class HyperNetworkJob(loop.Job):
    """Training of a hypernetwork and, with encoder "llm", of its attention pooling; a subclass has data and loss."""

    def __init__(self, settings: SFTSettings | ReconstructionSettings, conditions: Conditions):
        super().__init__()
        self.settings, self._conditions = settings, conditions

    def _new(self, config: HyperNetworkConfig, *, hyperinit: bool) -> tuple[HyperNetwork, AttentionPooling | None]:
        """Hypernetwork and pooling, with initial parameters by the seed; ``hyperinit``: heads by Bias-HyperInit."""
        seed = self.settings.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = HyperNetwork(config)
            if hyperinit:
                net.bias_hyperinit(torch.Generator().manual_seed(seed))
            pooling = self._conditions.pooling()
            self._conditions.initialise(net.task_encoder.linear, pooling)
        return net, pooling

    def _train(self, net: HyperNetwork, pooling: AttentionPooling | None, device: torch.device) -> None:
        """Let this job train ``net`` and ``pooling``."""
        self._net, self._pooling = net, pooling
        self.model: nn.Module = net if pooling is None else PooledHyperNetwork(pooling, net)
        self.model.to(device)

    def _write(self, net: HyperNetwork, folder: Path, step: int, base_model: str | None, **stated: Any) -> None:
        """A checkpoint of ``net``; ``stated``: what its training block says beside the settings."""
        training = {"steps_done": step, **self.settings.model_dump(mode="json"), **stated}
        blocks = {"encoder": self._conditions.config(), "base_model": base_model, "training": training}
        net.save_pretrained(folder, blocks, self._pooling)
