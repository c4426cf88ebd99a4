"""Presets, recipe files, and the best mix for a size."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bezel.bench.synthetic import SHAPES
from bezel.export.recipe import find_recipe, solve, solve_bits, solve_size
from bezel.quant.formats import FORMATS, Q4_0, Q5_K, Q6_K, Q8_0
from bezel.quant.mix import Option, best_mix
from bezel.quant.recipes import PLAIN, PRESETS, Choice, Recipe, Rule, bits, parse, preset
from bezel.runtime.errors import InvalidRequest
from bezel.runtime.model.families.hf import read_hf_config
from bezel.runtime.model.tensors import tensor_specs
from tiny import CONFIGS

WIDE = (64, 2304)  # rows that every format divides
CONFIG = read_hf_config(CONFIGS["gemma2-gqa"])  # 4 layers
MATRICES = [spec for spec in tensor_specs(CONFIG) if spec.is_matrix]


def choose(recipe: Recipe, role: str, layer: int | None = 0, shape: tuple[int, ...] = WIDE) -> Choice:
    name = f"{role}.weight" if layer is None else f"blk.{layer}.{role}.weight"
    return recipe.choose(name, role, layer, shape)


def names(choice: Choice) -> tuple[str, str]:
    return choice.format.name, choice.wanted.name


# --- presets


@pytest.mark.parametrize("name", PLAIN)
def test_a_matrix_follows_its_preset_and_a_norm_is_f32(name: str) -> None:
    assert names(choose(preset(name, 26), "ffn_down")) == (name, name)
    assert names(choose(preset(name, 26, "q8_0"), "ffn_norm", shape=(2304,))) == ("f32", "f32")


@pytest.mark.parametrize("role", ["token_embd", "output"])
@pytest.mark.parametrize("name", PRESETS)
def test_embedding_and_head_are_better_than_the_rest_unasked(name: str, role: str) -> None:
    found = choose(preset(name, 26), role, None).format
    if name == "int4":
        assert found is Q5_K
    else:
        assert found is (Q6_K if name not in ("f32", "f16", "bf16", "q8_0") else FORMATS[name])
    for asked in PLAIN:
        assert choose(preset(name, 26, asked), role, None).format.name == asked
        assert choose(preset(name, 26, asked), "attn_q") == choose(preset(name, 26), "attn_q")


# What llama.cpp's quantizer (0.3.36 of llama-cpp-python) gave to models of so many layers.
MORE_BITS = {
    4: {2, 3},
    7: {2, 5, 6},
    18: {0, 1, 4, 7, 10, 13, 15, 16, 17},
    26: {0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25},
    28: {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27},
    42: {0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 36, 37, 38, 39, 40, 41},
}


@pytest.mark.parametrize("n_layers", MORE_BITS)
@pytest.mark.parametrize(("name", "plain"), [("q4_k_m", "q4_k"), ("q5_k_m", "q5_k")])
def test_the_mixes_of_the_field(name: str, plain: str, n_layers: int) -> None:
    recipe = preset(name, n_layers)
    for layer, role in itertools.product(range(n_layers), ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up")):
        assert choose(recipe, role, layer).format.name == plain
    for layer, role in itertools.product(range(n_layers), ("attn_v", "ffn_down")):
        assert choose(recipe, role, layer).format.name == ("q6_k" if layer in MORE_BITS[n_layers] else plain)


@pytest.mark.parametrize("shape", ["gemma-2-2b", "gemma-2-9b", "gemma-2b"])
def test_int4_uses_its_bits_up_in_order(shape: str) -> None:
    config = read_hf_config(SHAPES[shape])
    recipe = find_recipe("int4", config)
    chosen = {spec: recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape).format for spec in tensor_specs(config)}
    weights = sum(int(np.prod(spec.shape)) for spec in chosen)
    used = sum(int(np.prod(spec.shape)) * bits(form) for spec, form in chosen.items())
    vocabulary = config.vocab_size * 8 * 23  # a length, 7 letters, a score and a type each
    assert used + vocabulary <= 4.6 * weights
    order = ["attn_v", "attn_k", "ffn_down"]
    more = [spec for role in order for spec in chosen if spec.role == role]
    better = [chosen[spec] is Q5_K for spec in more]
    assert better == sorted(better, reverse=True)  # from the first on
    assert used + 1.25 * int(np.prod(more[sum(better)].shape)) > 4.58 * weights
    rest = {form for spec, form in chosen.items() if spec not in more and spec.is_matrix}
    assert rest == {Q5_K, FORMATS["iq4_xs"]}


@pytest.mark.parametrize(("layers", "hidden", "inner"), [(18, 640, 2048), (26, 1152, 6912)])  # Gemma 3 270M, 1B
def test_int4_of_a_model_that_is_mostly_embedding(layers: int, hidden: int, inner: int) -> None:
    """Rows are not whole blocks of Q5_K, and a head in Q5_1 would make more than 4.6 bits: layers get what is left."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": 262144}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    config = read_hf_config(SHAPES["gemma-2-2b"] | sizes | heads)

    def bits_of(recipe: Recipe) -> float:
        specs = [(spec, int(np.prod(spec.shape))) for spec in tensor_specs(config)]
        used = sum(n * bits(recipe.choose(s.gguf, s.role, s.layer, s.shape).format) for s, n in specs)
        return used / sum(n for _, n in specs)

    recipe, head = find_recipe("int4", config), (262144, hidden)
    assert 4.55 <= bits_of(recipe) <= 4.6 < bits_of(preset("int4", layers))
    assert names(choose(recipe, "token_embd", None, head)) == ("iq4_nl", "iq4_xs")
    assert {choose(recipe, "attn_v", i, (256, hidden)).format.name for i in range(layers)} == {"q5_1"}
    asked = find_recipe("int4", config, "q6_k")
    assert choose(asked, "token_embd", None, head).format is Q8_0


