"""Which layout a model is given. A packed batch goes to it as it is once a real one has shown that both layouts give
the same log-probs, and padded, as the slow twin has it, where they do not."""

from weakref import WeakKeyDictionary

import torch

from mdpo.attention import noting_refusals, refused
from mdpo.logprobs import score_tokens
from mdpo.packing import first_pairs, unpacked
from mdpo.startup import say

# Norm of the difference of the two layouts' log-probs over their norm: float32 adds in another order, half precision
# rounds to 8 or 11 bits in each layer. Without a segment's boundary it is near 1.
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

    def fit(self, model, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch in the layout that `model` (wrapped or not) takes. All ranks call it together."""
        if "segments" not in batch:
            return batch
        inner = self.accelerator.unwrap_model(model)
        if inner not in self._packs:
            self._packs[inner] = self._check(model, inner, first_pairs(batch, 2))
        return batch if self._packs[inner] else unpacked(batch, self.pad_token_id)

    def _check(self, model, inner, batch) -> bool:
        """Whether both layouts agree on every rank; one line where they do not. Dropout is off meanwhile."""
        reason, training = packing_refused(inner), inner.training
        if reason is None:
            inner.eval()
            with torch.no_grad(), self.accelerator.autocast():
                with noting_refusals() as unknown:
                    packed = score_tokens(model, batch).logps
                padded = score_tokens(model, unpacked(batch, self.pad_token_id)).logps
                reason = f"its attention takes {unknown[0]}" if unknown else disagreement(packed, padded, inner.dtype)
            inner.train(training)
        bad = torch.tensor(float(reason is not None), device=self.accelerator.device)
        if self.accelerator.reduce(bad, "sum") == 0:
            return True
        say(f"shared_prefix: off for {type(inner).__name__}: {reason or 'another rank found a difference'}.")
        return False


def disagreement(packed: torch.Tensor, padded: torch.Tensor, dtype: torch.dtype) -> str | None:
    """How two layouts' log-probs (S,) differ beyond what rounding in `dtype` explains; None where they do not."""
    if torch.is_autocast_enabled(packed.device.type):
        dtype = torch.get_autocast_dtype(packed.device.type)
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    difference = ((packed - padded).norm() / padded.norm().clamp(min=1e-6)).item()
    if difference <= tolerance:
        return None
    return f"its log-probs differ from the padded ones by {difference:.1e} of their norm, more than {tolerance:g}"
