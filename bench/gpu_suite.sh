#!/usr/bin/env bash
# Everything that must happen on a card, in one command, under nine minutes and without a network: build, tests, sanitizers,
# measurements.  bash bench/gpu_suite.sh OUT [COMMIT]; see bench/gpu/suite.py for what it writes into OUT.  The build is in
# place: it writes t2l_engine/*.so and build/.  PYTHON chooses the interpreter: it must hold a torch for CUDA.
set -u
if [ $# -lt 1 ]; then
  echo "usage: bash bench/gpu_suite.sh OUT [COMMIT]" >&2
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
exec "${PYTHON:-python3}" -m bench.gpu.suite "$out" "${@:2}"
