"""Multi-turn DPO from a recipe.

accelerate launch --config_file zero2_for_dpo.yaml run_dpo.py                       # 8 GPUs, the default recipe
python run_dpo.py recipes/smollm2-135m/dpo/config_quickstart.yaml                   # a laptop
python run_dpo.py RECIPE.yaml --beta=0.2 --max_length=1536                          # any key can be overridden
python run_dpo.py --help                                                            # all keys
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # the imports take seconds; until `set_marker_dir` signals wait
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP})
    try:
        import mdpo  # noqa: F401  it explains what the imports below would fail on
    except ImportError as error:
        sys.exit(f"error: {error}")

from trl import get_peft_config, get_quantization_config

from dpo_trainer import DPOTrainer
from mdpo.config.late_values import check_steps
from mdpo.config.launcher import device_line, refuse_unusable_gpus
from mdpo.config.recipe import load_recipe, model_init_kwargs
from mdpo.console import say
from mdpo.data.positions import check_lengths
from mdpo.data.prepare import prepare_pairs
from mdpo.masking.dates import fix_day
from mdpo.memory.oom import explained
from mdpo.memory.sharding import overlap_reduction, secondary_line
from mdpo.ranks import agreed, row_ranks
from mdpo.reporting.html_page import PAGE, RunPage
from mdpo.reporting.progress import StepTimer, peak_memory_gb, show_progress
from mdpo.reporting.run_report import REPORT, RESOLVED, show_result, write_report
from mdpo.reporting.shown_answers import show_answers
from mdpo.runs.checkpoints import writing
from mdpo.runs.entrypoint import clear_stale_build_locks, run
from mdpo.runs.output_dir import prepare_output_dir, refuse_another_run
from mdpo.runs.preemption import defer_signals, set_marker_dir
from mdpo.runs.preflight import checked_tokenizer
from mdpo.runs.run_fingerprint import content_facts, recipe_facts

LEFT_BEHIND = (("model", ""), ("page", PAGE), ("report", REPORT), ("recipe", RESOLVED))


def main(argv: list[str]) -> None:
    ################
    # Recipe
    ################
    clear_stale_build_locks()  # before TrainingArguments starts DeepSpeed
    recipe = load_recipe(argv)
    args, data = recipe.training, recipe.data
    set_marker_dir(args.output_dir)
    lines = refuse_unusable_gpus(recipe.written.get("use_cpu", False))
    plugin = args.deepspeed_plugin
    lines += filter(None, [overlap_reduction(plugin), secondary_line(plugin, args.world_size)])
    say(f"recipe {recipe.path}", *recipe.notes, _batch_line(args), device_line(args), *lines)

    ################
    # Options, tokenizer, the model's configuration: before the data
    ################
    tokenizer, config = checked_tokenizer(recipe)

    ################
    # Pairs → tokens: every check that needs no weights
    ################
    facts = recipe_facts(recipe.values, args)
    resume = prepare_output_dir(args, facts)
    say(*fix_day(recipe, tokenizer, resume))
    facts |= recipe_facts(recipe.values, args)  # with the day, for a start that resumes from this run
    train_dataset, eval_dataset, data_report = prepare_pairs(recipe, tokenizer, args.output_dir)
    data_report.refuse_bad_rows(data.on_bad_rows, data.max_bad_fraction)
    check_lengths(config, {"the training set": train_dataset, "the held-out set": eval_dataset}, args)
    with recipe.placed():
        say(*check_steps(args, len(train_dataset)))
    facts["contents"] = agreed(lambda: content_facts(recipe, tokenizer, train_dataset))
    if resume:
        refuse_another_run(resume, facts)

    ################
    # Train, evaluate, save, report
    ################
    trainers = []
    with explained(recipe, lambda: trainers[0] if trainers else None, argv):
        timer = StepTimer()
        page = RunPage(timer, data_report.as_dict(), train_dataset, tokenizer)
        trainers.append(trainer := _trainer(recipe, tokenizer, train_dataset, eval_dataset, [timer, page]))
        trainer.run_facts = facts
        show_progress(trainer, timer)
        show_answers(trainer, tokenizer, eval_dataset, page)
        if trainer.is_world_process_zero():
            recipe.write(Path(args.output_dir, RESOLVED))
        result = trainer.train(resume_from_checkpoint=resume)
        after = trainer.evaluate() if eval_dataset is not None else {}
    metrics = {"recipe": recipe.resolved(), "after": after, "train": result.metrics, **timer.figures(args)}
    metrics |= {"peak_memory_gb": peak_memory_gb(args.device), "answers": page.answers}
    with defer_signals(), writing(args.output_dir):  # finishing takes less time than starting again
        trainer.save_model()
        trainer.save_state()
        trainer.create_model_card()
        if trainer.is_world_process_zero():
            report = write_report(args.output_dir, metrics, trainer.state.log_history, data_report.as_dict(), args)
            page.finish(args, trainer.state, report)
            show_result(report)
            say(*(f"{label:7} {Path(args.output_dir, name)}" for label, name in LEFT_BEHIND))


def _trainer(recipe, tokenizer, train_dataset, eval_dataset, callbacks) -> DPOTrainer:
    recipe.training.model_init_kwargs = model_init_kwargs(recipe.model, recipe.training)
    return DPOTrainer(
        model=recipe.model.model_name_or_path,
        args=recipe.training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
        callbacks=callbacks,
    )


def _batch_line(args) -> str:
    pairs, steps, of_row = args.per_device_train_batch_size, args.gradient_accumulation_steps, row_ranks()
    parts, shared = args.world_size // of_row, f"group{'s' * (args.world_size > of_row)} of {of_row} " * (of_row > 1)
    return (
        f"global batch {pairs * steps * parts} = {pairs} pairs per device × {steps} accumulation × {parts} "
        f"{shared}processes"
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
