"""Prompts computed once: scores and gradients against two plain forwards a pair, for every architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlhf_exp.data.pairs import Pair, groups, pack
from rlhf_exp.model import sharing, slices
from rlhf_exp.model.base import load_base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.rewards.pairs import cannot_share, hidden_states, score_pairs
from rlhf_exp.schema import Lora, Model
from tests.model.architectures import TABLE, VOCABULARY, conf, small_base
from tests.model.baichuan_folder import write_baichuan

BAICHUAN = {"7b": "baichuan7b", "13b": "baichuan13b", "baichuan2-13b": "baichuan2_13b"}
NAMES = [*sorted(TABLE), *BAICHUAN]


def draw(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


# a prompt longer than Gemma's window of five; answers of one token; the same answer twice; an empty prompt
PAIRS = [
    Pair(*draw(1, 11, 4, 7)),
    Pair(*draw(2, 3, 9, 2)),
    Pair(*draw(3, 8, 1, 1)),
    Pair(draw(4, 13)[0], *(draw(5, 6) * 2)),
    Pair([], *draw(6, 3, 5)),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    found = {}

    def of(name: str):
        if name not in found:
            if name in BAICHUAN:
                folder = write_baichuan(tmp_path_factory.mktemp("baichuan") / name, name)
                model = Model(name=name, path=str(folder), dtype="float32", lora_targets=["W_pack"])
                found[name] = load_base(model, "cpu"), model
            else:
                found[name] = small_base(name), conf(name)
        return found[name]

    return of


def trained(base, model, **lora) -> tuple[Roles, ScalarHead]:
    """A role whose adapter is not the start, and a head."""
    roles = Roles(base)
    roles.new("reward", lora_config(Lora(r=4, **lora), model), 0)
    generator = torch.Generator().manual_seed(9)
    for parameter in roles.parameters("reward"):
        if parameter.ndim == 2:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return roles, ScalarHead(base.hidden_size).reset(0)


def alone(roles: Roles, head: ScalarHead, ids: list[int], answer: int) -> torch.Tensor:
    """The scores after each of the last `answer` tokens of one sequence: a forward of its own, nothing padded."""
    with roles.use("reward"):
        hidden = roles.base.trunk(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
    return head(hidden[0, -answer:])


def weights_of(pair: int, side: int, length: int) -> torch.Tensor:
    """Any numbers, so that a loss counts every score differently."""
    return torch.sin(torch.arange(length) + 3 * pair + 7 * side)


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients_are_those_of_separate_forwards(bases, name):
    check(*bases(name))


@pytest.mark.parametrize("name", ["llama3_8b", "gpt2", "bloom_7b1"])
def test_with_dora(bases, name):
    base, model = bases(name)
    check(base, model, dora=True)


def check(base, model, **lora) -> None:
    assert cannot_share(base) is None
    roles, head = trained(base, model, **lora)
    with roles:
        parameters = [*roles.parameters("reward"), head.weight]
        found = head(hidden_states(roles, "reward", pack(PAIRS), share=True))
        one, other = torch.zeros(()), torch.zeros(())
        for i, pair in enumerate(PAIRS):
            for side, answer in enumerate((pair.chosen, pair.rejected)):
                expected = alone(roles, head, pair.prompt + answer, len(answer))
                scores = found[side * len(PAIRS) + i]
                assert (scores[: len(answer)] - expected).abs().max() < 1e-5
                # after its end an answer keeps its last score
                assert ((scores[len(answer) :] - scores[len(answer) - 1]).abs() < 1e-6).all()
                weights = weights_of(i, side, len(answer))
                one = one + (scores[: len(answer)] * weights).sum()
                other = other + (expected * weights).sum()
        found, expected = (torch.autograd.grad(loss, parameters) for loss in (one, other))
        size = max(float(gradient.abs().max()) for gradient in expected)
        assert size > 1e-2
        for mine, plain in zip(found, expected, strict=True):
            assert (mine - plain).abs().max() < 1e-5 * max(1.0, size)


@pytest.mark.parametrize("name", ["tiny", "opt350m"])
def test_the_way_without_sharing_is_the_same(bases, name):
    base, model = bases(name)
    roles, _ = trained(base, model)
    with roles, torch.no_grad():
        found, plain = (hidden_states(roles, "reward", pack(PAIRS), share) for share in (True, False))
        assert found.shape == plain.shape == (10, 9, base.hidden_size)
        assert (found - plain).abs().max() < 1e-5
        packed = pack(PAIRS)
        last = hidden_states(roles, "reward", packed._replace(answers=packed.answers[:, -1:]), share=False)
        assert (last - plain[:, -1:]).abs().max() < 1e-6


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("size", "tokens"), [(1, 0), (2, 0), (5, 0), (5, 40), (3, 1)])
def test_scores_of_pairs_do_not_depend_on_their_company(bases, share, size, tokens):
    base, model = bases("tiny")
    roles, head = trained(base, model)
    with roles, torch.no_grad():
        found = score_pairs(roles, "reward", head, PAIRS, size, tokens, share)
        for pair, scores in zip(PAIRS, found, strict=True):
            for answer, score in zip((pair.chosen, pair.rejected), scores, strict=True):
                assert abs(score - float(alone(roles, head, pair.prompt + answer, 1))) < 1e-5


def test_progress_is_told_of_every_pair(bases):
    base, model = bases("tiny")
    roles, head = trained(base, model)
    told = []
    with roles, torch.no_grad():
        score_pairs(roles, "reward", head, PAIRS, 2, progress=told.append)
    assert told[-1] == len(PAIRS) and told == sorted(told) and len(told) == -(-len(PAIRS) // 2)


def test_blocks_of_queries_change_nothing(bases, monkeypatch):
    base, model = bases("gemma3_270m")
    roles, _ = trained(base, model)
    with roles, torch.no_grad():
        whole = hidden_states(roles, "reward", pack(PAIRS), share=True)
        for rows in (1, 3, 5):
            monkeypatch.setattr(slices, "ROWS", rows)
            assert (hidden_states(roles, "reward", pack(PAIRS), share=True) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernels_of_other_devices_agree(window, biased):
    """What CUDA computes, computed here: values and gradients."""
    generator = torch.Generator().manual_seed(0)
    packed = pack(PAIRS)
    length = packed.ids.shape[1]
    bias = torch.arange(length) * torch.tensor([0.5, 0.25, 0.1, 0.0])[None, :, None, None] if biased else None
    shapes = ((1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 8))
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    texts = sharing.texts_of(packed.spans)
    weights = torch.randn(shapes[0], generator=generator)
    results = []
    for function in (slices.attend, slices._fused):
        found = function(*inputs, texts, 0.3, bias, window)
        results.append([found, *torch.autograd.grad((found * weights).sum(), inputs)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() < 1e-5


def test_in_bfloat16_both_ways_are_within_its_rounding(smollm2_path):
    base = load_base(Model(name="smollm2_135m", path=str(smollm2_path), dtype="bfloat16"), "cpu")
    assert cannot_share(base) is None
    pairs = [Pair(*draw(seed, 40, 12, 20)) for seed in (1, 2)]
    exact = load_base(Model(name="smollm2_135m", path=str(smollm2_path), dtype="float32"), "cpu")
    with torch.no_grad():
        truth = hidden_states(Roles(exact), BASE, pack(pairs), share=False)
        errors = [
            float(
                (hidden_states(Roles(base), BASE, pack(pairs), share).float() - truth).norm() / truth.norm()
            )
            for share in (True, False)
        ]
    assert errors[0] < 1.3 * errors[1] < 0.1


# ---------------------------------------------------------------- models that cannot


def test_the_model_is_as_before(bases):
    for name in ("gptj6b", "bloom_560m", "tiny"):
        base, _ = bases(name)
        implementation = base.model.config._attn_implementation
        before = [dict(vars(module)) for module in base.model.modules()]
        with torch.no_grad():
            hidden_states(Roles(base), BASE, pack(PAIRS), share=True)
        assert base.model.config._attn_implementation == implementation
        assert [dict(vars(module)) for module in base.model.modules()] == before


def test_a_soft_cap_is_refused():
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, attn_implementation="eager")).eval()
    assert "softcap" in cannot_share(base_of(model))


def base_of(model):
    from rlhf_exp.model.base import Base

    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    return Base(model, tokenizer, None, "hash", torch.float32, torch.device("cpu"))


def test_a_model_that_mixes_its_tokens_otherwise_is_found_out():
    """A recurrent one: transformers' own, which takes the row and gives something else."""
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    reason = cannot_share(base_of(AutoModelForCausalLM.from_config(config).eval()))
    assert reason is not None and ("differ by" in reason or "does not take" in reason)


