"""Writes docs/python.md, the Python interface in the words of its docstrings: `python tests/make_docs.py`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from bezel.runtime import Image, Message, Model, Sampling, Session, errors, load
from bezel.runtime.text.conversation import Conversation
from bezel.runtime.text.generation import Generation
from bezel.runtime.text.grammar import Grammars

PROPERTIES = (property, cached_property)
PAGE = Path(__file__).parents[1] / "docs" / "python.md"
HEAD = """# bezel from Python

`import bezel` offers `bezel.load`, `bezel.Sampling`, `bezel.Message`, `bezel.Image`, `bezel.BezelError`, the base of
all its errors, and `bezel.__version__`. This page is made of the docstrings, by `python tests/make_docs.py`; a test
holds them equal.

```python
import bezel

with bezel.load("gemma.gguf", kv="int8") as model:
    for piece in model.generate("Why is the sky blue?", sampling=bezel.Sampling(seed=1), max_tokens=200):
        print(piece, end="", flush=True)

    chat = model.conversation("Be brief.")
    print("".join(chat.ask("Who wrote Faust?")), "".join(chat.ask("When?")))

    # Texts and pictures in any order, where the model sees: pip install 'bezel-lm[vision]'
    print("".join(model.generate([bezel.Message("user", [bezel.Image("cat.jpg"), "What is this?"])])))

    schema = {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]}
    print("".join(model.generate("When?", grammar=model.grammars.json_schema(schema))))  # pip install 'bezel-lm[serve]'

    session = model.session()  # token by token
    logits = session.prefill(model.tokenizer.encode("Once upon a time", bos=True))
    session.save("story.bezel")  # and restore(): as if nothing had happened
```
"""


def page() -> str:
    parts = [HEAD, entry("load", load)]
    for kind in (Model, Conversation, Session, Generation, Grammars, Sampling, Message, Image):
        parts.append(f"## {kind.__name__}\n\n{inspect.getdoc(kind)}\n")
        parts += [entry(name, member, "###") for name, member in members(kind)]
    parts.append("## Errors\n\nThey are in `bezel.runtime.errors`.\n")
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.BezelError):
            base = "" if kind is errors.BezelError else f", a `{kind.__base__.__name__}`"
            parts.append(f"- **`{name}`**{base}: {' '.join((inspect.getdoc(kind) or '').split())}")
    return "\n".join(parts).rstrip() + "\n"


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Its public methods and properties that say what they do, in the order of the source."""
    for name, member in vars(kind).items():
        shown = inspect.isfunction(member) or isinstance(member, PROPERTIES)
        if not name.startswith("_") and shown and member.__doc__:
            yield name, member


def entry(name: str, member: Any, level: str = "##") -> str:
    if isinstance(member, PROPERTIES):
        return f"{level} `{name}`\n\n{inspect.getdoc(member)}\n"
    signature = inspect.signature(member)
    shown = [str(p).partition(":")[0] + default(p) for p in signature.parameters.values()]
    stars = [i for i, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY]
    if stars:
        shown.insert(stars[0], "*")
    return f"{level} `{name}({', '.join(part for part in shown if part != 'self')})`\n\n{inspect.getdoc(member)}\n"


def default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    return "=…" if callable(parameter.default) else f"={parameter.default!r}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
