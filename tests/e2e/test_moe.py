"""Experts merged into a mixture of experts, served by vLLM alone: its answers are those of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from decar.training.export.moe import merge
from tests.helpers import serve_environment
from tests.reference import HEAD_DIM
from tests.training.test_moe import checkpoint

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

PROMPTS = [[5, 9, 17, 100, 3], [7, 11], list(range(20, 60))]
MAX_TOKENS = 16
# fp32 on both sides, each with its own order of summation: a relative error of some 1e-6 in logits of up to 10
TOLERANCE = 1e-4
# Nothing of decar: what whoever downloads the checkpoint does.
PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    directory, prompts, max_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    llm = LLM(directory, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
              kv_cache_memory_bytes=64 << 20)
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=1, detokenize=False, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    outputs = [answer.outputs[0] for answer in answers]
    said = [
        {"tokens": list(output.token_ids),
         "logprobs": [row[token].logprob for row, token in zip(output.logprobs, output.token_ids)]}
        for output in outputs
    ]
    print("ANSWERS", json.dumps(said))

if __name__ == "__main__":
    main()
"""


def test_plain_vllm_answers_as_transformers(tmp_path: Path) -> None:
    """Three experts, so that two of them are chosen, for each token of each layer."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=2 * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    experts = [checkpoint(config, seed, tmp_path / str(seed)) for seed in range(3)]
    merged = merge([replace(expert, name=str(k)) for k, expert in enumerate(experts)])
    for layer in merged.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.1)
    merged.save_pretrained(tmp_path / "merged")
    script = tmp_path / "plain.py"
    script.write_text(PLAIN_VLLM)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "merged"), json.dumps(PROMPTS), str(MAX_TOKENS)],
        env=serve_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    routed = []
    for prompt, answer in zip(PROMPTS, json.loads(line.removeprefix("ANSWERS")), strict=True):
        ids = torch.tensor([[*prompt, *answer["tokens"]]])
        with torch.inference_mode():
            said = model(ids, output_router_logits=True)
        rows = said.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        routed += [gate.topk(2).indices for gate in said.router_logits]
        best = rows.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 2 * TOLERANCE  # else two right answers could differ
        assert answer["tokens"] == rows.argmax(-1).tolist()
        expected = rows.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected, rtol=0, atol=TOLERANCE)
    assert set(torch.cat(routed).flatten().tolist()) == {0, 1, 2}
