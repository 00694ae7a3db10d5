"""Without a network: a model in the cache of the hub's client is loaded at once, and another is an error at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.encoders import save_random_bert
from trl_search.cli.main import main
from trl_search.cli.preflight import Status
from trl_search.cli.recipe_checks import check_model_is_there, check_questions
from trl_search.common.errors import UserError
from trl_search.common.hub import hub_http, only_cached
from trl_search.data import load_questions
from trl_search.policies.loading import load_model, load_tokenizer
from trl_search.policies.tiny import tiny_policy_path
from trl_search.retrieval.dense.encoder import load_encoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Answer = Callable[[Any], Any]
httpx = hub_http()


class Network:
    """What the hub's client asked for and how long it waited. `answer` may be replaced."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.waited_s = 0.0
        self.answer: Answer = self.refuse

    def refuse(self, request: Any) -> Any:
        raise httpx.ConnectError("Name or service not known", request=request)

    def handle(self, request: Any) -> Any:
        self.asked.append(request.url.path)
        return self.answer(request)

    def wait(self, seconds: float) -> None:
        self.waited_s += seconds


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """No network and empty caches; nobody waits for the hub."""
    network = Network()
    for module in ("huggingface_hub", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for module in ("huggingface_hub.utils._http", "trl_search.common.hub"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=network.wait))
    set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(network.handle)))
    yield network
    set_client_factory(default_client_factory)


def cache(folder: str | Path, hub: Path, name: str, *, without: str = "", absent: str = "") -> None:
    """A model in the cache, as after `hf download`. Of the files that its repository lacks, it records only
    `absent`."""
    repository = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT, ignore=shutil.ignore_patterns(without))
    if absent:
        (repository / ".no_exist" / COMMIT).mkdir(parents=True)
        (repository / ".no_exist" / COMMIT / absent).touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize(
    "command",
    [
        "eval me/agent --datasets world --output out",
        "chat me/agent question --retriever world",
        "doctor me/agent",
        "index --corpus corpus.jsonl --output index --kind dense --encoder me/encoder",
        "index --corpus me/corpus --output index",
        "data chunk corpus.jsonl --output chunks.jsonl --tokenizer me/agent",
    ],
)
def test_a_name_that_is_not_in_the_cache_is_an_error_at_once(
    command: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_text('{"id": "1", "title": "A", "text": "B"}\n')
    assert main(command.split()) == 2
    said = capsys.readouterr().err
    assert "is not on this machine, neither as a folder nor in the cache, and the hub cannot be reached (Name" in said
    assert "give a path, or bring " in said and len(said.splitlines()) == 1
    assert network.waited_s <= 1 and len(network.asked) <= 2


def test_a_model_in_the_cache_is_loaded_without_a_network(network: Network, tmp_path: Path) -> None:
    """Also if the cache does not record that the repository lacks the optional files of a tokenizer."""
    cache(tiny_policy_path(), tmp_path / "hub", "me/agent")
    assert check_model_is_there("me/agent").status is Status.OK
    assert load_tokenizer("me/agent").get_vocab() and load_model("me/agent").num_parameters()
    assert network.waited_s == 0
    question = ["--datasets", "world", "--limit", "1", "--max_completion_length", "400"]
    assert main(["eval", "me/agent", *question, "--output", str(tmp_path / "out")]) == 0
    assert network.waited_s == 0


def test_an_adapter_and_an_encoder_in_the_cache_are_loaded_without_a_network(network: Network, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(tiny_policy_path(), "me/base"))
    cache(tiny_policy_path(), tmp_path / "hub", "me/base")
    cache(tmp_path / "adapter", tmp_path / "hub", "me/adapter")
    for name in (str(tmp_path / "adapter"), "me/adapter"):
        assert check_model_is_there(name).status is Status.OK
        assert load_model(name).peft_config
    cache(save_random_bert(tmp_path / "bert"), tmp_path / "hub", "me/e5-base-v2", absent="adapter_config.json")
    assert load_encoder("me/e5-base-v2", device="cpu").fingerprint.pooling == "mean"
    assert network.waited_s == 0


def test_a_cache_that_lacks_a_needed_file_is_an_error_at_once(network: Network, tmp_path: Path) -> None:
    cache(tiny_policy_path(), tmp_path / "hub", "me/agent", without="*.safetensors")
    with pytest.raises(UserError, match="the model of me/agent cannot be loaded"):
        load_model("me/agent")
    assert network.waited_s == 0


def test_a_hub_that_answers_slowly_is_left_to_its_client(network: Network, tmp_path: Path) -> None:
    def answer(request: Any) -> Any:
        raise httpx.ReadTimeout("slow", request=request)

    network.answer = answer
    assert not only_cached("me/agent")
    network.answer = lambda request: httpx.Response(503)
    assert not only_cached("me/agent")
    assert not only_cached(str(tmp_path)) and len(network.asked) == 2


def test_a_name_server_may_fail_once(network: Network) -> None:
    network.answer = lambda request: httpx.Response(200) if len(network.asked) > 1 else network.refuse(request)
    assert not only_cached("me/agent")
    assert network.waited_s == 1


def test_offline_mode_waits_for_nothing(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"me/agent is not on this machine.*\(HF_HUB_OFFLINE is set\)"):
        only_cached("me/agent")
    assert network.waited_s == 0 and not network.asked


def test_question_sets_are_found_in_the_cache_of_datasets(network: Network, tmp_path: Path) -> None:
    sets = {"questions": "nq_hotpotqa", "eval_questions": ["nq"]}
    assert [check.status for check in check_questions(sets)] == [Status.PROBLEM, Status.PROBLEM]
    (tmp_path / "datasets" / "PeterJinGo___nq_hotpotqa_train" / "default").mkdir(parents=True)
    (tmp_path / "datasets" / "RUC-NLPIR___flash_rag_datasets" / "nq").mkdir(parents=True)
    assert [check.status for check in check_questions(sets)] == [Status.OK, Status.OK]
    with pytest.raises(UserError, match=r"FlashRAG_datasets\) is not on this machine.*the hub cannot be reached"):
        load_questions("popqa")
