"""Text: task descriptions to embeddings, and inputs to prompts of a language model.

May be imported: ``encoder`` (TextEncoder, OneHotEncoder), ``documents`` (DocumentEncoder), ``config`` (their
configurations), ``prompts``, ``base_model`` and ``packaged`` (language models by name).  Imports ``files`` and ``ops``.
"""
