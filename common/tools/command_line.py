"""What the command lines of the programs here have in common."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import UserError


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Of `python -m common.tools.<name>`; a description of several lines is shown as it is."""
    layout = argparse.RawDescriptionHelpFormatter if "\n" in description else argparse.HelpFormatter
    prog = f"python -m common.tools.{name}"
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=layout)


@contextmanager
def one_sentence(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Let what the user can mend end in one sentence and exit code 2."""
    try:
        yield
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


def check_least(args: argparse.Namespace, **least: int) -> None:
    """UserError: a flag that was given is below its least value."""
    for flag, value in least.items():
        given = getattr(args, flag)
        if given is not None and given < value:
            raise UserError(f"--{flag} must be at least {value}, not {given}")


def in_utf8(name: str | Path) -> str:
    """A file's name as text that can be written: bytes that are not UTF-8, as from old archives, as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def make_folder(folder: Path, flag: str) -> None:
    """UserError: it is not there and cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from error
