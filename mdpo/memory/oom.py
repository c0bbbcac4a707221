"""What a user reads when memory runs out: the batch, where memory went, and the cheapest next changes, as commands."""

import os
import resource
import shlex
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mdpo.console import first_line
from mdpo.errors import UserError
from mdpo.memory.breakdown import GB, MemoryPlan
from mdpo.memory.estimate import plan_memory
from mdpo.memory.sharding import Sharding
from mdpo.ranks import row_ranks
from mdpo.types import PairBatch

ZERO3, OFFLOAD = "training_configs/zero3_for_dpo.yaml", "training_configs/zero3_offload_for_dpo.yaml"
PARALLEL = "training_configs/zero3_sequence_parallel.yaml"
EXPANDABLE = "expandable_segments:True"
FRAGMENTED = 0.05  # of a GPU's memory
# What allocators say: CUDA's and its libraries', the CPU's, the operating system's.
SAID = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "nccl error 'out of memory'",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, says that memory ran out."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError | OSError) and any(phrase in str(error).lower() for phrase in SAID):
            return True
        error = error.__cause__
    return False


@dataclass
class MemorySnapshot:
    """Memory of this process as it is now, in bytes. `limit` is what it may have: the GPU's, or the smallest of the
    process's, its cgroup's and the machine's. `reserved`: what PyTorch has taken of a GPU, in use or not."""

    used: int
    limit: int
    peak: int
    where: str
    reserved: int | None = None

    @classmethod
    def now(cls, device: torch.device | str = "cpu") -> "MemorySnapshot":
        device = torch.device(device)
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            used, allocated_peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
            return cls(used, total, allocated_peak, "GPU", torch.cuda.memory_reserved(device))
        limit, where, field = min(_cpu_limits())
        status = Path("/proc/self/status").read_text()  # psutil tells no peaks on Linux
        now, peak = (int(status.partition(f"\n{name}:")[2].split()[0]) * 1024 for name in field)
        return cls(now, limit, peak, where)

    @property
    def fragments(self) -> int:
        """Bytes that PyTorch has reserved and nothing uses: blocks too small for what was requested."""
        return 0 if self.reserved is None else self.reserved - self.used

    def __str__(self) -> str:
        words = (
            f"{self.used / GB:.2f} GB in use, at most {self.peak / GB:.2f} GB before, of {self.limit / GB:.2f} GB "
            f"({self.where})"
        )
        if self.reserved is None:
            return words
        return f"{words}; {self.reserved / GB:.2f} GB reserved, of which {self.fragments / GB:.2f} GB lie in fragments"


def _cpu_limits() -> list[tuple[int, str, tuple[str, str]]]:
    """(bytes, what sets the limit, fields of /proc/self/status that count towards it: now and at most)."""
    resident, addresses = ("VmRSS", "VmHWM"), ("VmSize", "VmPeak")
    limits = [(psutil.virtual_memory().total, "this machine", resident)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        limits.append((limit, "addresses of this process, `ulimit -v`", addresses))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append((int(Path(path).read_text()), "this container", resident))
        except (OSError, ValueError):  # no cgroup of that version, or "max"
            continue
    return limits


@contextmanager
def explained(recipe, trainer: Callable[[], object], argv: list[str]):
    """Turns an error within it that says that memory ran out into a UserError that explains it. `trainer()` is the one
    made meanwhile, or None."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        current, args = trainer(), recipe.training
        batch = getattr(current, "batch_in_hand", None)
        rows = getattr(current, "train_dataset" if current is None or current.model.training else "eval_dataset", None)
        keys = rows["key"] if "key" in (getattr(rows, "column_names", None) or ()) else None
        sharding = Sharding.running(current.accelerator) if current is not None else _before(args)
        message = explain(error, batch, recipe, sharding, args.device, keys, argv or None)
        raise UserError(message, "memory") from error


def _before(args) -> Sharding:
    """The run's sharding, as far as it is known before there is a trainer."""
    stage = 0 if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage
    return Sharding(stage, args.world_size, cpu=args.device.type == "cpu", row_ranks=row_ranks())


def explain(error, batch, recipe, sharding: Sharding, device, keys=None, argv: list[str] | None = None) -> str:
    """`report` with memory as it is now, and as planned where it can be."""
    snapshot = MemorySnapshot.now(device)
    traceback.clear_frames(error.__traceback__)  # they keep the step's tensors alive, and a plan needs room
    try:
        plan = plan_memory(recipe, sharding)
    except Exception as reason:  # an explanation must not fail where memory is short: it says less
        return report(error, batch, recipe, sharding, snapshot, None, keys, argv, first_line(reason))
    return report(error, batch, recipe, sharding, snapshot, plan, keys, argv)


def report(error, batch, recipe, sharding, seen, plan=None, keys=None, argv=None, not_planned=None) -> str:
    """The whole message. `batch` is a collator's, or None; `keys` the `key` column of its dataset, which its `row`
    numbers index; `plan` a MemoryPlan, or None for the reason `not_planned`; `argv` what follows run_dpo.py."""
    lines = [f"Out of memory: {first_line(error, innermost=False)}", f"  seen: {seen}"]
    if batch is not None:
        lines.append(f"  batch: {describe_batch(batch, keys)}")
    if plan is not None:
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in plan.parts.items())
        lines.append(f"  planned for the longest pairs: {plan.total / GB:.2f} GB = {parts}")
    if not_planned:
        lines.append(f"  not planned: {not_planned}")
    options = next_changes(recipe, sharding, plan, seen.limit / GB, argv or [str(recipe.path)])
    if seen.fragments > FRAGMENTED * seen.limit and EXPANDABLE not in _allocator():
        options.insert(0, f"PYTORCH_ALLOC_CONF={EXPANDABLE} before the command: fewer fragments, at no cost.")
    return "\n".join([*lines, "What to try next, cheapest first:", *(f"  {n}. {o}" for n, o in enumerate(options, 1))])


