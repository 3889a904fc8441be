"""The composition root: constructs all parts, and starts and stops them in order.

Start-up is always recovery. SIGTERM drains, and Ray and its attempts keep running; so does SIGINT (Ctrl-C) while an
attempt is live, else it also stops the Ray that this service started.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from shardyard_coordinator.control.collector import Collector
from shardyard_coordinator.control.private import make_private, tighten
from shardyard_coordinator.control.recovery import recover
from shardyard_coordinator.control.settings import ControlSettings
from shardyard_coordinator.control.storage_claim import claim_storage
from shardyard_coordinator.files import FULL, in_words, look_at_files
from shardyard_coordinator.greeting import Said, greet, greet_standby, login_of, warnings_of
from shardyard_coordinator.launch.allowed import is_offline
from shardyard_coordinator.launch.protocols import Compute, Launcher
from shardyard_coordinator.launching import launcher_and_compute
from shardyard_coordinator.monitoring.logs import set_up_logging
from shardyard_coordinator.monitoring.monitor import Monitor
from shardyard_coordinator.record import remove_record, write_record
from shardyard_coordinator.scheduling.loop import SchedulingLoop
from shardyard_coordinator.seams import Clock, NullTrace, SystemClock, Trace
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.app import App, Info, make_door
from shardyard_coordinator.serve.certificates import TlsUnusable, server_credentials
from shardyard_coordinator.serve.door import Door
from shardyard_coordinator.serve.first_admin import ensure_admin, words_of_token
from shardyard_coordinator.serve.limits import Limits
from shardyard_coordinator.serve.observed import Spans
from shardyard_coordinator.serve.parts import Parts
from shardyard_coordinator.serve.tokens import Tokens
from shardyard_coordinator.settings import LauncherKind, Settings, host_of, is_loopback
from shardyard_coordinator.store import attempts
from shardyard_coordinator.store.failures import StoreFailure
from shardyard_coordinator.store.store import Store, lock_store, open_store
from shardyard_coordinator.web.keeper import Answering, Gateway, missing_packages, place_of_door

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_UNAVAILABLE = 69
EXIT_IO = 74
EXIT_CONFIG = 78


def run_coordinator(settings: Settings, *, output: TextIO = sys.stdout, errors: TextIO = sys.stderr) -> int:
    """Runs a coordinator until it is asked to stop; returns the exit code of its process.

    0: stopped normally. 69: the address is taken, a folder cannot be made, or the store's server is away. 75: another
    coordinator uses the store, or took it over. 74: the disk failed or is full. 65: the store is broken. 78: the store
    is of a newer version, its server or database does not fit, the storage belongs to another store, the files of TLS
    cannot be used, or something else is at the path of one of the service's files.
    """
    set_up_logging(errors, settings.log_format, settings.log_level)
    _heed_signals()
    _reach_this_machine_directly()
    # Files made from here on, by libraries and child processes too, are for this account alone.
    before = os.umask(0o077)
    try:
        make_private(settings.state_dir)
        look_at_files(settings)
        tighten(settings.state_dir, but=settings.storage)
        return asyncio.run(Coordinator(settings, output=output, errors=errors).run())
    except StoreFailure as failure:
        print(failure, file=errors)
        return failure.exit_code
    except TlsUnusable as error:
        print(error, file=errors)
        return EXIT_CONFIG
    except OSError as error:
        print(in_words(error, settings), file=errors)
        return EXIT_IO if error.errno in FULL else EXIT_UNAVAILABLE
    finally:
        os.umask(before)


def _heed_signals() -> None:
    """Undoes what a parent may have left: with SIGCHLD ignored, say, nobody learns how a child ended."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


def _reach_this_machine_directly() -> None:
    """Excludes this machine from proxies of the environment, for a local mirror of the Hub and for Ray."""
    for name in ("no_proxy", "NO_PROXY"):
        kept = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join([*kept, *(host for host in ("127.0.0.1", "localhost", "::1") if host not in kept)])


def main() -> int:
    """`python -m shardyard_coordinator.main`: settings from the environment."""
    try:
        settings = Settings()
    except ValidationError as error:
        for each in error.errors():
            where = "".join(f"{part}: " for part in each["loc"])
            print(where + each["msg"].removeprefix("Value error, "), file=sys.stderr)
        return EXIT_CONFIG
    return run_coordinator(settings)


