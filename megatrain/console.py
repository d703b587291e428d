"""How every program of the project parses its arguments, and what it tells where it can't go on."""

import argparse
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from megatrain.config.extras import missing_extra
from megatrain.config.reading.arguments import options_and_overrides
from megatrain.errors import MISTAKE, ExpectedError

INTERRUPTED, PIPE_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE
"""Exit codes: the shell's, of a process that a signal ended."""


def run_tool(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses ``argv`` (None: the process's) and runs ``body``; returns the exit code, ``body``'s or 0.

    What the user can mend is one line on stderr, and below it with --debug where it happened.
    """
    add_debug_option(parser)
    options = parser.parse_args(argv)
    return exit_code_of(lambda: body(options), parser.prog, "debug" in options)


def run_config_tool(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace, list[str]], int | None],
    argv: Sequence[str] | None = None,
    tell: Callable[[str, Exception], None] | None = None,
) -> int:
    """Does what ``run_tool`` does for a program that also takes dotted overrides of the config.

    ``body`` gets them as its second argument.

    Args:
        tell: says a message about an error, in place of a line on stderr.
    """
    add_debug_option(parser)
    words = sys.argv[1:] if argv is None else argv
    return exit_code_of(lambda: body(*options_and_overrides(parser, words)), parser.prog, "--debug" in words, tell)


def add_debug_option(parser: argparse.ArgumentParser) -> None:
    """The option that shows where an error happened; a program with commands takes it before and behind one."""
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def exit_code_of(
    body: Callable[[], int | None],
    program: str,
    debug: bool,
    tell: Callable[[str, Exception], None] | None = None,
) -> int:
    """Runs ``body``; returns what the process is to exit with.

    Ctrl-C ends it with 130, and a reader of its output that went away (``| head``) with 141, as the shell would.
    """
    tell = tell or _tell
    try:
        code = body() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ExpectedError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes nowhere
            return PIPE_CLOSED
        if debug:
            traceback.print_exc()
        tell(str(error), error)
        return error.exit_code if isinstance(error, ExpectedError) else MISTAKE
    except ImportError as error:
        told = missing_extra(program, error)
        if told is None:
            raise
        if debug:
            traceback.print_exc()
        tell(told, error)
        return MISTAKE


def _tell(text: str, error: Exception) -> None:
    print(f"error: {text}", file=sys.stderr)


def _reader_is_gone() -> bool:
    """Whether the other end of standard output's pipe is closed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
