"""What goes over the wire to a vLLM server: the body of `POST /v1/completions` for one turn, and its answer.

A request holds

1. everything that shapes the distribution, `repetition_penalty` too: the server fills what is left out from the
   model's own generation_config.json, and Qwen2.5-Instruct's has a repetition penalty and a top-p;
2. `include_stop_str_in_output` and `skip_special_tokens: false`, so that stop strings are looked for in the text as it
   is; the ids are those of all sampled tokens, also where the stop string ends inside the last;
3. a seed of its own, which makes it repeatable.

`processed_logprobs` are taken after temperature *and* after top-p, top-k and min-p. They are what `Policy` promises as
long as these cut nothing: keep top_p=1, top_k=0, min_p=0 in training. vLLM's default, raw_logprobs, ignores the
temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trl_search.common.errors import UserError
from trl_search.types import Completion, FinishReason, Sampling

# vLLM writes -inf so, because JSON cannot.
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
        "max_tokens": max_tokens,
        **asdict(sampling),  # under the same names
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": sampling.seed & _MAX_SEED,  # 64 bits with a sign; -1 would mean no seed
        "stop": list(stop),
        "stop_token_ids": list(stop_token_ids),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,  # those of the sampled tokens alone
        "return_token_ids": True,
    }


def read_completion(answer: dict[str, Any], body: dict[str, Any], base_url: str) -> Completion:
    """What the server answered to `body`.

    Raises:
        UserError: for an answer without ids, or shorter than was asked for.
    """
    choice = answer["choices"][0]
    ids, reason = choice.get("token_ids"), choice["finish_reason"]
    if reason == "abort" and not ids:
        return Completion((), (), FinishReason.INTERRUPTED)
    if not ids or choice.get("logprobs") is None:
        raise UserError(f"the vLLM server at {base_url} answered without token ids and logprobs: vLLM is too old")
    if reason == "length" and len(ids) < body["max_tokens"]:
        raise UserError(
            f"the vLLM server at {base_url} ended a turn after {len(ids)} of {body['max_tokens']} tokens: start it "
            "without max_new_tokens in --override-generation-config"
        )
    logprobs = (
        math.nan if value is None else -math.inf if value <= _MINUS_INFINITY else float(value)
        for value in choice["logprobs"]["token_logprobs"]
    )
    return Completion(tuple(ids), tuple(logprobs), _finish_reason(reason, choice.get("stop_reason")))


def _finish_reason(reason: str, stop_reason: int | str | None) -> FinishReason:
    if reason == "length":
        return FinishReason.LENGTH
    if reason == "abort":
        return FinishReason.INTERRUPTED
    # "stop" is the EOS (no stop reason), another end token of the generation config (its id), or a stop string.
    return FinishReason.STOP if isinstance(stop_reason, str) else FinishReason.EOS


def refusal(base_url: str, said: str, *, needed: int, model: str) -> UserError:
    """The error for a request that the server will refuse again: what it said, and what helps."""
    if "context length" in said or "max_model_len" in said:
        remedy = f"start it with --max-model-len {needed} or more, or lower max_completion_length"
    elif "does not exist" in said:
        remedy = f"start it with {model}, or under that name (--served-model-name)"
    elif "logprobs" in said:
        remedy = "start it with --max-logprobs -1"
    elif "vocabulary" in said:
        remedy = "it serves a model of another tokenizer: start it with the model that is trained"
    else:
        remedy = "`trl-search doctor --server` checks its settings"
    return UserError(f"the vLLM server at {base_url} refused a request ({said}): {remedy}")
