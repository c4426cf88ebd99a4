"""Which recipe an export follows: a preset, a recipe file, or the best mix for a size, from measured sensitivities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..quant.formats import FORMATS, Q5_K, Format
from ..quant.mix import Option, best_mix
from ..quant.recipes import PRESETS, Recipe, Rule, parse, preset
from ..runtime.errors import InvalidRequest
from ..runtime.files.strict_json import parse_json
from ..runtime.model.config import ModelConfig
from ..runtime.model.tensors import TensorSpec, tensor_specs

_INT4_MOST = 4.6  # bits a weight that int4 promises
_INT4_BITS = 4.58  # that it fills up: in Gemma 2 2B the vocabulary takes .02
# Where int4 spends the bits that IQ4_XS and a head in Q5_K leave: the most loss a bit takes off first.
_MORE = (("attn_v", Q5_K), ("attn_k", Q5_K), ("ffn_down", Q5_K))


def find_recipe(given: str, config: ModelConfig, embedding: str | None = None) -> Recipe:
    """The recipe that `--quant` names: a preset, or else the path of a recipe file.

    Every rule of a file must be for some matrix of the model. Raises InvalidRequest.
    """
    recipe = find_recipe_of(tensor_specs(config), config.n_layers, given, embedding)
    if given != "int4":
        return recipe
    if embedding is None and _bits(recipe, config) > _INT4_MOST:  # the head is too much of the model
        recipe = replace(recipe, rules=())
    return _filled(recipe, config)


def find_recipe_of(specs: Iterable[TensorSpec], n_layers: int, given: str, embedding: str | None = None) -> Recipe:
    """`find_recipe` for tensors of any kind, without what int4 fills up."""
    if given in PRESETS or not (Path(given).exists() or given.endswith(".json")):
        try:
            return preset(given, n_layers, embedding)
        except ValueError as error:
            raise InvalidRequest(f"{error}{'' if given in PRESETS else ', or the path of a recipe file'}") from None
    if embedding is not None:
        raise InvalidRequest(f"{given}: a recipe file says itself what the embedding gets; leave --embedding out")
    path = Path(given)
    try:
        recipe = parse(_read(path), path.stem)
    except ValueError as error:
        raise InvalidRequest(f"{path}: {error}") from None
    matrices = [spec for spec in specs if spec.is_matrix]
    for i, rule in enumerate(recipe.rules, 1):
        if not any(rule.matches(spec.gguf, spec.role, spec.layer) for spec in matrices):
            roles = ", ".join(dict.fromkeys(spec.role for spec in matrices))
            raise InvalidRequest(
                f"{path}: rule {i} is for no matrix of this model, which has the roles {roles} and layers 0 to "
                f"{n_layers - 1}"
            )
    return recipe


def _filled(recipe: Recipe, config: ModelConfig) -> Recipe:
    """The recipe with `_MORE` for as many layers as fit in _INT4_BITS."""
    specs = list(tensor_specs(config))
    room = (_INT4_BITS - _bits(recipe, config)) / 8 * sum(math.prod(spec.shape) for spec in specs)
    rules = []
    for role, form in _MORE:
        layers: set[int] = set()
        for spec in specs:
            more = _size(spec, Recipe("", form)) - _size(spec, recipe)
            if spec.role == role and spec.layer is not None and 0 < more <= room:
                room -= more
                layers.add(spec.layer)
        if layers:
            rules.append(Rule(form, frozenset({role}), frozenset(layers)))
    return replace(recipe, rules=(*rules, *recipe.rules))


def _bits(recipe: Recipe, config: ModelConfig) -> float:
    """Bits a weight, over all tensors."""
    specs = list(tensor_specs(config))
    return 8 * sum(_size(spec, recipe) for spec in specs) / sum(math.prod(spec.shape) for spec in specs)


def _size(spec: TensorSpec, recipe: Recipe) -> int:
    return matrix_bytes(spec, recipe.choose(spec.gguf, spec.role, spec.layer, spec.shape).format)


def solve(sensitivities: Path, config: ModelConfig, budget: int, name: str) -> Recipe:
    """The recipe whose matrices take at most `budget` bytes and, by the sensitivity file, lose least together.

    The losses of tensors that are rounded alone are taken to add up. Only formats that were measured are used.
    Raises InvalidRequest.
    """
    specs = {spec.gguf: spec for spec in tensor_specs(config) if spec.is_matrix}
    costs = _read_costs(sensitivities, specs)
    choices: list[tuple[list[TensorSpec], list[type[Format]], list[Option]]] = []
    for names, by_format in costs.items():
        group = [specs[tensor] for tensor in names]
        forms = [form for form in by_format if all(spec.shape[-1] % form.block == 0 for spec in group)]
        options = [Option(sum(matrix_bytes(spec, form) for spec in group), by_format[form]) for form in forms]
        choices.append((group, forms, options))
    try:
        best = best_mix([options for _, _, options in choices], budget)
    except ValueError as error:
        formats = ", ".join(dict.fromkeys(form.name for _, forms, _ in choices for form in forms))
        raise InvalidRequest(
            f"{name}: the matrices would have to fit in {error}; ask for more, or measure the sensitivity to smaller "
            f"formats than {formats}"
        ) from None
    found = {spec: forms[i] for (group, forms, _), i in zip(choices, best, strict=True) for spec in group}
    return _as_rules(found, name)


def solve_bits(sensitivities: Path, config: ModelConfig, bits_per_weight: float) -> Recipe:
    """`solve` for bits a weight, over all tensors."""
    specs = list(tensor_specs(config))
    norms = sum(4 * math.prod(spec.shape) for spec in specs if spec.is_norm)
    budget = math.floor(bits_per_weight * sum(math.prod(spec.shape) for spec in specs) / 8) - norms
    return solve(sensitivities, config, budget, f"{bits_per_weight:g} bits")


def solve_size(sensitivities: Path, config: ModelConfig, size: int, size_of: Callable[[Recipe], int]) -> Recipe:
    """`solve` for a file of at most `size` bytes; `size_of` tells how many the file of a recipe has."""
    budget = size
    while True:
        recipe = solve(sensitivities, config, budget, f"{size / 1e6:.4g} MB")
        excess = size_of(recipe) - size
        if excess <= 0:
            return recipe
        budget -= excess


def matrix_bytes(spec: TensorSpec, form: type[Format]) -> int:
    return math.prod(spec.shape[:-1]) * form.row_bytes(spec.shape[-1])


def _as_rules(found: Mapping[TensorSpec, type[Format]], name: str) -> Recipe:
    """The most frequent format as the default, and a rule for each role and other format."""
    default = Counter(found.values()).most_common(1)[0][0]
    layers: dict[tuple[str, type[Format]], set[int | None]] = {}
    for spec, form in found.items():
        if form is not default:
            layers.setdefault((spec.role, form), set()).add(spec.layer)
    rules = []
    for (role, form), these in layers.items():
        everywhere = these == {spec.layer for spec in found if spec.role == role}
        numbers = None if everywhere else frozenset(layer for layer in these if layer is not None)
        rules.append(Rule(form, frozenset({role}), numbers))
    return Recipe(name, default, tuple(rules))


def _read_costs(path: Path, specs: Mapping[str, TensorSpec]) -> dict[tuple[str, ...], dict[type[Format], float]]:
    """Mean KLD by tensors that belong together and format, of every matrix of the model once."""
    found = _read(path)

    def fail(what: str) -> InvalidRequest:
        return InvalidRequest(f"{path}: {what}; expected a file that `bezel sensitivity --out` wrote of this model")

    if found.get("bezel_sensitivity") != 1 or not isinstance(found.get("entries"), list):
        raise fail(f"key 'bezel_sensitivity': found {found.get('bezel_sensitivity')!r}")
    costs: dict[tuple[str, ...], dict[type[Format], float]] = {}
    for i, entry in enumerate(found["entries"]):
        try:
            names, form, kld = tuple(entry["tensors"]), FORMATS[entry["format"]], float(entry["kld"])
            known = all(tensor in specs for tensor in names) and math.isfinite(kld)
        except (TypeError, KeyError, ValueError):
            known = False
        if not known:
            raise fail(f"entry {i}: found {str(entry)[:200]}")
        costs.setdefault(names, {})[form] = kld
    counted = Counter(tensor for names in costs for tensor in names)
    for tensor in specs:
        if counted[tensor] != 1:
            raise fail(f"tensor '{tensor}' appears in {counted[tensor]} groups")
    return costs


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}; expected a JSON file") from None
    return parse_json(text, lambda reason: InvalidRequest(f"{path}: {reason}"))
