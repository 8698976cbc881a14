"""Who of the ranks is gone, and why: so that the others end within seconds and say it.

A rank that dies leaves the others in a sum that never comes. Each rank therefore holds a connection to rank 0 from
the start. The kernel closes it when the process ends, however it ends; a rank that ends by itself says first with
which code and why. Rank 0 hears it and tells the others. No clock is involved: a rank that is slow, stopped or busy
writing is not gone. (A machine that vanishes from the network is noticed by TCP's keepalive, after a minute or so.)

Whoever hears of an end has GRACE seconds to end by itself, as the error in its own sum arrives, or is ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import IO, Any

from rlhf_exp import distributed
from rlhf_exp.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED

GRACE = 3.0  # seconds
FAILED = 1
KEEPALIVE = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6))


@dataclass(frozen=True)
class End:
    """How a rank ended. code None: without a word, so somebody killed it, or the machine did."""

    rank: int
    host: str
    code: int | None
    lines: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """Of the run: as the rank's own where that says something."""
        return self.code if self.code in (EXIT_BAD_INPUT, EXIT_INTERRUPTED) else FAILED

    def told(self) -> list[str]:
        """For people, a line for each problem."""
        who = f"rank {self.rank} on {self.host}"
        if self.code is None:
            return [
                f"{who} is gone without a word (killed, or out of memory), so all ranks end; the same command "
                "continues from the last checkpoint"
            ]
        return [f"{who}: {line}" for line in self.lines]


class Watch:
    """Of one process; see above. `first` is the end that ends the run."""

    def __init__(self) -> None:
        self.first: End | None = None
        self._heard = threading.Event()
        self._ending = False  # this process ends by itself and says what there is to say
        self._peers: dict[int, tuple[str, IO[str]]] = {}  # rank -> host, where to write to it
        self._lock = threading.Lock()

    # ---------------------------------------------------------------- beginning

    def begin(self) -> None:
        """Connect all ranks."""
        if distributed.is_main():
            server = socket.create_server(("", 0), backlog=distributed.world_size())
            address = (_own_address(), server.getsockname()[1], os.urandom(16).hex())
            distributed.from_main(lambda: address)
            self._accept(server, address[2])
        else:
            host, port, password = distributed.from_main(lambda: ("", 0, ""))
            connection = socket.create_connection((host, port), timeout=60)
            connection.settimeout(None)
            self._hold(0, host, connection)
            self.tell({"rank": distributed.rank(), "host": socket.gethostname(), "password": password})
        distributed.barrier()

    def _accept(self, server: socket.socket, password: str) -> None:
        server.settimeout(60)
        while len(self._peers) < distributed.world_size() - 1:
            connection, _ = server.accept()
            connection.settimeout(60)
            try:
                hello = json.loads(_line(connection))
                rank, host = int(hello["rank"]), str(hello["host"])
            except (OSError, ValueError, KeyError, TypeError):
                hello = {}
            if hello.get("password") != password:  # somebody else who tries ports
                connection.close()
                continue
            connection.settimeout(None)
            self._hold(rank, host, connection)
        server.close()

    def _hold(self, rank: int, host: str, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._peers[rank] = host, connection.makefile("w", encoding="utf-8")
        threading.Thread(target=self._listen, args=(rank, host, connection), daemon=True).start()

    # ---------------------------------------------------------------- hearing and telling

    def _listen(self, rank: int, host: str, connection: socket.socket) -> None:
        try:
            with connection.makefile("r", encoding="utf-8") as lines:
                line = lines.readline()
        except OSError:
            line = ""
        try:
            said = json.loads(line)
            end = End(said["rank"], said["host"], said["code"], tuple(said["lines"]))
        except (ValueError, KeyError, TypeError):
            end = End(rank, host, None)
        if end.code == 0:
            return
        self._hear(end)

    def _hear(self, end: End) -> None:
        with self._lock:
            if self.first is not None:
                return
            self.first = end
        self._heard.set()
        if distributed.is_main():
            self.tell(_document(end))
        if self._ending:
            return
        time.sleep(GRACE)
        if not self._ending:
            self.say(end)
            sys.stderr.flush()
            os._exit(end.exit_code)

    def tell(self, document: dict[str, Any]) -> None:
        """A line to every connected rank, as far as they are there."""
        for _, file in self._peers.values():
            try:
                file.write(json.dumps(document) + "\n")
                file.flush()
            except (OSError, ValueError):
                continue

    def heard(self, seconds: float = GRACE) -> End | None:
        """The end of another rank, if one comes within this time: a sum fails a moment before its reason is here."""
        self._heard.wait(seconds)
        return self.first

    def say(self, end: End) -> None:
        """Rank 0 tells people, of itself too while it can; where it is gone, the next one does."""
        speaker = 1 if end.rank == 0 and end.code is None else 0
        if distributed.rank() == speaker:
            for line in end.told():
                print(f"error: {line}", file=sys.stderr, flush=True)

    # ---------------------------------------------------------------- ending

    def leave(self, code: int, lines: list[str]) -> None:
        """Say to the others that this process ends now."""
        self._ending = True
        self.tell(_document(End(distributed.rank(), socket.gethostname(), code, tuple(lines))))


def _document(end: End) -> dict[str, Any]:
    return {"rank": end.rank, "host": end.host, "code": end.code, "lines": list(end.lines)}


def _line(connection: socket.socket) -> bytes:
    """One line, byte by byte: what follows is for another reader."""
    found = b""
    while not found.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(found) > 4096:
            break
        found += byte
    return found


def _own_address() -> str:
    """Of this machine, as the other ranks can reach it: the one that leads to the address where they met."""
    target = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(target, None, socket.AF_INET)}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((min(addresses), 9))  # no packet is sent
            return probe.getsockname()[0]
    except OSError:
        return target