@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("q4_k", 288, "q5_0"),
        ("q5_k", 32, "q5_1"),
        ("q6_k", 640, "q8_0"),
        ("q6_k", 255, "f16"),
        ("iq4_xs", 1152, "iq4_nl"),
        ("iq4_xs", 48, "f16"),
        ("q4_0", 48, "f16"),
        ("q8_0", 33, "f16"),
        ("q4_0", 96, "q4_0"),
        ("bf16", 7, "bf16"),
        ("f32", 1, "f32"),
    ],
)
def test_rows_that_are_not_whole_blocks_fall_back(name: str, n: int, expected: str) -> None:
    choice = choose(preset(name, 4), "attn_q", shape=(4, n))
    assert names(choice) == (expected, name)
    assert n % choice.format.block == 0


# Gemma 3 270M: inputs, and what gemma-3-270m-q4_k_m.gguf, made by llama.cpp, and its quantizer's q5_k_m hold: in the
# layers of MORE_BITS[18], and in the others.
GEMMA_3_270M = {
    "token_embd": (640, ("q8_0",), ("q8_0",)),
    "attn_q": (640, ("q5_0", "q5_0"), ("q5_1", "q5_1")),
    "attn_k": (640, ("q5_0", "q5_0"), ("q5_1", "q5_1")),
    "attn_v": (640, ("q8_0", "q5_0"), ("q8_0", "q5_1")),
    "attn_output": (1024, ("q4_k", "q4_k"), ("q5_k", "q5_k")),
    "ffn_gate": (640, ("q5_0", "q5_0"), ("q5_1", "q5_1")),
    "ffn_up": (640, ("q5_0", "q5_0"), ("q5_1", "q5_1")),
    "ffn_down": (2048, ("q6_k", "q4_k"), ("q6_k", "q5_k")),
}


def test_a_model_of_short_rows_gets_what_llama_cpp_gives_it() -> None:
    q4_k_m, q5_k_m = preset("q4_k_m", 18), preset("q5_k_m", 18)
    for role, (n, *expected) in GEMMA_3_270M.items():
        for recipe, forms in zip((q4_k_m, q5_k_m), expected, strict=True):
            for layer in [None] if role == "token_embd" else range(18):
                name = forms[0 if layer is None or layer in MORE_BITS[18] else 1]
                assert choose(recipe, role, layer, (256, n)).format.name == name


