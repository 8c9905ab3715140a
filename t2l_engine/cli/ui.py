"""``t2l ui``: a page in the browser on which sentences become adapters and answer beside the base model."""

from __future__ import annotations

import ipaddress
import itertools
import os
import signal
import socket
from typing import Annotated

import typer

from t2l_engine.cli.common import (
    BaseDType,
    BaseModel,
    Checkpoint,
    DType,
    Encoder,
    Scaling,
    TrustRemoteCode,
    keep_freed_memory,
    say,
)
from t2l_engine.cli.desk import open_desk

#: Bytes of the adapters that are the map's landmarks, at most; and their number.
MAP_BYTES, LANDMARKS = 1 << 27, 44
#: What the page shows first: sentences that nothing was trained on, of those that work.
DESCRIPTIONS = ("File the sentence under computers, cooking or law.", "Extract the name of the person.")
INPUT = "On Monday Clara talked about the recipe."


def ui(
    checkpoint: Checkpoint = "smollm2-135m-specs",
    base_model: BaseModel = "",
    host: Annotated[str, typer.Option(help="Address to listen at; not loopback: lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    adapters: Annotated[
        int, typer.Option(min=1, max=64, help="Adapters held; those least recently used make room for new ones.")
    ] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that can be asked for, in tokens.")] = 256,
    dtype: BaseDType = DType.float32,
    scaling: Scaling = "",
    encoder: Encoder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Open a page on which the base model and the adapters of several descriptions answer the same input, in one batch.

    Needs Gradio: pip install "t2l_engine[ui]".  Nothing is sent anywhere: fonts, statistics and sharing are off.
    """
    if ":" in host:
        raise ValueError(f"--host: expected a name or an IPv4 address, got {host!r}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which asks for it
    try:
        from t2l_engine.serving.page import Page
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f'{error.name} is not installed; run: pip install "t2l_engine[ui]"') from None
    from t2l_engine.text.encoder import OneHotEncoder

    keep_freed_memory()
    try:  # Gradio looks for the port at 127.0.0.1 only, and after the models are loaded
        socket.create_server((host, port)).close()
    except OSError as error:
        raise OSError(f"--host, --port: {host}:{port}: {error.strerror}") from None
    desk = open_desk(
        checkpoint, base_model, slots=adapters, max_new_tokens=max_new_tokens, dtype=dtype, scaling=scaling, encoder=encoder,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if isinstance(desk.side_by_side.engine.encoder, OneHotEncoder):
        raise ValueError(
            f"--checkpoint: expected one that reads sentences, got {checkpoint}, which knows the names of its tasks"
        )
    first = DESCRIPTIONS[:adapters]
    desk.side_by_side.hold(first)  # what does not fit the base model is said now
    config = desk.side_by_side.engine.hypernetwork.config
    size = 4 * config.num_layers * config.rank * (sum(config.in_features) + sum(config.out_features))
    page = Page(
        desk.side_by_side,
        desk.save,
        title=f"`{checkpoint}`, adapters of rank {config.rank} on {', '.join(config.modules)} of `{desk.base_model}`",
        landmarks=landmarks(max(3, min(LANDMARKS, MAP_BYTES // size))),
        max_new_tokens=max_new_tokens,
    )
    if not _is_loopback(host):
        say(f"warning: --host {host}: whoever reaches this address can use the page, which asks for no password")
    blocks = page.blocks(first, INPUT)
    blocks.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, **page.launch_options())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of service managers and containers: ends it as Ctrl-C does
    say(f"the page is at http://{host}:{port}; Ctrl-C ends it")
    try:
        blocks.block_thread()
    finally:
        desk.side_by_side.close()


def landmarks(count: int) -> list[tuple[str, str]]:
    """(family, description) of ``count`` of the families of tasks made by code, spread over all of them."""
    from t2l_engine.research.tasks.specs import suite

    placed = list(itertools.islice(suite.stream(0), len(suite.FAMILIES)))
    chosen = [placed[i * len(placed) // count] for i in range(count)]
    return [(one.spec.family.name, suite.task(one.spec, 1, 0).descriptions[0]) for one in chosen]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
