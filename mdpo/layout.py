"""Which layout a model is given. A packed batch goes to it as it is once a real one has shown that both layouts give
the same log-probs, and padded, as the slow twin has it, where they do not. Before that, log-probs are compared with
those of the model's own logits."""

from weakref import WeakKeyDictionary, WeakSet

import torch

from mdpo.attention import noting_refusals, refused
from mdpo.logprobs import score_tokens
from mdpo.packing import first_pairs, unpacked
from mdpo.startup import say
from mdpo.types import UserError

# Norm of the difference of the two layouts' log-probs over their norm: float32 adds in another order, half precision
# rounds to 8 or 11 bits in each layer. Without a segment's boundary it is near 1.
HEAD_TOKENS = 64  # of a real row, whose own logits are looked at
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def packing_refused(model) -> str | None:
    """Why the model, PEFT's wrapper included, cannot be given packed rows; None where it can."""
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return "prompt-learning PEFT puts tokens of its own before the row"
    return refused(model.get_base_model() if hasattr(model, "peft_config") else model)


class Layout:
    """Hands each model its batches, after the self-check of its first packed one."""

    def __init__(self, accelerator, pad_token_id: int):
        self.accelerator, self.pad_token_id = accelerator, pad_token_id
        self._packs: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()
        self._heads: WeakSet[torch.nn.Module] = WeakSet()  # whose log-probs are those of their logits

    def fit(self, model, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch in the layout that `model` (wrapped or not) takes. All ranks call it together."""
        inner, packed = self.accelerator.unwrap_model(model), "segments" in batch
        if inner not in self._heads or (packed and inner not in self._packs):
            first, training = first_pairs(batch, 2) if packed else batch, inner.training
            inner.eval()  # no dropout
            with torch.no_grad(), self.accelerator.autocast():
                self._check_head(model, inner, unpacked(first, self.pad_token_id) if packed else first)
                self._heads.add(inner)
                if packed:
                    self._packs[inner] = self._check(model, inner, first)
            inner.train(training)
        return unpacked(batch, self.pad_token_id) if packed and not self._packs[inner] else batch

    def _check_head(self, model, inner, batch) -> None:
        """Raises UserError where the log-probs of a row's first tokens are not those of the model's own logits: then
        its head does more than `mdpo.logprobs` knows of."""
        mask = batch["attention_mask"][:1].bool()
        ids = batch["input_ids"][:1][mask][None, :HEAD_TOKENS]
        n = ids.size(1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**inputs).logits[0, -n:-1].float()
        own = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        scored = {"score_index": torch.arange(n - 1, device=ids.device), "score_target": ids[0, 1:]}
        ours = score_tokens(model, {**inputs, **scored}).logps
        reason = disagreement(ours, own, inner.dtype) if torch.isfinite(own).all() else None  # weights are not its task
        if self._anywhere(reason):
            raise UserError(
                f"The log-probs of {type(inner).__name__} are not those of its own logits: its LM head does something "
                f"that is not known here ({reason or 'seen on another rank'}). This architecture cannot be trained yet."
            )

    def _check(self, model, inner, batch) -> bool:
        """Whether both layouts agree on every rank; one line where they do not."""
        reason = packing_refused(inner)
        if reason is None:
            with noting_refusals() as unknown:
                packed = score_tokens(model, batch).logps
            padded = score_tokens(model, unpacked(batch, self.pad_token_id)).logps
            reason = f"its attention takes {unknown[0]}" if unknown else disagreement(packed, padded, inner.dtype)
        if not self._anywhere(reason):
            return True
        say(f"shared_prefix: off for {type(inner).__name__}: {reason or 'another rank found a difference'}.")
        return False

    def _anywhere(self, reason: str | None) -> bool:
        """Whether any rank has a reason. All ranks call it together."""
        bad = torch.tensor(float(reason is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(bad, "sum") > 0)


def disagreement(packed: torch.Tensor, padded: torch.Tensor, dtype: torch.dtype) -> str | None:
    """How log-probs (S,) that should be the same differ beyond what rounding in `dtype` explains, if they do."""
    if torch.is_autocast_enabled(packed.device.type):
        dtype = torch.get_autocast_dtype(packed.device.type)
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    difference = ((packed - padded).norm() / padded.norm().clamp(min=1e-6)).item()
    if difference <= tolerance:
        return None
    return f"its log-probs differ by {difference:.1e} of their norm, more than {tolerance:g}"
