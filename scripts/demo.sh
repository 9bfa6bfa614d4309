#!/usr/bin/env bash
# Trains a small network on handwritten digits and finds its fastest version on this machine.
# Leaves everything in demo/; the report is demo/optimized/report.html.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}

install .venv "3.11 3.12 3.13" constraints.txt '--editable=.[openvino]' scikit-learn
mkdir -p demo
echo "Training …"
.venv/bin/python scripts/train_digits.py --output_dir=demo --overwrite 2>demo/train.log ||
  { cat demo/train.log >&2; exit 1; }
.venv/bin/tfopt optimize --model=demo/saved_model --data=demo/digits.npz \
  --output_dir=demo/optimized --overwrite
