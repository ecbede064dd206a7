"""Launches: what they would do, and what they do with stand-ins for gcloud, srun and Python.

No cloud, cluster or network is asked: the stand-ins come first in PATH.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from processes import QUICK, without_times
from training_runs import log_lines

from lfp_jax import options
from lfp_jax.weights import store

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
FILES = [*SHELL, LAUNCH / "sweep.py", *(LAUNCH / "kubernetes").iterdir()]
POD = {"NAME": "pod", "ZONE": "here", "TYPE": "v4-32", "SHARE": "10.0.0.2:/vol1"}
TRAIN = "--config=configs/train_estimator.py:tiny"


def _run(*command, **environment):
    """Run a launch from the root; its standard input is empty."""
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | environment, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def _printed(*command, **environment):
    """Give the commands that a dry run prints, each as its list of words."""
    done = _run(*command, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.fixture
def stand_in(tmp_path):
    """Give a function that puts a shell script before all others in PATH; it logs its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name, script="exit 0"):
        path = folder / name
        path.write_text(f'#!/bin/bash\ncd {tmp_path}\necho "{name} $*" >> calls\n{script}\n')
        path.chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}"}

    return put


def _calls(tmp_path):
    calls = tmp_path / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_script_is_sound(path):
    check = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    done = _run(*check, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_launch_is_short_and_says_what_it_assumes(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert "Assumes" in text


def test_the_readme_has_a_line_on_each():
    text = (LAUNCH / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in FILES if path.name not in text]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["local_pod.sh"], "N >= 1; got N=''"),
        (["local_pod.sh", "--dry_run", "0"], "N >= 1; got N='0'"),
        (["local_pod.sh", "two"], "N >= 1; got N='two'"),
        (["slurm.sbatch"], "usage: sbatch"),
        (["tpu_pod.sh", "--dry_run", "upp"], "up|run|logs|fetch|delete"),
        (["tpu_worker.sh"], "install|start|follow"),
    ],
)
def test_a_wrong_call_is_told_its_usage(command, says):
    done = _run(LAUNCH / command[0], *command[1:], **POD)
    assert done.returncode == 2
    assert says in done.stderr
    assert not done.stdout


# --- a pod on this machine ------------------------------------------------------------------------


def test_local_pod_starts_n_processes_that_meet_at_one_port():
    *parts, wait = _printed(LAUNCH / "local_pod.sh", "--dry_run", 3, TRAIN, PORT="4321")
    assert wait == ["wait"]
    for i, part in enumerate(parts):
        assert part[:-1] == [
            "JAX_PLATFORMS=cpu", "python3", "-m", "lfp_jax.main", TRAIN, "--distributed",
            "--coordinator=localhost:4321", "--processes=3", f"--process={i}",
        ]  # fmt: skip
        assert part[-1] == "&"
        flags, _ = options.parse(["lfp_jax", *part[4:-1]])
        assert (flags.processes, flags.process) == (3, i)
    assert len(parts) == 3


def test_local_pod_ends_with_the_first_process_that_fails(stand_in, tmp_path):
    environment = stand_in(
        "python", 'case "$*" in *--process=1) echo lost; exit 3 ;; *) exec sleep 600 ;; esac'
    )
    done = _run(LAUNCH / "local_pod.sh", 2, "--config=x", PORT="1", PYTHON="python", **environment)
    assert done.returncode == 1
    assert "process 1 of 2 failed with status 3" in done.stderr
    assert "[1] lost" in done.stdout


# The last two are slow, and yet .ci/run runs them: they are its rehearsal of a pod.


