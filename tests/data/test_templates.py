"""Text and ids, with a tokenizer of one token a byte: lengths are string lengths and ids decode exactly."""

from __future__ import annotations

import pytest

from rlhf_exp.data.encode import Cuts, encode_prompts, encode_responses
from rlhf_exp.data.records import Dialogue
from rlhf_exp.data.templates import frame
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Template

EOS = 256
HEAD = "SUBREDDIT: r/a\nTITLE: a title\nPOST:"
POST = " one two\nthree\nfour five"


@pytest.fixture
def prompt_text(tokenizer, dataset):
    """prompt_text(prompt, most, template, truncate) -> what the model reads of a prompt."""

    def prompt_text(prompt: str, most: int, template: str = "{prompt}", truncate: str = "left") -> str:
        template = Template("x", prompt=template, response=" {response}", truncate=truncate)
        data = dataset("reviews", "unused", template=template, max_prompt_tokens=most)
        ids = encode_prompts(tokenizer, data, [prompt])[0]
        assert len(ids) <= most
        return tokenizer.decode(ids)

    return prompt_text


def test_rendering_leaves_all_other_braces_alone(tokenizer, dataset):
    template = Template("x", prompt="Q: {prompt} {} {x}\nA:", response=" {response}", truncate="left")
    rendered = str(frame(template, "what is {response} or {prompt}?"))
    assert rendered == "Q: what is {response} or {prompt}? {} {x}\nA:"
    data = dataset("reviews", "unused", template=template)
    (ids,) = encode_responses(tokenizer, data, ["{it} {response}"], eos=False)
    assert tokenizer.decode(ids) == " {it} {response}"


def test_response_ends_with_eos_by_id(tokenizer, dataset):
    data = dataset("reviews", "unused", max_response_tokens=10)
    ids = encode_responses(tokenizer, data, ["ab"])[0]
    assert ids[-1] == EOS and tokenizer.decode(ids[:-1]) == " ab"
    assert encode_responses(tokenizer, data, ["ab"], eos=False)[0] == ids[:-1]


@pytest.mark.parametrize(("most", "text", "ended"), [(4, " ab", True), (3, " ab", False), (2, " a", False)])
def test_a_response_that_was_cut_does_not_end(tokenizer, dataset, most, text, ended):
    """ " ab" and its EOS are four tokens."""
    cuts = Cuts()
    ids = encode_responses(
        tokenizer, dataset("reviews", "unused", max_response_tokens=most), ["ab"], cuts=cuts
    )[0]
    assert tokenizer.decode([id for id in ids if id != EOS]) == text
    assert (ids[-1] == EOS) == ended
    assert (cuts.responses, cuts.responses_cut) == (1, int(not ended))


def test_a_tokenizer_without_eos(dataset, tokenizer):
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        encode_responses(other, dataset("reviews", "unused"), ["a"])
    assert encode_responses(other, dataset("reviews", "unused"), ["a"], eos=False)


def test_what_the_tokenizer_begins_every_text_with_begins_the_prompt(tokenizer, dataset):
    """Llama has never seen a text without its BOS; an answer is no text of its own."""
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    other = deepcopy(tokenizer)
    bos = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    other.backend_tokenizer.post_processor = bos
    assert other("ab")["input_ids"][0] == EOS
    data = dataset("reviews", "unused")
    assert encode_prompts(other, data, ["ab"])[0] == [EOS, *tokenizer("ab")["input_ids"]]
    assert EOS not in encode_prompts(tokenizer, data, ["ab"])[0]
    data.max_prompt_tokens = 2
    assert encode_prompts(other, data, ["ab"])[0] == [EOS, *tokenizer("b")["input_ids"]]
    assert EOS not in encode_responses(other, data, ["ab"], eos=False)[0]


def test_text_that_spells_a_special_token_stays_text(tokenizer, dataset):
    data = dataset(
        "reviews",
        "unused",
        template=Template("x", prompt="{prompt}</s>", response="{response}", truncate="left"),
    )
    assert tokenizer("a</s>")["input_ids"][-1] == EOS  # what happens to text otherwise
    ids = encode_prompts(tokenizer, data, ["a</s>b"])[0]
    assert ids.count(EOS) == 1 and ids[-1] == EOS and len(ids) == 7  # a < / s > b and the template's
    assert EOS not in encode_responses(tokenizer, data, ["</s>"], eos=False)[0]
    data.max_prompt_tokens = 3
    ids = encode_prompts(tokenizer, data, ["a</s>b"])[0]
    assert ids[-1] == EOS and tokenizer.decode(ids[:2]) == ">b"


def test_left_and_right_cut_the_prompt_and_never_the_template(prompt_text):
    assert prompt_text("0123456789", 4) == "6789"
    assert prompt_text("0123456789", 4, truncate="right") == "0123"
    assert prompt_text("0123456789", 10) == "0123456789"
    frame = "Q: {prompt}\nA:"  # six tokens
    assert prompt_text("0123456789", 9, frame) == "Q: 789\nA:"
    assert prompt_text("0123456789", 9, frame, "right") == "Q: 012\nA:"
    assert prompt_text("0123456789", 16, frame) == "Q: 0123456789\nA:"
    assert prompt_text("0123456789", 6, frame) == "Q: \nA:"
    for truncate in ("left", "right", "tldr"):
        with pytest.raises(InputError, match=r"max_prompt_tokens=5 leaves no room .* takes 6 tokens"):
            prompt_text("0123456789", 5, frame, truncate)


def test_a_tldr_prompt_that_fits_is_not_touched(prompt_text):
    whole = f"{HEAD}{POST}\nTL;DR:"
    assert prompt_text(whole, len(whole), truncate="tldr") == whole


@pytest.mark.parametrize(
    "kept",
    [
        f"{HEAD} one two\nthree",  # at the last newline
        f"{HEAD} one two",
        f"{HEAD} one",  # the first line is too long: at a word
        f"{HEAD} on",  # the first word is too long: at a character
        f"{HEAD}",
        "SUBREDDIT: r/a\nTITLE: a title",  # no room for any post: the fields before it, by words
        "SUBREDDIT: r/a\nTITLE: a",
        "SUBREDDIT: r/a",
        "SUBREDDIT:",
        "SUB",
        "",
    ],
)
def test_a_tldr_prompt_is_cut_by_openais_rule(prompt_text, kept):
    expected = f"{kept}\nTL;DR:".lstrip()
    assert prompt_text(f"{HEAD}{POST}\nTL;DR:", len(expected), truncate="tldr") == expected


def test_one_token_less_takes_the_whole_last_line(prompt_text):
    whole = f"{HEAD}{POST}\nTL;DR:"
    assert prompt_text(whole, len(whole) - 1, truncate="tldr") == f"{HEAD} one two\nthree\nTL;DR:"
    shorter = len(f"{HEAD} one two\nthree\nTL;DR:") - 1
    assert prompt_text(whole, shorter, truncate="tldr") == f"{HEAD} one two\nTL;DR:"


def test_a_cut_at_an_empty_line_leaves_no_empty_line(prompt_text):
    whole = f"{HEAD} one\n\n \ntwo\nTL;DR:"
    assert prompt_text(whole, len(whole) - 1, truncate="tldr") == f"{HEAD} one\nTL;DR:"


def test_the_post_is_cut_within_a_template_and_with_special_tokens_in_it(prompt_text):
    prompt = "\nPOST: aa\n</s>\nb\nTL;DR:"  # with the template: 30 tokens
    assert prompt_text(prompt, 28, "Human: {prompt}", "tldr") == "Human: \nPOST: aa\n</s>\nTL;DR:"
    assert prompt_text(prompt, 27, "Human: {prompt}", "tldr") == "Human: \nPOST: aa\nTL;DR:"


def test_the_last_line_that_fits_is_kept_where_the_first_guess_is_too_short(tokenizer, dataset):
    """Two special tokens of the template, spelled with eight characters, hide how much room there is."""
    template = Template("x", prompt="</s></s>{prompt}", response=" {response}", truncate="tldr")
    expected = f"{HEAD} one two\nthree\nTL;DR:"
    data = dataset("tldr", "unused", template=template, max_prompt_tokens=2 + len(expected))
    ids = encode_prompts(tokenizer, data, [f"{HEAD}{POST}\nTL;DR:"])[0]
    assert ids[:2] == [EOS, EOS] and tokenizer.decode(ids[2:]) == expected


def test_a_prompt_without_the_fields_of_tldr(prompt_text):
    assert prompt_text("one two\nthree", 9, truncate="tldr") == "one two"
    assert prompt_text("\u4f60\u597d\u4f60\u597d", 7, truncate="tldr") == "\u4f60\u597d"  # 3 bytes each


def test_cuts_are_counted_by_row(tokenizer, dataset):
    cuts = Cuts()
    data = dataset("reviews", "unused", max_prompt_tokens=3, max_response_tokens=3)
    encode_prompts(tokenizer, data, ["abc", "abcd", "abcd"], cuts)
    encode_responses(tokenizer, data, ["a", "ab"], cuts=cuts)
    assert str(cuts) == (
        "prompt tokens: median 4, 90 % in 3-4, longest 4; 2 of 3 cut; "
        "response tokens: median 3, 90 % in 3-4, longest 4; 1 of 2 cut"
    )
    assert (cuts.prompts, cuts.prompts_cut, cuts.responses, cuts.responses_cut) == (3, 2, 2, 1)


def test_a_prompt_is_tokenised_once_and_returned_as_often_as_asked(tokenizer, dataset):
    class Spy:
        seen: list[str] = []  # noqa: RUF012
        added_tokens_decoder = tokenizer.added_tokens_decoder

        def __call__(self, texts, **options):
            self.seen.extend(texts)
            return tokenizer(texts, **options)

    rows = encode_prompts(Spy(), dataset("reviews", "unused"), ["ab", "c", "ab"])
    assert [text for text in Spy.seen if text in ("ab", "c")] == ["ab", "c"]
    assert [tokenizer.decode(row) for row in rows] == ["ab", "c", "ab"]
    rows[0].append(7)
    assert tokenizer.decode(rows[2]) == "ab"  # rows are independent lists


def test_nothing_to_encode(tokenizer, dataset):
    data = dataset("reviews", "unused")
    assert encode_prompts(tokenizer, data, []) == encode_responses(tokenizer, data, []) == []


HUMAN = Template(
    prompt="Human: {prompt}\n\nAssistant:",
    response=" {response}",
    turn="Human: {prompt}\n\nAssistant: {response}\n\n",
    system="[{system}]\n",
)
TALK = Dialogue("c {response}?", (("a {prompt}", "b"), ("d", "e</s>")), "s")


def test_a_dialogue_is_written_turn_by_turn(tokenizer, dataset):
    earlier = "Human: a {prompt}\n\nAssistant: b\n\nHuman: d\n\nAssistant: e</s>\n\n"
    whole = f"[s]\n{earlier}Human: c {{response}}?\n\nAssistant:"
    assert str(frame(HUMAN, TALK)) == whole
    ids = encode_prompts(tokenizer, dataset("reviews", "unused", template=HUMAN), [TALK])[0]
    assert tokenizer.decode(ids) == whole
    assert EOS not in ids  # what the row says is text


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (83, "[s]\nHuman: d\n\nAssistant: e</s>\n\nHuman: c {response}?\n\nAssistant:"),
        (60, "[s]\nHuman: c {response}?\n\nAssistant:"),
        (29, "[s]\nHuman: onse}?\n\nAssistant:"),  # then the last prompt by its rule: the frame takes 23
        (22, "Human: e}?\n\nAssistant:"),  # no room for the system message: 19 without, so 3 of the prompt
    ],
)
def test_a_long_dialogue_loses_its_oldest_exchanges_first(tokenizer, dataset, most, kept):
    data = dataset("reviews", "unused", template=HUMAN, max_prompt_tokens=most)
    cuts = Cuts()
    ids = encode_prompts(tokenizer, data, [TALK], cuts)[0]
    assert tokenizer.decode(ids) == kept and len(ids) <= most and cuts.prompts_cut == 1


CHAT = Template(chat=True, response="{response}")
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = CHATML
    return other


def test_the_tokenizers_own_chat_template(chatty, dataset):
    """As apply_chat_template makes it, but for a special token in a message, which stays text there."""
    data = dataset("reviews", "unused", template=CHAT)
    messages = [{"role": "user", "content": "hi {x}"}]
    ids = encode_prompts(chatty, data, ["hi {x}"])[0]
    assert ids == chatty.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(EOS) == 1
    ids = encode_prompts(chatty, data, [TALK])[0]
    said = (
        "<|system|>s",
        "<|user|>a {prompt}",
        "<|assistant|>b",
        "<|user|>d",
        "<|assistant|>e</s>",
        "<|user|>c {response}?",
    )
    assert chatty.decode(ids) == "</s>".join([*said, "<|assistant|>"])
    assert ids.count(EOS) == len(said)


def test_a_long_chat_keeps_its_frame(chatty, dataset):
    data = dataset("reviews", "unused", template=CHAT, max_prompt_tokens=25)
    ids = encode_prompts(chatty, data, ["0123456789"])[0]
    assert chatty.decode(ids) == "<|user|>789</s><|assistant|>"  # 8 tokens, 3 of the prompt, 1, 13


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system') }}", "refuses the roles user: no system"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "does not hold every message once"),
        ("nothing", "does not hold every message once"),
        ("{% for", "refuses the roles user"),
    ],
)
def test_chat_templates_that_cannot_be_used(chatty, dataset, template, reason):
    chatty.chat_template = template
    with pytest.raises(InputError, match=reason):
        encode_prompts(chatty, dataset("reviews", "unused", template=CHAT), ["hi"])


def test_a_chat_template_that_writes_its_bos_gets_no_second_one(chatty, dataset):
    from tokenizers.processors import TemplateProcessing

    chatty.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", EOS)]
    )
    data = dataset("reviews", "unused", template=CHAT)
    assert encode_prompts(chatty, data, ["hi"])[0][0] == EOS  # put there as the tokenizer would
    chatty.chat_template = "</s>" + CHATML
    ids = encode_prompts(chatty, data, ["hi"])[0]
    assert ids[0] == EOS and ids[1] != EOS


def test_the_preamble_stands_before_everything_once(tokenizer, dataset):
    template = Template(preamble="Be {good}.\n", prompt="Q: {prompt}\nA:", turn="Q: {prompt}\nA:{response}\n")
    assert str(frame(template, "a")) == "Be {good}.\nQ: a\nA:"
    dialogue = Dialogue("c", (("a", "b"),), "s")
    assert str(frame(template, dialogue)) == "Be {good}.\ns\nQ: a\nA:b\nQ: c\nA:"
    data = dataset("reviews", "unused", template=template, max_prompt_tokens=20)
    assert tokenizer.decode(encode_prompts(tokenizer, data, [dialogue])[0]) == "Be {good}.\ns\nQ: c\nA:"
