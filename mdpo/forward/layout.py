"""Which layout a model is given: packed once a real batch has shown that both layouts give the same numbers, else
padded, as the reference implementation has it. Before that, log-probs are compared with those of the model's own
logits, on the same hidden states."""

import math
from weakref import WeakKeyDictionary, WeakSet

import torch

from mdpo.console import first_line, say
from mdpo.errors import UserError
from mdpo.forward.collators import first_pairs, unpacked
from mdpo.forward.layout_check import Watch, misplaced, shifted
from mdpo.forward.modes import base_model, evaluating
from mdpo.forward.packed_attention import noting_refusals, refused
from mdpo.forward.sequence_parallel import Group, Spread
from mdpo.forward.token_logps import score_tokens, scored_beside
from mdpo.ranks import row_ranks
from mdpo.types import PairBatch

OF_PACKED_ROWS = "sequence parallel divides packed rows among ranks"
CHECKED = 32768  # tokens of all sequences; more, padded and on one device, could take more memory than the step itself
HEAD_TOKENS = 64  # of a real row, compared with its own logits
# Norm of the difference of the two layouts' log-probs over their norm. Float32 adds in another order; half precision
# rounds in each layer, 4 to 5 % in bfloat16 where a policy's own samples are likely: what two padded batches differ by,
# NOISE times, counts where it is more. Without a run's boundary the difference is near 1. What the layout itself
# changes is checked by `mdpo.forward.layout_check`, where rounding hides nothing.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
NOISE = 4
ROUNDINGS = 4  # between a head's product and logits, each of half a unit in the last place of the largest logit


def packing_refused(model) -> str | None:
    """Why the model, PEFT's wrapper included, cannot be given packed rows; None where it can. Raises UserError where it
    has to."""
    reason = refused(base_model(model))
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        reason = "prompt-learning PEFT puts tokens of its own before the row"
    if reason and row_ranks() > 1:
        raise _not_packed(model, reason)
    return reason


def _not_packed(model, reason: str) -> UserError:
    return UserError(
        f"parallelism_config: {OF_PACKED_ROWS}. {type(model).__name__} cannot be given them: {reason}.",
        "parallelism_config",
    )


