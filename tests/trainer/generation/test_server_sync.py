"""Weights for several servers, with fakes of TRL's client, which would need NCCL."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import requests
import torch

from trl_search.common.errors import UserError
from trl_search.policies.vllm_server import ServerLost
from trl_search.policies.weight_checksums import EXTENSION, WeightChecksums, checksum, has_checksum
from trl_search.trainer.generation import server_sync, weight_server
from trl_search.trainer.generation.server_sync import WeightServers, buckets
from trl_search.trainer.generation.vllm_client import post

WEIGHTS = [
    ("model.layers.0.self_attn.o_proj.weight", torch.arange(6.0).view(2, 3) / 7),
    ("model.layers.0.mlp.down_proj.weight", torch.arange(4.0).view(2, 2) / 3),
    ("model.norm.weight", torch.ones(2)),
]
A, B = "http://gpu-1:8000", "http://gpu-2:8000"


class Server:
    """A fake vLLM server, started at `started_at`, whose bfloat16 weights can be read back."""

    def __init__(self):
        self.started_at, self.weights, self.ports, self.extension = 1.0, {}, [], EXTENSION
        self.loses = ""  # name of a tensor that does not arrive
        self.dies = ""  # "before" or "after" the weights
        self.serves_others, self.cache, self.keeps_its_cache = False, {"a prefix"}, False
        self.engines, self.of_second = 1, self.weights
        self.instance, self.shares_engines = f"{id(self)}", False
        self.version = "0.31.0+cu130"
        self.training = ""  # None: its trl-search is older

    def checksums(self):
        return worker_with(self.weights).weight_checksums()


def worker_with(weights):
    worker = WeightChecksums()
    worker.model_runner = SimpleNamespace(model=SimpleNamespace(named_parameters=weights.items))
    worker.rank = 0
    return worker


@pytest.fixture
def servers(monkeypatch):
    servers = {A: Server(), B: Server()}

    class Client:
        """Has the methods of TRL's `VLLMClient`."""

        def __init__(self, base_url, group_port, connection_timeout):
            self.server, self.port = servers[base_url], group_port

        def init_communicator(self, device):
            self.server.ports.append(self.port)

        def get_server_info(self):
            model = {"dtype": "torch.bfloat16", "quantization": None}
            parallel = {"worker_extension_cls": self.server.extension, "data_parallel_size": self.server.engines}
            parallel["data_parallel_hybrid_lb"] = self.server.shares_engines
            return {"parallel_config": parallel, "model_config": model, "instance_id": self.server.instance}

        def _get(self, url):
            return {"version": self.server.version}

        def weight_update(self):
            if self.server.dies == "before":
                raise requests.ConnectionError("refused")
            return contextlib.nullcontext()

        def update_named_params(self, metadata, named):
            for (name, dtype, shape), (sent, tensor) in zip(metadata, named, strict=True):
                assert (name, dtype, shape) == (sent, "float32", list(tensor.shape))
                if name != self.server.loses:
                    self.server.weights[name] = tensor.to(torch.bfloat16)

        def _post(self, url, json):
            assert json == {"method": "weight_checksums"}
            return {"results": [self.server.checksums()]}

    def post(url, json=None, params=None):
        server = servers[url.rpartition("/")[0]]
        if url.endswith("/reset_prefix_cache"):
            return reset(server, **params)
        if json["method"] == "claim_weights":
            (server.training,) = json["args"]
            return SimpleNamespace(status_code=200)
        if json["method"] == "weights_claimed_by":
            return SimpleNamespace(ok=server.training is not None, json=lambda: {"results": [server.training]})
        assert json["method"] == "require_checksums" and server.engines > 1
        try:
            worker_with(server.of_second).require_checksums(*json["args"])
        except RuntimeError as error:
            return SimpleNamespace(status_code=500, text=str(error))
        return SimpleNamespace(status_code=200)

    def reset(server, reset_running_requests="false"):
        """As vLLM does: while a request runs, it answers 200, and keeps its cache."""
        if server.dies == "after":
            raise requests.ConnectionError("refused")
        if server.keeps_its_cache:
            return SimpleNamespace(status_code=500, text="Failed to reset KV cache")
        if not server.serves_others or reset_running_requests == "true":
            server.cache.clear()
        return SimpleNamespace(status_code=200)

    def start_time(url, patience_s):
        if servers[url].started_at is None:
            raise ServerLost(f"{url} was lost", "start it again")
        return servers[url].started_at

    monkeypatch.setattr(server_sync, "ServerClient", Client)
    monkeypatch.setattr(weight_server, "post", post)
    monkeypatch.setattr(server_sync, "server_start_time", start_time)
    return servers


