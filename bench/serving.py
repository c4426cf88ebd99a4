"""A server under load, and next to llama.cpp's: `python -m bezel.bench.serving load MODEL`, `… compare MODEL`.

Load: many clients at once, some of whom leave; every answer is the one that the model gives alone, or its beginning.
Compare: tokens a second of 1, 2, 4, 8 and 16 clients, the time to the first token, the second turn of a long chat,
and the first token of a short prompt while a long one is read. llama.cpp's server comes with
`pip install 'llama-cpp-python[server]'`.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import httpx

from ..runtime.api import load
from ..runtime.files.models import find_model
from ..runtime.text.sampling import Sampling

_TALE = "There was once a miller who had three sons, a mill, a donkey and a cat; and when he died they shared it. "


@contextmanager
def served(model: Path, *options: str, peer: bool = False) -> Iterator[tuple[str, int]]:
    """The address and the process of a server of its own."""
    if peer:
        port = "8931"
        command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", port, *options]
    else:
        command = [sys.executable, "-m", "bezel", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr
            for line in process.stderr:
                if "http://" in line:
                    break
            else:
                raise click.ClickException(f"{' '.join(command)} ended")
            address = next(word for word in line.split() if word.startswith("http://"))
            yield address, process.pid
        finally:
            process.terminate()


async def ask(client: httpx.AsyncClient, prompt: str, leave_after: int | None = None, **options: Any) -> Any:
    """The text after a prompt, seconds until each of its pieces, and the last usage; a client may leave early."""
    body = {"prompt": prompt, "stream": True, "stream_options": {"include_usage": True}, **options}
    began, text, times, usage = time.perf_counter(), "", list[float](), None
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        if stream.status_code != 200:
            raise click.ClickException((await stream.aread()).decode())
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line[6:])
            usage = part.get("usage") or usage
            piece = "".join(choice["text"] for choice in part.get("choices", []))
            if piece:
                text += piece
                times.append(time.perf_counter() - began)
                if leave_after is not None and len(times) >= leave_after:
                    break
    return text, times, usage


def resident(pid: int) -> float:
    """MB that a process holds of its own."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


@click.group()
def main() -> None:
    """A server under load, and next to llama.cpp's."""


@main.command("load")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--clients", default=100, show_default=True)
@click.option("--seconds", default=600, show_default=True)
def load_test(model: Path, clients: int, seconds: int) -> None:
    """Many clients at once, a third of whom leave in the middle."""
    path = find_model(model)
    draw = random.Random(1)
    requests = []
    with load(path, kv="int8") as alone:
        for seed in range(60):
            content = _TALE * draw.choice([0, 1, 3, 8]) + draw.choice(["A story.", "A song.", f"Number {seed}."])
            tokens = draw.choice([5, 20, 80])
            expected = "".join(alone.generate(content, max_tokens=tokens, sampling=Sampling(seed=seed), raw=True))
            requests.append((content, seed, tokens, expected))
    counts = {"whole": 0, "left": 0, "wrong": 0}
    sizes: list[float] = []

    async def one(client: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            prompt, seed, tokens, expected = draw.choice(requests)
            leave = draw.randrange(1, 20) if draw.random() < 1 / 3 else None
            text, _, usage = await ask(client, prompt, leave, seed=seed, max_tokens=tokens, temperature=1.0)
            if usage is not None:
                counts["whole" if text == expected else "wrong"] += 1
            else:
                counts["left" if expected.startswith(text) else "wrong"] += 1

    async def all_of_them(address: str, pid: int) -> None:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            until = time.monotonic() + seconds
            working = [asyncio.create_task(one(client, until)) for _ in range(clients)]
            while not all(task.done() for task in working):
                await asyncio.sleep(seconds / 20)
                sizes.append(resident(pid))
            for task in working:
                task.result()
            click.echo(f"{counts}; memory at 20 moments, MB: {', '.join(f'{size:.0f}' for size in sizes)}")
            click.echo(f"left over: {(await client.get('/slots')).json()}")

    with served(path, "--kv", "int8", "--cache-ram", "64M") as (address, pid):
        asyncio.run(all_of_them(address, pid))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--vs/--alone", "versus", default=True, help="llama.cpp's server, too.")
@click.option("--clients", default="1,2,4,8,16", show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--long", "long_tokens", default=7000, show_default=True, help="Tokens of the long prompt.")
def compare(model: Path, versus: bool, clients: str, tokens: int, long_tokens: int) -> None:
    """Tokens a second, and times to the first token, of both."""
    path = find_model(model)
    sizes = [int(n) for n in clients.split(",")]
    with load(path) as alone:
        repeats = max(1, long_tokens // len(alone.tokenizer.encode(_TALE)))
    rows: dict[str, dict[str, float]] = {}
    sides: list[tuple[str, tuple[str, ...], bool]] = [("bezel", ("--kv", "int8", "--parallel", "16"), False)]
    if versus:
        sides.append(
            (
                "llama.cpp",
                ("--n_ctx", "16384", "--n_threads", "2", "--cache", "true", "--interrupt_requests", "false"),
                True,
            )
        )
    for name, options, peer in sides:
        rows[name] = {}
        with served(path, *options, peer=peer) as (address, _):
            try:
                asyncio.run(_measure(rows[name], address, sizes, tokens, repeats))
            except httpx.HTTPError as error:
                click.echo(f"{name} broke off: {error!r}")
    for what in rows["bezel"]:
        click.echo(
            f"{what:<55}" + "".join(f"{name} {row.get(what, float('nan')):>9.2f}   " for name, row in rows.items())
        )


async def _measure(found: dict[str, float], address: str, sizes: list[int], tokens: int, repeats: int) -> None:
    async with httpx.AsyncClient(base_url=address, timeout=3600) as client:
        await ask(client, "Hello", max_tokens=4)
        for n in sizes:
            speeds, firsts = [], []
            for again in range(3):
                began = time.perf_counter()
                prompts = (f"{again} {i}: a long story of a fox and a king." for i in range(n))
                answers = await asyncio.gather(
                    *(ask(client, p, max_tokens=tokens, seed=i, logit_bias={"1": -100}) for i, p in enumerate(prompts))
                )
                speeds.append(sum(len(times) for _, times, _ in answers) / (time.perf_counter() - began))
                firsts += [times[0] for _, times, _ in answers if times]
            found[f"{n} clients, pieces/s in all"] = statistics.median(speeds)
            found[f"{n} clients, s to the first"] = statistics.median(firsts)
        text, times, _ = await ask(client, _TALE * repeats, max_tokens=8)
        found["long prompt, s to the first"] = times[0]
        _, times, _ = await ask(client, f"{_TALE * repeats}{text} And then?", max_tokens=8)
        found["its second turn, s to the first"] = times[0]
        reading = asyncio.create_task(ask(client, f"Again. {_TALE * repeats}", max_tokens=2))
        await asyncio.sleep(0.5)
        _, times, _ = await ask(client, "Good day", max_tokens=2)
        found["short prompt meanwhile, s to the first"] = times[0]
        await reading


if __name__ == "__main__":
    main()
