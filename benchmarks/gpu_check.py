"""Numerical agreement, then speed, on a GPU; benchmarks/gpu_check.sh runs it. Prints each line once it is measured; 8
minutes at most on an 80 GB card. Random weights, generated pairs. A size that does not fit is "out of memory".

python benchmarks/gpu_check.py                   # sizes that fit, bfloat16; on a CPU tiny ones
python benchmarks/gpu_check.py --billions 1      # size of the model whose steps are timed
python benchmarks/gpu_check.py --minutes 20      # parts that would end later are skipped by name
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import bench_dpo  # noqa: E402
from gpu_tools import (  # noqa: E402
    CUDA,
    DEVICE,
    HALF,
    SIZES,
    Clock,
    Lines,
    attempt,
    collated,
    config,
    largest,
    milliseconds,
    model_of,
    peak,
    qwen_7b,
    random_rows,
    tokenizer_of,
    weights_of,
)

import mdpo.forward.packed_attention  # noqa: E402
from mdpo.forward.forest import Forest  # noqa: E402
from mdpo.forward.lm_head import HeadTransform  # noqa: E402
from mdpo.forward.token_logps import ChunkedLogProbs, full_log_probs, score_tokens  # noqa: E402
from mdpo.forward.varlen import kernels  # noqa: E402
from mdpo.types import PairBatch  # noqa: E402

# One pair, answers of 1024 tokens, bfloat16, gradient checkpointing, forward and backward in ms on one A800: public
# figures of prefix sharing, not measured here. Prefix: (unshared, shared).
PUBLIC_A800 = {4096: (2786, 1814), 1024: (1141, 905)}


def attentions(dtype: torch.dtype) -> dict:
    """Attention implementations by name: what `_varlen` is set to."""
    usable = kernels(DEVICE) if CUDA and dtype != torch.float32 else {}
    return {"by run": lambda *_: None} | {name: lambda *_, kernel=kernel: kernel for name, kernel in usable.items()}


def attempt_with_kernel(kernel, function, *args):
    previous, mdpo.forward.packed_attention._varlen = mdpo.forward.packed_attention._varlen, kernel
    try:
        return attempt(function, *args)
    finally:
        mdpo.forward.packed_attention._varlen = previous


# ------------------------------------------------------------------------------------------------------------- numbers


def scored(model, batch) -> tuple[torch.Tensor, ...]:
    """(log-probs, loss of the difference of the sides' mean log-probs, gradients of the first layer as one vector)."""
    logps = score_tokens(model, batch).logps
    loss = -torch.nn.functional.logsigmoid(((1 - 2 * batch.side) * logps).mean())
    model.zero_grad()
    loss.backward()
    gradients = torch.cat([p.grad.float().flatten() for p in model.model.layers[0].parameters()])
    model.zero_grad()
    return logps.detach(), loss.detach(), gradients


def numbers(billions: int, vocabulary: int) -> None:
    """Packed against padded batches, compiled against uncompiled modules: differences relative to the norm."""
    title = "difference from padded batches and uncompiled modules, relative to the norm"
    lines = Lines(title, "dtype", "attention", "fused_ops", "log-probs", "loss", "gradients of layer 0")
    rows, settings = random_rows(3, 96, 64, vocabulary), config(billions, vocabulary)
    for dtype in (torch.float32, torch.bfloat16):
        padded = attempt(lambda dtype=dtype: scored(model_of(settings, dtype), collated("padded", rows)))
        for name, kernel in attentions(dtype).items():
            for fused in (False, True):
                run_packed = lambda d=dtype, f=fused: scored(model_of(settings, d, f), collated("packed", rows))  # noqa: E731
                packed = attempt_with_kernel(kernel, run_packed)
                if isinstance(packed, str) or isinstance(padded, str):
                    cells = ["out of memory"] * 3
                else:
                    cells = [f"{((a - b).norm() / b.norm()).item():.1e}" for a, b in zip(packed, padded, strict=True)]
                lines.add(str(dtype).split(".")[1], name, fused, *cells)


# --------------------------------------------------------------------------------------------------------------- parts


def head_speed() -> None:
    """The chunked LM head against full float32 logits, forward and backward."""
    tokens, hidden, vocabulary = (4096, 3584, 152064) if CUDA else (64, 64, 512)
    lines = Lines(f"LM head: {tokens} tokens, hidden size {hidden}, vocabulary {vocabulary}", "head", "ms", "peak GB")
    with DEVICE:
        h, w = (torch.randn(shape, dtype=HALF).requires_grad_() for shape in ((tokens, hidden), (vocabulary, hidden)))
        target = torch.randint(0, vocabulary, (tokens,))
    chunk = max(64, (1 << 29) // (4 * vocabulary))
    heads = {
        "chunks, compiled": lambda: ChunkedLogProbs.apply(h, w, None, target, HeadTransform(), chunk, False, True)[0],
        "chunks": lambda: ChunkedLogProbs.apply(h, w, None, target, HeadTransform(), chunk)[0],
        "full logits": lambda: full_log_probs(h, w, None, target),
    }
    for name, head in heads.items():
        backward = lambda head=head: torch.autograd.grad(head().sum(), [h, w])  # noqa: E731
        cells = attempt(lambda backward=backward: (f"{milliseconds(backward):.1f}", peak()))
        lines.add(name, *(cells if isinstance(cells, tuple) else (cells, "")))


def attention_speed() -> None:
    """One layer's attention over packed pairs, forward and backward."""
    pairs, shared, own, heads, key_heads = (4, 1536, 512, 32, 8) if CUDA else (2, 48, 16, 4, 2)
    lines = Lines(f"attention: {pairs} pairs, {shared} shared and 2 × {own} own tokens", "attention", "ms", "peak GB")
    runs = [run for i in range(pairs) for run in ([shared + own, -1], [own, i * (shared + 2 * own) + shared - 1])]
    forest, n = Forest(runs), pairs * (shared + 2 * own)
    with DEVICE:
        q, k, v = (torch.randn(1, x, n, 128, dtype=HALF).requires_grad_() for x in (heads, key_heads, key_heads))
    layer = torch.nn.Module()

    def step():
        out = mdpo.forward.packed_attention.packed_attention(layer, q, k, v, None, forest=forest)[0]
        torch.autograd.grad(out.sum(), [q, k, v])

    for name, kernel in attentions(HALF).items():
        cells = attempt_with_kernel(kernel, lambda: (f"{milliseconds(step):.2f}", peak()))
        lines.add(name, *(cells if isinstance(cells, tuple) else (cells, "")))


def step_flops(settings, batch: PairBatch) -> float:
    """FLOPs of forward and backward: each computed token once, LM head at scored tokens, attention at visible keys."""
    if batch.is_packed:
        forest = Forest(batch.runs)
        attended = sum(q * before + q * (q + 1) / 2 for q, before in zip(forest.sizes, forest.before, strict=True))
    else:
        attended = sum(n * (n + 1) / 2 for n in batch.lengths)
    head = settings.vocab_size * settings.hidden_size * len(batch.logp_position)
    attention = 2 * attended * settings.hidden_size * settings.num_hidden_layers
    return 6 * (weights_of(settings)[0] * batch.input_ids.numel() + head + attention)


def step_speed(billions: int, vocabulary: int, rate: float) -> None:
    """Forward and backward of one batch, for each attention implementation, with and without compiled modules."""
    pairs, shared, own = (4, 1536, 512) if CUDA else (2, 96, 32)
    title = f"forward and backward, {billions}B weights: {pairs} pairs, {shared} shared and 2 × {own} own tokens"
    lines = Lines(title, "layout", "attention", "fused_ops", "ms", "pairs/s", "MFU", "peak GB")
    rows, settings = random_rows(pairs, shared, own, vocabulary), config(billions, vocabulary)
    for fused in (True, False):
        model = attempt(model_of, settings, HALF, fused)
        for layout, name, kernel in [*(("packed", *x) for x in attentions(HALF).items()), ("padded", "sdpa", None)]:
            cells = ["out of memory", "", "", ""]
            if not isinstance(model, str):
                batch = collated(layout, rows)
                measured = attempt_with_kernel(
                    kernel or (lambda *_: None),
                    lambda model=model, batch=batch: (milliseconds(lambda: scored(model, batch)), peak()),
                )
                if isinstance(measured, tuple):
                    ms = measured[0]
                    cells = [f"{ms:.1f}", f"{1000 * pairs / ms:.2f}"]
                    cells += [f"{1000 * step_flops(settings, batch) / ms / rate:.2f}", measured[1]]
            lines.add(layout, name, fused, *cells)
        del model
        attempt(lambda: None)


def public_row() -> None:
    """Qwen2.5-7B's shape beside public figures of prefix sharing."""
    title = "Qwen2.5-7B's shape, one pair, answers of 1024 tokens, gradient checkpointing, forward and backward in ms"
    print(f"\n{title}.\nThe A800's figures are public ones, of another implementation on one A800; not measured here.")
    lines = Lines("", "prefix", "unshared", "shared", "ratio", "A800 unshared", "A800 shared", "A800 ratio", "peak GB")
    settings = qwen_7b()
    model = attempt(model_of, settings, HALF, True)
    if isinstance(model, str):
        lines.add(*[model] * 8)
        return
    model.train().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for prefix, (unshared, shared) in PUBLIC_A800.items():
        sizes = (prefix, 1024) if CUDA else (prefix // 64, 16)
        rows, step_ms = random_rows(1, *sizes, settings.vocab_size), []
        for layout in ("padded", "packed"):
            batch = collated(layout, rows)
            step_ms.append(attempt(lambda batch=batch: milliseconds(lambda: scored(model, batch), times=3, warm=1)))
            memory = peak()
        times = [x if isinstance(x, str) else f"{x:.0f}" for x in step_ms]
        ratio = "" if any(isinstance(x, str) for x in step_ms) else f"{step_ms[0] / step_ms[1]:.2f}"
        lines.add(sizes[0], *times, ratio, unshared, shared, f"{unshared / shared:.2f}", memory)


# ---------------------------------------------------------------------------------------------------------- against TRL


def against_trl(billions: int, vocabulary: int) -> None:
    """bench_dpo.py on a folder with a random model and a word-level tokenizer. Float32 weights, as full fine-tuning
    without DeepSpeed needs them; on a GPU under bfloat16 autocast."""
    words = sorted({w for row in bench_dpo.workloads.chat_rows(4, 200, 1, 200) for m in row["chosen"]
                    for w in m["content"].split()})  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model_of(config(billions, vocabulary), torch.float32).save_pretrained(folder)
        tokenizer_of(words).save_pretrained(folder)
        attempt(lambda: None)
        options = {"model": folder, "dtype": "float32", "bf16": CUDA, "steps": 5 if CUDA else 1}
        options["threads"] = torch.get_num_threads()
        tokens, pairs = (2048, 2) if CUDA else (64, 2)
        rows = bench_dpo.workloads.chat_rows(pairs * 8, history=tokens // 2, turns=2, answer=tokens // 4)
        results = []
        for side in ("trl", "ours"):
            try:
                results.append(bench_dpo.compare("half shared", rows, pairs, options, sides=(side,)))
            except Exception as error:  # the side's process has ended, most likely out of memory
                print(f"{side}: out of memory, or {type(error).__name__}: its message is above", flush=True)
        if len(results) == 2:
            comparison = {**results[1], **results[0], "seconds": {**results[0]["seconds"], **results[1]["seconds"]}}
            bench_dpo.show([comparison], [bench_dpo.matmul_rate(options["threads"], "bfloat16" if CUDA else "float32")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=int, choices=list(SIZES))
    parser.add_argument("--minutes", type=float, default=7)
    args = parser.parse_args()
    clock, free = Clock(args.minutes), torch.cuda.mem_get_info()[0] if CUDA else 0
    vocabulary = 128256 if CUDA else 512
    billions = largest(free, vocabulary) if args.billions is None else args.billions
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}, {billions}B weights")
    rate = bench_dpo.matmul_rate(torch.get_num_threads(), "bfloat16" if CUDA else "float32")
    parts = {  # seconds of each at most on an 80 GB card, estimated: none has run there yet
        "numbers": (60, numbers, (min(billions, 1), vocabulary)),
        "LM head": (20, head_speed, ()),
        "attention": (20, attention_speed, ()),
        "steps": (60, step_speed, (billions, vocabulary, rate)),
        "Qwen2.5-7B's shape": (90, public_row, ()),
        "against TRL": (150, against_trl, (min(billions, 1), vocabulary)),
    }
    for name, (seconds, part, arguments) in parts.items():
        if clock.allows(name, seconds):
            part(*arguments)


if __name__ == "__main__":
    main()
