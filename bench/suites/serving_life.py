"""A server of vLLM as a user starts it: the first token for a new sentence, sentences that arrive together, a long life.

Every time is that of a client on the same machine, which shares its cores.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.harness import Context, Record, Task, VerificationError, record
from bench.records import PAPER
from bench.serving_methods import sentences
from bench.timing import Timing
from bench.vllm_server import VllmServer
from t2l_engine.cli.serve_flags import collect
from t2l_engine.serving.vllm.generator import Generator
from t2l_engine.serving.vllm.settings import Settings
from t2l_engine.text import packaged

CHECKPOINT = packaged.LANGUAGE_MODEL
CONTENT = "brave, tiny, explain, sweet, loud"
SLOTS, CACHED = 8, 16  # of the long life: fewer than its texts by far
CLIENTS = 8
TOKENS = 4  # of an answer: with one alone vLLM never counts its adapter as in use


def tasks(context: Context) -> list[Task]:
    """All; of the smallest size the one that needs no server."""
    server = [Task.of(f"first token, {of}", first_token, context, of) for of in (CHECKPOINT, PAPER)]
    server.append(Task.of("long life", life, context))
    return [Task.of("arriving together", arriving, context), *(server if context.full else ())]


@contextlib.contextmanager
def served(slots: int, cached: int, store: Path, checkpoint: str = CHECKPOINT) -> Iterator[VllmServer]:
    flags = collect([checkpoint], slots, cached)["flags"]
    environment = {"T2L_VLLM_CHECKPOINT": checkpoint, "T2L_VLLM_STORE": str(store / "adapters"), "T2L_VLLM_WARMUP": "1"}
    server = VllmServer(str(packaged.convert()), flags, environment, store / "server.log")
    try:
        yield server.wait()
    finally:
        server.stop()


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in shared memory, where adapters are by default."""
    with tempfile.TemporaryDirectory(prefix="t2l-", dir="/dev/shm") as scratch:
        yield Path(scratch)


# --- the first token -------------------------------------------------------------------------------------------------


def first_token(context: Context, checkpoint: str) -> Iterator[Record]:
    """An idle server: the base model, a sentence that it knows and one that it does not, in turn."""
    rounds = 60 if context.full else 3
    new = iter(sentences(rounds + 8))
    with _scratch() as scratch, served(SLOTS, 256, scratch, checkpoint) as server:
        known = f"t2l:{next(new)}"
        for model in (server.name, known, *(f"t2l:{next(new)}" for _ in range(6))):
            server.first_token(model, CONTENT)
        seconds: dict[str, list[float]] = {"base": [], "known": [], "new": []}
        for _ in range(rounds):
            for name, model in (("base", server.name), ("known", known), ("new", f"t2l:{next(new)}")):
                time.sleep(0.3)  # until threads of the request before have gone to sleep
                seconds[name].append(server.first_token(model, CONTENT))
        for name, values in seconds.items():
            yield record(
                "first_token", checkpoint=checkpoint, of=name, time=Timing.of([1e6 * value for value in values]).to_json()
            )


# --- arriving together -----------------------------------------------------------------------------------------------


def arriving(context: Context) -> Iterator[Record]:
    """Clients of as many new sentences, all at once; and how long the event loop beside them waits for its turn."""
    texts = sentences(64 if context.full else 8)
    with _scratch() as scratch:
        environment = {"T2L_VLLM_CHECKPOINT": CHECKPOINT, "T2L_VLLM_STORE": str(scratch / "adapters")}
        made = asyncio.run(_arriving(Generator(Settings.from_environment(environment)), texts))
    yield record("arriving", texts="different", clients=len(texts), **made)


async def _arriving(generator: Generator, texts: list[str]) -> Record:
    """``loop_ms``: what a task that sleeps for a millisecond at a time waits beyond that, meanwhile."""
    await generator.checkpoint(None)
    late, start = [], time.perf_counter()

    async def tick() -> None:
        while True:
            slept = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(1e3 * (time.perf_counter() - slept) - 1)

    ticking = asyncio.ensure_future(tick())
    await asyncio.gather(*(generator.folder(None, text) for text in texts))
    seconds = round(time.perf_counter() - start, 4)
    ticking.cancel()
    lag = {"median": round(statistics.median(late), 3), "max": round(max(late), 3)}
    return {"seconds": seconds, "passes": generator.passes, "adapters": generator.generated, "loop_ms": lag}


# --- long life -------------------------------------------------------------------------------------------------------


def life(context: Context) -> Iterator[Record]:
    """Many requests over many sentences with few slots and a small cache, then the same from a warm store after a kill.

    The adapter of an answer is known by the log-probabilities of its first token: they are nearer to those that the sentence
    had when it came alone, before, than to those of other sentences.
    """
    requests, count = (10_000, 2_000) if context.full else (40, 12)
    texts = sentences(count)
    drawn = random.Random(0)
    with _scratch() as scratch:
        with served(SLOTS, CACHED, scratch) as server:
            alone = [_signature(server, text) for text in texts]
            if None in alone:
                raise VerificationError(f"life: {alone.count(None)} of {count} first requests have another status than 200")
            memory = [server.memory()]
            rows, wrong, failed = [drawn.randrange(count) for _ in range(requests)], 0, 0
            start = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                for start_of in range(0, requests, requests // 10):
                    part = rows[start_of : start_of + requests // 10]
                    for i, got in zip(part, pool.map(lambda i: _signature(server, texts[i]), part), strict=True):
                        others = drawn.sample(range(count), min(50, count))
                        failed += got is None
                        wrong += got is not None and _distance(got, alone[i]) > min(_distance(got, alone[j]) for j in others)
                    memory.append(server.memory())
            seconds = time.perf_counter() - start
            folders = _adapters(scratch)
            server.stop(signal.SIGKILL)
        with served(SLOTS, CACHED, scratch) as server:
            some = range(0, count, max(1, count // 50))
            same = sum(_signature(server, texts[i]) == alone[i] for i in some)
            left = _adapters(scratch)
    if failed or left != folders:
        raise VerificationError(f"long life: {failed} requests failed; {folders} adapters before a kill, {left} after it")
    about = {"requests": requests, "texts": count, "slots": SLOTS, "seconds": round(seconds, 1)}
    about |= {"not_the_nearest": wrong, "restarted": len(some), "restarted_same": same}
    rss_mib = [{name: round(value / 2**20, 1) for name, value in sorted(one.items())} for one in memory]
    yield record("life", **about, rss_mib=rss_mib)


def _adapters(scratch: Path) -> int:
    return sum(path.is_dir() for path in (scratch / "adapters").iterdir())


def _signature(server: VllmServer, text: str) -> dict[str, float] | None:
    """Log-probabilities of the 20 likeliest first tokens; None: the request failed."""
    status, answer = server.chat(f"t2l:{text}", CONTENT, tokens=TOKENS, logprobs=True, top_logprobs=20)
    if status != 200:
        return None
    return {one["token"]: one["logprob"] for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def _distance(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference in a log-probability that both have; tokens that one has alone count as the least of the other."""
    low, least = min(one.values()), min(other.values())
    return max(abs(one.get(token, low) - other.get(token, least)) for token in one.keys() | other.keys())
