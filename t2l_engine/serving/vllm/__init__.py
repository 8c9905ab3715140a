"""Text-to-LoRA inside vLLM: a request whose ``model`` is a sentence, and this package's kernels under its LoRA layers.

``settings``, ``fit``, ``generator`` and ``memory`` need no vLLM; the others do.
"""
