"""What a training step keeps in memory, from the model's configuration alone, without weights or a GPU.

The model's own code, with our scoring, checkpointing and PEFT, runs once on fake tensors, and every storage that it
allocates is counted from its first use to its last (mdpo/memory/fake_tensors.py)."""

import contextlib
import logging
import types

import torch
import transformers.integrations.deepspeed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mdpo.forward.lm_head
import mdpo.forward.packed_attention
import mdpo.forward.sequence_parallel
import mdpo.forward.token_logps
from mdpo.config.precision import cast_weights
from mdpo.forward.compiled_ops import MIN_WIDTH, is_gated, is_norm
from mdpo.forward.dropout import disable_dropout
from mdpo.forward.forest import Forest
from mdpo.forward.layout import packing_refused
from mdpo.forward.modes import base_model
from mdpo.forward.sequence_parallel import Group, Spread, head_shares
from mdpo.memory.fake_tensors import Allocations, OnePass, gated_forward, norm_forward, replaced, varlen_kernel


class FakeModel:
    """A model without data, as a recipe trains it.

    `make` returns it in the dtype that it is loaded in, `make_reference` the reference where a step has a model of its
    own for it. DeepSpeed casts the policy to `engine_dtype`, and the reference follows; `autocast` is the dtype of
    mixed precision without it. `attention` names the kernel that packed rows meet on a GPU, flash or torch; None: a
    CPU, where torch chooses. A batch is `pairs` whose sides have `sequences` of `length` tokens each; every token is
    supervised, and none is shared. `row_ranks` share each row."""

    def __init__(
        self,
        make,
        args,
        peft=None,
        make_reference=None,
        engine_dtype=None,
        autocast=None,
        attention=None,
        zero3=False,
        sequences: int = 1,
        row_ranks: int = 1,
    ):
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # the error itself is shown
        self.mode, self.args, self.autocast, self.attention = FakeTensorMode(), args, autocast, attention
        self.reference, self.sequences, self.row_ranks = None, sequences, row_ranks
        # Inside a ZeRO-3 run transformers would hand the new model to DeepSpeed, which shards it over all ranks.
        with torch.device("meta"), replaced(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref", None):
            self.policy = _prepared(make(), args, peft, engine_dtype, zero3)
            if make_reference is not None:
                self.reference = make_reference()
                cast_weights(self.reference, engine_dtype)
                mdpo.forward.token_logps.enable_scoring(self.reference, self.fused)
                self.reference.requires_grad_(False).eval()
        for model in self._models:
            _on_fake_cpu(model, self.mode)
        self.packed = (bool(args.shared_prefix) or row_ranks > 1) and packing_refused(self.policy) is None
        if self.packed:  # as at the start of a run
            with mdpo.forward.packed_attention.noting_refusals() as unknown:
                self.evaluation(1, 2)
            self.packed = not unknown

    @property
    def fused(self) -> bool:
        return self.args.fused_ops and self.config.hidden_size >= MIN_WIDTH

    @property
    def config(self):
        return self._base.config.get_text_config()

    @property
    def _models(self) -> list[nn.Module]:
        return [model for model in (self.policy, self.reference) if model is not None]

    @property
    def _busiest(self) -> Group:
        """With the rank that has the most heads: of queries, and of keys and values as attention takes them."""
        heads = self.config.num_attention_heads
        shares = head_shares(heads, getattr(self.config, "num_key_value_heads", None) or heads, self.row_ranks)
        sizes = [s.queries.stop - s.queries.start + 2 * len(s.key_of_query or range(s.keys.stop - s.keys.start))
                 for s in shares]  # fmt: skip
        return Group(self.row_ranks, sizes.index(max(sizes)))

    @property
    def _base(self):
        return base_model(self.policy)

    def training(self, pairs: int, length: int, keeps_gradients: bool, accumulates: bool) -> dict[str, int]:
        """PARTS (bytes) at the peak of a forward and a backward pass. `keeps_gradients`: they stay until the optimizer
        steps, else each is freed as soon as it is there (DeepSpeed reduces it). `accumulates`: earlier micro-batches
        have left theirs. The reference, where it is not precomputed, scores the batch between the two passes."""
        self.policy.train()
        with self._counting() as allocations, contextlib.ExitStack() as hooks:
            for weight in (p for p in self.policy.parameters() if p.requires_grad):
                if keeps_gradients and accumulates:
                    weight.grad = torch.empty_like(weight)
                    allocations.add(weight.grad, "gradients")
                hook = weight.register_post_accumulate_grad_hook(lambda p: _take(p, allocations, keeps_gradients))
                hooks.callback(hook.remove)
            logps = self._score(self.policy, pairs, length)
            self._score_reference(pairs, length)
            logps.sum().backward()
            self.policy.zero_grad()
        return allocations.peak

    def evaluation(self, pairs: int, length: int) -> dict[str, int]:
        """PARTS (bytes) at the peak of a forward pass without gradients."""
        self.policy.eval()
        with self._counting() as allocations, torch.no_grad():
            logps = self._score(self.policy, pairs, length)
            self._score_reference(pairs, length)
            del logps
        return allocations.peak

    def _score_reference(self, pairs: int, length: int) -> None:
        if self.args.precompute_ref_log_probs:
            return
        own = self.policy.disable_adapter() if self.reference is None else contextlib.nullcontext()
        with torch.no_grad(), own:
            self._score(self.policy if self.reference is None else self.reference, pairs, length)

    def _score(self, model, pairs: int, length: int) -> torch.Tensor:
        """log-probs (S,) of a batch of `pairs` whose sides have `sequences` of `length` tokens each. As those share
        nothing, they take what the sides of as many pairs take."""
        pairs *= self.sequences
        row = (1, 2 * pairs * length) if self.packed else (2 * pairs, length)
        scored = torch.empty(2 * pairs * (length - 1), dtype=torch.int64)
        inputs = {"input_ids": torch.empty(row, dtype=torch.int64), "logp_position": scored, "label": scored}
        spread = _PlannedSpread(*row, len(scored), self._busiest) if self.row_ranks > 1 else None
        if self.packed:
            inputs["position_ids"] = torch.empty(row, dtype=torch.int64)
            inputs["forest"] = Forest([[length, -1]] * (2 * pairs), spread=spread)
        inputs |= spread.inputs if spread else {}
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            logps = model(**inputs, score_length=inputs["input_ids"].size(1)).logps
        return spread.collect(logps) if spread else logps

    @contextlib.contextmanager
    def _counting(self):
        """An Allocations that counts within it, with stand-ins for what is compiled and for attention kernels."""
        known = [tensor for model in self._models for tensor in (*model.parameters(), *model.buffers())]
        allocations = Allocations(self.config.vocab_size, known)
        with self.mode, allocations, contextlib.ExitStack() as stack:
            stack.enter_context(replaced(mdpo.forward.sequence_parallel, "dist", _NoRanks))
            stack.enter_context(
                replaced(mdpo.forward.token_logps, "compiled", lambda f: lambda *x: OnePass.apply(allocations, f, *x))
            )
            if self.attention:
                stack.enter_context(
                    replaced(mdpo.forward.packed_attention, "_varlen", varlen_kernel(self.attention == "flash"))
                )
                stack.enter_context(replaced(mdpo.forward.token_logps, "CHUNK_BYTES", {}))  # a GPU's chunks
                stack.enter_context(replaced(mdpo.forward.lm_head, "adds_in_float32", lambda *_: True))
            for module in (module for model in self._models for module in model.modules()) if self.fused else ():
                if is_norm(module) or is_gated(module):
                    module.forward = types.MethodType(
                        norm_forward(allocations) if is_norm(module) else gated_forward(allocations), module
                    )
            yield allocations


class _NoRanks:
    """In the place of torch.distributed: what ranks would send each other is there, with whatever is in it."""

    all_gather = all_to_all_single = staticmethod(lambda *args, **kwargs: None)


class _PlannedSpread(Spread):
    """Of one rank, whose tokens are as many as any rank's."""

    def __init__(self, rows: int, n: int, scored: int, group: Group):
        index = lambda n: torch.empty(n, dtype=torch.int64)  # noqa: E731
        size, each = group.size, -(-n // group.size) + 1
        self.group, self.scored = group, [-(-scored // size)] * size
        self._order, self._place, self._scored_place = index(size * each), index(n), index(scored)
        self.inputs = {"input_ids": index((rows, each)), "position_ids": index((rows, each))}
        self.inputs |= {"logp_position": index(self.scored[0]), "label": index(self.scored[0])}


def _prepared(model, args, peft, engine_dtype, zero3: bool):
    """What DPOTrainer and DeepSpeed make of the loaded policy."""
    mdpo.forward.token_logps.enable_scoring(
        model, args.fused_ops and model.config.get_text_config().hidden_size >= MIN_WIDTH
    )
    if peft is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft, autocast_adapter_dtype=not zero3)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout(model)
    cast_weights(model, engine_dtype)
    if args.gradient_checkpointing:
        options = dict(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
        every_n = options.pop("every_n_layers", 1)
        options |= {"use_reentrant": True} if peft is not None and zero3 else {}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, every_n_layers=every_n)
    return model


def _take(weight, allocations: Allocations, keep: bool) -> None:
    if keep:
        allocations.add(weight.grad, "gradients")
    else:
        weight.grad = None


def _on_fake_cpu(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces meta tensors by fake CPU tensors, for which autocast and attention choose as for real ones."""
    fakes: dict[int, torch.Tensor] = {}  # tied weights stay one
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        fake_weight = (
                            nn.Parameter(fake, tensor.requires_grad) if tensors is module._parameters else fake
                        )
                    fakes[id(tensor)] = fake_weight
                tensors[name] = tensor if tensor is None else fakes[id(tensor)]