class Layout:
    """Hands each model its batches, after the self-check of its first packed one."""

    def __init__(self, accelerator, pad_token_id: int, timeout_s: float = 1800):
        self.accelerator, self.pad_token_id = accelerator, pad_token_id
        self._group = Group.of_this_rank(timeout_s)
        self._packs: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
        self._heads: WeakSet[torch.nn.Module] = WeakSet()  # whose log-probs are those of their logits

    def fit(self, model, batch: PairBatch) -> PairBatch:
        """The batch in the layout that `model` (wrapped or not) takes. All ranks call it together."""
        inner, packed = self.accelerator.unwrap_model(model), batch.is_packed
        if inner not in self._heads or (packed and inner not in self._packs):
            if self._group is not None:
                self._group.refuse_other_rows(batch)
            sequences = len([side for side in batch.sides if side % batch.n_pairs < 2])
            first = first_pairs(batch, 2, max(HEAD_TOKENS, CHECKED // sequences)) if packed else batch
            # Compiled parts run eagerly: two pairs are no reason to compile.
            eager = torch.compiler.set_stance("force_eager")
            with evaluating(inner), torch.no_grad(), self.accelerator.autocast(), eager:
                self._check_head(model, inner, unpacked(first, self.pad_token_id) if packed else first)
                self._heads.add(inner)
                if packed:
                    self._packs[inner] = self._check(model, inner, first)
        if packed and self._packs[inner]:
            return self._spread(batch)
        if self._group is not None:
            raise UserError(
                f"data_collator: {OF_PACKED_ROWS}, and this one's batches are padded.", "parallelism_config"
            )
        return unpacked(batch, self.pad_token_id) if packed else batch

    def _spread(self, batch: PairBatch) -> PairBatch:
        """The batch, and where several ranks share its row, which has what of it."""
        return batch if self._group is None else batch | {"spread": Spread(batch, self._group)}

    def _check_head(self, model, inner, batch: PairBatch) -> None:
        """Raises UserError where the log-probs of a row's first tokens are not those of the model's own logits: then
        its head does more than `mdpo.forward.token_logps` knows of."""
        mask = batch.attention_mask[:1].bool()
        ids = batch.input_ids[:1][mask][None, :HEAD_TOKENS]
        n = ids.size(1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with scored_beside(base_model(inner), ids[0, 1:]) as scored:
            logits = model(**inputs).logits[0, -n:-1].float()
        reason = (
            head_disagreement(scored[0], logits, ids[0, 1:], inner.dtype)
            if scored
            else "it is not called on what its body gives"
        )
        if self._anywhere(reason):
            raise UserError(
                f"The log-probs of {type(inner).__name__} are not those of its own logits: its LM head does something "
                f"that is not known here ({reason or 'seen on another rank'}). This architecture cannot be trained "
                "yet.",
                key="LM head",
            )

    def _check(self, model, inner, batch: PairBatch) -> bool:
        """Whether both layouts agree on every rank; one line where they do not. Each rank makes the same forwards."""
        reason = packing_refused(inner)
        if reason is None:
            reason = self._compare(model, inner, batch)
        if not self._anywhere(reason):
            return True
        reason = reason or "another rank found a difference"
        if self._group is not None:
            raise _not_packed(inner, reason)
        say(f"shared_prefix: off for {type(inner).__name__}: {reason}.")
        return False

    def _compare(self, model, inner, batch: PairBatch) -> str | None:
        """Why the packed layout cannot be used, if it cannot."""
        padded, watch = unpacked(batch, self.pad_token_id), Watch(base_model(inner), batch)
        with watch.looking():
            expected = score_tokens(model, padded).logps
        padded_again = score_tokens(model, shifted(padded, self.pad_token_id)).logps
        try:
            with noting_refusals() as unknown, watch.looking():
                packed = score_tokens(model, self._spread(batch)).logps
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture does: it trains padded
            return f"its packed forward ends in {type(error).__name__}: {first_line(error)}"
        if unknown:
            return unknown[0]
        if not (watch.calls[True] and watch.calls[False]):
            return "its attention does not go through transformers' interface"
        return misplaced(batch) or watch.reason or disagreement(packed, expected, inner.dtype, padded_again)

    def _anywhere(self, reason: str | None) -> bool:
        """Whether any rank has a reason. All ranks call it together."""
        bad = torch.tensor(float(reason is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(bad, "sum") > 0)


def disagreement(packed: torch.Tensor, padded: torch.Tensor, dtype: torch.dtype, padded_again=None) -> str | None:
    """How log-probs (S,) that should be the same differ beyond what rounding in `dtype` explains, if they do.
    `padded_again` are the padded ones, rounded otherwise."""
    dtype = _computed(packed, dtype)
    noise = 0.0 if padded_again is None else _difference(padded_again, padded)
    tolerance = max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]), NOISE * noise if math.isfinite(noise) else 0.0)
    difference = _difference(packed, padded)
    if difference <= tolerance:
        return None
    return f"its log-probs differ by {difference:.1e} of their norm, more than {tolerance:.1g}"


def head_disagreement(ours, logits, target, dtype: torch.dtype) -> str | None:
    """How log-probs (S,) of `target` differ from those of logits (S, V) of the same hidden states beyond what rounding
    the logits explains, if they do. Non-finite weights are not its concern."""
    own = logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    if not torch.isfinite(own).all():
        return None
    rounding = ROUNDINGS * torch.finfo(_computed(ours, dtype)).eps * logits.abs().amax(-1).norm().item()
    difference, limit = (ours - own).norm().item(), rounding + 1e-4 * own.norm().item()
    if difference <= limit:
        return None
    return f"they differ by {difference:.1e}, more than {limit:.1e}"


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-6)).item()


def _computed(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype
