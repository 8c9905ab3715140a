"""The generator: batches of what waits, one generation per text, errors by kind, and nothing of it on the event loop."""

import asyncio
import copy
import dataclasses
import logging
import shutil
import threading
import types
import warnings

import pytest
import torch

import t2l_engine as t2l
from t2l_engine.hypernetwork.folder import BUNDLED
from t2l_engine.serving.checkpoints import Checkpoint
from t2l_engine.serving.store import Unavailable
from t2l_engine.serving.vllm import generator as module
from t2l_engine.serving.vllm.generator import Generator
from tests.networks import HyperShape

TEXTS = [f"Return element {i} of the list." for i in range(10)]


def gather(generator, texts):
    async def run():
        return await asyncio.gather(*(generator.folder(None, text) for text in texts), return_exceptions=True)

    return asyncio.run(run())


@pytest.fixture
def held(monkeypatch):
    """Checkpoint.make waits: ``await held.entered()`` until it has begun, ``held.leave.set()``; its ``threads``."""
    entered, leave, threads = threading.Event(), threading.Event(), set()
    make = Checkpoint.make

    def wait(*arguments):
        threads.add(threading.get_ident())
        entered.set()
        assert leave.wait(60), "the event loop did not go on"
        return make(*arguments)

    async def begun():
        while not entered.is_set():
            await asyncio.sleep(0)

    monkeypatch.setattr(Checkpoint, "make", wait)
    return types.SimpleNamespace(entered=begun, leave=leave, threads=threads)


def test_the_same_text_is_generated_once(settings, loaded):
    generator = Generator(settings())
    # White space at the ends and a missing full stop are the encoder's to normalise.
    found = gather(generator, [TEXTS[0], f" {TEXTS[0]}", TEXTS[0][:-1]] * 21 + [TEXTS[0]])
    assert (generator.generated, generator.passes) == (1, 1) and len(found) == 64 and len(set(found)) == 1
    assert gather(generator, [TEXTS[0]]) == found[:1] and generator.generated == 1, "from the store"
    other = Generator(settings())
    assert gather(other, [TEXTS[0]]) == found[:1] and other.generated == 0, "and by another server"


def test_what_waits_is_generated_together(settings, loaded, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 8)
    generator = Generator(settings())
    found = gather(generator, TEXTS[:8])
    assert len(set(found)) == generator.generated == 8 and generator.passes <= 4
    generator = Generator(settings())
    gather(generator, [text + " Now." for text in TEXTS])
    assert generator.generated == 10 and 2 <= generator.passes <= 5, "at most 8 in a pass"


def test_the_event_loop_only_waits(settings, loaded, held):
    """Store, encoder and hypernetwork run in the generator's thread, and the loop takes steps while they do."""
    steps = []

    async def run():
        waiter = asyncio.ensure_future(generator.folder(None, TEXTS[0]))
        await held.entered()
        for _ in range(100):
            await asyncio.sleep(0)
            steps.append(waiter.done())
        held.leave.set()
        return await waiter

    generator = Generator(settings())
    assert asyncio.run(run()).is_dir()
    assert steps == [False] * 100 and len(held.threads) == 1 and threading.get_ident() not in held.threads


