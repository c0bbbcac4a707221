"""A trainer's reference: which model it is, when it is in memory, and its log-probs, in the step or precomputed."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel

from mdpo.config.caches import default_folder
from mdpo.config.precision import engine_dtype
from mdpo.config.schema import MDPOConfig
from mdpo.console import first_line, say
from mdpo.errors import UserError
from mdpo.forward.collators import PackedCollator
from mdpo.forward.dropout import disable_dropout
from mdpo.forward.modes import evaluating
from mdpo.masking.tokenizer import refuse_small_vocabulary
from mdpo.ranks import agreed
from mdpo.reference.fingerprint import OWN_ADAPTER, cached_length, named_digest, reference_identity, weights_digest
from mdpo.reference.logp_cache import ReferenceCache, precompute
from mdpo.reference.model import (
    SyncReference,
    build_reference,
    drop_weights,
    lost_in_sync,
    partitioned,
    place_reference,
    refuse_sync,
    score_reference,
)


class Reference:
    """The frozen model that log ratios are taken against.

    It is one of four: `given` by the caller; `args.ref_model_name_or_path`, by name; the policy itself, without its
    adapter or, before training, as it is; or what the policy was when training began, loaded again or copied. `model`
    is None where the policy is its own, and where no reference is in memory. `policy_name` is the name that the policy
    was loaded from, None for an object; `trained` says whether the policy has made a step.
    """

    def __init__(
        self,
        policy,
        policy_name: str | None,
        args: MDPOConfig,
        accelerator,
        layout,
        tokenizer,
        given=None,
        quantization=None,
        compiled: bool = False,
        trained: Callable[[], bool] = lambda: False,
    ):
        self.policy, self.policy_name, self.args = policy, policy_name, args
        self.accelerator, self.layout, self.tokenizer = accelerator, layout, tokenizer
        self.given, self.quantization, self.compiled, self.trained = given, quantization, compiled, trained
        self.model, self._made = None, False
        self._deepspeed = args.deepspeed_plugin is not None

    # ------------------------------------------------------------------------------------------------ which model

    def make(self) -> None:
        """Puts the model into memory, ready to score. Raises UserError where there is none anymore."""
        self.model, self._made = self._model(), True

    def _model(self):
        model, path, precomputed = self.given, self.args.ref_model_name_or_path, self.args.precompute_ref_log_probs
        if model is None and not path and self._is_policy():
            if precomputed and self._deepspeed:
                raise UserError(
                    "precompute_ref_log_probs: under DeepSpeed a PEFT model with an adapter of its own cannot be its "
                    "own reference before training. Leave it out."
                )
            return None
        if model is None and not path and precomputed and self.trained():
            path = self.policy.config._name_or_path
            if not path:
                raise UserError(
                    "precompute_ref_log_probs: the policy has been trained, and was given as an object: the reference "
                    "for this new dataset is gone. Give it to the trainer at its start, or give a ref_model."
                )
        if model is None:
            kwargs = {"trust_remote_code": self.args.trust_remote_code, **(self.args.model_init_kwargs or {})}
            if self.quantization is not None:
                kwargs["quantization_config"] = self.quantization
            model = build_reference(self.policy, path, kwargs, self.policy_name is None)
        refuse_small_vocabulary(self.tokenizer, model.config, "the reference: ")
        if self.args.disable_dropout:
            disable_dropout(model)
        return place_reference(model, self.accelerator, self.compiled, engine_dtype(self.args))

    def _is_policy(self) -> bool:
        """Without another one: a PEFT model, and before training, where log-probs are precomputed, any model.
        DeepSpeed places a model only when training begins, too late for the latter."""
        precomputed = self.args.precompute_ref_log_probs
        if isinstance(self.policy, PeftModel):
            return OWN_ADAPTER in self.policy.peft_config or not (precomputed and self._deepspeed)
        return precomputed and not self.trained() and not self._deepspeed

    def free(self) -> None:
        """Frees its memory; the model is made again when it is needed."""
        if self.given is None:  # a given one may be needed again
            drop_weights(self.model)
        self.model, self._made = None, False
        if self.given is not None and not self._deepspeed:
            self.given.to("cpu")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def sync(self) -> SyncReference:
        """The callback that moves the reference towards the policy (`sync_ref_model`)."""
        refuse_sync(self.policy)
        say(*lost_in_sync(self.model, self.args.ref_model_mixup_alpha))
        return SyncReference(self.model, self.accelerator)

    # ------------------------------------------------------------------------------------------------ its log-probs

    def logps(self, policy, batch) -> torch.Tensor:
        """(S,) float32, nats: of the batch's supervised tokens. `policy` as it is wrapped for training. Raises
        UserError for a batch without them where they have to be precomputed."""
        if batch.reference_logp is not None:
            return batch.reference_logp
        if self.args.precompute_ref_log_probs:
            raise UserError(
                "precompute_ref_log_probs: this batch comes from a dataset without them. Give that to the trainer."
            )
        noisy = bool(self.args.neftune_noise_alpha) or not self.args.disable_dropout
        kwargs = self.args.gradient_checkpointing_kwargs
        return score_reference(self.model, policy, self.accelerator, batch, self.layout, kwargs, noisy).logps

    def precompute(self, dataset: Dataset, name: str, collator, batch_size: int) -> Dataset:
        """The dataset with the reference's log-probs, cached by content or computed. The model is made when the
        first sequence is missing there, and stays until `free`."""

        def score(batch) -> torch.Tensor:
            if not self._made:
                self.make()
            return score_reference(self.model, self.policy, self.accelerator, batch, self.layout).logps

        identity = self.identity(isinstance(collator, PackedCollator))
        cache = ReferenceCache(self._folder / identity if identity else None, self.args.process_index)
        size, longest = self.args.precompute_ref_batch_size or batch_size, cached_length(self.policy.config)
        with evaluating(self.policy):
            return precompute(dataset, score, collator, size, self.accelerator, cache, name, identity or "", longest)

    @property
    def _folder(self) -> Path:
        return Path(self.args.reference_cache_dir or default_folder())

    def identity(self, packed: bool) -> str | None:
        """What the reference's log-probs are cached under; None where its weights cannot be identified."""
        kwargs, own = self.args.model_init_kwargs or {}, OWN_ADAPTER in getattr(self.policy, "peft_config", {})
        name, revision = self.args.ref_model_name_or_path, None
        if not name and self.given is None and not own:
            name, revision = self.policy_name, kwargs.get("revision")
            gone = self.trained() or partitioned(self.policy)  # what it was cannot be told from the object
            if name is None and gone and not self._is_policy():
                name = self.policy.config._name_or_path or None
        if name:
            digest = self._digest(name, revision, kwargs.get("subfolder", ""))
        else:
            digest = weights_digest(self.policy) if self.given is None else weights_digest(self.given, whole=True)
        if digest is None:
            say("reference log-probs: not cached on disk, as no weight file tells which reference it is.")
            return None
        precision, dtype = self.accelerator.mixed_precision, engine_dtype(self.args)
        return reference_identity(
            digest, self.policy, self.quantization, precision, packed, self.compiled, kwargs, dtype
        )

    def _digest(self, name: str, revision: str | None, subfolder: str) -> str | None:
        """The main process reads the files, and all ranks get its result, an error too."""

        def read() -> str | None:
            try:
                return named_digest(name, revision, self._folder, subfolder)
            except OSError as error:
                raise UserError(f"reference {name!r} cannot be loaded: {first_line(error)}") from error

        return agreed(read)
