"""The command line, `llama-smop`; a module of this folder holds the commands of one concern.

Commands import what they need when they run, so that `--help` is quick. An error is one line on stderr with exit status
1, or 2 for a wrong option; LLAMA_SMOP_DEBUG=1 shows the traceback. Ctrl-C exits with 130. A training that receives
SIGTERM or SIGHUP saves a checkpoint and exits with 143 or 129. Under torchrun the line also ends what torchrun prints.
"""

import importlib
import io
import json
import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

from llama_smop.system.extras import remedy

try:
    import typer
except ModuleNotFoundError:
    sys.exit(f"llama-smop: the command line needs more than the base install: {remedy('typer')}")

from llama_smop.cli.app import app

# `--help` lists the commands in this order.
_CONCERNS = ("training", "corpus", "evaluation", "transcription", "serving", "conversion", "publishing", "machine")
for _commands in _CONCERNS:
    importlib.import_module(f"llama_smop.cli.{_commands}")

INTERRUPTED = 130  # a shell's status of SIGINT


def main(arguments: list[str] | None = None) -> None:
    """Run a command; `arguments` default to those of the command line. Exits unless the status is 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its messages are for developers
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # file names are bytes, not always UTF-8
    try:
        status = app(arguments, standalone_mode=False)
        _flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except typer.Abort:
        status = 1
    except Exception as error:
        from llama_smop.ops.checks import debug

        usage = getattr(error, "exit_code", None)
        if usage is not None:  # typer's own error: a wrong option or argument
            error.show()
            _tell_torchrun(error.format_message())
            sys.exit(usage)
        if debug():
            raise
        line = f"llama-smop: {_line(error, sys.argv[1:] if arguments is None else arguments)}"
        _tell_torchrun(line)
        sys.exit(line)
    if status == INTERRUPTED:
        print("llama-smop: interrupted; the same command starts again", file=sys.stderr)
    if isinstance(status, int) and status:
        sys.exit(status)


def _line(error: Exception, arguments: list[str]) -> str:
    """The error in one line; an unexpected error with its type and the command's arguments."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("llama_smop"):
        return remedy(error.name)
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno and error.filename is None:  # `files` names its files
        return f"writing failed, probably to standard output: {error.strerror} (in: {shlex.join(arguments)})"
    if text and isinstance(error, ValueError | OSError | RuntimeError):
        return text
    kind = type(error).__name__
    return f"{kind}{': ' * bool(text)}{text} (in: {shlex.join(arguments)}; LLAMA_SMOP_DEBUG=1 shows where)"


def _tell_torchrun(line: str) -> None:
    """Leave the error where torchrun looks for it: its long report then ends with the line, in place of a hint."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        with suppress(OSError):
            Path(place).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


def _flush() -> None:
    """Flush standard output. Raises OSError: it failed; stdout is then /dev/null, for the interpreter's own flush."""
    if sys.stdout is None:  # closed before the start
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"standard output: {error.strerror}") from None
