"""Workers: whoever does the work, the results are the same, and nobody is left behind."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import tncompress as tnc
from tncompress import workers
from tncompress.ray_actors import RayActors
from tncompress.sweep import sweep
from tncompress.workers import open_workers


@dataclass(frozen=True)
class Power:
    """A job: the power of a matrix, and which process with how many threads computed it."""

    matrix: torch.Tensor

    def run(self, unit):
        if unit == "fail":
            raise ValueError("told to")
        if unit == "odd":
            raise Odd("a", "b")
        if unit == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if unit == "wait":
            time.sleep(600)
        value = torch.linalg.matrix_power(self.matrix, unit)
        return {"value": value.tolist(), "threads": torch.get_num_threads(), "process": os.getpid()}


class Odd(Exception):
    """An error that can't be made again from its arguments."""

    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


@pytest.fixture
def job():
    return Power(torch.randn(3, 3, dtype=torch.float64))


def children():
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.fixture
def _no_one_left():
    before = children()
    yield
    assert children() <= before | {str(tracker())}


def tracker():
    """The one helper that multiprocessing itself may keep for the whole life of a process."""
    from multiprocessing import resource_tracker

    return resource_tracker._resource_tracker._pid


def collected(job, units, **options):
    with open_workers(job, **options) as run:
        return dict(run(units))


def test_one_worker_is_this_process_in_order(job):
    with open_workers(job, threads=1) as run:
        found = list(run([3, 1, 2]))
    assert [unit for unit, _ in found] == [3, 1, 2]
    assert {row["process"] for _, row in found} == {os.getpid()}


@pytest.mark.usefixtures("_no_one_left")
def test_processes_give_the_same_results_and_share_the_work(job):
    units = list(range(12))
    with open_workers(job, 2, threads=1) as run:
        found = dict(run(units))
        again = dict(run(units[:1]))
        assert not list(run([]))
    wanted = collected(job, units)
    assert all(row["value"] == wanted[unit]["value"] for unit, row in found.items())
    assert len({row["process"] for row in found.values()}) == 2
    assert os.getpid() not in {row["process"] for row in found.values()}
    assert {row["threads"] for row in found.values()} == {1}
    assert again[0]["process"] in {row["process"] for row in found.values()}  # not started a second time


@pytest.mark.slow
@pytest.mark.usefixtures("_no_one_left")
def test_errors_of_a_worker_are_raised_here(job):
    with pytest.raises(ValueError, match=r"^told to$"):
        collected(job, [1, "fail", 2], workers=2)
    with pytest.raises(RuntimeError, match=r"^Odd: a b$"):
        collected(job, ["odd"], workers=2)
    with pytest.raises(ValueError, match=r"^told to$"):
        collected(job, ["fail"])


@pytest.mark.slow
@pytest.mark.usefixtures("_no_one_left")
def test_a_dying_worker_is_told_in_one_line(job):
    message = "a worker process ended by SIGKILL while at the die: what is measured is kept; start again"
    with pytest.raises(ChildProcessError, match=message) as caught:
        collected(job, ["die", "wait"], workers=2)
    assert "\n" not in str(caught.value)


