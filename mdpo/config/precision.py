"""The dtypes that a recipe's precision means on this machine."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from mdpo.config.parsing import WORDS
from mdpo.errors import UserError
from mdpo.forward.varlen import flash_attn

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
HALF = tuple(MIXED.values())


def cpu_only(values: dict[str, Any]) -> bool:
    """Whether the run stays on the CPU: by the recipe or the launcher, or because there is nothing else."""
    asked = values.get("use_cpu") or WORDS.get(os.environ.get("ACCELERATE_USE_CPU", "").lower())
    return bool(asked) or not torch.accelerator.is_available()


def cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 units; without them such products are about 100 times slower than float32 ones.
    MDPO_CPU_BF16=1 keeps half precision all the same: a few steps on a CPU, to see what a GPU will compute."""
    if os.environ.get("MDPO_CPU_BF16") == "1":
        return True
    units = torch.cpu.get_capabilities()
    return any(units.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one: of ARM


def fit_to_machine(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The values with what this machine lacks replaced, one line in `notes` for each replacement."""
    on_cpu = cpu_only(values)
    values, note = precision_note(values, on_cpu)
    notes += [note] if note else []
    if on_cpu:
        # Else TrainingArguments refuses bf16, and under a CPU ZeRO launch every rank takes itself for the only one.
        values["use_cpu"] = True
    if values.get("attn_implementation") == "flash_attention_2" and (on_cpu or flash_attn()[0] is None):
        why = "flash-attn needs a GPU" if on_cpu else f"{flash_attn()[1]} (optional, see docs/clusters.md)"
        values["attn_implementation"] = None  # not sdpa: transformers refuses it for Gemma-2
        notes.append(f"attn_implementation: the model's own choice in place of flash_attention_2: {why}.")
    return values


def precision_note(values: dict[str, Any], cpu_only: bool) -> tuple[dict[str, Any], str | None]:
    """(values, note): float32 in place of half precision on a CPU without bfloat16 units, else the values unchanged.

    Also sets ACCELERATE_MIXED_PRECISION=no there, since the launcher's own setting would win over bf16: false.
    """
    if not cpu_only or cpu_has_bf16():
        return dict(values), None
    halves = ["fp16"] if values.get("fp16") else []
    halves += ["bf16"] if values.get("bf16") is not False else []  # DPOConfig's default is true
    halves += ["dtype"] if values.get("dtype") in ("auto", "bfloat16", "float16") else []
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    fallen = values | dict.fromkeys(halves, False) | ({"dtype": "float32"} if "dtype" in halves else {})
    names = ", ".join(sorted(halves) + ["the launcher's mixed_precision"] * launcher)
    note = f"float32 in place of half precision ({names}): this CPU has no bfloat16 units." if names else None
    return fallen, note


# ------------------------------------------------------------------------------------------------ dtypes of a run


@dataclass(frozen=True)
class Precision:
    """dtypes of a run. `policy`: of the weights that compute, the reference's too; `autocast`: None where products have
    that dtype; `trained`: an adapter's, or the policy's, and its gradients'; `master`: of the copy that the optimizer
    updates in place of `trained`, None without one."""

    policy: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None
    master: torch.dtype | None

    @classmethod
    def of(cls, args, loaded: torch.dtype, adapter: bool) -> "Precision":
        """Of a policy that is loaded in `loaded`, with an adapter on it or none."""
        engine = engine_dtype(args)
        if args.deepspeed_plugin is not None:
            policy = engine or loaded
            trained = engine or (torch.float32 if adapter and args.deepspeed_plugin.zero_stage != 3 else loaded)
            return cls(policy, trained, None, torch.float32)
        trained = torch.float32 if adapter else loaded
        return cls(loaded, trained, MIXED.get(args.mixed_precision), None)

    def __str__(self) -> str:
        cast = f", computing in {_name(self.autocast)}" if self.autocast not in (None, self.policy) else ""
        apart = f", adapter {_name(self.trained)}" if self.trained != self.policy else ""
        master = f"{_name(self.master)} (DeepSpeed's)" if self.master else f"none, {_name(self.trained)} is updated"
        return (
            f"policy {_name(self.policy)}{cast}{apart}, reference {_name(self.policy)}{cast}, gradients "
            f"{_name(self.trained)}, master weights {master}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def engine_dtype(args) -> torch.dtype | None:
    """The dtype that DeepSpeed casts every floating weight to; None where it casts none, or is not there."""
    return None if args.deepspeed_plugin is None else MIXED.get(args.mixed_precision)


def cast_weights(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Casts as DeepSpeed's engine casts a policy: every floating weight to `dtype`, no buffers (RoPE's frequencies).
    None changes nothing."""
    for weight in model.parameters() if dtype is not None else ():
        if weight.is_floating_point() and weight.dtype != dtype and not hasattr(weight, "ds_id"):
            weight.data = weight.data.to(dtype)


def without_master(args, dtype: torch.dtype, count: str = "the") -> str | None:
    """Why weights of `dtype` must not be trained under `args`, with advice; None where they may. A weight of 8 bits
    precision takes steps of 1/256 of itself and no smaller ones: those of DPO's learning rates round to zero."""
    if dtype not in HALF or (args.deepspeed_plugin is not None and _keeps_master(args)):
        return None
    return (
        f"dtype: {count} weights would be trained in {_name(dtype)} without a float32 master copy, and steps of "
        f"learning_rate {args.learning_rate} round away. Set dtype: float32 with bf16: true, which computes in "
        "bfloat16; or use_peft: true, whose adapter is float32; or take DeepSpeed, on one GPU too: accelerate launch "
        "--config_file training_configs/zero2_for_dpo.yaml --num_processes 1."
    )


def _keeps_master(args) -> bool:
    """Whether DeepSpeed keeps float32 weights: not where its configuration file says that half precision will do."""
    engine = getattr(args.deepspeed_plugin, "deepspeed_config", None) or {}
    return not any(engine.get(key, {}).get(f"{key}_master_weights_and_grads") for key in MIXED)


def in_float32(model: torch.nn.Module) -> None:
    """Casts trained weights of a PEFT model whose base is in half precision: PEFT leaves `modules_to_save` alone."""
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in HALF:
            weight.data = weight.data.float()


def refuse_two_precisions(recipe: dict[str, Any], args) -> None:
    """Raises UserError where recipe and accelerate file name two precisions, one of which would win silently, and
    where DeepSpeed is to compute in float32 with half-precision weights. `recipe` has the keys that were set."""
    launched, dtype = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower(), recipe.get("dtype")
    off = recipe.get(launched) is False
    if launched != "no" and (off or launched != args.mixed_precision):
        own = f"{launched}: false" if off else f"{args.mixed_precision}: true, which is the default unless fp16 is true"
        raise UserError(
            f"mixed_precision: {launched} in the accelerate file, but the recipe has {own}. Let both say the same "
            "(accelerate launch --mixed_precision no|bf16|fp16 wins over the file)."
        )
    if args.deepspeed_plugin is not None and args.mixed_precision == "no" and dtype in ("bfloat16", "float16"):
        raise UserError(f"dtype: {dtype} under DeepSpeed needs {'bf16' if dtype == 'bfloat16' else 'fp16'}: true.")
