"""Runs that take turns: every sample is one call's seconds, and what is hopeless is given up."""

import math
import time

import pytest
import torch

from tncompress.timing import LONG, samples_in_turns


class Counted:
    """A run on a clock of its own: a call takes ``seconds`` of it."""

    now = 0.0

    def __init__(self, seconds, order):
        self.seconds, self.order, self.calls = seconds, order, 0

    def __call__(self):
        self.calls += 1
        self.order.append(self)
        Counted.now += self.seconds


def clock():
    return Counted.now


@pytest.mark.parametrize("seconds", [(1e-3, 4e-3, 2e-3), (1.0, 2.0)])
@pytest.mark.parametrize("rounds", [2, 5])
def test_samples_are_the_seconds_of_one_call(seconds, rounds):
    order = []
    runs = [Counted(each, order) for each in seconds]
    found = samples_in_turns(runs, seconds=0.1, rounds=rounds, clock=clock)
    assert [len(samples) for samples in found] == [rounds] * len(runs)
    for each, samples in zip(seconds, found, strict=True):
        assert all(math.isclose(sample, each, rel_tol=1e-6) for sample in samples)
    turns = [run for run, before in zip(order, [None, *order], strict=False) if run is not before]
    assert turns[-len(runs) * rounds :] == runs * rounds


def test_the_time_is_shared_out_and_long_calls_are_not_run_for_nothing():
    quick, long = Counted(1e-3, []), Counted(4 * LONG, [])
    samples_in_turns([quick, long], seconds=0.2, rounds=4, clock=clock)
    assert quick.calls in range(3 + 4 * 50, 3 + 4 * 52 + 1)  # 50 calls in 0.05 s, one more before each sample
    assert long.calls == 3 + 4


def test_as_many_rounds_as_fit_but_not_fewer_than_asked_for():
    for seconds, wanted in ((10.0, 8), (0.65, 6), (0.0, 3)):
        found = samples_in_turns([Counted(0.1, [])], seconds=seconds, rounds=8, fewest=3, clock=clock)
        assert len(found[0]) == wanted


def test_what_is_hopeless_is_given_up_after_two_rounds():
    runs = [Counted(each, []) for each in (1e-3, 1.4e-3, 1.6e-3)]
    found = samples_in_turns(runs, seconds=0.0, rounds=7, hopeless=1.5, clock=clock)
    assert [len(samples) for samples in found] == [7, 7, 2]


def test_the_clock_is_that_of_the_wall():
    (found,) = samples_in_turns([lambda: time.sleep(0.01)], seconds=0.03, rounds=3)
    assert all(0.01 <= sample < 0.5 for sample in found)
    assert not torch.is_inference_mode_enabled()
