"""A bezel model for EleutherAI's lm-evaluation-harness (the extra `lm-eval`): the files that ship, scored by its tasks.

    python -m bezel.bench.tasks.lm_eval_model --model bezel --model_args path=gemma.gguf --tasks hellaswag

All of the harness's own options apply; `--model_args` takes what `bezel.runtime.load` takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name not in ("lm_eval", "tqdm"):
        raise
    raise ModuleNotFoundError(
        "lm-evaluation-harness is not installed: pip install 'bezel-lm[lm-eval]'", name=error.name
    ) from None

from ...runtime.api import load
from ...runtime.errors import InvalidRequest
from ...runtime.text import chat
from ...runtime.text.generation import Generation
from ...runtime.text.sampling import Sampling
from ...runtime.text.vocabulary import END_OF_TURN, START_OF_TURN
from .likelihood import Scorer, encode_pair

_MAX_NEW = 256  # the harness's own default


@register_model("bezel")
class BezelLM(LM):  # type: ignore[misc]
    """A model file of bezel. Requests that share a context, as the choices of a question do, share its computation."""

    def __init__(self, path: str, max_gen_toks: int = _MAX_NEW, **options: Any) -> None:
        """`options` are those of `bezel.runtime.load`; what the harness adds for other models is left out."""
        super().__init__()
        for name in ("batch_size", "max_batch_size", "device"):
            options.pop(name, None)
        self.bezel = load(path, **options)
        self.max_length, self.max_gen_toks = self.bezel.context, max_gen_toks
        self._scorer, self._chat = Scorer(self.bezel.session()), False

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log P(continuation | context) in nats, whether it is what greedy decoding gives) of each request."""
        out = []
        for context, continuation in _progress(requests, "loglikelihood", disable_tqdm):
            ids, rest = encode_pair(self._encode, context, continuation)
            found = self._scorer.score(self._cut(ids, len(rest) - 1), rest) if rest else (0.0, True)
            self.cache_hook.add_partial("loglikelihood", (context, continuation), found)
            out.append(found)
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log P(text) in nats. What exceeds the context is scored in windows, each token once, with as much before it
        as fits, as the harness defines it.
        """
        out = []
        for (text,) in _progress(requests, "loglikelihood_rolling", disable_tqdm):
            ids, total = self._encode(text), 0.0
            for start in range(1, len(ids), self.max_length):
                end = min(start + self.max_length, len(ids))
                first = max(end - 1 - self.max_length, 0)
                total += self._scorer.score(ids[first:start], ids[start:end])[0]
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            out.append(total)
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts generated after each context, greedily unless the request samples, up to its stop strings."""
        out = []
        for context, options in _progress(requests, "generate_until", disable_tqdm):
            limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_gen_toks)
            until = options.get("until") or []
            ids = self._cut(self._encode(context), limit)
            stop = [until] if isinstance(until, str) else list(until)
            text = "".join(Generation(self.bezel.session(), ids, _sampling(options), max_tokens=limit, stop=stop))
            self.cache_hook.add_partial("generate_until", (context, options), text)
            out.append(text)
        return out

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text. From now on turn markers in a text are turn markers, as the harness expects."""
        tokenizer, self._chat = self.bezel.tokenizer, True
        messages = [chat.Message(turn["role"], turn["content"]) for turn in chat_history]
        ids = chat.render(tokenizer, messages, add_generation_prompt)[1:]  # <bos> comes with `_encode`
        runs = groupby(ids, lambda i: i in tokenizer.special_ids)
        return "".join(
            "".join(map(tokenizer.piece, run)) if special else tokenizer.decode(run) for special, run in runs
        )

    @property
    def tokenizer_name(self) -> str:
        return self.bezel.name.replace("/", "__")

    def _encode(self, text: str) -> list[int]:
        """Ids after <bos>."""
        tokenizer = self.bezel.tokenizer
        if not self._chat:
            return tokenizer.encode(text, bos=True)
        markers = {START_OF_TURN: tokenizer.start_of_turn_id, END_OF_TURN: tokenizer.end_of_turn_id}
        ids = [tokenizer.bos_id]
        for part in re.split(f"({'|'.join(markers)})", text):
            marker = markers.get(part)
            ids += tokenizer.encode(part) if marker is None else [marker]
        return ids

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """<bos> and the newest of the ids, so that `room` positions are left."""
        most = self.max_length - room
        if most < 2:
            raise InvalidRequest(f"{room} tokens after a context: expected fewer than the model's {self.max_length}")
        return ids if len(ids) <= most else ids[:1] + ids[len(ids) - most + 1 :]


def _sampling(options: dict[str, Any]) -> Sampling:
    if not options.get("do_sample", False):
        return Sampling(temperature=0)
    given: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    given |= {name: options[name] for name in (*given, "min_p") if name in options}
    return Sampling(**given)


def _progress(requests: Sequence[Any], what: str, hidden: bool) -> Iterable[Any]:
    shown: Iterable[Any] = tqdm([request.args for request in requests], desc=what, disable=hidden)
    return shown


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
