"""The tokenizer of a recipe, with its chat template, and whether the model goes with it."""

from functools import lru_cache, partial
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from mdpo.types import UserError


def load_tokenizer(model, data, trust_remote_code: bool = False):
    """From `tokenizer_name_or_path`, else from the model's folder or hub name; `chat_template` (a path) replaces its
    template. `model` is trl.ModelConfig, `data` is DataArguments. Raises UserError."""
    name = data.tokenizer_name_or_path or model.model_name_or_path
    key = "tokenizer_name_or_path" if data.tokenizer_name_or_path else "model_name_or_path"
    refuse_missing_folder(key, name)
    revision = None if data.tokenizer_name_or_path else model.model_revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as e:
        raise UserError(
            f"loading model {name!r}: it cannot be had: {_reason(e)}\n"
            f"Where the hub cannot be reached, download it elsewhere and set {key} to the local folder; "
            "for a gated model, log in with `hf auth login`."
        ) from e
    if data.chat_template:
        path = Path(data.chat_template)
        if not path.is_file():
            raise UserError(f"chat_template: {path} does not exist. Give the path of a .jinja file.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def check_model(tokenizer, model, args):
    """What a tokenizer and a model's configuration tell before any weight is loaded; returns that configuration, None
    where the model has none of its own. Raises UserError."""
    name = model.model_name_or_path
    refuse_missing_folder("model_name_or_path", name)
    refuse_pad_token(tokenizer, args.pad_token)
    kwargs = args.model_init_kwargs or {}
    place = {"revision": model.model_revision, "subfolder": kwargs.get("subfolder", "")}
    try:
        if "gguf_file" in kwargs or find_adapter_config_file(name, **place):
            return None  # an adapter's folder, a GGUF file
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **place)
    except (OSError, ValueError, ImportError) as e:
        raise UserError(f"model_name_or_path: {name!r} cannot be had: {_reason(e)}") from e
    refuse_small_vocabulary(tokenizer, config)
    if reference := getattr(args, "ref_model_name_or_path", None):
        try:
            of_reference = AutoConfig.from_pretrained(
                reference, trust_remote_code=args.trust_remote_code, subfolder=place["subfolder"]
            )
        except (OSError, ValueError, ImportError) as e:
            raise UserError(f"ref_model_name_or_path: {reference!r} cannot be had: {_reason(e)}") from e
        refuse_small_vocabulary(tokenizer, of_reference, "ref_model_name_or_path: ")
    refuse_router_loss(args.router_aux_loss_coef, config.get_text_config())
    return config


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refuse_router_loss(wanted: float | None, config) -> None:
    if wanted and not hasattr(config, "output_router_logits"):
        raise UserError(f"router_aux_loss_coef: {config.model_type} is no mixture of experts. Leave it out.")


def refuse_pad_token(tokenizer, wanted: str | None) -> None:
    if wanted is not None and wanted not in tokenizer.get_vocab():
        raise UserError(f"pad_token: {wanted!r} is not in the tokenizer's vocabulary. Leave it out, or name another.")
    if not (wanted or tokenizer.pad_token or tokenizer.eos_token):
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path!r} has neither a pad token nor an end-of-sequence token. Set "
            "pad_token in the recipe to a token of its vocabulary."
        )


def refuse_small_vocabulary(tokenizer, config, key: str = "") -> None:
    """Raises UserError where a token's id lies beyond the model's embeddings. Ids may have holes, so that their number
    does not tell. `config` is the model's, `key` begins the message."""
    size = config.get_text_config().vocab_size
    token, highest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if highest >= size:
        raise UserError(
            f"{key}The tokenizer has {len(tokenizer)} tokens, the model an embedding for {size}. Use the model's own "
            f"tokenizer, or resize the model's embeddings. The highest id is {highest}, of {token!r}."
        )


def refuse_missing_folder(key: str, name: str) -> None:
    """A name that can only be a folder is not asked for at the hub, which takes a while to say no. Raises UserError."""
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~", "models/", "outputs/")) or len(path.parts) > 2
    if local and not path.is_dir():
        hint = " `python scripts/prepare_quickstart.py` makes it." if "smollm2-135m-instruct" in name else ""
        raise UserError(f"{key}: there is no folder {name} (looked in {Path.cwd()}).{hint}")


def token_text(tokenizer):
    """A function (id before, if any; id) -> text. Decoded behind the token before, because a Metaspace decoder drops
    the space of its first token: "▁is" alone is "is", and behind "It" it is " is"."""
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @lru_cache(maxsize=1 << 18)
    def text_of(before: tuple[int, ...], token: int) -> str:
        head, both = decode(list(before)), decode([*before, token])
        return both[len(head) :] if both.startswith(head) and len(both) > len(head) else decode([token])

    return text_of
