"""The Python client against a service that is played: what it makes of each answer, in each order."""

import collections
import threading
import time

import pytest
import zmq
from foretoken import wire
from foretoken.client import Client, ServiceError


class PlayedService:
    """Gives each frame's answers at once: play(message) returns them, as maps without version."""

    def __init__(self, folder, play, endpoint=None):
        self.frames = collections.Counter()  # by type
        self._play = play
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = wire.MAX_FRAME_BYTES
        self._socket.bind(endpoint or f"ipc://{folder}/service")
        self.endpoint = self._socket.last_endpoint.decode()
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


@pytest.mark.parametrize("endpoint", [None, "tcp://127.0.0.1:*"])
def test_a_lost_connection_ends_at_once_what_runs(tmp_path, endpoint):
    with PlayedService(tmp_path, lambda message: [token(message["request_id"], 1)], endpoint) as service:
        client = Client(service.endpoint)
        streams = [client.stream("x"), client.stream("y")]
        assert [next(stream).ids for stream in streams] == [[1], [1]]
    begin = time.monotonic()
    for stream in streams:
        with pytest.raises(ServiceError, match="was lost, and the request with it") as failure:
            next(stream)
        assert failure.value.code == "unavailable"
    assert time.monotonic() - begin < 2
    with PlayedService(tmp_path, lambda message: [done(message["request_id"], [7])], service.endpoint) as anew:
        assert client.generate("z").ids == [7]
        assert anew.frames == {"generate": 1}
        client.close()


def test_what_came_before_a_loss_is_read(tmp_path):
    def play(message):
        name = message["request_id"]
        return [token(name, 1), token(name, 2), done(name, [1, 2])]

    with PlayedService(tmp_path, play) as service:
        client = Client(service.endpoint)
        stream = client.stream("x")
        assert next(stream).ids == [1]
    time.sleep(0.2)
    assert read(stream) == ([2], [1, 2])
    client.close()


def test_a_loss_before_a_request_costs_it_nothing(tmp_path):
    with PlayedService(tmp_path, lambda message: [done(message["request_id"], [1])]) as service:
        client = Client(service.endpoint)
        assert client.generate("x").ids == [1]
    with PlayedService(tmp_path, lambda message: [done(message["request_id"], [2])]):
        time.sleep(0.5)  # the old socket has connected again by then
        assert client.generate("y").ids == [2]
        client.close()


def test_a_question_ends_with_its_connection(tmp_path):
    asked = threading.Event()
    with PlayedService(tmp_path, lambda message: asked.set() or []) as service:
        client = Client(service.endpoint)
        end = threading.Thread(target=lambda: asked.wait(10) and service.__exit__())
        end.start()
        with pytest.raises(ServiceError, match="lost before an answer came") as failure:
            client.status()
        end.join()
    assert failure.value.code == "unavailable"
    client.close()


def test_a_connection_that_never_came_to_be_takes_the_time_of_silence(tmp_path):
    begin = time.monotonic()
    with Client(f"ipc://{tmp_path}/nobody", silence_timeout=1.2) as client:
        with pytest.raises(ServiceError, match="does not answer"):
            client.generate("x")
    assert time.monotonic() - begin > 1.2
