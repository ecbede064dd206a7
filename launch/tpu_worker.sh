#!/usr/bin/env bash
# What launch/tpu_pod.sh has every worker do, in its home folder, where lfp/ is the checkout.
#
#   lfp/launch/tpu_worker.sh install SHARE     mount the share at /mnt/lfp; JAX and lfp_jax in venv/
#   lfp/launch/tpu_worker.sh start FLAGS ...   lfp_jax.main, which a lost connection does not end
#   lfp/launch/tpu_worker.sh follow            what it says, until it ends; then its exit status
#
# Assumes Ubuntu and a user who may sudo, as on Cloud TPU's images, whose own Python is too old.
set -euo pipefail
cd

case ${1:-} in
  install)
    if ! mountpoint -q /mnt/lfp; then
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 install nfs-common
      sudo mkdir -p /mnt/lfp
      sudo mount -t nfs "$2" /mnt/lfp
      sudo chmod a+rwx /mnt/lfp
    fi
    python3 -m pip install --quiet --user uv
    [ -d venv ] || .local/bin/uv venv --quiet --python 3.12 venv
    .local/bin/uv pip install --quiet --python venv/bin/python ./lfp 'jax[tpu]' ;;
  start)
    # What an earlier run left holds the TPU. Its group is its own, by setsid.
    if [ -f run.pid ]; then kill -KILL -- "-$(cat run.pid)" 2>/dev/null || true; fi
    rm -f run.pid run.status
    # shellcheck disable=SC2016  # the inner shell expands them
    setsid nohup bash -c 'echo $$ > run.pid
      cd lfp && ../venv/bin/python -m lfp_jax.main "$@"; echo $? > ../run.status' \
      run "${@:2}" < /dev/null > run.log 2>&1 &
    # Until then there is no group that a next start could end.
    while [ ! -s run.pid ] && kill -0 $! 2>/dev/null; do sleep 0.1; done ;;
  follow)
    tail -n +1 -F --pid="$(cat run.pid)" run.log
    exit "$(cat run.status)" ;;
  *) echo "usage: launch/tpu_worker.sh install|start|follow" >&2 && exit 2 ;;
esac
