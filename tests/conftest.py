"""Settings of every test: four fake devices, and what JAX only hints at is an error."""

import contextlib
import os

# Before the first import of jax, which reads them once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_CAPTURED_CONSTANTS_WARN_BYTES"] = "1000000"

import jax
import pytest


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
