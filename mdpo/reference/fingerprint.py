"""The fingerprint of a reference: a digest of its weights and of everything else that its log-probs depend on."""

import json
from pathlib import Path

import torch
import transformers
import xxhash
from tqdm.auto import tqdm
from transformers.utils.hub import cached_file, extract_commit_hash

from mdpo.forward.modes import base_model
from mdpo.forward.scoring_head import own_attention
from mdpo.storage import read_cache, write_cache

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
BESIDE = ("config.json", "adapter_config.json", "*.py")  # remote code counts too
DIGESTS = "digests.json"  # of weight files by path, size and time of change, so that they are read once
BLOCK = 1 << 24  # bytes
OWN_ADAPTER = "ref"  # the frozen copy of a PEFT policy's own adapter
VERSION = 3  # raised by one when the same reference gives other numbers


def named_digest(name_or_path: str, revision: str | None, cache: Path, subfolder: str = "") -> str | None:
    """Of a model in a folder: its weight files, configuration and code, by content, None where there is no weight file.
    Reads every file once; `cache` keeps the digests. Of a model on the hub: its commit. An adapter's base counts too.
    Raises OSError where the hub is needed and cannot be reached."""
    folder, digests = Path(name_or_path), {}
    if folder.is_dir():
        folder = folder / subfolder
        files = sorted(path for pattern in (*WEIGHTS, *BESIDE) for path in folder.glob(pattern))
        if not any(path.match(pattern) for path in files for pattern in WEIGHTS):
            return None
        cached = read_cache(cache / DIGESTS) or {}
        digests = {path.name: _file_digest(path, cached) for path in files}
        write_cache(cache / DIGESTS, cached)
        adapter = folder / "adapter_config.json"
    else:
        names = ("config.json", "adapter_config.json")
        config, adapter = (_on_hub(name_or_path, name, revision, subfolder) for name in names)
        commit = extract_commit_hash(str(adapter or config), None) if adapter or config else None
        if commit is None:
            return None
        digests = {"hub": name_or_path, "commit": commit, "subfolder": subfolder}
    if adapter and Path(adapter).is_file():
        settings = json.loads(Path(adapter).read_text(encoding="utf-8"))
        digests["base"] = named_digest(settings["base_model_name_or_path"], settings.get("revision"), cache)
        if digests["base"] is None:
            return None
    return xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())


def _on_hub(name: str, file: str, revision: str | None, subfolder: str) -> str | None:
    """Where a small file of a hub model is in the cache, downloaded if need be; None where the model has none."""
    options = {"revision": revision, "subfolder": subfolder, "_raise_exceptions_for_missing_entries": False}
    return cached_file(name, file, **options)


def _file_digest(path: Path, cached: dict[str, list]) -> str:
    stat, name = path.stat(), str(path.resolve())
    state = [stat.st_size, stat.st_mtime_ns]
    if cached.get(name, [])[:2] != state:
        digest = xxhash.xxh3_128()
        with (
            open(path, "rb") as file,
            tqdm(total=stat.st_size, unit="B", unit_scale=True, desc=f"reading {path.name}", delay=3) as bar,
        ):
            while block := file.read(BLOCK):
                digest.update(block)
                bar.update(len(block))
        cached[name] = [*state, digest.hexdigest()]
    return cached[name][2]


def weights_digest(model, whole: bool = False) -> str | None:
    """Of a model in memory, without what is trained of a PEFT model: the rest is its reference; with `whole` all of
    it, as it computes now. None where ZeRO-3 has partitioned the weights."""
    digest, adapted = xxhash.xxh3_128(), hasattr(model, "peft_config") and not whole
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        if hasattr(weight, "ds_id"):
            return None
        if not isinstance(weight, torch.Tensor) or (adapted and weight.requires_grad):
            continue
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    if OWN_ADAPTER in getattr(model, "peft_config", {}):
        config["adapter"] = model.peft_config[OWN_ADAPTER].to_dict()  # its scaling is no weight
    if whole and hasattr(model, "peft_config"):
        config["adapters"] = {name: part.to_dict() for name, part in model.peft_config.items()}
        config["active"] = str(model.active_adapters)
    digest.update(_canonical(config))
    return digest.hexdigest()


def _canonical(settings: dict) -> bytes:
    def plain(value):
        return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)

    return json.dumps(settings, sort_keys=True, default=plain).encode()


def reference_identity(
    weights: str,
    model,
    quantization,
    precision: str,
    packed: bool,
    fused: bool = False,
    init_kwargs: dict | None = None,
    engine_dtype: torch.dtype | None = None,
) -> str:
    """The digest that a reference's log-probs are cached under; `model` is the policy, whose dtype and attention a
    reference by name has, `init_kwargs` what it is loaded with, `engine_dtype` what DeepSpeed casts both to."""
    inner = base_model(model)
    parts = {
        "version": VERSION,
        "weights": weights,
        "dtype": [str(inner.dtype), str(engine_dtype)],
        "autocast": precision,
        "quantization": None if quantization is None else str(quantization),
        "attention": own_attention(inner),
        "shared_prefix": packed,
        "fused_ops": fused,
        "init_kwargs": {k: v for k, v in (init_kwargs or {}).items() if k not in ("dtype", "attn_implementation")},
        "versions": [torch.__version__, transformers.__version__],
    }
    return xxhash.xxh3_128_hexdigest(_canonical(parts))


def cached_length(config) -> float:
    """The longest side, in tokens, whose log-probs depend on nothing but itself. Dynamic and long RoPE change all
    positions of a batch once one side is longer than the model's original length."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    if not any(part.get("rope_type") in ("dynamic", "longrope") for part in kinds):
        return float("inf")
    lengths = [part.get("original_max_position_embeddings") for part in kinds]
    lengths.append(getattr(text, "original_max_position_embeddings", None))
    return min((n for n in lengths if n), default=text.max_position_embeddings)
