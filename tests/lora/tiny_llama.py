"""What tests do with the tiny Llama of ``conftest.py``: run it, and compare it with what it was."""

import torch

NAMES = ("q_proj", "v_proj", "down_proj")


@torch.no_grad()
def logits(model, tokens, handle=None, ids=-1, **kwargs):
    if handle is None:
        return model(tokens, use_cache=False, **kwargs).logits
    with handle.use(ids):
        return model(tokens, use_cache=False, **kwargs).logits


def generate(model, tokens, **kwargs):
    return model.generate(tokens, **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | kwargs)


def snapshot(model):
    """Modules by name, and a copy of every tensor."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return dict(model.named_modules()), state


def assert_untouched(model, before):
    """``model`` has the modules and the bits of :func:`snapshot`."""
    modules, state = before
    now = dict(model.named_modules())
    assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)
    after = model.state_dict()
    assert list(after) == list(state)
    for key, tensor in state.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor), key
