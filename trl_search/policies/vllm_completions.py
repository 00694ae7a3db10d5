"""The requests to a vLLM server: the body of `POST /v1/completions` for one turn, and its response.

A request contains

1. every sampling parameter, including `repetition_penalty`: the server takes missing ones from the model's
   generation_config.json, and that of Qwen2.5-Instruct sets a repetition penalty and a top-p;
2. `include_stop_str_in_output` and `skip_special_tokens: false`, so that stop strings are found in the raw text. The
   response has the ids of all sampled tokens, even if a stop string ends inside the last one;
3. its own seed, so that it is repeatable.

`processed_logprobs` are computed after temperature *and* after top-p, top-k and min-p. `Policy` promises logprobs
before the last three, so keep top_p=1, top_k=0, min_p=0 in training. vLLM's default, raw_logprobs, ignores the
temperature.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from trl_search.common.errors import UserError
from trl_search.policies.vllm_address import KEY_REMEDY
from trl_search.types import Completion, FinishReason, Sampling

# vLLM's value for -inf, which JSON cannot hold.
_MINUS_INFINITY = -9999.0
_MAX_SEED = 2**63 - 1


def format_request(
    model: str,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """The body of `POST /v1/completions` for one turn."""
    return {
        "model": model,
        "prompt": list(prompt_ids),
        **sampling_parameters(max_tokens, sampling, stop, stop_token_ids),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "include_stop_str_in_output": True,
        "return_token_ids": True,
    }


def sampling_parameters(
    max_tokens: int, sampling: Sampling, stop: Sequence[str], stop_token_ids: Iterable[int]
) -> dict[str, Any]:
    """The parameters of one turn that a server and an engine in this process take under the same names."""
    return {
        **asdict(sampling),  # vLLM uses the same names
        "seed": sampling.seed & _MAX_SEED,  # vLLM's seeds are signed 64-bit integers, and -1 means no seed
        "max_tokens": max_tokens,
        "stop": list(stop),
        "stop_token_ids": sorted(stop_token_ids),
        "skip_special_tokens": False,  # a stop string may be a special token
        "spaces_between_special_tokens": False,
        "logprobs": 0,  # only those of the sampled tokens
    }


def read_completion(answer: dict[str, Any], body: dict[str, Any], base_url: str) -> Completion:
    """Reads the server's response to `body`.

    Raises:
        KeyError, IndexError, TypeError, AttributeError: if it is not the answer of a vLLM server.
        UserError: if the response has no token ids, or fewer than `max_tokens` although no stop was reached.
    """
    choice = answer["choices"][0]
    ids, reason = choice.get("token_ids"), choice["finish_reason"]
    if reason == "abort" and not ids:
        return Completion((), (), FinishReason.INTERRUPTED)
    if not ids or choice.get("logprobs") is None:
        raise UserError(f"the vLLM server at {base_url} returned no token ids or logprobs: install a newer vLLM there")
    if reason == "length" and len(ids) < body["max_tokens"]:
        raise UserError(
            f"the vLLM server at {base_url} ended a turn after {len(ids)} of {body['max_tokens']} tokens: start it "
            "without max_new_tokens in --override-generation-config"
        )
    logprobs = (
        math.nan if value is None else -math.inf if value <= _MINUS_INFINITY else float(value)
        for value in choice["logprobs"]["token_logprobs"]
    )
    return Completion(tuple(ids), tuple(logprobs), finish_reason(reason, choice.get("stop_reason")))


def finish_reason(reason: str, stop_reason: int | str | None) -> FinishReason:
    """Our reason for vLLM's `finish_reason` and `stop_reason`."""
    if reason == "length":
        return FinishReason.LENGTH
    if reason == "abort":
        return FinishReason.INTERRUPTED
    # "stop" is the EOS (no stop reason), another end token of the generation config (its id), or a stop string.
    return FinishReason.STOP if isinstance(stop_reason, str) else FinishReason.EOS


def error_text(content: bytes) -> str:
    """The server's message in the body of a response with an error."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return content[:500].decode("utf-8", "replace")


def refusal(base_url: str, said: str, *, needed: int, model: str) -> UserError:
    """The error for a request that the server would reject again, with the server's message and the remedy."""
    longer = f"start it with --max-model-len {needed} or more, or lower max_completion_length"
    remedies = {
        "context length": longer,
        "max_model_len": longer,
        "does not exist": f"start it with {model}, or with --served-model-name {model}",
        "logprobs": "start it with --max-logprobs -1",
        "skip_tokenizer_init": "start it without this option: stop strings are found in text",
        "401: ": KEY_REMEDY,
        "vocabulary": "it serves a model with another tokenizer: start it with the model that is trained",
        "": "check its settings with `trl-search doctor --server`",
    }
    remedy = next(remedy for words, remedy in remedies.items() if words in said)
    return UserError(f"the vLLM server at {base_url} rejected a request ({said}): {remedy}")
