#!/usr/bin/env bash
# Creates a Python environment (Python 3.10+) and trains a LoRA in it; on Windows in Git Bash, or train_freq_aware.bat.
#
#   ./train_freq_aware.sh                       a demo on a toy model, minutes on a CPU
#   ./train_freq_aware.sh --config my.toml      your own SD1.x or SD2.x, configured by a kohya TOML
#   ./train_freq_aware.sh --help                all options
#
# The environment variable PYTHON sets the interpreter, VENV the folder of the environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

for python in "${PYTHON:-python3}" python py; do
  # On Windows python3 may be a stub that opens the store.
  if [ -n "${PYTHON:-}" ] || "$python" -c "" 2>/dev/null; then
    exec "$python" "$here/freq_loss_plugin/engine/environment.py" "$@"
  fi
done
echo "no Python: install 3.10 or newer, or set PYTHON to its path" >&2
exit 1
