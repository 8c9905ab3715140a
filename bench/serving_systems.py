"""Other systems with adapters on a CPU, for :mod:`bench.suites.serving`: transformers with PEFT, llama.cpp, OpenVINO GenAI.

Each has the methods of :class:`bench.serving_worker.Vllm`.  What takes one adapter at a time runs the rows of each adapter
after one another; ``together`` has it try all in one batch.  They need the packages peft, llama-cpp-py-sync and
openvino-genai; a system that is not installed is left out.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from bench.serving_methods import LLAMA_CPP, OPENVINO, PEFT
from bench.serving_worker import Prompts, Rows
from t2l_engine import AdapterStack
from t2l_engine.adapters.gguf_write import interleaved
from t2l_engine.text import packaged

Answer = tuple[float, list[list[int]]]
_LLAMA_FTYPE = {"bf16": 32, "f16": 1}


class System(ABC):
    """Generates greedily, ``new`` tokens a prompt whatever they are."""

    def generate(self, prompts: Prompts, adapters: Rows, new: int, *, together: bool = False) -> Answer:
        """Seconds, and the tokens of every row."""
        start = time.perf_counter()
        groups = defaultdict[Any, list[int]](list)
        for i, adapter in enumerate(adapters):
            groups[None if together else adapter].append(i)
        tokens: dict[int, list[int]] = {}
        for rows in groups.values():
            tokens |= zip(rows, self._run([prompts[i] for i in rows], [adapters[i] for i in rows], new), strict=True)
        return time.perf_counter() - start, [tokens[i] for i in range(len(prompts))]

    @abstractmethod
    def _run(self, prompts: Prompts, adapters: Rows, new: int) -> Sequence[list[int]]:
        """The tokens of every row, in one batch."""


class Peft(System):
    """transformers' ``generate`` with PEFT's ``adapter_names``, which takes an adapter a row."""

    def __init__(self, folders: Sequence[str], threads: int):
        from peft import PeftModel

        torch.set_num_threads(threads)
        self.model: Any = PeftModel.from_pretrained(packaged.load()[0], folders[0], adapter_name="0")
        for i, folder in enumerate(folders[1:], 1):
            self.model.load_adapter(folder, adapter_name=str(i))
        self.model.eval()

    def generate(self, prompts: Prompts, adapters: Rows, new: int, *, together: bool = False) -> Answer:
        return super().generate(prompts, adapters, new, together=True)

    @torch.inference_mode()
    def _run(self, prompts: Prompts, adapters: Rows, new: int) -> Sequence[list[int]]:
        ids, adapted = torch.tensor(prompts), any(adapter is not None for adapter in adapters)
        options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        if adapted:
            options["adapter_names"] = ["__base__" if i is None else str(i) for i in adapters]
        with contextlib.nullcontext() if adapted else self.model.disable_adapter():
            out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return out[:, ids.shape[1] :].tolist()


def _gguf(kind: str, folder: Path) -> Path:
    """The packaged model, whose file has 4 bits a weight, with its weights as ``kind``: the work of the other systems."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib, file = get_ffi(), get_lib(), folder / f"{kind}.gguf"
    params = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    params.ftype, params.allow_requantize = _LLAMA_FTYPE[kind], True
    if lib.llama_model_quantize(str(packaged.gguf_path()).encode(), str(file).encode(), params):
        raise RuntimeError(f"llama.cpp does not write {file}")
    return file


