"""The `headwater` command. Each file of `flows/commands/` adds its own commands through `register(app)`.

Listing and showing must be instant, so nothing here imports torch, Prefect or datasets: a command imports
what it needs when it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flows import commands
from infra.errors import HeadwaterError
from infra.imports import FIRST_PARTY, ROOT


def check_own(root: Path = ROOT, names: Sequence[str] = FIRST_PARTY) -> None:
    """Make sure that the packages with common names (`data`, `model`...) are ours and nobody else's.

    Raises HeadwaterError naming the package, where it was found instead, and what to do.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).parent if spec and spec.origin else None
        if found is None or found.resolve() != root / name:
            raise HeadwaterError(
                f"the package {name!r} is {found or 'missing'}, not {root / name}: one of that name comes "
                "first on Python's path. Unset PYTHONPATH, or install Headwater in an environment of its own "
                "(make env)"
            )


def application() -> typer.Typer:
    """The command with all its parts."""
    app = typer.Typer(
        name="headwater",
        help="From a raw corpus to a reasoning model in one tracked pipeline.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def common(
        home: Annotated[
            Path | None, typer.Option(help="The store's folder (default: $HEADWATER_HOME, else .headwater/).")
        ] = None,
    ) -> None:
        if home is not None:
            try:
                os.environ["HEADWATER_HOME"] = str(home.expanduser().absolute())
            except RuntimeError:
                raise HeadwaterError(f"--home {home}: there is no such user; give a folder") from None

    for module in sorted(pkgutil.iter_modules(commands.__path__), key=lambda found: found.name):
        importlib.import_module(f"flows.commands.{module.name}").register(app)
    return app


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback."""
    try:
        check_own()
        application()(prog_name="headwater")
    except HeadwaterError as error:
        print(f"headwater: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; a flush at exit would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
