"""The command `bezel pull`."""

from __future__ import annotations

import click

from ...quant.recipes import PRESETS
from ...runtime.commands.model_path import complete_name
from ...runtime.errors import InvalidRequest
from ...runtime.files.models import RepoName
from .export import print_summary
from .progress import download_line, progress_bar


@click.command()
@click.argument("name", metavar="OWNER/REPO[:TAG]", shell_complete=complete_name)
@click.option(
    "--quant",
    metavar="PRESET|FILE",
    callback=lambda _context, _parameter, name: name.lower() if name and name.lower() in PRESETS else name,
    help="What a checkpoint is exported to, as `bezel export` has it.  [default: q4_k_m, which of the presets of about "
    "4 bits loses least, and which other programs read, too]",
)
@click.option("--revision", help="A branch, a tag or a commit of the repository.  [default: main]")
@click.option("--keep", is_flag=True, help="Keep the checkpoint, as OWNER/REPO:checkpoint.")
def pull(name: str, quant: str | None, revision: str | None, keep: bool) -> None:
    """Fetch a model from the Hugging Face Hub, to be used by its name.

    A checkpoint is exported to a GGUF file, and then removed; TAG may be a preset, instead of --quant. GGUF files are
    fetched as they are; TAG says which of several, such as Q4_K_M. A model that sees comes with its vision tower,
    mmproj: of several that in F16, else BF16, Q8_0 or F32. All that comes is checked by its hash. Broken off, the same
    command goes on where it was; once all is there, it looks for a newer version.

    Some licences must be accepted on the hub first, Gemma's for instance. Who you are is then told by a token, in the
    environment variable HF_TOKEN or from `hf auth login`.

    \b
    Examples:
      bezel pull google/gemma-3-1b-it
      bezel pull google/gemma-3-1b-it --quant q8_0 --keep
      bezel pull somebody/gemma-3-1b-it-GGUF:Q4_K_M
      bezel run google/gemma-3-1b-it "Why is the sky blue?"
    """
    wanted = RepoName.parse(name)
    try:
        from ..hub.pull import pull as run
    except ModuleNotFoundError as error:
        if error.name not in ("huggingface_hub", "httpx2"):
            raise
        raise InvalidRequest("bezel pull needs the package huggingface_hub: pip install 'bezel-lm[hub]'") from None
    try:
        pulled = run(wanted, quant, revision, keep, click.echo, download_line, progress_bar)
    except KeyboardInterrupt:
        click.echo("\nstopped; the same command goes on from here", err=True)
        raise SystemExit(130) from None
    if pulled.summary is not None:
        print_summary(pulled.summary)
    click.echo(f"{pulled.model.name}: {'ready' if pulled.is_new else 'was there, and is the newest'}")
