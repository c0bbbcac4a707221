"""Memory of a run before it starts, by part, for one GPU (or CPU process): will it fit, and up to which max_length?

What a step computes is counted by mdpo/memory/fake_step.py. What DeepSpeed 0.19.8 keeps beside it is written down here
from its source, with the sizes of mdpo/memory/zero.py. GB are 1e9 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mdpo.memory.fake_step import FakeModel
from mdpo.memory.four_bit import four_bit, four_bit_weights
from mdpo.memory.sharding import Sharding

GB = 1e9
STEP, OPTIMIZER, EVALUATION = "a training step", "the optimizer's step", "evaluation"
SHOWN = ("weights", "secondary weights", "gradients", "optimizer states", "reference", "gathered weights")
SHOWN += ("communication", "activations", "LM head", "libraries (assumed)")
LIBRARIES = {"GPU": 1.0 * GB, "CPU": 0.8 * GB}  # assumed: CUDA context, cuBLAS, NCCL; Python and its libraries
TIGHT = 0.05  # of the memory: less to spare than fragmentation often takes
RATES = (1, 5)  # GB/s that a disk may write
ROUND = 64  # tokens: how exactly a long max_length is searched for


@dataclass
class MemoryPlan:
    """`phases`: bytes by part, of STEP, OPTIMIZER and, where there are held-out pairs, EVALUATION. `cpu`: bytes that
    offloading keeps on each machine; `at` gives the plan of another max_length, `limit` is the longest that the model
    knows. `checkpoint`: bytes on disk of one, of which `kept` are there at a time."""

    phases: dict[str, dict[str, float]]
    length: int
    cpu: float
    limit: int
    at: Callable[[int], "MemoryPlan"]
    checkpoint: float = 0.0
    kept: int | None = None

    @property
    def phase(self) -> str:
        """The one that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part while most is needed."""
        sizes = self.phases[self.phase]
        return {name: sizes[name] for name in SHOWN if sizes.get(name)}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def fits(self, gb: float) -> bool:
        return self.total <= gb * GB

    def longest(self, gb: float) -> int | None:
        """The longest max_length that fits into `gb`, at most `limit`, to 4 tokens, and from 1024 on to ROUND; None
        where none does."""
        low, high = (2, self.at(2).total), (self.limit, self.at(self.limit).total)
        if high[1] <= gb * GB:
            return self.limit
        if low[1] > gb * GB:
            return None
        for n in range(60):  # nearly a straight line; every third try halves, in case it is not
            step = ROUND if low[0] >= 1024 else 4
            if high[0] - low[0] <= step:
                break
            share = 0.5 if n % 3 == 2 else (gb * GB - low[1]) / (high[1] - low[1])
            middle = min(max(low[0] + int(share * (high[0] - low[0])), low[0] + step // 2), high[0] - step // 2)
            tried = (middle, self.at(middle).total)
            low, high = (tried, high) if tried[1] <= gb * GB else (low, tried)
        return low[0] // ROUND * ROUND if low[0] >= 1024 else low[0]

    def verdict(self, gb: float) -> str:
        """Whether it fits, and the longest max_length that does, in words."""
        longest, spare = self.longest(gb), gb - self.total / GB
        if longest is None:
            return (
                f"DOES NOT FIT into {gb:g} GB, and no max_length would: {self.at(2).total / GB:.1f} GB without pairs."
            )
        if spare < 0:
            return f"DOES NOT FIT into {gb:g} GB: {-spare:.1f} GB too much. --max_length={longest} would fit."
        tight = " It is tight: fragmented memory may take the rest." if spare < TIGHT * gb else ""
        known = ", all that the model knows" if longest == self.limit else ""
        return f"FITS into {gb:g} GB, {spare:.1f} GB to spare.{tight} Up to --max_length={longest} would fit{known}."

    def on_disk(self) -> str:
        """What a checkpoint takes, in words. A new one is written beside those that `kept` allows."""
        gb = self.checkpoint / GB
        seconds = ", ".join(f"{gb / rate:.1f} s at {rate} GB/s" for rate in RATES)
        most = f"; with save_total_limit {self.kept} at most {(self.kept + 1) * gb:.1f} GB at once" if self.kept else ""
        return f"A checkpoint: {gb:.1f} GB on disk, {seconds}{most}."

    def markdown(self) -> str:
        """A table for a README."""
        rows = [f"| {name} | {size / GB:.1f} |" for name, size in [*self.parts.items(), ("**together**", self.total)]]
        return "\n".join([f"| {self.phase}, max_length {self.length} | GB |", "|---|---|", *rows])


class MemoryModel:
    """One process's memory for a model under a sharding, for any max_length. `nested` is None for weights that are not
    quantized, else whether four-bit weights have nested scales."""

    def __init__(self, skeleton: FakeModel, sharding: Sharding, args, evaluates: bool, nested: bool | None = None):
        self.skeleton, self.sharding, self.args, self.evaluates = skeleton, sharding, args, evaluates
        weights = list(skeleton.policy.parameters())
        trained = [p for p in weights if p.requires_grad]
        packed = set(four_bit_weights(skeleton.policy)) if nested is not None else set()
        self.weights = sum(four_bit(p, nested) if p in packed else p.nbytes for p in weights)
        self.small = sum(p.nbytes for p in weights if p.numel() < sharding.sizes.whole)
        self.width = max(p.element_size() for p in weights)  # bytes of a gathered element
        self.largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in skeleton.policy.modules())
        self.count, self.trained = sum(p.numel() for p in weights), sum(p.numel() for p in trained)
        self.saved = sum(p.nbytes for p in trained)  # a frozen base is in no checkpoint
        self.gradient = max(p.element_size() for p in trained)  # bytes of an element
        self.largest_trained = max(p.numel() for p in trained)
        self.reference = sum(p.nbytes for p in skeleton.reference.parameters()) if skeleton.reference else 0
        self.unpacked = max((p.nbytes for p in packed), default=0)  # one matrix at a time
        self._plans: dict[int, MemoryPlan] = {}

    def plan(self, length: int) -> MemoryPlan:
        if length not in self._plans:
            phases = {STEP: self._step(length), OPTIMIZER: self._optimizer_step()}
            phases |= {EVALUATION: self._evaluation(length)} if self.evaluates else {}
            model_limit = getattr(self.skeleton.config, "max_position_embeddings", None) or 1 << 17
            longest, kept = max(model_limit, length), self.args.save_total_limit
            self._plans[length] = MemoryPlan(
                phases, length, self._in_cpu(), longest, self.plan, self._checkpoint(), kept
            )
        return self._plans[length]

    def _step(self, length: int) -> dict[str, float]:
        keeps_gradients, accumulates = not self.sharding.stage, self.args.gradient_accumulation_steps > 1
        peak = self.skeleton.training(self.args.per_device_train_batch_size, length, keeps_gradients, accumulates)
        shard, processes = self.trained * self.gradient, self.sharding.processes
        gradients = {
            # Kept for this process's share, and once more while a further micro-batch adds to it; offloading copies
            # each gradient to the CPU through a buffer as large as the largest one.
            2: self.largest_trained * self.gradient
            if self.sharding.offload_optimizer
            else shard / processes * (1 + accumulates),
            3: 0 if self.sharding.offload_optimizer else shard / processes,
        }
        parts = self._standing() | {"gradients": gradients.get(self.sharding.stage, 0) + peak["gradients"]}
        if self.sharding.stage:
            parts["communication"] = self._buckets() * self.gradient
        return parts | {"activations": peak["activations"] + self.unpacked, "LM head": peak["LM head"]}

    def _buckets(self) -> int:
        """Elements: a bucket, under ZeRO-2 another one that fills while the first is sent, and the flat copy that is
        sent. On a CPU only what is written to takes memory."""
        bucket = self.sharding.sizes.bucket
        both = bucket * (2 if self.sharding.stage == 2 and self.sharding.overlap else 1)
        return (min(both, self.trained) if self.sharding.cpu else both) + min(bucket, self.trained)

    def _checkpoint(self) -> float:
        """Bytes of all ranks' files: the weights for users; under ZeRO-2 the same once more, in DeepSpeed's own file;
        its float32 weights and AdamW's moments, or without DeepSpeed the moments in the weights' dtype; and a reference
        that moves. The tokenizer and what takes a few kB are left out."""
        if self.args.save_only_model:
            return self.saved
        states = self.saved * (self.sharding.stage == 2) + 12 * self.trained if self.sharding.stage else 2 * self.saved
        return self.saved + states + (self.reference if self.args.sync_ref_model else 0)

    def _optimizer_step(self) -> dict[str, float]:
        """Gradients of ZeRO-2: the share, its flat copy and, where that is not float32, one that is. ZeRO-3 copies a
        sub-group at a time. Of AdamW that is not fused: what it divides by, for all weights on a GPU, for one on a
        CPU."""
        n, shard = self.sharding.processes, self.trained / self.sharding.processes
        stage, offload = self.sharding.stage, self.sharding.offload_optimizer
        extra = 0
        if self.args.optim == "adamw_torch" and not offload:
            extra = self.largest_trained if self.sharding.cpu and not stage else self.trained
            extra *= 4 / n if stage else self.gradient
        flat = min(self.trained, self.sharding.sizes.sub_group) / n
        gradients = {
            0: self.trained * self.gradient + extra,
            2: self.largest_trained * self.gradient if offload else shard * 8 + extra,
            3: 0 if offload else shard * self.gradient + flat * (self.gradient + 4) + extra,
        }
        parts = self._standing() | {"gradients": gradients[stage]}
        return parts | ({"communication": self.sharding.sizes.bucket * self.gradient} if stage == 3 else {})

    def _evaluation(self, length: int) -> dict[str, float]:
        peak = self.skeleton.evaluation(self.args.per_device_eval_batch_size, length)
        parts = self._standing()
        if self.sharding.stage == 3:
            parts["communication"] = self.sharding.sizes.bucket * self.gradient
            parts["gradients"] = 0 if self.sharding.offload_optimizer else self._shard(self.trained * self.gradient)
        return parts | {"activations": peak["activations"] + self.unpacked, "LM head": peak["LM head"]}

    def _standing(self) -> dict[str, float]:
        """What is in memory all the time."""
        sharding, stage = self.sharding, self.sharding.stage
        parts = {"weights": self._shard(self.weights) if stage == 3 else self.weights, "gradients": 0.0}
        parts["weights"] *= not sharding.offload_param
        parts["optimizer states"] = 0 if sharding.offload_optimizer else self._states()
        parts["reference"] = (
            self._shard(self.reference) * (not sharding.offload_param) if stage == 3 else self.reference
        )
        if stage == 0 and sharding.processes > 1:
            parts["communication"] = self.trained * self.gradient  # DDP's buckets, beside the gradients
        if stage == 3:
            live = min(self.count, sharding.sizes.gathered + self.largest) * self.width
            parts["gathered weights"] = max(live, self.small)
            parts["secondary weights"] = self._secondary() * (not sharding.offload_param)
        return parts | {"libraries (assumed)": LIBRARIES["CPU" if sharding.cpu else "GPU"]}

    def _states(self) -> float:
        """Bytes of AdamW's two moments, and of the float32 copy of the weights that DeepSpeed trains: always under
        ZeRO-2, in half precision only under ZeRO-3."""
        if not self.sharding.stage:
            return 2 * self.trained * self.gradient
        master = self.sharding.stage == 2 or self.gradient < 4
        return self._shard(self.trained * (8 + 4 * master))

    def _shard(self, size: float) -> float:
        return size / self.sharding.processes

    def _secondary(self) -> float:
        """Bytes of ZeRO++'s further shares of all weights, one in each group of neighboring ranks; the reference's
        stay, the policy's come with a step's first forward pass and go with the optimizer's step."""
        ranks = min(self.sharding.secondary, self.sharding.processes)
        return (self.weights + self.reference) / ranks if ranks > 1 else 0.0

    def _in_cpu(self) -> float:
        """Bytes on each machine: of the optimizer, float32 weights, gradients and both moments, gradients as they come,
        and under ZeRO-2 a buffer of the new weights and one for the largest gradient; of offloaded weights, all, with
        ZeRO++ once more for each group of ranks."""
        sharding, size = self.sharding, 0.0
        if sharding.offload_optimizer:
            size += self._shard(self.trained * (16 + self.gradient))
            accumulates = self.args.gradient_accumulation_steps > 1
            size += (
                (self._shard(self.trained * accumulates) + self.largest_trained) * self.gradient * (sharding.stage == 2)
            )
        if sharding.offload_param:
            size += self._shard(self.weights + self.reference) + self._secondary()
        return size * sharding.processes / sharding.machines
