"""Messages between a pool of reward workers and a worker, over a socket: 8 bytes of length, then a pickle.

The worker waits for what it reads and writes. The pool waits for no single worker, whatever state that is in: what a
socket doesn't take at once stays in a buffer.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_HEAD = struct.Struct("!Q")
_MAX_BYTES = 2**32
"""More than any message: what says otherwise is none of ours."""
_AT_ONCE = 2**18


def send(connection: socket.socket, message: Any) -> None:
    connection.sendall(_framed(message))


def receive(connection: socket.socket) -> Any:
    """Raises EOFError when the other end is closed."""
    [length] = _HEAD.unpack(_exactly(connection, _HEAD.size))
    return pickle.loads(_exactly(connection, length))


class Channel:
    """The pool's end, which never waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._incoming, self._outgoing = bytearray(), bytearray()

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def has_more_to_send(self) -> bool:
        return bool(self._outgoing)

    def put(self, message: Any) -> None:
        self._outgoing += _framed(message)
        self.flush()

    def flush(self) -> None:
        """As much as the socket takes. A closed one takes all: `take` says that it is closed."""
        while self._outgoing:
            try:
                num_sent = self._connection.send(self._outgoing[:_AT_ONCE])
            except BlockingIOError:
                return
            except OSError:
                self._outgoing.clear()
                return
            del self._outgoing[:num_sent]

    def take(self) -> tuple[list[Any], bool]:
        """The messages that have come, and whether the other end is closed or sends what is no message."""
        is_closed = self._read()
        messages: list[Any] = []
        while len(self._incoming) >= _HEAD.size:
            [length] = _HEAD.unpack_from(self._incoming)
            if length > _MAX_BYTES:
                return messages, True
            end = _HEAD.size + length
            if len(self._incoming) < end:
                break
            try:
                messages.append(pickle.loads(bytes(self._incoming[_HEAD.size : end])))
            except Exception:  # A process that the user's function forked may write anything.
                return messages, True
            del self._incoming[:end]
        return messages, is_closed

    def close(self) -> None:
        self._connection.close()

    def _read(self) -> bool:
        while True:
            try:
                data = self._connection.recv(_AT_ONCE)
            except BlockingIOError:
                return False
            except OSError:
                return True
            if not data:
                return True
            self._incoming += data


def _framed(message: Any) -> bytes:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEAD.pack(len(data)) + data


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(min(length - len(data), _AT_ONCE))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
