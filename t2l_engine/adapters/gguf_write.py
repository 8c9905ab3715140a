"""Exports an adapter to GGUF, for llama.cpp and programs built on it.

In a GGUF file of architecture ``llama`` the rows of q and k of each head are interleaved, first the even then the odd halves
of its rotary pairs, and so must be those of B.  Other architectures keep the order of the transformers model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2l_engine.adapters import peft_write
from t2l_engine.adapters.peft import PeftAdapter
from t2l_engine.files.errors import short_repr
from t2l_engine.files.weights import is_finite, max_abs, replacing

#: ``model_type`` of a transformers configuration -> architecture of its GGUF file, and whether rows of q and k are permuted.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma2": ("gemma2", False),
}
#: Dtype of A and B -> its names in the ``gguf`` package: of tensors, and of files.
DTYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}


def write(
    adapter: PeftAdapter, file: Path, config: Any, dtype: torch.dtype | None, description: str, prompt_prefix: str
) -> None:
    """See :meth:`.stack.AdapterStack.save_gguf`; ``adapter`` must have a rank that is not 0."""
    import gguf

    if not hasattr(gguf.Keys.Adapter, "LORA_TASK_NAME"):
        raise ImportError("gguf: expected release 0.18 or later")
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {[*DTYPES]}, got {short_repr(dtype)}")
    if getattr(config, "model_type", None) not in ARCHITECTURES:
        got = short_repr(getattr(config, "model_type", config))
        raise ValueError(f"config: expected a base model of type {', '.join(ARCHITECTURES)}, got {got}")
    architecture, permuted = ARCHITECTURES[config.model_type]
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if permuted else {}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    about, state = peft_write.config(adapter, None, fold=False), peft_write.state_dict(adapter, None, None, "", fold=False)
    paths = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    tensor, of_file = DTYPES[dtype]
    with replacing(file.parent, file.name) as temporary:
        writer = gguf.GGUFWriter(temporary / file.name, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp multiplies by alpha / rank, with each tensor's own rank.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, about["lora_alpha"])
        writer.add_name(description or "LoRA")
        writer.add_file_type(gguf.LlamaFileType[of_file])
        for key, text in (
            (gguf.Keys.Adapter.LORA_TASK_NAME, description),
            (gguf.Keys.Adapter.LORA_PROMPT_PREFIX, prompt_prefix),
        ):
            if text:
                writer.add_string(key, text)
        for path in paths:
            name = names.get_name(path)
            if name is None or (name == "output" and config.tie_word_embeddings):
                raise ValueError(f"{short_repr(path)}: no tensor of GGUF files of architecture {architecture!r}")
            A, B = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
            B = B * (B.shape[1] / about["r"])
            if count := heads.get(name.rpartition(".")[2]):
                if len(B) != count * size:
                    raise ValueError(f"{short_repr(path)}: expected {count} heads of {size} rows, got {len(B)} rows")
                B = interleaved(B, count)
            for side, values in (("a", A), ("b", B)):
                full, most = f"{name}.weight.lora_{side}", max_abs(values)
                if 0 < most < torch.finfo(dtype).smallest_normal:
                    raise ValueError(f"{full}: holds values that are too small for {dtype}: the largest is {most:.3g}")
                values = values.to(dtype).contiguous()
                if not is_finite(values):
                    raise ValueError(f"{full}: holds values that exceed the range of {dtype}")
                raw = values.view(torch.uint8) if dtype == torch.bfloat16 else values  # numpy lacks it
                writer.add_tensor(full, raw.numpy(), raw_dtype=gguf.GGMLQuantizationType[tensor])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def interleaved(B: Tensor, heads: int) -> Tensor:
    """Rows of ``B [out, r]`` in the order of GGUF's ``llama``: row 2i + s of a head is row s * size / 2 + i."""
    out, rank = B.shape
    return B.view(heads, 2, out // heads // 2, rank).transpose(1, 2).reshape(out, rank)
