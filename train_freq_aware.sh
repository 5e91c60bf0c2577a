#!/usr/bin/env bash
# Creates a Python environment (Python 3.10+) and trains a LoRA in it.
#
#   ./train_freq_aware.sh                       a demo on a toy model, minutes on a CPU
#   ./train_freq_aware.sh --config my.toml      your own SD1.x or SD2.x, configured by a kohya TOML
#   ./train_freq_aware.sh --help                all options
#
# The environment variable PYTHON sets the interpreter, VENV the folder of the environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${VENV:-$here/.venv-train}

# This file marks a complete environment; it is outdated if pyproject.toml is newer.
installed=$venv/.freq_loss_installed
if [ ! "$installed" -nt "$here/pyproject.toml" ]; then
  echo "installing into $venv; torch is large, so this takes some minutes the first time"
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$here[train]"
  touch "$installed"
fi
exec "$venv/bin/python" -m freq_loss_plugin train "$@"
