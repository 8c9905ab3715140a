"""Generated adapters where they are served: in the engines of others, a module for each, on a page, in a chat.

vLLM finds its package by an entry point, ``t2l_vllm.register``; of other rooms only ``cli`` imports this one.  Imports the
engine and the rooms below it, never ``research``.
"""
