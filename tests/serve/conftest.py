"""A server of a tiny release in this process, whose worker a test can hold."""

import http.client
import json
import threading

import pytest
import tiny_run
import torch

from dalle_dist import Generator
from dalle_dist.checkpoint.release import save_release
from dalle_dist.config import from_dict, to_dict
from dalle_dist.serve import worker
from dalle_dist.serve.app import application
from dalle_dist.serve.limits import Limits
from dalle_dist.serve.line import Line
from dalle_dist.serve.server import EndingServer, listen, uvicorn_config
from dalle_dist.transformer.model import Transformer


@pytest.fixture(scope="session")
def release(tmp_path_factory) -> str:
    """Folder of a release with random weights: 8 x 8 pixels, 4 x 4 tokens."""
    folder = tmp_path_factory.mktemp("served")
    tree = to_dict(tiny_run.make(folder))
    config = from_dict(tree | {"sampling": {"temperature": 0.9}})
    torch.manual_seed(3)
    shapes = Transformer(config).state_dict()
    weights = {name: 0.3 * torch.randn(shape.shape) for name, shape in shapes.items()}
    dvae = f"{config.paths.dvae_run}/release"
    save_release(str(folder / "release"), config, weights, config.paths.tokenizer, dvae)
    return str(folder / "release")


@pytest.fixture(scope="session")
def generator(release):
    return Generator.load(release, device="cpu")


class Served:
    """The server, and a client of it.

    gate     cleared: the worker stops before its next batch
    batches  prompts of the batches that the worker began
    """

    def __init__(self, release: str, generator: Generator, limits: Limits, host: str):
        self.gate, self.batches = threading.Event(), list[str]()
        self.gate.set()
        held = Generator(
            generator.model, generator.tokenizer, generator.image_tokenizer, generator.config,
            generator.fingerprint,
        )  # fmt: skip
        codes = held.codes

        def hold(wanted, settings):
            self.batches.append(wanted[0][0])
            assert self.gate.wait(30)
            return codes(wanted, settings)

        held.codes = hold
        self.line = Line(limits.waiting)
        self.listening = listen("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        app = application(held, self.line, limits, release, host)
        self.worker = worker.start(held, self.line)
        self.server = EndingServer(uvicorn_config(app, limits.waiting), self.line)
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],))
        self.thread.start()

    def stop(self):
        self.server.should_exit = True
        self.gate.set()
        self.thread.join(10)
        self.worker.join(10)
        self.listening.close()
        assert not self.thread.is_alive() and not self.worker.is_alive()

    def ask(self, method="POST", path="/api/images", body=b"", headers=None):
        """(connection, answer) with the body of the answer unread."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        return connection, connection.getresponse()

    def refusal(self, body, **options):
        """(status, sentence); the sentence is one line."""
        connection, answer = self.ask(body=body, **options)
        sentence = json.loads(answer.read())["error"]
        connection.close()
        assert sentence and "\n" not in sentence and "Traceback" not in sentence
        return answer.status, sentence

    def events(self, body):
        connection, answer = self.ask(body=body)
        assert answer.status == 200
        events = [json.loads(line) for line in answer.read().splitlines() if line]
        connection.close()
        return events


@pytest.fixture
def serve(release, generator):
    """serve(images=2, host="name"): a server with these limits, called by this name too."""
    started = []

    def make(host="127.0.0.1", **limits):
        started.append(Served(release, generator, Limits(**limits), host))
        return started[-1]

    yield make
    for served in started:
        served.stop()


@pytest.fixture
def served(serve):
    return serve()


@pytest.fixture(scope="module")
def shared(release, generator):
    """One server for tests that do not hold its worker."""
    served = Served(release, generator, Limits(), "127.0.0.1")
    yield served
    served.stop()
