"""Merges an adapter that a run saved into its base model: python scripts/merge_adapter.py ADAPTER_FOLDER OUT_FOLDER

Writes safetensors, generation config, tokenizer and chat template: a model as any other, without PEFT. It is loaded
again and has to give the adapter's log-probs, else nothing is written. `--base`: the base model, if the adapter's
own entry does not name it. `--dtype`: of the weights written, else the base's. `--keep_rounded`: a change of which
rounding to half precision takes most is said, not refused, as in a loop, which judges the merged model next. Takes 4
bytes of memory a parameter.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import _clone  # noqa: F401
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from mdpo.config.model_folders import refuse_no_model
from mdpo.config.parsing import read_yaml
from mdpo.console import first_line, say
from mdpo.errors import UserError
from mdpo.masking.tokenizer import fast_tokenizer
from mdpo.reporting.run_report import RESOLVED
from mdpo.runs.entrypoint import run
from mdpo.runs.saved_weights import load_adapters
from mdpo.storage import as_new_files

TEXT = "What is 17 * 11 - 66? Let us compute it: 17 * 11 is 187, and 187 - 66 is 121. The answer is 121."
# The most by which a token's log-prob may differ, in nats; in half precision the written weights are rounded.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
ROUNDED_AWAY = 0.5  # and on average, as a share of what the adapter changes
NOISE = 1e-5  # nats; an adapter that changes less has not been trained


def main(argv: list[str]) -> None:
    args = parse(argv)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (args.adapter / file).is_file():
            raise UserError(
                f"{args.adapter}: no {file} in it, so it is not an adapter that a run has saved.", "adapter"
            )
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} exists and is not an empty folder. Name another one.", "out")
    model, tokenizer, dtype = load(args)
    adapted = log_probs(model, tokenizer)
    with model.disable_adapter():
        base = log_probs(model, tokenizer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".merge-") as scratch:
        draft = Path(scratch, "model")
        merged(model).to(getattr(torch, dtype)).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        as_new_files(draft)
        del model
        check(draft, tokenizer, adapted, base, dtype, args.keep_rounded)
        draft.replace(args.out)  # replaces an empty folder
    say(f"model   {args.out} ({dtype})")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--dtype", choices=list(TOLERANCE))
    parser.add_argument("--keep_rounded", action="store_true")
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def load(args) -> tuple[PeftModel, PreTrainedTokenizerBase, str]:
    """The base with its adapter in float32, the tokenizer, and the dtype to write in. Raises UserError."""
    adapter, config = str(args.adapter), PeftConfig.from_pretrained(str(args.adapter))
    name, revision = args.base or config.base_model_name_or_path, None if args.base else config.revision
    if config.is_prompt_learning:
        raise UserError(
            f"{adapter}: {config.peft_type.value} works beside the weights and cannot be merged.", "adapter"
        )
    if not name:
        raise UserError(f"{adapter}: its adapter_config.json names no base model. Give it: --base.", "base")
    refuse_no_model("--base", name, revision)
    saved = load_file(args.adapter / "adapter_model.safetensors")
    try:
        settings = AutoConfig.from_pretrained(name, revision=revision)
        quantized, options = hasattr(settings, "quantization_config"), {"revision": revision, "dtype": torch.float32}
        base = None if quantized else AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"base model {name!r} cannot be loaded: {first_line(error)}. Give its folder: --base."
        ) from error
    if quantized:
        raise UserError(f"{name} is quantized: nothing merges into it. Give the model it was made of: --base.", "base")
    dtype = args.dtype or str(settings.dtype or torch.float32).removeprefix("torch.")
    if bits := quantized_bits(args.adapter):
        dtype = args.dtype or str(next(iter(saved.values())).dtype).removeprefix("torch.")
        say(f"The run had {name} in {bits} bits. The adapter is merged into its unquantized weights, in {dtype}.")
    mismatch = f"{adapter} does not fit {name}"
    try:
        model = PeftModel.from_pretrained(base, adapter).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{mismatch}: {str(error).strip().splitlines()[-1].strip()}", "adapter") from error
    if others := set(saved) ^ set(get_peft_model_state_dict(model)):
        raise UserError(f"{mismatch}: {len(others)} weights have no counterpart, such as {min(others)}.", "adapter")
    load_adapters(adapter, model)  # PEFT leaves out what it renames wrongly
    return model, fast_tokenizer(adapter if (args.adapter / "tokenizer_config.json").is_file() else name), dtype


def quantized_bits(adapter: Path) -> int | None:
    """Bits of the base's weights in the run, by the recipe beside the adapter or, for a checkpoint, above it."""
    paths = [path for path in (adapter / RESOLVED, adapter.resolve().parent / RESOLVED) if path.is_file()]
    recipe = {setting.key: setting.value for setting in read_yaml(paths[0])} if paths else {}
    return next((bits for bits in (4, 8) if recipe.get(f"load_in_{bits}bit")), None)


def merged(model: PeftModel):
    """The base with the adapter merged into its weights. Raises UserError where PEFT cannot do that."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.tie_word_embeddings and any(isinstance(layer, BaseTunerLayer) for layer in embeddings):
        # Tied weights with an adapter on one of the two: they are untied. PEFT would merge into both.
        head = embeddings[1].get_base_layer() if isinstance(embeddings[1], BaseTunerLayer) else embeddings[1]
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    try:
        return model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError) as error:
        raise UserError(f"PEFT cannot merge this adapter: {first_line(error)}.", "adapter") from error


def log_probs(model, tokenizer) -> torch.Tensor:
    """Of each token of TEXT after the first: (T - 1,), float32, nats."""
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def check(folder: Path, tokenizer, adapted: torch.Tensor, base: torch.Tensor, dtype: str, keep_rounded: bool) -> None:
    """Raises UserError unless the model in `folder` has the adapter's log-probs."""
    merged_logps = log_probs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer)
    gap, change = (merged_logps - adapted).abs(), (base - adapted).abs()
    distance = f"{gap.max():.1e} at most (allowed: {TOLERANCE[dtype]:.0e}) and {gap.mean():.1e} on average"
    say(f"log-probs of {len(merged_logps)} tokens, in nats: merged and adapter differ by {distance}, "
        f"base and adapter by {change.mean():.1e} on average")  # fmt: skip
    if change.mean() <= NOISE:
        say("The adapter changes nothing: it has not been trained.")
    elif dtype != "float32" and gap.mean() > ROUNDED_AWAY * change.mean():
        lost = f"Rounded to {dtype}, most of what the adapter changes is lost."
        if not keep_rounded:
            raise UserError(f"{lost} Write --dtype=float32, or keep it all the same: --keep_rounded.", "dtype")
        say(f"warning: {lost} A higher learning rate or more steps change more.")
    if not gap.max() <= TOLERANCE[dtype]:
        raise UserError(f"The merged model does not have the adapter's log-probs ({gap.max():.1e} nats off): not kept.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