def join(urls):
    return WeightServers(urls, group_port=51216, device=torch.device("cpu"), patience_s=1.0, version="0.32.0")


def test_all_servers_get_all_weights_in_one_pass(servers):
    members = join([A, B])
    members.send(iter(WEIGHTS))
    for server in servers.values():
        assert {name: tensor.tolist() for name, tensor in server.weights.items()} == {
            name: tensor.to(torch.bfloat16).tolist() for name, tensor in WEIGHTS
        }
    assert servers[A].ports == [51216] and servers[B].ports == [51217]
    assert members.started_at == {A: 1.0, B: 1.0}


def test_one_server_with_two_addresses_is_refused(servers):
    """Its workers would leave the first NCCL group for the second, and the first sync would wait for them forever."""
    servers[B] = servers[A]
    with pytest.raises(UserError, match=r"gpu-2:8000 and http://gpu-1:8000 are the same vLLM server"):
        join([A, B])
    assert servers[A].ports == [51216]
    servers[A].instance = None  # unknown
    join([A, B])


def test_a_server_whose_version_joins_in_another_way_is_refused(servers):
    servers[B].version = "dev"  # unknown
    join([B])
    servers[A].version = "0.27.1"
    with pytest.raises(UserError, match=r"gpu-1:8000 has version 0.27.1, and this process 0.32.0.*same version"):
        join([A])
    assert servers[A].ports == []


def test_a_second_training_on_a_server_ends_the_first(servers):
    """Its sync would wait for workers that are in another NCCL group."""
    first, second = join([A, B]), join([B])
    with pytest.raises(UserError, match=r"another training has begun to send its weights to .*gpu-2:8000"):
        first.send(iter(WEIGHTS))
    assert servers[A].weights == servers[B].weights == {}
    second.send(iter(WEIGHTS))
    servers[B].training = None
    second.send(iter(WEIGHTS))
    servers[B].training, servers[B].started_at = "", 2.0  # it was restarted
    second.send(iter(WEIGHTS))
    assert servers[B].training == second._training


def test_a_server_that_reaches_only_a_part_of_its_engines_is_refused(servers):
    servers[A].shares_engines = True
    with pytest.raises(UserError, match=r"gpu-1:8000 shares its engines with other servers.*without --data-parallel"):
        join([A])
    assert servers[A].ports == []  # it would wait for the others there


def test_a_lost_server_is_left_out_and_joins_again(servers):
    members = join([A, B])
    servers[A].started_at = None
    members.send(iter(WEIGHTS))
    assert members.started_at == {B: 1.0} and servers[A].weights == {}
    servers[A].started_at = 2.0
    members.send(iter(WEIGHTS))
    assert members.started_at == {B: 1.0, A: 2.0} and len(servers[A].weights) == 3
    assert servers[A].ports == [51216, 51218] and servers[B].ports == [51217]  # a new NCCL group


def test_a_server_that_was_restarted_between_two_syncs_joins_again(servers):
    members = join([A])
    servers[A].started_at, servers[A].weights = 2.0, {}
    members.send(iter(WEIGHTS))
    assert members.started_at == {A: 2.0} and servers[A].ports == [51216, 51217]


def test_without_servers_the_run_ends(servers):
    members = join([A, B])
    servers[A].started_at = servers[B].started_at = None
    with pytest.raises(UserError, match="gpu-1:8000 was lost: start it again; http://gpu-2:8000 was lost"):
        members.send(iter(WEIGHTS))


def test_a_server_that_dies_after_it_received_the_weights_is_left_out(servers):
    members = join([A, B])
    servers[A].dies = "after"
    members.send(iter(WEIGHTS))
    assert members.started_at == {B: 1.0}
    servers[B].dies = "after"
    servers[A].started_at = None
    with pytest.raises(ServerLost, match="no vLLM server is left"):
        members.send(iter(WEIGHTS))


def test_a_server_that_dies_during_a_sync_ends_the_run_with_one_line(servers):
    members = join([A, B])
    servers[B].dies = "before"
    with pytest.raises(ServerLost, match=r"died while it received weights \(refused\): restart it"):
        members.send(iter(WEIGHTS))


