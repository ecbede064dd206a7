#!/usr/bin/env bash
# Rehearses a pod on this machine: N processes on its CPU that work together, as on N machines.
#
#   launch/local_pod.sh [--dry_run] N [FLAGS ...]      e.g. launch/local_pod.sh 2
#
# FLAGS are those of lfp_jax.main, by default a few steps of a small network. Each process's lines
# start with its number. The first that fails ends them all, and with them this script.
#
# Assumes bash >= 5.1 and a Python with lfp_jax in it, python3 or $PYTHON. A training's batch must
# divide by the devices of all processes. PORT chooses the port at which they meet, by default a free one.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [ "${1:-}" = --dry_run ]; then dry_run=1 && shift; fi
n=${1:-}
case $n in '' | *[!0-9]* | 0*)
  echo "usage: launch/local_pod.sh [--dry_run] N [FLAGS ...], N >= 1; got N='$n'" >&2
  exit 2 ;;
esac
shift
few=(--config=configs/train_estimator.py:tiny)
[ $# -gt 0 ] || set -- "${few[@]}" --workdir=runs/local_pod
python=${PYTHON:-python3}
free='import socket; print(socket.create_server(("localhost", 0)).getsockname()[1])'
port=${PORT:-$("$python" -c "$free")}
export JAX_PLATFORMS=cpu

pids=()
# Not a gentle signal: JAX takes that for the notice of a preemption, and goes on.
trap '[ ${#pids[@]} = 0 ] || kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < n; i++)); do
  command=("$python" -m lfp_jax.main "$@" --distributed --coordinator="localhost:$port"
    --processes="$n" --process="$i")
  if [ -n "$dry_run" ]; then
    echo "JAX_PLATFORMS=cpu ${command[*]@Q} &"
    continue
  fi
  "${command[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done
if [ -n "$dry_run" ]; then
  echo wait
  exit
fi

for ((left = n; left > 0; left--)); do
  status=0
  wait -n -p ended || status=$?
  for i in "${!pids[@]}"; do
    if [ "${pids[i]}" = "$ended" ] && [ $status != 0 ]; then
      echo "launch/local_pod.sh: process $i of $n failed with status $status; see its lines [$i]." >&2
      exit 1
    fi
  done
done
pids=()
