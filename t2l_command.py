"""Entry point of the command ``t2l``; outside the package, to report a missing native library in one line."""

import sys


def main() -> None:
    """See :func:`t2l_engine.cli.main`."""
    try:
        from t2l_engine.cli import main as run
    except ImportError as error:
        if error.name != "t2l_engine._C":  # any other import error is a bug or a missing dependency
            raise
        sys.exit("t2l: " + " ".join(str(error).split()))
    except KeyboardInterrupt:  # torch takes seconds
        sys.exit(130)
    run()
