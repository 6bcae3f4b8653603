"""Kinds of servers, and what each has beyond OpenAI's interface."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of server beyond OpenAI's interface.

    Attributes:
        name: Of its program.
        owner: What it calls itself in its list of models.
        tokens: Whether it takes prompts as tokens, tells tokens, and has a tokenizer.
        body: What every request says besides, so that nothing but the rule that was asked for shapes the answer.
        rule: Names of the rule's parts that OpenAI's interface has no word for.
        end_ignored: What makes it go on after an answer's end; ``{}`` where nothing does.
        serial: Whether it answers one request at a time, and drops the one that it is at for the next.
    """

    name: str
    owner: str
    tokens: bool = False
    body: dict[str, Any] = field(default_factory=dict)
    rule: bool = True
    end_ignored: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    serial: bool = False


# Defaults of these servers that would change an answer: llama-server cuts at top_p before the temperature (its README,
# /completion), llama-cpp-python's punishes repetitions (llama_cpp/server/types.py), vLLM takes what the model's folder
# recommends (its documentation of --generation-config).
LLAMA_SERVER = Kind(
    "llama-server",
    "llamacpp",
    tokens=True,
    body={
        "samplers": ["temperature", "top_k", "top_p", "min_p"],
        "repeat_penalty": 1.0,
        "timings_per_token": True,
        "cache_prompt": True,
    },
)
LLAMA_CPP_PYTHON = Kind(
    "llama_cpp.server", "me", body={"repeat_penalty": 1.0}, end_ignored={"min_tokens": 0}, serial=True
)
VLLM = Kind(
    "vLLM",
    "vllm",
    tokens=True,
    body={"return_token_ids": True, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
)
OTHER = Kind("a server", "", rule=False)


def kind_of(owner: object) -> Kind:
    """Return the kind of the server that calls itself so in its list of models."""
    return next((kind for kind in (LLAMA_SERVER, LLAMA_CPP_PYTHON, VLLM) if kind.owner == owner), OTHER)
