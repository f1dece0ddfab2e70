"""Client: one connection to a Foretoken service.

    with Client("tcp://127.0.0.1:8000", "client.key") as client:
        for piece in client.stream("Once upon a time", max_tokens=64):
            print(piece.text, end="", flush=True)
        answer = client.generate([1, 2, 3], temperature=0)
        print(answer.text, answer.kv)

A Client belongs to one thread; threads that generate at once take one each. Errors from the
service raise ServiceError with its code; a service that is gone raises ServiceError("unavailable").
"""

import collections
import dataclasses
import json
import os
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
        self._silence_timeout = silence_timeout
        self._messages = {}  # of each request that somebody reads: those not read yet
        self._running = set()  # requests whose last message has not come
        self._asked_for = None  # those of them when the status was asked for that is still awaited
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        if key_file is not None:
            keys = _read_keys(key_file)
            self._socket.curve_serverkey = keys["server_public_key"].encode()
            self._socket.curve_publickey = keys["public_key"].encode()
            self._socket.curve_secretkey = keys["secret_key"].encode()
        self._socket.connect(endpoint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._running.clear()  # the service cancels them when the connection ends
        self._socket.close()
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

    def _submit(self, prompt, **options):
        request_id = str(uuid.uuid4())
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
        self._send(wire.message(kind))
        deadline = time.monotonic() + self._silence_timeout
        while time.monotonic() < deadline:
            message = self._next(deadline - time.monotonic())
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
            elif self._asked_for is None:
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
        if not self._socket.poll(max(0, int(timeout * 1000))):
            return None
        return wire.decode(self._socket.recv())

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
