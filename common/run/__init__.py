"""A run: its processes, folder, records and checkpoints."""

from common.run.run import Run, start_run
