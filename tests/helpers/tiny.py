"""Small real parts for tests: tokenizers trained on a few sentences, random models of a few thousand weights."""

import json
import re
from functools import cache
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "What is 3 * 4? Let us compute it with Python. The answer is 12. ",
    "```python\nprint(3 * 4)\n```\n```output\n12\n```\nSo the answer is \\boxed{12}.",
    'user assistant system tool model {"name": "get_weather", "arguments": {"city": "Paris"}} It is sunny in Paris.',
    "Search the web, read the page and report what it says about rivers, hills and trains. Thank you, that is right.",
]
# Control tokens of the published families; thinking and tool tags are added tokens too, but not special ones.
CONTROL = re.compile(
    r"<\|[^|<>{}\s]+\|>|<｜[^｜<>]+｜>|<\|(?:turn|channel|tool|tool_call|tool_response|think)>"
    r"|<(?:turn|channel|tool|tool_call|tool_response)\|>|<(?:start|end)_of_(?:turn|utterance)>|\[gMASK\]|<sop>|</?s>"
    r"|\[/?INST\]|<bos>|<eos>"
)
TAGS = re.compile(r"</?(?:think|tool_call|tool_response)>")


@cache
def tokenizer_for(template: str, kind: str = "byte", eos: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the template's own markers as special tokens. `kind` is byte (GPT-2 style), letters (the
    same without merges: a token a byte), metaspace (Llama style, byte fallback) or always (which also puts a space
    before the first word behind each special token)."""
    specials = list(dict.fromkeys(["<bos>", "<eos>", "<pad>", *CONTROL.findall(template)]))
    if kind in ("byte", "letters"):
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600 if kind == "byte" else 256,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        raw.normalizer = normalizers.Replace(" ", "▁")
        scheme = "always" if kind == "always" else "never"
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(vocab_size=443, max_token_length=12, show_progress=False)
    raw.train_from_iterator(CORPUS * 3, trainer)
    if kind in ("metaspace", "always"):  # bytes to fall back on are ordinary tokens, as in Llama's vocabulary
        state = json.loads(raw.to_str())
        for token in ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]:
            state["model"]["vocab"][token] = len(state["model"]["vocab"])
        raw = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token=eos or "<eos>", pad_token="<pad>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": specials[3:]})
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in sorted(set(TAGS.findall(template)))])
    tokenizer.name_or_path = f"tiny-{kind}"
    return tokenizer


def trl_template(name: str) -> str:
    return (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def tiny_llama(tokenizer, seed: int = 0, layers: int = 2, **config):
    """A random Llama of a few ten thousand weights in float32, spread widely enough that log-probs differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{"initializer_range": 0.3, **sizes, **config},
    )
    return LlamaForCausalLM(config).eval()


def save_workshop(folder: Path, tokenizer, keys: str) -> None:
    """Into a folder: a tiny model, four pairs, and a recipe that trains it on a CPU in float32, ended by `keys`."""
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(tokenizer, hidden_size=16, intermediate_size=16).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in agent_rows(4)), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"model_name_or_path: {folder}/model\ndtype: float32\ndataset_mixer: {{{folder}/pairs.jsonl: 1.0}}\n"
        "max_length: 400\nlearning_rate: 1.0e-2\nreport_to: none\nbf16: false\nuse_cpu: true\nfused_ops: false\n" + keys
    )


def tiny_mixtral(tokenizer, seed: int = 0):
    """A random Mixtral with 4 experts, 2 of them for each token."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        router_aux_loss_coef=0.02,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return MixtralForCausalLM(config).eval()


def agent_rows(n: int = 8) -> list[dict]:
    """Implicit-prompt pairs with tool output between turns; lengths differ from pair to pair and side to side."""
    rows = []
    for i in range(n):
        user = {"role": "user", "content": f"What is {i} * {i + 3}? Use Python."}

        def side(expression, output, answer, user=user):
            return [
                user,
                {"role": "assistant", "content": f"Let us compute it.\n```python\nprint({expression})\n```"},
                {"role": "user", "content": f"```output\n{output}\n```"},
                {"role": "assistant", "content": answer},
            ]

        right = i * (i + 3)
        good = side(f"{i} * {i + 3}", right, f"The answer is \\boxed{{{right}}}." + " It is right." * (i % 3))
        bad = side(f"{i} + {i + 3}", 2 * i + 3, f"So \\boxed{{{2 * i + 3}}}." + " Thank you." * (i % 2))
        rows.append({"chosen": good, "rejected": bad})
    return rows
