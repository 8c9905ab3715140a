"""What both ways to train a hypernetwork share: what adapters are generated from, the trained modules, the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.text import to_json
from t2l_engine.hypernetwork.config import HyperNetworkConfig
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.research.tasks.folder import Task
from t2l_engine.research.training import loop
from t2l_engine.research.training.conditions import Conditions, HiddenStates, TaskEmbeddings
from t2l_engine.research.training.context import Modules
from t2l_engine.research.training.settings import LLM, ReconstructionSettings, SFTSettings
from t2l_engine.text.llm_encoder import AttentionPooling


class PooledHyperNetwork(nn.Module):
    """Pooling and hypernetwork, which are trained together: hidden states to adapters."""

    def __init__(self, pooling: AttentionPooling, hypernetwork: HyperNetwork):
        super().__init__()
        self.pooling, self.hypernetwork = pooling, hypernetwork

    def forward(self, condition: tuple[Tensor, Tensor]) -> AdapterStack:
        """Adapters with gradients of ``condition``: states and mask, as :class:`AttentionPooling` takes them."""
        return self.hypernetwork(self.pooling(*condition))


class HyperNetworkJob(loop.Job):
    """Training of a hypernetwork and, with encoder "llm", of its attention pooling; a subclass has data and loss.

    ``base_model``: of the adapters; ``folder``: for the file of hidden states of encoder "llm".
    """

    def __init__(
        self,
        settings: SFTSettings | ReconstructionSettings,
        tasks: Sequence[Task],
        base_model: str | None,
        device: torch.device,
        folder: Path,
    ):
        super().__init__()
        self.settings, self._base_model, self._device = settings, base_model, device
        if settings.encoder == LLM:
            assert base_model is not None
            self._conditions: Conditions = HiddenStates(settings, tasks, base_model, device, folder)
        else:
            self._conditions = TaskEmbeddings(settings, tasks, device)

    def _config(self, modules: Modules, **adapters: Any) -> HyperNetworkConfig:
        """Of a hypernetwork for ``modules``; ``adapters``: fields that the adapters decide."""
        s = self.settings
        return HyperNetworkConfig(
            variant=s.variant, modules=modules.names, in_features=modules.in_features, out_features=modules.out_features,
            num_layers=modules.num_layers, embed_dim=self._conditions.embed_dim, latent_size=s.latent_size,
            head_in_size=s.head_in_size, paths=modules.own_paths, **adapters,
        )  # fmt: skip

    def _new(self, config: HyperNetworkConfig, *, hyperinit: bool) -> tuple[HyperNetwork, AttentionPooling | None]:
        """Hypernetwork and pooling, with initial parameters by the seed; ``hyperinit``: heads by Bias-HyperInit."""
        seed = self.settings.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = HyperNetwork(config)
            if hyperinit:
                net.bias_hyperinit(torch.Generator().manual_seed(seed))
            return net, self._conditions.start(net.task_encoder.linear)

    def _train(self, net: HyperNetwork, pooling: AttentionPooling | None) -> None:
        """Let this job train ``net`` and ``pooling``."""
        self._net, self._pooling = net, pooling
        self.model: nn.Module = net if pooling is None else PooledHyperNetwork(pooling, net)
        self.model.to(self._device)

    def _write(self, net: HyperNetwork, folder: Path, step: int, **stated: Any) -> None:
        """A checkpoint of ``net``; ``stated``: what its training block says beside the settings."""
        training = {"steps_done": step, **self.settings.model_dump(mode="json"), **stated}
        blocks = {"encoder": to_json(self._conditions.encoder_config), "base_model": self._base_model, "training": training}
        net.save_pretrained(folder, blocks, self._pooling)
