"""The command line. Each subcommand is a thin module; heavy imports happen inside the commands.

Exit codes: 0 done or up to date, 1 failed, 2 wrong usage or recipe, 3 a gate was missed, 130 interrupted.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated

import typer

from qtool import __version__
from qtool.cli import calibrate, distill, eval_ppl, inspect, quantize, state
from qtool.errors import QtoolError, UsageError

INTERRUPTED = 130

app = typer.Typer(
    name="qtool",
    help="Make language models smaller, and know what it cost.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("quantize", no_args_is_help=True)(quantize.command)
app.command("calibrate", no_args_is_help=True)(calibrate.command)
app.command("distill", no_args_is_help=True)(distill.command)
app.command("eval-ppl", no_args_is_help=True)(eval_ppl.command)
app.command("inspect", no_args_is_help=True)(inspect.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qtool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit with its code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.exit(run(sys.argv[1:]))


def _interrupt(number: int, frame: FrameType | None) -> None:
    state.interrupted = True
    signal.default_int_handler(number, frame)


def run(arguments: list[str]) -> int:
    """The exit code of a command line."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin at barriers slow a shared machine down
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\b.*")
    state.interrupted = False
    # a usage error can come before the command has said how it wants to be told
    in_json = "--log-format=json" in arguments or ("--log-format", "json") in itertools.pairwise(arguments)
    state.open_console(log_format="json" if in_json else "text")
    try:
        code = app(args=arguments, prog_name="qtool", standalone_mode=False)
        if code == INTERRUPTED:  # typer 0.29 makes this of a KeyboardInterrupt
            return state.console.error(KeyboardInterrupt())
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return state.console.error(KeyboardInterrupt())
    except BrokenPipeError:  # `qtool ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return state.console.error(
                QtoolError(
                    f"no space left on the device while writing {error.filename or 'the output'}",
                    "free some space and run the same command again: it goes on where it stopped",
                )
            )
        return state.console.error(error)
    except Exception as error:
        if state.interrupted:  # torch 2.13 makes a ValueError of what arrives while safetensors 0.8 reads
            return state.console.error(KeyboardInterrupt())
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of typer
            context = getattr(error, "ctx", None)
            if type(error).__name__ == "NoArgsIsHelpError":
                state.console.log(error.format_message())
                return int(error.exit_code)
            named = f"qtool {arguments[0]}" if arguments and not arguments[0].startswith("-") else "qtool"
            hint = f"see `{context.command_path if context else named} --help`"
            return state.console.error(UsageError(error.format_message(), hint))
        return state.console.error(error)
