"""Token texts and stop texts, with real tokenizers and one made of bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_exp import schema
from rlhf_exp.errors import InputError
from rlhf_exp.rollout.texts import Stops, check_texts, forbidden, token_id
from rlhf_exp.schema import Generation, Model
from rlhf_exp.stages import preflight


class Bytes:
    """A tokenizer whose tokens are pieces of UTF-8 text, some of them parts of a character."""

    unk_token = unk_token_id = None

    def __init__(self, *pieces: bytes):
        self.pieces = pieces

    def batch_decode(self, rows, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        return [b"".join(self.pieces[i] for i in row).decode(errors="replace") for row in rows]


def stopped(pieces: list[bytes], *stops: str) -> list[int | None]:
    """What `before` says as the answer of these pieces grows token by token."""
    found = Stops(Bytes(*pieces), stops)
    return [found.before([list(range(n))])[0] for n in range(1, len(pieces) + 1)]


def test_stop_texts_by_hand():
    assert stopped([b"Hi", b" all", b"\n", b"\n", b"Hum", b"an"], "\n\n") == [None, None, None, 2, None, None]
    # the stop begins inside a token, which stays; it ends inside one, which goes
    assert stopped([b"Hi", b".\n", b"\nHuman"], "\n\n") == [None, None, 2]
    assert stopped([b"Hi", b".\n\n", b"x"], "\n\n") == [None, 2, None]
    # two stops, the one that comes first in the text wins; one that a later token completes again
    assert stopped([b"a", b"STOPEND"], "END", "STOP") == [None, 1]
    assert stopped([b"a", b"END", b"END"], "END") == [None, 1, 2]
    assert stopped([b"END"], "END") == [0]
    assert stopped([b"a", b"a", b"a"], "aa") == [None, 0, 1]
    assert stopped([b"a", b"b"], "xyz") == [None, None]


def test_stop_texts_in_cut_characters():
    e = "é".encode()
    assert stopped([b"x", e[:1], e[1:], b"y"], "é") == [None, None, 1, None]
    assert stopped([b"x", e[:1], e[1:], b"!"], "é!") == [None, None, None, 1]
    # one token a byte, a stop of many, and a tail that begins inside a character
    text = ("漢字" * 9 + "。終わり").encode()
    single = [text[i : i + 1] for i in range(len(text))]
    assert stopped(single, "終わり") == [None] * (len(text) - 1) + [9 * 6 + 3]


def test_several_answers_at_once():
    stops = Stops(Bytes(b"a", b"b", b"\n"), ["b\n"])
    assert stops.before([[0, 1, 2], [0, 0, 2], [1, 2], [2]]) == [1, None, 0, None]


def test_special_tokens_can_be_stops(base):
    eos = base.tokenizer.eos_token
    assert Stops(base.tokenizer, [eos]).before([[40, 41, base.eos_id], [40, 41]]) == [2, None]


def test_token_ids(base):
    tokenizer = base.tokenizer
    assert token_id(tokenizer, "eos", 77) == 77
    assert token_id(tokenizer, tokenizer.eos_token, 77) == tokenizer.eos_token_id
    for text in ("a", " the", "\n"):
        (expected,) = tokenizer.encode(text, add_special_tokens=False)
        assert token_id(tokenizer, text, 77) == expected
        assert token_id(tokenizer, tokenizer.convert_ids_to_tokens(expected), 77) == expected  # "Ġthe"
    for text in ("", "no such token at all"):
        with pytest.raises(InputError, match=r"generation.begin_suppress_tokens: '.*' is no token of this"):
            token_id(tokenizer, text, 77)


def test_forbidden_positions():
    class Tokenizer:
        unk_token, unk_token_id = "<unk>", 0

        def convert_tokens_to_ids(self, text):
            return {"a": 5, "</s>": 2}.get(text, 0)

        def encode(self, text, add_special_tokens):
            return [0]

    def limits(**settings):
        return forbidden(Generation(**settings), Tokenizer(), 2)

    assert limits() == {2: 1}
    assert limits(min_new_tokens=0) == {}
    assert limits(min_new_tokens=0, begin_suppress_tokens=["eos"]) == {2: 1}
    assert limits(min_new_tokens=4, begin_suppress_tokens=["a", "</s>"]) == {2: 4, 5: 1}
    with pytest.raises(InputError, match="'b' is no token"):
        limits(begin_suppress_tokens=["b"])


def test_all_problems_at_once(base):
    check_texts(
        Generation(begin_suppress_tokens=["eos", "\n"], stop=["\n\n", "Human:", " é"]), base.tokenizer
    )
    with pytest.raises(InputError) as error:
        check_texts(Generation(begin_suppress_tokens=["two words", "qqqqqq"]), base.tokenizer)
    assert len(error.value.problems) == 2

    class Lower:
        """Knows no capital letters."""

        def encode(self, text, add_special_tokens):
            return [ord(sign) for sign in text.lower()]

        def batch_decode(self, rows, **_):
            return ["".join(map(chr, row)) for row in rows]

    check_texts(Generation(stop=["human:"]), Lower())
    with pytest.raises(InputError, match=r"generation\.stop: this model's tokenizer cannot write 'Human:'"):
        check_texts(Generation(stop=["Human:"]), Lower())


def run(stage: str, **settings) -> list[str]:
    config = schema.RUNS[stage](stage=stage)
    config.model.name, config.model.lora_targets = "tiny", ["q_proj"]
    config.dataset.name, config.dataset.family = "reviews", "reviews"
    config.dataset.views = schema.Views(*["builtin:reviews"] * 3)
    config.generation = Generation(**settings)
    return schema.problems(config)


def test_what_the_config_refuses():
    assert run("eval", greedy=True, stop=["\n"]) == []
    for stage in ("ppo", "pipeline"):
        (line,) = run(stage, greedy=True)
        assert line.startswith("generation.greedy is for evaluation: PPO learns from samples")
    (line,) = run("ppo", stop=["x", ""])
    assert line.startswith("generation.stop holds an empty text")
    for text in (r"\n", r"\n\n", r"\nHuman:", r"a\t"):
        (line,) = run("ppo", stop=[text])
        assert "where a line break may be meant" in line
        assert line.endswith("""write $'generation.stop=["\\n"]', in a file "\\n\"""")
    assert run("ppo", stop=["\n", "\nHuman:", r"\end{document}", r"\nabla"]) == []
    (line,) = run("ppo", logprob_mode="row")
    assert line == "generation.logprob_mode must be one of sampled, raw, got row"
    (line,) = run("ppo", repetition_penalty=0.0)
    assert line == "generation.repetition_penalty must be more than 0, got 0.0"
    (line,) = run("ppo", min_p=1.5)
    assert line == "generation.min_p must be at most 1, got 1.5"


def test_preflight_asks_the_models_tokenizer_before_anything_trains(tiny_path):
    config = SimpleNamespace(model=Model(name="tiny"))
    plan = SimpleNamespace(base=SimpleNamespace(folder=tiny_path), config=config)

    def check(**settings):
        preflight._texts(SimpleNamespace(config=SimpleNamespace(generation=Generation(**settings))), plan)

    check()
    check(stop=["\n"], begin_suppress_tokens=["eos", "\n"])
    with pytest.raises(
        InputError, match="'two words' is no token of this model's vocabulary; it is 6 tokens"
    ):
        check(begin_suppress_tokens=["two words"])
    preflight._texts(SimpleNamespace(config=SimpleNamespace()), plan)  # a stage that samples nothing
