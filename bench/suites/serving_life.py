"""A server of vLLM with the plugin: the first token for a sentence that is new, sentences that arrive together, long life.

The server is a process as a user starts it (:mod:`bench.vllm_server`).  Every time is that of a client on the same machine,
which shares its cores.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness import Context, Record, Task, VerificationError, record
from bench.timing import Timing
from bench.vllm_server import VllmServer
from t2l_engine.cli.serve_flags import collect
from t2l_engine.serving.vllm.generator import Generator
from t2l_engine.serving.vllm.settings import Settings
from t2l_engine.text import packaged

CHECKPOINT = packaged.LANGUAGE_MODEL
#: Sentences: an action, of what, and how.
ACTIONS = ("Return", "Find", "Name", "Write", "Give", "Repeat", "Spell", "Count", "Choose", "Translate")
OBJECTS = (
    "the last word",
    "the first letter",
    "the colour",
    "the verb",
    "the antonym",
    "the capital",
    "the number",
    "the animal",
)
ENDS = ("of the list", "in one word", "in capital letters", "of the given text", "as a child would", "politely", "twice")
CONTENT = "brave, tiny, explain, sweet, loud"
SLOTS, CACHED = 8, 16  # of the long life: fewer than its texts by far
CLIENTS = 8
TOKENS = 4  # of an answer: with one alone vLLM never counts its adapter as in use


def sentences(count: int) -> list[str]:
    """Different texts, always the same ones."""
    made = [" ".join(parts) for parts in itertools.product(ACTIONS, OBJECTS, ENDS)]
    return [f"{made[i % len(made)]}, item {i // len(made)}." for i in range(count)]


def tasks(context: Context) -> list[Task]:
    """All; of the smallest size the one that needs no server."""
    server = [Task.of("first token", first_token, context), Task.of("long life", life, context)]
    return [Task.of("arriving together", arriving, context), *(server if context.full else ())]


@contextlib.contextmanager
def served(slots: int, cached: int, store: Path) -> Iterator[VllmServer]:
    flags = collect([CHECKPOINT], slots, cached)["flags"]
    environment = {"T2L_VLLM_CHECKPOINT": CHECKPOINT, "T2L_VLLM_STORE": str(store / "adapters"), "T2L_VLLM_WARMUP": "1"}
    server = VllmServer(str(packaged.convert()), flags, environment, store / "server.log")
    try:
        yield server.wait()
    finally:
        server.stop()


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in shared memory, where adapters are by default, if there is one."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="t2l-", dir=shared if shared.is_dir() else None) as scratch:
        yield Path(scratch)


# --- the first token -------------------------------------------------------------------------------------------------


def first_token(context: Context) -> Iterator[Record]:
    """An idle server: the base model, a sentence that it knows and one that it does not, in turn."""
    rounds = 60 if context.full else 3
    new = iter(sentences(rounds + 8))
    with _scratch() as scratch, served(SLOTS, 256, scratch) as server:
        known = f"t2l:{next(new)}"
        for model in (server.name, known, *(f"t2l:{next(new)}" for _ in range(6))):
            server.first_token(model, CONTENT)
        seconds: dict[str, list[float]] = {"base": [], "known": [], "new": []}
        for _ in range(rounds):
            for name, model in (("base", server.name), ("known", known), ("new", f"t2l:{next(new)}")):
                time.sleep(0.3)  # until threads of the request before have gone to sleep
                seconds[name].append(server.first_token(model, CONTENT))
        for name, values in seconds.items():
            yield record("first_token", of=name, time=Timing.of([1e6 * value for value in values]).to_json())


# --- arriving together -----------------------------------------------------------------------------------------------


def arriving(context: Context) -> Iterator[Record]:
    """64 at once: clients of one new sentence, and of 64; and how long the event loop beside it waits for its turn."""
    count = 64 if context.full else 8
    texts = sentences(count + 1)
    with _scratch() as scratch:
        environment = {"T2L_VLLM_CHECKPOINT": CHECKPOINT, "T2L_VLLM_STORE": str(scratch / "adapters")}
        generator = Generator(Settings.from_environment(environment))
        asked = {"one": [texts[0]] * count, "different": texts[1:]}
        for name, made in asyncio.run(_arriving(generator, asked)).items():
            yield record("arriving", texts=name, clients=count, **made)


async def _arriving(generator: Generator, asked: dict[str, list[str]]) -> dict[str, Record]:
    await generator.checkpoint(None)
    found = {"none": {"loop_ms": await _lag(asyncio.sleep(1.0))}}
    for name, texts in asked.items():
        before = generator.passes, generator.generated
        start = time.perf_counter()
        lag = await _lag(asyncio.gather(*(generator.folder(None, text) for text in texts)))
        found[name] = {
            "seconds": round(time.perf_counter() - start, 4),
            "passes": generator.passes - before[0],
            "adapters": generator.generated - before[1],
            "loop_ms": lag,
        }
    return found


async def _lag(work: Any) -> Record:
    """What a task that sleeps for a millisecond at a time waits beyond that, while ``work`` goes on."""
    late = []

    async def tick() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(1e3 * (time.perf_counter() - start) - 1)

    ticking = asyncio.ensure_future(tick())
    await work
    ticking.cancel()
    cuts = statistics.quantiles(late, n=100, method="inclusive")
    return {"median": round(cuts[49], 3), "p99": round(cuts[98], 3), "max": round(max(late), 3), "ticks": len(late)}


# --- long life -------------------------------------------------------------------------------------------------------


def life(context: Context) -> Iterator[Record]:
    """Many requests over many sentences with few slots and a small cache, then the same from a warm store after a kill.

    The adapter of an answer is known by the log-probabilities of its first token, which are compared with those that the
    sentence had when it came alone, before; and with those of all other sentences, which tells how much that says.
    """
    requests, count = (10_000, 2_000) if context.full else (40, 12)
    texts = sentences(count)
    drawn = random.Random(0)
    with _scratch() as scratch:
        with served(SLOTS, CACHED, scratch) as server:
            start = time.perf_counter()
            alone = [_signature(server, text) for text in texts]
            first = time.perf_counter() - start
            if None in alone:
                raise VerificationError(f"life: {alone.count(None)} of {count} first requests have another status than 200")
            memory = [server.memory()]
            rows, wrong, worst, statuses = [drawn.randrange(count) for _ in range(requests)], 0, 0.0, 0
            start = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                for start_of in range(0, requests, requests // 10):
                    part = rows[start_of : start_of + requests // 10]
                    for i, got in zip(part, pool.map(lambda i: _signature(server, texts[i]), part), strict=True):
                        if got is None:
                            statuses += 1
                            continue
                        distance = _distance(got, alone[i])
                        worst = max(worst, distance)
                        wrong += distance > min(_distance(got, alone[j]) for j in drawn.sample(range(count), min(50, count)))
                    memory.append(server.memory())
            seconds = time.perf_counter() - start
            folders = _adapters(scratch)
            server.stop(signal.SIGKILL)
        with served(SLOTS, CACHED, scratch) as server:
            some = range(0, count, max(1, count // 50))
            same = sum(_signature(server, texts[i]) == alone[i] for i in some)
            left = _adapters(scratch)
    if statuses or left != folders:
        raise VerificationError(f"long life: {statuses} requests failed; {folders} adapters before a kill, {left} after it")
    apart = [_distance(alone[i], alone[j]) for i, j in (drawn.sample(range(count), 2) for _ in range(2000))]
    yield record(
        "life",
        requests=requests,
        texts=count,
        slots=SLOTS,
        cached=CACHED,
        clients=CLIENTS,
        tokens=TOKENS,
        seconds=round(seconds, 1),
        seconds_new=round(first, 1),
        not_the_nearest=wrong,
        worst_distance=round(worst, 4),
        distance_of_others=[round(cut, 4) for cut in statistics.quantiles(apart, n=20, method="inclusive")[::9]],
        restarted=len(some),
        restarted_same=same,
        rss_mib=[{name: round(value / 2**20, 1) for name, value in sorted(one.items())} for one in memory],
    )


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
