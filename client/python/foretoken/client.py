"""Client: one connection to a Foretoken service.

    with Client("tcp://127.0.0.1:8000", "client.key") as client:
        for piece in client.stream("Once upon a time", max_tokens=64):
            print(piece.text, end="", flush=True)
        answer = client.generate([1, 2, 3], temperature=0)
        print(answer.text, answer.kv)

A Client belongs to one thread; threads that generate at once take one each. Errors from the
service raise ServiceError with its code; a service that is gone raises ServiceError("unavailable"):
at once for all that runs when the connection is lost, as the service cancels what it asked for. The
client connects again by itself, and serves new requests.
"""

import collections
import dataclasses
import json
import math
import os
import struct
import time
import uuid

import zmq

from foretoken import wire

_POLL_SECONDS = 1.0


class ServiceError(Exception):
    """What the service answered: `code` (docs/formats.md) and a message for people."""

    def __init__(self, code, message):
        super().__init__(f"{message} ({code})")
        self.code = code


@dataclasses.dataclass(frozen=True)
class Piece:
    """What came in one message: token ids, their logprobs, and the text that they complete."""

    ids: list
    logprobs: list
    text: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished request. usage, kv and timing are dicts of the wire's fields."""

    text: str
    ids: list
    tokens: list
    prompt_ids: list
    finish_reason: str
    usage: dict
    kv: dict
    timing: dict


