"""The policy with a real `vllm serve` process: it returns what was sampled, and survives the loss of the server.

The last tests kill the server and restart it; the order of the tests matters.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.test_vllm import agreement, answers, command, write_questions
from tests.support.ports import free_port
from tests.support.scripted_trainer import ROWS
from tests.support.servers import retrieve_from, serving
from tests.support.vllm_engine import VLLMServer, check_held_out, make_model_folder, require_vllm, run_with_vllm
from trl_search.cli.main import main
from trl_search.cli.preflight import Status
from trl_search.cli.server_checks import server_checks
from trl_search.common.errors import UserError
from trl_search.environment import SearchEnvironment
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.policies.vllm_server import VLLMServerPolicy, server_start_time
from trl_search.protocols import load_protocol
from trl_search.rollout import Limits, rollout
from trl_search.types import FinishReason, Sampling, StopReason

pytestmark = pytest.mark.slow

GREEDY = Sampling(temperature=0.0)
LIMITS = Limits(completion_tokens=320, turn_tokens=48, observation_tokens=128)
MAX_MODEL_LEN = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def server(folder):
    require_vllm()
    server = VLLMServer(
        folder,
        folder.parent,
        *("--weight-transfer-config", '{"backend": "nccl"}', "--enable-lora", "--max-lora-rank", "8"),
    )
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def generate(policy, *requests):
    """Runs `(prompt, options)` requests at once."""

    async def go():
        await policy.open()
        try:
            return await asyncio.gather(*(policy.generate(prompt, **options) for prompt, options in requests))
        finally:
            await policy.close()
            await policy.close()

    return asyncio.run(go())


def questions(world, protocol, count):
    rows = [question.row() for question in world.questions("train")[:count]]
    return [protocol.prompt_ids([{"role": "user", "content": row["question"]}]) for row in rows], rows


def search(policy, protocol, world, retriever, count, **options):
    prompts, rows = questions(world, protocol, count)
    return rollout(
        prompts,
        rows,
        policy=policy,
        environment=SearchEnvironment(retriever, max_searches=3),
        protocol=protocol,
        limits=LIMITS,
        **{"sampling": Sampling(seed=11), **options},
    )


def logprobs_of(model, trajectory, temperature=1.0):
    with torch.no_grad():
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.ids]])
        logits = model(ids).logits[0, len(trajectory.prompt_ids) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(trajectory.prompt_ids) :, None]).squeeze(1)


@pytest.mark.parametrize("name", ["qwen_tools", "search_r1"])
def test_trajectories_search_and_have_the_models_logprobs(server, model, tokenizer, world, retriever, name):
    """The model's generation config must not matter: its penalty and its top-p would change every logprob."""
    protocol = load_protocol(name, tokenizer, instruction="")
    sampling = Sampling(temperature=0.8, seed=3)
    found = search(VLLMServerPolicy(server.url), protocol, world, retriever, 24, sampling=sampling)
    assert sum(trajectory.searches for trajectory in found) > 8
    assert sum(trajectory.stop_reason is StopReason.ANSWER for trajectory in found) > 12
    for trajectory in found:
        assert len(trajectory.ids) <= LIMITS.completion_tokens
        mask = torch.tensor(trajectory.mask, dtype=torch.bool)
        expected = logprobs_of(model, trajectory, 0.8)[mask]
        torch.testing.assert_close(torch.tensor(trajectory.logprobs)[mask], expected, atol=2e-4, rtol=1e-4)
    closed_by_model = [t for t in found if t.mask[-1] == 1 and t.ids[-1] == tokenizer.eos_token_id]
    assert bool(closed_by_model) == (name == "qwen_tools")  # after a tag of search_r1, the EOS is synthetic


def test_greedy_turns_equal_those_of_the_transformers_policy(server, model, tokenizer, world):
    protocol = load_protocol("search_r1", tokenizer, instruction="")
    prompts, _ = questions(world, protocol, 8)
    requests = [(prompt, {"max_tokens": 40, "sampling": GREEDY, "stop": protocol.stop}) for prompt in prompts]
    ours = generate(TransformersPolicy(model, tokenizer), *requests)
    theirs = generate(VLLMServerPolicy(server.url), *requests)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.ids, one.finish_reason) == (other.ids, other.finish_reason)
        assert other.logprobs == pytest.approx(one.logprobs, abs=2e-4)


def test_the_seed_determines_the_completion(server):
    options = {"max_tokens": 24, "sampling": Sampling(temperature=1.5, seed=2**200 + 7)}  # vLLM takes 64 bits
    other = {**options, "sampling": replace(options["sampling"], seed=8)}
    prompt = [300, 400, 500]
    alone = generate(VLLMServerPolicy(server.url), (prompt, options))[0]
    crowd = generate(
        VLLMServerPolicy(server.url), *[([600 + i], other) for i in range(6)], (prompt, options), (prompt, other)
    )
    assert crowd[-2] == alone and crowd[-1].ids != alone.ids


