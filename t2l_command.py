"""Entry point of the command ``t2l``, beside the package: one line where importing that fails for its native library."""

import sys


def main() -> None:
    """See :func:`t2l_engine.cli.main`."""
    try:
        from t2l_engine.cli import main as run
    except ImportError as error:
        if error.name != "t2l_engine._C":  # anything else is a bug, or a package that pip would have installed
            raise
        sys.exit("t2l: " + " ".join(str(error).split()))
    run()
