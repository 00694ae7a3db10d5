"""What generates for the trainer, and how the weights of a step reach it.

policy.py          vLLM or the model itself, as the configuration asks
vllm_backend.py    TRL's vLLM engine, or one or several servers
model_weights.py   the policy's weights, one whole tensor after the other
server_sync.py     these weights on their way to servers
adapter_sync.py    a LoRA adapter on its way, without the base weights
"""
