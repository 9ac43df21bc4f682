#!/usr/bin/env bash
# Are the Triton kernels right and fast on this machine's GPU? One command; no network, and nothing
# to install where Python has torch, triton and transformers:
#
#   scripts/gpu_check.sh             # under 8 minutes on an H100
#   scripts/gpu_check.sh --dry-run   # toy sizes in Triton's interpreter, on the CPU
#   scripts/gpu_check.sh --help
#
# PYTHON: another Python than python3. WHEELS: a folder of wheels for packages that are missing
# (default: .whl); they go to a temporary folder.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-$root/.whl}
export PYTHONPATH="$root:$root/kernels:$root/eval${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "gpu_check: this needs Python 3.10 or later; name one with PYTHON=" >&2
  exit 2
fi
read -ra missing <<< "$("$python" "$root/scripts/gpu_checks/preflight.py")"
if [ ${#missing[@]} -gt 0 ] && [ -d "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --find-links "$wheels" --target "$site" "${missing[@]}"
  export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" "$root/scripts/gpu_check.py" "$@"
