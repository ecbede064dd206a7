"""Settings of every test: four fake devices, and what JAX only hints at is an error."""

import os

# Before the first import of jax, which reads them once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_CAPTURED_CONSTANTS_WARN_BYTES"] = "1000000"
