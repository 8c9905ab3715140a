"""LoRA weights as data: stacks of adapters in memory, and PEFT folders.

May be imported: ``stack`` (AdapterStack, AdapterError), ``peft`` and ``peft_write`` (reading and writing folders), ``paths``
(module paths).  Imports ``files`` and ``ops``.
"""
