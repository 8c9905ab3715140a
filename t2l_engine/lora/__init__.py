"""Adapters in a running model, without PEFT.

May be imported: ``handle`` (attach, LoRAHandle), ``layer`` (LoRALinear), ``locate`` (finds the linears of a model).
Imports ``adapters``, ``ops`` and ``files``.
"""
