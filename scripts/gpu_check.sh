#!/usr/bin/env bash
# Are the Triton kernels right and fast on this machine's GPU? One command; no network, and nothing
# to install where Python has torch, triton and transformers:
#
#   scripts/gpu_check.sh             # under 8 minutes on an H100
#   scripts/gpu_check.sh --dry-run   # toy sizes in Triton's interpreter, on the CPU
#   scripts/gpu_check.sh --help
#
# PYTHON: another Python than python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/kernels:$root/eval${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$root/scripts/gpu_check.py" "$@"
