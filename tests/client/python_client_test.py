"""The Python client against a service that is played: what it makes of each answer, in each order."""

import collections
import threading

import pytest
import zmq
from foretoken import wire
from foretoken.client import Client, ServiceError


class PlayedService:
    """Gives each frame's answers at once: play(message) returns them, as maps without version."""

    def __init__(self, folder, play):
        self.endpoint = f"ipc://{folder}/service"
        self.frames = collections.Counter()  # by type
        self._play = play
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = wire.MAX_FRAME_BYTES
        self._socket.bind(self.endpoint)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._over.is_set():
            if not self._socket.poll(10):
                continue
            peer, frame = self._socket.recv_multipart()
            message = wire.decode(frame)
            self.frames[message["type"]] += 1
            for answer in self._play(message):
                self._socket.send_multipart([peer, wire.encode({"v": wire.VERSION, **answer})])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        self._socket.close()
        self._context.term()


def token(request_id, number):
    tokens = [{"id": number, "logprob": 0.0}]
    return {"type": "token", "request_id": request_id, "tokens": tokens, "text": str(number)}


def done(request_id, numbers):
    answer = {"type": "done", "request_id": request_id, "finish_reason": "length", "usage": {}}
    answer |= {"text": "", "tokens": [{"id": n} for n in numbers], "prompt_ids": [], "kv": {}, "timing": {}}
    return answer


def error(request_id, code):
    return {"type": "error", "request_id": request_id, "code": code, "message": "why"}


def status(requests_of_client):
    return {"type": "status_reply", "state": "ready", "requests_of_client": requests_of_client}


def read(stream):
    """The ids that a stream still has, and those of its answer."""
    ids = []
    try:
        while True:
            ids += next(stream).ids
    except StopIteration as end:
        return ids, end.value.ids


def test_a_request_that_the_service_could_not_read_is_told_at_once(tmp_path):
    with PlayedService(tmp_path, lambda message: [error("", "corrupt")]) as service:
        with Client(service.endpoint) as client:
            with pytest.raises(ServiceError) as failure:
                client.generate([1, 2], max_tokens=64.0)
            assert failure.value.code == "corrupt"
            assert service.frames == {"generate": 1}


def test_a_request_that_is_too_large_is_not_sent(tmp_path):
    with PlayedService(tmp_path, lambda message: [status(0)]) as service:
        with Client(service.endpoint) as client:
            with pytest.raises(ServiceError) as failure:
                client.generate("x" * (5 << 20))
            assert failure.value.code == "invalid_argument"
            assert client.status()["state"] == "ready"
            assert service.frames == {"status": 1}


def test_a_question_meanwhile_costs_a_stream_nothing(tmp_path):
    names = []

    def play(message):
        if message["type"] == "generate":
            names.append(message["request_id"])
            return [token(names[0], 1)]
        return [token(names[0], 2), done(names[0], [1, 2]), status(0)]

    with PlayedService(tmp_path, play) as service:
        with Client(service.endpoint) as client:
            stream = client.stream("x")
            assert next(stream).ids == [1]
            assert client.status()["requests_of_client"] == 0
            assert read(stream) == ([2], [1, 2])


def test_streams_are_read_in_turn(tmp_path):
    names = []

    def play(message):
        names.append(message["request_id"])
        if len(names) == 1:
            return [token(names[0], 1)]
        first, second = names
        both = [token(second, 5), token(first, 2), token(second, 6), done(first, [1, 2])]
        return [*both, done(second, [5, 6])]

    with PlayedService(tmp_path, play) as service:
        with Client(service.endpoint) as client:
            first, second = client.stream("x"), client.stream("y")
            assert next(first).ids == [1]
            assert next(second).ids == [5]
            assert read(first) == ([2], [1, 2])
            assert read(second) == ([6], [5, 6])
            assert service.frames == {"generate": 2}


def test_an_error_ends_its_own_stream_alone(tmp_path):
    names = []

    def play(message):
        names.append(message["request_id"])
        if len(names) == 1:
            return [token(names[0], 1)]
        return [token(names[0], 2), done(names[0], [1, 2]), error(names[1], "timeout")]

    with PlayedService(tmp_path, play) as service:
        with Client(service.endpoint) as client:
            first = client.stream("x")
            assert next(first).ids == [1]
            with pytest.raises(ServiceError) as failure:
                client.generate("y")
            assert failure.value.code == "timeout"
            assert read(first) == ([2], [1, 2])


def test_a_stream_that_is_left_is_cancelled_and_forgotten(tmp_path):
    names = []

    def play(message):
        if message["type"] == "generate":
            names.append(message["request_id"])
            return [token(names[-1], len(names))]
        return [done(names[0], [1]), done(names[1], [2])]

    with PlayedService(tmp_path, play) as service:
        with Client(service.endpoint) as client:
            left, read_on = client.stream("x"), client.stream("y")
            assert next(left).ids == [1]
            assert next(read_on).ids == [2]
            left.close()
            assert read(read_on) == ([], [2])
            assert service.frames == {"generate": 2, "cancel": 1}


def test_a_stream_may_outlive_its_client(tmp_path):
    with PlayedService(tmp_path, lambda message: [token(message["request_id"], 1)]) as service:
        with Client(service.endpoint) as client:
            stream = client.stream("x")
            assert next(stream).ids == [1]
        stream.close()


@pytest.mark.parametrize("known", [0, 1])
def test_a_service_that_was_restarted_no_longer_knows_its_requests(tmp_path, known):
    names = []

    def play(message):
        if message["type"] == "status":
            return [status(known), *([done(names[0], [])] if known else [])]
        names.append(message.get("request_id"))
        return []

    with PlayedService(tmp_path, play) as service:
        with Client(service.endpoint) as client:
            if known:
                assert client.generate("x").ids == []
            else:
                with pytest.raises(ServiceError, match="no longer knows"):
                    client.generate("x")
