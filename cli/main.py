"""The program `ferkd-data`: its commands, and how an error ends it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import click

import ferkd_data
from ferkd_data.errors import FerkdError

from .signals import Signalled, end_at_once, handle_ending, orderly_end
from .terminal import forgiving_streams, say, say_what_is_logged

COMMANDS = {
    "build": "Label crops of images with an ensemble of teachers and write a label set.",
    "bench": "Find the fastest way to run a teacher on this machine; export it as ONNX.",
    "demo": "Build a label set from real photos and real teachers, in a few minutes on a CPU.",
    "evaluate": "Check that each teacher is set up correctly: accuracy and calibration error.",
    "finish": "Complete a build whose parts were labelled with --part.",
    "report": "Write a label set as one HTML page: thresholds, crops, classes, teachers.",
    "compare": "Compare two label sets of the same images.",
    "info": "Print the teachers, settings and shards of a label set.",
    "stats": "Print the confidence table, buckets and accuracy of a label set.",
    "show": "Show the crops of one image with their labels.",
    "verify": "Check every file, row and count of a label set.",
    "convert": "Change the layout; import FKD, Dataset Reinforcement or ReLabel; export FKD.",
    "merge": "Merge label sets: more teachers, more crops, or more images.",
    "publish": "Send a label set to a folder, an object store or the Hugging Face hub.",
    "pull": "Download a published label set, or a part of it.",
}
SIGNALLED = 128
"""Exit statuses above this are those of signals."""
END_SECONDS = 2.0


class LazyGroup(click.Group):
    """Imports a command's module when it is called, so that `--help` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        # By this package's own name: the folder cli/ is installed as ferkd_data_cli.
        command = importlib.import_module(f"{__package__}.{cmd_name}").command
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ferkd_data.__version__, prog_name="ferkd-data")
@click.option("--debug", is_flag=True, help="Show a traceback on failure. May stand anywhere in the command.")
def cli(debug: bool) -> None:
    """Build, check, inspect and share data sets of soft labels for knowledge distillation.

    \b
    Exit status: 0 success, also if nothing was left to do; 1 failure; 2 wrong usage;
    3 success, but some images were rejected; 130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP:
    run the same command again to resume.
    """


def run(args: list[str]) -> int:
    """Run the program and give its exit status; errors are one line on stderr."""
    say_what_is_logged()
    # Taken out before click sees it, so that it works behind the command too, where people add it.
    debug = "--debug" in args
    args = _join_thresholds([arg for arg in args if arg != "--debug"])
    with forgiving_streams():
        try:
            with orderly_end():
                # Not standalone: click would end the process itself, with statuses of its own.
                result: Any = cli.main(args=args, prog_name="ferkd-data", standalone_mode=False)
            # Groups and --help return nothing.
            return result if isinstance(result, int) else 0
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (KeyboardInterrupt, click.Abort) as error:
            return _interrupted(error)
        except FerkdError as error:
            if debug:
                traceback.print_exc()
            # One line, whatever line breaks a stranger's name brings in.
            say(f"ferkd-data: {' '.join(str(error).split())}", err=True)
            return error.exit_code
        # The last resort: no traceback reaches a user, but the status is not 0.
        except Exception as error:
            if debug:
                traceback.print_exc()
            say(f"ferkd-data: {' '.join(_in_words(error).split())}", err=True)
            return 1


def _in_words(error: Exception) -> str:
    """Describe an error that nothing has explained. The system's errors name the file, and are no fault of ours."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def _interrupted(error: BaseException) -> int:
    """One line, and 128 + the signal's number; click raises its Abort from what it caught."""
    cause = error if isinstance(error, Signalled) else error.__cause__ or error.__context__
    number = cause.number if isinstance(cause, Signalled) else signal.SIGINT
    how = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    say(f"ferkd-data: {how}; run the same command again to resume", err=True)
    return 128 + int(number)


def main() -> None:
    """Run the program with the arguments of its process, and end the process."""
    status = run(sys.argv[1:])
    if status > SIGNALLED:
        # While threads are waited for, a second signal still ends the process at once.
        handle_ending(end_at_once)
        _end_threads(status)
        # Python gives handlers back while it leaves, and a second signal would change the status then.
        handle_ending(signal.SIG_IGN)
    sys.exit(status)


def _end_threads(status: int) -> None:
    """End the process after a signal, even where a thread waits for a server or a teacher."""
    deadline = time.monotonic() + END_SECONDS
    # Daemons are not waited for: Python ends them with itself.
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    for thread in others:
        thread.join(max(deadline - time.monotonic(), 0))
    if any(thread.is_alive() for thread in others):
        # Python would wait for the thread for ever. Everything finished is on the disk already.
        os._exit(status)


def _join_thresholds(args: list[str]) -> list[str]:
    """Join the values of `--thresholds LOW MID TOP`: click's options have one number of values, this one two forms."""
    if "--thresholds" not in args:
        return args
    at = args.index("--thresholds") + 1
    values = args[at : at + 3]
    # Otherwise one value was given (quantile:… or a quoted list), and what follows is another argument.
    if len(values) == 3 and all(_is_number(value) for value in values):
        return [*args[:at], " ".join(values), *args[at + 3 :]]
    return args


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
