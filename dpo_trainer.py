"""DPOTrainer in TRL 1.16's interface, patched for multi-turn DPO (M-DPO, arXiv 2409.02392).

With a plain `trl.DPOConfig` it behaves as `trl.DPOTrainer`; `mdpo.config.schema.MDPOConfig` switches the departures on.
Each is marked once by a pair of MODIFICATION lines, numbered in reading order; docs/trl-differences.md says why. What
they call is elsewhere: masks in `mdpo/masking/loss_mask.py`, batches and the forward pass in `mdpo/forward/`, the
mathematics in `mdpo/loss/functions.py`, the frozen model in `mdpo/reference/frozen.py`, checkpoints, resume and
non-finite steps in `mdpo/runs/`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, EvalPrediction
from trl import DPOConfig

from mdpo.config.model_folders import refuse_frozen, refuse_objects
from mdpo.config.precision import in_float32
from mdpo.config.schema import MDPOConfig
from mdpo.config.validation import check_options, refuse_inputs, refuse_lost_steps
from mdpo.console import say
from mdpo.data.positions import learned_positions, refuse_long_rows
from mdpo.data.row_numbers import refuse_by_loss
from mdpo.data.sampler import LongestFirst
from mdpo.data.tokenize import DropCounts, tokenize_dataset, tokenize_stream
from mdpo.data.whole_columns import with_numbers
from mdpo.errors import UserError
from mdpo.forward.collators import REFERENCE, PackedCollator, PairCollator, unpacked
from mdpo.forward.compiled_ops import fuse
from mdpo.forward.dropout import configured, disable_dropout, refuse_noise, remember_cache
from mdpo.forward.layout import Layout, packing_refused
from mdpo.forward.modes import base_model
from mdpo.forward.pair_logps import policy_weights, sum_by_pair, verbosity_weights
from mdpo.forward.token_logps import enable_scoring, score_tokens
from mdpo.loss.functions import nll_loss
from mdpo.loss.metrics import deduplicate, mean_over_steps, of_all_ranks, pair_table, summarize
from mdpo.loss.pair_tables import PairTables
from mdpo.loss.registry import LossSettings, PairTerms, pair_losses, weighted
from mdpo.loss.turn_metrics import turn_rewards
from mdpo.masking.loss_mask import RenderSettings
from mdpo.masking.tokenizer import fast_tokenizer, refuse_pad_token, refuse_router_loss, refuse_small_vocabulary
from mdpo.ranks import first_of_node, row_ranks
from mdpo.reference.frozen import Reference
from mdpo.reference.model import keep_own_adapter, load_moved, save_moved
from mdpo.reporting.model_card import write_card
from mdpo.rollouts.load_policy import starting_policy
from mdpo.runs.checkpoints import writing
from mdpo.runs.nonfinite_guard import NonfiniteGuard
from mdpo.runs.resumable_trainer import ResumableTrainer
from mdpo.types import SIDES, PairBatch

AnyDataset = Dataset | IterableDataset
NOISE_BY_LENGTH = "neftune_noise_alpha's noise goes by the length of padded rows"


class DPOTrainer(ResumableTrainer):
    """Direct Preference Optimization (arXiv 2305.18290) over the tokens that the policy itself produced.

    Args are those of `trl.DPOTrainer` 1.16. Rows come in TRL's preference formats (see `mdpo/data/rows.py`) or already
    tokenized by `mdpo.data.tokenize.tokenize_dataset`. Raises UserError for what a user can fix.
    """

    loss_is_scaled_for_ga = False  # compute_loss is a mean over pairs; Trainer divides by the accumulation steps
    _tag_names = ["trl", "dpo"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = MDPOConfig.with_trl_behaviour(self._default_args(model) if args is None else args)
        refuse_inputs(model, ref_model, args, train_dataset, processing_class)
        refuse_objects(model, ref_model)
        say(*check_options(args, peft_config))

        set_seed(args.seed)  # before the model: new adapters start at random
        policy_name = model if isinstance(model, str) else None
        model = starting_policy(model, args, quantization_config)
        processing_class = processing_class or self._load_tokenizer(model, args)
        self._set_pad_token(processing_class, model, args.pad_token)
        refuse_small_vocabulary(processing_class, model.config)
        model = self._wrap_peft(model, peft_config, ref_model, args)
        compiled = self._enable_scoring(base_model(model), args)
        self._positions = learned_positions(model)
        self.aux_loss_coef = self._aux_loss_coefficient(model, args.router_aux_loss_coef)
        self.aux_loss_enabled, self.router_aux_loss_coef = self.aux_loss_coef != 0.0, self.aux_loss_coef  # TRL's names
        self.loss_settings = LossSettings.of(args)

        ############## MODIFICATION 1: turn masks. Only tokens that the policy samples are supervised; TRL supervises
        # all that follows the prompt, tool output and role headers included.
        self.render_settings = RenderSettings.of(args)
        ############## MODIFICATION 1 END
        self.drop_counts: dict[str, DropCounts] = {}
        args.accelerator_config.dispatch_batches = False  # of streams: batches of several ranks differ in length
        data = self._prepare_datasets(train_dataset, eval_dataset, processing_class, args)
        data["data_collator"] = data_collator or self._collator(model, processing_class.pad_token_id, args)

        hooks = {"compute_metrics": compute_metrics, "callbacks": callbacks, "optimizers": optimizers}
        remember_cache(model)
        super().__init__(model, args, processing_class=processing_class, **data, **hooks)
        if args.n_gpu > 1:
            raise UserError("Several GPUs are visible to one process. Start it with `accelerate launch`.")
        self.model.add_model_tags(self._tag_names)
        if args.disable_dropout:
            disable_dropout(self.model)
        self.layout = Layout(self.accelerator, processing_class.pad_token_id, args.ddp_timeout)
        self._set_up_reference(policy_name, ref_model, quantization_config, compiled)
        self._noise_checked, self._sampler = False, None
        self._set_up_tables()

    # ------------------------------------------------------------------------------------------------ set-up

    def _set_up_tables(self) -> None:
        self.tables = PairTables(self.args.device)
        ############## MODIFICATION 2: non-finite steps are skipped, and their rows are named; TRL logs NaN as 0 and
        # continues with NaN weights.
        self.nonfinite = NonfiniteGuard(self.args, self.tables)
        ############## MODIFICATION 2 END
        self.rank_parts |= {"tables": self.tables, "nonfinite": self.nonfinite}

    @staticmethod
    def _default_args(model) -> DPOConfig:
        name = model if isinstance(model, str) else model.config._name_or_path
        return DPOConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-DPO")

    @staticmethod
    def _enable_scoring(model, args: DPOConfig) -> bool:
        """Gives the model its scoring head; whether its norms and activations are compiled."""
        compiled = False
        ############## MODIFICATION 3: norms, gated activations and the LM head's softmax compiled (torch.compile).
        if args.fused_ops:
            compiled, line = fuse(model, args.device)
            say(*([line] if line else []))
        ############## MODIFICATION 3 END
        enable_scoring(model, compiled)
        return compiled

    @staticmethod
    def _load_tokenizer(model, args: DPOConfig) -> PreTrainedTokenizerBase:
        revision = (args.model_init_kwargs or {}).get("revision")
        return fast_tokenizer(model.config._name_or_path, revision, args.trust_remote_code)

    @staticmethod
    def _set_pad_token(tokenizer: PreTrainedTokenizerBase, model, pad_token: str | None) -> None:
        """Padding is masked everywhere, so the end-of-sequence token will do where a tokenizer has none."""
        refuse_pad_token(tokenizer, pad_token)
        tokenizer.pad_token = pad_token or tokenizer.pad_token or tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if model.generation_config is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id

    @staticmethod
    def _aux_loss_coefficient(model, coefficient: float | None) -> float:
        """Weight of a mixture of experts' load-balancing loss: as given, else the model's own; 0 for other models."""
        config = model.config.get_text_config()
        refuse_router_loss(coefficient, config)
        if not hasattr(config, "output_router_logits"):
            return 0.0
        return getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient

    @staticmethod
    def _wrap_peft(model, peft_config, ref_model, args: DPOConfig):
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise UserError("peft_config was given for a model that already is a PEFT model. Give one of the two.")
            # ZeRO-3 gathers parameters in one dtype: a float32 adapter on a bfloat16 model breaks its buffers.
            zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
            quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
            try:
                model = get_peft_model(model, peft_config, autocast_adapter_dtype=quantized or not zero3)
            except (ValueError, NotImplementedError) as error:  # lora_dropout on experts, say
                raise UserError(
                    f"PEFT cannot put this adapter on {type(model).__name__}: {error}", "peft_config"
                ) from error
            if args.deepspeed_plugin is None:
                in_float32(model)
        elif isinstance(model, PeftModel) and ref_model is None and not args.ref_model_name_or_path:
            keep_own_adapter(model)
        if isinstance(model, PeftModel) and args.gradient_checkpointing:
            model.enable_input_require_grads()  # else no gradient reaches a checkpointed layer: embeddings are frozen
            if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
                kwargs = args.gradient_checkpointing_kwargs or {}
                if kwargs.get("use_reentrant") is False:
                    raise UserError("PEFT under ZeRO-3 needs gradient_checkpointing_kwargs: {use_reentrant: true}.")
                args.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": True}
        return model

    @staticmethod
    def _collator(model, pad_token_id: int, args: DPOConfig) -> Callable[[list[Any]], dict[str, Any]]:
        ############## MODIFICATION 4: what sequences begin with alike is computed once, in rows without padding.
        reason = NOISE_BY_LENGTH if args.neftune_noise_alpha else packing_refused(model)
        if args.shared_prefix:
            if reason is None:
                return PackedCollator()
            say(f"shared_prefix: off for {type(model).__name__}: {reason}.")
        ############## MODIFICATION 4 END
        return PackedCollator(shared=False) if row_ranks() > 1 else PairCollator(pad_token_id, args.pad_to_multiple_of)

    def _prepare_datasets(self, train: AnyDataset, evaluation, tokenizer, args: DPOConfig) -> dict[str, Any]:
        """Both datasets tokenized; several evaluation datasets stay a dict."""
        train = self._prepare_dataset(train, tokenizer, args, "train")
        if isinstance(evaluation, dict):
            evaluation = {
                name: self._prepare_dataset(dataset, tokenizer, args, name) for name, dataset in evaluation.items()
            }
        elif evaluation is not None:
            evaluation = self._prepare_dataset(evaluation, tokenizer, args, "eval")
        return {"train_dataset": train, "eval_dataset": evaluation}

    def _prepare_dataset(self, dataset: AnyDataset, tokenizer, args: DPOConfig, name: str) -> AnyDataset:
        if isinstance(dataset, IterableDataset):
            if args.precompute_ref_log_probs:
                raise UserError("precompute_ref_log_probs: needs a dataset of known length, not a stream.")
            refuse_long_rows(dataset, name, self._positions, args)
            dataset, self.drop_counts[name] = tokenize_stream(dataset, tokenizer, self.render_settings, name)
            if name != "train" and not args.dataloader_num_workers:  # workers would count from 0 each
                dataset = dataset.map(lambda _, row: {"row": row}, with_indices=True)  # tell what fills up a last batch
            return dataset
        if "chosen_ids" not in dataset.column_names:
            with first_of_node():
                dataset, self.drop_counts[name] = tokenize_dataset(
                    dataset, tokenizer, self.render_settings, name, args.dataset_num_proc
                )
            say(*self.drop_counts[name].lines())
        refuse_by_loss(args, dataset, name)
        refuse_long_rows(dataset, name, self._positions, args)
        if "row" not in dataset.column_names:
            with first_of_node():
                dataset = with_numbers(dataset, "row")
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        ############## MODIFICATION 5: the longest pairs come first, so that memory runs out in the first minute, and
        # pairs of one prompt in one micro-batch, which computes it once.
        if not self.args.of_trl and self.args.train_sampling_strategy == "random":
            if isinstance(self.train_dataset, Dataset):  # with all columns; Trainer hands on those of a batch
                self._sampler = LongestFirst.of(self.train_dataset, self.args)
                return self._sampler
        ############## MODIFICATION 5 END
        return super()._get_train_sampler(train_dataset)

    def begin_epoch(self, epoch: int) -> None:
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)

    def _set_signature_columns_if_needed(self):
        sides = [f"{side}_{field}" for side in SIDES for field in ("ids", "mask", "weights", "lengths")]
        self._signature_columns = [*sides, "margin", "weight", "row", *REFERENCE.values()]

    def _set_up_reference(self, policy_name, ref_model, quantization, compiled: bool) -> None:
        ############## MODIFICATION 6: a reference other than the starting policy, by name.
        self.reference = Reference(
            self.model,
            policy_name,
            self.args,
            self.accelerator,
            self.layout,
            self.processing_class,
            ref_model,
            quantization,
            compiled,
            trained=lambda: self.state.global_step > 0,
        )
        ############## MODIFICATION 6 END
        if self.args.precompute_ref_log_probs:
            self._precompute_all()
        else:
            self.reference.make()
        if self.args.sync_ref_model:
            self.add_callback(self.reference.sync())

    @property
    def ref_model(self):
        """TRL's name of the reference in memory; None where the policy is its own, or log-probs are precomputed."""
        return self.reference.model

    def _precompute_all(self) -> None:
        """The reference's log-probs of all datasets, cached or from a model that is then freed."""
        self.train_dataset = self._precompute(self.train_dataset, "train", self.args.per_device_train_batch_size)
        size = self.args.per_device_eval_batch_size
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._precompute(dataset, name, size) for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._precompute(self.eval_dataset, "eval", size)
        self.reference.free()

    def _precompute(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        ############## MODIFICATION 7: cached by sequence and content, so that only new ones are ever scored; TRL
        # caches sums of a whole dataset, under a key that changes with unrelated settings.
        return self.reference.precompute(dataset, name, self.data_collator, batch_size)
        ############## MODIFICATION 7 END

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled:
            self.nonfinite.watch(self.deepspeed)
        if resume_from_checkpoint is not None and self.args.sync_ref_model:
            load_moved(self.reference.model, self.accelerator, resume_from_checkpoint)
        return prepared

    def train(self, *args, **kwargs):
        refuse_frozen(self.model)
        if self.optimizer is None:  # a given one is the caller's choice
            say(*refuse_lost_steps(self.model, self.args))
        result = super().train(*args, **kwargs)
        for counts in self.drop_counts.values():
            if counts.streamed:
                say(*counts.lines())
        return result

    # ------------------------------------------------------------------------------------------------ the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of this rank's pairs, a scalar; with `return_outputs` also their PairLogps."""
        batch = PairBatch.of(inputs)
        self.batch_in_hand = batch  # for the message where memory runs out
        if self.args.disable_dropout and self.model.training and not self._noise_checked:
            refuse_noise(model, self.accelerator, batch)
            self._noise_checked = True
        scores = score_tokens(
            model, self.layout.fit(model, batch), self.args.use_weighting, aux_loss=bool(self.aux_loss_coef)
        )
        reference_logps = self.reference.logps(model, batch)

        weights = None if self.args.ld_alpha is None else verbosity_weights(batch, self.args.ld_alpha)
        ############## MODIFICATION 8: turn weights. `turn_weight` of the batch multiplies both models' log-probs.
        policy = sum_by_pair(scores.logps, batch, weights)
        own = sum_by_pair(scores.logps, batch)
        reference = sum_by_pair(reference_logps, batch, weights)
        ############## MODIFICATION 8 END
        margin = mean_over_ranks = None
        ############## MODIFICATION 9: margins from the data.
        if self.loss_settings.margin_scale:
            margin = batch.margin
            if margin is None:
                raise UserError("margin_scale: a pair of this batch has no `margin`.")
        ############## MODIFICATION 9 END
        ############## MODIFICATION 10: losses beyond TRL's; KTO on pairs needs the mean log ratios of all ranks.
        if "kto_pair" in self.loss_settings.loss_type:
            mean_over_ranks = self._mean_over_ranks
        ############## MODIFICATION 10 END
        terms = PairTerms.of(policy, reference, own, self.loss_settings, margin, mean_over_ranks)
        losses = pair_losses(terms)
        if self.args.use_weighting:
            losses = losses * policy_weights(scores, batch)
        ############## MODIFICATION 11: the RPO term, added to each pair's loss.
        nll = nll_loss(own.chosen, own.chosen_tokens)
        if self.loss_settings.nll_coefficient:
            losses = losses + self.loss_settings.nll_coefficient * nll
        ############## MODIFICATION 11 END
        ############## MODIFICATION 12: pair weights from the data multiply all of a pair's loss.
        losses = weighted(losses, batch.pair_weight, self.loss_settings)
        ############## MODIFICATION 12 END
        if self.aux_loss_coef:
            losses = losses + self.aux_loss_coef * scores.aux_loss

        turns = None
        ############## MODIFICATION 13: margins and accuracy by turn; TRL has those of whole sides.
        if self.render_settings.mask_turns and batch.turn is not None:
            turns = turn_rewards(batch, scores.logps, reference_logps, self.loss_settings.beta, weights)
        ############## MODIFICATION 13 END
        table = pair_table(batch, scores, losses, terms, nll, reference_logps, turns)
        self.tables.append(table, self.model.training, batch)
        loss = self.nonfinite.loss(losses.mean().float())
        return (loss, policy) if return_outputs else loss

    def _prepare_input(self, data):
        """Trainer's casts every floating tensor of a batch to DeepSpeed's dtype; of ours none goes into the model, and
        sums of log-probs, margins and weights would be off by whole nats in bfloat16."""
        if isinstance(data, torch.Tensor) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of (B,) over the pairs of all ranks, a scalar without gradient."""
        values = values.detach()
        total = self.accelerator.reduce(torch.stack([values.sum(), values.new_full((), len(values))]), "sum")
        return total[0] / total[1]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        return self.nonfinite.logged_loss(loss, self._tr_loss, self.state.global_step - self._globalstep_last_logged)

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer calls it once a step, when the gradients are ready."""
        norm = super()._get_grad_norm(model, grad_norm)
        engine = self.deepspeed if self.is_deepspeed_enabled else None
        self.nonfinite.end_of_backward(model, norm, engine, self.state.global_step + 1, self.train_dataset)
        return norm

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, None, None); for compute_metrics also logits (2B, T, V), from another forward, and ids."""
        self.interrupt_if_preempted()
        inputs = PairBatch.of(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            if prediction_loss_only:
                return loss, None, None
            padded = unpacked(inputs, self.layout.pad_token_id) if inputs.is_packed else inputs
            logits = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
        return loss, logits, padded.input_ids

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """On the given datasets, raw or tokenized, or on the trainer's own."""
        if isinstance(eval_dataset, Dataset | IterableDataset):  # each dataset of a dict comes here
            name = metric_key_prefix
            eval_dataset = self._prepare_dataset(eval_dataset, self.processing_class, self.args, name)
            if self.args.precompute_ref_log_probs and REFERENCE["chosen"] not in eval_dataset.column_names:
                eval_dataset = self._precompute(eval_dataset, name, self.args.per_device_eval_batch_size)
                self.reference.free()
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # ------------------------------------------------------------------------------------------------ metrics

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        self.tables.eval.clear()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        ############## MODIFICATION 14: evaluation weighted by pairs, each pair once whatever the number of ranks; TRL
        # averages batch means, and pairs that fill up the last batch count twice.
        tables, [tokens] = of_all_ranks([self.tables.take_eval()], [self.tables.tokens], self.args.device)
        table = deduplicate([table for [table] in tables])
        metrics = {**self._shown(summarize(table)), "loss": table[:, 1].mean().item(), "pairs": len(table)}
        ############## MODIFICATION 14 END
        metrics["num_tokens"] = tokens
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages since the last log, gathered over ranks. All ranks call it together."""
        if "loss" in logs:
            counts = [self.tables.tokens, self.tables.distinct]
            tables, [tokens, distinct] = of_all_ranks(self.tables.take_train(), counts, self.args.device)
            logs |= {**self._shown(mean_over_steps(tables)), "num_tokens": tokens}
            logs |= {"num_distinct_tokens": distinct} if distinct else {}  # padded batches have none
        self.nonfinite.amend(logs, self.state.global_step)
        super().log(logs, start_time)

    def _shown(self, metrics: dict[str, float]) -> dict[str, float]:
        hidden = {"nll_loss": not self.loss_settings.nll_coefficient, "aux_loss": not self.aux_loss_coef}
        return {name: value for name, value in metrics.items() if not hidden.get(name)}

    # ------------------------------------------------------------------------------------------------ saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        with configured(self.model):
            super().save_model(output_dir, _internal_call)
        if self.args.sync_ref_model and Path(output_dir or "").name.startswith(PREFIX_CHECKPOINT_DIR):
            save_moved(self.reference.model, self.accelerator, output_dir)

    def _save_checkpoint(self, *args, **kwargs):
        with writing(self.args.output_dir):
            self.create_model_card()
        super()._save_checkpoint(*args, **kwargs)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes README.md into `output_dir`."""
        if not self.is_world_process_zero():
            return
        name = model_name or (self.args.hub_model_id or os.path.abspath(self.args.output_dir)).split("/")[-1]
        base = getattr(self.model.config, "_name_or_path", None)
        tags = [*([tags] if isinstance(tags, str) else tags or []), *self._tag_names]
        write_card(self.args.output_dir, name, base, dataset_name, tags, self.args, self.state.log_history)
