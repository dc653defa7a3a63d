"""The command `lgcnet`: its sub-commands, and what a user sees when something is wrong."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lgcnet_fast import __version__
from lgcnet_fast.cli import bench, data, doctor, export, lut, predict, stages
from lgcnet_fast.errors import UserError

USER_ERROR = 2
INTERRUPTED = 130
UNWRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR,
     errno.EEXIST, errno.ENAMETOOLONG}
)  # fmt: skip
"""Why a folder or file that the user named cannot be written."""


class ReportingGroup(TyperGroup):
    """Turns user mistakes and Ctrl-C into a message and an exit status; bugs stay tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"lgcnet: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            typer.echo(f"lgcnet: {error.filename}: {error.strerror}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            typer.echo(
                "\nlgcnet: interrupted; the same command again continues after the last epoch "
                "that was finished",
                err=True,
            )
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="lgcnet",
    cls=ReportingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lgcnet {__version__}")
        raise typer.Exit()


@app.callback()
def lgcnet(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Search, train and use real-time semantic-segmentation networks (LGCNet, GAS).

    First steps, on built-in data:

        lgcnet run --preset smoke --out runs/first

        lgcnet predict runs/first PHOTO.jpg --out pictures
    """


stages.register(app)
app.command()(predict.predict)
app.command()(export.export)
app.command()(bench.bench)
app.add_typer(lut.app, name="lut")
app.add_typer(data.app, name="data")
app.command()(doctor.doctor)


def main() -> None:
    app()
