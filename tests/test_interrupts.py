"""An interrupt reaches long work, also one that Python threw away."""

import os
import signal
import threading
import warnings

import pytest

from qad import interrupts


class Swallows:
    """An object in whose destructor the signal arrives: what is raised there is ignored."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two instructions
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_interrupt_is_found_at_the_next_step() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts.remembered(), warnings.catch_warnings():
        interrupts.check()
        Swallows()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before
    interrupts.check()


def test_an_interrupt_is_raised_at_once() -> None:
    with interrupts.remembered(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_threads_may_train_too() -> None:
    ran = []

    def work() -> None:
        with interrupts.remembered():
            interrupts.check()
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]