def test_a_store_that_cannot_be_opened_names_the_variable(settings, loaded, tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = gather(Generator(settings(store=tmp_path / "file")), TEXTS[:1])
    assert type(found) is RuntimeError and str(found).startswith("T2L_VLLM_STORE: ") and str(tmp_path / "file") in str(found)


def test_a_waiter_that_leaves_takes_nothing_along(settings, loaded, held):
    async def run():
        waiters = [asyncio.ensure_future(generator.folder(None, TEXTS[0])) for _ in range(2)]
        alone = asyncio.ensure_future(generator.folder(None, TEXTS[1]))
        await held.entered()
        late = asyncio.ensure_future(generator.folder(None, TEXTS[2]))
        while len(generator._futures) < 3:  # the one of late, too
            await asyncio.sleep(0)
        for gone in (waiters[0], alone, late):
            gone.cancel()
        held.leave.set()
        folder = await waiters[1]
        assert waiters[0].cancelled() and alone.cancelled() and late.cancelled()
        await generator.folder(None, TEXTS[2])
        return folder

    generator = Generator(settings())
    assert asyncio.run(run()).is_dir() and generator.generated == 3, "nobody waits for two of them, and they are there"


def test_a_checkpoint_is_loaded_once_in_the_generators_thread(settings, bundled, monkeypatch):
    threads = []
    monkeypatch.setattr(Checkpoint, "load", lambda name, source: (threads.append(threading.get_ident()), bundled)[1])
    generator = Generator(settings())
    generator.warm_up()
    gather(generator, TEXTS[:8])
    assert len(threads) == 1 and threads[0] != threading.get_ident()


def test_checkpoints_have_adapters_of_their_own(settings, changed):
    generator = Generator(settings(checkpoints={"first": "smollm2-135m-paper", "other": changed}))

    async def run():
        return await asyncio.gather(*(generator.folder(name, TEXTS[0]) for name in (None, "first", "other")))

    first, same, other = asyncio.run(run())
    assert first == same != other and generator.generated == 2
    with pytest.raises(ValueError, match=r"checkpoint: expected one of \['first', 'other'\], got 'third'"):
        asyncio.run(generator.folder("third", TEXTS[0]))


def test_a_full_queue_refuses(settings, loaded, held, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 5)

    async def run():
        first = asyncio.ensure_future(generator.folder(None, TEXTS[0]))
        await held.entered()
        others = [asyncio.ensure_future(generator.folder(None, text)) for text in (*TEXTS[1:9], TEXTS[1])]
        while sum(other.done() for other in others) < 3:
            await asyncio.sleep(0)
        held.leave.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    generator = Generator(settings())
    found = asyncio.run(run())
    refused = [result for result in found if isinstance(result, Unavailable)]
    assert len(refused) == 3 and "5 texts wait" in str(refused[0])
    assert generator.generated == 6 and found[-1] == found[1], "who waits for what waits already is not refused"


def test_names_are_limited_and_belong_to_one_adapter(settings):
    generator = Generator(settings(max_names=2))
    generator.check("refused", "owner of another")  # takes no name
    for name in ("a", "b", "a"):
        generator.claim(name, f"owner of {name}")
    generator.check("a", "owner of a")
    with pytest.raises(Unavailable, match="2 have names"):
        generator.claim("c", "owner of c")
    with pytest.raises(ValueError, match="a: this name is another adapter's"):
        generator.claim("a", "another")


def test_task_names_of_a_one_hot_checkpoint(settings, monkeypatch, tmp_path):
    net = HyperShape("tiny", 2, 12, 20, 20, embed_dim=2, latent_size=16, head_in_size=10).make()
    engine = t2l.TextToLoRA(t2l.OneHotEncoder(t2l.OneHotConfig(("antonyms", "sentiment"))), net)
    monkeypatch.setattr(Checkpoint, "load", lambda name, source: Checkpoint.of(engine, name))
    known, unknown, blank = gather(Generator(settings()), ["sentiment", "Name the capital.", " "])
    assert known.is_dir() and isinstance(unknown, ValueError)
    assert type(blank) is ValueError and str(blank) == "description: expected a description, got an empty one"
    assert str(unknown).startswith("description: a hypernetwork with one-hot task embeddings knows only the names")


def test_documents(settings, reads_documents, bundled, monkeypatch):
    """For a checkpoint that reads them, of any length up to the rank that the server takes; descriptions for every one."""
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda name, source: bundled if name == "sentences" else load(name, source))
    generator = Generator(settings(checkpoints={"documents": reads_documents, "sentences": "smollm2-135m-paper"}))

    def job(text, argument, checkpoint=None):
        return asyncio.run(generator.job(checkpoint, text, argument))

    long = "the " * 4001
    found = job(long, "document")
    assert (found.key, found.rank) == (job(long.strip(), "document").key, 4 * (4003 // 4 + 1 + 1))
    generator.max_rank = 8
    assert job("drug", "document").key == job("drug", "description").key == job("drug", "model").key
    assert job("drug", "description", "sentences").rank == 8
    for text, argument, checkpoint, message in (
        ("drug", "document", "sentences", "document: expected a checkpoint that reads documents, got 'smollm2-135m-paper'"),
        (long, "description", None, "description: expected a description of at most 4000 characters, got 16004"),
        ("the capital of a", "document", None, "document: its adapter has rank 12, which exceeds .* --max-lora-rank 8; sh"),
        (" \n", "document", None, "document: expected a document, got an empty one"),
        ("a\0", "document", None, "document: expected Unicode text without NUL"),
    ):
        with pytest.raises(ValueError, match=message):
            job(text, argument, checkpoint)


def test_a_checkpoint_that_does_not_load_is_tried_again(settings, tmp_path, caplog):
    (tmp_path / "broken").mkdir()
    generator = Generator(settings(checkpoints={"broken": str(tmp_path / "broken")}))
    generator.warm_up()
    (found,) = gather(generator, TEXTS[:1])
    assert type(found) is RuntimeError and "checkpoint 'broken': cannot be loaded" in str(found)
    assert "the default checkpoint cannot be loaded" in caplog.text
    shutil.copytree(BUNDLED / "smollm2-135m-paper", tmp_path / "broken", dirs_exist_ok=True)
    assert gather(generator, TEXTS[:1])[0].is_dir()


def test_a_long_text_is_cut_and_the_log_does_not_quote_it(settings, loaded, caplog):
    generator = Generator(settings())
    with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as warned:
        (found,) = gather(generator, ["secret " * 400])
    assert found.is_dir()
    assert f"adapter {found.name[:16]}: description of 403 tokens cut to 256" in caplog.text
    assert "secret" not in caplog.text + "".join(str(warning.message) for warning in warned)


def test_one_adapter_that_cannot_be_written(settings, loaded, monkeypatch):
    """It is the server's fault, and does not stay; others are written, by as many threads as the settings say."""
    write, seen, generator = Checkpoint._write, [], Generator(settings(threads=3))
    first = loaded.prepare("description", TEXTS[0])[1]

    def broken(self, key, *arguments):
        seen.append(torch.get_num_threads())
        return 1 / 0 if key == first else write(self, key, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "_write", broken)
        found = gather(generator, TEXTS[:2])
    assert type(found[0]) is RuntimeError and "ZeroDivisionError" in str(found[0]) and found[1].is_dir()
    assert set(seen) == {3} and gather(generator, TEXTS[:1])[0].is_dir()


def test_keys_depend_on_encoder_tokenizer_checkpoint_and_text(bundled):
    engine = copy.copy(bundled.engine)
    engine.encoder = copy.copy(engine.encoder)
    assert Checkpoint.of(engine, "other").encoder == bundled.encoder
    engine.encoder.tokenizer = copy.deepcopy(engine.encoder.tokenizer)
    engine.encoder.tokenizer.add_tokens(["unheard-of"])
    keys = {
        dataclasses.replace(Checkpoint.of(engine, "other"), hash=bundled.hash).prepare("description", TEXTS[0])[1],
        bundled.prepare("description", TEXTS[0])[1],
        bundled.prepare("description", TEXTS[1])[1],
        dataclasses.replace(bundled, hash="other").prepare("description", TEXTS[0])[1],
        dataclasses.replace(bundled, encoder="other").prepare("description", TEXTS[0])[1],
    }
    assert len(keys) == 5


def test_keys_of_documents_depend_on_encoder_and_chat_template(reads_documents):
    engine = t2l.TextToLoRA.from_pretrained(reads_documents)
    found = [Checkpoint.of(engine, "x").encoder]
    assert Checkpoint.of(engine, "other").encoder == found[0]
    engine.encoder.tokenizer.chat_template += "."
    found.append(Checkpoint.of(engine, "x").encoder)
    engine.encoder.config = dataclasses.replace(engine.encoder.config, max_chunk_tokens=5)
    found.append(Checkpoint.of(engine, "x").encoder)
    engine.encoder.model.layers[0].mlp.up_proj.weight.data.add_(1)
    found.append(Checkpoint.of(engine, "x").encoder)
    assert len(set(found)) == 4
    engine.encoder.tokenizer = None
    with pytest.raises(ValueError, match="expected files of a tokenizer"):
        Checkpoint.of(engine, "x")
