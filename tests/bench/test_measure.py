from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench.commands.shared import ProgressLine
from bezel.bench.loss import scoring as driver
from bezel.bench.loss.measure import measure
from bezel.bench.loss.metrics import NotFinite, compare
from bezel.bench.loss.passages import BLOCK, Passage, cut, read_texts
from bezel.bench.loss.result import Candidate, Measurement
from bezel.bench.loss.subjects import Opener, Spec, parse_spec, unique_names
from bezel.bench.loss.summary import Pooled
from bezel.export.calibration.rounding import export_calibrated
from bezel.export.gguf.writer import export_gguf
from bezel.export.sources.opening import open_checkpoint
from bezel.runtime import Model
from bezel.runtime.commands.main import main
from bezel.runtime.errors import BezelError, InvalidRequest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from tiny import DEMO, TEXT, checkpoint_folder

TINY = "gemma2-gqa"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "tale.txt"
    path.write_text(TEXT.read_text("utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path, text: Path) -> Callable[..., Measurement]:
    def call(candidates: list[str], reference: str, **options: Any) -> Measurement:
        specs = [parse_spec(c, Spec(Path())) for c in candidates]
        exact = parse_spec(reference, Spec(Path(), None, "f32", "f32"))
        texts = options.pop("texts", [text])
        return measure(specs, exact, texts, **{"states": tmp_path / "states", **options})

    return call


def plain(reference: np.ndarray, candidate: np.ndarray, next_ids: np.ndarray) -> dict[str, float]:
    """Every metric, the slow way: float64, the whole matrix at once, SciPy-like formulas and sorting."""
    p, q = (np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True)) for x in (reference, candidate))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    kld = (p * np.log(p / q)).sum(axis=1)
    rows = np.arange(len(p))
    right_p, right_q = p[rows, next_ids], q[rows, next_ids]
    best_p, best_q = np.argsort(-p, axis=1)[:, :5], np.argsort(-q, axis=1)[:, :5]
    quantile = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
    return {
        "kld_mean": kld.mean(),
        **{f"kld_{name}": np.quantile(kld, level, method="inverted_cdf") for name, level in quantile.items()},
        "top1": np.mean(best_p[:, 0] == best_q[:, 0]),
        "flips": np.mean(best_p[:, 0] != best_q[:, 0]),
        "top5": np.mean([len(set(a) & set(b)) / 5 for a, b in zip(best_p, best_q, strict=True)]),
        "rms_dp": np.sqrt(np.mean((right_q - right_p) ** 2)),
        "perplexity": np.exp(-np.log(right_q).mean()),
        "perplexity_ratio": np.exp(-np.log(right_q).mean() + np.log(right_p).mean()),
    }


@pytest.mark.parametrize(
    ("n", "vocab", "spread", "noise"), [(300, 500, 3.0, 0.1), (64, 4096, 8.0, 1e-4), (7, 11, 1, 2)]
)
def test_metrics_equal_a_plain_float64_computation(n: int, vocab: int, spread: float, noise: float) -> None:
    random = np.random.default_rng(vocab)
    reference = (random.standard_normal((n, vocab)) * spread).astype(np.float32)
    candidate = reference + (random.standard_normal((n, vocab)) * noise).astype(np.float32)
    next_ids = random.integers(0, vocab, n)
    (records,) = compare([reference, candidate], [(0, 1)], 5, next_ids)
    assert records["position"].tolist() == list(range(5, 5 + n))
    passage = Passage(0, 0, np.zeros(n + 1, np.int64), 0)
    metrics = Pooled([{"records": records, "layers": np.zeros((2, 0))}], [passage], "long", 0.95).metrics()
    for name, want in plain(reference, candidate, next_ids).items():
        # KLD is a small difference of larger numbers in the plain form too: some 1e-15 absolute.
        assert getattr(metrics, name).value == pytest.approx(want, rel=1e-6, abs=1e-13), name


def test_equal_logits_have_a_divergence_of_exactly_zero() -> None:
    logits = (np.random.default_rng(0).standard_normal((9, 3001)) * 20).astype(np.float32)
    (records,) = compare([logits, logits.copy()], [(0, 1)], 0, np.arange(9))
    assert not records["kld"].any()
    assert np.array_equal(records["logp"], records["reference_logp"])
    assert (records["shared_top"] == 5).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = np.zeros((300, 5000), np.float32)
    broken = logits.copy()
    broken[251, 7] = bad
    with pytest.raises(NotFinite) as error:
        compare([logits, broken], [(0, 1)], 0, np.zeros(300, np.int64))
    assert (error.value.which, error.value.row) == (1, 251)


