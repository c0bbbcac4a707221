"""A training step under a limit of address space that is too low for it: prints the error's type and text as JSON."""

import json
import resource
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.types import PairBatch

SPARE = int(sys.argv[1])  # bytes above what is mapped before the step

config = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
)  # fmt: skip
model = LlamaForCausalLM(config).train()
enable_scoring(model)
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + SPARE, resource.RLIM_INFINITY))
ids = torch.randint(512, (4, 2048))
ones = torch.ones_like(ids)
batch = PairBatch(input_ids=ids, attention_mask=ones, completion_mask=ones).with_labels()
try:
    score_tokens(model, batch).logps.sum().backward()
    print(json.dumps({"type": None}))
except Exception as error:
    print(json.dumps({"type": type(error).__name__, "text": str(error)}))
