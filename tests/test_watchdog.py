"""What tells processes of each other, here in threads of one."""

import json
import queue
import socket
import threading

import processes
import pytest

from tripletjax.learn.distributed import watchdog


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watchdog, "BEAT", 0.1)


class Group:
    """Watchdogs of some processes, and what they are told."""

    def __init__(self, count, connected=None, patience=1.0):
        self.told = [queue.Queue() for _ in range(count)]
        self.where = threading.Event()
        self.dogs = [
            watchdog.Watchdog(
                index,
                count,
                patience=patience,
                on_loss=lambda *told, index=index: self.told[index].put(told),
            )
            for index in range(connected or count)
        ]
        threads = [
            threading.Thread(target=dog.start, args=("127.0.0.1", self.of_first(dog)))
            for dog in self.dogs
        ]
        for thread in threads:
            thread.start()
        if connected is not None:
            self.silent = self.connect(connected)
        for thread in threads:
            thread.join()

    def of_first(self, dog):
        def of_first(make):
            if dog.index == 0:
                self.made = make()
                self.where.set()
            assert self.where.wait(5)
            return self.made

        return of_first

    def connect(self, index):
        """A process that says who it is, and nothing else."""
        assert self.where.wait(5)
        line = socket.create_connection(("127.0.0.1", self.made["port"]))
        told = {"token": self.made["token"], "index": index}
        line.sendall(json.dumps(told).encode() + b"\n")
        return line

    def close(self):
        for dog in self.dogs:
            dog.close()
        for thread in (thread for dog in self.dogs for thread in dog._threads):
            thread.join(5)


@pytest.mark.usefixtures("quick")
def test_all_is_well():
    group = Group(3, patience=0.5)
    with pytest.raises(queue.Empty):
        group.told[0].get(timeout=1.5)
    group.close()
    for told in group.told:
        assert told.empty()


@pytest.mark.usefixtures("quick")
def test_a_silent_process_is_lost():
    group = Group(3, connected=2)
    for told in group.told[:2]:
        words = "process 2 of 3 has not been heard of for 1 s"
        assert told.get(timeout=5) == (words, False)
    group.silent.close()
    group.close()


@pytest.mark.usefixtures("quick")
def test_a_closed_connection_is_a_loss():
    group = Group(3, connected=2, patience=10)
    group.silent.close()
    for told in group.told[:2]:
        words = "process 2 of 3 was lost: its connection is closed"
        assert told.get(timeout=5) == (words, False)
    group.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("which", [0, 1])
def test_who_ends_by_itself_says_why(which):
    group = Group(3)
    group.dogs[which].close("ended: OSError: no space left")
    for index in {0, 1, 2} - {which}:
        words = f"process {which} of 3 ended: OSError: no space left"
        assert group.told[index].get(timeout=5) == (words, True)
    assert group.told[which].empty()
    group.close()


@pytest.mark.usefixtures("quick")
def test_strangers_are_not_let_in():
    dog = watchdog.Watchdog(0, 2, patience=0.5, on_loss=lambda *told: None)

    def of_first(make):
        made = make()
        for message in (b"nonsense\n", b"3\n", b'{"token": "none", "index": 1}\n'):
            with socket.create_connection(("127.0.0.1", made["port"])) as line:
                line.sendall(message)
        return made

    dog.start("127.0.0.1", of_first)
    assert not dog._lines
    dog.close()


@pytest.mark.usefixtures("quick")
def test_an_address_that_cannot_be_reached_is_told(capsys):
    port = processes.free_port()
    dog = watchdog.Watchdog(1, 2, on_loss=lambda *told: None)
    dog.start(None, lambda make: {"hosts": ["127.0.0.1"], "port": port, "token": ""})
    assert (
        "process 1 cannot connect to process 0 on 127.0.0.1" in capsys.readouterr().err
    )
    dog.close()
