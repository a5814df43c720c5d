"""The entry point of ``torch-sap`` and of ``python -m torch_sap``: no traceback on Ctrl-C, even while loading."""

import os
import signal
import sys

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ends, by the convention of shells: 128 plus the signal's number."""


def run() -> None:
    """Run the command line and exit."""
    try:
        from torch_sap.cli.main import main

        code = main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not interrupt the exit
        print("torch-sap: stopped", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has closed the pipe: it has what it wanted
        code = 0
    except SystemExit as leaving:  # argparse has printed help or an error
        code = int(leaving.code or 0)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # nothing is left to be flushed at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    run()
