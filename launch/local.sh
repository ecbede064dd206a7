#!/usr/bin/env bash
# Runs a config on this machine in a virtual environment of its own.
#
#   launch/local.sh [CONFIG] [FLAGS ...]        e.g. launch/local.sh configs/stylegan2.py:tiny
#
# Assumes python3 >= 3.11 and a package registry; makes ./.venv once and uses it again.
set -euo pipefail
cd "$(dirname "$0")/.."
config=${1:-configs/stylegan2.py}
[ $# -gt 0 ] && shift
if [ ! -x .venv/bin/python ]; then
  python3 -m venv .venv
  .venv/bin/python -m pip install --quiet .
fi
exec .venv/bin/python -m lfp_jax.main --config="$config" "$@"
