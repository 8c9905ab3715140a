"""LoRA weights as data: stacks of adapters in memory, and PEFT folders.

May be imported: ``stack`` (AdapterStack), ``peft`` (AdapterError, reading and writing), ``paths`` (where modules live).
Imports ``files``.
"""
