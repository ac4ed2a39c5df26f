"""`python -m fastseq`: the command line, which needs the packages of the extra "demo"."""

import sys

try:
    import click  # noqa: F401
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(f"fastseq's command line needs {error.name}: run `pip install click matplotlib rich`.")

from fastseq.cli import main

main(prog_name="python -m fastseq")