def _in_two_and_in_one(tmp_path, *flags):
    """Run a command in a pod of two and by itself; the folders they wrote, what the pod said."""
    pod, alone = [LAUNCH / "local_pod.sh", 2], [sys.executable, "-m", "lfp_jax.main"]
    said = []
    for command, name in ((pod, "two"), (alone, "one")):
        done = _run(
            *command, *flags, f"--workdir={tmp_path / name}", PYTHON=sys.executable, **QUICK
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    return (tmp_path / "two", tmp_path / "one"), said[0]


@pytest.mark.slow
def test_local_pod_trains_as_one_process_does(tmp_path):
    flags = [TRAIN, "--config.total_pairs=160", "--config.attacks=none"]
    flags += ["--config.metric_samples=32", "--config.evaluate_every=160"]
    folders, _ = _in_two_and_in_one(tmp_path, *flags)
    losses = [[line["loss"] for line in log_lines(folder) if "loss" in line] for folder in folders]
    assert len(losses[0]) == 20
    # Sums are grouped otherwise, and steps let that grow: by the twentieth to 7e-4 at most.
    np.testing.assert_allclose(losses[0][:3], losses[1][:3], rtol=1e-4)
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert store.is_store(folders[0] / "estimator")


@pytest.mark.slow
def test_local_pod_shares_a_grid_whose_results_are_those_of_one_process(tmp_path):
    flags = ["--mode=grid", "--config=configs/stylegan2_grid.py:small", "--config.images=1"]
    flags += ["--config.users=1", "--config.fd_images=16", "--config.basis_samples=1024"]
    flags += ["--config.metric_samples=16", "--config.lm.bank=64", "--config.lm.ranks=(8,)"]
    flags += ["--config.lm.jacobians=1", "--config.lm.free=32", "--config.lm.chords=2"]
    folders, said = _in_two_and_in_one(tmp_path, *flags)
    assert "[0] Report:" in said and "[1] Report:" not in said
    two, one = (
        {path.name: without_times(json.loads(path.read_text())) for path in cells}
        for cells in (folder.glob("cells/*.json") for folder in folders)
    )
    assert two == one and len(two) == 6
    claims = [json.loads(path.read_text()) for path in folders[0].glob("claims/*")]
    assert len({claim["pid"] for claim in claims}) == 2


# --- Cloud TPU ------------------------------------------------------------------------------------

TPU = ["gcloud", "compute", "tpus", "tpu-vm"]


def test_tpu_dry_run_says_every_step_and_asks_nothing(stand_in, tmp_path):
    environment = POD | stand_in("gcloud", "exit 9")
    dry = [LAUNCH / "tpu_pod.sh", "--dry_run"]
    create, archive, copy, install = _printed(*dry, "up", SPOT="1", **environment)
    assert create == [
        *TPU, "create", "pod", "--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base",
        "--spot", "--zone=here",
    ]  # fmt: skip
    assert archive[:2] == ["git", "archive"]
    assert copy[5] in archive[2]
    assert install[-2].endswith("lfp/launch/tpu_worker.sh install 10.0.0.2:/vol1")
    assert "--spot" not in _printed(*dry, "up", **environment)[0]

    start, follow = _printed(*dry, "run", TRAIN, "--config.begin=a b", **environment)
    assert start[4:7] == follow[4:7] == ["ssh", "pod", "--worker=all"]
    words = shlex.split(start[7].partition("=")[2])
    parsed, _ = options.parse(["lfp_jax", *words[words.index(TRAIN) :]])
    assert parsed.config.begin == "a b"
    assert (parsed.workdir, parsed.distributed) == ("/mnt/lfp/pod", True)

    [_, fetch] = _printed(*dry, "fetch", **environment)
    assert fetch[4:8] == ["scp", "--recurse", "pod:/mnt/lfp/pod", "runs/"]
    assert _printed(*dry, "delete", **environment) == [
        [*TPU, "delete", "pod", "--quiet", "--zone=here"]
    ]
    assert not _calls(tmp_path)


def test_tpu_up_makes_a_slice_once_and_leaves_a_busy_one_alone(stand_in, tmp_path):
    environment = POD | stand_in("git") | stand_in("gcloud", '[ "$4" != describe ] || cat state')
    for state, verbs in (
        ("READY", ["describe", "scp", "ssh"]),
        ("PREEMPTED", ["describe", "delete", "create", "scp", "ssh"]),
        ("STARTING", ["describe"]),
    ):
        (tmp_path / "state").write_text(state)
        (tmp_path / "calls").unlink(missing_ok=True)
        done = _run(LAUNCH / "tpu_pod.sh", "up", **environment)
        said = [call.split()[4] for call in _calls(tmp_path) if call.startswith("gcloud")]
        assert said == verbs
        assert done.returncode == (1 if state == "STARTING" else 0), done.stderr
        assert ("pod is STARTING" in done.stderr) == (state == "STARTING")


def test_tpu_run_goes_on_after_a_preemption(stand_in, tmp_path):
    """The slice is taken during the first run; the second attempt to make it anew succeeds."""
    (tmp_path / "state").write_text("READY")
    gcloud = """
    case "$4 $*" in
      describe*) [ -f state ] && cat state ;;
      delete*) rm state ;;
      create*) [ -f tried ] && echo READY > state || { touch tried; exit 1; } ;;
      *follow*) [ -f tried ] || { echo PREEMPTED > state; exit 1; } ;;
    esac"""
    environment = POD | stand_in("git") | stand_in("sleep") | stand_in("gcloud", gcloud)
    done = _run(LAUNCH / "tpu_pod.sh", "run", TRAIN, **environment)
    assert done.returncode == 0, done.stderr
    calls = _calls(tmp_path)
    did = [call.split()[4] for call in calls if call.startswith("gcloud")]
    lost = ["ssh", "ssh", "describe", "describe", "delete", "create"]
    assert did == [*lost, "describe", "create", "scp", "ssh", "ssh", "ssh"]
    assert "sleep 300" in calls
    starts = [call for call in calls if "tpu_worker.sh start" in call]
    assert len(starts) == 2
    assert starts[0] == starts[1]


def test_tpu_run_that_fails_on_a_sound_slice_is_not_tried_again(stand_in, tmp_path):
    gcloud = 'case "$4 $*" in describe*) echo READY ;; *follow*) exit 1 ;; esac'
    environment = POD | stand_in("sleep") | stand_in("gcloud", gcloud)
    done = _run(LAUNCH / "tpu_pod.sh", "run", TRAIN, **environment)
    assert done.returncode == 1
    assert "the run failed" in done.stderr
    assert len(_calls(tmp_path)) == 4  # start, follow, sleep, describe


def test_tpu_worker_follows_a_run_to_its_status_and_ends_an_earlier_one(stand_in, tmp_path):
    """With a stand-in for Python; the run outlives the command that started it.

    Sessions are slow to begin here: a run that is not yet a group of its own must end as well.
    """
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "lfp").mkdir()
    python.write_text('#!/bin/bash\necho "got $*"; [ "$3" != long ] || sleep 600; exit 7\n')
    python.chmod(0o755)
    worker = LAUNCH / "tpu_worker.sh"
    slow = stand_in("setsid", f'sleep 0.5; exec {shutil.which("setsid")} "$@"')
    home = {"HOME": str(tmp_path)} | slow
    assert _run(worker, "start", "long", **home).returncode == 0
    first = (tmp_path / "run.pid").read_text().strip()
    assert _run(worker, "start", "a b", "c", **home).returncode == 0
    done = _run(worker, "follow", **home)
    assert done.returncode == 7
    assert done.stdout == "got -m lfp_jax.main a b c\n"
    assert _run("ps", "-o", "stat=", "-p", first).stdout.strip() in ("", "Z", "Zs")


