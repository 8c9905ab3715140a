"""The loss of answers through a model with adapters by row, against the model's own logits, row by row."""

from collections import defaultdict

import pytest
import torch
from torch import nn

import t2l_engine as t2l
from t2l_engine.files.errors import ConfigError
from t2l_engine.research.training import context, sft
from t2l_engine.research.training.objective import Objective, collate, generated_l2, token_weights
from t2l_engine.research.training.sampling import Shard, divide
from t2l_engine.testing.numerics import GRADIENT_RTOL, LOSS_ATOL, STANDARD_ERRORS
from tests.research.training import plain_torch, small_runs

#: Family -> (what its tiny configuration needs, linears to adapt).
FAMILIES = {
    "Llama": ({}, ("q_proj", "v_proj", "down_proj")),
    "GPT2": ({}, ("c_attn", "c_fc")),  # learned positions, Conv1D
    "OPT": ({"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, ("fc1", "v_proj")),
    "Gemma2": ({"final_logit_softcapping": 2.0}, ("q_proj", "gate_proj")),
    "Cohere": ({"logit_scale": 0.25}, ("k_proj", "up_proj")),
    "Bloom": ({}, ("dense_h_to_4h",)),  # no position_ids: its positions are in the mask
    "Granite": ({"logits_scaling": 4.0, "embedding_multiplier": 3.0}, ("o_proj", "v_proj")),
}
#: Tokens and answer tokens of the samples of each group, and its task.
SIZES, TASKS = [[(7, 2), (12, 1)], [(3, 1)], [(9, 4), (5, 1)], [(4, 2), (6, 2)]], (0, 1, 0, 2)


@pytest.fixture
def made(tiny_model, make_stack):
    """Factory: (model, attached handle, a stack of four adapters) of a family."""

    def make(family="Llama"):
        changes, names = FAMILIES[family]
        model = tiny_model(family, **changes).requires_grad_(False)
        modules = context.locate(model, names)
        shapes = dict(zip(names, zip(modules.in_features, modules.out_features, strict=True), strict=True))
        paths = dict(zip(names, modules.paths, strict=True))
        stack = make_stack(shapes, num_adapters=4, num_layers=modules.num_layers, rank=3, paths=paths)
        return model, t2l.attach(model, stack[0]), stack

    return make


def expected_tokens(model, handle, stack, step, smoothing=0.0):
    """Of every sample of ``step``, in order: (its task, cross-entropy of every answer token)."""
    handle.detach()
    modules, found = {name: (stack.lora_A[name], stack.lora_B[name]) for name in stack.paths}, []
    for i, group in enumerate(step):
        for sample in group.samples:
            with torch.no_grad(), plain_torch.applied(model, modules, stack.paths, stack.scaling, [i]):
                found.append((group.task, plain_torch.answer_losses(model, sample, smoothing)))
    return found


@pytest.mark.parametrize("family, smoothing", [*((family, 0.0) for family in FAMILIES), ("Llama", 0.1)])
def test_losses_of_rows(made, family, smoothing):
    """Every row of a padded batch as alone and unpadded, with all its logits made by the model itself."""
    model, handle, stack = made(family)
    step = small_runs.groups(SIZES, TASKS)
    batch = collate(step, 0, lambda sample, group: 1 / sample.answer_len)
    with torch.no_grad():
        ours = Objective(model, handle).losses(batch, stack, label_smoothing=smoothing)
    with torch.enable_grad():
        training = Objective(model, handle).losses(batch, stack, label_smoothing=smoothing)
    theirs = torch.stack([tokens.mean() for _, tokens in expected_tokens(model, handle, stack, step, smoothing)])
    assert ours.dtype == torch.float32 and theirs.min() > 0.5  # rows of random models, far from being right
    assert (ours - theirs).abs().max() <= LOSS_ATOL and (training - theirs).abs().max() <= LOSS_ATOL


def test_weighting(made):
    """Means over samples, over tokens, and each task's own mean."""
    model, handle, stack = made()
    step = small_runs.groups(SIZES, TASKS)
    objective, found = Objective(model, handle), {}
    with torch.no_grad():
        for kind in ("sample", "token"):
            for per_task in (False, True):
                batch = collate(step, 0, token_weights(kind, step, per_task))
                rows = objective.losses(batch, stack)
                totals = defaultdict(float)
                for task, loss in zip(batch.tasks, rows.tolist(), strict=True):
                    totals[task] += loss
                found[kind, per_task] = dict(totals) if per_task else float(rows.sum())
    tokens = expected_tokens(model, handle, stack, step)
    by_task = defaultdict(list)
    for task, losses in tokens:
        by_task[task].append(losses)
    samples = torch.stack([losses.mean() for _, losses in tokens])
    assert abs(found["sample", False] - samples.mean()) <= LOSS_ATOL
    assert abs(found["token", False] - torch.cat([losses for _, losses in tokens]).mean()) <= LOSS_ATOL
    assert found["sample", True].keys() == found["token", True].keys() == {0, 1, 2}
    for task, losses in by_task.items():
        assert abs(found["sample", True][task] - torch.stack([t.mean() for t in losses]).mean()) <= LOSS_ATOL
        assert abs(found["token", True][task] - torch.cat(losses).mean()) <= LOSS_ATOL


@pytest.mark.parametrize("kind", ["sample", "token"])
@pytest.mark.parametrize("processes", [1, 2])
def test_batches_add_up(made, kind, processes):
    """Losses and regularisers of a step's batches, over processes, are those of the whole step."""
    model, handle, stack = made()
    step = small_runs.groups(SIZES, TASKS)
    objective, weight = Objective(model, handle), token_weights(kind, step, False)
    with torch.no_grad():
        whole = objective.losses(collate(step, 0, weight), stack).sum() + generated_l2(stack)
        total = torch.zeros(())
        for shard in (Shard(i, processes) for i in range(processes)):
            for part in divide(step, 2, shard):
                batch = collate(part, 0, weight)
                own = stack[[step.index(group) for group in part]]
                total += objective.losses(batch, own).sum() + len(part) / len(step) * generated_l2(own)
    assert abs(total - whole) <= LOSS_ATOL


def test_models_whose_logits_depend_on_padding(tiny_model):
    """Without position_ids, Bart counts padding and Bloom does not."""
    bart = tiny_model("Bart", decoder_layers=2, decoder_ffn_dim=96, decoder_attention_heads=4)
    with pytest.raises(ConfigError, match="^base_model: Bart.* takes no position_ids and gives other logits behind padding"):
        Objective(bart, None)
    for dtype in (torch.float32, torch.bfloat16):
        Objective(tiny_model("Bloom", dtype=dtype), None)


def test_neftune(made):
    """Uniform within alpha/sqrt(L D) on a row's own L tokens, none on padding, a function of the group alone."""
    model, handle, stack = made()
    model.get_input_embeddings().weight.zero_()  # what is seen is the noise
    objective, seen = Objective(model, handle), []
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone()),
        with_kwargs=True,
    )
    step = small_runs.groups([[(40, 2), (90, 1)], [(61, 1)], [(90, 4)], [(4, 2)]], (0, 0, 1, 2))

    def noise(part, alpha=5.0):
        batch = collate(part, 0, token_weights("sample", step, False))
        objective.losses(batch, stack, neftune_alpha=alpha)
        return seen.pop()

    rows = noise(step)
    lengths, scaled = [len(s.tokens) for g in step for s in g.samples], []
    for row, length in zip(rows, lengths, strict=True):
        bound = 5.0 / (length * 64) ** 0.5
        assert not row[: 90 - length].any() and row[90 - length :].abs().max() <= bound
        scaled.append(row[90 - length :].flatten() / bound)
    values = torch.cat(scaled)
    assert values.max() > 0.99 and values.min() < -0.99
    assert abs(values.mean()) <= STANDARD_ERRORS * (1 / 3 / len(values)) ** 0.5  # of a uniform draw in [-1, 1]
    assert abs(values.square().mean() - 1 / 3) <= STANDARD_ERRORS * (4 / 45 / len(values)) ** 0.5
    assert not torch.equal(rows[1], rows[3])  # of one length

    assert torch.equal(noise(step), rows)  # again
    alone = noise(step[1:2])
    assert torch.equal(alone[0], rows[2, -61:])  # in another batch
    assert torch.equal(noise(step[2:] + step[:1])[2:], rows[:2])
    assert not noise(step, 0.0).any()
    assert torch.equal(noise(step, 2.5), rows / 2)


