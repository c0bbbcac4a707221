"""The tokenizer of a recipe, with its chat template, and whether the model fits it."""

from functools import lru_cache, partial
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.peft_utils import find_adapter_config_file

from mdpo.console import first_line, say
from mdpo.errors import UserError

_MARK = "\ufeff"  # what an editor may put in front of a file


def load_tokenizer(model, data, trust_remote_code: bool = False):
    """From `tokenizer_name_or_path`, else from the model's folder or hub name; `chat_template` (a path) replaces its
    template. `model` is trl.ModelConfig, `data` is DataArguments. Raises UserError."""
    name = data.tokenizer_name_or_path or model.model_name_or_path
    key = "tokenizer_name_or_path" if data.tokenizer_name_or_path else "model_name_or_path"
    refuse_missing_folder(key, name)
    revision = None if data.tokenizer_name_or_path else model.model_revision
    try:
        tokenizer = fast_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, RuntimeError) as e:
        advice = "" if isinstance(e, ImportError) or Path(name).is_dir() else (
            f"\nWhere the hub cannot be reached, download it elsewhere and set {key} to the local folder; "
            "for a gated model, log in with `hf auth login`."
        )  # fmt: skip
        raise UserError(f"loading model {name!r}: it cannot be loaded: {first_line(e, innermost=False)}{advice}") from e
    if data.chat_template:
        tokenizer.chat_template = read_template(Path(data.chat_template))
    elif (template := _without_mark(tokenizer.chat_template)) != tokenizer.chat_template:
        tokenizer.chat_template = template
        say(f"chat template of {name}: its byte order mark, which is no part of it, is left out.")
    return tokenizer


def fast_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False):
    """AutoTokenizer's, which has to report where tokens are in their text. mistral-common's own class, which
    AutoTokenizer prefers where that package is installed, does not, and has no chat template: the model's
    tokenizer.json is taken, as without that package. Raises UserError, and what transformers raises."""
    advice = (
        "Set tokenizer_name_or_path to a folder or hub name that has the same tokenizer as a tokenizer.json (for "
        "Mistral's models the one in transformers' format)."
    )
    files = {path.name for path in Path(name).glob("t*")}
    if "tekken.json" in files and not {"tokenizer.json", "tokenizer.model"} & files:
        raise UserError(f"{name} has its tokenizer as tekken.json alone, for mistral-common. {advice}", "tokenizer")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(name, mistral_format=False, **options)
    if type(tokenizer).__name__.startswith("MistralCommon"):  # by its own tokenizer_config.json
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, revision=revision or "main")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"The tokenizer of {name!r} is a {type(tokenizer).__name__}, not a fast one: it cannot report where tokens "
            f"are in their text. {advice}"
        )
    return tokenizer


def read_template(path: Path) -> str:
    """A chat template's text, a byte order mark left out. Raises UserError."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"chat_template: {path} {problem}. Give the path of a .jinja file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"chat_template: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"chat_template: {path} cannot be read: {error.strerror}.") from None
    if not text.strip() or "\0" in text:
        raise UserError(
            f"chat_template: {path} is {'UTF-16 or binary' if text.strip() else 'empty'}; save it as UTF-8."
        )
    return text


def _without_mark(template):
    """Of a tokenizer's chat template, one text or several by name."""
    if isinstance(template, dict):
        return {name: text.removeprefix(_MARK) for name, text in template.items()}
    return template and template.removeprefix(_MARK)


def check_model(tokenizer, model, args):
    """Checks a tokenizer and a model's configuration before any weight is loaded; returns that configuration, None
    where the model has none of its own. Raises UserError."""
    name = model.model_name_or_path
    refuse_missing_folder("model_name_or_path", name)
    refuse_pad_token(tokenizer, args.pad_token)
    kwargs = args.model_init_kwargs or {}
    source = {"revision": model.model_revision, "subfolder": kwargs.get("subfolder", "")}
    try:
        if "gguf_file" in kwargs or find_adapter_config_file(name, **source):
            return None  # an adapter's folder, a GGUF file
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **source)
    except (OSError, ValueError, ImportError) as e:
        raise UserError(f"model_name_or_path: {name!r} cannot be loaded: {first_line(e, innermost=False)}") from e
    refuse_small_vocabulary(tokenizer, config)
    if reference := args.ref_model_name_or_path:
        try:
            reference_config = AutoConfig.from_pretrained(
                reference, trust_remote_code=args.trust_remote_code, subfolder=source["subfolder"]
            )
        except (OSError, ValueError, ImportError) as e:
            raise UserError(
                f"ref_model_name_or_path: {reference!r} cannot be loaded: {first_line(e, innermost=False)}"
            ) from e
        refuse_small_vocabulary(tokenizer, reference_config, "ref_model_name_or_path: ")
    refuse_router_loss(args.router_aux_loss_coef, config.get_text_config())
    return config


def refuse_router_loss(wanted: float | None, config) -> None:
    if wanted and not hasattr(config, "output_router_logits"):
        raise UserError(f"router_aux_loss_coef: {config.model_type} is no mixture of experts. Leave it out.")


def refuse_pad_token(tokenizer, wanted: str | None) -> None:
    if wanted is not None and wanted not in tokenizer.get_vocab():
        raise UserError(f"pad_token: {wanted!r} is not in the tokenizer's vocabulary. Leave it out, or name another.")
    if not (wanted or tokenizer.pad_token or tokenizer.eos_token):
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path!r} has neither a pad token nor an end-of-sequence token. Set "
            "pad_token in the recipe to a token of its vocabulary.",
            key="pad_token",
        )


def refuse_small_vocabulary(tokenizer, config, key: str = "") -> None:
    """Raises UserError where a token's id is beyond the model's embeddings. Ids may have gaps, so that their number
    does not tell. `config` is the model's, `key` begins the message."""
    size = config.get_text_config().vocab_size
    token, highest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if highest >= size:
        raise UserError(
            f"{key}The tokenizer has {len(tokenizer)} tokens, the model an embedding for {size}. Use the model's own "
            f"tokenizer, or resize the model's embeddings. The highest id is {highest}, of {token!r}."
        )


def refuse_missing_folder(key: str, name: str) -> None:
    """Raises UserError for a name that can only be a folder and is none: the hub would take a while to say no."""
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
