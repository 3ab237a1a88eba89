"""A script in a process of its own, forked from one that has imported the libraries: a new one takes 6 s for that.

Nothing of this project is imported beforehand, so each process loads the project's files itself. This module
is imported by each of them too, and stays small.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "accelerate.utils",
        "matplotlib.backends.backend_agg",
        "pandas",
        "pyarrow",
        "timm.optim",
        "torch._dynamo",
        "torchvision.io",
    ]
)


def start(words: list[str], output: Path, environment: dict[str, str]) -> BaseProcess:
    """Begin `python <words>` on one thread; stdout and stderr go to the files `output`/stdout and `output`/stderr."""
    for name in ("stdout", "stderr"):
        (output / name).touch()
    process = _server.Process(target=_run, args=(words, output, environment))
    process.start()
    return process


def _run(words: list[str], output: Path, environment: dict[str, str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = words
    # OMP_NUM_THREADS was read when torch was loaded.
    sys.modules["torch"].set_num_threads(1)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        # Python's own end of a process calls them, multiprocessing's does not.
        atexit._run_exitfuncs()
