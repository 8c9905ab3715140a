"""Generator: descriptions to folders of adapters beside an event loop, without vLLM."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import BATCH, Checkpoint, quiet_encoder
from t2l_engine.serving.store import AdapterStore, Unavailable
from t2l_engine.serving.vllm.settings import MEMORY, PREFIX, Settings

MAX_WAITING = 1024  # texts that may wait for a pass of the encoder
logger = logging.getLogger("vllm.t2l_engine")  # vLLM configures "vllm" and what is below


@contextlib.contextmanager
def _giving_way() -> Iterator[None]:
    """The event loop waits a millisecond for the interpreter while this thread has it, not Python's usual five."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, 0.001))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@dataclass(frozen=True)
class Job:
    """A description that is to become an adapter; ``prepared``: as it is tokenized; ``key`` names its folder."""

    checkpoint: Checkpoint
    text: str
    prepared: str
    key: str


class Generator:
    """Folders of adapters; generation runs in one thread of its own, all texts that wait together in one pass.

    Methods belong to one event loop; only loading and passes leave it.  ``passes`` and ``generated`` count passes of an
    encoder and adapters.  Errors by kind: ValueError, the request is wrong; :class:`.store.Unavailable`, there is no room;
    RuntimeError, the server is at fault.  No message contains a description unless the encoder's does.
    """

    def __init__(self, settings: Settings):
        """Loads nothing; the first request or :meth:`warm_up` does."""
        self.settings = settings
        self.passes = self.generated = 0
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "t2l", torch.set_num_threads, (settings.threads,))
        self._lock = threading.Lock()
        self._loaded: dict[str, concurrent.futures.Future[Checkpoint]] = {}
        self._store: AdapterStore | None = None
        self._waiting: list[Job] = []
        self._futures: dict[str, asyncio.Future[Path]] = {}
        self._drain: asyncio.Task[None] | None = None
        self._names: dict[str, str] = {}

    def warm_up(self) -> None:
        """Start loading the default checkpoint in the generator's thread."""
        self._load(self.settings.checkpoint_name(None)).add_done_callback(_log_failure)

    async def folder(self, checkpoint: str | None, description: str) -> Path:
        """The folder of the adapter of ``description`` by a checkpoint's short name, None = the default."""
        return await self.generate(await self.job(checkpoint, description))

    async def job(self, checkpoint: str | None, description: str, argument: str = "description") -> Job:
        """The job of a description, which ValueErrors call ``argument``; loads the checkpoint if it is the first one."""
        names.check_description(argument, description)
        loaded = await self.checkpoint(checkpoint)
        return Job(loaded, description, *loaded.prepare(argument, description))

    async def checkpoint(self, name: str | None) -> Checkpoint:
        """A checkpoint by its short name, None = the default; ValueError for an unknown one."""
        name = self.settings.checkpoint_name(name)
        try:
            return await asyncio.shield(asyncio.wrap_future(self._load(name)))
        except (OSError, ValueError) as error:
            raise RuntimeError(f"checkpoint {name!r}: cannot be loaded: {error}") from error

    def claim(self, name: str, owner: str) -> None:
        """Give the adapter's name ``name`` to ``owner``, what it was made from, for ever; claiming again is free.

        Raises as :meth:`check`.
        """
        self.check(name, owner)
        self._names[name] = owner

    def check(self, name: str, owner: str) -> None:
        """Whether ``owner`` may have ``name``: asked before its adapter is made, which then may fail.

        Raises Unavailable beyond ``max_names``, which vLLM never forgets, and ValueError for a name of another owner: two
        adapters of one name would end the server's engine.
        """
        if self._names.get(name, owner) != owner:
            raise ValueError(f"{name}: this name is another adapter's; change the description")
        if name not in self._names and len(self._names) >= self.settings.max_names:
            raise Unavailable(f"adapters: {self.settings.max_names} have names; new ones must wait for a restart")

    async def generate(self, job: Job) -> Path:
        """The folder of a job's adapter: from a pass that makes it, or from the next one, which asks the store first.

        A waiter that is cancelled does not cancel what others may wait for.
        """
        future = self._futures.get(job.key)
        if future is None:
            if len(self._waiting) >= MAX_WAITING:
                raise Unavailable(f"adapters: {MAX_WAITING} descriptions wait to be generated; try again later")
            future = self._futures[job.key] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits any more
            self._waiting.append(job)
            if self._drain is None or self._drain.done():
                self._drain = asyncio.ensure_future(self._run())
        return await asyncio.shield(future)

    def _load(self, name: str) -> concurrent.futures.Future[Checkpoint]:
        with self._lock:  # warm_up() may run in another thread
            future = self._loaded.get(name)
            if future is None or (future.done() and future.exception()):
                future = self._loaded[name] = self._executor.submit(self._load_now, name)
            return future

    def _load_now(self, name: str) -> Checkpoint:
        quiet_encoder()
        if self._store is None:
            try:
                self._store = AdapterStore(self.settings.store, self.settings.store_bytes)
            except (OSError, ValueError) as error:
                raise RuntimeError(f"{PREFIX}STORE: {error}") from error
        return Checkpoint.load(name, self.settings.checkpoints[name])

    async def _run(self) -> None:
        """Passes until no text waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            jobs, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            try:
                results = await loop.run_in_executor(self._executor, self._passes, jobs)
            except RuntimeError as error:  # the process ends, and so does its executor
                results = [error] * len(jobs)
            for job, result in zip(jobs, results, strict=True):
                future = self._futures.pop(job.key)
                if isinstance(result, Path):
                    future.set_result(result)
                else:
                    future.set_exception(result)

    @_giving_way()
    def _passes(self, jobs: list[Job]) -> list[Path | Exception]:
        """Folders of ``jobs``, one pass for each checkpoint among them; nothing is raised."""
        found: dict[str, Path | Exception] = {}
        for checkpoint in {id(job.checkpoint): job.checkpoint for job in jobs}.values():
            own = [job for job in jobs if job.checkpoint is checkpoint]
            try:
                results = self._pass(checkpoint, own)
            except Exception as error:  # of an encoder or a device, whatever it is: requests wait for an answer
                results = [error] * len(own)
            found |= {job.key: result for job, result in zip(own, results, strict=True)}
        return [_fault(found[job.key]) for job in jobs]

    def _pass(self, checkpoint: Checkpoint, jobs: list[Job]) -> list[Path | Exception]:
        assert self._store is not None  # opened before any checkpoint was loaded
        memory = self.settings.mode == MEMORY
        found: dict[str, Path | Exception] = {}
        for job in jobs:  # here, since another process may have the store locked for long
            if (path := self._store.find(job.key, memory=memory)) is not None:
                found[job.key] = path
        lacking = [job for job in jobs if job.key not in found]
        for job in lacking:
            tokens, used = checkpoint.length(job.prepared)
            if used < tokens:
                logger.warning("adapter %s: description of %d tokens cut to %d", job.key[:16], tokens, used)
        if lacking:
            self.passes += 1
            results = checkpoint.write([(job.text, job.key) for job in lacking], self._store, memory)
            self.generated += sum(isinstance(result, Path) for result in results)
            found |= {job.key: result for job, result in zip(lacking, results, strict=True)}
        return [found[job.key] for job in jobs]


def _log_failure(loaded: concurrent.futures.Future[Checkpoint]) -> None:
    if not loaded.cancelled() and (error := loaded.exception()) is not None:
        logger.error("the default checkpoint cannot be loaded: %s", error)


def _fault(result: Path | Exception) -> Path | Exception:
    """``result``, or as a RuntimeError if it is an exception that is not Unavailable."""
    if isinstance(result, (Path, Unavailable)):
        return result
    fault = RuntimeError(f"an adapter could not be generated: {type(result).__name__}: {result}")
    fault.__cause__ = result
    return fault
