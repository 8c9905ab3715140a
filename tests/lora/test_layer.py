"""What an attached model is used for: generation, training, compilation, export, saving."""

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch

from t2l_engine import AdapterBatch, AdapterStack, attach
from t2l_engine.testing.numerics import GRADIENT_RTOL, LOGITS_ATOL, ROW_ATOL, relative_frobenius, u

NAMES = ("q_proj", "v_proj", "down_proj")


@pytest.fixture
def model(tiny_model, request):
    """Of two layers, or of as many as a test asks for."""
    return tiny_model("Llama", head_dim=32, num_hidden_layers=getattr(request, "param", 2))


@pytest.fixture
def handle(model, stack_for):
    """Four adapters on ``model``."""
    return attach(model, stack_for(model, NAMES, num_adapters=4))


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(1))


def generate(model, tokens, **kwargs):
    return model.generate(tokens, **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | kwargs)


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(tokens, use_cache=False, **kwargs).logits


def test_two_handles_are_refused(model, handle, make_stack):
    for target in (model, model.model, model.model.layers[0]):
        with pytest.raises(ValueError, match="attached already"):
            attach(target, make_stack({"up_proj": (64, 96)}))


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [{"do_sample": True}, {"do_sample": True, "num_return_sequences": 3}, {"do_sample": True, "num_beams": 2}],
    ids=["sampling", "several", "beams"],
)
def test_sampling(model, handle, tokens, kwargs):
    """A row draws what it draws with its adapter alone, in a batch of the same shape with the same seed."""
    copies, order = kwargs.get("num_return_sequences", 1), [2, 0, -1, 3]

    def draw(ids):
        torch.manual_seed(5)
        with handle.use(ids):
            return generate(model, tokens, **kwargs).unflatten(0, (4, copies))

    mixed, base = draw(order), draw(-1)
    for row, adapter in enumerate(order):
        # Beams of all rows are drawn from one stream, but each from the scores of its own row.
        assert torch.equal(mixed[row], draw(adapter)[row])
        assert torch.equal(mixed[row], base[row]) == (adapter == -1)


def test_left_padding(model, handle, tokens):
    mask = (torch.arange(7) >= torch.arange(4)[:, None]).long()
    with handle.use([2, 0, -1, 3]):
        padded = generate(model, tokens * mask, attention_mask=mask)
    for row, adapter in enumerate([2, 0, -1, 3]):
        with handle.use(adapter):
            alone = generate(model, tokens[row : row + 1, row:])
        assert torch.equal(padded[row, row:], alone[0])


def test_right_padding(model, handle, tokens):
    mask = (torch.arange(7) < 7 - torch.arange(4)[:, None]).long()
    with handle.use([2, 0, -1, 3]):
        padded = logits(model, tokens * mask, attention_mask=mask)
    for row, adapter in enumerate([2, 0, -1, 3]):
        with handle.use(adapter):
            alone = logits(model, tokens[row : row + 1, : 7 - row])
        assert (padded[row, : 7 - row] - alone[0]).abs().max() <= LOGITS_ATOL


def test_static_cache(model, handle, tokens):
    with handle.use([2, 0, -1, 3]):
        dynamic = generate(model, tokens)
        static = generate(model, tokens, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, dynamic)


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant", "early exit"])
@pytest.mark.filterwarnings("ignore")
def test_assisted_generation(tiny_model, model, handle, tokens, kind):
    """Drafts of any origin change the number of steps, not the tokens: the adapted model checks them."""
    assistant = tiny_model("Llama", num_hidden_layers=1)
    draft = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": assistant}}
    one = tokens[:1].repeat(1, 3)  # a prompt with something to look up
    outputs = []
    for adapter in (1, 3, -1):
        with handle.use([adapter]):
            plain = generate(model, one, max_new_tokens=16)
            outputs.append(plain)
            assert torch.equal(
                generate(model, one, max_new_tokens=16, **draft.get(kind, {"assistant_early_exit": 1})), plain
            )
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


# --- modes of torch --------------------------------------------------------------------------------------------------


