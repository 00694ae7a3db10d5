"""A trainer that sends its adapter to a real `vllm serve`, for test_vllm_server.py. TRL needs vLLM on its path.

python -m tests.support.vllm_server_run FOLDER URL        # trains FOLDER/model, writes FOLDER/server.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.support.vllm_colocate_run import adapter_after_two_steps, make_trainer, readable


def main(folder: Path, url: str) -> None:
    trainer = make_trainer(folder, vllm_mode="server", vllm_server_base_url=url, max_steps=2)
    seen: dict[str, Any] = adapter_after_two_steps(trainer)
    seen["served"] = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
    (folder / "server.json").write_text(json.dumps(seen, default=readable), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
