"""Recipes: which format each tensor of a model gets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .formats import F16, F32, FORMATS, IQ4_XS, Q4_K, Q5_K, Q6_K, Format

HEAD_ROLES = ("token_embd", "output")  # a tied token_embd is also the head


def bits(form: type[Format]) -> float:
    """Bits a weight."""
    return 8 * form.block_bytes / form.block


PLAIN = tuple(form.name for form in sorted(FORMATS.values(), key=bits, reverse=True))
_MIXED = {"q5_k_m": Q5_K, "q4_k_m": Q4_K, "int4": IQ4_XS}
PRESETS: tuple[str, ...] = (*PLAIN, *_MIXED)


@dataclass(frozen=True)
class Choice:
    """The format a tensor gets and the one its recipe wanted; they differ where a row is not whole blocks."""

    format: type[Format]
    wanted: type[Format]


@dataclass(frozen=True)
class Rule:
    """A format for the tensors that have one of the roles, lie in one of the layers and match the pattern.

    What is None asks for nothing. `tensor` is a regular expression for the whole name in GGUF, "blk.0.attn_q.weight".
    """

    format: type[Format]
    roles: frozenset[str] | None = None
    layers: frozenset[int] | None = None
    tensor: str | None = None

    def matches(self, name: str, role: str, layer: int | None) -> bool:
        return (
            (self.roles is None or role in self.roles)
            and (self.layers is None or layer in self.layers)
            and (self.tensor is None or re.fullmatch(self.tensor, name) is not None)
        )


@dataclass(frozen=True)
class Recipe:
    """The first rule that matches a tensor says its format; `default` is for those that none matches."""

    name: str
    default: type[Format]
    rules: tuple[Rule, ...] = ()

    def choose(self, name: str, role: str, layer: int | None, shape: tuple[int, ...]) -> Choice:
        """The format for a tensor of this name in GGUF, role ("attn_q", "token_embd", …) and shape (outputs, inputs).

        One-dimensional tensors, Gemma's norms, are always F32. Where a row is not whole blocks of the wanted format,
        that format's fallback takes its place, else F16, as in llama.cpp: larger, never coarser. Callers announce it.
        """
        if len(shape) == 1:
            return Choice(F32, F32)
        wanted = next((rule.format for rule in self.rules if rule.matches(name, role, layer)), self.default)
        fits = next(f for f in (wanted, wanted.fallback, F16) if f is not None and shape[-1] % f.block == 0)
        return Choice(fits, wanted)

    def to_json(self) -> dict[str, Any]:
        """What `parse` reads."""
        rules: list[dict[str, Any]] = []
        for rule in self.rules:
            roles = {} if rule.roles is None else {"role": sorted(rule.roles)}
            layers = {} if rule.layers is None else {"layers": _ranges(rule.layers)}
            tensor = {} if rule.tensor is None else {"tensor": rule.tensor}
            rules.append(roles | layers | tensor | {"format": rule.format.name})
        return {"bezel_recipe": 1, "name": self.name, "default": self.default.name, "rules": rules}


def preset(name: str, n_layers: int, embedding: str | None = None) -> Recipe:
    """The recipe of a preset for a model of so many layers; `embedding` is the format of embedding and head instead.

    A plain preset is one format; embedding and head are Q6_K where that is larger, because the head is the matrix
    that suffers most from quantizing. "q4_k_m" and "q5_k_m" are llama.cpp's mixes for Gemma: half of `attn_v` and
    `ffn_down` are Q6_K. "int4" is bezel's own: the exporter adds what fits, or gives the head no more where even that
    does not.

    Raises ValueError for an unknown preset or embedding format.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset '{name}': expected one of {', '.join(PRESETS)}")
    if embedding is not None and embedding not in FORMATS:
        raise ValueError(f"unknown format '{embedding}': expected one of {', '.join(FORMATS)}")
    default = _MIXED[name] if name in _MIXED else FORMATS[name]
    head = Q5_K if name == "int4" else Q6_K
    rules: list[Rule] = []
    if embedding is not None:
        rules.append(Rule(FORMATS[embedding], frozenset(HEAD_ROLES)))
    elif bits(default) < bits(head):
        rules.append(Rule(head, frozenset(HEAD_ROLES)))
    if name.endswith("_k_m"):
        rules.append(Rule(Q6_K, frozenset({"attn_v", "ffn_down"}), _more_bits(n_layers)))
    return Recipe(name, default, tuple(rules))


