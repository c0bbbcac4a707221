"""Before the data: every check that needs neither rows nor weights."""

from mdpo.config.adapters import adapter_config
from mdpo.config.caches import refuse_unwritable
from mdpo.config.late_values import refuse_late_values, refuse_unfit
from mdpo.config.launcher import refuse_parallel_launch
from mdpo.config.model_folders import refuse_unloadable
from mdpo.config.parallelism import refuse_model
from mdpo.config.precision import refuse_two_precisions
from mdpo.config.validation import check_options
from mdpo.console import say
from mdpo.data.prepare import checked_precision
from mdpo.masking.tokenizer import check_model, load_tokenizer
from mdpo.runs.trackers import refuse_silent_trackers


def checked_tokenizer(recipe):
    """(tokenizer, the model's configuration or None), after every check of options, folders, trackers and
    configuration. Raises UserError."""
    args = recipe.training
    with recipe.placed():
        peft_config = adapter_config(recipe.model)
        check_options(args, peft_config, recipe.values)
        refuse_parallel_launch()
        say(*refuse_late_values(args, recipe.model))
        refuse_two_precisions(recipe.values, args)
        refuse_silent_trackers(args)
        refuse_unwritable(args)
        refuse_unloadable(recipe.model, args)
        tokenizer = load_tokenizer(recipe.model, recipe.data, args.trust_remote_code)
        config = check_model(tokenizer, recipe.model, args)
        refuse_unfit(args, peft_config, config)
        say(*refuse_model(config))
    say(f"dtypes: {checked_precision(recipe, config)}")
    return tokenizer, config