def test_the_default_of_the_embedding_falls_back_too() -> None:
    assert names(choose(preset("q4_0", 4), "token_embd", None, (100, 96))) == ("q8_0", "q6_k")


@pytest.mark.parametrize(("name", "embedding"), [("Q4_0", None), ("", None), ("q3_k_m", None), ("q4_0", "int8")])
def test_an_unknown_preset_is_refused_with_the_list(name: str, embedding: str | None) -> None:
    with pytest.raises(ValueError, match=r"unknown (preset|format) '.*f32, f16, bf16, q8_0, "):
        preset(name, 4, embedding)


# --- recipe files

FILE: dict[str, Any] = {
    "bezel_recipe": 1,
    "name": "mine",
    "default": "q4_0",
    "rules": [
        {"tensor": r"blk\.[12]\.ffn_up\.weight", "format": "q8_0"},
        {"role": ["ffn_up", "ffn_down"], "layers": "0, 2-3", "format": "q5_k"},
        {"layers": 3, "format": "f16"},
        {"role": "token_embd", "format": "q6_k"},
    ],
}


def test_the_first_rule_that_matches_decides() -> None:
    recipe = parse(FILE, "file")
    assert recipe.name == "mine"
    expected = {"token_embd.weight": "q6_k", "blk.1.ffn_up.weight": "q8_0", "blk.2.ffn_up.weight": "q8_0"}
    expected |= {f"blk.{i}.ffn_down.weight": "q5_k" for i in (0, 2, 3)}
    expected |= {f"blk.{i}.ffn_up.weight": "q5_k" for i in (0, 3)}
    expected |= {f"blk.3.{role}.weight": "f16" for role in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate")}
    for spec in MATRICES:
        found = recipe.choose(spec.gguf, spec.role, spec.layer, WIDE).format.name
        assert found == expected.get(spec.gguf, "q4_0"), spec.gguf


def test_a_recipe_is_what_it_says() -> None:
    recipe = parse(FILE, "file")
    assert parse(json.loads(json.dumps(recipe.to_json())), "") == recipe
    rules = (Rule(Q8_0, frozenset({"attn_q"}), frozenset({0, 1, 2, 5, 7, 8}), ".*"), Rule(Q6_K, None, frozenset({9})))
    recipe = Recipe("x", Q4_0, rules)
    assert recipe.to_json()["rules"][0]["layers"] == "0-2, 5, 7-8"
    assert parse(recipe.to_json(), "") == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bezel_recipe": 2}, "key 'bezel_recipe': found 2, expected 1"),
        ({"defualt": "q4_0"}, "key 'defualt' is unknown: expected of bezel_recipe, default, name, rules"),
        ({"default": "q4_k_m"}, "key 'default': found 'q4_k_m', expected one of f32, "),
        ({"default": ["q4_0"]}, r"key 'default': found \['q4_0'\]"),
        ({"name": "q4_0"}, "key 'name': found 'q4_0', expected a text that is no preset's name"),
        ({"name": 3}, "key 'name': found 3"),
        ({"rules": {}}, "key 'rules': found {}, expected a list"),
        ({"rules": ["q4_0"]}, "rule 1: found 'q4_0', expected an object"),
        ({"rules": [{"role": "attn_q"}]}, "rule 1: key 'format' is missing"),
        ({"rules": [{"format": "q4_0"}]}, "rule 1: expected a 'role', 'layers' or 'tensor'"),
        ({"rules": [{"role": [], "format": "q4_0"}]}, r"rule 1: key 'role': found \[\]"),
        ({"rules": [{"role": "x", "format": "q4"}]}, "rule 1: key 'format': found 'q4'"),
        ({"rules": [{"role": "x", "layer": 1, "format": "q4_0"}]}, "rule 1: key 'layer' is unknown"),
        ({"rules": [{"tensor": "(", "format": "q4_0"}]}, r"rule 1: key 'tensor': found '\(', expected a regular"),
        ({"rules": [{"tensor": 3, "format": "q4_0"}]}, "rule 1: key 'tensor': found 3, expected a regular"),
        *(
            ({"rules": [{"layers": layers, "format": "q4_0"}]}, "rule 1: key 'layers': found .*, expected a number, or")
            for layers in ("", "1-", "-1", "3-1", "1,,2", [1], 1.5, -1, "a")
        ),
    ],
)
def test_what_a_recipe_file_may_not_say(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(FILE | change))
    with pytest.raises(InvalidRequest, match=f"r.json: {message}"):
        find_recipe(str(tmp_path / "r.json"), CONFIG)


