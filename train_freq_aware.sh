#!/usr/bin/env bash
# From nothing but Python 3.10+ and the package index to a trained LoRA: makes an environment and trains in it.
#
#   ./train_freq_aware.sh                       the embedded model and pictures, minutes on a CPU
#   ./train_freq_aware.sh --config my.toml      your own SD1.x or SD2.x; the file is a kohya TOML
#   ./train_freq_aware.sh --help                everything else
#
# PYTHON chooses the interpreter, VENV another place for the environment.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${VENV:-$here/.venv-train}

# The environment is complete when this file is there, and current when it is newer than what it was made from.
installed=$venv/.freq_loss_installed
if [ ! "$installed" -nt "$here/pyproject.toml" ]; then
  echo "installing into $venv; torch is large, so the first time takes some minutes"
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$here[train]"
  touch "$installed"
fi
exec "$venv/bin/python" -m freq_loss_plugin train "$@"
