"""t2l_engine: generates LoRA adapters for a frozen language model from sentences, and serves them without PEFT."""

from t2l_engine import ops
from t2l_engine.adapters.stack import AdapterError, AdapterStack
from t2l_engine.engine import DocToLoRA, TextToLoRA
from t2l_engine.files.errors import ConfigError
from t2l_engine.hypernetwork.config import HyperNetworkConfig, PerceiverConfig, PointerConfig
from t2l_engine.hypernetwork.folder import CheckpointError, bundled_checkpoints
from t2l_engine.hypernetwork.network import HyperNetwork
from t2l_engine.hypernetwork.perceiver import PerceiverHyperNetwork
from t2l_engine.hypernetwork.pointer import PointerHyperNetwork
from t2l_engine.library import AdapterLibrary
from t2l_engine.lora.handle import LoRAHandle, attach
from t2l_engine.lora.layer import LoRALinear
from t2l_engine.ops.segments import AdapterBatch
from t2l_engine.text.config import DocumentEncoderConfig, EncoderConfig, OneHotConfig
from t2l_engine.text.documents import DocumentEncoder
from t2l_engine.text.encoder import OneHotEncoder, TextEncoder

__version__ = "0.1.0"

__all__ = [
    "AdapterBatch",
    "AdapterError",
    "AdapterLibrary",
    "AdapterStack",
    "CheckpointError",
    "ConfigError",
    "DocToLoRA",
    "DocumentEncoder",
    "DocumentEncoderConfig",
    "EncoderConfig",
    "HyperNetwork",
    "HyperNetworkConfig",
    "LoRAHandle",
    "LoRALinear",
    "OneHotConfig",
    "OneHotEncoder",
    "PerceiverConfig",
    "PerceiverHyperNetwork",
    "PointerConfig",
    "PointerHyperNetwork",
    "TextEncoder",
    "TextToLoRA",
    "__version__",
    "attach",
    "bundled_checkpoints",
    "ops",
]
