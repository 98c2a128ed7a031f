"""Starting and stopping Ray."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

# Ray and Tune read these when they are imported.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that asks for something after the end would start another Ray
    "RAY_AIR_NEW_OUTPUT": "0",  # we show progress ourselves
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # 2 s by default, which every training run would wait at its end
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it waits for checkpoints that we don't make; one process less
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once; what is finished is in the store
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Attacks of changing sizes leave holes that no later tensor fits, unless the allocator can extend what it has.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray._private import ray_constants  # noqa: E402
from ray.autoscaler.sdk import request_resources  # noqa: E402

from raytrust.cluster.interrupts import raising  # noqa: E402
from raytrust.config.register import PLUGINS, active_plugins  # noqa: E402

SLOT = "trial_slot"
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
GROWTH = 900.0  # seconds that an autoscaler may take to start a first node
_most: dict[str, int] = {}


@contextmanager
def cluster(address: str | None, cpus: int, slots: int = 1, parallel: int | None = None) -> Iterator[None]:
    """A Ray cluster for the time of the block: the one at `address`, or a new one on this machine with `cpus` CPUs.

    A trial of the outer search takes no CPU, which its training workers need, but one of `slots` "trial_slot"
    resources; the node types of a cluster must offer them. Where `parallel` is given, a cluster at `address` without
    nodes may start some first. Raises ValueError if a given cluster can't be used.

    A new cluster listens on the loopback interface alone, and asks for a token that only this process and its workers
    have: other users of this machine reach that interface too. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1 in the environment
    opens it to other machines. Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt once; while Ray stops, more of them
    change nothing.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Tune keeps a state that we don't use, as the store is the resume; on a full disk it prints how that failed, too.
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
    _most.clear()
    with raising(once=True) as take_signals:
        try:
            # While Ray starts it would take SIGTERM, to exit on the spot without a word.
            with _replaced(ray._private.utils, "set_sigterm_handler", lambda handler: None):
                if address is None:
                    _start(cpus, slots)
                else:
                    _connect(address)
            # Starting Ray, its core has taken SIGTERM for a crash dump: take it back.
            take_signals()
            if address is not None:
                _expect_slot(address, GROWTH if parallel else 0.0)
            yield
        finally:
            ray.shutdown()


def capacity(resource: str) -> int:
    """The most of a resource that this process has seen in the cluster: one that scales may have none at present."""
    _most[resource] = max(_most.get(resource, 0), int(ray.cluster_resources().get(resource, 0)))
    return _most[resource]


def _start(cpus: int, slots: int) -> None:
    # Without one Ray makes a token and writes it to a file in the home directory.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray then takes the loopback address for that of this machine, as where clusters are not supported: it replaces a
    # 127.0.0.1 that it is given, and with any other address its servers listen on all interfaces. Only for now, as this
    # process may connect to a cluster later; and whoever set the variable has decided.
    decided = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR in os.environ
    with nullcontext() if decided else _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
        ray.init(
            # Ray's default would join a cluster that happens to run on this machine.
            address="local",
            num_cpus=cpus,
            resources={SLOT: slots},
            include_dashboard=False,
            object_store_memory=512 * 2**20,
            # Ray's default, unless it is so long that the names of sockets in it exceed 107 bytes.
            _temp_dir=None if len(tempfile.gettempdir()) < 40 else "/tmp/ray",  # noqa: S108  # Ray's own
            runtime_env=_with_plugins({}) or None,
            **QUIET,
        )


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _with_plugins(runtime_env: dict[str, Any], elsewhere: bool = False) -> dict[str, Any]:
    """With what lets every worker import the plugins of this process before it does anything: it may be handed objects
    of theirs. elsewhere: on machines that don't have the files."""
    if plugins := active_plugins():
        if elsewhere:
            files = [plugin for plugin in plugins if plugin.endswith(".py")]
            runtime_env["py_modules"] = [*runtime_env["py_modules"], *files]
            plugins = [Path(plugin).stem if plugin in files else plugin for plugin in plugins]
        runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), PLUGINS: os.pathsep.join(plugins)}
        runtime_env["worker_process_setup_hook"] = "raytrust.config.register.load_plugins"
    return runtime_env


def _connect(address: str) -> None:
    import raytrust

    package = str(Path(raytrust.__file__).parent)
    runtime_env = _with_plugins({"py_modules": [package], "env_vars": ENVIRONMENT}, elsewhere=True)
    try:
        _expect_listener(address)
        ray.init(address=address, runtime_env=runtime_env, **QUIET)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Expected a Ray cluster at address={address!r}, but can't connect: {reason}") from error
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    # Ray Train keeps this actor for ever on the node that asks for it first. A spot node would never be idle again.
    get_or_create_autoscaling_coordinator()


def _expect_slot(address: str, patience: float) -> None:
    """Raises ValueError if the cluster offers no slot; waits for an autoscaler to start a first node that does."""
    if capacity(SLOT) < 1 and patience:
        request_resources(bundles=[{SLOT: 1}])
        until = time.monotonic() + patience
        try:
            while capacity(SLOT) < 1 and time.monotonic() < until:
                time.sleep(0.5)
        finally:
            # From now on the trials themselves are what keeps nodes.
            request_resources(bundles=[])
    if capacity(SLOT) < 1:
        raise ValueError(
            f"Expected the cluster at address={address!r} to offer the resource {SLOT!r}; "
            f"start its nodes with --resources='{{\"{SLOT}\": 1}}', or give --parallel if it starts nodes itself."
        )
    # A cluster that scales may have no node when this is asked the next time.
    capacity("GPU")


def _expect_listener(address: str) -> None:
    """Raises OSError if nothing listens at HOST:PORT; Ray would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    # "auto" and the like name no place where something could listen.
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError:
        if host not in ("localhost", "127.0.0.1"):
            raise
        # Ray takes localhost for this machine's own address.
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=10).close()
