#!/usr/bin/env python3
"""Prints what shares a grid out over many single-machine jobs; runs nothing itself.

    launch/sweep.py --jobs=8 --on=slurm --config=configs/stylegan2_grid.py --workdir=/shared/g | sh
    launch/sweep.py --jobs=8 --on=kubernetes --config=... --workdir=/runs/g | kubectl apply -f -
    launch/sweep.py --jobs=2 --on=shell --config=... --workdir=runs/g | sh       # on this machine

The jobs are alike: each takes up cells of the grid that no other is at, by files in the work folder
that only one of them can create. So a job may die, come late or be added, and none needs an index.
Jobs beyond the number of cells wait for the others, and do nothing.

Assumes a work folder that all jobs share and that can create a file exclusively (NFS, Lustre), or
the address of a bucket; and what launch/slurm.sbatch and launch/kubernetes/jobset.yaml assume. The
Kubernetes job takes image, GPU and volume from the latter. Further flags go to lfp_jax.main.
"""

import argparse
import shlex
import sys
from pathlib import Path

import yaml

JOBSET = Path(__file__).parent / "kubernetes" / "jobset.yaml"


def slurm(jobs, flags):
    """Give the command that queues an array of jobs."""
    return shlex.join(["sbatch", f"--array=0-{jobs - 1}", "launch/slurm.sbatch", *flags])


def shell(jobs, flags):
    """Give the lines of a script that runs the jobs side by side, the i-th on GPU i if any."""
    command = shlex.join([sys.executable, "-m", "lfp_jax.main", *flags])
    lines = [f'CUDA_VISIBLE_DEVICES={i} {command} & pids="$pids $!"' for i in range(jobs)]
    return "\n".join([*lines, "for pid in $pids; do wait $pid || failed=1; done", "exit $failed"])


def kubernetes(jobs, flags):
    """Give the manifest of an indexed job, and of the service account that it runs under."""
    account, jobset = yaml.safe_load_all(JOBSET.read_text(encoding="utf-8"))
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    # A lost machine costs its own job a try, and no other.
    spec |= {"completions": jobs, "parallelism": jobs, "backoffLimit": 3 * jobs}
    [container] = spec["template"]["spec"]["containers"]
    container["args"] = flags
    del container["env"]  # which process it is: these need not know
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "lfp-jax-grid"}}
    return yaml.safe_dump_all([account, job | {"spec": spec}], sort_keys=False)


def main(argv):
    """Print it; the arguments are those of the command line, without the program's name."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--on", choices=("slurm", "kubernetes", "shell"), required=True)
    parser.add_argument("--jobs", type=int, required=True, help="how many, at least 1")
    parser.add_argument("--config", required=True, help="a config file with sweep(add)")
    parser.add_argument("--workdir", required=True, help="the folder that all jobs share")
    given, more = parser.parse_known_args(argv)
    if given.jobs < 1:
        parser.error(f"--jobs must be >= 1; got {given.jobs}")
    if not Path(given.config.partition(":")[0]).is_file():
        parser.error(f"no config file '{given.config}'; start this from the root of the checkout")
    flags = ["--mode=grid", f"--config={given.config}", f"--workdir={given.workdir}", *more]
    print({"slurm": slurm, "kubernetes": kubernetes, "shell": shell}[given.on](given.jobs, flags))


if __name__ == "__main__":
    main(sys.argv[1:])
