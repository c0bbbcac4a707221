"""DPOTrainer in TRL 1.16's interface, patched for multi-turn DPO (M-DPO, arXiv 2409.02392).

With a plain `trl.DPOConfig` it behaves as `trl.DPOTrainer`; with `mdpo.config.MDPOConfig` the departures are on. Each
departure stands between two MODIFICATION lines. The mathematics is in `mdpo/losses.py`, masks are in `mdpo/render.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOConfig

from mdpo.checkpoints import check_saved, expected_weights
from mdpo.config import MDPOConfig
from mdpo.logprobs import enable_scoring, score_tokens, sum_by_pair
from mdpo.losses import log_ratio, nll_loss, sigmoid_loss
from mdpo.metrics import evaluated_once, mean_over_steps, pair_table, summarise
from mdpo.packing import PairCollator, score_list
from mdpo.reference import build_reference, load_model, place_reference, score_reference
from mdpo.render import RenderSettings
from mdpo.tokens import DropCounts, tokenize_dataset
from mdpo.types import UserError

# Options of trl.DPOConfig that this trainer does not have yet, with the only value that it takes for each.
NOT_YET = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "label_smoothing": 0.0,
    "use_weighting": False,
    "precompute_ref_log_probs": False,
    "sync_ref_model": False,
    "padding_free": False,
    "use_liger_kernel": False,
    "activation_offloading": False,
}


class DPOTrainer(Trainer):
    """Direct Preference Optimization (arXiv 2305.18290) over the tokens that the policy itself produced.

    Args are those of `trl.DPOTrainer` 1.16. Rows come in TRL's preference formats (see `mdpo/data.py`) or already
    tokenised by `mdpo.tokens.tokenize_dataset`. Raises UserError for what a user can mend.
    """

    loss_is_scaled_for_ga = False  # compute_loss is a mean over pairs; Trainer divides by the accumulation steps
    _tag_names = ["trl", "dpo"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DPOConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-DPO")
        _refuse_unsupported(args, model, ref_model, train_dataset, compute_metrics)

        set_seed(args.seed)  # before the model: new adapters start at random
        model = self._load_policy(model, args, quantization_config)
        self._refuse_aux_loss(model, args.router_aux_loss_coef)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                model.config._name_or_path, trust_remote_code=args.trust_remote_code
            )
        self._set_pad_token(processing_class, model)
        self._refuse_small_vocabulary(processing_class, model)
        model = self._wrap_peft(model, peft_config, ref_model, args)

        ############## MODIFICATION 1: turn masks. Only tokens that the policy samples are supervised; TRL supervises
        # all that follows the prompt, tool output and role headers included.
        self.render_settings = RenderSettings(
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            mask_turns=isinstance(args, MDPOConfig) and args.mask_user_turns,
        )
        ############## MODIFICATION 1 END
        self.drop_counts: dict[str, DropCounts] = {}
        train_dataset, eval_dataset = self._prepare_datasets(train_dataset, eval_dataset, processing_class, args)
        collator = data_collator or PairCollator(processing_class.pad_token_id, args.pad_to_multiple_of)

        ############## MODIFICATION 2: the RPO term (arXiv 2404.19733, eq. 1), for each pair, per supervised token.
        self.nll_coefficient = args.nll_coefficient if isinstance(args, MDPOConfig) else 0.0
        ############## MODIFICATION 2 END
        self.beta = args.beta
        enable_scoring(model.get_base_model() if isinstance(model, PeftModel) else model)
        hooks = {"callbacks": callbacks, "optimizers": optimizers}
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}
        super().__init__(model, args, processing_class=processing_class, **data, **hooks)
        if args.n_gpu > 1:
            raise UserError("Several GPUs are visible to one process. Start it with `accelerate launch`.")
        self.model.add_model_tags(self._tag_names)
        self.ref_model = self._make_reference(ref_model, quantization_config)
        if args.disable_dropout:
            _disable_dropout(self.model)
        self._tables: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._train_tokens = 0  # since the start, this rank

    # ------------------------------------------------------------------------------------------------ set-up

    @staticmethod
    def _load_policy(model, args: DPOConfig, quantization_config):
        if not isinstance(model, str):
            for given, name in ((args.model_init_kwargs, "model_init_kwargs"), (quantization_config, "quantization")):
                if given is not None:
                    raise UserError(f"{name} only takes effect where the model is given by name, not as an object.")
            return model
        kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        return load_model(model, **kwargs)

    @staticmethod
    def _set_pad_token(tokenizer: PreTrainedTokenizerBase, model) -> None:
        """Padding is masked everywhere, so the end-of-sequence token will do where a tokenizer has none."""
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if model.generation_config is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id

    @staticmethod
    def _refuse_aux_loss(model, coefficient: float | None) -> None:
        """TRL adds the load-balancing loss of MoE models unless its coefficient is 0; this trainer has none yet."""
        default = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
        if default if coefficient is None else coefficient:
            raise UserError("router_aux_loss_coef: the auxiliary loss is not supported yet; set it to 0.0.")

    @staticmethod
    def _refuse_small_vocabulary(tokenizer: PreTrainedTokenizerBase, model) -> None:
        size = model.config.get_text_config().vocab_size
        if len(tokenizer) > size:
            raise UserError(
                f"The tokenizer has {len(tokenizer)} tokens, the model an embedding for {size}. "
                "Use the model's own tokenizer, or resize the model's embeddings."
            )

    @staticmethod
    def _wrap_peft(model, peft_config, ref_model, args: DPOConfig):
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise UserError("peft_config was given for a model that already is a PEFT model. Give one of the two.")
            if ref_model is not None:
                raise UserError("With peft_config the reference is the model without its adapter: leave ref_model out.")
            # ZeRO-3 gathers parameters in one dtype: a float32 adapter on a bfloat16 model breaks its buffers.
            zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
            quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
            model = get_peft_model(model, peft_config, autocast_adapter_dtype=quantized or not zero3)
        elif isinstance(model, PeftModel) and ref_model is None:
            raise UserError("A PEFT model as policy needs ref_model; or give the base model and peft_config.")
        if isinstance(model, PeftModel) and args.gradient_checkpointing:
            model.enable_input_require_grads()  # else no gradient reaches a checkpointed layer: embeddings are frozen
            if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
                kwargs = args.gradient_checkpointing_kwargs or {}
                if kwargs.get("use_reentrant") is False:
                    raise UserError("PEFT under ZeRO-3 needs gradient_checkpointing_kwargs: {use_reentrant: true}.")
                args.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": True}
        return model

    def _prepare_datasets(self, train: Dataset, evaluation, tokenizer, args: DPOConfig):
        """Both sets tokenised; several evaluation sets stay a dict."""
        train = self._prepare_dataset(train, tokenizer, args, "train")
        if isinstance(evaluation, dict):
            return train, {k: self._prepare_dataset(v, tokenizer, args, k) for k, v in evaluation.items()}
        return train, None if evaluation is None else self._prepare_dataset(evaluation, tokenizer, args, "eval")

    def _prepare_dataset(self, dataset: Dataset, tokenizer, args: DPOConfig, name: str) -> Dataset:
        if "chosen_ids" not in dataset.column_names:
            with args.main_process_first(desc=f"tokenising {name}"):
                dataset, self.drop_counts[name] = tokenize_dataset(
                    dataset, tokenizer, self.render_settings, name, args.dataset_num_proc
                )
            if args.process_index == 0:
                print("\n".join(self.drop_counts[name].lines()), flush=True)
        if "row" not in dataset.column_names:
            dataset = dataset.add_column("row", list(range(len(dataset))))
        return dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask", "shared_len", "row"]

    def _make_reference(self, ref_model, quantization_config):
        """The frozen model that log ratios are taken against; None where a PEFT policy is its own reference."""
        if ref_model is None and not isinstance(self.model, PeftModel):
            kwargs = {"trust_remote_code": self.args.trust_remote_code, **(self.args.model_init_kwargs or {})}
            if quantization_config is not None:
                kwargs["quantization_config"] = quantization_config
            ############## MODIFICATION 3: a reference other than the starting policy, by name.
            path = getattr(self.args, "ref_model_name_or_path", None)
            ref_model = build_reference(self.model, path, kwargs)
            ############## MODIFICATION 3 END
        return None if ref_model is None else place_reference(ref_model, self.accelerator)

    # ------------------------------------------------------------------------------------------------ the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of this rank's pairs, a scalar; with `return_outputs` also their PairLogps."""
        batch = inputs if "score_index" in inputs else {**inputs, **score_list(*_ids_and_mask(inputs))}
        n_pairs = batch["input_ids"].size(0) // 2
        scores = score_tokens(model, batch)
        policy = sum_by_pair(scores.logps, batch, n_pairs)
        reference_scores = score_reference(
            self.ref_model, model, self.accelerator, batch, self.args.gradient_checkpointing_kwargs
        )
        reference = sum_by_pair(reference_scores.logps, batch, n_pairs)

        chosen_ratio = log_ratio(policy.chosen, reference.chosen)
        rejected_ratio = log_ratio(policy.rejected, reference.rejected)
        losses = sigmoid_loss(chosen_ratio, rejected_ratio, self.beta)
        ############## MODIFICATION 2: the RPO term, added to each pair's loss.
        nll = nll_loss(policy.chosen, policy.chosen_tokens)
        if self.nll_coefficient:
            losses = losses + self.nll_coefficient * nll
        ############## MODIFICATION 2 END

        rewards = (self.beta * chosen_ratio, self.beta * rejected_ratio)
        mode = "train" if self.model.training else "eval"
        self._tables[mode].append(pair_table(batch, scores, losses, rewards, policy, nll))
        if mode == "train":
            self._train_tokens += int(batch["attention_mask"].sum())
        return (losses.mean(), policy) if return_outputs else losses.mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss, None, None

    # ------------------------------------------------------------------------------------------------ metrics

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        self._tables["eval"].clear()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        ############## MODIFICATION 4: evaluation weighted by pairs, each pair once whatever the number of ranks; TRL
        # averages batch means, and pairs that fill up the last batch count twice.
        tables = gather_object([torch.cat(self._tables["eval"]).cpu()])
        self._tables["eval"].clear()
        table = evaluated_once(tables)
        metrics = {**self._shown(summarise(table)), "loss": table[:, 1].mean().item(), "pairs": len(table)}
        ############## MODIFICATION 4 END
        metrics["num_tokens"] = self._tokens_seen()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages since the last log, gathered over ranks. All ranks call it together."""
        if self._tables["train"] and "loss" in logs:
            logs.update(self._shown(mean_over_steps(gather_object([self._tables["train"]]))))
            logs["num_tokens"] = self._tokens_seen()
            self._tables["train"].clear()
        super().log(logs, start_time)

    def _shown(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics if self.nll_coefficient else {k: v for k, v in metrics.items() if k != "nll_loss"}

    def _tokens_seen(self) -> int:
        return sum(gather_object([self._train_tokens]))

    # ------------------------------------------------------------------------------------------------ saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Every checkpoint and the final model are written here: weights, tokenizer, and a look at what was written."""
        folder = output_dir or self.args.output_dir
        super().save_model(folder, _internal_call)
        if self.args.should_save:
            check_saved(folder, expected_weights(self.accelerator.unwrap_model(self.model)))


