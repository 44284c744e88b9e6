# SPDX-License-Identifier: AGPL-3.0-or-later
"""The receiver as a process: listens for pushes, keeps its VMs, answers control requests, until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import trio

from receiver.failover.clone import CloneManager
from receiver.service.control import ControlApi
from receiver.service.sessions import PushServer
from receiver.status.notify import Notifier
from receiver.store.stores import Stores
from replicator import __version__, durable
from replicator.config import Config
from replicator.control.metrics import Live, Metrics, start_metrics
from replicator.control.server import serve_http
from replicator.credentials import ReceiverCredentials, reload_on_hangup
from replicator.errors import StateError
from replicator.log import EventLog, open_log
from replicator.memory import give_back
from replicator.nursery import flat_nursery
from replicator.push import rpo

_logger = logging.getLogger(__name__)

#: How often systemd's status line is renewed, seconds.
_STATUS_S = 10


async def run_receiver(
    config: Config, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled or told to stop by SIGTERM or SIGINT. The caller has locked the state directory.

    Reports started with the port that it listens on. Raises UsageError, StateError, PersistenceError, OSError.
    """
    credentials = ReceiverCredentials(config)
    notifier = Notifier()
    await trio.to_thread.run_sync(_make_dirs, config)
    async with open_log(config.state_dir / "events") as log, flat_nursery() as nursery:
        await nursery.start(reload_on_hangup, credentials)
        stores = Stores(config, log, nursery)
        await stores.start()
        clones = CloneManager(config, log, stores, nursery)
        await clones.recover()
        metrics = Metrics(log, Live(expires=credentials.expires))
        rpo_target_s = rpo.target_s(config)
        control = ControlApi(
            log,
            stores,
            clones,
            config.state_dir / "run",
            metrics,
            warnings=credentials.warnings,
            rpo_target_s=rpo_target_s,
        )
        await nursery.start(serve_http, config.control_path, control.handle)
        await start_metrics(nursery, config.metrics_address, metrics)
        port, where = await _listen(config, stores, credentials, nursery)
        _logger.info(
            "replicator backend up (v%s) phase=receiver mode=receiver vm=%s", __version__, config.vm
        )
        _logger.info("listening on %s, %s", where, _summary(config, credentials))
        credentials.tell()
        notifier.send("READY=1", f"STATUS=listening on port {port}")
        nursery.start_soon(notifier.watch)
        nursery.start_soon(give_back)
        nursery.start_soon(_tell_status, notifier, log)
        if rpo_target_s is not None:
            nursery.start_soon(rpo.watch, log, rpo_target_s)
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope, notifier)
        task_status.started(port)


async def _listen(
    config: Config, stores: Stores, credentials: ReceiverCredentials, nursery: trio.Nursery
) -> tuple[int, str]:
    """The port, and address and port for people."""
    server = PushServer(stores, credentials, config.dr_timeout)
    try:
        listeners = await trio.open_tcp_listeners(config.dr_port, host=config.dr_listen or None)
    except OSError as error:
        where = f"{config.dr_listen or 'all addresses'}:{config.dr_port}"
        raise StateError(f"cannot listen on {where}: {error.strerror or error}") from error
    nursery.start_soon(trio.serve_listeners, server.serve, listeners)
    port = int(listeners[0].socket.getsockname()[1])
    return port, f"{config.dr_listen or 'all addresses'}:{port}"


def _summary(config: Config, credentials: ReceiverCredentials) -> str:
    """What the receiver was told to do, in a few words."""
    count = config.dr_restore_points
    points = "1 point" if count == 1 else f"{count} points"
    when = "at once" if config.push_apply_remote else "when they leave retention"
    return f"{credentials.summary()}, keeps {points}, applies deltas {when}"


async def _tell_status(notifier: Notifier, log: EventLog) -> None:
    while True:
        points = sum(len(vm.points) for vm in log.vms)
        notifier.send(f"STATUS={len(log.vms)} VMs, {points} recovery points")
        await trio.sleep(_STATUS_S)


async def _stop_on_signal(scope: trio.CancelScope, notifier: Notifier) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            _logger.info("stopping on %s", signal.Signals(number).name)
            notifier.send("STOPPING=1")
            scope.cancel()
            return


def _make_dirs(config: Config) -> None:
    for folder in (config.work_path, config.state_dir / "run"):
        _make_dir(folder)


def _make_dir(folder: Path) -> None:
    try:
        durable.make_dir(folder)
    except OSError as error:
        raise StateError(f"{folder}: {os.strerror(error.errno or 0)}") from error
