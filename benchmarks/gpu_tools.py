"""Tools of gpu_check.py: models and pairs by size, a time budget, tables, and which sizes fit a card's memory."""

import gc
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.forward.compiled_ops import fuse
from mdpo.forward.token_logps import enable_scoring
from mdpo.types import PairBatch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
HALF = torch.bfloat16 if CUDA else torch.float32
# billions of weights: hidden, intermediate, layers, heads, key heads
SIZES = {8: (4096, 14336, 32, 32, 8), 3: (3072, 8192, 28, 24, 8), 1: (2048, 8192, 16, 32, 8), 0: (256, 512, 2, 4, 2)}
MARGIN = 0.8  # of the free memory, for what the formula leaves out


class Lines:
    """A table, printed line by line."""

    def __init__(self, title: str, *columns: str):
        self.widths = [max(len(column), 16) for column in columns]
        print(f"\n{title}", flush=True)
        self.add(*columns)

    def add(self, *cells) -> None:
        texts = [str(cell).ljust(width) for cell, width in zip(cells, self.widths, strict=True)]
        print(f"│ {' │ '.join(texts)} │", flush=True)


class Clock:
    """A time budget. A part that would exceed it is skipped by name."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def allows(self, name: str, seconds: float) -> bool:
        if self.end - time.monotonic() >= seconds:
            return True
        print(f"not begun, as its time would be over: {name}", flush=True)
        return False


def attempt(function, *args):
    """The function's result, or "out of memory" where it raises OutOfMemoryError."""
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def config(billions: int, vocabulary: int) -> LlamaConfig:
    hidden, intermediate, layers, heads, key_heads = SIZES[billions]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "max_position_embeddings": 8192}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(vocab_size=vocabulary, initializer_range=0.06, **sizes, **special)


def qwen_7b() -> Qwen2Config:
    """Qwen2.5-7B's shape; on a CPU a hundredth of it."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    if not CUDA:
        sizes = {"hidden_size": 224, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    return Qwen2Config(num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=8192, **sizes)


def weights_of(settings) -> tuple[int, int]:
    """Numbers of weights: (in the layers, in embeddings and LM head)."""
    h, i, heads = settings.hidden_size, settings.intermediate_size, settings.num_attention_heads
    keys = h * settings.num_key_value_heads // heads
    return settings.num_hidden_layers * (2 * h * h + 2 * h * keys + 3 * h * i), 2 * settings.vocab_size * h


def needed(settings, tokens: int) -> int:
    """Bytes of a forward and a backward pass in half precision: weights and gradients, activations (flash
    attention, nothing recomputed: 17 numbers a token and hidden unit, 3 of its MLP), and the LM head's chunk."""
    activations = settings.num_hidden_layers * tokens * 2 * (17 * settings.hidden_size + 3 * settings.intermediate_size)
    return 4 * sum(weights_of(settings)) + activations + (2 << 30) + 4 * settings.vocab_size * settings.hidden_size


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
            "row": i,
        })  # fmt: skip
    return rows


def model_of(settings, dtype: torch.dtype, fused: bool = False):
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa")
    enable_scoring(model, fused and fuse(model, DEVICE)[0])
    return model


def collated(layout: str, rows: list[dict]) -> PairBatch:
    return (PackedCollator() if layout == "packed" else PairCollator(0))(rows).to(DEVICE)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(function, times: int = 5, warm: int = 2) -> float:
    durations = []
    for _ in range(times + warm):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        durations.append(1000 * (time.perf_counter() - start))
    return statistics.median(durations[warm:])


def peak() -> str:
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if CUDA else ""


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


def largest(free: float, vocabulary: int) -> int:
    """The largest of SIZES, in billions, whose step on a padded batch of 4 × 2 × 2048 tokens fits in `free` bytes."""
    return next(size for size in SIZES if not size or needed(config(size, vocabulary), 4 * 2 * 2048) <= MARGIN * free)
