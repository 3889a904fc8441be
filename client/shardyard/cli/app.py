"""All commands and their exit codes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from shardyard import __version__
from shardyard._text import is_utf8, not_utf8
from shardyard.cli import (
    access,
    asking,
    assets,
    choosing,
    explaining,
    exporting,
    following,
    jobs,
    service,
    storing,
    submitting,
    updating,
    watching,
    webhooks,
)
from shardyard.cli.options import reaching, take_from_profile

# Typer bundles its own click and exports only the narrowest of its errors: this is their common base.
CliError: Any = typer.BadParameter.__mro__[2]

_HELP = "Train, fine-tune and use pretrained models on a cluster."

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

COMMANDS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("serve", service.serve),
    ("stop", service.stop),
    ("health", service.health),
    ("doctor", service.doctor),
    ("submit", submitting.submit),
    ("submit-all", updating.submit_all),
    ("plan", submitting.plan),
    ("recommend", choosing.recommend),
    ("jobs", jobs.list_jobs),
    ("get", jobs.get),
    ("watch", watching.watch),
    ("events", following.events),
    ("logs", jobs.logs),
    ("metrics", jobs.metrics),
    ("update", updating.update),
    ("cancel", jobs.cancel),
    ("pause", jobs.pause),
    ("resume", jobs.resume),
    ("models", assets.models),
    ("predict", asking.predict),
    ("embed", asking.embed),
    ("explain", explaining.explain),
    ("datasets", assets.datasets),
    ("upload", assets.upload),
    ("download", assets.download),
    ("export", exporting.export),
    ("copy", exporting.copy),
    ("delete", assets.delete),
    ("login", access.login),
    ("whoami", access.whoami),
    ("tokens", access.tokens),
    ("create-token", access.create_token),
    ("revoke-token", access.revoke_token),
    ("roles", access.roles),
    ("grant", access.grant),
    ("withdraw", access.withdraw),
    ("audit", access.audit),
)

GROUPS: tuple[tuple[str, str, Sequence[tuple[str, Callable[..., Any]]]], ...] = (
    ("store", storing.HELP, storing.COMMANDS),
    ("webhooks", webhooks.HELP, webhooks.COMMANDS),
)
"""Groups of commands: the name, what it is for, and its commands."""


class _Command(TyperCommand):
    """A command whose texts must be UTF-8, as messages are; the error for any other text names its flag."""

    def invoke(self, ctx: Any) -> Any:
        """Run it.

        Raises: BadParameter, with the flag; paths (`Path`) may have any name.
        """
        parameters: list[Any] = self.params
        for parameter in parameters:
            value = ctx.params.get(parameter.name)
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and not is_utf8(text):
                    raise typer.BadParameter(not_utf8(text), ctx=ctx, param=parameter)
        take_from_profile(ctx)
        return super().invoke(ctx)


def make_app() -> typer.Typer:
    """Builds the app with all commands."""
    app = typer.Typer(
        name="shardyard",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=_HELP)(_root)
    for name, function in COMMANDS:
        app.command(name, cls=_Command)(reaching(function))
    for name, help_text, commands in GROUPS:
        group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=help_text)
        for each, function in commands:
            group.command(each, cls=_Command)(reaching(function))
        app.add_typer(group, name=name)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    if arguments[:1] != ["serve"]:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # Else gRPC prints each failed handshake before our error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal without Unicode shows `?` instead of failing.
            stream.reconfigure(errors="replace")
    try:
        code = _run(arguments)
        sys.stdout.flush()  # Here, where it can be caught: Python's own flush at the end prints a traceback.
    except BrokenPipeError:  # `shardyard jobs | head`: nobody reads on.
        _forget_output()
        return EXIT_ERROR
    except OSError as error:  # `shardyard jobs > FILE` on a full disk.
        _forget_output()
        print(f"error: {_file_error(error)}", file=sys.stderr)
        return EXIT_ERROR
    return code


def _forget_output() -> None:
    """Discard remaining output, so that Python's own flush at the end has nothing to fail on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str]) -> int:
    from shardyard.cli.flags import UsageError
    from shardyard.cli.output import print_error
    from shardyard.errors import ShardyardError

    as_json = "--json" in arguments
    try:
        code = make_app()(list(arguments), standalone_mode=False)
    except CliError as error:
        if as_json:
            print_error(_usage_error(error), as_json=True)
        else:
            error.show()
        return EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:  # A full disk or a folder that cannot be written: not a usage error.
        print_error(_file_error(error), as_json=as_json)
        return EXIT_ERROR
    except ShardyardError as error:
        print_error(error, as_json=as_json)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"shardyard {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of the command itself."""


def _file_error(error: OSError) -> Any:
    from shardyard.errors import local_file

    return local_file(error, "the output cannot be written")


def _usage_error(error: Any) -> Any:
    from shardyard.errors import invalid

    return invalid("", error.format_message(), reason="USAGE")
