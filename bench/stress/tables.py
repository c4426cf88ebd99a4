"""The tables of `bezel stress` for people."""

from __future__ import annotations

import click

from ..loss.tables import print_table, with_interval
from .result import ORIGIN, Search, Stress, Stressed, shown_name

_WORST = 5
_NONE = 1e-6  # nats a token; less is rounding of what is equal


def show(result: Stress) -> None:
    """Print what was found: each parameter alone, the worst poses, and whether candidates suffer alike."""
    click.echo(
        f"{len(result.poses)} poses of {result.passages} passages of {result.chunk} tokens; "
        f"± the longer side of the {result.confidence:.0%} confidence interval"
    )
    click.echo(f"reference: {result.reference.name}, {result.reference.setting}")
    for candidate in result.candidates:
        alone = [{}, *({name: level} for name, some in result.levels.items() for level in some)]
        click.echo(f"\n{candidate.name}, {candidate.setting}: one parameter turned")
        _show_poses(result, candidate, [result.find(turned) for turned in alone])
        click.echo(f"\n{candidate.name}: the worst of all poses")
        _show_poses(result, candidate, candidate.ranked[:_WORST])
    if result.transfer:
        click.echo("\nDo the same poses hurt both? Rank correlation of their losses, 1 where they rank alike")
        for pair in result.transfer:
            click.echo(f"  {pair.a} and {pair.b}: {pair.rank_correlation:.2f}")


def show_search(result: Search) -> None:
    """Print what the changed passages cost every candidate, and for each the passage that was hurt most."""
    passages = len(next(iter(result.found.values())))
    click.echo(
        f"{passages} passages of {result.chunk} tokens, moved at most {100 * result.distance:g} %; random: as far in "
        f"the same places, {result.draws} draws; ± the longer side of the {result.confidence:.0%} confidence interval"
    )
    click.echo(f"reference: {result.reference.name}, {result.reference.setting}\n")
    rows = []
    for toll in result.tolls:
        figures = [with_interval(x, "{:.4f}") for x in (toll.plain, toll.random, toll.random_worst, toll.found)]
        rows.append([f"{toll.searched}, {toll.measured}", *figures, with_interval(toll.flips, "{:.1f}", 100)])
    heads = ["searched for, measured", "as it is", "random", "worst random", "found", "other top, %"]
    print_table(heads, rows)
    for place, (name, found) in enumerate(result.found.items()):
        worst = max(found, key=lambda passage: passage.losses[place].found)
        loss = worst.losses[place]
        click.echo(f"\n{name}, from {loss.plain:.4f} to {loss.found:.4f}, moved by {100 * worst.distance:.1f} %:")
        for at, after in zip(worst.places, worst.after, strict=True):
            before = "".join(worst.before[max(1, at - 6) : at]).replace("▁", " ")
            click.echo(f"  …{before!r} {worst.before[at]!r} → {after!r}")


def _show_poses(result: Stress, candidate: Stressed, poses: list[int]) -> None:
    rows = []
    for i in poses:
        loss, plain = candidate.losses[i], candidate.losses[ORIGIN].kld.value
        rows.append(
            [
                shown_name(result.poses[i]),
                with_interval(loss.kld, "{:.5f}"),
                f"{loss.kld.value / plain:.2f} ×" if plain >= _NONE else "",
                with_interval(loss.flips, "{:.1f}", 100),
                f"{result.poses[i].perplexity.value:,.4g}",
            ]
        )
    print_table(["pose", "mean KLD", "of plain", "other top, %", "reference's perplexity"], rows)
