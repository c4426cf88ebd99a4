"""The model class for lm-evaluation-harness, run by the harness itself. Needs the `lm-eval` extra."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")

from bezel.bench.tasks.lm_eval_model import BezelLM  # noqa: E402
from bezel.bench.tasks.tasks import read_questions, run_tasks  # noqa: E402
from bezel.runtime.errors import InvalidRequest  # noqa: E402
from bezel.runtime.text.chat import Message  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

WORDS = ["wood", "a little old man", "castle of the dwarf", "to", "night", "her stepmother"]
EXACT = {"engine": "reference", "kv": "f32"}
OWN_TASK = """\
task: tales
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: {target}
{more}
"""


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture
def model(gguf_of: Callable[..., Path]) -> BezelLM:
    return BezelLM(str(gguf_of("demo")), **EXACT)


def harness(model: BezelLM, folder: Path, **task: str) -> dict[str, Any]:
    (folder / "tales.yaml").write_text(OWN_TASK.format(file=folder / "q.jsonl", **task))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=["tales"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    results: dict[str, Any] = found["results"]["tales"]
    return results


def test_the_harness_and_bezel_s_own_tasks_agree(
    model: BezelLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    random = np.random.default_rng(5)
    questions = []
    for opening in ("Once upon a time", "The king said:", "She went into the", "Then came the wolf and") * 5:
        choices = random.permutation(WORDS)[:4].tolist()
        questions.append({"query": opening, "choices": choices, "gold": int(random.integers(4))})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    more = "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
    theirs = harness(model, tmp_path, kind="multiple_choice", text="{{query}}", target="gold", more=more)
    ours = run_tasks(read_questions(tmp_path / "q.jsonl"), {"demo": model.bezel.session})
    (found,) = ours.candidates
    assert theirs["acc,none"] == found.acc.value
    assert theirs["acc_norm,none"] == found.acc_norm.value
    assert found.acc != found.acc_norm


def test_the_harness_s_perplexity(model: BezelLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    text = "Once upon a time there was a king who had three sons. The eldest went into the wood."
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": text}) + "\n")
    more = "metric_list: [{metric: byte_perplexity}]"
    theirs = harness(model, tmp_path, kind="loglikelihood_rolling", text="", target="'{{text}}'", more=more)
    ids = model.bezel.tokenizer.encode(text, bos=True)
    want = np.exp(-log_p(model, ids) / len(text.encode()))
    assert theirs["byte_perplexity,none"] == pytest.approx(want, rel=1e-5)


def log_p(model: BezelLM, ids: list[int]) -> float:
    logits = model.bezel.logits(ids[:-1]).astype(np.float64)
    normalizer = np.log(np.exp(logits).sum(axis=1))
    return float((logits[np.arange(len(ids) - 1), ids[1:]] - normalizer).sum())


def test_a_text_longer_than_the_context_is_scored_in_windows(gguf_of: Callable[..., Path]) -> None:
    """Against the harness's own windows."""
    model = BezelLM(str(gguf_of("demo")), context=32, **EXACT)
    text = "Once upon a time there was a king who had three sons, " * 9
    ids = model.bezel.tokenizer.encode(text)
    assert len(ids) > 64
    windows = map(make_disjoint_window, get_rolling_token_windows(ids, model.bezel.tokenizer.bos_id, 32, 1))
    want = sum(model._scorer.score(context, scored)[0] for context, scored in windows)
    assert model.loglikelihood_rolling([request(text)]) == [pytest.approx(want, rel=1e-6)]
    # What is too long for a single question loses its beginning, but not <bos>.
    (found,) = model.loglikelihood([request(text.strip(), " sons went")])
    rest = model.bezel.tokenizer.encode(text + "sons went")[len(ids) - 1 :]
    kept = model.bezel.tokenizer.encode(text.strip())[-(32 - len(rest)) :]
    assert len(rest) > 1
    assert found[0] == pytest.approx(log_p(model, [2, *kept, *rest]) - log_p(model, [2, *kept]), rel=1e-5)


def test_generation_stops_where_it_is_told(model: BezelLM) -> None:
    context = "Once upon a time there was"
    (whole,) = model.generate_until([request(context, {"until": [], "max_gen_toks": 40})])
    greedy = model.bezel.prompt_ids(context, raw=True)
    for _ in range(40):
        greedy.append(int(model.bezel.logits(greedy)[-1].argmax()))
    assert model.bezel.tokenizer.decode(greedy) == context + whole
    stop = whole[20:24]
    (cut,) = model.generate_until([request(context, {"until": stop, "max_gen_toks": 40})])
    assert cut == whole[: whole.index(stop)]
    with pytest.raises(InvalidRequest, match="expected fewer"):
        model.generate_until([request(context, {"max_gen_toks": 5000})])


def test_a_chat_comes_back_as_its_ids(model: BezelLM) -> None:
    marker = model.bezel.tokenizer.start_of_turn_id
    assert marker not in model._encode("<start_of_turn>user")  # as long as nobody asked for a chat
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is \\king?"}]
    text = model.apply_chat_template(turns)
    assert text.startswith("<start_of_turn>user\nBe brief.")
    assert model._encode(text) == model.bezel.prompt_ids([Message(turn["role"], turn["content"]) for turn in turns])