def _more_bits(n_layers: int) -> frozenset[int]:
    """The layers that llama.cpp's mixes favour: the first and the last eighth, and a third of those between."""
    n = n_layers // 8
    return frozenset(i for i in range(n_layers) if i < n or i >= 7 * n_layers // 8 or (i - n) % 3 == 2)


def parse(found: Mapping[str, Any], name: str) -> Recipe:
    """A recipe from the content of a recipe file; `name` is its name where it does not say one.

    Raises ValueError, saying which key has what and what was expected.
    """
    _check_keys("", found, {"bezel_recipe", "name", "default", "rules"}, {"bezel_recipe", "default"})
    if found["bezel_recipe"] != 1:
        raise ValueError(f"key 'bezel_recipe': found {found['bezel_recipe']!r}, expected 1, the version that is known")
    name = found.get("name", name)
    if not isinstance(name, str) or not name or name in PRESETS:
        raise ValueError(f"key 'name': found {name!r}, expected a text that is no preset's name")
    rules = found.get("rules", [])
    if not isinstance(rules, list):
        raise ValueError(f"key 'rules': found {rules!r}, expected a list")
    parsed = tuple(_parse_rule(rule, f"rule {i}: ") for i, rule in enumerate(rules, 1))
    return Recipe(name, _parse_format("", "default", found["default"]), parsed)


def _parse_rule(rule: Any, where: str) -> Rule:
    if not isinstance(rule, dict):
        raise ValueError(f"{where}found {rule!r}, expected an object")
    _check_keys(where, rule, {"role", "layers", "tensor", "format"}, {"format"})
    roles = rule.get("role")
    if isinstance(roles, str):
        roles = [roles]
    if roles is not None and not (isinstance(roles, list) and roles and all(isinstance(r, str) for r in roles)):
        raise ValueError(f"{where}key 'role': found {roles!r}, expected a role or a list of roles")
    tensor = rule.get("tensor")
    try:
        re.compile(tensor or "")
    except (TypeError, re.error) as error:
        raise ValueError(
            f"{where}key 'tensor': found {tensor!r}, expected a regular expression for the name ({error})"
        ) from None
    if not rule.keys() & {"role", "layers", "tensor"}:
        raise ValueError(f"{where}expected a 'role', 'layers' or 'tensor'; what is for all tensors is the 'default'")
    form = _parse_format(where, "format", rule["format"])
    return Rule(form, None if roles is None else frozenset(roles), _parse_layers(where, rule.get("layers")), tensor)


def _check_keys(where: str, found: Mapping[str, Any], known: set[str], needed: set[str]) -> None:
    for key in needed - found.keys():
        raise ValueError(f"{where}key '{key}' is missing")
    for key in found.keys() - known:
        raise ValueError(f"{where}key '{key}' is unknown: expected of {', '.join(sorted(known))}")


def _parse_format(where: str, key: str, name: Any) -> type[Format]:
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"{where}key '{key}': found {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _parse_layers(where: str, layers: Any) -> frozenset[int] | None:
    """A number, or ranges as text: "0-3, 7"."""
    if layers is None:
        return None
    out: set[int] = set()
    for part in str(layers).split(",") if isinstance(layers, (int, str)) else [""]:
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{where}key 'layers': found {layers!r}, expected a number, or ranges such as \"0-3, 7\"")
        out |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(out)


def _ranges(layers: frozenset[int]) -> str:
    """0, 1, 2, 7 → "0-2, 7"."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and i == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], i]
        else:
            runs.append([i])
    return ", ".join("-".join(map(str, run)) for run in runs)
