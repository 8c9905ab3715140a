"""One input, answered in one mixed batch by a base model and by the adapters of several descriptions or documents."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from t2l_engine.engine import DocToLoRA, TextToLoRA
from t2l_engine.hypernetwork.perceiver import PerceiverHyperNetwork
from t2l_engine.lora.handle import attach
from t2l_engine.text.encoder import positions
from t2l_engine.text.prompts import NEXT_EXAMPLE, RAW, answer_in, continuation, prompt_ids, prompt_of

T = TypeVar("T")
BASE = -1  # the id of rows without an adapter
#: Most chunks of a document, whose adapter must fit into a slot.
MOST_CHUNKS = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """Who answers: the adapter of a description or document, or (not ``adapted``) the base model with it in the prompt."""

    description: str = ""
    adapted: bool = False


@dataclasses.dataclass(frozen=True)
class Answers:
    """The rows' answers so far.

    ``made``: what :meth:`SideBySide.hold` returns.  ``tokens``: of all answers; ``first``: seconds from the question to the
    first token of all rows, with the wait and the adapters; ``seconds``: from there to the last token.
    """

    texts: tuple[str, ...]
    made: str
    tokens: int
    first: float
    seconds: float

    @property
    def times(self) -> str:
        """What it took, in words."""
        later = self.tokens - len(self.texts)  # after the first of each row
        rate = f", then {later / self.seconds:.0f} tokens/s" if later and self.seconds else ""
        rows = f"{len(self.texts)} row{'s' * (len(self.texts) > 1)} in one batch"
        return f"{self.made}; {rows}: first token after {1e3 * self.first:.0f} ms{rate}"


class SideBySide:
    """A base model with slots for the adapters of descriptions; new ones replace the least recently used.

    One thread of its own does all work, one question at a time; calls may come from any thread.

    Args:
        engine: makes the adapters.
        model, tokenizer: the base model, from :func:`t2l_engine.text.base_model.load`; it has no adapters attached.
        slots: most adapters in memory, and most descriptions of a question.
    """

    def __init__(self, engine: TextToLoRA, model: Any, tokenizer: Any, *, slots: int = 8):
        self.engine, self.model, self.tokenizer, self.slots = engine, model, tokenizer, slots
        #: Whether texts are documents, as for perceivers; pointer networks read sentences.
        self.documents = isinstance(engine.hypernetwork, PerceiverHyperNetwork)
        cuts = isinstance(engine, DocToLoRA) and engine.encoder.config.max_chunk_tokens is not None
        self._cutting = engine if cuts else None
        rank = engine.hypernetwork.config.total_rank(MOST_CHUNKS) if cuts else None
        self._lora = attach(model, slots=slots, max_rank=rank)
        self._held: OrderedDict[str, int] = OrderedDict()  # description -> slot; the least recently used first
        self._stop, self._closed = threading.Event(), False  # _stop: ends the current question
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="side-by-side")

    def run(self, call: Callable[[], T]) -> T:
        """Call in this object's thread, where the engine may be used."""
        return self._thread.submit(call).result()

    def hold(self, descriptions: Sequence[str]) -> str:
        """Make the adapters of ``descriptions`` that are not held; returns in words how many, and what each step took.

        Raises ValueError for more than slots, a text that the encoder refuses, a document of more than MOST_CHUNKS chunks,
        or adapters that do not fit the model.
        """
        return self.run(lambda: self._hold(descriptions))

    def close(self) -> None:
        """End the current question at its next token, cancel waiting ones, and detach the adapters from the model."""
        self._closed = True  # before _stop is read: a question that begins now replaces _stop, then checks _closed
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)
        self._lora.detach()

    def prompts(self, text: str, rows: Sequence[Row]) -> list[str]:
        """The prompt of every row; adapted rows have the description if the checkpoint was trained so."""
        form = self.engine.prompt_form
        described = self.engine.description_in_prompt
        shown = [row.description if described or not row.adapted else "" for row in rows]
        return [prompt_of(form, self.tokenizer, text, description) for description in shown]

    def answers(
        self, text: str, rows: Sequence[Row], *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Answers]:
        """The answers to ``text`` after every token, all rows in one batch; closing the iterator stops the model.

        ``temperature``: 0: greedy decoding; otherwise sampling, with ``seed``.

        Raises at the first item: ValueError for no rows, as :meth:`hold`, or if prompt and answer do not fit the model's
        context; CancelledError once closed.
        """
        found: queue.SimpleQueue[Answers | BaseException | None] = queue.SimpleQueue()
        start, stop = time.perf_counter(), threading.Event()

        def work() -> None:
            try:
                self._stop = stop
                if self._closed:
                    raise CancelledError
                if not stop.is_set():
                    torch.manual_seed(seed)
                    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
                    self._answer(text, rows, max_new_tokens, sampling, start, found.put, stop)
                found.put(None)
            except BaseException as error:  # raised where the answers are read
                found.put(error)

        try:
            done: Future[None] = self._thread.submit(work)
        except RuntimeError:  # after shutdown
            raise CancelledError from None
        done.add_done_callback(lambda of: found.put(CancelledError()) if of.cancelled() else None)  # by close()
        try:
            while (item := found.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            if not done.cancel():  # it has begun
                wait([done])

    def _answer(
        self, text: str, rows: Sequence[Row], max_new_tokens: int, sampling: dict[str, Any], start: float,
        emit: Callable[[Answers], None], stop: threading.Event,
    ) -> None:  # fmt: skip
        """Answer in this object's thread; ``start``: time of the question."""
        from transformers import StoppingCriteriaList

        if not rows:
            raise ValueError("rows: expected at least one, got none")
        prompts, limit = self.prompts(text, rows), self.check_length(max_new_tokens)
        ids = prompt_ids(self.tokenizer, prompts)
        batch = self.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt").to(self.model.device)
        length = batch["input_ids"].shape[1]
        if limit is not None and length + max_new_tokens > limit:
            told = any(row.description and not row.adapted for row in rows)
            raise ValueError(
                f"input: expected at most {limit - max_new_tokens} tokens (the model has {limit} positions, "
                f"{max_new_tokens} of them for the answer), got {length}{' with what the base model is told' * told}"
            )
        made = self._hold([row.description for row in rows if row.adapted])
        form, end = self.engine.prompt_form, self.model.generation_config.eos_token_id
        texts, done, tokens, first = [""] * len(rows), [False] * len(rows), 0, 0.0

        def watch(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            """Report the answers after a token; True for rows whose answer is complete, and for all after ``stop``."""
            nonlocal tokens, first
            passed = time.perf_counter() - start
            first = first or passed
            for i, new in enumerate(input_ids[:, length:].tolist()):
                if not done[i]:
                    tokens += 1
                    said = continuation(self.tokenizer, prompts[i], new)
                    texts[i] = answer_in(form, said).removesuffix("\ufffd")  # without the first bytes of a character
                    ended = new[-1] in end if isinstance(end, list) else new[-1] == end
                    done[i] = ended or (form == RAW and NEXT_EXAMPLE in said)
            emit(Answers(tuple(texts), made, tokens, first, passed - first))
            return torch.tensor([of or stop.is_set() for of in done], device=input_ids.device)

        with self._lora.use([self._held[row.description] if row.adapted else BASE for row in rows]):
            self.model.generate(
                **batch, **sampling, max_new_tokens=max_new_tokens, pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([watch]),  # type: ignore[list-item]
            )  # fmt: skip

    def check_length(self, max_new_tokens: int) -> int | None:
        """Number of positions of the model, None: no limit; ValueError unless answers of ``max_new_tokens`` leave room."""
        limit = positions(self.model)
        if limit is not None and max_new_tokens >= limit:
            raise ValueError(f"max_new_tokens: expected fewer than the model's {limit} positions, got {max_new_tokens}")
        return limit

    def _hold(self, descriptions: Sequence[str]) -> str:
        wanted = dict.fromkeys(descriptions)
        if len(wanted) > self.slots:
            raise ValueError(f"descriptions: expected at most {self.slots}, as many as there are slots, got {len(wanted)}")
        for description in wanted:
            if description in self._held:
                self._held.move_to_end(description)
        new = [description for description in wanted if description not in self._held]
        if not new:
            return "adapters held already"
        for i, chunks in enumerate(self._cutting.encoder.chunks(new) if self._cutting else ()):
            if len(chunks) > MOST_CHUNKS:
                expected = f"expected a document of at most {MOST_CHUNKS} chunks, as slots hold, got {len(chunks)}"
                raise ValueError(f"texts[{i}]: {expected}; a larger max_chunk_tokens makes fewer")
        start = time.perf_counter()
        embeddings = self.engine.embed(new)
        encoded = time.perf_counter()
        stack = self.engine.hypernetwork.generate(embeddings)
        generated = time.perf_counter()
        for i, description in enumerate(new):
            if len(self._held) == self.slots:
                self._held.popitem(last=False)
            slot = min({*range(self.slots)} - {*self._held.values()})
            self._lora.put(slot, stack[i])  # before it counts as held: this may fail
            self._held[description] = slot
        took = {"encode": encoded - start, "generate": generated - encoded, "attach": time.perf_counter() - generated}
        steps = ", ".join(f"{step} {1e3 * seconds:.0f} ms" for step, seconds in took.items())
        return f"{len(new)} new adapter{'s' * (len(new) > 1)}: {steps}"
