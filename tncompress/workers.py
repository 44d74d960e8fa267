"""Units of work carried out in this process, in several, or on a Ray cluster.

A job is any value with ``run(unit)``. It is sent to each worker once, the units one at a time, and results
come as they are done. Workers touch no file: what to do with a result is the caller's business.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tncompress.jobs import Job, Run, outcome, unpickled
from tncompress.ray_actors import RayActors
from tncompress.textfiles import one_line

GRACE = 5.0
"""Seconds that a worker has to end by itself."""


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
        with threads_of(threads if team is None else None):
            yield team if team is not None else lambda units: ((unit, job.run(unit)) for unit in units)
    finally:
        if team is not None:
            team.close()


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Have torch compute with so many threads while the block runs; None leaves their number as it is."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


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
        job = unpickled(connection.recv_bytes())
        connection.send((True, None))
        while True:
            connection.send(outcome(job, connection.recv()))
    except (EOFError, OSError):
        return


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
