"""Tells when one of several processes is lost: killed, stopped, or not to be reached.

Exchanges between processes wait for all of them, forever if need be. Here every process
hears from the first, and the first from every one, once in a while.
"""

import contextlib
import json
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# In seconds: between two signs of life; and without one, a process is lost.
BEAT, PATIENCE = 2.0, 20.0
# What is sent: a line of JSON, empty for a sign of life.
END = b"\n"


class Watchdog:
    """A thread in every process, that ends it if another is lost.

    Args:
        index: which process this is.
        count: how many there are.
        on_loss: what ends this process, called with what happened to another, and
            whether that one has ended by itself, and so has said why.
        patience: how many seconds a process may be silent.
    """

    def __init__(
        self,
        index: int,
        count: int,
        *,
        on_loss: Callable[[str, bool], Any],
        patience: float = PATIENCE,
    ):
        self.index, self.count = index, count
        self.on_loss, self.patience = on_loss, patience
        self._lines: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._lock = threading.Lock()

    def start(
        self, host: str | None, of_first: Callable[[Callable[[], Any]], Any]
    ) -> None:
        """Connects all processes with the first.

        Args:
            host: under which the first can be reached, if that is known.
            of_first: brings what the first process makes to all.
        """
        listener = socket.create_server(("", 0)) if self.index == 0 else None
        where = of_first(lambda: self._where(listener, host))
        if listener is not None:
            self._accept(listener, where["token"])
        elif not self._connect(where):
            print(
                f"process {self.index} cannot connect to process 0 on "
                f"{' or '.join(where['hosts'])}, port {where['port']}: should one of "
                "the two stop, JAX alone will notice.",
                file=sys.stderr,
            )
        self._threads = [
            threading.Thread(target=self._listen, args=(other,), daemon=True)
            for other in self._lines
        ]
        self._threads.append(threading.Thread(target=self._beat, daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self, reason: str | None = None) -> None:
        """Leaves the others, with a reason if it is not the end of the work."""
        self._closing = True
        for other in list(self._lines):
            self._send(other, _left(self.index, reason, True))
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_WR)

    def _where(self, listener: Any, host: str | None) -> dict[str, Any]:
        hosts = [host, socket.gethostname()]
        with contextlib.suppress(OSError):
            hosts += [x[4][0] for x in socket.getaddrinfo(socket.gethostname(), None)]
        port = listener.getsockname()[1]
        known = [h for h in dict.fromkeys(hosts) if h]
        return {"hosts": known, "port": port, "token": secrets.token_hex(16)}

    def _accept(self, listener: socket.socket, token: str) -> None:
        listener.settimeout(self.patience)
        with listener, contextlib.suppress(TimeoutError):
            while len(self._lines) < self.count - 1:
                line, _ = listener.accept()
                line.settimeout(self.patience)
                try:
                    told = json.loads(_read_line(line))
                    if told["token"] != token:
                        raise ValueError("A stranger.")
                    self._lines[told["index"]] = line
                except (OSError, ValueError, KeyError, TypeError):
                    line.close()

    def _connect(self, where: dict[str, Any]) -> bool:
        for host in where["hosts"]:
            with contextlib.suppress(OSError):
                line = socket.create_connection((host, where["port"]), timeout=3.0)
                line.settimeout(self.patience)
                self._lines[0] = line
                self._send(0, {"token": where["token"], "index": self.index})
                return True
        return False

    def _beat(self) -> None:
        while not self._closing:
            for other in list(self._lines):
                self._send(other, None)
            time.sleep(BEAT)

    def _send(self, other: int, message: dict[str, Any] | None) -> None:
        data = END if message is None else json.dumps(message).encode() + END
        # Whoever listens notices what is lost.
        with self._lock, contextlib.suppress(OSError):
            self._lines[other].sendall(data)

    def _listen(self, other: int) -> None:
        with self._lines[other] as line:
            while True:
                try:
                    message = _read_line(line)
                except TimeoutError:
                    self._lost(other, f"has not been heard of for {self.patience:g} s")
                    return
                except OSError:
                    self._lost(other, "was lost: its connection is closed")
                    return
                if not message:
                    continue
                told = json.loads(message)
                if told["reason"] is not None:
                    self._lost(told["left"], told["reason"], told["by_itself"])
                if told["left"] == other:
                    return

    def _lost(self, which: int, how: str, by_itself: bool = False) -> None:
        if self._closing:
            return
        told = f"process {which} of {self.count} {how}"
        if self.index == 0:
            self._closing = True
            for other in self._lines:
                if other != which:
                    self._send(other, _left(which, how, by_itself))
        self.on_loss(told, by_itself)


def _left(which: int, reason: str | None, by_itself: bool) -> dict[str, Any]:
    return {"left": which, "reason": reason, "by_itself": by_itself}


def _read_line(line: socket.socket) -> bytes:
    """Up to the end of a line; raises ConnectionError at the end of all."""
    data = b""
    while not data.endswith(END):
        if not (some := line.recv(1)):
            raise ConnectionError
        data += some
    return data.strip()