# --- Slurm ----------------------------------------------------------------------------------------


def test_slurm_runs_the_flags_as_one_step(stand_in, tmp_path):
    [step] = _printed(LAUNCH / "slurm.sbatch", "--dry_run", TRAIN, "--config.begin=a b")
    assert step[0] == "srun"
    assert "--kill-on-bad-exit=1" in step
    parsed, _ = options.parse(step[step.index("lfp_jax.main") :])
    assert parsed.config.begin == "a b"
    done = _run(LAUNCH / "slurm.sbatch", TRAIN, **stand_in("srun", "exit 5"))
    assert done.returncode == 5
    assert len(_calls(tmp_path)) == 1


def test_slurm_queues_itself_again_when_time_is_nearly_up(stand_in, tmp_path):
    environment = stand_in("scontrol") | stand_in("srun", "kill -USR1 $PPID; sleep 1")
    _run(LAUNCH / "slurm.sbatch", TRAIN, SLURM_JOB_ID="12", **environment)
    assert "scontrol requeue 12" in _calls(tmp_path)


def test_slurm_directives_stand_before_the_first_command():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert directives
    assert max(directives) < first


# --- Kubernetes -----------------------------------------------------------------------------------

# Fields of the API as far as they are used here: a type, or the fields below; "?" marks one that
# may be left out. JobSet: jobset.x-k8s.io/v1alpha2; the rest: batch/v1 and v1.
_ENV = {"name": str, "value?": str, "valueFrom?": {"fieldRef": {"fieldPath": str}}}
_CONTAINER = {
    "name": str, "image": str, "command": [str], "args": [str], "env?": [_ENV],
    "resources": {"limits": dict}, "volumeMounts": [{"name": str, "mountPath": str}],
}  # fmt: skip
_POD = {
    "serviceAccountName": str, "restartPolicy": str, "containers": [_CONTAINER],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}  # fmt: skip
_JOB = {
    "completionMode?": str, "completions?": int, "parallelism?": int, "backoffLimit": int,
    "template": {"spec": _POD},
}  # fmt: skip
_REPLICATED = {
    "name": str, "template": {"spec": _JOB}, "replicas?": int, "groupName?": str,
    "dependsOn?": [{"name": str, "status": str}],
}  # fmt: skip
_JOBSET = {
    "replicatedJobs": [_REPLICATED],
    "network": {"enableDNSHostnames": bool, "subdomain?": str, "publishNotReadyAddresses?": bool},
    "failurePolicy": {"maxRestarts": int, "restartStrategy?": str},
}
_HEAD = {"apiVersion": str, "kind": str, "metadata": {"name": str}}


