"""Interrupts while a checkpoint is read or written."""

import signal

import jax.numpy as jnp
import pytest

from tripletjax.learn.training.checkpoints import Checkpoints
from tripletjax.learn.training.interrupts import Interrupts, deferred_interrupts


def test_an_interrupt_comes_at_the_end_of_the_body():
    done = []

    @deferred_interrupts()
    def body():
        signal.raise_signal(signal.SIGINT)
        done.append("body")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["body"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_ends_the_body():
    done = []

    @deferred_interrupts()
    def body():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("body")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == []


def test_an_outer_handler_receives_the_interrupt():
    with Interrupts() as interrupts:
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            assert not interrupts.received
        assert interrupts.received


@pytest.mark.parametrize("method", ["save", "load"])
def test_an_interrupted_checkpoint_is_no_damaged_one(method, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "states")
    state = {"x": jnp.arange(3.0)}
    checkpoints.save(1, state)
    real = getattr(checkpoints._orbax, method)

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoints._orbax, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, state) if method == "save" else checkpoints.restore(state)
    monkeypatch.undo()
    step, restored, messages = checkpoints.restore(state)
    assert step == (2 if method == "save" else 1)
    assert restored["x"].tolist() == [0.0, 1.0, 2.0]
    assert messages == []
    checkpoints.close()
