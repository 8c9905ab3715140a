"""t2l_engine: from a sentence to LoRA adapters for a frozen language model, and those adapters at work without PEFT."""

from t2l_engine import ops
from t2l_engine.adapters import AdapterError, AdapterStack
from t2l_engine.batch import AdapterBatch
from t2l_engine.checkpoint_folder import CheckpointError, bundled_checkpoints
from t2l_engine.config import ConfigError, EncoderConfig, HyperNetworkConfig, OneHotConfig
from t2l_engine.encoder import OneHotEncoder, TextEncoder
from t2l_engine.engine import TextToLoRA
from t2l_engine.handle import LoRAHandle, attach
from t2l_engine.hypernetwork import HyperNetwork
from t2l_engine.layers import LoRALinear

__version__ = "0.1.0"

__all__ = [
    "AdapterBatch",
    "AdapterError",
    "AdapterStack",
    "CheckpointError",
    "ConfigError",
    "EncoderConfig",
    "HyperNetwork",
    "HyperNetworkConfig",
    "LoRAHandle",
    "LoRALinear",
    "OneHotConfig",
    "OneHotEncoder",
    "TextEncoder",
    "TextToLoRA",
    "__version__",
    "attach",
    "bundled_checkpoints",
    "ops",
]
