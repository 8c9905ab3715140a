"""LoRA weights as data: stacks of adapters in memory, and PEFT folders.

May be imported: ``stack`` (AdapterStack, AdapterError), ``peft`` (reading and writing folders), ``paths`` (module paths).
Imports ``files``.
"""
