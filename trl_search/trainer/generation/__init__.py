"""The trainer's engines, and how they get the weights of each step.

vllm_backend.py    TRL's vLLM engine, or one or several servers
model_weights.py   iterates over the policy's weights, one full tensor at a time
server_sync.py     sends these weights to servers
weight_server.py   one of these servers: what is checked before it joins, and after each sync
vllm_client.py     TRL's client of a server, with its key
adapter_sync.py    sends a LoRA adapter without the base weights
"""