def test_a_window_that_attention_is_not_told_of_is_found_out(bases, monkeypatch):
    base, _ = bases("tiny")
    monkeypatch.setattr(base.model.config, "sliding_window", 4096, raising=False)
    assert "windows" in cannot_share(base)
    monkeypatch.setattr(base.model.config, "use_sliding_window", False, raising=False)
    assert cannot_share(base) is None
    monkeypatch.setattr(
        base.model.config, "layer_types", ["full_attention", "chunked_attention"], raising=False
    )
    assert "chunks" in cannot_share(base)


# ---------------------------------------------------------------- the row


def test_the_row_by_hand():
    packed = pack([Pair([1, 2], [3], [4, 5]), Pair([6], [7, 8], [9])])
    assert packed.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert packed.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert packed.spans == ((0, 2, 1, 2), (5, 1, 2, 1))
    assert packed.answers.tolist() == [[2, 2], [6, 7], [3, 4], [8, 8]]
    assert packed.lengths.tolist() == [1, 2, 2, 1]


def test_an_answer_without_a_token_is_an_error():
    with pytest.raises(ValueError, match="lengths 0 and 1"):
        pack([Pair([1], [], [2])])


def test_groups_by_hand():
    pairs = [Pair([0] * n, [1], [1]) for n in (1, 8, 3, 4)]  # 3, 10, 5, 6 tokens
    assert groups(pairs, 0, 2) == [[1, 3], [2, 0]]
    assert groups(pairs, 11, 9) == [[1], [3, 2], [0]]
    assert groups(pairs, 4, 9) == [[1], [3], [2], [0]]  # the first three are longer than the limit
    assert groups(pairs, 24, 9) == [[1, 3, 2, 0]]
    assert groups([], 5, 5) == []
