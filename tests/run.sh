#!/usr/bin/env bash
# Runs the tests from nothing but Python and the package index: makes .venv, installs into it, and calls pytest.
#
#   tests/run.sh [pytest arguments]
#
# For every checkout of a host (see tests/hosts.py), its packages are installed, too, torchvision among them (several
# GB), and the tests that need it run in it. Those that need a browser look for chromium. PYTHON chooses the
# interpreter, VENV another place for the environment, HOST_TESTS a part of the tests (see tests/matrix.py).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
# Modules are compiled below, when they are first imported: most of those that come along never are.
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${install[@]}" pytest
sd_scripts=$("$venv/bin/python" tests/hosts.py sd-scripts)
comfyui=$("$venv/bin/python" tests/hosts.py ComfyUI)
musubi_tuner=$("$venv/bin/python" tests/hosts.py musubi-tuner)

install_frontends() { # the one that each ComfyUI pins, with the templates that it pins, and the newest one
  while read -r checkout; do
    pinned=$(grep -E "^comfyui-(frontend-package|workflow-templates)==" "$checkout/requirements.txt")
    frontend=$(grep frontend <<<"$pinned")
    # shellcheck disable=SC2086
    "${install[@]}" --no-deps --upgrade --target "$venv/frontends/${frontend#*==}" $pinned
  done <<<"$comfyui"
  "${install[@]}" --no-deps --upgrade --target "$venv/frontends/newest" comfyui-frontend-package
}

install_hosts() {
  if [ -n "$sd_scripts" ]; then
    "${install[@]}" torch torchvision
    "${install[@]}" -r tests/requirements-sd-scripts.txt
  fi
  if [ -n "$comfyui" ]; then
    "${install[@]}" torch torchvision torchaudio
    # The newest one's pins, and what the others need beside them.
    { read -r newest; cat "$newest/requirements.txt"; while read -r older; do grep -v == "$older/requirements.txt"; done
    } <<<"$comfyui" >"$venv/comfyui-requirements.txt"
    "${install[@]}" -r "$venv/comfyui-requirements.txt" -r tests/requirements-comfyui.txt
  fi
  if [ -n "$musubi_tuner" ]; then
    "${install[@]}" torch torchvision
    "${install[@]}" -r tests/requirements-musubi-tuner.txt
  fi
}

if [ "${HOST_TESTS:-}" = packages ]; then
  "${install[@]}" torch torchvision -r tests/requirements-newest.txt
else
  # They lie apart from the other packages, and are installed meanwhile.
  [ -z "$comfyui" ] || install_frontends &
  frontends=$!
  install_hosts
  wait "$frontends"
fi
"${install[@]}" --editable '.[test]'
# Two processes, each with half of the threads: much of the time goes into programs that start and wait.
cores=$("$venv/bin/python" -c "import os; print(os.cpu_count())")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}
# The many programs find all modules compiled, those of the checkouts, too, which stay as they are.
unset PYTHONDONTWRITEBYTECODE
PYTHONPYCACHEPREFIX=$(cd "$venv" && pwd)/pycache
export PYTHONPYCACHEPREFIX
exec "$venv/bin/python" tests/matrix.py "$@"