def _allocator() -> str:
    """How the user has set PyTorch's allocator of GPU memory; the second name is the older one."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""


def describe_batch(batch: PairBatch, keys: list[str] | None = None) -> str:
    """Pairs, tokens, and where the longest pair is in the data."""
    lengths, pairs = batch.pair_lengths, batch.n_pairs
    words = f"{pairs} pair{'s' if pairs > 1 else ''}, {batch.n_tokens} tokens"
    if batch.is_packed:
        words += f" ({batch.input_ids.numel()} computed, shared ones once)"
    else:
        words += f" ({batch.input_ids.numel()} computed, padding included)"
    longest = max(range(pairs), key=lambda i: lengths[i])
    row = -1 if batch.row is None else int(batch.row[longest])
    name = keys[row] if keys is not None and 0 <= row < len(keys) else f"row {row}" if row >= 0 else "unknown"
    return f"{words}; the longest pair has {lengths[longest]}: {name}"


def next_changes(recipe, sharding: Sharding, plan: MemoryPlan | None, gb: float, argv: list[str]) -> list[str]:
    """What to try, cheapest first; what is on already or cannot apply is left out."""
    args, model, changes = recipe.training, recipe.model, []
    separate = not model.use_peft or args.ref_model_name_or_path  # else the policy without its adapter is the reference
    if separate and not args.precompute_ref_log_probs and not args.sync_ref_model:
        changes.append("--precompute_ref_log_probs=true: the reference scores all pairs first, then is freed.")
    if not args.gradient_checkpointing:
        changes.append("--gradient_checkpointing=true: activations are recomputed in backward, not kept.")
    pairs, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if pairs > 1:
        fewer = next(n for n in range(pairs // 2, 0, -1) if pairs * steps % n == 0)
        more = pairs * steps // fewer
        changes.append(
            f"--per_device_train_batch_size={fewer} --gradient_accumulation_steps={more}: the same global batch, "
            f"{fewer} × {more} × {(n := sharding.processes // sharding.row_ranks)} = {pairs * steps * n} pairs."
        )
    # bitsandbytes' weights cannot be sharded; and in these files no rank shares its rows.
    sharded = not sharding.cpu and not model.load_in_4bit and sharding.row_ranks == 1
    command = f"accelerate launch --config_file {{}} --num_processes {sharding.processes} run_dpo.py {shlex.join(argv)}"
    if sharding.secondary > 1:
        size = plan.parts.get("secondary weights") if plan else None
        taken = f", which takes {size / GB:.2f} GB a GPU," if size else ""
        changes.append(
            f"zero_hpz_partition_size{taken} left out of the deepspeed_config_file: weights are gathered from all."
        )
    if sharded and sharding.stage < 3 and sharding.processes > 1:
        changes.append(f"{command.format(ZERO3)}: each GPU holds its share of the weights.")
    if args.max_length and (length := _shorter(args.max_length, plan, gb)):
        changes.append(f"--max_length={length}: longer pairs are dropped, and counted.")
    if sharded and pairs == 1 and not sharding.offload_param and (n := sharding.processes) > 1:
        more = f" --gradient_accumulation_steps={steps * n}"
        changes.append(f"{command.format(PARALLEL)}{more}, with sp_size {n}: the GPUs share each pair's tokens.")
    if sharded and not (sharding.offload_optimizer and sharding.offload_param):
        changes.append(f"{command.format(OFFLOAD)}: optimizer and weights wait in CPU memory, which is slow.")
    return changes or ["LoRA (--use_peft=true), a smaller model, or more memory: nothing cheaper is left."]


def _shorter(length: int, plan: MemoryPlan | None, gb: float) -> int | None:
    """A max_length below `length`: the longest that is planned to fit, or, where there is no plan or by it the run
    fits, three quarters. None where no length fits."""
    fits = plan.longest(gb) if plan else length
    return None if fits is None else fits if fits < length else max(2, length * 3 // 4)