def interrupted(job):
    with open_workers(job, 2) as run:
        for _ in run([1, "wait", 2]):
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.usefixtures("_no_one_left")
def test_an_interrupt_ends_the_workers_at_once(job):
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted(job)
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    import subprocess

    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from tncompress.workers import open_workers\n"
        "class Job:\n"
        "    def run(self, unit): return unit\n"
        "try:\n"
        "    with open_workers(Job(), 2) as run: print(list(run([1, 2])))\n"
        "except ChildProcessError as error:\n"
        "    print(error)\n"
    )
    path = str(Path(workers.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "before it had done anything" in done.stdout
    assert "if __name__ == '__main__':" in done.stdout


def test_what_cannot_be_sent_is_one_line():
    class Local:
        def run(self, unit):
            return unit

    message = r"can't be sent to worker processes .*at the top of a module, or take workers=1"
    with pytest.raises(ValueError, match=message):
        collected(Local(), [1], workers=2)


def test_threads_here_are_set_back(job):
    before = torch.get_num_threads()
    assert collected(job, [1], threads=2)[1]["threads"] == 2
    assert torch.get_num_threads() == before


# --- Ray ----------------------------------------------------------------------------------------------------


def test_without_ray_an_address_says_what_to_install(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r"an address is for a Ray cluster: pip install 'tncompress\[ray\]'"
    with pytest.raises(ImportError, match=message):
        collected(job, [1], address="local")


@pytest.fixture(scope="module")
def cluster():
    """A real cluster of two nodes with one CPU each, on this machine, where these modules are found."""
    from ray.cluster_utils import Cluster

    places = Path(workers.__file__).parents[1], Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def small():
    first = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(20, 4)).double()


@pytest.mark.slow
def test_both_nodes_of_a_ray_cluster_work_and_find_what_one_finds(cluster, tmp_path, capfd, monkeypatch):
    import ray

    nodes, close = [], RayActors.close

    def watched(self):
        nodes.append(dict(self.done))
        close(self)

    monkeypatch.setattr(RayActors, "close", watched)
    batches = [(torch.randn(9, 1, 6, 6).double(), torch.arange(9) % 4)]
    options = {
        "images": [torch.randn(8, 1, 6, 6).double()],
        "fractions": [0.5, 0.2],
        "retrain": {"epochs": 1},
        "train_loader": batches,
    }
    model = small()
    one = sweep(model, batches, **options)
    capfd.readouterr()
    many = sweep(model, batches, address=cluster.address, cache=tmp_path / "rows", **options)
    assert one == many
    assert not ray.is_initialized()
    (done,) = nodes
    assert len(done) == 2
    assert sum(done.values()) == len((tmp_path / "rows").read_text().splitlines())
    assert not capfd.readouterr().err


@pytest.mark.slow
def test_slices_are_trained_on_both_nodes_of_a_ray_cluster(cluster, monkeypatch):
    """(The model and its data are of torch's classes alone, which the nodes know.)"""
    nodes, close = [], RayActors.close

    def watched(self):
        nodes.append(dict(self.done))
        close(self)

    monkeypatch.setattr(RayActors, "close", watched)
    teacher = small()
    compressed = tnc.compress(teacher, {"default": {"rank": {"params_ratio": 0.5}}, "keep_dense": []})
    batches = [(torch.randn(9, 1, 6, 6).double(), torch.arange(9) % 4) for _ in range(3)]
    config = {"epochs": 0, "local_epochs": 2}
    options = {"teacher": teacher, "val_loader": batches}
    one = tnc.finetune(compressed, batches, config, **options)
    many = tnc.finetune(compressed, batches, config, **options, address=cluster.address)
    torch.testing.assert_close(one.model.state_dict(), many.model.state_dict(), rtol=1e-9, atol=1e-11)
    told = [[(epoch.loss, epoch.accuracy) for epoch in history.local] for history in (one, many)]
    torch.testing.assert_close(*told, rtol=1e-9, atol=1e-12)
    (done,) = nodes
    assert sum(done.values()) == 2 * 2  # shares times epochs
    assert len(done) == 2


@pytest.mark.slow
def test_what_goes_wrong_on_a_cluster_is_one_line(cluster, job):
    import ray

    with pytest.raises(ValueError, match=r"^told to$"):
        collected(job, [1, "fail"], address=cluster.address)
    with pytest.raises(ChildProcessError, match="a Ray worker was lost while at the die"):
        collected(job, ["die"], address=cluster.address)
    message = "wanted 5 workers with 1 threads each, but the Ray cluster has 2 CPUs"
    with pytest.raises(ValueError, match=message):
        collected(job, [1], workers=5, address=cluster.address)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_cluster_that_is_connected_already_stays_so(cluster, job):
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert collected(job, [2], address="auto")[2]["value"] == job.run(2)["value"]
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_no_cluster_there_is_one_line(job, monkeypatch):
    import ray

    def refuse(*args, **kwargs):
        raise ConnectionError("Could not find any running\nRay instance.")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    message = "^no Ray cluster at 'auto': Could not find any running Ray instance.$"
    with pytest.raises(ConnectionError, match=message):
        collected(job, [1], address="auto")
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


class Unread:
    """A job that can be sent, and not be read."""

    def __reduce__(self):
        return __import__, ("no_such_module",)

    def run(self, unit):
        return unit


@pytest.mark.slow
def test_a_worker_that_cannot_read_its_job_says_what_is_missing():
    with pytest.raises(ImportError, match=r"can't read its job \(No module named 'no_such_module'\)"):
        collected(Unread(), [1], workers=2)