def test_nothing_computed_with_older_weights_stays_in_the_cache_of_a_server_that_others_use(servers):
    servers[A].serves_others = True
    members = join([A, B])
    members.send(iter(WEIGHTS))
    assert not servers[A].cache and not servers[B].cache
    servers[A].keeps_its_cache = True
    with pytest.raises(UserError, match=r"gpu-1:8000 still has keys and values of older weights \(500: Failed to"):
        members.send(iter(WEIGHTS))


def test_an_error_of_a_server_is_read_not_retried():
    """TRL's client asks three times, in 14 s, and then says that the server is lost."""
    asked = []

    class Broken(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_error(500, "Failed to reset KV cache")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = post(f"http://127.0.0.1:{server.server_port}/reset_prefix_cache", params={"a": "b"})
        server.shutdown()
    assert answer.status_code == 500 and "Failed to reset" in answer.text
    assert asked == ["/reset_prefix_cache?a=b"]


def test_weights_that_did_not_arrive_are_an_error(servers):
    members = join([A, B])
    members.send(iter(WEIGHTS))
    servers[B].loses = "model.layers.0.mlp.down_proj.weight"
    step = [(name, tensor + 0.1) for name, tensor in WEIGHTS]
    with pytest.raises(UserError, match=r"gpu-2:8000 does not have the weights .*\(model.layers.0.mlp.down_proj"):
        members.send(iter(step))


def test_a_server_with_another_model_is_an_error(servers):
    servers[A].loses = WEIGHTS[0][0]
    with pytest.raises(UserError, match="none of its tensors is among them"):
        join([A]).send(iter([WEIGHTS[0], WEIGHTS[2]]))


def test_weights_that_one_of_several_engines_does_not_have_are_an_error(servers):
    servers[A].engines = 2
    members = join([A])
    members.send(iter(WEIGHTS))
    servers[A].of_second = dict(servers[A].weights)
    step = [(name, tensor + 0.1) for name, tensor in WEIGHTS]
    with pytest.raises(UserError, match=r"not all 2 engines of the vLLM server at http://gpu-1:8000 .* different wei"):
        members.send(iter(step))


def test_a_server_that_cannot_read_weights_back_is_named_once(servers, caplog):
    servers[B].extension = ""
    members = join([A, B])
    assert f"--worker-extension-cls {EXTENSION}" in caplog.text
    members.send(iter(WEIGHTS))
    assert len(servers[B].weights) == 3


def test_checksums_detect_one_changed_element_and_add_up_over_shards():
    name, tensor = WEIGHTS[0]
    assert has_checksum(name) and not has_checksum("model.norm.weight")
    whole = checksum(tensor, torch.bfloat16)
    assert whole == sum(checksum(shard, torch.bfloat16) for shard in tensor.chunk(3, dim=1))
    moved = tensor.clone()
    moved[1, 2] *= 1.01
    assert checksum(moved, torch.bfloat16) != whole


def test_a_worker_says_which_training_sends_its_weights():
    worker = worker_with({})
    assert worker.weights_claimed_by() == ""
    worker.claim_weights("a")
    assert worker_with({}).weights_claimed_by() == "a"
    worker.claim_weights("")


def test_buckets_hold_copies_of_every_tensor():
    cut = list(buckets(iter(WEIGHTS), size=24))
    assert [[name for name, _ in bucket] for bucket in cut] == [[WEIGHTS[0][0]], [WEIGHTS[1][0], WEIGHTS[2][0]]]
    assert cut[0][0][1].data_ptr() != WEIGHTS[0][1].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_are_complete_before_vllm_packs_them_on_its_own_streams(servers, monkeypatch):
    packing = torch.cuda.Stream()

    def pack(client, metadata, named):
        with torch.cuda.stream(packing):
            client.server.weights.update((name, tensor.to(torch.bfloat16)) for name, tensor in named)
        torch.cuda.synchronize()

    def gathered_slowly(named):
        for name, tensor in named:
            torch.cuda._sleep(200_000_000)  # about 0.1 s, in which the copy of the tensor has not begun
            yield name, tensor

    members = WeightServers([A], group_port=51216, device=torch.device("cuda", 0), patience_s=1.0, version="0.32.0")
    monkeypatch.setattr(type(members.members[A].client), "update_named_params", pack)
    before = [(name, tensor.cuda()) for name, tensor in WEIGHTS]
    after = [(name, tensor + 1) for name, tensor in before]
    members.send(iter(before))  # the first call loads kernels and takes memory, and both wait for the GPU
    members.send(gathered_slowly(after))
    assert all(torch.equal(servers[A].weights[name], tensor.to(torch.bfloat16)) for name, tensor in after)
