"""What benchmarks/gpu_check.sh runs: numbers first, then speed, in one table each. Random weights, generated pairs.

python benchmarks/gpu_check.py                   # the largest model that fits, bfloat16; on a CPU a tiny one, float32
python benchmarks/gpu_check.py --billions 1
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import bench_dpo  # noqa: E402

import mdpo.attention  # noqa: E402
from mdpo.fused import fuse  # noqa: E402
from mdpo.logprobs import enable_scoring, score_tokens  # noqa: E402
from mdpo.packing import PackedCollator, PairCollator, n_tokens, on_device  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# billions of weights: hidden, intermediate, layers, heads, key heads
SIZES = {8: (4096, 14336, 32, 32, 8), 3: (3072, 8192, 28, 24, 8), 1: (2048, 8192, 16, 32, 8), 0: (256, 512, 2, 4, 2)}
GB_A_BILLION = 26  # bfloat16 weights, gradients and AdamW's two moments, float32 log-probs and activations, both sides


def config(billions: int, vocabulary: int) -> LlamaConfig:
    hidden, intermediate, layers, heads, key_heads = SIZES[billions]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 8192,
        "initializer_range": 0.06,
    }
    return LlamaConfig(vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)


def random_rows(pairs: int, shared: int, own: int, vocabulary: int) -> list[dict]:
    """Pairs of token ids; the last two thirds of each own part are supervised."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(pairs):
        ids = torch.randint(3, vocabulary, (shared + 2 * own + i,), generator=generator).tolist()
        sides = ids[: shared + own], ids[:shared] + ids[shared + own :]
        masks = [[int(t >= shared + own // 3) for t in range(len(side))] for side in sides]
        rows.append({
            "chosen_ids": sides[0], "rejected_ids": sides[1], "chosen_mask": masks[0], "rejected_mask": masks[1],
            "shared_len": shared, "row": i,
        })  # fmt: skip
    return rows


def model_of(billions: int, vocabulary: int, dtype: torch.dtype, fused: bool = False):
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config(billions, vocabulary), dtype=dtype, attn_implementation="sdpa")
    enable_scoring(model, fused and fuse(model, DEVICE)[0])
    return model


def scored(model, batch, gradients: bool):
    """Log-probs of a batch, and with `gradients` those of their weighted sum, as one long list of the first layer's."""
    batch = on_device(batch, DEVICE)
    logps = score_tokens(model, batch).logps
    if not gradients:
        return logps.detach(), None
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps), device=DEVICE)).sum().backward()
    found = torch.cat([p.grad.float().flatten() for p in model.model.layers[0].parameters()])
    model.zero_grad()
    return logps.detach(), found


def numbers(billions: int, vocabulary: int) -> None:
    """Packed against padded, and compiled against not, relative to the norm."""
    table = Table(title="difference from padded batches and uncompiled modules, relative to the norm")
    for column in ("dtype", "attention", "fused_ops", "log-probs", "gradients of layer 0"):
        table.add_column(column)
    rows, varlen = random_rows(3, 96, 64, vocabulary), mdpo.attention._varlen
    for dtype in (torch.float32, torch.bfloat16):
        wanted = scored(model_of(billions, vocabulary, dtype), PairCollator(0)(rows), True)
        for name, kernel in attentions(dtype).items():
            for fused in (False, True):
                mdpo.attention._varlen = kernel
                found = scored(model_of(billions, vocabulary, dtype, fused), PackedCollator()(rows), True)
                mdpo.attention._varlen = varlen
                errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]
                table.add_row(str(dtype).split(".")[1], name, str(fused), *(f"{e:.1e}" for e in errors))
    Console(width=130).print(table)


def attentions(dtype: torch.dtype) -> dict:
    """Ways to attend by name: what `_varlen` is put to."""
    found = {"by segment": lambda *_: None}
    if CUDA and dtype != torch.float32:
        found["torch varlen"] = lambda *_: mdpo.attention._torch_varlen
        if mdpo.attention.importlib.util.find_spec("flash_attn"):
            found["flash-attn"] = lambda *_: mdpo.attention._flash
    return found


def speed_of_parts(billions: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Forward and backward of one packed batch, for each way to attend, with and without compiled modules."""
    table = Table(title="forward and backward of 4 pairs, 1536 shared and 2 × 512 own tokens: ms, median of 5")
    for column in ("layout", "attention", "fused_ops", "ms", "peak GB"):
        table.add_column(column)
    sizes = (1536, 512) if CUDA else (96, 32)
    rows, varlen = random_rows(4, *sizes, vocabulary), mdpo.attention._varlen
    for fused in (False, True):
        model = model_of(billions, vocabulary, dtype, fused)
        cases = [("packed", name, kernel) for name, kernel in attentions(dtype).items()]
        for layout, name, kernel in [*cases, ("padded", "sdpa", varlen)]:
            mdpo.attention._varlen, times = kernel, []
            batch = (PackedCollator() if layout == "packed" else PairCollator(0))(rows)
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(7):
                synchronize()
                start = time.perf_counter()
                scored(model, batch, True)
                synchronize()
                times.append(1000 * (time.perf_counter() - start))
            peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if CUDA else ""
            table.add_row(layout, name, str(fused), f"{statistics.median(times[2:]):.1f}", peak)
        del model
    mdpo.attention._varlen = varlen
    print(f"{n_tokens(batch)} tokens of both sides")
    Console(width=110).print(table)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def against_trl(billions: int, vocabulary: int, dtype: str) -> None:
    """bench_dpo.py on a folder with a random model and a tokenizer of words."""
    words = sorted({w for row in bench_dpo.workloads.chat_rows(4, 200, 1, 200) for m in row["chosen"]
                    for w in m["content"].split()})  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with DEVICE:
            model = AutoModelForCausalLM.from_config(config(billions, vocabulary), dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        del model
        tokenizer_of(words).save_pretrained(folder)
        if CUDA:
            torch.cuda.empty_cache()
        options = {"model": folder, "dtype": dtype, "steps": 5, "threads": torch.get_num_threads()}
        tokens = 2048 if CUDA else 64
        rows = bench_dpo.workloads.chat_rows(4 * 8, history=tokens // 2, turns=2, answer=tokens // 4)
        results = [bench_dpo.compare("half shared", rows, 4, options, sides=(side,)) for side in ("trl", "ours")]
        both = {**results[1], **results[0], "seconds": {**results[0]["seconds"], **results[1]["seconds"]}}
        bench_dpo.show([both], [bench_dpo.matmul_rate(options["threads"], dtype)])


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "<end>", "<unk>", "<sep>"]
    ids = {word: i for i, word in enumerate([*special, "user", "assistant", *words])}
    raw = Tokenizer(models.WordLevel(ids, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '<sep>' + m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant<sep>' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        additional_special_tokens=["<s>", "<sep>"], chat_template=template,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=int, choices=list(SIZES))
    args = parser.parse_args()
    free = torch.cuda.mem_get_info()[0] / 1e9 if CUDA else 0.0
    fits = next(size for size in SIZES if size * GB_A_BILLION <= free)
    billions = fits if args.billions is None else args.billions
    vocabulary, dtype = (128256, torch.bfloat16) if billions else (512, torch.float32)
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, {billions}B weights")
    numbers(min(billions, 1), vocabulary)
    speed_of_parts(billions, vocabulary, dtype if CUDA else torch.float32)
    against_trl(billions, vocabulary, "bfloat16" if CUDA else "float32")


if __name__ == "__main__":
    main()