def test_finding_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(FILE))
    assert find_recipe(str(path), CONFIG) == parse(FILE, "")
    assert find_recipe("q4_k_m", CONFIG) == preset("q4_k_m", 4)
    assert find_recipe("q4_k", CONFIG, "q8_0") == preset("q4_k", 4, "q8_0")
    with pytest.raises(InvalidRequest, match="leave --embedding out"):
        find_recipe(str(path), CONFIG, "q8_0")
    with pytest.raises(InvalidRequest, match=r"unknown preset 'q4_k_l': expected one of .*, or the path of a recipe"):
        find_recipe("q4_k_l", CONFIG)
    with pytest.raises(InvalidRequest, match=r"none\.json: No such file"):
        find_recipe("none.json", CONFIG)
    path.write_text("{")
    with pytest.raises(InvalidRequest, match=r"r\.json: not valid JSON"):
        find_recipe(str(path), CONFIG)


@pytest.mark.parametrize("rule", [{"role": "attn_w"}, {"layers": 4}, {"tensor": "ffn_up"}, {"role": "ffn_norm"}])
def test_a_rule_for_nothing_is_refused(rule: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(FILE | {"rules": [FILE["rules"][0], rule | {"format": "q8_0"}]}))
    with pytest.raises(InvalidRequest, match="rule 2 is for no matrix of this model, which has the roles token_embd, "):
        find_recipe(str(tmp_path / "r.json"), CONFIG)


# --- the best mix for a size


@pytest.mark.parametrize("seed", range(8))
def test_no_mix_is_better(seed: int) -> None:
    """Against every mix that fits."""
    rng = np.random.default_rng(seed)
    groups = [[Option(int(rng.integers(1, 40)) * 1000, rng.random()) for _ in range(3)] for _ in range(6)]
    for budget in (60_000, 90_000, 130_000, 1_000_000):
        mixes = [list(zip(groups, mix, strict=True)) for mix in itertools.product(range(3), repeat=6)]
        fitting = [mix for mix in mixes if sum(options[i].size for options, i in mix) <= budget]
        if not fitting:
            with pytest.raises(ValueError, match=f"{budget} bytes, but the smallest mix has "):
                best_mix(groups, budget)
            continue
        found = best_mix(groups, budget)
        assert sum(options[i].size for options, i in zip(groups, found, strict=True)) <= budget
        cost = sum(options[i].cost for options, i in zip(groups, found, strict=True))
        assert cost == pytest.approx(min(sum(options[i].cost for options, i in mix) for mix in fitting))


def test_sizes_without_a_common_divisor() -> None:
    """Rounded up, but never past the budget, and the smallest mix is found even where that alone fits exactly."""
    groups = [[Option(10**9 + 7, 1.0), Option(2 * 10**9 + 11, 0.0)] for _ in range(3)]
    assert best_mix(groups, 3 * 10**9 + 21) == [0, 0, 0]
    assert sorted(best_mix(groups, 4 * 10**9 + 10**6)) == [0, 0, 1]


def sensitivity_file(path: Path, by: str = "tensor", formats: tuple[str, ...] = ("q4_0", "q8_0")) -> Path:
    """Costs that grow with what a format leaves out; blk.2.ffn_up suffers most."""
    groups: dict[Any, list[Any]] = {}
    for spec in MATRICES:
        groups.setdefault(spec.gguf if by == "tensor" else spec.role, []).append(spec)
    entries = [
        {"tensors": [spec.gguf for spec in specs], "format": name, "role": specs[0].role, "layer": specs[0].layer}
        | {"kld": (100 if specs[0].gguf == "blk.2.ffn_up.weight" else 1 + i) / bits(FORMATS[name]) ** 2}
        for i, specs in enumerate(groups.values())
        for name in formats
    ]
    path.write_text(json.dumps({"bezel_sensitivity": 1, "entries": entries}))
    return path