def test_a_turn_ends_at_a_stop_string_at_eos_or_at_the_budget(server, tokenizer, world):
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    (prompt,), _ = questions(world, protocol, 1)
    whole, cut = generate(
        VLLMServerPolicy(server.url),
        (prompt, {"max_tokens": 60, "sampling": GREEDY}),
        (prompt, {"max_tokens": 7, "sampling": GREEDY}),
    )
    assert whole.finish_reason is FinishReason.EOS and whole.ids[-1] == tokenizer.eos_token_id
    assert cut.finish_reason is FinishReason.LENGTH and cut.ids == whole.ids[:7]
    # Stop strings that end inside a token or span two tokens: the ids contain the whole sampled tokens.
    words = [tokenizer.decode([token]) for token in whole.ids]
    index = next(i for i in range(4, len(words)) if len(words[i].strip()) > 3 and words[i] not in words[:i])
    for stop in (words[index][:-1], words[index - 1][-1] + words[index][:2]):
        stopped = generate(
            VLLMServerPolicy(server.url), (prompt, {"max_tokens": 60, "sampling": GREEDY, "stop": (stop,)})
        )[0]
        assert stopped.finish_reason is FinishReason.STOP and stopped.ids == whole.ids[: index + 1], stop
        assert stopped.logprobs == pytest.approx(whole.logprobs[: index + 1], abs=2e-4)


def test_a_cancelled_coroutine_ends_its_request_in_the_engine(server):
    async def go():
        policy = VLLMServerPolicy(server.url)
        await policy.open()
        endless = asyncio.create_task(policy.generate([300, 400, 500], max_tokens=1000, sampling=GREEDY))
        await until(lambda: server.metric("vllm:num_requests_running") == 1)
        endless.cancel()
        await until(lambda: server.metric("vllm:num_requests_running") == 0)
        await policy.close()
        return server.metric("vllm:generation_tokens_total")

    async def until(condition):
        async with asyncio.timeout(200):
            while not await asyncio.to_thread(condition):
                await asyncio.sleep(0.02)

    before = server.metric("vllm:generation_tokens_total")
    assert asyncio.run(go()) - before < 900


def test_the_cache_can_be_emptied_while_a_request_runs(server):
    """server_sync.py needs it; without the option, vLLM keeps its cache."""

    def empty(**options):
        answer = httpx.post(f"{server.url}/reset_prefix_cache", params=options, timeout=60).raise_for_status()
        return answer.json()["success"]

    async def go():
        policy = VLLMServerPolicy(server.url)
        await policy.open()
        asked = asyncio.create_task(policy.generate([300, 400, 500], max_tokens=600, sampling=GREEDY))
        async with asyncio.timeout(200):
            while await asyncio.to_thread(server.metric, "vllm:num_requests_running") != 1:
                await asyncio.sleep(0.02)
        emptied = await asyncio.to_thread(empty), await asyncio.to_thread(empty, reset_running_requests="true")
        disturbed = await asked
        calm = await policy.generate([300, 400, 500], max_tokens=600, sampling=GREEDY)
        await policy.close()
        return emptied, disturbed, calm

    emptied, disturbed, calm = asyncio.run(go())
    assert emptied == (False, True)
    assert disturbed.ids == calm.ids


def test_an_interrupted_turn_continues_from_its_tokens(server):
    """Two clients: the one that did not interrupt also gets its tokens back, and requests the rest."""
    prompt, ask = [300, 400, 500], {"max_tokens": 600, "sampling": GREEDY}

    async def go():
        one, other = VLLMServerPolicy(server.url), VLLMServerPolicy(server.url)
        await one.open()
        await other.open()
        asked = [asyncio.create_task(policy.generate(prompt, **ask)) for policy in (one, other)]
        async with asyncio.timeout(200):
            before = server.metric("vllm:generation_tokens_total")
            while await asyncio.to_thread(server.metric, "vllm:generation_tokens_total") < before + 20:
                await asyncio.sleep(0.02)
        await one.interrupt()
        cut = await asyncio.gather(*asked)
        rest = [await other.generate([*prompt, *part.ids], max_tokens=4, sampling=GREEDY) for part in cut]
        whole = await other.generate(prompt, max_tokens=max(len(part.ids) for part in cut) + 4, sampling=GREEDY)
        await one.close()
        await other.close()
        return cut, rest, whole

    cut, rest, whole = asyncio.run(go())
    for part, more in zip(cut, rest, strict=True):
        both = part.then(more)
        assert part.finish_reason is FinishReason.INTERRUPTED and 0 < len(part.ids) < 600
        assert both.ids == whole.ids[: len(both.ids)]
        assert both.logprobs == pytest.approx(whole.logprobs[: len(both.ids)], abs=2e-4)


