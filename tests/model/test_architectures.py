"""Every architecture of conf/model: sizes, LoRA targets, and sampling against scoring and transformers' forward."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_exp.model import shapes
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.paths import conf_dir
from rlhf_exp.rollout import scoring
from rlhf_exp.rollout.engine import Rollout, generate
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import Generation, Lora
from tests.model.architectures import EOS, TABLE, VOCABULARY, conf, full_size, small_base, small_config

NAMES = sorted(TABLE)
# their modelling code is this package's, and tested with it
OURS = {"baichuan7b", "baichuan13b", "baichuan2_7b", "baichuan2_13b"}
# built in code for tests by a family of data
BUILT = {"randomwalks"}


@pytest.fixture(scope="module")
def bases() -> dict:
    return {}


@pytest.fixture
def small(bases, request):
    """The scaled-down model of a name, built once a module."""
    name = request.param
    if name not in bases:
        bases[name] = small_base(name)
    return bases[name]


every = pytest.mark.parametrize("small", NAMES, indirect=True)


def test_every_model_is_covered():
    assert {path.stem for path in (conf_dir() / "model").glob("*.yaml")} - OURS - BUILT == set(NAMES)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"tiny"}))
def test_published_sizes(name):
    """The config file's numbers against the model that transformers builds of the published config."""
    model, facts = full_size(name), conf(name)
    config = model.config
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(facts.billion_params, rel=2e-3)
    assert (config.num_hidden_layers, config.hidden_size) == (facts.layers, facts.hidden_size)
    assert model.get_output_embeddings().weight.shape[0] == facts.vocab_size


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_all_linear_layers_inside_the_blocks(name):
    """Every target is there, and no linear layer of a block is forgotten."""
    targets = conf(name).lora_targets
    linear = {
        path.rpartition(".")[2]
        for path, module in small_base(name).trunk.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and "." in path
        and not path.endswith(("project_in", "project_out"))
    }
    assert linear == set(targets)
    assert len(targets) == len(set(targets))


def rows(base) -> tuple[list[list[int]], list[int]]:
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in (3, 11, 1, 7)]
    return prompts, [row_key(0, 0, i) for i in range(len(prompts))]


GENERATION = Generation(max_new_tokens=9, min_new_tokens=1)


def scored(base, rollout: Rollout, picked: list[int]) -> list[torch.Tensor]:
    with Roles(base) as roles:
        batch = scoring.answers(rollout, picked, base)
        with torch.no_grad():
            hidden = scoring.hidden_before(roles, BASE, batch)
            found = scoring.answer_logprobs(base, hidden, batch, GENERATION).logprobs
    return list(found.split([len(rollout.responses[row]) for row in picked]))


@every
def test_sampling_scoring_and_a_plain_forward_agree(small):
    """Prompts of different lengths in a batch: the engine's and the scorer's log-probs, and transformers' own."""
    prompts, keys = rows(small)
    rollout = generate(small, nullcontext, prompts, keys, GENERATION)
    together = scored(small, rollout, [0, 1, 2, 3])
    for row, (prompt, response) in enumerate(zip(prompts, rollout.responses, strict=True)):
        assert (together[row] - rollout.logprobs[row]).abs().max() < 1e-4
        with torch.no_grad():  # the oracle: the whole model, one row, no padding, no cache, no mask
            logits = small.model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1].clone()
        logits[0, EOS] = -torch.inf
        truth = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        assert (together[row] - truth).abs().max() < 1e-4
        assert truth.std() > 0.05 or len(truth) == 1  # not the uniform distribution


@every
def test_batch_neighbours_change_nothing(small):
    prompts, keys = rows(small)
    together = generate(small, nullcontext, prompts, keys, GENERATION)
    for row in range(len(prompts)):
        alone = generate(small, nullcontext, prompts[row : row + 1], keys[row : row + 1], GENERATION)
        assert alone.responses[0] == together.responses[row]
        assert (alone.logprobs[0] - together.logprobs[row]).abs().max() < 1e-4
        assert (scored(small, alone, [0])[0] - scored(small, together, [0, 1, 2, 3])[row]).abs().max() < 1e-4


@every
def test_texts_before_and_order_count(small):
    """A model whose log-probs do not depend on positions would pass the tests above."""
    ids = torch.tensor([[5, 9, 5, 9, 30, 31]])
    swapped = torch.tensor([[9, 5, 5, 9, 30, 31]])
    with torch.no_grad():
        first, second = (
            small.trunk(input_ids=x, use_cache=False).last_hidden_state[0, -1] for x in (ids, swapped)
        )
    assert (first - second).abs().max() > 1e-3


