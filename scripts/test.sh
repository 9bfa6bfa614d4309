#!/usr/bin/env bash
# Runs all checks and tests: scripts/test.sh [--tf2.17] [arguments of pytest]
# With --tf2.17: golden models, GPUs, TensorRT, training and distillation only, with TensorFlow 2.17. $PYTHON names the interpreter to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

# Two files at a time, in the order of tests/conftest.py: most tests wait for other processes or
# compile on one core.
parallel=(--numprocesses=2 --dist=loadfile --no-loadscope-reorder)
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}

if [[ ${1:-} == --tf2.17 ]]; then
  shift
  install .venv-tf2.17 "3.11 3.12" constraints-tf2.17.txt \
    --editable=. hypothesis pytest pytest-xdist scikit-learn tf_keras
  export TFOPT_TEST_WITHOUT=openvino
  .venv-tf2.17/bin/python -m pytest -q "${parallel[@]}" tests/test_goldens.py tests/test_gpu_function.py \
    tests/test_signature_call.py tests/runtimes tests/trt tests/onnx tests/train tests/distillation "$@"
  exit
fi

install .venv "3.11 3.12 3.13" constraints.txt '--editable=.[dev]'
bin=.venv/bin
$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
$bin/python -m pytest -q "${parallel[@]}" "$@"
