"""Adapters in a running model, without PEFT.

May be imported: ``handle`` (attach, LoRAHandle), ``layer`` (LoRALinear), ``locate`` (where linears are in a model).
Imports ``adapters``, ``ops`` and ``files``.
"""
