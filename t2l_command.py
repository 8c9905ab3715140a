"""Entry point of the command ``t2l``.

``t2l cost`` needs arithmetic alone, but ``import t2l_engine`` imports torch and registers ops, which takes longer than all
else together.  For this one command the package is put in place without running its ``__init__``; its modules import as
ever.  Nothing else may run in such a process.
"""

import importlib.util
import sys


def main() -> None:
    """See :func:`t2l_engine.cli.main`."""
    if sys.argv[1:2] == ["cost"] and "t2l_engine" not in sys.modules:
        spec = importlib.util.find_spec("t2l_engine")
        sys.modules["t2l_engine"] = importlib.util.module_from_spec(spec)
    try:
        from t2l_engine.cli import main as run
    except ImportError as error:
        if error.name != "t2l_engine._C":  # anything else is a bug, or a package that pip would have installed
            raise
        sys.exit("t2l: " + " ".join(str(error).split()))
    run()
