"""Programs a person runs: `python -m common.tools.<name> --help`."""
