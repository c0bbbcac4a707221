"""What a recipe's precision comes to on this machine."""

import os
from pathlib import Path
from typing import Any

import torch

from mdpo.settings import WORDS
from mdpo.varlen import flash_attn


def cpu_only(values: dict[str, Any]) -> bool:
    """Whether the run stays on the CPU: asked for in the recipe or by the launcher, or nothing else is there."""
    asked = values.get("use_cpu") or WORDS.get(os.environ.get("ACCELERATE_USE_CPU", "").lower())
    return bool(asked) or not torch.accelerator.is_available()


def cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 units; without them such products are about 100 times slower than float32 ones.
    MDPO_CPU_BF16=1 keeps half precision all the same: a few steps on a CPU, to see what a GPU will compute."""
    if os.environ.get("MDPO_CPU_BF16") == "1":
        return True
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def fit_to_machine(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The values with what this machine lacks replaced, one line in `notes` for each replacement."""
    on_cpu = cpu_only(values)
    values, note = precision_note(values, on_cpu)
    notes += [note] if note else []
    if on_cpu:
        # Else TrainingArguments refuses bf16, and under a CPU ZeRO launch every rank takes itself for the only one.
        values["use_cpu"] = True
    if values.get("attn_implementation") == "flash_attention_2" and (on_cpu or flash_attn()[0] is None):
        why = "flash-attn needs a GPU" if on_cpu else f"{flash_attn()[1]} (pip install '.[flash]', see README)"
        values["attn_implementation"] = None  # not sdpa: transformers refuses it for Gemma-2
        notes.append(f"attn_implementation: the model's own choice in place of flash_attention_2: {why}.")
    return values


def precision_note(values: dict[str, Any], cpu_only: bool) -> tuple[dict[str, Any], str | None]:
    """(values, note): float32 in place of half precision on a CPU without bfloat16 units, else the values unchanged.

    Also sets ACCELERATE_MIXED_PRECISION=no there, since the launcher's own setting would win over bf16: false.
    """
    if not cpu_only or cpu_has_bf16():
        return dict(values), None
    halves = [key for key in ("fp16", "bf16_full_eval", "fp16_full_eval") if values.get(key)]
    halves += ["bf16"] if values.get("bf16") is not False else []  # DPOConfig's default is true
    halves += ["dtype"] if values.get("dtype") in ("auto", "bfloat16", "float16") else []
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    fallen = values | dict.fromkeys(halves, False) | ({"dtype": "float32"} if "dtype" in halves else {})
    names = ", ".join(sorted(halves) + ["the launcher's mixed_precision"] * launcher)
    note = f"float32 in place of half precision ({names}): this CPU has no bfloat16 units." if names else None
    return fallen, note
