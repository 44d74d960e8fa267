"""Units of work carried out in this process, in several, or on a Ray cluster.

A job is any value with ``run(unit)``. It is sent to each worker once, the units one at a time, and results
come as they are done. Workers touch no file: what to do with a result is the caller's business.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, runtime_checkable

import torch

from tncompress.textfiles import one_line

Run = Callable[[Sequence[Any]], Iterator[tuple[Any, Any]]]
"""From units to pairs of a unit and its result, in whatever order they come."""

GRACE = 5.0
"""Seconds that a worker has to end by itself."""


@runtime_checkable
class Job(Protocol):
    """What is done with each unit."""

    def run(self, unit: Any) -> Any:
        """Return the result of one unit."""


@contextmanager
def open_workers(
    job: Job, workers: int | None = None, *, threads: int | None = None, address: str | None = None
) -> Iterator[Run]:
    """Yield a function that carries out units; no worker is left running when the block ends.

    Without ``address`` there are ``workers`` processes on this machine, or none but this one for 1; with it
    as many actors on the Ray cluster there, one for each of its CPUs by default. Each computes with
    ``threads`` threads: by default what torch has here, shared out, and 1 on a cluster. Results depend on
    the number of threads in their last digits, and on nothing else here. An error in a worker is raised
    here; a worker that dies is a ``ChildProcessError``.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is a number from 1 on, got {value}")
    count = workers or 1
    team: _Processes | RayActors | None = None
    if address is not None:
        team = RayActors(job, workers, threads or 1, address)
    elif count > 1:
        team = _Processes(job, count, threads or max(1, torch.get_num_threads() // count))
    try:
        with _threads(threads if team is None else None):
            yield team if team is not None else lambda units: ((unit, job.run(unit)) for unit in units)
    finally:
        if team is not None:
            team.close()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _outcome(job: Job, unit: Any) -> tuple[bool, Any]:
    """Return True with the result, or False with an error that can be sent."""
    try:
        return True, job.run(unit)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return False, RuntimeError(f"{type(error).__name__}: {one_line(error)}")
        return False, error


def _unpickled(payload: bytes) -> Job:
    """Return the job, or one that says with each unit why there is none."""
    try:
        return pickle.loads(payload)
    except Exception as error:  # above all a module that is not there
        return _Missing(one_line(error))


class _Missing:
    def __init__(self, reason: str) -> None:
        self.reason = reason

    def run(self, unit: Any) -> Any:
        hint = "the modules of the model and its data must be found there, too"
        raise ImportError(f"a worker can't read its job ({self.reason}): {hint}")


# --- processes of this machine ------------------------------------------------------------------------------


class _Processes:
    """Fresh processes, each at the other end of a pipe; they are started when there is work for them."""

    def __init__(self, job: Job, count: int, threads: int) -> None:
        self.count, self.threads = count, threads
        self.members: list[_Member] = []
        try:
            self.payload = pickle.dumps(job)
        except Exception as error:  # whatever a user's class raises
            reason = one_line(error)
            raise ValueError(
                f"the model or its data can't be sent to worker processes ({reason}): define their classes "
                "at the top of a module, or take workers=1"
            ) from error

    def __call__(self, units: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        waiting = list(reversed(units))
        self._start(min(self.count, len(waiting)))
        busy = [member for member in self.members if waiting and member.give(waiting.pop())]
        while busy:
            ready = wait([member.connection for member in busy])
            for member in [member for member in busy if member.connection in ready]:
                unit, (done, found) = member.unit, member.take()
                if not done:
                    raise found
                if not waiting or not member.give(waiting.pop()):
                    busy.remove(member)
                yield unit, found

    def _start(self, count: int) -> None:
        fresh = [_Member(self.threads) for _ in range(count - len(self.members))]
        self.members += fresh
        for member in fresh:  # all import torch at the same time
            member.send(self.payload)
        for member in fresh:
            member.take()
            member.began = True

    def close(self) -> None:
        for member in self.members:
            member.stop()
        self.members = []


class _Member:
    """One worker process, seen from the parent: whether it ``began``, and the ``unit`` that it is at."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.began, self.unit = False, None
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, threads), daemon=True)
        self.process.start()
        other.close()

    def send(self, payload: bytes) -> None:
        try:
            self.connection.send_bytes(payload)
        except OSError:
            raise self._death() from None

    def give(self, unit: Any) -> bool:
        self.unit = unit
        try:
            self.connection.send(unit)
        except OSError:
            raise self._death() from None
        return True

    def take(self) -> tuple[bool, Any]:
        try:
            outcome = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        self.unit = None
        return outcome

    def _death(self) -> ChildProcessError:
        self.process.join(GRACE)
        code = self.process.exitcode
        how = (
            f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        )
        if not self.began:
            hint = "a script calls this under `if __name__ == '__main__':`, as with all worker processes"
            return ChildProcessError(f"a worker process ended {how} before it had done anything: {hint}")
        hint = "what is measured is kept; start again, with fewer workers if memory was short"
        return ChildProcessError(f"a worker process ended {how} while at the {self.unit}: {hint}")

    def stop(self) -> None:
        """End the process: at once if it is at something, for then its result is not wanted any more."""
        self.connection.close()
        if self.unit is not None or not self.began:
            self.process.kill()
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _serve(connection: Connection, threads: int) -> None:
    """Be a worker process until the parent closes the pipe, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        job = _unpickled(connection.recv_bytes())
        connection.send((True, None))
        while True:
            connection.send(_outcome(job, connection.recv()))
    except (EOFError, OSError):
        return


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


# --- a Ray cluster ------------------------------------------------------------------------------------------


class RayActors:
    """Actors on a Ray cluster, spread over its nodes; ``done`` counts the units of each node.

    A process that is connected to a cluster already uses that and stays connected; else it connects to
    ``address`` (``local`` starts a cluster of this machine) and lets go of it in the end.
    """

    def __init__(self, job: Job, count: int | None, threads: int, address: str) -> None:
        self.ray: Any = _ray()
        self.threads, self.done = threads, Counter[str]()
        self.actors: list[Any] = []
        self.connected = not self.ray.is_initialized()
        if self.connected:
            _connect(self.ray, address)
        try:
            cpus = int(self.ray.cluster_resources().get("CPU", 0))
            self.count = count or max(1, cpus // threads)
            if self.count * threads > cpus:
                wanted = f"wanted {self.count} workers with {threads} threads each"
                raise ValueError(f"{wanted}, but the Ray cluster has {cpus} CPUs: take fewer")
            self.payload = self.ray.put(_cloudpickled(self.ray, job))
        except BaseException:
            self.close()
            raise

    def __call__(self, units: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield each unit with its result as soon as it is there."""
        waiting = list(reversed(units))
        self._start(min(self.count, len(waiting)))
        at: dict[Any, tuple[Any, Any]] = {}
        for actor in self.actors:
            if waiting:
                unit = waiting.pop()
                at[actor.run.remote(unit)] = actor, unit
        while at:
            (reference,), _ = self.ray.wait(list(at), num_returns=1)
            actor, unit = at.pop(reference)
            try:
                node, (done, found) = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                hint = "what is measured is kept; start again to go on"
                kind = type(error).__name__
                raise ChildProcessError(
                    f"a Ray worker was lost while at the {unit} ({kind}): {hint}"
                ) from None
            if not done:
                raise found
            self.done[node] += 1
            if waiting:
                following = waiting.pop()
                at[actor.run.remote(following)] = actor, following
            yield unit, found

    def _start(self, count: int) -> None:
        kind = self.ray.remote(num_cpus=self.threads, scheduling_strategy="SPREAD")(_Actor)
        fresh = count - len(self.actors)
        self.actors += [kind.remote(self.payload, self.threads) for _ in range(fresh)]

    def close(self) -> None:
        """End the actors, and the connection if it was made here."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors = []
        if self.connected:
            self.ray.shutdown()


class _Actor:
    """A worker on the cluster."""

    def __init__(self, payload: bytes, threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        self.node = ray.get_runtime_context().get_node_id()
        self.job = _unpickled(payload)

    def run(self, unit: Any) -> tuple[str, tuple[bool, Any]]:
        return self.node, _outcome(self.job, unit)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ImportError("an address is for a Ray cluster: pip install 'tncompress[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one, without its words on standard error."""
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options["include_dashboard"] = False
    name = "RAY_USAGE_STATS_ENABLED"
    before = os.environ.get(name)
    os.environ.setdefault(name, "0")
    try:
        ray.init(address=address, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at {address!r}: {one_line(error, 200)}") from None
    finally:
        if before is None:
            os.environ.pop(name, None)


def _cloudpickled(ray: Any, job: Job) -> bytes:
    """Return the job as bytes; classes of a script or a notebook go along by value."""
    try:
        return ray.cloudpickle.dumps(job)
    except Exception as error:  # whatever a user's class raises
        reason = one_line(error)
        raise ValueError(f"the model or its data can't be sent to a Ray cluster ({reason})") from error