@every
def test_lora_through_roles(small, request):
    """KL 0 before the first step, another policy after it, the base untouched, nothing left behind."""
    name = request.node.callspec.params["small"]
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    weight, bias = small.output_layer
    plain = small.trunk(input_ids=ids, use_cache=False).last_hidden_state
    modules = {path: type(module) for path, module in small.model.named_modules()}
    wrapped = shapes.wrapped(_shapes(small), conf(name).lora_targets)

    def logprobs(hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, weight, bias).log_softmax(-1)

    with Roles(small) as roles:
        roles.new("policy", lora_config(Lora(r=4), conf(name)), seed=0)
        before = roles.trunk("policy", ids)
        assert (logprobs(before) - logprobs(plain)).abs().max() == 0
        parameters = roles.parameters("policy")
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        head = ScalarHead(small.hidden_size).reset(0)
        (logprobs(before)[..., 7].sum() + head(before).sum()).backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        assert (logprobs(roles.trunk("policy", ids)) - logprobs(plain)).abs().max() > 1e-3
        assert (roles.trunk(BASE, ids) - plain).abs().max() == 0
        assert sum(p.numel() for p in parameters) == 4 * sum(map(sum, wrapped.values()))
    assert {path: type(module) for path, module in small.model.named_modules()} == modules


def _shapes(base) -> shapes.Shapes:
    """[out, in] of the model in memory, from the modules themselves."""
    return {
        f"{path}.weight": tuple(
            module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        )
        for path, module in base.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_the_files_are_those_of_the_model(name, tmp_path):
    """What preflight reads from headers, also where a file leaves out the trunk's name, as hub files do."""
    base = small_base(name)
    base.model.save_pretrained(tmp_path)
    read = shapes.of_model(tmp_path)
    assert {key: read[key] for key in _shapes(base) if key in read} == {
        key: shape for key, shape in _shapes(base).items() if key in read
    }
    assert set(_shapes(base)) - set(read) <= {"lm_head.weight"}  # tied: written once
    assert shapes.size_of(tmp_path).parameters == sum(math.prod(shape) for shape in read.values())
    assert shapes.size_of(tmp_path).layers == small_config(name).num_hidden_layers
    assert shapes.output_width(tmp_path) == base.hidden_size == base.output_layer[0].shape[1]
    targets = conf(name).lora_targets
    shapes.require_targets(read, targets, name)
    assert shapes.wrapped(shapes.of_config(tmp_path), targets) == shapes.wrapped(read, targets)
    assert shapes.wrapped(read, targets) == shapes.wrapped(_shapes(base), targets)


def test_heads_of_opt350m_fit_the_projected_hidden_states():
    base = small_base("opt350m")
    assert (base.model.config.hidden_size, base.hidden_size) == (32, 16)
    hidden = base.trunk(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False).last_hidden_state
    assert ScalarHead(base.hidden_size).reset(0)(hidden).shape == (1, 3)


def _folder(path, kind: str, tensors: dict[str, tuple[int, ...]]):
    """A model's folder with the names and shapes of a hub file."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path / "model.safetensors")
    return path


def test_files_of_the_hub_that_leave_out_the_trunk_and_hold_buffers(tmp_path):
    """The names of openai-community/gpt2, bigscience/bloom, facebook/opt and EleutherAI/pythia on the hub."""
    gpt2 = {
        "wte.weight": (11, 4),
        "h.0.attn.bias": (1, 1, 8, 8),
        "h.0.attn.c_attn.weight": (4, 12),
        "h.0.attn.c_attn.bias": (12,),
        "h.0.mlp.c_fc.weight": (4, 16),
    }
    assert shapes.of_model(_folder(tmp_path / "gpt2", "gpt2", gpt2)) == {
        "transformer.wte.weight": (11, 4),
        "transformer.h.0.attn.c_attn.weight": (12, 4),
        "transformer.h.0.attn.c_attn.bias": (12,),
        "transformer.h.0.mlp.c_fc.weight": (16, 4),
    }
    bloom = {"word_embeddings.weight": (11, 4), "h.0.self_attention.query_key_value.weight": (12, 4)}
    assert shapes.of_model(_folder(tmp_path / "bloom", "bloom", bloom)) == {
        "transformer.word_embeddings.weight": (11, 4),
        "transformer.h.0.self_attention.query_key_value.weight": (12, 4),
    }
    opt = {"decoder.embed_tokens.weight": (11, 4), "lm_head.weight": (11, 4)}
    assert set(shapes.of_model(_folder(tmp_path / "opt", "opt", opt))) == {
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    pythia = {
        "gpt_neox.layers.0.attention.bias": (1, 1, 8, 8),
        "gpt_neox.layers.0.attention.masked_bias": (1,),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,),
        "gpt_neox.layers.0.attention.dense.bias": (4,),
        "embed_out.weight": (11, 4),
    }
    assert set(shapes.of_model(_folder(tmp_path / "pythia", "gpt_neox", pythia))) == {
        "gpt_neox.layers.0.attention.dense.bias",
        "embed_out.weight",
    }