class _StoppedEarly(Exception):
    """A signal came before the service had its store."""


@dataclass(frozen=True)
class _Running:
    """The parts of a started service."""

    store: Store
    launcher: Launcher
    collector: Collector
    loop: SchedulingLoop
    app: App
    monitor: Monitor
    said: Said


class Coordinator:
    """One run of a coordinator. `clock` and `trace` are the seams of the tests."""

    def __init__(
        self,
        settings: Settings,
        *,
        output: TextIO,
        errors: TextIO,
        clock: Clock | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._settings = settings
        self._output = output
        self._errors = errors
        self._clock = clock or SystemClock()
        self._trace = trace or NullTrace()
        self._stop = asyncio.Event()
        self._interrupted = False

    async def run(self) -> int:
        """Starts, serves until a signal or a failure of the store, and stops; raises StoreFailure, OSError."""
        with self._signals(), contextlib.ExitStack() as stack, contextlib.suppress(_StoppedEarly):
            async with self._running() as running:
                greet(self._settings, running.said, output=self._output, errors=self._errors)
                stack.enter_context(_few_collections())
                running.store.failed.add_done_callback(lambda _: self._stop.set())
                await self._stop.wait()
                if running.store.failed.done():
                    failure = running.store.failed.result()
                    print(failure, file=self._errors)
                    return failure.exit_code
        return EXIT_OK

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal drains, the second one kills."""
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if self._stop.is_set():
                os._exit(128 + number)
            self._interrupted = number == signal.SIGINT
            self._stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[_Running]:
        """Starts all parts in order, and ends them in reverse order.

        The store's lock comes first, because it is quick and names another holder; then the port, which reports
        NOT_SERVING while a large store is checked.
        """
        settings, clock, trace = self._settings, self._clock, self._trace
        place = settings.store or settings.database
        lock = lock_store(place, clock, settings.state_dir.absolute())
        async with contextlib.AsyncExitStack() as stack:
            unused = stack.enter_context(contextlib.ExitStack())
            unused.callback(lock.release)
            tls = server_credentials(settings.tls) if settings.tls else None
            if settings.standby:
                greet_standby(settings, self._output)
            monitor = Monitor(settings, clock)
            stack.push_async_callback(monitor.close)
            door = make_door(self._limits, Access(settings.authentication, clock), monitor.observer)
            await monitor.start(door.health)
            http = stack.enter_context(place_of_door(settings.state_dir)) if settings.http else None
            port = await door.start(settings.listen, tls, http=http)
            stack.push_async_callback(door.close)
            unused.pop_all()  # From here on the store releases it.
            store = await self._unless_stopped(open_store(place, clock, trace, lock=lock, standby=settings.standby))
            stack.push_async_callback(store.close)
            await claim_storage(settings.storage, store)
            if settings.authentication.is_required:
                await ensure_admin(store, settings.state_dir.absolute(), clock)
            control = ControlSettings(
                storage=settings.storage,
                store_id=store.store_id,
                data_roots=settings.data_roots,
                torch_hub=settings.torch_hub,
                event_retention_s=settings.event_retention_days * 86_400.0,
            )
            launcher, compute = self._doors()
            collector = Collector(store, launcher, clock, trace, control)
            loop = SchedulingLoop(store, launcher, collector, clock, trace)
            app = self._app(store, launcher, compute, loop, door, spans=monitor.spans)
            monitor.open(store, launcher, loop.cluster_slots, control.claim, collector.starts)
            address = f"{settings.listen.rpartition(':')[0]}:{port}"
            await launcher.start()
            await compute.start()
            await app.start()
            await recover(store, collector, trace)
            loop.start()
            app.health.set_serving(True)
            first_token = ""
            if settings.authentication.is_required:
                login = login_of(settings, address)
                first_token = await words_of_token(store, settings.state_dir.absolute(), clock, login)
            said = Said(address, await self._answer_http(http, door, stack), monitor.address, first_token)
            record = settings.state_dir / "coordinator.json"
            running = _Running(store, launcher, collector, loop, app, monitor, said)
            try:
                await asyncio.to_thread(write_record, record, address, settings)
                yield running
            finally:
                await self._end(running, compute)
                await asyncio.to_thread(remove_record, record)

    async def _unless_stopped(self, opening: Coroutine[Any, Any, Store]) -> Store:
        """The open store. Raises: _StoppedEarly if a signal comes first, for a standby may wait for days."""
        opened, stopped = asyncio.create_task(opening), asyncio.create_task(self._stop.wait())
        await asyncio.wait({opened, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if opened.done():
            return opened.result()
        opened.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await opened
        raise _StoppedEarly

    async def _answer_http(self, place: Path | None, door: Door, stack: contextlib.AsyncExitStack) -> str:
        """Starts the gateway, if one is wanted, which ends with the stack; its address. Raises: OSError."""
        settings = self._settings
        if place is None:
            return ""
        if missing := missing_packages():
            text = f"--http needs {' and '.join(missing)}; install them with: pip install 'shardyard[http]'"
            raise OSError(text)
        how = Answering(
            listen=settings.http,
            service=place,
            secret=door.server.secret,
            tls=settings.tls,
            log=settings.state_dir / "http.log",
            is_local=is_loopback(host_of(settings.http)),
        )
        gateway = Gateway(how)
        found = await gateway.start()
        stack.push_async_callback(gateway.close)
        return f"{settings.http.rpartition(':')[0]}:{found}"

    async def _end(self, running: _Running, compute: Compute) -> None:
        """Drains, then disconnects from the cluster, where attempts continue; stops its own Ray if none are running."""
        await running.monitor.quiet()
        await running.loop.close()
        await running.app.stop(self._settings.drain_s)
        live = 0 if running.store.failed.done() else len(await running.store.read(attempts.live_attempts))
        await running.collector.close()
        stop_cluster = self._interrupted and not live
        await compute.close()
        await running.launcher.close(stop_cluster=stop_cluster)
        if not stop_cluster and (text := self._what_goes_on(live)):
            print(text, file=self._output, flush=True)

    def _what_goes_on(self, live: int) -> str:
        attempts_ = f"{live} attempt{'s' * (live != 1)}"
        if self._settings.launcher is LauncherKind.LOCAL:
            return f"{attempts_} ended too; `shardyard serve` continues from the last checkpoint" * bool(live)
        if self._settings.ray_address:
            where = f"the cluster at {self._settings.ray_address}"
            return f"{attempts_} left to {where}; `shardyard serve` takes up again" * bool(live)
        what = f"{attempts_} and Ray keep running" if live else "Ray keeps running"
        return f"{what}; `shardyard serve` takes up again, `shardyard stop [--cancel-jobs | --keep-jobs]` ends it"

    def _doors(self) -> tuple[Launcher, Compute]:
        return launcher_and_compute(self._settings, self._clock)

    @property
    def _limits(self) -> Limits:
        settings = self._settings
        return Limits(
            inspection_s=settings.inspection_s,
            turn_s=settings.inspection_s,
            max_project_jobs=settings.max_project_jobs,
            max_project_upload_bytes=settings.max_project_upload_bytes,
            submits_per_s=settings.submits_per_s,
        )

    def _app(
        self, store: Store, launcher: Launcher, compute: Compute, loop: SchedulingLoop, door: Door, *, spans: Spans
    ) -> App:
        settings = self._settings
        warnings = warnings_of(settings)
        parts = Parts(
            store=store,
            launcher=launcher,
            compute=compute,
            clock=self._clock,
            trace=self._trace,
            tokens=Tokens(store.secret),
            limits=self._limits,
            storage=settings.storage,
            projects=frozenset(settings.projects),
            data_roots=settings.data_roots,
            torch_hub=settings.torch_hub,
            slot_hour_price=settings.slot_hour_price,
            currency=settings.currency,
            is_offline=is_offline(os.environ),
            webhook_allow=settings.webhook_allow,
            remote=settings.remote,
            spans=spans,
        )
        return App(parts, Info(loop.cluster_slots, warnings, settings.event_retention_days), door=door)


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Exempts the objects of start-up from garbage collection, which would hold the loop for 100 ms each time.

    The ring of events is long-lived too, so the oldest generation is collected a hundredth as often.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(10_000, 10, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


if __name__ == "__main__":
    sys.exit(main())