def test_chunks_are_those_of_the_fields_perplexity_tool(model_of: Callable[..., Model], text: Path) -> None:
    tokenizer = model_of(TINY).tokenizer
    (read,) = read_texts([text], tokenizer)
    assert read.ids[0] == tokenizer.bos_id
    passages = cut([read], "chunks", 64)
    assert len(passages) == len(read.ids) // 64
    for i, passage in enumerate(passages):
        assert passage.ids[0] == tokenizer.bos_id
        assert np.array_equal(passage.ids[1:], read.ids[64 * i + 1 : 64 * (i + 1)])
        assert passage.first == 32
        assert passage.scored == 31  # of the second half, all that a token follows


def test_a_measurement_equals_plain_logits(
    run: Callable[..., Measurement], model_of: Callable[..., Model], gguf_of: Callable[..., Path], text: Path
) -> None:
    files = [gguf_of(TINY, preset) for preset in ("f32", "q4_0")]
    result = run([f"{files[1]}@activations=f32,kv=f32"], str(files[0]), chunk=64, limit=8)
    models = [model_of(TINY, preset, engine="native", activations="f32") for preset in ("f32", "q4_0")]
    passages = cut(read_texts([text], models[0].tokenizer), "chunks", 64)[:8]
    logits = [np.concatenate([m.logits(p.ids.tolist())[p.first : -1] for p in passages]) for m in models]
    next_ids = np.concatenate([p.ids[p.first + 1 :] for p in passages])
    want = plain(logits[0], logits[1], next_ids)
    (candidate,) = result.candidates
    for name, value in want.items():
        assert getattr(candidate.metrics, name).value == pytest.approx(value, rel=1e-6), name
    assert result.scored == len(next_ids)
    ratio = candidate.metrics.perplexity_ratio.value
    assert result.reference.perplexity.value == pytest.approx(want["perplexity"] / ratio)
    assert sum(candidate.by_position.count) == sum(candidate.histogram.counts) == len(next_ids)
    assert candidate.by_position.edges[0] == 32
    assert candidate.by_position.edges[-1] == 64


@pytest.mark.parametrize("setting", ["engine=native,kv=int8,activations=int8", "engine=reference,kv=f32"])
def test_a_file_measured_against_itself_loses_nothing(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], setting: str
) -> None:
    model = f"{gguf_of(TINY, 'q4_0')}@{setting}"
    (candidate,) = run([f"{model},name=same"], model, chunk=64, limit=6).candidates
    values = {name: figure.value for name, figure in vars(candidate.metrics).items()}
    assert {value for name, value in values.items() if name.startswith("kld")} == {0.0}
    assert [values[name] for name in ("top1", "top5", "perplexity_ratio")] == [1, 1, 1]
    assert [values[name] for name in ("flips", "rms_dp")] == [0, 0]
    assert candidate.metrics.kld_mean.high == 0
    assert candidate.by_layer is not None
    assert {layer.error for layer in candidate.by_layer} == {0.0}


def test_a_checkpoint_is_measured_as_it_is(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint_folder(TINY, tmp_path)
    result = run([f"{gguf_of(TINY)}@engine=reference,kv=f32"], str(folder), chunk=64, limit=2)
    assert result.candidates[0].metrics.kld_max.value == 0
    assert result.reference.engine == "reference"
    assert result.reference.formats == {"f32": len(load_file(folder / "model.safetensors"))}


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_rings_add_exactly_nothing(run: Callable[..., Measurement], gguf_of: Callable[..., Path], kv: str) -> None:
    model = f"{gguf_of(TINY, 'q8_0')}@kv={kv},activations=int8"
    result = run([f"{model},ring=on"], f"{model},ring=off", protocol="long")
    assert result.chunk == 256  # 32 windows
    assert result.scored > 1000
    metrics = result.candidates[0].metrics
    assert (metrics.kld_max.value, metrics.perplexity_ratio.value) == (0, 1)


def test_int8_keys_and_values_add_little_to_the_demo(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path]
) -> None:
    model = f"{gguf_of('demo', 'q8_0')}@activations=f32"
    result = run([f"{model},kv=int8"], f"{model},kv=f32", protocol="long", limit=1)
    assert result.scored > 1000
    kld = result.candidates[0].metrics.kld_mean.value
    assert 0 < kld < 1e-3