def _ids_and_mask(inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch from another collator, such as TRL's: ids and completion mask, (2B, T) each."""
    if "completion_mask" not in inputs:
        raise UserError("data_collator: its batches need input_ids, attention_mask and completion_mask, as TRL's have.")
    return inputs["input_ids"], inputs["completion_mask"]


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _refuse_unsupported(args: DPOConfig, model, ref_model, train_dataset, compute_metrics) -> None:
    """What this trainer would have to ignore is an error here, before anything is loaded."""
    for key, only in NOT_YET.items():
        if getattr(args, key) != only:
            raise UserError(f"{key}: {getattr(args, key)!r} is not supported yet; leave it at {only!r}.")
    modes = ("drop", "keep_start") if isinstance(args, MDPOConfig) else ("keep_start",)
    if args.truncation_mode not in modes:
        raise UserError(f"truncation_mode: {args.truncation_mode!r} is not one of {', '.join(modes)}.")
    if train_dataset is None:
        raise UserError("train_dataset is required.")
    if not isinstance(train_dataset, Dataset):
        raise UserError(f"train_dataset must be a datasets.Dataset, not {type(train_dataset).__name__}.")
    if compute_metrics is not None:
        raise UserError("compute_metrics: the logits that it would get are never held. Use the logged metrics.")
    if ref_model is not None and ref_model is model:
        raise UserError("model and ref_model are the same object: leave ref_model out, and a copy is made.")