def test_a_refused_request_names_the_remedy(server):
    policy = VLLMServerPolicy(server.url)
    with pytest.raises(UserError, match=rf"{server.url} rejected.*maximum context length.*--max-model-len 1100"):
        generate(policy, ([300] * 1000, {"max_tokens": 100, "sampling": GREEDY}))
    with pytest.raises(UserError, match=r"out of vocabulary.*another tokenizer"):
        generate(policy, ([1_000_000], {"max_tokens": 10, "sampling": GREEDY}))
    with pytest.raises(UserError, match=r"serves tiny, not large"):
        generate(VLLMServerPolicy(server.url, model="large"))
    with pytest.raises(UserError, match=rf"need 5000 tokens.*has room for {MAX_MODEL_LEN}.*--max-model-len 5000"):
        generate(VLLMServerPolicy(server.url, context_length=5000))


def test_the_doctor_finds_no_problem_with_this_server_except_its_cpu(server):
    checks = {check.name: check for check in server_checks(server.url)}
    # Whether this process has vLLM, which it needs to send weights, is not tested here.
    unwell = {check.name for check in checks.values() if check.status is not Status.OK} - {"server version"}
    assert unwell == {"weight sync"}
    assert "CPU" in checks["weight sync"].said and checks["weight sync"].status is Status.WARNING
    short = {"max_completion_length": 900, "model_name_or_path": "tiny"}
    checks = {check.name: check for check in server_checks(server.url, short, prompt_tokens=200)}
    assert checks["model"].status is Status.OK and checks["max_model_len"].status is Status.PROBLEM
    assert "--max-model-len 1100" in checks["max_model_len"].remedy


def test_the_adapter_reaches_the_server_after_every_step(server, folder):
    """Each step samples with the weights of the step before; if they had not arrived, the log-probs would differ."""
    run_with_vllm(folder.parent, "tests.support.vllm_server_run", str(folder.parent), server.url)
    seen = json.loads((folder.parent / "server.json").read_text(encoding="utf-8"))
    assert len(seen["logged"]) == 2 and max(seen["logged"]) < 1e-3
    assert seen["stale"] > 0.05 and seen["synced"] < 1e-3
    base, adapter = seen["served"]  # earlier adapters were unloaded
    assert base == "tiny" and re.fullmatch("policy-[0-9a-f]{8}-3", adapter)
    check_held_out(seen["held_out"], len(ROWS))  # an evaluation during training, on the server


def test_an_evaluation_uses_the_server(server, folder, world, retriever, capsys):
    """All answers but one or two equal those of the model itself: two tokens may be equally likely."""
    write_questions(folder.parent, world)
    with serving(retrieve_from(retriever)) as searched:
        asked = partial(command, folder.parent, "model", searched.url)
        served = ["--backend", "vllm_server", "--server", server.url, "--served_model", "tiny"]
        assert main(asked("server", *served)) == 0
        assert main(asked("other", *served[:-1], "gone")) == 2
        assert "gone" in capsys.readouterr().err
        assert main(asked("here")) == 0
    assert agreement(answers(folder.parent, "server"), answers(folder.parent, "here")) >= 0.8
    settings = json.loads((folder.parent / "server" / "settings.json").read_text())
    assert settings["backend"]["served_model"] == "tiny"


def kill_in_the_middle(server, rollout):
    """Starts the rollout, and kills the server after its first completion."""
    before = server.metric("vllm:request_success_total")
    thread = ThreadPoolExecutor(1)
    running = thread.submit(rollout)
    while server.metric("vllm:request_success_total") == before:
        time.sleep(0.02)
    server.kill()
    thread.shutdown(wait=False)
    return running


def test_the_server_is_killed_and_restarted_during_a_rollout(server, tokenizer, world, retriever):
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    policy = VLLMServerPolicy(server.url, patience_s=600)
    undisturbed = search(policy, protocol, world, retriever, 16)
    running = kill_in_the_middle(server, lambda: search(policy, protocol, world, retriever, 16))
    server.start()
    disturbed = running.result()
    assert policy.restarted
    # The second try has the same seeds, and the weights of this server never change.
    assert [t.ids for t in disturbed] == [t.ids for t in undisturbed]


