"""Settings of every test: four fake devices, and what JAX only hints at is an error."""

import contextlib
import os
import socket
import subprocess
import sys

# Before the first import of jax, which reads them once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_CAPTURED_CONSTANTS_WARN_BYTES"] = "1000000"

import hypothesis
import jax
import pytest

# The same examples in every run, and no files left behind; a compilation takes longer than any
# deadline.
hypothesis.settings.register_profile(
    "lfp_jax", max_examples=50, derandomize=True, database=None, deadline=None
)
hypothesis.settings.load_profile("lfp_jax")


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that run for milliseconds: optimising them takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def killed_after(monkeypatch):
    """Give a context in which a run is killed once it has logged a step."""
    from lfp_jax import logs

    @contextlib.contextmanager
    def killed(step):
        real_write = logs.MetricLog.write

        def write(log, now, **values):
            real_write(log, now, **values)
            if now == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(logs.MetricLog, "write", write)
            yield

    return killed


@pytest.fixture
def two_processes(pytestconfig):
    """Give a function that runs Python in two processes which may find one another.

    It takes arguments(coordinator, process) -> command-line arguments, and more environment; it
    gives exit statuses and standard outputs.
    """

    def run(arguments, *, stderr=None, **environment):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)} | environment
        running = [
            subprocess.Popen(
                [sys.executable, *arguments(f"localhost:{port}", i)],
                env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
                cwd=pytestconfig.rootpath,
            )
            for i in range(2)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=300)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        return [process.returncode for process in running], said

    return run
