#!/usr/bin/env bash
# Everything that wants a GPU, in one call: packed against padded in float32 and bfloat16, varlen attention against
# attention by segment, fused_ops on and off, and ours against trl.DPOTrainer on the largest model that fits.
#   bash benchmarks/gpu_check.sh [PYTHON]      without a GPU it runs through on a tiny model
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${1:-.venv/bin/python}"
"$PYTHON" benchmarks/gpu_check.py
