"""Other processes and machines do the units of work, through Dask."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

from wda._version import __version__
from wda.errors import ClusterError, MissingExtraError

_LOCAL = re.compile(r"local:(\d+)")
_ADDRESS = re.compile(r"(tcp|tls)://\S+:\d+")
_SECONDS_TO_CONNECT = 20

# Of processes here: one thread each. Dask's own settings would also give memory back at every turn,
# and a training that asks for it again at every turn takes a third longer.
_ENVIRONMENT = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}


@contextmanager
def executor_of(scheduler: str) -> Iterator[Executor]:
    """Give an executor whose work is done by the workers of a Dask scheduler.

    Parameters
    ----------
    scheduler : str
        ``tcp://HOST:PORT`` of a running scheduler, whose workers must reach the same files under
        the same names and have the same wda installed; or ``local:N``, which starts N processes on
        this machine and ends them afterwards.

    Raises
    ------
    ClusterError
        When the scheduler is neither, does not answer, has workers without this wda, or its workers
        keep dying.
    MissingExtraError
        When Dask is not installed.
    """
    local = _LOCAL.fullmatch(scheduler)
    if local is None and _ADDRESS.fullmatch(scheduler) is None:
        raise ClusterError(
            f"scheduler: {scheduler!r} is not one; give tcp://HOST:PORT, as dask scheduler prints "
            "it, or local:N for N processes on this machine"
        )
    if local is not None and int(local.group(1)) < 1:
        raise ClusterError(f"scheduler: {scheduler} has no processes; give local:1 or more")
    try:
        import distributed  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError(
            f"scheduler: {scheduler} needs Dask; "
            "try: pip install 'weight-decomposition-analysis[distributed]'"
        ) from None
    connected = _processes(int(local.group(1))) if local else _client(scheduler)
    try:
        with connected as client:
            _require_same_wda(client, scheduler)
            yield client.get_executor(pure=False)
    except distributed.scheduler.KilledWorker as error:
        raise ClusterError(
            f"scheduler: {scheduler}: {error.allowed_failures + 1} workers died over the same unit "
            "of work; the logs of the workers say why; short of memory, start them with "
            "--memory-limit 0 (mapped files are not theirs) or compare fewer checkpoints at a time"
        ) from None


@contextmanager
def _processes(count: int) -> Iterator[Any]:
    """Start worker processes here; against a limit of memory, mapped files would count."""
    import dask  # noqa: PLC0415
    from distributed import Client, LocalCluster  # noqa: PLC0415

    with dask.config.set({"distributed.nanny.pre-spawn-environ": _ENVIRONMENT}):
        cluster = LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        )
    try:
        with Client(cluster) as client:
            yield client
    except KeyboardInterrupt:
        # Nobody waits for the units under way: they write nothing.
        for nanny in cluster.workers.values():
            if nanny.pid is not None:
                os.kill(nanny.pid, signal.SIGKILL)
        raise
    finally:
        cluster.close()


@contextmanager
def _client(address: str) -> Iterator[Any]:
    from distributed import Client  # noqa: PLC0415

    try:
        client = Client(address, timeout=_SECONDS_TO_CONNECT)
    except (OSError, TimeoutError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"scheduler: {address}: nobody answers there ({why}); is it the address that dask "
            "scheduler printed, and can this machine reach it?"
        ) from None
    with client:
        yield client


def _require_same_wda(client: Any, scheduler: str) -> None:
    """Make sure that the workers there are, as far as they came already, run this version."""
    try:
        versions = client.run(_installed)
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"scheduler: {scheduler}: its workers lack {error.name}; install there what is "
            "installed here"
        ) from None
    other = sorted({version for version in versions.values() if version != __version__})
    if other:
        raise ClusterError(
            f"scheduler: {scheduler}: its workers have wda {', '.join(other)} and this machine has "
            f"{__version__}; install the same"
        )


def _installed() -> str:
    return __version__