class Client:
    """See the module's text. `key_file` is what `foretoken serve` printed; None without keys."""

    def __init__(self, endpoint, key_file=None, silence_timeout=10.0):
        self._endpoint = endpoint
        self._keys = _read_keys(key_file) if key_file is not None else None
        self._silence_timeout = silence_timeout
        self._messages = {}  # of each request that somebody reads: those not read yet
        self._running = set()  # requests whose last message has not come
        self._asked_for = None  # those of them when the status was asked for that is still awaited
        self._context = zmq.Context()
        self._num_connections = 0
        self._connect()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._running.clear()  # the service cancels them when the connection ends
        self._disconnect()
        self._context.term()

    def stream(self, prompt, **options):
        """Yields Pieces; its return value is the Answer. Leaving it early cancels the request.

        `prompt` is a text or a list of token ids. `options` are the fields of a `generate` message
        and of its `sampling` (docs/formats.md): max_tokens, temperature, top_k, top_p, min_p, seed,
        stop, ignore_eos, num_logprobs, ... Several streams may be read in turn.
        """
        request_id = self._submit(prompt, stream=True, **options)
        try:
            while True:
                message = self._receive(request_id)
                if message["type"] == "done":
                    return _answer(message)
                if message["tokens"]:
                    yield _piece(message)
        finally:
            self._forget(request_id)

    def generate(self, prompt, **options):
        """Runs a request to its end and returns its Answer."""
        request_id = self._submit(prompt, stream=False, **options)
        try:
            while True:
                message = self._receive(request_id)
                if message["type"] == "done":
                    return _answer(message)
        finally:
            self._forget(request_id)

    def cancel(self, request_id):
        self._send(wire.message("cancel", request_id=request_id))

    def status(self):
        """What the service is doing: a dict of the `status_reply` message's fields."""
        return self._ask("status", "status_reply")

    def models(self):
        return self._ask("models", "models_reply")["models"]

    def drain(self):
        """Lets the service finish what runs, and end. Returns when it has agreed."""
        self._ask("drain", "drain_reply")

    def _connect(self):
        self._num_connections += 1
        self._was_made = False  # the connection, handshake included
        self._was_lost = False  # since
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        if self._keys is not None:
            self._socket.curve_serverkey = self._keys["server_public_key"].encode()
            self._socket.curve_publickey = self._keys["public_key"].encode()
            self._socket.curve_secretkey = self._keys["secret_key"].encode()
        monitor = f"inproc://monitor-{self._num_connections}"
        self._socket.monitor(monitor, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._events = self._context.socket(zmq.PAIR)
        self._events.linger = 0
        self._events.rcvhwm = 0  # else ZeroMQ's thread stands still where nobody reads for long
        self._events.connect(monitor)
        self._socket.connect(self._endpoint)

    def _disconnect(self):
        if not self._socket.closed:
            self._socket.disable_monitor()  # first: ZeroMQ's thread would wait for a reader
        self._events.close()
        self._socket.close()

    def _is_lost(self):
        """Whether the connection was lost. All that had come before can be received then."""
        while self._events.poll(0):
            (event,) = struct.unpack_from("=H", self._events.recv_multipart()[0])
            self._was_made |= event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._was_lost |= self._was_made and event == zmq.EVENT_DISCONNECTED
        return self._was_lost

    def _lose_connection(self):
        """The service cancels what a connection that is lost has asked for: this is the end of all
        requests. The new socket has nothing of them that would still be sent."""
        why = f"the connection to {self._endpoint} was lost, and the request with it"
        error = {"type": "error", "code": "unavailable", "message": why}
        for request_id in list(self._running):
            self._keep({**error, "request_id": request_id})
        self._asked_for = None
        self._disconnect()
        self._connect()

    def _have_connection(self):
        """Before something is sent, which a connection that is lost would lose too."""
        while self._is_lost():
            message = self._next(0)
            if message is not None:
                self._keep(message)

    def _submit(self, prompt, **options):
        request_id = str(uuid.uuid4())
        self._have_connection()
        self._send(wire.generate(request_id, prompt, **options))
        self._messages[request_id] = collections.deque()
        self._running.add(request_id)
        return request_id

    def _forget(self, request_id):
        """What still comes of it is dropped."""
        del self._messages[request_id]
        if request_id in self._running:
            self._running.remove(request_id)
            self.cancel(request_id)

    def _ask(self, kind, reply_kind):
        self._asked_for = None  # its answer may be taken for this one's
        self._have_connection()
        self._send(wire.message(kind))
        deadline = time.monotonic() + self._silence_timeout
        while time.monotonic() < deadline:
            connection = self._num_connections
            message = self._next(deadline - time.monotonic())
            if message is None and self._num_connections != connection:
                why = f"the connection to {self._endpoint} was lost before an answer came"
                raise ServiceError("unavailable", why)
            if message is None:
                break
            if message["type"] == "error" and not message.get("request_id"):
                raise ServiceError(message["code"], message["message"])
            if message["type"] == reply_kind:
                return {key: value for key, value in message.items() if key not in ("v", "type")}
            self._keep(message)
        raise ServiceError("unavailable", "the service does not answer")

    def _receive(self, request_id):
        """The next message of a request. While none comes, the service is asked for its status, so
        that one that died, or restarted and forgot the request, does not go unnoticed."""
        heard = time.monotonic()
        messages = self._messages[request_id]
        while not messages:
            message = self._next(_POLL_SECONDS)
            if message is not None:
                heard = time.monotonic()
                self._keep(message)
                if message["type"] == "status_reply":
                    self._check_known(message)
            elif time.monotonic() - heard > self._silence_timeout:
                self._asked_for = None  # the next request asks anew
                raise ServiceError("unavailable", "the service does not answer")
            elif self._asked_for is None and not messages:
                self._asked_for = set(self._running)
                self._send(wire.message("status"))
        message = messages.popleft()
        if message["type"] == "error":
            raise ServiceError(message["code"], message["message"])
        return message

    def _keep(self, message):
        """Keeps a message for the request that it is of; what is of none is dropped."""
        request_id = message.get("request_id")
        is_error = message["type"] == "error"
        if is_error and not request_id and len(self._running) == 1:
            (request_id,) = self._running  # it was no message to the service at all
        if request_id not in self._messages:
            return
        if is_error or message["type"] == "done":
            self._running.discard(request_id)
        self._messages[request_id].append(message)

    def _check_known(self, status):
        """A status comes behind all that was sent before it: of the requests that were running when
        it was asked for, and still are here, the service knows all, or it has been restarted."""
        asked_for, self._asked_for = self._asked_for or set(), None
        if len(asked_for & self._running) > status["requests_of_client"]:
            raise ServiceError("unavailable", "the service no longer knows the request")

    def _next(self, timeout):
        """The next message; None after `timeout`, or earlier where the connection was lost."""
        deadline = time.monotonic() + timeout
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._events, zmq.POLLIN)
        while True:
            lost = self._is_lost()  # first: what came before is here then
            if self._socket.poll(0):
                return wire.decode(self._socket.recv())
            left = deadline - time.monotonic()
            if lost:
                self._lose_connection()
            if lost or left <= 0:
                return None
            poller.poll(math.ceil(left * 1000))

    def _send(self, message):
        frame = wire.encode(message)
        if len(frame) > wire.MAX_FRAME_BYTES:
            raise ServiceError(
                "invalid_argument",
                f"the request has {len(frame)} bytes; the service takes {wire.MAX_FRAME_BYTES}",
            )
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            raise ServiceError("unavailable", "the connection's queue is full") from None


def _piece(message):
    tokens = message["tokens"]
    return Piece(
        ids=[token["id"] for token in tokens],
        logprobs=[token["logprob"] for token in tokens],
        text=message["text"],
    )


def _answer(message):
    return Answer(
        text=message["text"],
        ids=[token["id"] for token in message["tokens"]],
        tokens=message["tokens"],
        prompt_ids=message["prompt_ids"],
        finish_reason=message["finish_reason"],
        usage=message["usage"],
        kv=message["kv"],
        timing=message["timing"],
    )


def _read_keys(path):
    if os.stat(path).st_mode & 0o077:
        raise PermissionError(f"others can read the key file {path}; run: chmod 600 {path}")
    with open(path, encoding="utf-8") as file:
        keys = json.load(file)
    for name in ("server_public_key", "public_key", "secret_key"):
        if not isinstance(keys.get(name), str) or len(keys[name]) != 40:
            raise ValueError(f"key file {path}: {name} is not a CURVE key of 40 characters")
    return keys
