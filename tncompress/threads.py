"""Running independent pieces of work beside each other, each on one core.

An eigenvalue problem of some hundred rows gains nothing from a second core, and waits for it where the
machine is busy. Two of them beside each other take half the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """Run the block with so many threads of torch's; None leaves them as they are."""
    if count is not None and count < 1:
        raise ValueError(f"wanted at least one thread, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    threads: int | None = None,
    cost: Callable[[T], float] = lambda _: 0.0,
    done: Callable[[T], None] = lambda _: None,
) -> list[R]:
    """Return ``[work(item) for item in items]``, carried out on as many cores as torch may use here.

    Those of the highest ``cost`` are begun first, so that no long one is left for the end. ``done`` is called
    in this thread as each is ready. An error ends it, and is that of the first item in order that has one.
    How many cores torch uses in other threads is not changed.
    """
    threads = min(threads or torch.get_num_threads(), len(items))
    if threads < 2:
        results = []
        for item in items:
            results.append(work(item))
            done(item)
        return results
    lock = threading.Lock()
    with ThreadPoolExecutor(threads, initializer=_use_one_core, initargs=(lock,)) as pool:
        order = sorted(range(len(items)), key=lambda place: -cost(items[place]))
        begun = {place: pool.submit(work, items[place]) for place in order}
        futures = {begun[place]: items[place] for place in range(len(items))}
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BaseException as error:
            pool.shutdown(wait=True, cancel_futures=True)
            failed = (future.exception() for future in futures if not future.cancelled())
            first = next((one for one in failed if one is not None), None)
            if isinstance(error, Exception) and first is not None and first is not error:
                raise first from None
            raise
        return [future.result() for future in futures]


def _use_one_core(lock: threading.Lock) -> None:
    """Have torch use one core in this thread alone.

    ``torch.set_num_threads`` sets the number for the thread that calls it, and the number with which later
    threads begin. The latter is put back at once, by a thread that ends then.
    """
    with lock:
        begun_with = torch.get_num_threads()
        torch.set_num_threads(1)
        mender = threading.Thread(target=torch.set_num_threads, args=(begun_with,))
        mender.start()
        mender.join()
