"""The random models that stand for the rows of the rule table."""

from __future__ import annotations

from tests.random_models import Model

_MOE = """
qwen3moe gpt-oss qwen2moe qwen3next qwen3vlmoe qwen35moe phimoe dbrx olmoe arctic deepseek
deepseek2 deepseek32 dots3note glm4moe glm-dsa exaone-moe bailingmoe bailingmoe2 dots1
ernie4_5-moe hunyuan-moe hy_v3 grovemoe minimax-m2 minimax-m3 paddleocr mimo2 mistral4 mellum
laguna maple cohere2moe grok ernie4_5
"""
_DENSE = """
llama qwen2 qwen3 gemma2 gemma3 phi3 qwen2vl gpt2 granite qwen35 falcon-h1 arcee chatglm exaone
falcon hunyuan-dense jais2 maincoder mamba mamba2 mistral3 olmo openelm pangu-embedded pockettts
refact seed_oss starcoder2 codeshell gptneox internlm2 jais nemotron orion phi2 plamo qwen
stablelm xverse glm4 hunyuan_vl qwen3vl baichuan command-r deci exaone4 nanbeige cohere2
granite_swa olmo2 plamo3 spark2_5 gemma minicpm mpt starcoder smollm3 granitemoe
"""

# The rules that the usual metadata do not touch, and the types of weights.
_HEADS = [2, 2, 4, 2, 4, 4]
_FREE = [2, 0, 2, 2, 0, 2]  # heads of deci: some layers have no attention, some no FFN
_SPECIAL = [
    Model("llama", tied=True, quantised="Q8_0"),
    Model("llama", moe=True, quantised="F16"),
    Model("gemma3", tied=True, quantised="Q4_0"),
    Model("gemma3", extra={"attention.sliding_window": 0}, label="full"),
    Model("gemma2", extra={"embedding_length": 192}, label="odd-scale"),
    Model("granite", extra={"embedding_scale": 12.0}, label="scale"),
    Model("granitemoe", moe=True, extra={"embedding_scale": 12.0}, label="scale"),
    Model("granite_swa", extra={"embedding_scale": 12.0}, label="scale"),
    Model("minicpm", extra={"residual_scale": None}, label="old"),
    Model("qwen3vl", extra={"n_deepstack_layers": 2}, label="images"),
    Model(
        "openelm",
        extra={"attention.head_count": _HEADS, "attention.head_count_kv": _HEADS},
        label="heads",
    ),
    Model(
        "deci",
        extra={
            "attention.head_count": _FREE,
            "attention.head_count_kv": _FREE,
            "feed_forward_length": [384, 384, 192, 0, 384, 384],
        },
        label="heads",
    ),
    Model("llama", extra={"leading_dense_block_count": 3}, label="dense"),
    Model("dots1", moe=True, extra={"leading_dense_block_count": 3}, label="dense"),
    Model("deepseek2", moe=True, layers=27, label="lite"),
    Model("smallthinker", moe=True, layers=16, label="16"),
    Model("smollm3", layers=9, label="9"),
    Model("qwen3next", moe=True, layers=8, extra={"full_attention_interval": 4}, label="4"),
]
_ALL = [*(Model(a, moe=True) for a in _MOE.split()), *(Model(a) for a in _DENSE.split()), *_SPECIAL]

MODELS: dict[str, Model] = {model.name: model for model in _ALL}
