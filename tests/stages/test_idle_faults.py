"""A fault that could change nothing is refused: nobody shall take it for harmless."""

from __future__ import annotations

import pytest

from rlhf_exp import cli
from rlhf_exp.errors import InputError
from rlhf_exp.stages import faults, ppo

RULE = {"kind": "function", "function": "length"}
WHITENING = ["whiten_per_minibatch", "whiten_over_padding"]
OF_GAE = "it is of ppo.estimator=gae, which is rloo"
NO_MODEL = "it is of reward models, and the reward source has none"


def lines(config, sft_adapter: bool = True) -> list[str]:
    try:
        faults.require_effect(config, sft_adapter)
    except InputError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("names", "settings", "reason"),
    [
        (WHITENING[:1], {"estimator": "rloo", "samples_per_prompt": 2}, OF_GAE),
        (WHITENING[1:], {"estimator": "rloo", "samples_per_prompt": 2}, OF_GAE),
        (["reward_at_padded_end"], {"estimator": "rloo", "samples_per_prompt": 2}, OF_GAE),
        (WHITENING[:1], {"whiten_advantages": False}, "ppo.whiten_advantages is false"),
        (WHITENING[1:], {"whiten_advantages": False}, "ppo.whiten_advantages is false"),
        (["reward_at_padded_end"], {"lam": 1.0}, "it costs ppo.gamma * ppo.lam, which is 1"),
    ],
)
def test_each_names_the_key_that_keeps_it_from_working(ppo_config, names, settings, reason):
    assert lines(ppo_config({"faults": names, **settings})) == [
        f"ppo.faults: {names[0]} changes nothing here: {reason}; leave it out"
    ]
    assert lines(ppo_config({"faults": names})) == []  # by itself it does


@pytest.mark.parametrize("name", ["score_without_eos", "random_reward_head"])
def test_faults_of_reward_models_need_one(ppo_config, name):
    assert lines(ppo_config({"faults": [name]}, reward_source=RULE)) == [
        f"ppo.faults: {name} changes nothing here: {NO_MODEL}; leave it out"
    ]
    for source in ({}, {"kind": "sum", "parts": ["1*learned", "-0.1*length"]}):
        assert lines(ppo_config({"faults": [name]}, reward_source=source)) == []


def test_of_two_that_whiten_one_is_done(ppo_config):
    assert lines(ppo_config({"faults": WHITENING})) == [
        "ppo.faults: whiten_over_padding changes nothing here: whiten_per_minibatch takes its place; leave it out"
    ]


def test_the_base_is_the_right_reference_where_no_adapter_is(ppo_config):
    config = ppo_config({"faults": ["wrong_reference", "ref_with_dropout"]})
    assert lines(config) == []
    (line,) = lines(config, sft_adapter=False)
    assert line.startswith("ppo.faults: wrong_reference changes nothing here: there is no SFT adapter")


def test_all_of_them_at_once(ppo_config):
    config = ppo_config({"faults": list(faults.FAULTS), "whiten_advantages": False}, reward_source=RULE)
    found = {line.split()[1] for line in lines(config, sft_adapter=False)}
    assert found == {*WHITENING, "score_without_eos", "random_reward_head", "wrong_reference"}


def test_a_run_refuses_it_before_anything_is_loaded(tmp_path, capsys):
    words = ["stage=ppo", "model=tiny", "tracking=none", f"output_dir={tmp_path / 'out'}", "dry_run=true"]
    idle = ("ppo.faults=[whiten_over_padding]", "ppo.whiten_advantages=false")
    assert cli.main([*words, *idle]) == 2
    assert (
        "whiten_over_padding changes nothing here: ppo.whiten_advantages is false" in capsys.readouterr().err
    )
    for plain in ("adapters.sft=base", "upstream.sft={lora: full}"):
        assert cli.main([*words, "ppo.faults=[wrong_reference]", plain]) == 2
        assert "there is no SFT adapter" in capsys.readouterr().err
    assert cli.main([*words, "ppo.faults=[wrong_reference]"]) == 0


def test_so_does_the_stage_itself(context, ppo_config):
    with pytest.raises(InputError, match="wrong_reference changes nothing here"):
        ppo.run(ppo_config({"faults": ["wrong_reference"]}, reward_source=RULE), context())
