from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from bezel.runtime import Message, Model, Sampling
from bezel.runtime.arrays import Floats, Ints
from bezel.runtime.errors import BezelError, ContextFull, InvalidRequest
from bezel.runtime.text.conversation import Conversation, keep_prompt
from bezel.runtime.text.generation import Generation

ModelOf = Callable[..., Model]
GREEDY = Sampling(temperature=0)


@pytest.fixture
def model(model_of: ModelOf) -> Model:
    return model_of("demo", "q8_0")


def test_same_seed_same_text(model: Model) -> None:
    texts = ["".join(model.generate("A king", max_tokens=20, sampling=Sampling(seed=s), raw=True)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_file_says_how_to_sample(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = "".join(model.generate("A king", max_tokens=20, sampling=GREEDY, raw=True))
    assert {"".join(model.generate("A king", max_tokens=20, raw=True)) for _ in range(3)} != {greedy}
    monkeypatch.setattr(model.file, "metadata", {**model.file.metadata, "general.sampling.temp": 0.0})
    assert {"".join(model.generate("A king", max_tokens=20, raw=True)) for _ in range(3)} == {greedy}


def test_logits_that_are_not_finite_are_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session()
    forward = session.engine.forward

    def damaged(ids: Ints, wanted: int, **_named: object) -> Floats:
        logits = forward(ids, wanted)
        logits[-1:, 7] = np.nan
        return logits

    monkeypatch.setattr(session.engine, "forward", damaged)
    with pytest.raises(BezelError, match="after 3 tokens the model gives logits that are not finite"):
        list(Generation(session, [2, 100, 200], GREEDY))


def test_pieces_add_up_and_ids_are_told(model: Model) -> None:
    generation = model.generate("Once upon a time", max_tokens=25, sampling=GREEDY, raw=True)
    text = "".join(generation)
    assert generation.finish == "length"
    assert len(generation.ids) == 25
    assert text == model.tokenizer.decode(generation.ids)


@pytest.mark.parametrize("hold_last", [False, True])
def test_the_last_token_costs_a_step_only_where_it_is_kept(hold_last: bool, model_of: ModelOf) -> None:
    model = model_of("demo", "q8_0", context=12)
    ids, session = model.prompt_ids("A king", raw=True), model.session()
    room = model.context - len(ids)
    generation = Generation(session, ids, GREEDY, max_tokens=room, stop_ids=frozenset(), hold_last=hold_last)
    list(generation)
    assert session.ids == [*ids, *generation.ids[: None if hold_last else -1]]
    assert (generation.finish, len(generation.ids), session.position) == ("length", room, len(session.ids))


def test_no_tokens_at_all(model: Model) -> None:
    generation = model.generate("A king", max_tokens=0, raw=True)
    assert (list(generation), generation.finish) == ([], "length")


def test_a_context_that_is_just_large_enough(model_of: ModelOf) -> None:
    """The last token needs no position."""
    model = model_of("demo", "q8_0", context=12)
    ids = model.prompt_ids("A king", raw=True)
    generation = Generation(model.session(), ids, GREEDY, max_tokens=13 - len(ids), stop_ids=frozenset())
    list(generation)
    assert generation.finish == "length"


def test_stop_string_never_shows(model: Model) -> None:
    whole = "".join(model.generate("Once upon a time", max_tokens=40, sampling=GREEDY, raw=True))
    stop = whole[30:36]
    generation = model.generate("Once upon a time", max_tokens=40, sampling=GREEDY, raw=True, stop=["\0", stop])
    pieces = list(generation)
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert generation.finish == "stop"
    assert all(pieces)


def test_text_held_back_for_a_stop_string_comes_in_the_end(model: Model) -> None:
    whole = "".join(model.generate("Once upon a time", max_tokens=10, sampling=GREEDY, raw=True))
    stop = whole[-3:] + "\0"  # begins, and never completes
    assert "".join(model.generate("Once upon a time", max_tokens=10, sampling=GREEDY, raw=True, stop=[stop])) == whole


def test_a_character_that_is_cut_short_comes_in_the_end(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    half = next(i for i in range(model.tokenizer.vocab_size) if model.tokenizer.piece(i) == "<0xC3>")
    drawn = iter([300, half, 1])
    monkeypatch.setattr("bezel.runtime.text.sampling.Sampler.__call__", lambda *_: next(drawn))
    assert "".join(model.generate("A king", raw=True)) == model.tokenizer.decode([300]) + "\N{REPLACEMENT CHARACTER}"


def test_the_repetition_penalty_is_for_what_was_read_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def draw(_sampler: object, _logits: Floats, ids: list[int], *_: object) -> int:
        seen.append(list(ids))
        return 300

    monkeypatch.setattr("bezel.runtime.text.sampling.Sampler.__call__", draw)
    list(model.generate([2, 100], max_tokens=2))
    assert seen == [[2, 100], [2, 100, 300]]


def test_stop_token(model: Model) -> None:
    ids = model.prompt_ids("Once upon a time", raw=True)
    free = Generation(model.session(), ids, GREEDY, max_tokens=12, stop_ids=frozenset())
    list(free)
    third = free.ids[2]
    first = free.ids.index(third)
    generation = Generation(model.session(), ids, GREEDY, max_tokens=12, stop_ids=frozenset([third]))
    list(generation)
    assert (generation.finish, generation.ids) == ("stop", free.ids[:first])


def test_cancel(model: Model) -> None:
    calls = iter([False] * 5 + [True] * 99)
    generation = model.generate("A king", sampling=GREEDY, raw=True, cancel=lambda: next(calls))
    assert list(generation)
    assert generation.finish == "cancelled"
    assert len(generation.ids) == 5


def test_chat_models_chat_by_default(model: Model) -> None:
    raw = model.prompt_ids("Hello", raw=True)
    assert raw == model.tokenizer.encode("Hello", bos=True)
    asked = model.prompt_ids("Hello")
    assert asked == model.prompt_ids([Message("user", "Hello")])
    assert asked.count(model.tokenizer.bos_id) == 1
    assert model.prompt_ids(raw) == raw


def test_messages_may_be_mappings(model: Model) -> None:
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A story."}]
    assert model.prompt_ids(told) == model.prompt_ids([Message("system", "Be brief."), Message("user", "A story.")])
    for bad in ({"role": "user"}, {"role": "user", "content": "A", "name": "x"}, {"role": "user", "content": 5}):
        with pytest.raises(InvalidRequest, match="message: "):
            model.prompt_ids([bad])


def test_a_conversation_of_a_model(model: Model) -> None:
    talk = model.conversation("Be brief.")
    first, second = ("".join(talk.ask(text, GREEDY, max_tokens=8)) for text in ("One story.", "Another one."))
    told = talk.messages()
    assert [(m.role, m.text) for m in told] == [
        ("system", "Be brief."),
        ("user", "One story."),
        ("model", first),
        ("user", "Another one."),
        ("model", second),
    ]
    assert talk.last_message() == "Another one."
    talk.undo()
    assert talk.last_message() == "One story."
    assert repr(model) == (
        f"<Model {model.name}: gemma2, 4 layers, context 2048, {model.runs_on}, {model.kv} keys and values>"
    )
    assert repr(talk.session).endswith(f": {talk.session.position} tokens>")


def test_stop_ids_come_from_the_file(model: Model) -> None:
    assert model.stop_ids == {1, 5}


class TestFullContext:
    def test_error(self, model_of: ModelOf) -> None:
        generation = model_of("demo", "q8_0", context=30).generate("A king", sampling=GREEDY, raw=True)
        with pytest.raises(ContextFull, match="context of 30"):
            list(generation)

    def test_slide_keeps_the_prompt_and_says_so(self, model_of: ModelOf) -> None:
        model, said = model_of("demo", "q8_0", context=40), list[str]()
        ids = model.prompt_ids("A king", raw=True)
        session = model.session()
        generation = Generation(
            session,
            ids,
            GREEDY,
            max_tokens=100,
            stop_ids=frozenset(),
            make_room=keep_prompt(len(ids), model, said.append),
        )
        list(generation)
        assert len(generation.ids) == 100
        assert session.ids[: len(ids)] == ids
        assert session.ids[len(ids) :] == generation.ids[-(len(session.ids) - len(ids)) - 1 : -1]
        assert said
        assert all("dropped 10 tokens" in line for line in said)

    def test_slide_cannot_drop_the_prompt(self, model_of: ModelOf) -> None:
        model = model_of("demo", "q8_0", context=40)
        ids = [2] + [300] * 38
        generation = Generation(
            model.session(), ids, GREEDY, stop_ids=frozenset(), make_room=keep_prompt(len(ids), model, print)
        )
        with pytest.raises(ContextFull, match="the prompt's 39 tokens"):
            list(generation)


class TestConversation:
    def test_ids_are_those_of_the_whole_chat(self, model: Model) -> None:
        from bezel.runtime.text import chat

        conversation = Conversation(model, "Be brief.", False, print)
        replies = ["".join(conversation.ask(t, GREEDY, max_tokens=8)) for t in ("One story.", "Another one.")]
        messages = [Message("system", "Be brief."), Message("user", "One story."), Message("model", replies[0])]
        rendered = chat.render(model.tokenizer, [*messages, Message("user", "Another one.")])
        assert conversation.session.ids[: len(rendered)] == rendered
        assert conversation.turns() == 2

    def test_undo(self, model: Model) -> None:
        conversation = Conversation(model, None, False, print)
        list(conversation.ask("One story.", GREEDY, max_tokens=8))
        after_one = list(conversation.session.ids)
        list(conversation.ask("Another one.", GREEDY, max_tokens=8))
        conversation.undo()
        assert conversation.session.ids == after_one
        conversation.undo()
        assert conversation.session.ids == []
        with pytest.raises(InvalidRequest, match="nothing to undo"):
            conversation.undo()

    @pytest.mark.parametrize("system", [None, "Be brief."])
    def test_slide_drops_the_oldest_exchanges(self, system: str | None, model_of: ModelOf) -> None:
        """What is left are whole exchanges, as if the chat had begun with the first of them."""
        said: list[str] = []
        model = model_of("demo", "q8_0", context=100)
        conversation = Conversation(model, system, True, said.append)
        exchanges: list[tuple[str, list[int]]] = []
        for i in range(12):
            text, before = f"Story number {i}. " * (1 + i % 2), len(said)
            reply = conversation.ask(text, GREEDY, max_tokens=30)
            list(reply)
            exchanges.append((text, reply.ids))
            fresh, possible = Conversation(model, system, False, print), []
            for first in range(len(exchanges)):
                fresh.session.ids, ids = [], list[int]()
                for asked, answered in exchanges[first:]:
                    ids += [*fresh.prompt_ids(asked), *answered]
                    fresh.session.ids = ids
                possible.append(ids)
            assert conversation.session.ids in possible
            if len(said) > before:  # three quarters are kept at most
                assert len(conversation.session.ids) <= 75 + len(reply.ids)
        assert said
        assert "dropped the oldest" in said[0]

    def test_no_slide_unless_asked_for(self, model_of: ModelOf) -> None:
        conversation = Conversation(model_of("demo", "q8_0", context=34), None, False, print)
        list(conversation.ask("A story.", GREEDY, max_tokens=10))
        with pytest.raises(ContextFull, match=r"tokens do not fit: the context of 34 has \d+ positions left"):
            list(conversation.ask("Another.", GREEDY, max_tokens=10))
        conversation.session.feed([300] * (34 - conversation.session.position))
        with pytest.raises(ContextFull, match=r"1 more token does not fit: the context of 34 is full"):
            conversation.session.step(300)

    @pytest.mark.parametrize("slide", [False, True])
    def test_a_turn_that_is_cancelled_while_it_is_read_leaves_the_chat(self, slide: bool, model_of: ModelOf) -> None:
        model, said = model_of("demo", "q8_0", context=120 if slide else 300, engine="native"), list[str]()
        conversation = Conversation(model, None, slide, said.append)
        for i in range(3):
            list(conversation.ask(f"Story number {i}.", GREEDY, max_tokens=10))
        before = list(conversation.session.ids)
        long = "Tell it all again. " * 12
        assert len(conversation.prompt_ids(long)) > conversation.session.engine.chunk
        asked = iter([False, True])
        reply = conversation.ask(long, GREEDY, cancel=lambda: next(asked))
        assert (list(reply), reply.finish, reply.prompt_read) == ([], "cancelled", False)
        assert bool(said) == slide
        assert (conversation.session.ids, conversation.session.position) == (before, len(before))
        other = model.session()
        other.prefill(before)
        assert np.array_equal(other.step(7), conversation.session.step(7))

    @pytest.mark.parametrize("slide", [False, True])
    def test_what_does_not_fit_leaves_the_chat(self, slide: bool, model_of: ModelOf) -> None:
        conversation = Conversation(model_of("demo", "q8_0", context=60), None, slide, print)
        list(conversation.ask("A story.", GREEDY, max_tokens=4))
        before = list(conversation.session.ids)
        with pytest.raises(ContextFull):
            list(conversation.ask("A very long story. " * 20, GREEDY))
        assert (conversation.session.ids, conversation.turns()) == (before, 1)

    def test_a_turn_that_the_model_opens_ends_its_own(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        conversation = Conversation(model, None, False, print)
        start = model.tokenizer.start_of_turn_id
        drawn = iter([300, start, 301])
        monkeypatch.setattr("bezel.runtime.text.sampling.Sampler.__call__", lambda *_: next(drawn))
        reply = conversation.ask("A story.", GREEDY)
        list(reply)
        assert (reply.ids, reply.finish, conversation.turns()) == ([300], "stop", 1)
        conversation.session.step(start)
        assert conversation.turns() == 1

    def test_one_exchange_too_long_is_an_error(self, model_of: ModelOf) -> None:
        conversation = Conversation(model_of("demo", "q8_0", context=40), None, True, print)
        with pytest.raises(ContextFull, match="this exchange alone"):
            list(conversation.ask("A very long story. " * 10, GREEDY))
