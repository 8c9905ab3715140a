"""llama.cpp through its C API, and base models as F32 GGUF files made of a transformers model's own weights."""

import contextlib

import gguf
import numpy as np
import torch

from t2l_engine.adapters.gguf_write import ARCHITECTURES, interleaved

#: Greatest number of tokens of a prompt.
CONTEXT = 512


class LlamaCpp:
    """A model file on two threads; keys and values in float32."""

    def __init__(self, file):
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # here: collected without it, too

        self._ffi, self._lib = get_ffi(), get_lib()
        self._lib.llama_log_set(self._ffi.NULL, self._ffi.NULL)
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), params)
        assert self._model != self._ffi.NULL, file
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = CONTEXT
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = params.flash_attn_type = 0
        self._context = self._lib.llama_init_from_model(self._model, params)
        assert self._context != self._ffi.NULL, file
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    @contextlib.contextmanager
    def adapted(self, file, scale=1.0):
        """With the adapter of ``file``."""
        adapter = self._lib.llama_adapter_lora_init(self._model, str(file).encode())
        assert adapter != self._ffi.NULL, file
        given = self._ffi.new("struct llama_adapter_lora *[]", [adapter]), self._ffi.new("float[]", [scale])
        assert self._lib.llama_set_adapters_lora(self._context, given[0], 1, given[1]) == 0
        try:
            yield self
        finally:
            self._lib.llama_set_adapters_lora(self._context, self._ffi.NULL, 0, self._ffi.NULL)
            self._lib.llama_adapter_lora_free(adapter)

    def logits(self, ids):
        """``[tokens, vocabulary]`` float32 of a prompt."""
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        assert self._lib.llama_decode(self._context, batch) == 0
        rows = [self._lib.llama_get_logits_ith(self._context, i) for i in range(len(ids))]
        found = [np.frombuffer(self._ffi.buffer(row, 4 * self._vocabulary), np.float32).copy() for row in rows]
        self._lib.llama_batch_free(batch)
        return torch.from_numpy(np.stack(found))

    def close(self):
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def write_base(model, file):
    """The weights of a transformers ``model`` of a known type as an F32 file without a vocabulary."""
    config = model.config
    architecture, permuted = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if permuted else {}
    for key, values in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = values.float()
        path, _, ending = key.rpartition(".")
        if count := heads.get(path.rpartition(".")[2]):
            values = interleaved(values.reshape(len(values), -1), count).reshape(values.shape)
        if config.model_type == "gemma2" and path.endswith("norm"):
            values = values + 1
        writer.add_tensor(f"{names.get_name(path)}.{ending}", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
