#!/usr/bin/env bash
# Runs the tests from nothing but Python and the package index: makes .venv, installs into it, and calls pytest.
#
#   tests/run.sh [pytest arguments]
#
# Where checkouts of the hosts are found ($SD_SCRIPTS_DIR and $COMFYUI_DIR, or ~/.cache/freq_loss_plugin/sd-scripts and
# .../ComfyUI), their packages are installed, too, torchvision among them (several GB), and the tests that run in them
# run. Those that need a browser look for chromium. PYTHON chooses the interpreter, VENV another place for the
# environment.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
sd_scripts=${SD_SCRIPTS_DIR:-$HOME/.cache/freq_loss_plugin/sd-scripts}
comfyui=${COMFYUI_DIR:-$HOME/.cache/freq_loss_plugin/ComfyUI}

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
if [ -d "$sd_scripts" ]; then
  "${install[@]}" torch torchvision
  "${install[@]}" -r tests/requirements-sd-scripts.txt
fi
if [ -d "$comfyui" ]; then
  "${install[@]}" torch torchvision torchaudio
  "${install[@]}" -r "$comfyui/requirements.txt" -r tests/requirements-comfyui.txt
fi
"${install[@]}" --editable '.[test]'
# Two processes, each with half of the threads: much of the time goes into programs that start and wait.
cores=$("$venv/bin/python" -c "import os; print(os.cpu_count())")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}
exec "$venv/bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"