def test_a_long_text_gives_what_single_steps_give(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], model_of: Callable[..., Model], text: Path
) -> None:
    """Pieces of many positions, through rings of int8, are no other measurement than decoding is."""
    path = gguf_of(TINY, "q4_0")
    result = run([f"{path}@kv=int8"], str(path), protocol="long", limit=1)
    model = model_of(TINY, "q4_0", engine="native", kv="int8", activations="int8")
    (read,) = read_texts([text], model.tokenizer)
    session, nll = model.session(), 0.0
    for token, following in zip(read.ids[:255].tolist(), read.ids[1:256].tolist(), strict=True):
        logits = session.step(token).astype(np.float64)
        nll += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[following]
    found = result.candidates[0].metrics.perplexity.value
    assert found == pytest.approx(np.exp(nll / 255), rel=1e-9)


def test_a_change_shows_in_its_layer_and_after(
    run: Callable[..., Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_folder(TINY, tmp_path)
    changed = checkpoint_folder(TINY, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][::2] *= np.float32(1.01)
    save_file(weights, changed / "model.safetensors")
    result = run([f"{changed}@kv=f32"], str(folder), chunk=64, limit=2)
    errors = [layer.error or 0 for layer in result.candidates[0].by_layer or ()]
    assert errors[:2] == [0, 0]
    assert min(errors[2:]) > 1e-5
    assert max(errors) < 0.02
    monkeypatch.setattr(driver, "_ROWS", 5)  # of all positions, however many are compared at a time
    again = run([f"{changed}@kv=f32"], str(folder), chunk=64, limit=2, states=tmp_path / "anew")
    # What is compared are float32 states, each right to 6e-8, whose difference is 1e-3 of them.
    assert [layer.error or 0 for layer in again.candidates[0].by_layer or ()] == pytest.approx(errors, rel=1e-4)


def test_effects_are_measured_each_alone(run: Callable[..., Measurement], gguf_of: Callable[..., Path]) -> None:
    exact, file = gguf_of(TINY), gguf_of(TINY, "q8_0")
    result = run([f"{file}@kv=int8"], str(exact), chunk=64, limit=3, effects=True)
    found = {e.effect: e.metrics.kld_mean.value for e in result.effects}
    assert list(found) == ["weights", "activations int8", "kv f16", "kv int8"]

    def kld(candidate: str, reference: str) -> float:
        single = run([f"{candidate},name=c"], reference, chunk=64, limit=3)
        return single.candidates[0].metrics.kld_mean.value

    plain_file = f"{file}@kv=f32,activations=f32"
    assert found["weights"] == kld(plain_file, str(exact)) > 0
    assert found["activations int8"] == kld(f"{file}@kv=f32,activations=int8", str(file)) > 0
    assert found["kv int8"] == kld(f"{file}@kv=int8,activations=f32", str(file)) > found["kv f16"] > 0


@pytest.mark.parametrize(("chunk", "other"), [(96, 64), (64, 96)])
def test_another_chunk_is_another_measurement(chunk: int, other: int, gguf_of: Callable[..., Path], text: Path) -> None:
    """Also where a short text comes first, which is one sequence whatever the chunk."""
    short = text.with_name("short.txt")
    short.write_text("Once upon a time.")
    specs = [parse_spec(str(gguf_of(TINY, preset)), Spec(Path())) for preset in ("q4_0", "f32")]

    def scored(chunk: int, state: str) -> Measurement:
        texts, states = [short, text], text.parent / state
        return measure(specs[:1], specs[1], texts, protocol="long", chunk=chunk, limit=3, states=states)

    scored(other, "one")
    found, fresh = scored(chunk, "one"), scored(chunk, "two")
    assert replace(found, time="") == replace(fresh, time="")


def test_effects_run_no_model_twice(gguf_of: Callable[..., Path]) -> None:
    """Of the reference's own file the exact setting is the reference."""
    file = gguf_of(TINY, "q8_0")
    candidate, exact = (parse_spec(f"{file}@kv=int8,activations={a}", Spec(Path())) for a in ("int8", "f32"))
    exact = replace(exact, kv="f32")
    work = driver.Subjects([candidate], exact, True, Opener())
    settings = [(s.spec.kv, s.spec.activations) for s in work.subjects]
    assert settings == [("f32", "f32"), ("int8", "int8"), ("f32", "int8"), ("f16", "f32"), ("int8", "f32")]
    assert [(c.reference, c.candidate, c.effect) for c in work.comparisons] == [
        (0, 1, None),
        (0, 0, "weights"),
        (0, 2, "activations int8"),
        (0, 3, "kv f16"),
        (0, 4, "kv int8"),
    ]


def test_the_worst_tokens_are_found_in_the_text(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], model_of: Callable[..., Model], text: Path
) -> None:
    result = run([str(gguf_of(TINY, "q4_0"))], str(gguf_of(TINY)), chunk=64, limit=4)
    tokenizer = model_of(TINY).tokenizer
    ids = tokenizer.encode(text.read_text("utf-8"), bos=True)
    worst = result.candidates[0].worst
    assert worst[0].kld == result.candidates[0].metrics.kld_max.value
    for entry in worst:
        place = entry.position
        assert place % 64 > 32
        assert entry.before.endswith(tokenizer.decode(ids[place - 20 : place]))
        assert entry.token == tokenizer.decode([ids[place]])
        shares = [p for _, p in entry.reference_top]
        assert shares == sorted(shares, reverse=True)
        assert len(shares) == len(entry.candidate_top) == 5


def test_candidates_are_compared_in_pairs(run: Callable[..., Measurement], gguf_of: Callable[..., Path]) -> None:
    files = [str(gguf_of(TINY, preset)) for preset in ("q8_0", "q4_0")]
    result = run(files, str(gguf_of(TINY)), chunk=64)
    a, b = (candidate.metrics for candidate in result.candidates)
    pairs = {pair.metric: pair for pair in result.pairs}
    for metric in ("kld_mean", "top1", "kld_p999"):
        assert pairs[metric].difference == pytest.approx(getattr(a, metric).value - getattr(b, metric).value)
    assert pairs["log_perplexity"].difference == pytest.approx(np.log(a.perplexity.value / b.perplexity.value))
    assert pairs["kld_mean"].high < 0  # q8_0 is better, beyond doubt
    # The texts differ more than the candidates do: paired, they are told apart more finely than by their perplexities.
    assert a.perplexity.low is not None
    assert a.perplexity.high is not None
    width = np.log(a.perplexity.high / a.perplexity.low)
    assert pairs["log_perplexity"].high - pairs["log_perplexity"].low < width / 2


def test_a_measurement_that_was_stopped_goes_on(
    run: Callable[..., Measurement],
    gguf_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, reference = [str(gguf_of(TINY, preset)) for preset in ("q8_0", "q4_0")], str(gguf_of(TINY))
    scored: list[int] = []
    original = driver.score

    def counting(*arguments: Any) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(len(arguments[1]))
        return original(*arguments)

    monkeypatch.setattr(driver, "score", counting)
    with pytest.raises(KeyboardInterrupt):
        run(files[:1], reference, chunk=64, limit=6)
    monkeypatch.setattr(driver, "score", lambda *a: scored.append(len(a[1])) or original(*a))
    run(files[:1], reference, chunk=64, limit=6)
    assert scored == [1] * 6  # three before, three after
    run(files[:1], reference, chunk=64, limit=6)
    assert len(scored) == 6  # all was kept
    result = run(files, reference, chunk=64, limit=7)
    assert scored[6:] == [1] * 6 + [2]  # the new candidate alone, and the new chunk for both
    damaged = sorted((tmp_path / "states").rglob("*.npz"))[4]
    damaged.write_bytes(damaged.read_bytes()[:-30])
    again = run(files, reference, chunk=64, limit=7)
    assert len(scored) == 14
    assert replace(result, time="") == replace(again, time="")
    assert not list((tmp_path / "states").rglob("*.part"))


def test_other_files_and_settings_are_not_taken_for_what_was_kept(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    reference, file = str(gguf_of(TINY)), tmp_path / "model.gguf"
    file.write_bytes(gguf_of(TINY, "q8_0").read_bytes())
    klds = []
    for setting in ("", "@kv=int8", "@activations=f32"):
        result = run([f"{file}{setting}"], reference, chunk=64, limit=2)
        klds.append(result.candidates[0].metrics.kld_mean.value)
    file.write_bytes(gguf_of(TINY, "q4_0").read_bytes())
    result = run([str(file)], reference, chunk=64, limit=2)
    klds.append(result.candidates[0].metrics.kld_mean.value)
    klds.append(run([str(file)], str(gguf_of(TINY, "q8_0")), chunk=64, limit=2).candidates[0].metrics.kld_mean.value)
    text.write_text(TEXT.read_text("utf-8")[20_000:26_000], encoding="utf-8")
    klds.append(run([str(file)], reference, chunk=64, limit=2).candidates[0].metrics.kld_mean.value)
    assert len(set(klds)) == 6
    assert klds[3] > 5 * klds[0]


def test_another_protocol_is_another_measurement(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], text: Path, model_of: Callable[..., Model]
) -> None:
    """Of a text that is one and the same sequence by both."""
    files, tokenizer = ([str(gguf_of(TINY, "q4_0"))], str(gguf_of(TINY))), model_of(TINY).tokenizer
    words = text.read_text("utf-8").split()
    for n in range(10, len(words)):
        text.write_text(" ".join(words[:n]), encoding="utf-8")
        if len(tokenizer.encode(text.read_text("utf-8"), bos=True)) >= 64:
            break
    assert run(*files, protocol="chunks", chunk=64).scored == 31
    assert run(*files, protocol="long", chunk=64).scored == 63


def test_specs() -> None:
    default = Spec(Path(), kv="int8")
    here = str(TEXT)
    assert parse_spec(here, default) == Spec(TEXT, "native", "int8", "int8")
    spec = parse_spec(f"{here}@kv=f32,activations=f32,ring=off,name=one", default)
    assert spec == Spec(TEXT, "native", "f32", "f32", False, "one")
    assert parse_spec(f"{here}@engine=reference", default).activations == "f32"
    assert parse_spec(str(DEMO), default) == Spec(DEMO, "reference", "int8", "f32")
    for wrong, said in (
        (f"{here}@kv=int4", "kv: found 'int4', expected one of f16, f32, int8"),
        (f"{here}@ring=maybe", "ring: found 'maybe'"),
        (f"{here}.missing", "no such file or folder"),
        (f"{DEMO}@engine=native", "runs on 'reference' only"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            parse_spec(wrong, default)


def test_names_tell_models_apart(tmp_path: Path) -> None:
    one, other, deep = (Spec(tmp_path / folder / "m.gguf", "native") for folder in ("one", "other", "deep/one"))
    exact = replace(one, activations="f32")
    assert unique_names([one]) == ["m"]
    assert unique_names([one, replace(other, path=other.path.with_name("n.gguf"))]) == ["m", "n"]
    assert unique_names([one, other, replace(one, name="m")]) == ["one/m", "other/m", "m"]
    short, long = "(native, int8 activations, f16 KV)", "(native, f32 activations, f16 KV)"
    assert unique_names([one, exact]) == [f"m {short}", f"m {long}"]
    assert unique_names([one, exact, other]) == [f"one/m {short}", f"one/m {long}", f"other/m {short}"]
    assert unique_names([one, deep]) == [f"{spec.path} {short}" for spec in (one, deep)]
    assert unique_names([replace(one, name="a")] * 3) == ["a", "a (no. 2)", "a (no. 3)"]
    assert len(set(unique_names([one, one, exact]))) == 3


def test_a_text_given_twice_is_refused(gguf_of: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Under whatever name: it would count twice, and its passages are drawn as if they were others."""
    again = tmp_path / "again.txt"
    again.write_bytes(text.read_bytes())
    model = Spec(gguf_of(TINY), "native")
    with pytest.raises(
        InvalidRequest, match=r"again\.txt: found the text of .*tale\.txt again, expected each text once"
    ):
        measure([model], model, [text, again], chunk=64, states=tmp_path / "states")


def test_a_candidate_calibrated_on_the_text_is_warned_of(
    run: Callable[..., Measurement], text: Path, tmp_path: Path
) -> None:
    """And neither the reference, nor one that was calibrated on another."""
    paths = [tmp_path / f"{name}.gguf" for name in ("plain", "here", "elsewhere")]
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text("utf-8")[6000:12000], encoding="utf-8")
    with open_checkpoint(checkpoint_folder(TINY, tmp_path)) as source:
        export_gguf(source, paths[0], "q8_0")
        for path, calibration in zip(paths[1:], (text, other), strict=True):
            export_calibrated(source, path, "q4_0", "q4_0", calibration, tokens=512)
    found = run([str(path) for path in paths], str(paths[1]), texts=[text, other], chunk=64, limit=2)
    said = [warning.partition(":")[0].split(" was calibrated on ") for warning in found.warnings[-2:]]
    assert [(name.split()[0], on) for name, on in said] == [("here", str(text)), ("elsewhere", str(other))]
    assert "calibrated" not in "".join(found.warnings[:-2])


def test_the_progress_tells_the_mean_so_far(run: Callable[..., Measurement], gguf_of: Callable[..., Path]) -> None:
    """Of what was kept by an earlier run, too."""
    told: list[str] = []
    q4, q8 = str(gguf_of(TINY, "q4_0")), str(gguf_of(TINY, "q8_0"))
    for limit in (2, 5):
        found = run([q4, q8], str(gguf_of(TINY)), chunk=64, limit=limit, progress=lambda *a: told.append(a[2]))
        means = (f"{candidate.name} {candidate.metrics.kld_mean.value:.4g}" for candidate in found.candidates)
        assert told[-1] == f"mean KLD {', '.join(means)}"
    assert told[0] == ""


def test_a_model_of_another_vocabulary_is_refused(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    """If only in one token."""
    raw = gguf_of(TINY).read_bytes()
    piece = np.int64(len(b"\xe2\x96\x81king")).tobytes() + b"\xe2\x96\x81king"
    assert raw.count(piece) == 1
    (tmp_path / "other.gguf").write_bytes(raw.replace(piece, piece[:-1] + b"q"))
    with pytest.raises(InvalidRequest, match=r"other\.gguf: its vocabulary is not that of the reference"):
        run([str(tmp_path / "other.gguf")], str(gguf_of(TINY)), chunk=64)


def test_what_cannot_be_measured_is_refused(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], text: Path
) -> None:
    file = str(gguf_of(TINY))
    with pytest.raises(InvalidRequest, match="found 257, expected 4 to 256"):
        run([file], file, chunk=257)
    text.write_text("Too short.")
    with pytest.raises(InvalidRequest, match=r"tale\.txt: found \d tokens, expected at least 64"):
        run([file], file, chunk=64)
    long = text.with_name("long.txt")
    long.write_text("A tale that is told again and again. " * 40)
    with pytest.raises(InvalidRequest, match=r"tale\.txt: found \d tokens, expected at least 64"):
        run([file], file, chunk=64, texts=[long, text])
    text.write_bytes(b"Latin: \xe9\xe9")
    with pytest.raises(InvalidRequest, match="not UTF-8 at 7"):
        run([file], file)


def test_a_model_whose_logits_are_broken_is_named(
    run: Callable[..., Measurement], gguf_of: Callable[..., Path], tmp_path: Path
) -> None:
    from bezel.runtime.files.gguf_model import GGUFModel

    original = gguf_of(TINY)
    with GGUFModel(original) as gguf:
        offset = gguf.tensors["output_norm.weight"].offset
    raw = bytearray(original.read_bytes())
    raw[offset : offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "broken.gguf").write_bytes(raw)
    with pytest.raises(BezelError, match=r"broken\.gguf: a logit that is not finite at position 32 of"):
        run([str(tmp_path / "broken.gguf")], str(original), chunk=64)


def test_each_text_is_measured_as_if_alone(
    gguf_of: Callable[..., Path], model_of: Callable[..., Model], text: Path, tmp_path: Path
) -> None:
    """With as many chunks of each as were asked for, whatever was kept of fewer; and bits a byte by hand."""
    other = tmp_path / "other.txt"
    other.write_text("Größe, Güte und Gähnen: 12 Käse für 345 Euro. " * 80, encoding="utf-8")
    exact, rounded = (Spec(gguf_of(TINY, preset), "native", "f32", "f32") for preset in ("f32", "q4_0"))

    def found(*texts: Path, limit: int = 7) -> Candidate:
        return measure([rounded], exact, texts, chunk=64, limit=limit, states=tmp_path / "states").candidates[0]

    found(text, other, limit=3)
    both = found(text, other)
    assert [loss.text for loss in both.by_text] == [str(text), str(other)]
    model = model_of(TINY, "q4_0", engine="native", activations="f32")
    for loss, path in zip(both.by_text, (text, other), strict=True):
        alone = found(path)
        for name in ("kld_mean", "kld_p999", "top1", "perplexity_ratio"):
            assert getattr(loss, name) == getattr(alone.metrics, name), name
        assert alone.by_text == [loss]
        bits = n_bytes = 0.0
        for passage in cut(read_texts([path], model.tokenizer), "chunks", 64, 7):
            logits = model.logits(passage.ids.tolist())[passage.first : -1].astype(np.float64)
            following = passage.ids[passage.first + 1 :]
            logp = logits[np.arange(len(following)), following] - np.log(np.exp(logits).sum(axis=1))
            bits -= logp.sum() / np.log(2)
            n_bytes += sum(len(model.tokenizer.bytes_of(token)) for token in following.tolist())
        assert loss.bits_per_byte.value == pytest.approx(bits / n_bytes, rel=1e-6)
        nats = (loss.bits_per_byte.value - loss.reference_bits_per_byte.value) * n_bytes * np.log(2)
        assert np.exp(nats / loss.scored) == pytest.approx(loss.perplexity_ratio.value)


def test_the_command(gguf_of: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    files = [str(gguf_of(TINY, preset)) for preset in ("q8_0", "q4_0")]
    command = ["measure", *files, "--reference", str(gguf_of(TINY)), "--text", str(text), "--chunk", "64"]
    command += ["--state", str(tmp_path / "states")]
    runner = CliRunner()
    shown = runner.invoke(main, [*command, "--effects", "--html", str(tmp_path / "report.html")])
    assert shown.exit_code == 0, shown.output
    assert "What causes the loss?" in (tmp_path / "report.html").read_text("utf-8")
    assert f"{Path(files[0]).stem} is better than {Path(files[1]).stem} by" in shown.output
    assert "kv int8" in shown.output
    assert "each text alone" not in shown.output
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[3000:])
    shown = runner.invoke(main, [*command, "--text", str(other), "--chunks", "6"])
    assert f"{Path(files[0]).stem}, other.txt" in shown.output, shown.output
    result = json.loads(runner.invoke(main, [*command, "--json", "--chunks", "5"]).stdout)
    assert result["bezel_measure"] == 1
    assert result["warnings"][0].startswith("only 5 chunks: there are no confidence intervals")
    assert result["candidates"][0]["metrics"]["kld_mean"]["low"] is None
    assert result["pairs"] == []
    assert "Missing argument 'CANDIDATE...'" in runner.invoke(main, ["measure", *command[3:]]).output


def test_ctrl_c_says_how_to_go_on(gguf_of: Callable[..., Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "score", stop)
    file = str(gguf_of(TINY))
    command = ["measure", file, "--reference", file, "--text", str(text), "--chunk", "64", "--state", str(text.parent)]
    stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 130
    assert "the same command goes on from here" in stopped.output


def test_blocks_of_a_long_sequence_are_units() -> None:
    passage = Passage(0, 0, np.zeros(2 * BLOCK + 11, np.int64), 0)
    assert np.bincount(passage.units("long")).tolist() == [BLOCK, BLOCK, 10]
    assert not passage.units("chunks").any()


def test_the_time_that_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither what opening the models takes nor what an earlier run has kept counts as speed."""
    now = 0.0
    line = ProgressLine("measuring", lambda: now)
    now = 60.0
    for done in range(51):  # loaded
        line(done, 100, "")
        now += 0.001
    for done in range(51, 101):
        now += 2.0
        line(done, 100, "mean KLD .1")
    said = capsys.readouterr().err.split("\r")[1:]
    assert not any("left" in text for text in said[:51])
    assert said[51] == "measuring: 51 of 100, 2 min left; mean KLD .1"
    assert said[75] == "measuring: 75 of 100, 50 s left; mean KLD .1"
    assert said[100] == "measuring: 100 of 100; mean KLD .1\n"
