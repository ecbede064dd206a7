#!/usr/bin/env bash
# Works on a slice of Cloud TPU machines: makes it, runs on all of it, fetches, gives it back.
#
#   export NAME=lfp ZONE=us-central2-b TYPE=v4-32 SHARE=10.0.0.2:/vol1    # SPOT=1: spot capacity
#   launch/tpu_pod.sh [--dry_run] STEP [FLAGS ...]
#
#   up            create the slice or reuse it, mount the share, install the last commit
#   run FLAGS     lfp_jax.main FLAGS on all workers, and follow them; where the slice is preempted,
#                 make it anew and go on from the checkpoint
#   logs          follow a run again, e.g. after a lost connection
#   fetch         copy the work folder to runs/NAME
#   delete        give the slice back; the share keeps the work folder
#
# Assumes gcloud with a project and the right to make TPUs; SHARE, an NFS share (Filestore) that the
# zone reaches, for all workers write into a checkpoint; one user id on all workers (OS Login); and
# that workers reach package registries. FLAGS are of what --distributed is for (--help), without that
# flag and --workdir. VERSION is the image of the machines.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [ "${1:-}" = --dry_run ]; then dry_run=1 && shift; fi
: "${NAME:?see the head of launch/tpu_pod.sh}" "${ZONE:?}" "${TYPE:?}" "${SHARE:?}"
step=${1:-} flags=
if [ $# -gt 1 ]; then flags=$(printf ' %q' "${@:2}"); fi
flags+=" --workdir=/mnt/lfp/$NAME"
worker=lfp/launch/tpu_worker.sh

doing() { if [ -n "$dry_run" ]; then printf '%s\n' "${*@Q}"; else "$@"; fi; }
tpu() { doing gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
on() { tpu ssh "$NAME" --worker="$1" --command="$2"; }

state() { # READY, PREEMPTED, ...; ABSENT where there is none
  if [ -n "$dry_run" ]; then echo ABSENT && return; fi
  gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null ||
    echo ABSENT
}

up() { # steps in a chain: where `until` asks, `set -e` is off
  local now archive=/tmp/lfp-$NAME.tar.gz
  now=$(state)
  if [ "$now" = PREEMPTED ]; then tpu delete "$NAME" --quiet && now=ABSENT; fi
  case $now in
    READY) ;;
    ABSENT) tpu create "$NAME" --accelerator-type="$TYPE" \
      --version="${VERSION:-tpu-ubuntu2204-base}" ${SPOT:+--spot} || return ;;
    *) echo "launch/tpu_pod.sh: $NAME is $now; wait, or delete it." >&2 && return 1 ;;
  esac
  doing git archive --output="$archive" HEAD &&
    tpu scp "$archive" "$NAME:lfp.tar.gz" --worker=all &&
    on all "rm -rf lfp && mkdir lfp && tar -xzf lfp.tar.gz -C lfp && $worker install $SHARE"
}

case $step in
  up) up ;;
  logs) on all "$worker follow" ;;
  run)
    until on all "$worker start$flags --distributed" && on all "$worker follow"; do
      sleep 60 # a slice that is taken away says so late
      if [ "$(state)" = READY ]; then
        echo "launch/tpu_pod.sh: the run failed, or the connection: try logs." >&2 && exit 1
      fi
      until up; do sleep 300; done # spot capacity comes and goes
    done ;;
  fetch) doing mkdir -p runs && tpu scp --recurse "$NAME:/mnt/lfp/$NAME" runs/ --worker=0 ;;
  delete) tpu delete "$NAME" --quiet ;;
  *) echo "usage: launch/tpu_pod.sh [--dry_run] up|run|logs|fetch|delete [FLAGS ...]" >&2 && exit 2 ;;
esac
