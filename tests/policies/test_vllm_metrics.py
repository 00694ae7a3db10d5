"""Lines of `/metrics` as vLLM 0.32 writes them with `--data-parallel-size 2`."""

from __future__ import annotations

import httpx
import pytest

from trl_search.policies.vllm_metrics import count_engines, read_start_time, read_worker_start

TWO_ENGINES = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="1",model_name="tiny"} 0.0
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 0.0
vllm:prefix_cache_queries_total{engine="1",model_name="tiny"} 570.0
http_requests_total{handler="/health",method="GET",status="2xx"} 3.0
"""


def test_engines_are_counted():
    assert count_engines(TWO_ENGINES) == 2
    assert count_engines("http_requests_total 3.0\n") == 0  # --disable-log-stats


def test_the_start_time_is_read():
    assert read_start_time("# HELP\nprocess_start_time_seconds 1.5e9\nother 2\n") == 1.5e9
    assert read_start_time(TWO_ENGINES) is None  # several API servers


def test_a_worker_says_when_it_started():
    assert read_worker_start(httpx.Response(200, json={"results": [1.5e9, 1.6e9]})) == 1.5e9
    assert read_worker_start(httpx.Response(404)) is None  # without VLLM_SERVER_DEV_MODE=1
    assert read_worker_start(httpx.Response(500)) is None  # without --worker-extension-cls


@pytest.mark.parametrize("body", [b"<html>starting</html>", b"{}", b'{"results": []}', b"[1]", b'{"results": [null]}'])
def test_a_gateway_that_answers_for_the_server_is_asked_again(body):
    """As an error of the connection, which is repeated."""
    with pytest.raises(httpx.HTTPError, match="collective_rpc answered"):
        read_worker_start(httpx.Response(200, content=body))
