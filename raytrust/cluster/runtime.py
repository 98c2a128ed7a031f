"""Starting and stopping Ray, and telling a listener what a phase of the sweep is doing."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

# Ray and Tune read these when they are imported.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # we show progress ourselves
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # 2 s by default, which every training run would wait at its end
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once; what is finished is in the store
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402

SLOT = "trial_slot"


class Listener(Protocol):
    """Is told, in the driver, what a phase is doing. `key` names a defence's run, or an attack on it."""

    def started(self, phase: str, key: str, what: str) -> None: ...

    def finished(self, phase: str, key: str, result: dict[str, Any]) -> None: ...

    def failed(self, phase: str, key: str, reason: str) -> None: ...

    def tick(self) -> None:
        """Called a few times a second while a phase runs."""
        ...


@contextmanager
def cluster(address: str | None, cpus: int, slots: int = 1) -> Iterator[None]:
    """A Ray cluster for the time of the block: the one at `address`, or a new one on this machine with `cpus` CPUs.

    A trial of the outer search takes no CPU, which its training workers need, but one of `slots` "trial_slot"
    resources; the node types of a cluster must offer them. Raises ValueError if a given cluster can't be used.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster on the loopback interface
        ray.init(
            address="local",  # not one that happens to run on this machine
            num_cpus=cpus,
            resources={SLOT: slots},
            include_dashboard=False,
            object_store_memory=512 * 2**20,
            _temp_dir=_short_temporary_directory(),
            **quiet,
        )
    else:
        _connect(address, quiet)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_device() -> str:
    """ "cuda" if the cluster has GPUs, else "cpu"."""
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def _connect(address: str, quiet: dict[str, Any]) -> None:
    import raytrust

    runtime_env = {"py_modules": [str(Path(raytrust.__file__).parent)], "env_vars": ENVIRONMENT}
    try:
        _expect_listener(address)
        ray.init(address=address, runtime_env=runtime_env, **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Expected a Ray cluster at address={address!r}, but can't connect: {reason}") from error
    if ray.cluster_resources().get(SLOT, 0) < 1:
        ray.shutdown()
        raise ValueError(
            f"Expected the cluster at address={address!r} to offer the resource {SLOT!r}; "
            f"start its nodes with --resources='{{\"{SLOT}\": 1}}'."
        )


def _expect_listener(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT; Ray would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # "auto" and the like
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError:
        if host not in ("localhost", "127.0.0.1"):
            raise
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=10).close()  # as Ray reads it


def _short_temporary_directory() -> str | None:
    """Ray's default, unless the temporary directory is so long that the names of sockets in it exceed 107 bytes."""
    return None if len(tempfile.gettempdir()) < 40 else "/tmp/ray"
