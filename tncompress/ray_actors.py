"""Workers on a Ray cluster, spread over its nodes. Ray is imported where it is used."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tncompress.jobs import Job, outcome, unpickled
from tncompress.textfiles import one_line


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
        self.job = unpickled(payload)

    def run(self, unit: Any) -> tuple[str, tuple[bool, Any]]:
        return self.node, outcome(self.job, unit)


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
