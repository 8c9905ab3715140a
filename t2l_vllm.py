"""Entry points for vLLM; outside the package, so that an installed but unused plugin imports nothing."""

import os


def register() -> None:
    """Install the plugin in a process of vLLM; nothing happens unless a variable asks for it.

    With ``T2L_VLLM_CHECKPOINT`` descriptions become adapters, with it or ``T2L_VLLM_KERNELS=1`` vLLM uses this package's
    LoRA kernels, and with any variable it refuses generated adapters that it would serve in part.  May be called again.
    Raises ValueError, naming the variable, for an unknown one or a value that cannot be used.
    """
    if not any(name.startswith("T2L_VLLM_") for name in os.environ):
        return
    from t2l_engine.serving.vllm.settings import Settings

    settings = Settings.from_environment()
    from t2l_engine.serving.vllm import hooks, resolver

    resolver.register(hooks.install(settings))


def http():
    """The endpoint plugin; RuntimeError unless :func:`register` was called with a checkpoint."""
    from t2l_engine.serving.vllm.http import endpoint

    return endpoint()