def test_autocast(model, handle, tokens):
    with handle.use([2, 0, -1, 3]):
        expected = logits(model, tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = logits(model, tokens)
    # Two decoder layers; each of their products rounds its operands to bfloat16.
    assert relative_frobenius(got, expected) <= 16 * u(torch.bfloat16)


def test_inference_mode(model, stack_for, tokens):
    """What was made in inference mode is used, changed and differentiated outside, and the other way round."""
    stack = stack_for(model, NAMES, num_adapters=4)
    with torch.inference_mode():
        handle = attach(model, stack[[0, 1]], slots=4)
        handle.set([0, 1, 0, -1])
        inside = model(tokens, use_cache=False).logits
    assert torch.equal(inside, logits(model, tokens))
    handle.put(2, stack[2])
    handle.set([1, 0, 2, -1])
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits.clone()
        handle.put(3, stack[3])
    got = model(tokens, use_cache=False).logits
    got.sum().backward()
    assert (got.detach() - expected).abs().max() <= ROW_ATOL
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    with torch.inference_mode(), handle.use([3, 3, 3, -1]):
        model(tokens)
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize(("made", "merged"), [(True, False), (True, True), (False, True)])
def test_merge_and_inference_mode(tiny_model, stack_for, tokens, made, merged):
    with torch.inference_mode(made):
        model = tiny_model("Llama")
    base, handle = logits(model, tokens), attach(model, stack_for(model, NAMES))
    with handle.use(1):
        applied = logits(model, tokens)
    with torch.inference_mode(merged):
        handle.merge(1)
    assert (logits(model, tokens) - applied).abs().max() <= LOGITS_ATOL
    handle.unmerge()
    assert torch.equal(logits(model, tokens), base)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_model, stack_for, tokens, reentrant):
    ids = [2, -1, 0, 2]

    def gradients(checkpointing, where="inside", outer=None, between=None, dropout=0.0):
        model = tiny_model("Llama").train().requires_grad_(False)
        stack = stack_for(model, NAMES)
        handle = attach(model, stack)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        leaves = [t.detach().clone().requires_grad_() for t in (*stack.lora_A.values(), *stack.lora_B.values())]
        halves = (dict(zip(stack.lora_A, part, strict=True)) for part in (leaves[: len(NAMES)], leaves[len(NAMES) :]))
        own = AdapterStack(*halves, stack.scaling)
        if outer is not None:
            handle.set(outer)
        with handle.differentiable(own, ids, dropout=dropout):
            loss = model(tokens, use_cache=False).logits.square().mean()
            if where == "inside":
                if between is not None:
                    between(model, handle)
                loss.backward()
        if where == "outside":
            loss.backward()
        return [leaf.grad for leaf in leaves]

    def evaluate(model, handle):
        model.eval()
        with handle.use(1):
            logits(model, tokens)
        model.train()

    def train(model, handle):
        with handle.use(1):
            model(tokens, use_cache=False)

    if reentrant:  # its first pass records no gradients, and so would drop nothing where the recomputation does
        with pytest.raises(RuntimeError, match="dropout: expected gradients to be recorded .* use_reentrant=False"):
            gradients(True, dropout=0.5)
    else:
        gradients(True, dropout=0.5)

    def same(got):
        return all((a - b).abs().max() <= GRADIENT_RTOL * b.abs().max() for a, b in zip(got, expected, strict=True))

    expected = gradients(False)
    assert all(grad.abs().max() > 0 for grad in expected)
    assert same(gradients(False, "outside"))  # nothing is recomputed
    assert same(gradients(True)) and same(gradients(True, between=evaluate))
    # Recomputed with the base model, or with other adapters, gradients would be wrong without a sign of it.
    for kwargs in ({"where": "outside"}, {"where": "outside", "outer": [1, 1, 1, 1]}, {"between": train}):
        with pytest.raises(RuntimeError, match=r"recomputes the forward pass .*call backward\(\) inside the with-block"):
            gradients(True, **kwargs)


@pytest.mark.parametrize("nested", [False, True])
def test_put_between_forward_and_recomputation(model, handle, stack_for, tokens, nested):
    model.train().requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    with handle.use([2, 0, -1, 3]):
        loss = model(tokens, use_cache=False).logits.sum()
        with handle.use(1) if nested else contextlib.nullcontext():
            handle.put(0, stack_for(model, NAMES, num_adapters=1, seed=7))
        with pytest.raises(RuntimeError, match="recomputes the forward pass"):
            loss.backward()


