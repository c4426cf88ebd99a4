"""The command `bezel inspect`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from ..cache.sizes import cache_sizes
from ..engines import bytes_for
from ..errors import InvalidRequest
from ..files.gguf import RECEIPT
from ..files.model_file import ModelFile, open_model
from ..files.vision_file import is_eye
from ..model.config import ModelConfig
from ..text.chat import template_is_known
from ..text.sampling import KEYS, Sampling, read_sampling
from .inspect_eye import eye_facts, facts_beside, print_beside, print_eye
from .inspect_facts import MIB, echo, print_formats, print_provenance, print_tensors, tensor_facts
from .model_path import MODEL


@click.command()
@click.argument("model", type=MODEL)
@click.option("--context", type=int, help="Show the memory for this many tokens.  [default: several]")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(model: Path, context: int | None, tensors: bool, as_json: bool) -> None:
    """Show what MODEL, a GGUF file or an exported ONNX folder, holds and how much memory it takes.

    MODEL may be a vision tower, too, mmproj-….gguf; that of a model is shown with it.

    \b
    Examples:
      bezel inspect gemma.gguf
      bezel inspect gemma.gguf --context 8192
      bezel inspect gemma.gguf --json
      bezel inspect mmproj-gemma.gguf
    """
    if is_eye(model):
        if context is not None:
            raise InvalidRequest("--context goes with models; a vision tower holds none")
        facts = eye_facts(model)
        click.echo(json.dumps(facts, indent=2)) if as_json else print_eye(facts, tensors)
        return
    with open_model(model) as file:
        config = file.config()
        file.check_tensors(config)
        if context is not None and not 1 <= context <= config.context_length:
            raise InvalidRequest(f"context: found {context}, expected 1 to {config.context_length}")
        facts = _facts(file, config, context) | file.facts()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts, tensors)


def _facts(file: ModelFile, config: ModelConfig, context: int | None) -> dict[str, Any]:
    engine = file.engines[0]
    sampling, _ = read_sampling(file.metadata)
    contexts = [context] if context else _contexts(config.context_length)

    def cache(kv: str) -> list[dict[str, int]]:
        return [cache_sizes(config.layers, n, kv, file.largest_chunk, bytes_for(engine)) for n in contexts]

    return {
        "file": str(file.path),
        "file_bytes": file.file_bytes,
        "name": name if isinstance(name := file.metadata.get("general.name"), str) else None,
        "family": config.family,
        "embedding_format": file.tensors["token_embd.weight"].format.name,
        "config": {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.layers[0].intermediate_size,
            "layers": config.n_layers,
            "query_heads": config.layers[0].n_heads,
            "kv_heads": config.layers[0].n_kv_heads,
            "head_dim": config.layers[0].head_dim,
            "context_length": config.context_length,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
            "attention_softcap": config.attn_softcap,
            "final_softcap": config.final_softcap,
            "rms_eps": config.rms_eps,
            "tied_head": config.tied_head,
        },
        "windows": [layer.window for layer in config.layers],
        "rope_bases": [layer.rope_base for layer in config.layers],
        "rope_factors": [layer.rope_factor for layer in config.layers],
        "cache": {kv: cache(kv) for kv in file.kv_types(engine)},
        "chat_template": _template(file),
        "sampling": {name: getattr(Sampling(**sampling), name) for name in KEYS},
        "receipt": _receipt(file),
        "vision": facts_beside(file.path, config.hidden_size) if "native" in file.engines else None,
    } | tensor_facts(file)


def _template(file: ModelFile) -> str | None:
    """Whose chat template the file has."""
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        return None
    return "Gemma's" if template_is_known(template) else "another than Gemma's, which stands in for it"


def _receipt(file: ModelFile) -> dict[str, Any] | None:
    """What was measured of the file; None where nothing was, or where what is there is not a receipt."""
    stored = {key.removeprefix(RECEIPT): value for key, value in file.metadata.items() if key.startswith(RECEIPT)}
    figures: dict[str, Any] = {key: v for key, v in stored.items() if isinstance(v, float) and math.isfinite(v)}
    if "kld_mean" not in figures:
        return None
    texts = {key: value.strip() for key, value in stored.items() if isinstance(value, str)}
    return figures | {key: v for key, v in stored.items() if type(v) is int} | texts


def _contexts(limit: int) -> list[int]:
    return sorted({min(limit, n) for n in (512, 2048, 4096, 8192, limit)})


def _print(facts: dict[str, Any], tensors: bool) -> None:
    echo(f"{facts['file']}: {facts['name'] or 'unnamed'} ({facts['family']})")
    print_formats(facts)
    echo(f"  embedding and head in {facts['embedding_format']}")
    if "onnx" in facts:
        _print_onnx(facts["onnx"])
    echo("\nConfig")
    for key, value in facts["config"].items():
        echo(f"  {key:<22} {value:g}" if isinstance(value, float) else f"  {key:<22} {value}")
    windows = facts["windows"]
    local = [i for i, window in enumerate(windows) if window]
    if local:
        sizes = sorted({window for window in windows if window})
        echo(f"  local layers           {_ranges(local)}, window {', '.join(map(str, sizes))}")
    echo(f"  global layers          {_ranges([i for i, w in enumerate(windows) if not w])}")
    echo("\nMemory for keys and values, MiB (rings on local layers; in brackets, all layers full)")
    echo(f"  {'context':>8}" + "".join(f"  {kv + ': local + global':>34}" for kv in facts["cache"]))
    for rows in zip(*facts["cache"].values(), strict=True):
        cells = [
            f"{r['local'] / MIB:.1f} + {r['global'] / MIB:.1f} = {r['total'] / MIB:.1f} [{r['full'] / MIB:.1f}]"
            for r in rows
        ]
        echo(f"  {rows[0]['context']:8}" + "".join(f"  {cell:>34}" for cell in cells))
    biggest = {kv: rows[-1] for kv, rows in facts["cache"].items()}
    needs = (
        f"{(facts['weight_bytes'] + row['total']) / MIB:,.0f} MiB with {kv} keys and values"
        for kv, row in biggest.items()
    )
    tokens = next(iter(biggest.values()))["context"]
    echo(f"  with the weights, {tokens} tokens take {', '.join(needs)}")
    echo("\nText")
    echo(f"  {'chat template':<22} {facts['chat_template'] or 'none: it continues text'}")
    chosen = (f"{name} {value:g}" for name, value in facts["sampling"].items())
    echo(f"  {'sampling':<22} {', '.join(chosen)}")
    print_beside(facts["vision"])
    print_provenance(facts)
    if facts["receipt"]:
        _print_receipt(facts["receipt"])
    if tensors:
        print_tensors(facts)


def _print_receipt(receipt: dict[str, Any]) -> None:
    """What a receipt says, in words; a part that is missing is left out."""
    echo(f"\nReceipt: measured against {receipt.get('reference') or 'a reference without a name'}")
    interval = " ({kld_mean_low:.4g} to {kld_mean_high:.4g})" if "kld_mean_low" in receipt else ""  # few chunks: none
    lines = (
        ("mean KLD", "{kld_mean:.4g} nats per token" + interval),
        ("99.9 % KLD", "{kld_p999:.4g}: one position in 1000 loses more"),
        ("same top token", "{top1:.2%} of positions"),
        ("perplexity", "{perplexity_ratio:.4f} times the reference's"),
        ("measured", "{date} by {tool}, {tokens:,} positions, {protocol}"),
        ("engine", "{engine}"),
        ("text", "sha256 {text_sha256}"),
        ("reference", "sha256 {reference_sha256}"),
    )
    for title, line in lines:
        try:
            echo(f"  {title:<22} {line.format_map(receipt)}")
        except (KeyError, ValueError):
            continue


def _print_onnx(onnx: dict[str, Any]) -> None:
    echo("\nONNX")
    eye = f", vision tower {onnx['vision']}" if onnx["vision"] else ""
    echo(f"  {'exported as':<22} {onnx['quant']}{eye}, for {onnx['target']}")
    echo(f"  {'operator sets':<22} {', '.join(f'{d} {v}' for d, v in onnx['opsets'].items())}")
    echo(f"  {'operators':<22} {', '.join(f'{n} {op}' for op, n in onnx['operators'].items())}")
    for name, size in onnx["files"].items():
        echo(f"  {name:<22} {size / MIB:,.1f} MiB")


def _ranges(numbers: list[int]) -> str:
    """0, 2, 4 as "0, 2, 4"; the middle of a long list is left out."""
    text = [str(n) for n in numbers]
    return ", ".join(text) if len(text) <= 8 else ", ".join([*text[:3], "…", text[-1]]) + f" ({len(text)})"
