"""What is kept on disk: `save`, `pack`, `unpack` and `gc`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunewright.graph.cli.evaluating import model_of
from prunewright.graph.cli.options import JsonOption, RunArgument
from prunewright.graph.cli.session import Session, quiet_transformers
from prunewright.graph.words.numbers import size
from prunewright.state import InputError

if TYPE_CHECKING:
    from prunewright.tools.store.packing import Sizes


def save_command(ctx: typer.Context, run_directory: RunArgument, _json: JsonOption = False) -> None:
    """Make the pruned model of a finished run from its masks again, where it was deleted."""
    session: Session = ctx.obj
    from prunewright.graph.running.runner import save

    quiet_transformers(session.debug)
    model = str(save(run_directory).model_directory)
    session.emit({"directory": str(run_directory), "model_directory": model})
    session.screen.pairs([("model", model)])


def pack_command(
    ctx: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL_OR_RUN_DIR", help="A model directory or a run's.", show_default=False
        ),
    ],
    archive: Annotated[
        Path,
        typer.Argument(metavar="ARCHIVE", help="File to write, new.", show_default=False),
    ],
    _json: JsonOption = False,
) -> None:
    """Pack a pruned model into one file without loss: masks and values, compressed apart.

    Only for storage: `unpack` makes the model's directory again, every file byte for byte.
    """
    session: Session = ctx.obj
    from prunewright.tools.store.packing import pack_model

    sizes = pack_model(model_of(str(model)), archive)
    _print_sizes(session, sizes, archive)


def unpack_command(
    ctx: typer.Context,
    archive: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="What `pack` wrote.", show_default=False)
    ],
    model: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Directory, new or empty.", show_default=False),
    ],
    _json: JsonOption = False,
) -> None:
    """Unpack what `pack` wrote, and check every file against its hash."""
    session: Session = ctx.obj
    from prunewright.tools.store.packing import unpack_model

    sizes = unpack_model(archive, model)
    _print_sizes(session, sizes, model)


def gc_command(
    ctx: typer.Context,
    run_directory: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN_DIR]", help="Directory of the run.", show_default=False),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache",
            help="Instead, the copies of dense weights in the cache that no process uses. They are "
            "made of models whose weights transformers renames or fuses, and again when needed.",
        ),
    ] = False,
    _json: JsonOption = False,
) -> None:
    """Delete the masks that no checkpoint of a run refers to, such as those of a killed step."""
    session: Session = ctx.obj
    if cache == (run_directory is not None):
        raise InputError("name a run's directory, or --cache, one of the two")
    if run_directory is None:
        from prunewright.tools.store.cache import collect_copies

        files, size = collect_copies()
    else:
        from prunewright.graph.running.runner import collect_garbage

        files, size = collect_garbage(run_directory)
    session.emit({"files": files, "bytes": size})
    session.screen.line(f"{files} files deleted, {size:,} bytes")


def _print_sizes(session: Session, sizes: "Sizes", written: Path) -> None:
    """What an archive saves."""
    session.emit({"written": str(written), **asdict(sizes)})
    rows = [
        ("model", f"{size(sizes.model)} in all"),
        ("archive", f"{size(sizes.archive)}, {sizes.archive / sizes.model:.3f} of that"),
    ]
    session.screen.pairs([*rows, ("written", str(written))])
