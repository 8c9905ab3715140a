"""Names of adapters: a client's ``model``, and the digests that serving engines, metrics and caches see instead."""

from __future__ import annotations

import hashlib
import re

from t2l_engine.files.text import is_unicode

MAX_CHARACTERS = 4000  # of a description
MAX_DOCUMENT_BYTES = 1 << 20  # of a document that a client sends, in UTF-8
DOCUMENT = "document"  # the argument of the endpoint that is not limited to a description's length
RESOLVED, CREATED = "t2lq-", "t2l-"  # prefixes of adapters resolved from a model name, and created by their own endpoint
_MODEL = re.compile(r"t2l(?:/([^/:]*))?:(.*)", re.DOTALL)


def parse(model: str) -> tuple[str | None, str] | None:
    """(short name of a checkpoint, description) in ``t2l:<description>`` or ``t2l/<checkpoint>:<description>``.

    The name is None for the default checkpoint; None if ``model`` is neither.  Raises ValueError for an empty name of a
    checkpoint.
    """
    found = _MODEL.fullmatch(model)
    if found is None:
        return None
    checkpoint, description = found.groups()
    if checkpoint == "":
        raise ValueError("model: expected t2l:<description> or t2l/<checkpoint>:<description>, got no checkpoint's name")
    return checkpoint, description


def check_text(argument: str, text: str) -> None:
    """ValueError, naming ``argument`` and quoting nothing, unless ``text`` is a description, or the argument "document"."""
    kind = argument if argument == DOCUMENT else "description"
    if not text.strip():
        raise ValueError(f"{argument}: expected a {kind}, got an empty one")
    if kind != DOCUMENT and len(text) > MAX_CHARACTERS:
        raise ValueError(f"{argument}: expected a description of at most {MAX_CHARACTERS} characters, got {len(text)}")
    if not is_unicode(text) or "\0" in text:
        raise ValueError(f"{argument}: expected Unicode text without NUL characters")


def digest(*parts: str) -> str:
    """SHA-256 (hex) of a list of strings; different lists have different digests."""
    joined = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        joined.update(len(data).to_bytes(8, "little") + data)
    return joined.hexdigest()


def key(checkpoint: str, encoder: str, version: str, prepared: str) -> str:
    """Name of an adapter's folder: 32 hex digits, a digest of everything that its weights depend on.

    ``checkpoint``, ``encoder``: digests; ``version``: of the generator; ``prepared``: the text as it is tokenized.
    """
    return digest("adapter", checkpoint, encoder, version, prepared)[:32]


def lora_name(model: str, key: str) -> str:
    """``lora_name`` of vLLM for the requested name ``model`` and its adapter's key; different pairs have different names.

    vLLM's prefix cache tells adapters apart by it.
    """
    return RESOLVED + digest("name", model, key)[:16]


def adapter_id(key: str) -> str:
    """Name of the adapter ``key`` for clients of the endpoint ``/v1/t2l/adapters``."""
    return CREATED + key[:16]