class LlamaCpp(System):
    """llama.cpp through its C interface: adapters are set for a context, for all of its sequences."""

    def __init__(self, folders: Sequence[str], threads: int):
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self._ffi, self._lib = ffi, lib = get_ffi(), get_lib()
        lib.llama_backend_init()
        with tempfile.TemporaryDirectory(prefix="t2l-gguf-") as scratch:
            file = _gguf("bf16", Path(scratch))
            self._model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
            stack, config = AdapterStack.from_peft(folders), AutoConfig.from_pretrained(packaged.convert())
            files = [Path(scratch, f"adapter-{i}.gguf") for i in range(len(stack))]
            for i, adapter in enumerate(files):
                stack.save_gguf(adapter, i, config=config)
            self._adapters = [lib.llama_adapter_lora_init(self._model, str(adapter).encode()) for adapter in files]
        params = lib.llama_context_default_params()
        params.n_seq_max, params.n_threads, params.n_threads_batch = 64, threads, threads
        params.n_ctx, params.n_batch, params.kv_unified = 64 * 256, 64 * 256, True
        self._context = lib.llama_init_from_model(self._model, params)
        if ffi.NULL in (self._model, self._context, *self._adapters):
            raise RuntimeError("llama.cpp does not load the model or an adapter")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(64 * 256, 0, 1)

    def _run(self, prompts: Prompts, adapters: Rows, new: int) -> Sequence[list[int]]:
        lib, ffi = self._lib, self._ffi
        chosen = [self._adapters[i] for i in dict.fromkeys(adapters) if i is not None]
        given = ffi.new("struct llama_adapter_lora *[]", chosen), ffi.new("float[]", [1.0] * len(chosen))
        if lib.llama_set_adapters_lora(self._context, given[0], len(chosen), given[1]):
            raise RuntimeError("llama.cpp does not take the adapters")
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        last, tokens = [list(prompt) for prompt in prompts], [[] for _ in prompts]
        for step in range(new):
            place = 0 if step == 0 else len(prompts[0]) + step - 1
            last = [[token] for token in self._step(last, place)]
            for row, (token,) in zip(tokens, last, strict=True):
                row.append(token)
        return tokens

    def _step(self, rows: Sequence[Sequence[int]], place: int) -> Iterator[int]:
        """The likeliest token after each row's, which are at ``place`` and on."""
        batch, count = self._batch, 0
        for row, tokens in enumerate(rows):
            for i, token in enumerate(tokens):
                batch.token[count], batch.pos[count], batch.n_seq_id[count] = token, place + i, 1
                batch.seq_id[count][0], batch.logits[count] = row, i == len(tokens) - 1
                count += 1
        batch.n_tokens = count
        if self._lib.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp does not decode")
        for row in range(len(rows)):
            logits = self._lib.llama_get_logits_ith(self._context, (row + 1) * len(rows[0]) - 1)
            yield int(np.frombuffer(self._ffi.buffer(logits, 4 * self._vocabulary), np.float32).argmax())


class OpenVino(System):
    """OpenVINO GenAI with continuous batching, the model read from GGUF; its interface takes adapters for each prompt."""

    def __init__(self, folders: Sequence[str], threads: int):
        import openvino_genai

        self._genai: Any = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs = 1, 64  # GiB, sequences
        with tempfile.TemporaryDirectory(prefix="t2l-openvino-") as scratch:
            files = [_in_rows_of_gguf(Path(folder), Path(scratch, f"{i}.safetensors")) for i, folder in enumerate(folders)]
            self._adapters = [openvino_genai.Adapter(str(file)) for file in files]
            options = {"adapters": openvino_genai.AdapterConfig(self._adapters), "INFERENCE_NUM_THREADS": threads}
            model = _named(Path(scratch))
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", options)

    def _run(self, prompts: Prompts, adapters: Rows, new: int) -> Sequence[list[int]]:
        import openvino

        each = []
        for adapter in adapters:
            config = self._genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
            config.adapters = self._genai.AdapterConfig([] if adapter is None else [self._adapters[adapter]])
            each.append(config)
        answers = self._pipeline.generate([openvino.Tensor(np.array([p], dtype=np.int64)) for p in prompts], each)
        return [list(answer.m_generation_ids[0]) for answer in answers]


def _in_rows_of_gguf(folder: Path, file: Path) -> Path:
    """The weights of a PEFT folder with the rows of B in the order of GGUF, scaled: OpenVINO reads no configuration."""
    config, tensors = (
        AutoConfig.from_pretrained(packaged.convert()),
        AdapterStack.from_peft(folder).state_dict_peft(0, fold=True),
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in tensors.items():
        if key.endswith("lora_B.weight") and (count := heads.get(key.split(".")[-3])):
            tensors[key] = interleaved(tensor, count).contiguous()
    save_file(tensors, file)
    return file


def _named(scratch: Path) -> Path:
    """The folder of the packaged model as OpenVINO reads it, its products named as adapters name them.

    From GGUF all products are called MatMul_N, and OpenVINO leaves out what adapters have for them, with a line in its log.
    """
    import openvino
    import openvino_genai

    read, named = scratch / "read", scratch / "named"
    read.mkdir()
    openvino_genai.LLMPipeline(str(_gguf("f16", read)), "CPU", enable_save_ov_model=True)
    model = openvino.Core().read_model(read / "openvino_model.xml")
    for product in (op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"):
        weight = product.input_value(1).get_node()
        while weight.get_type_name() == "Convert":
            weight = weight.input_value(0).get_node()
        if weight.get_type_name() == "Constant":
            path = re.sub(r"\[(\d+)\]", r".\1", weight.get_friendly_name()).removesuffix(".weight")
            product.set_friendly_name(f"__module.{path}/aten::linear/MatMul")
    named.mkdir()
    openvino.save_model(model, named / "openvino_model.xml", compress_to_fp16=False)
    for file in read.glob("*token*"):
        shutil.copy(file, named)
    return named


SYSTEMS = {PEFT: Peft, LLAMA_CPP: LlamaCpp, OPENVINO: OpenVino}
