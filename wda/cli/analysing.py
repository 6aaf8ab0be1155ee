"""``wda compare``, ``inspect``, ``doctor`` and ``figures``: what looks at checkpoints."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from wda.cli.app import WRITTEN, app, say
from wda.cli.options import Alpha, Axis, Enabled, Initial, LeaveOutFloored, gather


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
    granularity: Annotated[
        str,
        typer.Option(
            metavar="vector|head|matrix",
            help="What has a row: all vectors of a matrix, those of each attention head, or the "
            "matrix taken as one vector.",
        ),
    ] = "vector",
    null: Annotated[
        str,
        typer.Option(
            metavar="isotropic|rank|none",
            help="Which random updates of the measured size r and slope are held against: any, or "
            "those of the same rank.",
        ),
    ] = "isotropic",
    leave_out_floored: LeaveOutFloored = False,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Also write vectors.parquet: a row per vector.")
    ] = False,
    spectra: Annotated[
        bool,
        typer.Option(
            "--spectra",
            help="Also measure singular spectra of W0, Wt and ΔW, into spectra.parquet and "
            "spectra.csv; takes far longer than all the rest.",
        ),
    ] = False,
    alpha: Alpha = None,
    enabled: Enabled = None,
    axis: Axis = None,
    initial: Initial = None,
    w0: Annotated[
        str | None,
        typer.Option(
            metavar="original|dequantized",
            help="What W0 is of adapters trained on a quantised model: the weights they saw "
            "(--base is that model, default), or the original ones (--base is the original).",
        ),
    ] = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            metavar="LOCATION",
            help="The quantised model, for --w0 original; by default what the adapters name.",
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Write report.html too: one page with table, figures, and what the doctor finds "
            "in each run's newest checkpoint. Needs --out.",
        ),
    ] = False,
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
    one checkpoint: a whole model (safetensors, .bin, .pt, .ckpt, GGUF, distributed or quantised) or
    an adapter (of PEFT, the paper's code, torchtune, LitGPT, MLX-LM, LyCORIS, diffusers, loralib
    and others; docs/formats.md lists them). It may be a location on the Hub, in a bucket or on a
    web server, as the base may be: of remote safetensors only the headers and the chosen matrices
    are fetched.

    **Examples**

    One full fine-tuning against the model it started from:

        wda compare my_run --base hf://google-bert/bert-base-uncased --out figures/my_run

    Three runs, query matrices alone; the adapters name their base themselves:

        wda compare runs/ft runs/lora runs/dora --matrices query --out figures/three

    The same as a page to pass on, which opens without a network:

        wda compare runs/ft runs/lora runs/dora --out figures/three --report

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
    if granularity not in ("vector", "head", "matrix"):
        raise typer.BadParameter(
            f"'vector', 'head' or 'matrix', not {granularity!r}", param_hint="--granularity"
        )
    if null not in ("isotropic", "rank", "none"):
        raise typer.BadParameter(
            f"'isotropic', 'rank' or 'none', not {null!r}", param_hint="--null"
        )
    if (vectors or spectra) and out is None:
        which = "--vectors" if vectors else "--spectra"
        raise typer.BadParameter("needs a folder to write to; add --out", param_hint=which)
    if w0 not in (None, "original", "dequantized"):
        raise typer.BadParameter(f"'original' or 'dequantized', not {w0!r}", param_hint="--w0")
    if cache is not None and no_cache:
        raise typer.BadParameter("give one of --cache and --no-cache", param_hint="--no-cache")
    if report:
        from wda.report import check_installed

        if out is None:
            raise typer.BadParameter("needs a folder to write to; add --out", param_hint="--report")
        check_installed()
    given = gather(alpha, enabled, axis, initial, trained_on)
    if dry_run:
        from wda.comparison import plan
        from wda.console import show_plan

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
            given=given,
            w0=w0,  # type: ignore[arg-type]
            granularity=granularity,  # type: ignore[arg-type]
            null=None if null == "none" else null,  # type: ignore[arg-type]
            vectors=vectors,
            spectra=spectra,
            leave_out_floored=leave_out_floored,
            progress=sys.stderr.isatty(),
        )
        if folder is not None:
            comparison.write(folder)
        if folder is not None and report:
            from wda.manifest import make_manifest
            from wda.reporting import report as write_report

            runs = make_manifest(what, given=given).runs
            write_report(comparison, folder / "report.html", runs, sys.stderr.isatty())
    say(*comparison.notes)
    show_statistics(comparison.statistics, as_json)
    if out is not None:
        say(f"written to {out}: {WRITTEN}{', report.html' if report else ''}")


@app.command()
def inspect(
    location: Annotated[
        str, typer.Argument(metavar="LOCATION", help="A checkpoint, or a run of several.")
    ],
    alpha: Alpha = None,
    enabled: Enabled = None,
    axis: Axis = None,
    initial: Initial = None,
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

    show_inspection(run_inspect(location, gather(alpha, enabled, axis, initial)), as_json)


@app.command()
def doctor(
    location: Annotated[
        str, typer.Argument(metavar="LOCATION", help="A checkpoint; of a run the newest.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="LOCATION", help="The pre-trained model; by default what it names itself."
        ),
    ] = None,
    alpha: Alpha = None,
    enabled: Enabled = None,
    axis: Axis = None,
    initial: Initial = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON on standard output.")
    ] = False,
) -> None:
    """Tell what is wrong or suspicious in a checkpoint, with the number that says so.

    Looks for NaN, weights and magnitudes that never moved, magnitudes of another axis, order or
    layer, a base that is another model or merged already, and updates as small as rounding. The
    exit code is 1 when something is wrong.

    **Example**

        wda doctor runs/dora --base hf://ORG/NAME
    """
    from wda.console import show_findings
    from wda.diagnosis import diagnose

    given = gather(alpha, enabled, axis, initial)
    found = diagnose(location, base, given, progress=sys.stderr.isatty())
    show_findings(found, as_json)
    if any(finding.verdict == "wrong" for finding in found):
        raise typer.Exit(1)


@app.command()
def figures(
    table: Annotated[
        Path,
        typer.Argument(metavar="TABLE", help="table.parquet or table.csv of wda compare --out."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write.")],
    kind: Annotated[
        str,
        typer.Option(
            metavar="KINDS",
            help="Comma-separated: scatter (default), profile, trajectory, heatmap, vectors, "
            "spectrum, null.",
        ),
    ] = "scatter",
    leave_out_floored: LeaveOutFloored = False,
) -> None:
    """Fit and draw again from a saved table.

    The last three kinds are drawn from what lies beside the table: vectors.parquet,
    spectra.parquet with spectra.csv, and nulls.parquet.

    **Examples**

        wda figures figures/demo/table.parquet --out figures/again

        wda figures figures/demo/table.parquet --kind profile,heatmap --out figures/layers
    """
    from wda.comparison import reopen
    from wda.console import show_statistics
    from wda.figures import KINDS, draw
    from wda.files import staged_folder

    kinds = list(dict.fromkeys(name.strip() for name in kind.split(",")))
    if unknown := [name for name in kinds if name not in KINDS]:
        raise typer.BadParameter(
            f"there is no kind {', '.join(map(repr, unknown))}; there are {', '.join(KINDS)}",
            param_hint="--kind",
        )
    with staged_folder(out) as folder:
        comparison = reopen(table, leave_out_floored)
        comparison.write_tables(folder)
        drawn = draw(comparison.material, kinds, folder)
    show_statistics(comparison.statistics, as_json=False)
    pictures = [f"{name}.{ending}" for name in drawn for ending in ("png", "pdf")]
    say(f"written to {out}: {', '.join(['tables', *pictures, 'provenance.json'])}")
