"""``python -m t2l_engine``: the command ``t2l`` for launchers that start modules (``accelerate launch -m t2l_engine``)."""

from t2l_engine.cli import main

main()
