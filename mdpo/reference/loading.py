"""Loads a model's weights: all of them from its files, or an error."""

import functools
from pickle import UnpicklingError

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from mdpo.config.model_folders import refuse_adapter
from mdpo.console import first_line
from mdpo.errors import UserError


def load_model(name_or_path: str, **kwargs):
    """A causal language model for training or as reference. Raises UserError where it cannot be loaded completely."""
    refuse_adapter(name_or_path, "model", kwargs.get("revision"), kwargs.get("subfolder", ""))
    _share_secondary_groups()
    subject = f"model {name_or_path!r} cannot be loaded"
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except AssertionError as e:  # nn.Embedding's
        raise UserError(f"{subject}: {first_line(e)}\nIs pad_token_id in its config.json below vocab_size?") from e
    except RuntimeError as e:
        if "ignore_mismatched_sizes" not in str(e):
            raise
        raise UserError(
            f"{subject}: its files have other shapes than its config.json says (see the report above)."
        ) from e
    except (OSError, ValueError, ImportError, SafetensorError, UnpicklingError) as e:
        raise UserError(
            f"{subject}: {first_line(e, innermost=False)}.\n"
            "Where the hub cannot be reached, set model_name_or_path (or ref_model_name_or_path) to a local folder."
        ) from e
    _refuse_missing(subject, loading_info)
    return model


def _share_secondary_groups() -> None:
    """Lets a second model have the secondary partition of ZeRO++ (zero_hpz_partition_size). DeepSpeed 0.19.8 makes the
    ranks' groups anew whenever it partitions a model as it is loaded, and then stops, as they are there already."""
    if not is_deepspeed_zero3_enabled():
        return
    from deepspeed.utils import groups

    make = groups._create_zero_param_parallel_group
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def make_once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            make(size)

    groups._create_zero_param_parallel_group = make_once


def _refuse_missing(subject: str, loading_info: dict) -> None:
    """Raises UserError for weights that are in no file: transformers draws them at random."""
    missing = sorted([*loading_info["missing_keys"], *(name for name, *_ in loading_info["mismatched_keys"])])
    if not missing:
        return
    similar = [name for name in loading_info["unexpected_keys"] if name.endswith(f".{missing[0]}")]
    wrapped = f" The files have it as {similar[0]}: they carry a wrapper's name." if similar else ""
    where = "in no file" if loading_info["missing_keys"] else "in its files in other shapes"
    raise UserError(
        f"{subject}: {len(missing)} of its weights are {where} and would begin at random, such as {missing[0]}."
        f"{wrapped} Are all files there, and is config.json this model's?"
    )
