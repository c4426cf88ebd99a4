"""Many answers at once are the answers that each request would get alone."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from bezel.runtime import Message, Model, Sampling
from bezel.runtime.serve import scheduler as module
from bezel.runtime.serve.prefixes import Prefixes, common
from bezel.runtime.serve.scheduler import Scheduler
from bezel.runtime.serve.tasks import Task
from bezel.runtime.text.generation import Constraint, Writer
from bezel.runtime.text.sampling import Sampler

ModelOf = Callable[..., Model]
SYSTEM = "Tell stories as a grandmother would, slowly, with every detail of the weather, of the house and of the food. "


class Client:
    """One request: collects what it is told."""

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        sampling: Sampling,
        max_tokens: int,
        constraint: Constraint | None = None,
        following: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.pieces: list[str] = []
        self.done = threading.Event()
        self.cancel_after: int | None = None
        writer = Writer(model.tokenizer, sampling, model.stop_ids, max_tokens=max_tokens, constraint=constraint)
        self.task = Task(prompt, writer, self._tell, following=following)

    def _tell(self, text: str | None) -> None:
        if text is None:
            self.done.set()
            return
        self.pieces.append(text)
        if self.cancel_after is not None and len(self.pieces) >= self.cancel_after:
            self.task.cancelled = True

    def answer(self) -> str:
        assert self.done.wait(60)
        if self.task.error:
            raise self.task.error
        return "".join(self.pieces)


@pytest.fixture
def model(model_of: ModelOf) -> Model:
    return model_of("demo", "q4_0", engine="native", kv="int8", threads=2)


@pytest.fixture
def scheduler(model: Model) -> Iterator[Scheduler]:
    made = Scheduler(model, 8, 64 << 20)
    yield made
    made.close()


def alone(model: Model, prompt: list[int], sampling: Sampling, max_tokens: int) -> str:
    return "".join(model.generate(prompt, sampling=sampling, max_tokens=max_tokens))


def test_an_answer_among_others_is_the_same(model: Model, scheduler: Scheduler) -> None:
    """32 requests at random times, of which some begin alike, some go on from others, and some are cancelled."""
    draw = random.Random(3)
    requests = []
    for i in range(32):
        words = f"{SYSTEM * draw.choice([0, 1, 3, 6])}Tell me a story about a {draw.choice(['king', 'fox'])} and {i}."
        prompt = model.prompt_ids([Message("user", words)])
        if i % 5 == 4:
            prompt = list(requests[draw.randrange(i)][0])
        sampling = Sampling(seed=i, temperature=draw.choice([0, 1.0]), repetition_penalty=draw.choice([1, 1.1]))
        requests.append((prompt, sampling, draw.choice([3, 20, 60])))
    clients = []
    for prompt, sampling, max_tokens in requests:
        client = Client(model, prompt, sampling, max_tokens)
        if draw.random() < 0.2:
            client.cancel_after = draw.randrange(1, 5)
        scheduler.submit(client.task)
        clients.append(client)
        time.sleep(draw.random() * 0.02)
    answers = [client.answer() for client in clients]
    for i, (client, answer, (prompt, sampling, max_tokens)) in enumerate(zip(clients, answers, requests, strict=True)):
        expected = alone(model, prompt, sampling, max_tokens)
        if client.task.writer.finish == "cancelled":
            assert expected.startswith(answer.rstrip("\N{REPLACEMENT CHARACTER}")), i
        else:
            assert answer == expected, i
    assert scheduler.counts.cached_tokens > 500
    assert scheduler.load == (0, 0)


def test_a_prompt_that_ends_beside_one_that_does_not(model: Model, scheduler: Scheduler) -> None:
    """In the same pass, behind it: each has its own logits."""
    prompts = [model.prompt_ids(text) for text in ("A song. " * 60, "A story.")]
    clients = [Client(model, prompt, Sampling(temperature=0), 12) for prompt in prompts]
    with scheduler._changed:  # both are there when it looks
        for client in clients:
            scheduler.submit(client.task)
    for client, prompt in zip(clients, prompts, strict=True):
        assert client.answer() == alone(model, prompt, Sampling(temperature=0), 12)


def test_an_answer_by_a_grammar(model: Model, scheduler: Scheduler) -> None:
    """What is forced goes through the model, too."""
    grammar, prompt = model.grammars.regex("The fox and the miller said: [a-z ]{30}"), model.prompt_ids("A story.")
    expected = "".join(model.generate(prompt, sampling=Sampling(seed=1), grammar=grammar, max_tokens=60))
    client = Client(model, prompt, Sampling(seed=1), 60, grammar.constraint())
    scheduler.submit(client.task)
    assert client.answer() == expected


def test_a_turn_costs_the_turn(model: Model, scheduler: Scheduler) -> None:
    messages = [Message("user", SYSTEM * 4)]
    for turn in range(4):
        prompt = model.prompt_ids(messages)
        client = Client(model, prompt, Sampling(temperature=0), 12)
        scheduler.submit(client.task)
        answer = client.answer()
        assert answer == alone(model, prompt, Sampling(temperature=0), 12)
        if turn:  # all but what is new, and what the text of the answer is not cut into again as it was
            assert client.task.figures.cached_tokens > len(model.prompt_ids(messages[:-2])) - 1
        messages += [Message("model", answer), Message("user", "And then?")]


@pytest.mark.parametrize("is_read_ahead", [True, False])
def test_an_answer_that_is_cut_otherwise_the_next_time(is_read_ahead: bool, model: Model, scheduler: Scheduler) -> None:
    """Its ids are not those that it was made of, and that far back the rings do not reach. It is read while there is
    nothing to do, or else the next turn goes on from where the answer began.
    """
    sampling, told = Sampling(seed=1, temperature=2.0), [Message("user", SYSTEM * 3)]

    def next_prompt(answer: str) -> list[int]:
        return model.prompt_ids([*told, Message("model", answer), Message("user", "And then?")])

    prompt = model.prompt_ids(told)
    client = Client(model, prompt, sampling, 300, following=next_prompt if is_read_ahead else None)
    scheduler.submit(client.task)
    answer = client.answer()
    following = next_prompt(answer)
    held, wanted = np.array(client.task.held), np.array(following[:-1])
    assert common(held, wanted) < len(held) - 100
    until = time.monotonic() + 20
    while is_read_ahead and max(common(kept.ids, wanted) for kept in scheduler.prefixes) < len(wanted):
        assert time.monotonic() < until
        time.sleep(0.01)
    client = Client(model, following, sampling, 20)
    scheduler.submit(client.task)
    assert client.answer() == alone(model, following, sampling, 20)
    turn = len(prompt) - prompt[::-1].index(model.tokenizer.start_of_turn_id) - 1
    expected = len(wanted) if is_read_ahead else turn
    assert client.task.figures.cached_tokens >= expected


def test_an_edit_goes_on_from_the_nearest_turn(model: Model, scheduler: Scheduler) -> None:
    """Far past the window, where rings no longer reach back: from what was kept when they let go of it."""
    told = [Message("user", SYSTEM * 3), Message("model", "Once upon a time."), Message("user", SYSTEM * 8)]
    for end in ("And then?", "And before?"):
        messages = [*told, Message("model", "Snow fell."), Message("user", end * 1)]
        prompt = model.prompt_ids(messages)
        client = Client(model, prompt, Sampling(temperature=0), 8)
        scheduler.submit(client.task)
        assert client.answer() == alone(model, prompt, Sampling(temperature=0), 8)
    assert client.task.figures.cached_tokens >= len(model.prompt_ids(told)) - 4
    edited = model.prompt_ids([*told[:2], Message("user", "Something else. " * 3)])
    client = Client(model, edited, Sampling(temperature=0), 8)
    scheduler.submit(client.task)
    assert client.answer() == alone(model, edited, Sampling(temperature=0), 8)
    assert client.task.figures.cached_tokens >= len(model.prompt_ids(told[:1])) - 4


def test_the_same_prompt_is_read_once(model: Model, scheduler: Scheduler) -> None:
    prompt = model.prompt_ids([Message("user", SYSTEM * 8)])
    clients = [Client(model, prompt, Sampling(seed=i), 12) for i in range(4)]
    for client in clients:
        scheduler.submit(client.task)
    for i, client in enumerate(clients):
        assert client.answer() == alone(model, prompt, Sampling(seed=i), 12)
    assert [client.task.figures.cached_tokens for client in clients] == [0, *[len(prompt) - 1] * 3]


def test_the_context_ends_an_answer(model_of: ModelOf) -> None:
    model = model_of("demo", "q4_0", engine="native", context=40)
    scheduler = Scheduler(model, 2, 1 << 20)
    client = Client(model, model.tokenizer.encode("A king", bos=True), Sampling(temperature=0), 1000)
    client.task.writer._stop_ids = frozenset()
    scheduler.submit(client.task)
    client.answer()
    assert (client.task.writer.finish, len(client.task.held)) == ("length", 40)
    scheduler.close()


def test_what_was_read_in_an_earlier_run(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    prompt = model.prompt_ids([Message("user", SYSTEM * 4)])
    expected = alone(model, prompt, Sampling(temperature=0), 8)

    def cached() -> int:
        scheduler = Scheduler(model, 2, 64 << 20, folder)
        client = Client(model, prompt, Sampling(temperature=0), 8)
        scheduler.submit(client.task)
        assert client.answer() == expected
        scheduler.close()
        return client.task.figures.cached_tokens

    assert [cached(), cached()] == [0, len(prompt) - 1]
    whole = {file: file.read_bytes() for file in folder.iterdir()}
    damages: list[Callable[[bytes], bytes]] = [
        lambda x: x[:-100],
        lambda x: x[:200],
        lambda _: b"",
        lambda x: x[:20] + b"??" + x[22:],
        lambda x: x[:-1] + bytes([x[-1] ^ 1]),
    ]
    for damage in damages:
        for file, data in whole.items():
            file.write_bytes(damage(data))
        assert [cached(), cached()] == [0, len(prompt) - 1]  # it is written anew


def test_a_folder_that_was_emptied_meanwhile(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST_SECONDS", 0.05)
    folder = tmp_path / "kept"

    def emptied() -> None:
        for file in folder.iterdir():
            file.unlink(missing_ok=True)

    def gone() -> None:
        while folder.exists():  # a rest that is being written meanwhile makes it anew
            shutil.rmtree(folder, ignore_errors=True)

    for remove in (emptied, gone):
        scheduler = Scheduler(model, 2, 64 << 20, folder)
        client = Client(model, model.prompt_ids(SYSTEM), Sampling(temperature=0), 4)
        scheduler.submit(client.task)
        client.answer()
        until = time.monotonic() + 20
        while scheduler._unsaved or not list(folder.glob("*.session")):
            assert time.monotonic() < until
            time.sleep(0.01)
        remove()
        scheduler.close()
        assert all(file.stat().st_size for file in folder.iterdir())
        assert list(folder.glob("*.session"))


def test_what_was_read_is_in_files_before_the_end(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REST_SECONDS", 0.05)
    scheduler = Scheduler(model, 2, 64 << 20, tmp_path / "kept")
    client = Client(model, model.prompt_ids([Message("user", SYSTEM * 4)]), Sampling(temperature=0), 8)
    scheduler.submit(client.task)
    client.answer()
    until = time.monotonic() + 20
    while not (found := list((tmp_path / "kept").glob("*.session"))):
        assert time.monotonic() < until
        time.sleep(0.01)
    before = [file.read_bytes() for file in found]
    scheduler.close()
    assert [file.read_bytes() for file in found] == before


def test_memory_for_what_was_read_has_a_limit(model: Model) -> None:
    scheduler = Scheduler(model, 2, 3 << 20)
    for i in range(12):
        client = Client(model, model.prompt_ids(f"{i} {SYSTEM}"), Sampling(temperature=0), 4)
        scheduler.submit(client.task)
        client.answer()
        assert scheduler.prefixes.nbytes <= 3 << 20
    assert 0 < len(scheduler.prefixes) < 12
    scheduler.close()


def test_what_goes_wrong_ends_one_answer_and_not_the_server(
    model: Model, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> str:
        client = Client(model, model.prompt_ids(SYSTEM), Sampling(temperature=0), 4)
        scheduler.submit(client.task)
        return client.answer()

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    expected = alone(model, model.prompt_ids(SYSTEM), Sampling(temperature=0), 4)
    for place in ("caches", "forward"):
        with monkeypatch.context() as patch:
            patch.setattr(type(model.backend), place, fail)
            scheduler.prefixes = Prefixes(1 << 20)
            with pytest.raises(MemoryError, match="no room"):
                ask()
        assert ask() == expected
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            ask()
    assert ask() == expected