def test_a_server_that_stays_away_ends_the_rollout(server, tokenizer, world, retriever):
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    policy = VLLMServerPolicy(server.url, patience_s=1)
    running = kill_in_the_middle(server, lambda: search(policy, protocol, world, retriever, 16))
    with pytest.raises(UserError, match=rf"{server.url} was lost, and did not come back.*start it again"):
        running.result()
    with pytest.raises(UserError, match=rf"no vLLM server answers at {server.url} .*vllm_server_base_url"):
        generate(VLLMServerPolicy(server.url))


# Without an engine


@pytest.fixture
def answering():
    """A server that answers `POST /v1/completions` with the `answers` of a test, one after the other."""
    answers = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        has_failed = False

        def do_GET(self):
            if self.has_failed:
                self.close_connection = True  # without an answer
            else:
                self.reply(200, '{"data": [{"id": "m", "max_model_len": 64}], "version": "0.31.0"}')

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/collective_rpc":  # as without --worker-extension-cls
                self.has_failed = True  # vLLM no longer answers on this connection
                return self.reply(500, "CPUWorker has no started_at")
            self.reply(*(answers.pop(0) if len(answers) > 1 else answers[0]))

        def reply(self, status, text):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", answers
    server.shutdown()
    server.server_close()


CHOICE = '{"choices": [{"token_ids": [5, 6], "logprobs": {"token_logprobs": [-0.5, null]}, "finish_reason": "%s"}]}'
ABORTED = '{"choices": [{"token_ids": [], "logprobs": null, "finish_reason": "abort"}]}'
ASK = ([1], {"max_tokens": 2, "sampling": GREEDY})


@pytest.mark.parametrize(
    "trouble",
    [(503, "busy"), (429, "slow down"), (500, "oops"), (200, ABORTED), (200, "<html>"), (200, "{}")],
)
def test_temporary_server_errors_are_retried(answering, trouble):
    url, answers = answering
    answers += [trouble, trouble, (200, CHOICE % "length")]
    completion = generate(VLLMServerPolicy(url), ASK)[0]
    assert completion.ids == (5, 6) and completion.finish_reason is FinishReason.LENGTH
    assert completion.logprobs[0] == -0.5 and completion.logprobs[1] != completion.logprobs[1]
    answers[:] = [trouble]
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{url} is up, but failed a request [3-9] times in \d s"):
        generate(VLLMServerPolicy(url, patience_s=1.5), ASK)
    assert 1.5 < time.monotonic() - started < 60


def test_the_tokens_of_an_aborted_request_are_kept(answering):
    url, answers = answering
    answers.append((200, CHOICE % "abort"))
    (completion,) = generate(VLLMServerPolicy(url), ASK)
    assert completion.ids == (5, 6) and completion.finish_reason is FinishReason.INTERRUPTED


def test_a_server_that_cannot_be_paused_names_the_remedy(answering):
    url, answers = answering
    answers.append((404, "not found"))

    async def interrupt():
        policy = VLLMServerPolicy(url)
        await policy.open()
        try:
            await policy.interrupt()
        finally:
            await policy.close()

    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        asyncio.run(interrupt())


def test_a_policy_that_cannot_be_opened_is_closed(answering):
    url, _ = answering

    async def open_and_ask():
        policy = VLLMServerPolicy(url, model="another")
        with pytest.raises(UserError, match="serves m, not another"):
            await policy.open()
        await policy.generate([1], max_tokens=1, sampling=GREEDY)

    with pytest.raises(RuntimeError, match="the policy is closed"):
        asyncio.run(open_and_ask())


def test_the_start_time_of_a_lost_server_is_waited_for(answering):
    url, _ = answering
    assert server_start_time(url, 5.0) is None  # as with several API servers
    gone = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=rf"{gone} was lost, and did not come back.*start it again"):
        server_start_time(gone, 0.3)


def test_a_restart_is_detected(caplog):
    policy = VLLMServerPolicy("http://localhost:1")
    policy.see(5.0)
    policy.see(None)  # /metrics gave no start time
    policy.see(5.0)
    assert not policy.restarted
    policy.see(6.0)
    assert policy.restarted
    silent = VLLMServerPolicy("http://localhost:1")
    silent.see(None)
    assert not silent.restarted
    silent.see(None, gone=True)
    assert silent.restarted and "was restarted" in caplog.text


def test_incomplete_answers_are_refused(answering):
    url, answers = answering
    answers.append((200, (CHOICE % "stop").replace('"token_ids": [5, 6],', "")))
    with pytest.raises(UserError, match="returned no token ids"):
        generate(VLLMServerPolicy(url), ASK)
    answers[:] = [(200, CHOICE % "length")]
    with pytest.raises(UserError, match="after 2 of 9 tokens"):
        generate(VLLMServerPolicy(url), ([1], {"max_tokens": 9, "sampling": GREEDY}))
