"""What a reference is known by: a digest of its weights and of everything else that its log-probs depend on."""

import json
import os
from pathlib import Path

import torch
import xxhash
from huggingface_hub import constants, snapshot_download
from tqdm.auto import tqdm

from mdpo.attention import own_attention

WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
DIGESTS = "digests.json"  # of weight files by path, size and time of change, so that they are read once
BLOCK = 1 << 24  # bytes
VERSION = 1  # raised by one when the same reference gives other numbers


def default_folder() -> Path:
    """Where reference log-probs are kept unless a recipe says otherwise: beside the models that they come from."""
    return Path(constants.HF_HOME, "mdpo-reference")


def named_digest(name_or_path: str, revision: str | None, cache: Path) -> str:
    """Of a model on disk or in the hub's cache: its weight files and configuration, by content. An adapter's base
    counts too. Reads every file once; `cache` keeps the digests."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(name_or_path, revision=revision, local_files_only=True, allow_patterns=WEIGHTS))
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    known = _read(cache / DIGESTS)
    digests = {path.name: _file_digest(path, known) for path in files}
    _write(cache / DIGESTS, known)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        digests["base"] = named_digest(base, None, cache)
    return xxhash.xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())


def _file_digest(path: Path, known: dict[str, list]) -> str:
    stat, name = path.stat(), str(path.resolve())
    state = [stat.st_size, stat.st_mtime_ns]
    if known.get(name, [])[:2] != state:
        digest = xxhash.xxh3_128()
        with (
            open(path, "rb") as file,
            tqdm(total=stat.st_size, unit="B", unit_scale=True, desc=f"reading {path.name}", delay=3) as bar,
        ):
            while block := file.read(BLOCK):
                digest.update(block)
                bar.update(len(block))
        known[name] = [*state, digest.hexdigest()]
    return known[name][2]


def _read(path: Path) -> dict[str, list]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or damaged: files are read again
        return {}


def _write(path: Path, known: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(known, indent=0), encoding="utf-8")
    os.replace(draft, path)


def weights_digest(model) -> str | None:
    """Of a model in memory, what is being trained of a PEFT model left out: its reference is the rest. None where
    ZeRO-3 has partitioned the weights."""
    digest, adapted = xxhash.xxh3_128(), hasattr(model, "peft_config")
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        if hasattr(weight, "ds_id"):
            return None
        if not isinstance(weight, torch.Tensor) or (adapted and weight.requires_grad):
            continue
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def reference_identity(weights: str, model, quantization, precision: str, packed: bool) -> str:
    """The digest that a reference's log-probs are kept under; `model` is the policy, whose dtype and attention the
    reference has."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    parts = {
        "version": VERSION,
        "weights": weights,
        "dtype": str(inner.dtype),
        "autocast": precision,
        "quantization": None if quantization is None else str(quantization),
        "attention": own_attention(inner),
        "shared_prefix": packed,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


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
