"""The tables of `bezel stress` for people."""

from __future__ import annotations

import click

from ..loss.tables import print_table, with_interval
from .result import ORIGIN, Stress, Stressed, pose_name

_WORST = 5


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
        ranked = sorted(range(len(result.poses)), key=lambda i: -candidate.losses[i].kld.value)
        click.echo(f"\n{candidate.name}: the worst of all poses")
        _show_poses(result, candidate, ranked[:_WORST])
    if result.transfer:
        click.echo("\nDo the same poses hurt both? Rank correlation of their losses, 1 where they rank alike")
        for pair in result.transfer:
            click.echo(f"  {pair.a} and {pair.b}: {pair.rank_correlation:.2f}")


def _show_poses(result: Stress, candidate: Stressed, poses: list[int]) -> None:
    rows = []
    for i in poses:
        loss, plain = candidate.losses[i], candidate.losses[ORIGIN].kld.value
        rows.append(
            [
                pose_name(result.poses[i].turned),
                with_interval(loss.kld, "{:.5f}"),
                f"{loss.kld.value / plain:.2f} ×" if plain else "",
                with_interval(loss.flips, "{:.1f}", 100),
                f"{result.poses[i].perplexity.value:,.4g}",
            ]
        )
    print_table(["pose", "mean KLD", "of plain", "other top, %", "reference's perplexity"], rows)
