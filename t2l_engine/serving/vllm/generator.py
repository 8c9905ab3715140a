"""Generator: descriptions to folders of adapters, in a thread beside an event loop.  Needs no vLLM."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from t2l_engine.engine import DocToLoRA
from t2l_engine.serving import names
from t2l_engine.serving.checkpoints import BATCH, Checkpoint
from t2l_engine.serving.store import AdapterStore, Unavailable
from t2l_engine.serving.vllm.settings import MEMORY, PREFIX, Settings

MAX_WAITING = 1024  # texts that may wait for a pass of the encoder
logger = logging.getLogger("vllm.t2l_engine")  # vLLM configures "vllm" and what is below


@dataclass(frozen=True)
class Job:
    """A text that is to become an adapter of ``rank``; ``prepared``: as it is tokenized; ``key`` names its folder."""

    checkpoint: Checkpoint
    text: str
    prepared: str
    key: str
    rank: int


class Generator:
    """Folders of adapters; generation runs in one thread of its own, all texts of a checkpoint that wait in one pass.

    Methods are called in one event loop; loading and passes run in the thread.  ``passes`` and ``generated`` count passes of
    an encoder and adapters.  Errors: ValueError, the request is wrong; :class:`.store.Unavailable`, there is no room;
    RuntimeError, the server failed.  No message quotes a description unless the encoder's does.
    """

    def __init__(self, settings: Settings):
        """Checkpoints are loaded by the first request or :meth:`warm_up`."""
        self.settings = settings
        self.max_rank: int | None = None  # that the server takes, where it is known
        self.passes = self.generated = 0
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "t2l", torch.set_num_threads, (settings.threads,))
        self._loaded: dict[str, concurrent.futures.Future[Checkpoint]] = {}
        self._store: AdapterStore | None = None
        self._waiting: dict[str, Job] = {}  # by key, as the following
        self._futures: dict[str, asyncio.Future[Path]] = {}
        self._drain: asyncio.Task[None] | None = None
        self._names: dict[str, str] = {}

    def warm_up(self) -> None:
        """Start loading the default checkpoint in the generator's thread."""
        self._load(self.settings.checkpoint_name(None)).add_done_callback(_log_failure)

    async def folder(self, checkpoint: str | None, description: str) -> Path:
        """The folder of the adapter of ``description`` by a checkpoint's short name, None = the default."""
        return await self.generate(await self.job(checkpoint, description))

    async def job(self, checkpoint: str | None, text: str, argument: str = "description") -> Job:
        """The job of a description, or of a document; ValueErrors call it ``argument``.  Loads the checkpoint if needed."""
        names.check_text(argument, text)
        loaded = await self.checkpoint(checkpoint)
        if isinstance(loaded.engine, DocToLoRA):  # it counts tokens, which may take long
            job = Job(loaded, text, *await asyncio.to_thread(loaded.prepare, argument, text))
        elif argument == names.DOCUMENT:
            raise ValueError(f"{argument}: expected a checkpoint that reads documents, got {loaded.name!r}")
        else:
            job = Job(loaded, text, *loaded.prepare(argument, text))
        if self.max_rank is not None and job.rank > self.max_rank:
            raise ValueError(
                f"{argument}: its adapter has rank {job.rank}, which exceeds this server's --max-lora-rank {self.max_rank}; "
                "shorten the text, or start the server with the flags of t2l serve-flags --chunks N"
            )
        return job

    async def checkpoint(self, name: str | None) -> Checkpoint:
        """A checkpoint by its short name, None = the default; ValueError for an unknown one."""
        name = self.settings.checkpoint_name(name)
        try:
            return await asyncio.shield(asyncio.wrap_future(self._load(name)))
        except (OSError, ValueError) as error:
            raise RuntimeError(f"checkpoint {name!r}: cannot be loaded: {error}") from error

    def claim(self, name: str, owner: str) -> None:
        """Give ``name`` to the adapter with digest ``owner``, for the life of the server; raises as :meth:`check`."""
        self.check(name, owner)
        self._names[name] = owner

    def check(self, name: str, owner: str) -> None:
        """Raise unless ``owner`` may have ``name``; asked before the adapter is generated.

        Unavailable beyond ``max_names``, since vLLM never forgets a name; ValueError for a name of another owner, since two
        adapters of one name would end the server's engine.
        """
        if self._names.get(name, owner) != owner:
            raise ValueError(f"{name}: this name is another adapter's; change the description")
        if name not in self._names and len(self._names) >= self.settings.max_names:
            raise Unavailable(f"adapters: {self.settings.max_names} have names; new ones must wait for a restart")

    async def generate(self, job: Job) -> Path:
        """The folder of a job's adapter, from a pass that runs or the next one.

        Cancelling a waiter does not cancel the job: others may wait for it.
        """
        future = self._futures.get(job.key)
        if future is None:
            if len(self._waiting) >= MAX_WAITING:
                raise Unavailable(f"adapters: {MAX_WAITING} texts wait to be generated; try again later")
            future = self._futures[job.key] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait any more
            self._waiting[job.key] = job
            if self._drain is None or self._drain.done():
                self._drain = asyncio.ensure_future(self._run())
        return await asyncio.shield(future)

    def _load(self, name: str) -> concurrent.futures.Future[Checkpoint]:
        future = self._loaded.get(name)
        if future is None or (future.done() and future.exception()):
            future = self._loaded[name] = self._executor.submit(self._load_now, name)
        return future

    def _load_now(self, name: str) -> Checkpoint:
        # The encoder's warning of a long text quotes it.
        warnings.filterwarnings("ignore", message=r"texts\[\d+\]: description of \d+ tokens truncated")
        if self._store is None:
            try:
                self._store = AdapterStore(self.settings.store, self.settings.store_bytes, self.settings.mode == MEMORY)
            except (OSError, ValueError) as error:
                raise RuntimeError(f"{PREFIX}STORE: {error}") from error
        return Checkpoint.load(name, self.settings.checkpoints[name])

    async def _run(self) -> None:
        """Passes until no text waits."""
        while self._waiting:
            first = next(iter(self._waiting.values())).checkpoint
            jobs = [job for job in self._waiting.values() if job.checkpoint is first][:BATCH]
            for job in jobs:
                del self._waiting[job.key]
            usual = sys.getswitchinterval()
            sys.setswitchinterval(min(usual, 0.001))  # seconds: the event loop waits less for the interpreter
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._executor, self._pass, first, jobs)
            finally:
                sys.setswitchinterval(usual)
            for job, result in zip(jobs, results, strict=True):
                future = self._futures.pop(job.key)
                if isinstance(result, Path):
                    future.set_result(result)
                else:
                    future.set_exception(result)

    def _pass(self, checkpoint: Checkpoint, jobs: list[Job]) -> list[Path | Exception]:
        """Folders of ``jobs``, which are all of ``checkpoint``; errors are returned."""
        assert self._store is not None  # opened before any checkpoint was loaded
        try:
            for job in jobs:
                tokens, used = checkpoint.length(job.prepared)
                if used < tokens:
                    logger.warning("adapter %s: description of %d tokens cut to %d", job.key[:16], tokens, used)
            # In this thread, since another process may lock the store for long.
            found, generated = checkpoint.make([(job.text, job.key) for job in jobs], self._store)
        except Exception as error:  # of any kind: requests wait for an answer
            return [_fault(error)] * len(jobs)
        self.passes += generated > 0
        self.generated += generated
        return [_fault(found[job.key]) for job in jobs]


def _log_failure(loaded: concurrent.futures.Future[Checkpoint]) -> None:
    if not loaded.cancelled() and (error := loaded.exception()) is not None:
        logger.error("the default checkpoint cannot be loaded: %s", error)


def _fault(result: Path | Exception) -> Path | Exception:
    """``result``; exceptions other than Unavailable become a RuntimeError."""
    if isinstance(result, (Path, Unavailable)):
        return result
    fault = RuntimeError(f"an adapter could not be generated: {type(result).__name__}: {result}")
    fault.__cause__ = result
    return fault