def _check(value, shape, where):
    """Compare a value with the fields that it may and must have."""
    if isinstance(shape, dict):
        known = {name.rstrip("?"): inner for name, inner in shape.items()}
        needed = {name for name in shape if not name.endswith("?")}
        assert needed <= set(value) <= set(known), f"{where}: {sorted(value)}"
        for name, item in value.items():
            _check(item, known[name], f"{where}.{name}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            _check(item, shape[0], f"{where}[{i}]")
    else:
        assert type(value) is shape, where


def _check_pods(account, pods):
    for spec in pods:
        assert spec["serviceAccountName"] == account["metadata"]["name"]
        [container], [volume] = spec["containers"], spec["volumes"]
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]


@pytest.fixture(scope="module")
def manifest():
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / "jobset.yaml").read_text()))


def test_the_jobset_has_the_fields_of_its_schema(manifest):
    account, jobset = manifest
    _check(account, _HEAD | {"automountServiceAccountToken": bool}, "ServiceAccount")
    _check(jobset, _HEAD | {"spec": _JOBSET}, "JobSet")
    assert (account["apiVersion"], account["kind"]) == ("v1", "ServiceAccount")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    jobs = jobset["spec"]["replicatedJobs"]
    _check_pods(account, [job["template"]["spec"]["template"]["spec"] for job in jobs])
    with pytest.raises(AssertionError, match=r"JobSet.spec.network"):
        _check(jobset | {"spec": jobset["spec"] | {"network": {"dns": True}}},
               _HEAD | {"spec": _JOBSET}, "JobSet")  # fmt: skip


def test_the_jobset_trains_with_as_many_processes_as_pods(manifest):
    jobset = manifest[1]
    [train] = jobset["spec"]["replicatedJobs"]
    spec = train["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    [variable] = container["env"]
    args = [arg.replace(f"$({variable['name']})", "1") for arg in container["args"]]
    flags, _ = options.parse(["lfp_jax", *args])
    assert flags.processes == spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    assert (flags.distributed, flags.process) == (True, 1)
    # The name of the first pod: <set>-<job>-<index of the job>-<index of the pod>.<set>
    host = f"{jobset['metadata']['name']}-{train['name']}-0-0.{jobset['metadata']['name']}"
    assert flags.coordinator.rpartition(":")[0] == host


def test_the_image_is_made_of_what_is_there():
    lines = (LAUNCH / "kubernetes" / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    assert all((ROOT / path).exists() for paths in copied for path in paths)
    assert ["configs"] in copied


# --- a grid over many jobs ------------------------------------------------------------------------


def _sweep(on, *more, jobs=3, config="configs/stylegan2.py", workdir="/shared/a b"):
    return _run(
        sys.executable, LAUNCH / "sweep.py", f"--on={on}", f"--jobs={jobs}", f"--config={config}",
        f"--workdir={workdir}", *more,
    )  # fmt: skip


GRID = ["--mode=grid", "--config=configs/stylegan2.py", "--workdir=/shared/a b"]


def test_sweep_prints_one_array_for_slurm():
    [line] = _sweep("slurm", "--config.images=4").stdout.splitlines()
    assert shlex.split(line) == [
        "sbatch", "--array=0-2", "launch/slurm.sbatch", *GRID, "--config.images=4"
    ]  # fmt: skip


def test_sweep_prints_an_indexed_job_for_kubernetes():
    account, job = yaml.safe_load_all(_sweep("kubernetes").stdout)
    _check(job, _HEAD | {"spec": _JOB}, "Job")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"] == 3
    _check_pods(account, [spec["template"]["spec"]])
    [container] = spec["template"]["spec"]["containers"]
    assert container["args"] == GRID
    assert "env" not in container


def test_sweep_prints_a_script_that_runs_jobs_side_by_side_and_tells_of_a_failure(stand_in):
    script = _sweep("shell", jobs=2).stdout
    assert script.count(shlex.join(GRID)) == 2
    for status, name in ((0, "well"), (3, "badly")):
        environment = stand_in(name, f'[ "$CUDA_VISIBLE_DEVICES" = 0 ] || exit {status}')
        done = _run("sh", "-c", script.replace(sys.executable, name), **environment)
        assert done.returncode == (status > 0), done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"jobs": 0}, "--jobs must be >= 1; got 0"),
        ({"config": "configs/none.py"}, "no config file 'configs/none.py'"),
    ],
)
def test_sweep_says_what_is_wrong(changes, says):
    done = _sweep("slurm", **changes)
    assert done.returncode == 2
    assert says in done.stderr
