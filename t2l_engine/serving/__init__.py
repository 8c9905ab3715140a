"""Serving of generated adapters: in vLLM, on a page, in a chat.

May be imported by ``cli``: ``page``, ``side_by_side``; vLLM finds its package by an entry point, ``t2l_vllm.register``.
Imports the engine and the rooms below it, never ``research``.
"""