@pytest.mark.parametrize("dropout", [0.5, 0.75])  # whose factors are exact
def test_dropout_of_a_layer(dropout):
    """Entries of the input of A are zero or 1/(1 - p) times as large, on the way back too; the base's input is whole."""
    width, count = 8, 4000
    model = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(width, width, bias=False)})]).requires_grad_(False)
    model[0]["q_proj"].weight.zero_()
    eye = torch.eye(width)[None, None]
    A, B = eye.clone().requires_grad_(), eye.clone().requires_grad_()  # the layer hands through what A gets
    stack = t2l.AdapterStack({"q_proj": A}, {"q_proj": B}, torch.ones(1))
    with torch.no_grad():
        handle = t2l.attach(model, stack)
    x = torch.arange(1.0, width + 1).expand(count, 1, width).contiguous()
    torch.manual_seed(0)
    with handle.differentiable(stack, [0] * count, dropout=dropout):
        got = model[0]["q_proj"](x)
    kept = got != 0
    assert torch.equal(got[kept], (x / (1 - dropout))[kept])
    error = (dropout * (1 - dropout) / x.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - dropout)) <= STANDARD_ERRORS * error
    spread = x[0, 0] * (dropout / (1 - dropout) / count) ** 0.5
    assert ((got.mean(dim=0)[0] - x[0, 0]).abs() <= STANDARD_ERRORS * spread).all()
    got.sum().backward()
    masked = got.detach().double().sum(dim=(0, 1))
    for side in (A, B):
        assert (side.grad[0, 0] - masked).abs().max() <= GRADIENT_RTOL * masked.max()


def test_validation(base_model, tasks):
    """The same whatever the settings of training; of several processes, their sum."""
    found = []
    noisy = {"label_smoothing": 0.2, "neftune_alpha": 5.0, "lora_dropout": 0.5, "weighting": "token"}
    for changes in ({}, noisy):
        settings = small_runs.sft(base_model, samples_per_task=2, validation_samples=5, **changes)
        fit = context.TrainingContext(settings, tasks, torch.device("cpu"))
        job = sft.SFT(settings, fit)
        with torch.no_grad():
            for head in job.model.heads.values():  # adapters that do something
                head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
            found.append(job.validate(Shard()))
        batch = job.batches(0, Shard())[0]
        found.append(job.loss(job.model, batch).item())
        parts = [job.validate(Shard(index, 2)) for index in range(2)]
        fit.close()
    assert found[0] == found[2] and found[1] != found[3]
    for name, loss in found[0].items():
        assert abs(sum(part[name] for part in parts) - loss) <= LOSS_ATOL
