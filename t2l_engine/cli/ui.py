"""``t2l ui``: a page in the browser on which texts become adapters and answer beside the base model."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from typing import Annotated

import typer

from t2l_engine.cli.common import BaseDType, EngineOptions, keep_freed_memory, say
from t2l_engine.cli.desk import open_desk
from t2l_engine.text.encoder import OneHotEncoder

#: What the page shows first: held-out sentences that work.
DESCRIPTIONS = ("File the sentence under computers, cooking or law.", "Extract the name of the person.")
INPUT = "On Monday Clara talked about the recipe."
#: The same with a checkpoint that reads documents.
DOCUMENT, QUESTION = "Clara keeps her boat in Lisbon. The code of its lock is 4417.", "What is the code of the lock?"


def ui(
    engine: EngineOptions,
    host: Annotated[str, typer.Option(help="Bind address; beyond loopback it has no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    adapters: Annotated[int, typer.Option(min=1, max=64, help="Adapters held; the least recently used is replaced.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    dtype: BaseDType = None,
) -> None:
    """Open a page on which the base model and the adapters of descriptions, or of a document, answer one input together.

    Needs Gradio: pip install "t2l_engine[ui]".  Nothing is sent anywhere: fonts, statistics and sharing are off.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        from t2l_engine.serving.page import Page
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f'{error.name} is not installed; run: pip install "t2l_engine[ui]"') from None
    keep_freed_memory()
    _check_address(host, port)
    desk = open_desk(engine, slots=adapters, max_new_tokens=max_new_tokens, dtype=dtype)
    made, config = desk.side_by_side.engine, desk.side_by_side.engine.hypernetwork.config
    if isinstance(made.encoder, OneHotEncoder):
        raise ValueError(f"--checkpoint: expected one for sentences, got {engine.checkpoint}, which knows task names alone")
    documents = desk.side_by_side.documents
    first, text = ([DOCUMENT], QUESTION) if documents else (DESCRIPTIONS[:adapters], INPUT)
    desk.side_by_side.hold(first)  # raises now if adapters do not fit the base model
    rank = f"{config.rank}{' a chunk' * documents}"
    page = Page(
        desk.side_by_side,
        desk.save,
        title=f"`{engine.checkpoint}`, adapters of rank {rank} on {', '.join(config.modules)} of `{desk.base_model}`",
        max_new_tokens=max_new_tokens,
    )
    blocks = page.blocks(first, text)
    address = {"server_name": host, "server_port": port}
    blocks.launch(**address, quiet=True, prevent_thread_lock=True, **page.launch_options())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # service managers and containers: as Ctrl-C
    say(f"the page is at http://{host}:{port}; Ctrl-C ends it")
    try:
        blocks.block_thread()
    finally:
        desk.side_by_side.close()


def _check_address(host: str, port: int) -> None:
    """Errors before the models are loaded; Gradio checks the port later, and at 127.0.0.1 alone."""
    try:
        with socket.create_server((host, port)) as free:
            if not ipaddress.ip_address(free.getsockname()[0]).is_loopback:
                say(f"warning: --host {host}: the page is exposed without authentication")
    except OSError as error:
        raise OSError(f"--host, --port: expected a free IPv4 address, got {host}:{port}: {error.strerror}") from None
