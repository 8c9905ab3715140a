"""Ways to serve a task, run from the first token of the prompt to the last of the answer, against torch's counter: exact."""

import pytest
import torch
from transformers import BertConfig, BertModel, DynamicCache

import t2l_engine as t2l
from t2l_engine import attach
from t2l_engine.research.costs import Setup, Workload, count, hypernetwork_for, ways
from t2l_engine.text.base_model import cache_argument
from tests.research.costs import tiny_decoders
from tests.research.costs.flop_counter import counted
from tests.research.costs.tiny_decoders import prompt

LOAD = Workload(question=6, answer=5, shots=2, shot=4, description=11, instruction=3, system=2)


class Server:
    """A language model that answers greedily, and what makes adapters for it."""

    def __init__(self, family: str, pointer: bool):
        self.model, ids = tiny_decoders.model(family), prompt(LOAD.description)
        decoder = count(self.model.config)
        if pointer:
            sizes = {"modules": ("q_proj", "o_proj"), "copied": ("o_proj",), "feature_size": 2 * 48, "first_layer": 1}
            encoder = count(self.model.config, head=False, layers=1)
            hypernet = hypernetwork_for(decoder, encoder, variant="pointer", rank=2, latent_size=16, lora_alpha=4.0, **sizes)
            reads = t2l.DocumentEncoderConfig("tiny", "layers", layers=(0, 1))
            engine = t2l.DocToLoRA(t2l.DocumentEncoder(self.model, None, reads), t2l.PointerHyperNetwork(hypernet))
            self.make = lambda: engine.hypernetwork.generate(engine.embed_ids([ids.tolist()]))
        else:
            values = {"intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
            bert = BertModel(BertConfig(vocab_size=97, hidden_size=48, **values), add_pooling_layer=False).eval()
            encoder = count(bert.config, head=False)
            hypernet = hypernetwork_for(decoder, encoder, rank=2, latent_size=16, head_in_size=12)
            net = t2l.HyperNetwork(hypernet)
            self.make = lambda: net.generate(bert(input_ids=ids).last_hidden_state[:, 0])
        self.setup = Setup(decoder, encoder, hypernet)
        self.make()  # folds what does not depend on the task

    def answer(self, before: int, cache: DynamicCache | None = None) -> None:
        """All of an answer, to a question after ``before`` tokens, some of them in ``cache``."""
        ids = prompt(before + LOAD.question)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), **cache_argument(self.model, cache), do_sample=False,
            min_new_tokens=LOAD.answer, max_new_tokens=LOAD.answer,
        )  # fmt: skip
        assert out.shape[1] == ids.shape[1] + LOAD.answer

    @torch.no_grad()
    def cached(self, tokens: int) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=prompt(tokens), **cache_argument(self.model, cache))
        return cache


# Without windows, and with one shorter than a prompt; a pointer network.
@pytest.fixture(scope="module", params=[("llama", False), ("gemma2", False), ("llama", True)])
def server(request):
    return Server(*request.param)


@pytest.fixture(scope="module")
def made(server):
    return ways(server.setup, LOAD)


BEFORE = LOAD.system + LOAD.prefix


def test_examples_in_every_prompt(server, made):
    got = counted(lambda: server.answer(BEFORE))
    assert got == made["icl"].first.flops() == made["icl"].later.flops()


def test_examples_cached(server, made):
    """From the first question on (the system text then is in the cache already), or before it."""
    for name, cached in (("icl-cold", LOAD.system), ("icl-warm", BEFORE)):
        cache = server.cached(cached)
        assert counted(lambda cache=cache: server.answer(BEFORE, cache)) == made[name].first.flops()
        cache = server.cached(BEFORE)
        assert counted(lambda cache=cache: server.answer(BEFORE, cache)) == made[name].later.flops()


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter(server, made, merge):
    """Describe, generate, perhaps merge, and use; then use alone, the system text read under the adapter."""
    way, handles = made["t2l-merged" if merge else "t2l-task"], []

    def first():
        handles.append(attach(server.model, server.make()))
        handles[0].merge(0) if merge else handles[0].set([0])
        server.answer(LOAD.system)

    assert counted(first) == way.first.flops()
    cache = server.cached(LOAD.system)
    assert counted(lambda: server.answer(LOAD.system, cache)) == way.later.flops()
    if merge:
        handles[0].unmerge()
    else:
        assert made["t2l-request"].first == made["t2l-request"].later == way.first
    handles[0].detach()
