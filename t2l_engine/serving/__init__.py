"""Generated adapters where they are served: in the engines of others, a module for each, on a page, in a chat.

May be imported, by ``cli`` alone: ``page``, ``side_by_side``; vLLM finds its package by an entry point,
``t2l_vllm.register``.  Imports the engine and the rooms below it, never ``research``.
"""