def test_a_target_is_met_and_used_up(tmp_path: Path) -> None:
    """To the last: no matrix that is still small could be larger."""
    weights = sum(int(np.prod(spec.shape)) for spec in tensor_specs(CONFIG))
    file = sensitivity_file(tmp_path / "s.json")
    for target in (5.0, 6.5, 7.9):
        recipe = solve_bits(file, CONFIG, target)
        chosen = {spec: recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape) for spec in tensor_specs(CONFIG)}
        assert all(choice.format is choice.wanted for choice in chosen.values())
        room = target * weights - sum(int(np.prod(spec.shape)) * bits(c.format) for spec, c in chosen.items())
        small = [int(np.prod(spec.shape)) for spec, choice in chosen.items() if choice.format is Q4_0]
        assert 0 <= room < 4 * min(small)
        assert recipe.choose("blk.2.ffn_up.weight", "ffn_up", 2, (96, 64)).format is Q8_0
    assert solve_bits(file, CONFIG, 9) == Recipe("9 bits", Q8_0)
    with pytest.raises(InvalidRequest, match=r"4.4 bits: the matrices would have to fit in .* than q4_0, q8_0"):
        solve_bits(file, CONFIG, 4.4)


def test_groups_stay_together(tmp_path: Path) -> None:
    recipe = solve_bits(sensitivity_file(tmp_path / "s.json", "role"), CONFIG, 6.0)
    assert all(rule.layers is None for rule in recipe.rules)
    assert {rule.format for rule in recipe.rules} | {recipe.default} == {Q4_0, Q8_0}


def test_a_file_size_counts_all_of_the_file(tmp_path: Path) -> None:
    file = sensitivity_file(tmp_path / "s.json")

    def size_of(recipe: Recipe) -> int:
        chosen = ((spec, recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape)) for spec in MATRICES)
        return 100_000 + sum(int(np.prod(spec.shape)) * int(2 * bits(c.format)) // 16 for spec, c in chosen)

    for overhead in (0, 60_000):
        recipe = solve_size(file, CONFIG, 400_000, lambda r, more=overhead: size_of(r) + more)  # type: ignore[misc]
        rest = solve(file, CONFIG, 300_000 - overhead, "0.4 MB")
        assert size_of(recipe) + overhead <= 400_000
        assert recipe == rest
    with pytest.raises(InvalidRequest, match="the smallest mix has"):
        solve_size(file, CONFIG, 200_000, size_of)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(bezel_sensitivity=2), "key 'bezel_sensitivity': found 2"),
        (lambda d: d.update(entries={}), "key 'bezel_sensitivity': found 1"),
        (lambda d: d["entries"][0].update(format="q9"), "entry 0: found"),
        (lambda d: d["entries"][3].update(kld=None), "entry 3: found"),
        (lambda d: d["entries"][3].update(kld=float("nan")), "entry 3: found"),
        (lambda d: d["entries"][1].update(tensors=["blk.7.attn_q.weight"]), "entry 1: found"),
        (lambda d: d["entries"].pop(0) and d["entries"].pop(0), r"tensor 'token_embd.weight' appears in 0 groups"),
        (
            lambda d: d["entries"].append(d["entries"][0] | {"tensors": ["token_embd.weight", "blk.0.attn_q.weight"]}),
            "tensor 'token_embd.weight' appears in 2 groups",
        ),
    ],
)
def test_a_sensitivity_file_of_something_else_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    file = sensitivity_file(tmp_path / "s.json")
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(InvalidRequest, match=rf"s.json: {message}.*expected a file that `bezel sensitivity"):
        solve(file, CONFIG, 10**6, "x")
