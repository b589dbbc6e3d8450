#!/usr/bin/env bash
# Shows on one GPU, within 8 minutes, that builder and loader work there and how fast they are.
#
#   scripts/gpu_check.sh                  runs every step, prints a report, writes benchmarks/results/GPU_CHECK_….md
#   scripts/gpu_check.sh --steps loader,loss        some of the steps
#   scripts/gpu_check.sh prepare [--with-torch]     with a network: puts wheels into .gpu-wheels, for a machine without
#
# Carry the repository with .gpu-wheels to the machine with the GPU. It needs Python and, unless the wheels have it, a PyTorch
# that finds the GPU. Everything stays in .gpu-venv and .gpu-wheels, which git ignores. Rehearsal: --device cpu --tiny --out FILE
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ "${1:-}" = prepare ]; then
    shift
    mkdir -p .gpu-wheels
    python scripts/gpu_check.py --list "$@" >.gpu-wheels/requirements.txt
    exec python -m pip download --no-deps --dest .gpu-wheels --requirement .gpu-wheels/requirements.txt
fi

python=${PYTHON:-python3}
if [ -f .gpu-wheels/requirements.txt ]; then
    [ -d .gpu-venv ] || "$python" -m venv --system-site-packages .gpu-venv
    python=.gpu-venv/bin/python
    "$python" -m pip install --quiet --no-index --no-deps --find-links .gpu-wheels --requirement .gpu-wheels/requirements.txt
fi
exec "$python" scripts/gpu_check.py "$@"
