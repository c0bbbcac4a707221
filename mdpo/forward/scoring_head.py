"""A model that scores tokens: one object takes the place of its forward, and restores whatever it changes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from mdpo.errors import UserError
from mdpo.forward.lm_head import HeadTransform
from mdpo.forward.packed_attention import NAME


class ScoringHead:
    """Called in place of a model's forward. A call with `logp_position` returns `score(self, ...)` of its arguments;
    without it the model's own forward runs, so that generation and saving are unchanged.

    It owns three things of the model: its forward, from `install` to `restore`; the attention that its configuration
    names, which each call switches; and the LM head's forward, while a call scores. An object, not a closure: a copied
    or unpickled model has a scoring head of its own, which calls the copy.
    """

    def __init__(self, model: PreTrainedModel, score: Callable, fused: bool = False):
        self.model, self.score, self.fused = model, score, fused
        self.transform = HeadTransform.of(self._config)
        self.own_attention = self._config._attn_implementation
        self._before: Callable | None = None  # a forward that the model had besides its class's

    @staticmethod
    def of(model: torch.nn.Module) -> "ScoringHead | None":
        """The one that is installed in a model without wrappers."""
        return vars(model).get("_scoring_head")

    def install(self) -> "ScoringHead":
        """Raises UserError for a model that PEFT has wrapped, that has a scoring head already, whose LM head carries an
        adapter of its own, or whose configuration another model's scoring head has switched to packed attention."""
        kind = type(self.model).__name__
        if isinstance(self.model, PeftModel):
            raise UserError(f"scoring: {kind} is PEFT's wrapper. Give its get_base_model(), or the model before it.")
        if self.of(self.model) is not None:
            raise UserError(f"scoring: {kind} scores already. `restore()` its scoring head first.")
        if self.own_attention == NAME:
            raise UserError(
                f"scoring: {kind} shares its configuration with a model that is in packed attention, so its own "
                "attention is not known. Give each model a configuration of its own."
            )
        _ = self.lm_head
        self._before = vars(self.model).get("forward")
        self.model.forward = self
        vars(self.model)["_scoring_head"] = self
        return self

    def restore(self) -> None:
        """The model is again as `install` found it. Raises UserError where something was put around its forward since:
        that would be lost, or would still call this object."""
        kind = type(self.model).__name__
        if self.of(self.model) is not self:
            raise UserError(f"scoring: this scoring head is not installed in {kind}.")
        if vars(self.model).get("forward") is not self:
            raise UserError(
                f"scoring: {kind}'s forward was wrapped after its scoring head was installed. Unwrap it first."
            )
        self.switch(packed=False)
        _put_back(self.model, self._before)
        self._before = None
        del self.model._scoring_head

    def claim(self) -> None:
        """Removes from a deep copy what calls the model that was copied: wrappers of a forward, such as accelerate's
        for mixed precision, are functions, and those are not copied."""
        forward = vars(self.model).get("forward")
        while forward is not self:
            if forward is None or isinstance(forward, ScoringHead):
                self.model.forward = self
                return
            forward = getattr(forward, "__wrapped__", None)

    # ----------------------------------------------------------------------------------------- in place of the forward

    def __call__(self, *args, logp_position=None, label=None, score_length=None, score_collision=False, **kwargs):
        self.switch(packed=kwargs.get("forest") is not None)
        if logp_position is None:
            return self.own_forward(*args, **kwargs)
        scored = {"logp_position": logp_position, "label": label}
        return self.score(self, *args, **scored, score_length=score_length, score_collision=score_collision, **kwargs)

    @property
    def own_forward(self) -> Callable:
        return type(self.model).forward.__get__(self.model) if self._before is None else self._before

    @property
    def __wrapped__(self) -> Callable:  # generate() checks its arguments against this signature
        return self.own_forward

    # ------------------------------------------------------------------------------------------------------- attention

    @property
    def _config(self):
        return self.model.config.get_text_config()

    def switch(self, packed: bool) -> None:
        """Packed attention for this call and what follows from it, gradient checkpointing's second forward included, or
        the model's own again."""
        config = self._config
        if packed == (config._attn_implementation == NAME):
            return
        if packed:
            self.own_attention = config._attn_implementation
        config._attn_implementation = NAME if packed else self.own_attention

    # --------------------------------------------------------------------------------------------------------- LM head

    @property
    def lm_head(self) -> torch.nn.Module:
        """The module that computes logits, out of PEFT's wrappers. Raises UserError where it carries an adapter."""
        head = self.model.get_output_embeddings()
        if hasattr(head, "modules_to_save"):  # a fully trained copy beside a LoRA adapter
            adapters = [a for a in head.active_adapters if a in head.modules_to_save]
            head = head.modules_to_save[adapters[0]] if adapters and not head.disable_adapters else head.original_module
        if isinstance(head, BaseTunerLayer):
            raise UserError("lora_target_modules: the LM head cannot carry an adapter here; take 'lm_head' out of it.")
        return head

    @contextmanager
    def lm_head_computes(self, function: Callable) -> Iterator[torch.nn.Module]:
        """Within it, calling the LM head, which is yielded, runs `function(weight, bias, hidden)` inside the module
        call, where ZeRO-3 has gathered its weight."""
        head = self.lm_head
        before = vars(head).get("forward")

        def forward(hidden):
            return function(head.weight, getattr(head, "bias", None), hidden)

        head.forward = forward
        try:
            yield head
        finally:
            _put_back(head, before)


def _put_back(module: torch.nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def own_attention(model) -> str:
    """The attention implementation that a model, without wrappers, was loaded with, whatever it is switched to."""
    current, scoring = model.config.get_text_config()._attn_implementation, ScoringHead.of(model)
    return scoring.own_attention if scoring is not None and current == NAME else current