def test_threads(tiny_model, stack_for, tokens):
    """One model and one handle a thread."""
    orders = ([0, 1, 2, -1], [3, 3, 0, 1], [-1, 2, 1, 0])

    def make():
        model = tiny_model("Llama")
        return model, attach(model, stack_for(model, NAMES, num_adapters=4))

    def work(model, handle, start, results):
        for step in range(6):
            with handle.use(orders[(start + step) % 3]):
                results.append(logits(model, tokens))

    serial, parallel, threads = [], [[], [], []], []
    pairs = [make() for _ in orders]
    for start in range(3):
        serial.append([])
        work(*pairs[start], start, serial[-1])
    for start in range(3):
        threads.append(threading.Thread(target=work, args=(*pairs[start], start, parallel[start])))
        threads[-1].start()
    for thread in threads:
        thread.join()
    for a, b in zip(serial, parallel, strict=True):
        assert len(a) == len(b) == 6
        assert all((x - y).abs().max() <= ROW_ATOL for x, y in zip(a, b, strict=True))


# --- compilation and export ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [1], indirect=True)
def test_compiled_decode_step(model, handle, stack_for, tokens):
    """One decode step on a static cache: no recompilation over ids in any form, tokens or adapters."""
    from transformers import StaticCache

    torch._dynamo.reset()

    def step(token, cache, position):
        return model(token, past_key_values=cache, position_ids=position, use_cache=True).logits

    def caches():
        made = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
        handle.set([0, 1, 2, -1])
        for cache in made:
            model(tokens, past_key_values=cache, use_cache=True)
        return made

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    adapters = _adapters(model, stack_for)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        ours, theirs = caches()
        position = torch.full((4, 1), 7)
        token = torch.randint(3, 97, (4, 1), generator=generator)
        compiled(token, ours, position)
        step(token, theirs, position)
        with torch.compiler.set_stance("fail_on_recompile"):
            for i in range(20):
                ids = [int(a) - 1 for a in torch.randint(0, 5, (4,), generator=generator)]
                form = (ids, torch.tensor(ids), tuple(ids), torch.tensor(ids, dtype=torch.int32), ids[0])[i % 5]
                handle.set(form)
                if i % 4 == 3:
                    handle.put(i % 3, adapters[i // 4])
                token = torch.randint(3, 97, (4, 1), generator=generator)
                position = torch.full((4, 1), 8 + i)
                assert (compiled(token, ours, position) - step(token, theirs, position)).abs().max() <= LOGITS_ATOL


def _adapters(model, stack_for):
    """Five stacks of one adapter; the fourth lacks a module, the fifth has a smaller rank."""
    shapes = [{"names": NAMES, "seed": i} for i in range(3)]
    shapes += [{"names": ("q_proj",), "seed": 3}, {"names": NAMES, "seed": 4, "rank": 2}]
    return [stack_for(model, num_adapters=1, **kwargs) for kwargs in shapes]


@pytest.mark.parametrize("model", [1], indirect=True)
@pytest.mark.parametrize("strict", [False, True])
def test_export(model, handle, stack_for, tokens, strict):
    """An exported program reads ids and slots where they were at export: as long as their number of rows stays, it sees
    new ones.  A saved program keeps those of the moment it is saved."""
    handle.set([2, 0, -1, 3])
    program = torch.export.export(model, (tokens,), {"use_cache": False}, strict=strict)

    @torch.no_grad()
    def run(exported):
        return exported.module()(tokens, use_cache=False).logits

    first = logits(model, tokens)
    assert (run(program) - first).abs().max() <= ROW_ATOL
    saved = io.BytesIO()
    torch.export.save(program, saved)
    handle.set([1, -1, 0, 0])
    handle.put(0, stack_for(model, NAMES, num_adapters=1, seed=7))
    second = logits(model, tokens)
    assert (run(program) - second).abs().max() <= ROW_ATOL
    assert (second - first).abs().amax(dim=(1, 2)).min() > 1000 * ROW_ATOL
    saved.seek(0)
    assert (run(torch.export.load(saved)) - first).abs().max() <= ROW_ATOL


def test_exported_programs_see_ids_set_later(model, handle, tokens):
    """The ids of a number of rows stay in one place, whatever was in use meanwhile."""
    with handle.use([2, 0, -1, 3]):
        program = torch.export.export(model, (tokens,), {"use_cache": False}).module()
    with handle.use([1, 1]):
        logits(model, tokens[:2])
    handle.merge(0)
    handle.unmerge()
    batch = AdapterBatch.from_rows([0, 0, 0, 0], tokens.shape[1])
    with handle.use(batch):
        logits(model, tokens)
    with torch.no_grad():
        for ids in ([0, 1, 2, -1], [3, -1, -1, 0]):
            with handle.use(ids):
                assert (program(tokens, use_cache=False).logits - logits(model, tokens)).abs().max() <= ROW_ATOL


def test_forward_mode_is_refused(model, handle, tokens):
    x = torch.randn(4, 7, 64)
    layer = model.model.layers[0].self_attn.q_proj
    torch.func.jvp(layer, (x,), (x,))
    with handle.use([2, 0, -1, 3]), pytest.raises(NotImplementedError, match="adapters have no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))


# --- copies and files ------------------------------------------------------------------------------------------------


def test_copies_are_refused(model, handle):
    for call in (
        copy.deepcopy,
        lambda m: copy.copy(m.model.layers[0].self_attn.q_proj),
        pickle.dumps,
        lambda m: torch.save(m, io.BytesIO()),
    ):
        with pytest.raises(RuntimeError, match="adapters attached; detach them before"):
            call(model)
    handle.detach()
    assert pickle.loads(pickle.dumps(model)).config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(tiny_model, handle, model, tokens, assign):
    base = tiny_model("Llama", head_dim=32)
    handle.set([2, 0, -1, 3])
    state, expected = model.state_dict(), base.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in state)

    changed = {key: tensor + 0.1 for key, tensor in expected.items()}
    before = logits(model, tokens)
    assert str(model.load_state_dict(changed, strict=True, assign=assign)) == "<All keys matched successfully>"
    base.load_state_dict(changed)
    assert torch.equal(logits(model, tokens)[2], logits(base, tokens)[2]) and not torch.equal(logits(model, tokens), before)
    assert list(changed) == list(expected)

    key = "model.layers.0.self_attn.q_proj"
    changed[f"{key}.extra"] = changed.pop(f"{key}.weight")
    result = model.load_state_dict(changed, strict=False)
    assert result.missing_keys == [f"{key}.weight"] and result.unexpected_keys == [f"{key}.extra"]


def test_loading_while_merged_is_refused(model, handle, tokens):
    base = logits(model, tokens)
    handle.merge(0)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) before loading"):
            model.load_state_dict(state, assign=assign)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before loading"):
        model.load_state_dict(zeros)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())  # not even the first ones
    with pytest.raises(RuntimeError, match=r"merged into the weight; call unmerge\(\)"):
        model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(64, 64))
    handle.unmerge()
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, tokens), base)
    layer = model.model.layers[0].self_attn.q_proj
    layer.bias = torch.nn.Parameter(torch.ones(layer.out_features))
    layer.bias = None
    assert torch.equal(logits(model, tokens), base)


def test_unmerge_after_parameters_were_replaced(model, handle, tokens):
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    handle.merge(0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
    handle.unmerge()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_tying_and_resizing(tiny_model, make_stack, tokens, tied):
    model = tiny_model("Llama", tie_word_embeddings=tied)
    stack = make_stack({"lm_head": (64, 97)}, num_layers=1, paths={"lm_head": "lm_head"})
    handle = attach(model, stack)
    with handle.use([0, 1, 2, -1]):
        before = logits(model, tokens)
        model.tie_weights()
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert torch.equal(logits(model, tokens), before)
    with pytest.raises((RuntimeError, TypeError), match="detach the adapters before resizing" if tied else "LoRALinear"):
        model.resize_token_embeddings(101)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained(tiny_model, make_stack, tmp_path, tied):
    from safetensors.torch import load_file

    model = tiny_model("Llama", tie_word_embeddings=tied)
    head = make_stack({"lm_head": (64, 97)}, num_adapters=1, num_layers=1, paths={"lm_head": "lm_head"})
    model.save_pretrained(tmp_path / "base")
    handle = attach(model, AdapterStack.cat([head, make_stack({"q_proj": (64, 64)}, num_adapters=1)]))
    handle.set(0)
    model.save_pretrained(tmp_path / "attached")
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "attached"))
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("base", "attached")]
    assert configs[0] == configs[1]
