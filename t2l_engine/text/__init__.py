"""From a sentence to its embedding, and how prompts show an input.

May be imported: ``encoder`` (TextEncoder, OneHotEncoder), ``config`` (EncoderConfig, OneHotConfig), ``prompts``,
``base_model`` and ``packaged`` (language models by name).  Imports ``files``.
"""
