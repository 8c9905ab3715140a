#!/usr/bin/env bash
# Serves SmolLM2-135M on this machine alone, where the model of a request may be a sentence: make serve, or, in an environment
# with vLLM and t2l_engine, examples/vllm/serve.sh [FLAGS OF VLLM].  PORT: 8000 if unset.  T2L_VLLM_CHECKPOINT: smollm2-135m if
# unset; several, for one base model, separated by commas.  In float32 where the CPU multiplies that faster than bfloat16.
set -euo pipefail
port="${PORT:-8000}"
export T2L_VLLM_CHECKPOINT="${T2L_VLLM_CHECKPOINT:-smollm2-135m}" T2L_VLLM_WARMUP="${T2L_VLLM_WARMUP:-1}" VLLM_PLUGINS=t2l,t2l_http
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1                  # what lets a request name a model that is not there yet
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"  # GiB
read -r dtype model < <(python -c "from t2l_engine.text import dtypes, packaged; print(dtypes.preferred(), packaged.convert())")
IFS=, read -ra checkpoints <<< "$T2L_VLLM_CHECKPOINT"
flags=$(t2l serve-flags "${checkpoints[@]}")
cat << EOF
==> when vLLM says "Application startup complete", try, from another terminal:

curl -s http://127.0.0.1:$port/v1/completions -H 'Content-Type: application/json' -d '{
  "model": "t2l:Give the antonym of the word.",
  "prompt": "Input: early\nOutput:", "max_tokens": 8, "temperature": 0}'

    "model": "smollm2" is the model without an adapter.  Ctrl-C ends the server.
EOF
# shellcheck disable=SC2086  # flags are words
# Not "vllm serve", which in the package vllm-cpu looks for one named vllm and ends.
exec python -m vllm.entrypoints.openai.api_server --model "$model" --dtype "${dtype#torch.}" --served-model-name smollm2 --host 127.0.0.1 --port "$port" --max-model-len 2048 $flags "$@"
