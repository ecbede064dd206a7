"""What tests of several processes share: a command of `lfp_jax.main` in two, and what it left."""

QUICK = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def main_in_two(two_processes, *flags, expected=(0, 0), stderr=None):
    """Run a command of `lfp_jax.main` in two processes; what each said.

    Args:
        two_processes: the fixture.
        *flags: of both.
        expected: their exit statuses.
        stderr: as of `subprocess.Popen`.
    """
    statuses, said = two_processes(
        lambda coordinator, i: [
            "-m", "lfp_jax.main", *flags, "--distributed", f"--coordinator={coordinator}",
            "--processes=2", f"--process={i}",
        ],
        stderr=stderr, **QUICK,
    )  # fmt: skip
    assert tuple(statuses) == expected, said
    return said


def without_times(value):
    """Drop what differs from run to run, and round what the grouping of sums may change."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k}
    if isinstance(value, list):
        return [without_times(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
