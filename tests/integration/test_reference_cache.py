"""Reference log-probs on disk: what finds them again, what does not, and what becomes of damaged and missing shards."""

import gc
import os
import shutil
import weakref
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, List, Value
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pairs import tiny
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.numpy import save_file
from tiny import agent_rows, tiny_llama
from trainers import own, trainer_of
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

import mdpo.reference.frozen
from dpo_trainer import DPOTrainer
from mdpo.config.parsing import ROOT
from mdpo.config.recipe import load_recipe
from mdpo.forward.collators import PackedCollator, PairCollator
from mdpo.forward.layout import Layout
from mdpo.forward.token_logps import score_tokens
from mdpo.reference import logp_cache as reference_cache
from mdpo.reference import logp_columns as reference_columns
from mdpo.reference.fingerprint import cached_length, named_digest, reference_identity, weights_digest
from mdpo.reference.logp_cache import ReferenceCache, by_sequence, precompute, read_shard, write_shard
from mdpo.reference.model import as_reference, keep_own_adapter
from mdpo.reference.sequences import Sequences, batches, pair_keys
from mdpo.types import PairBatch, sequence_lengths, split

SAME = {"derandomize": True, "deadline": None, "database": None}  # the same examples each time
OLD_KEY = "412383b12b114b070d61cb8102cf3368"
KEYS = [bytes([i]) * 16 for i in range(4)]
COMPUTED = reference_cache._computed
COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")


def logps_of(n):
    return np.arange(n, dtype=np.float32) - 0.5


def by_key(arrays):
    """key -> log-probs of a sequence, from a shard's arrays."""
    parts = np.split(arrays["logps"], arrays["counts"].reshape(-1).cumsum()[:-1])
    return {key.tobytes(): part for key, part in zip(arrays["keys"], parts, strict=True)}


def loaded(cache):
    """(sequences of all shards, lines about damaged ones)."""
    found, damaged = {}, []
    for arrays in cache.shards(damaged):
        found |= by_key(arrays)
    return found, damaged


def test_a_shard_gives_back_what_was_written(tmp_path):
    written = {KEYS[0]: logps_of(3), KEYS[1]: logps_of(0), KEYS[2]: logps_of(5)}
    write_shard(tmp_path / "a.safetensors", written)
    found = by_key(read_shard(tmp_path / "a.safetensors"))
    assert list(found) == list(written)
    assert all(np.array_equal(found[key], logps) for key, logps in written.items())
    assert not list(tmp_path.glob("*.tmp"))


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 7),
    "empty": lambda path: os.truncate(path, 0),
    "a flipped bit": flip_a_byte,
    "no shard": lambda path: path.write_text("not a shard"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_named_and_removed(damage, tmp_path):
    cache = ReferenceCache(tmp_path)
    for key in KEYS[:2]:
        cache.add(key, logps_of(4))
        cache.flush()
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    DAMAGE[damage](first)
    found, lines = loaded(cache)
    assert list(found) == [KEYS[1]]
    assert len(lines) == 1 and str(first) in lines[0] and "computed again" in lines[0]
    assert not first.exists()
    assert loaded(cache)[1] == []


def test_shards_are_written_as_time_passes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reference_cache.time, "monotonic", lambda: now[0])
    cache = ReferenceCache(tmp_path)
    for i, seconds in enumerate((10, 20, 31, 40)):
        now[0] = seconds
        cache.add(KEYS[i], logps_of(2))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # at 31 s, with three sequences
    assert set(loaded(cache)[0]) == set(KEYS[:3])


# ------------------------------------------------------------------------------------------------ keys and identities


def tokenized(**changes):
    row = {"chosen_ids": [5, 6, 7], "chosen_mask": [0, 1, 1], "rejected_ids": [5, 8], "rejected_mask": [0, 1]}
    return Dataset.from_list([{**row, **changes}])


def test_keys_change_with_ids_masks_and_reference_alone():
    def keys(dataset, identity):
        return [key.tobytes() for key in Sequences.of(dataset, identity).keys]

    chosen, rejected = keys(tokenized(), "a")
    assert len(chosen) == 16 and keys(tokenized(), "a") == [chosen, rejected]
    assert keys(tokenized(margin=2.0, chosen_weights=[1.0, 0.5, 1.0], key="x", chosen_lengths=[3]), "a")[0] == chosen
    others = [
        *keys(tokenized(), "b"),
        keys(tokenized(chosen_ids=[5, 6, 9]), "a")[0],
        keys(tokenized(chosen_mask=[0, 0, 1]), "a")[0],
        keys(tokenized(rejected_mask=[0, 0]), "a")[1],
        *keys(tokenized(chosen_ids=[5, 6], chosen_mask=[0, 1], rejected_ids=[7, 5, 8], rejected_mask=[1, 0, 1]), "a"),
    ]
    assert len({chosen, rejected, *others}) == 9


def test_a_sequence_has_one_key_wherever_it_stands():
    """As chosen, as rejected, as one of several; null, empty and missing lengths are those of one sequence."""
    mask = [0, 1, 1]
    rows = Dataset.from_list([
        {"chosen_ids": [5, 6, 7], "chosen_mask": mask, "chosen_lengths": None,
         "rejected_ids": [5, 8], "rejected_mask": [0, 1], "rejected_lengths": []},
        {"chosen_ids": [5, 8, 5, 6, 7], "chosen_mask": [0, 1, *mask], "chosen_lengths": [2, 3],
         "rejected_ids": [5, 6, 7, 9, 9, 5, 8], "rejected_mask": [*mask, 0, 1, 0, 1], "rejected_lengths": [3, 2, 2]},
    ])  # fmt: skip
    sequences = Sequences.of(rows, "a")
    assert sequences.per_side.tolist() == [[1, 1], [2, 3]] and sequences.first_of_row.tolist() == [0, 2]
    assert sequences.tokens.tolist() == [3, 2, 2, 3, 3, 2, 2] and sequences.row.tolist() == [0, 0, 1, 1, 1, 1, 1]
    distinct = reference_columns.Distinct(sequences.keys)
    assert distinct.of_key.tolist() == [0, 1, 1, 0, 0, 2, 1] and distinct.first.tolist() == [0, 1, 5]
    selected = Sequences.of(rows.select([1]), "a")
    assert selected.keys.tolist() == sequences.keys[2:].tolist()
    plain = rows.select([0]).remove_columns(["chosen_lengths", "rejected_lengths"])
    assert Sequences.of(plain, "a").keys.tolist() == sequences.keys[:2].tolist()


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 2)), st.lists(st.tuples(*[st.integers(0, 4)] * 2)))
def test_keys_are_found_also_where_their_halves_are_alike(known, asked):
    """Beside a dictionary. Keys of two numbers, eight bytes each, so few that many have a half in common."""

    def keys_of(halves):
        return np.array(halves, np.uint64).reshape(-1, 2).view(np.uint8).reshape(-1, 16)

    numbers = {key: n for n, key in enumerate(dict.fromkeys(known))}
    distinct = reference_columns.Distinct(keys_of(known))
    assert distinct.of_key.tolist() == [numbers[key] for key in known]
    assert distinct.places(keys_of(asked)).tolist() == [numbers.get(key, -1) for key in asked]


def test_pairs_of_sequences_for_the_collator():
    """Two by two whatever row and side they are of; an odd last one on both sides."""
    rows = Dataset.from_list([
        {"chosen_ids": [5, 6, 7, 5, 6], "chosen_mask": [0, 1, 1, 0, 0], "chosen_lengths": [3, 2],
         "rejected_ids": [5, 8], "rejected_mask": [0, 1], "rejected_lengths": []},
        {"chosen_ids": [1, 2], "chosen_mask": [0, 1], "chosen_lengths": [],
         "rejected_ids": [1, 2, 3], "rejected_mask": [0, 1, 1], "rejected_lengths": []},
    ])  # fmt: skip
    first, second = Sequences.of(rows, "").pairs(rows, np.array([0, 1, 4]))
    assert first == {"chosen_ids": [5, 6, 7], "chosen_mask": [0, 1, 1], "rejected_ids": [5, 6],
                     "rejected_mask": [0, 0], "row": 0}  # fmt: skip
    assert second == {"chosen_ids": [1, 2, 3], "chosen_mask": [0, 1, 1], "rejected_ids": [1, 2, 3],
                      "rejected_mask": [0, 1, 1], "row": 1}  # fmt: skip


def sequences_of(tokens, row):
    per_side = np.stack([np.ones(max(row) + 1, np.int64), np.bincount(row) - 1], 1)
    return Sequences(np.zeros((len(row), 16), np.uint8), np.array(tokens), np.array(row), per_side)


def in_batches(sequences, prompts, size, todo=None):
    todo = np.arange(len(sequences.tokens)) if todo is None else np.array(todo)
    return [batch.tolist() for batch in batches(sequences, todo, prompts, size)]


def test_batches_by_hand():
    """Rows of two sequences each: in batches of two pairs, those with the longest sequence first. Rows 0 and 3 have one
    prompt: together they come first, as row 3 has the longest sequence. Where nothing is shared, by length alone."""
    sequences = sequences_of([5, 4, 9, 2, 7, 7, 3, 10], [0, 0, 1, 1, 2, 2, 3, 3])
    assert in_batches(sequences, np.arange(4), 4) == [[6, 7, 2, 3], [4, 5, 0, 1]]
    assert in_batches(sequences, np.array([0, 1, 2, 0]), 4) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert in_batches(sequences, None, 4) == [[7, 2, 4, 5], [0, 1, 6, 3]]
    # Of row 3 one side is cached: the rest of the first prompt takes one place less.
    assert in_batches(sequences, np.array([0, 1, 2, 0]), 4, [0, 1, 2, 3, 4, 5, 6]) == [[2, 3, 4, 5], [0, 1, 6]]
    # A row of three sequences stays together, though a batch is of one pair; so does each of the others.
    assert in_batches(sequences_of([4, 4, 4, 9, 1], [0, 0, 0, 1, 1]), np.zeros(2, int), 2) == [[3, 4], [0, 1, 2]]
    # Of five pairs with one chosen side: four answers more.
    assert in_batches(sequences_of([9, 8, 7, 6, 5, 4], [0, 0, 1, 2, 3, 4]), np.zeros(5, int), 4) == [
        [0, 1, 2, 3],
        [4, 5],
    ]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20), st.integers(1, 4))
@settings(**SAME)
def test_pairs_of_prompts_of_their_own_are_scored_as_before(lengths, pairs):
    """By rows, those with the longest side first: the batches of the version that cached pairs, so that its numbers."""
    n, longest = len(lengths), np.array(lengths).max(1)
    sequences = sequences_of(np.array(lengths).reshape(-1), np.repeat(np.arange(n), 2))
    order = np.argsort(-longest, kind="stable")
    wanted = [order[i : i + pairs] for i in range(0, n, pairs)]
    found = in_batches(sequences, np.arange(n), 2 * pairs)
    assert found == [[number for row in rows for number in (2 * row, 2 * row + 1)] for rows in wanted]


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(1, 6),
    st.randoms(),
    st.booleans(),
)
@settings(**SAME)
def test_every_sequence_is_in_one_batch(per_row, n_prompts, pairs, random, packed):
    row = np.repeat(np.arange(len(per_row)), per_row)
    sequences = sequences_of([random.randint(1, 30) for _ in row], row)
    todo = sorted(random.sample(range(len(row)), random.randint(1, len(row))))
    prompts = np.array([random.randrange(n_prompts) for _ in per_row]) if packed else None
    found = in_batches(sequences, prompts, 2 * pairs, todo)
    assert sorted(number for batch in found for number in batch) == todo
    padded = [len(batch) * max(sequences.tokens[batch]) for batch in found]
    if not packed:
        assert all(len(batch) == 2 * pairs for batch in found[:-1])
        return
    assert padded == sorted(padded, reverse=True)
    of_row = {}
    for i, batch in enumerate(found):
        assert len(batch) <= 2 * pairs or len(set(row[batch])) == 1
        for number in batch:
            of_row.setdefault(row[number], set()).add(i)
    assert all(len(places) == 1 for places in of_row.values())
    by_prompt = {p: [n for n in todo if prompts[row[n]] == p] for p in set(prompts[row[todo]].tolist())}
    for numbers in by_prompt.values():
        if len(numbers) <= 2 * pairs:
            assert len({i for number in numbers for i in of_row[row[number]]}) == 1


def test_digest_of_files_is_by_content(tmp_path, tokenizer):
    tiny_llama(tokenizer, seed=0).save_pretrained(tmp_path / "a")
    digest = named_digest(str(tmp_path / "a"), None, tmp_path / "cache")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    assert named_digest(str(tmp_path / "elsewhere"), None, tmp_path / "cache") == digest
    tiny_llama(tokenizer, seed=1).save_pretrained(tmp_path / "a")  # the same files' names and sizes
    assert named_digest(str(tmp_path / "a"), None, tmp_path / "cache") != digest
    (tmp_path / "cache" / "digests.json").write_text("{broken")
    assert named_digest(str(tmp_path / "elsewhere"), None, tmp_path / "cache") == digest


def test_digest_of_an_adapter_counts_its_base(tmp_path, tokenizer):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tiny_llama(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora).save_pretrained(tmp_path / "adapter")
    digest = named_digest(str(tmp_path / "adapter"), None, tmp_path)
    tiny_llama(tokenizer, seed=1).save_pretrained(tmp_path / "base")
    assert named_digest(str(tmp_path / "adapter"), None, tmp_path) != digest


def test_digest_of_weights_in_memory(tokenizer):
    model = tiny_llama(tokenizer, seed=0)
    digest = weights_digest(model)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = [weights_digest(get_peft_model(tiny_llama(tokenizer, seed=0), lora)) for _ in range(2)]
    assert adapted[0] == adapted[1]  # another random adapter: what is trained is not the reference
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert weights_digest(model) != digest
    assert weights_digest(model.half()) not in (digest, weights_digest(model.float()))
    model.model.norm.weight.ds_id = 0  # what ZeRO-3 leaves on a weight
    assert weights_digest(model) is None


def test_only_weight_files_tell_a_model(tmp_path, tokenizer):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert named_digest(str(tmp_path / "a"), None, tmp_path) is None
    (tmp_path / "a" / "m.gguf").write_text("1")
    (tmp_path / "b" / "m.gguf").write_text("2")
    digests = [named_digest(str(tmp_path / name), None, tmp_path) for name in ("a", "b")]
    (tmp_path / "b" / "modeling_own.py").write_text("x = 1")
    assert len({*digests, named_digest(str(tmp_path / "b"), None, tmp_path)}) == 3


def test_a_model_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    def cached(name, file, revision, subfolder, **_):
        if file != "config.json":
            return None
        return str(tmp_path / f"models--org--m/snapshots/{revision * 40}/config.json")

    monkeypatch.setattr("mdpo.reference.fingerprint.cached_file", cached)
    one, again, other = (named_digest("org/m", revision, tmp_path) for revision in "aab")
    assert one == again != other
    monkeypatch.setattr("mdpo.reference.fingerprint.cached_file", lambda *_, **__: None)
    assert named_digest("org/m", "a", tmp_path) is None


def test_scaling_of_an_own_adapter_counts(tokenizer):
    digests = []
    for alpha in (4, 8):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(tokenizer, seed=0), lora)
        keep_own_adapter(model)
        digests.append(weights_digest(model))
    assert digests[0] != digests[1]


ADAPTERS = {
    "LoRA": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    "LoRA on embeddings": LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    ),
    "IA3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM",
        init_ia3_weights=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("adapter", ["default", "model", "layers"])  # parts of other names, too
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_own_adapter_is_copied_whole(kind, adapter, tokenizer):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(tokenizer, seed=0), ADAPTERS[kind], adapter_name=adapter).eval()
    ids = torch.arange(3, 12)[None]
    before = model(ids).logits
    with model.disable_adapter():
        assert (model(ids).logits - before).abs().max() > 1e-3
    keep_own_adapter(model)
    torch.testing.assert_close(model(ids).logits, before)
    with torch.no_grad():  # what training does
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight += 0.1
    assert (model(ids).logits - before).abs().max() > 1e-3
    with as_reference(model):
        torch.testing.assert_close(model(ids).logits, before)


def test_a_shard_that_the_disk_does_not_give_stays(tmp_path, monkeypatch):
    write_shard(tmp_path / "1.safetensors", {b"k" * 16: np.zeros(1, np.float32)})
    monkeypatch.setattr(reference_cache, "read_shard", lambda path: (_ for _ in ()).throw(OSError("stale handle")))
    found, lines = loaded(ReferenceCache(tmp_path))
    assert found == {} and "cannot be read now (stale handle)" in lines[0]
    assert (tmp_path / "1.safetensors").exists()


def test_identity_changes_with_all_that_changes_numbers():
    model, half = tiny("Llama"), tiny("Llama").half()
    sdpa = tiny("Llama")
    sdpa.set_attn_implementation("sdpa")
    settings = [("w", model, None, "no", True), ("v", model, None, "no", True), ("w", half, None, "no", True),
                ("w", sdpa, None, "no", True), ("w", model, {"bits": 4}, "no", True), ("w", model, None, "bf16", True),
                ("w", model, None, "no", False), ("w", model, None, "no", True, True),
                ("w", model, None, "no", True, False, {"rope_scaling": 2})]  # fmt: skip
    assert len({reference_identity(*s) for s in settings}) == len(settings)


def test_longest_length_that_is_cached():
    assert cached_length(LlamaConfig()) == float("inf")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert cached_length(LlamaConfig(max_position_embeddings=64, rope_parameters=dynamic)) == 64
    long = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    long |= {"original_max_position_embeddings": 32}
    config = Phi3Config(max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=long)
    assert cached_length(config) == 32


# ------------------------------------------------------------------------------------------------------ in the trainer


@pytest.fixture
def folders(tmp_path, tokenizer):
    tiny_llama(tokenizer, seed=0).save_pretrained(tmp_path / "policy")
    tiny_llama(tokenizer, seed=1).save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    """The sequences that references score, as the trainer asks for them, batch by batch; of an odd number the last one
    is in its batch twice."""
    counts = []
    score = mdpo.reference.frozen.score_reference

    def counted(reference, policy, accelerator, batch, *args):
        counts.append(2 * len(batch["row"]))
        return score(reference, policy, accelerator, batch, *args)

    monkeypatch.setattr(mdpo.reference.frozen, "score_reference", counted)
    return counts


def run(folders, tokenizer, rows=None, out="out", **options):
    options = {"precompute_ref_log_probs": True, "reference_cache_dir": str(folders / "cache"), **options}
    return own(folders / out, tokenizer, str(folders / "policy"), rows=rows or agent_rows(8), **options)


def columns(trainer):
    return [trainer.train_dataset[name] for name in COLUMNS]


def test_a_second_run_scores_nothing_and_loads_no_reference(folders, tokenizer, scored, monkeypatch, capsys):
    reference = {"ref_model_name_or_path": str(folders / "reference")}
    first = run(folders, tokenizer, **reference)
    assert sum(scored) == 16  # evaluated rows are the same ones
    monkeypatch.setattr(mdpo.reference.frozen, "build_reference", None)  # would fail
    shutil.move(folders / "policy", folders / "moved")
    shutil.copytree(folders / "moved", folders / "policy")
    capsys.readouterr()
    again = run(folders, tokenizer, out="other", beta=0.7, learning_rate=1e-5, loss_type=["ipo"], **reference)
    assert sum(scored) == 16
    assert columns(again) == columns(first)
    assert f"reference log-probs of train: 16 of 16 sequences from {folders / 'cache'}" in capsys.readouterr().out


def test_values_are_those_of_the_slow_twin(folders, tokenizer):
    """Scored batch by batch in training, without any cache, packed and padded."""
    wanted = []
    for packed in (True, False):
        live = run(folders, tokenizer, precompute_ref_log_probs=False, reference_cache_dir=None, shared_prefix=packed,
                   ref_model_name_or_path=str(folders / "reference"))  # fmt: skip
        batch = live.data_collator([live.train_dataset[i] for i in range(8)])
        wanted.append(
            mdpo.reference.frozen.score_reference(
                live.ref_model, live.model, live.accelerator, batch, live.layout
            ).logps
        )
    trainer = run(folders, tokenizer, ref_model_name_or_path=str(folders / "reference"))
    got = torch.tensor([x for column in columns(trainer) for row in column for x in row])
    for logps in wanted:
        torch.testing.assert_close(got, logps, rtol=1e-5, atol=1e-5)


CHANGES = {
    "turn weights": ({"weight": 0.5}, {}, 0),
    "a changed side": ({"content": "It is another."}, {}, 2),  # one sequence, on both sides of its pair
    "masks": ({}, {"mask_user_turns": False}, 16),
    "the layout": ({}, {"shared_prefix": False}, 16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_change_costs(name, folders, tokenizer, scored):
    change, options, cost = CHANGES[name]
    run(folders, tokenizer)
    rows = agent_rows(8)
    rows[3]["chosen"][3].update(change)
    before = sum(scored)
    run(folders, tokenizer, rows, **options)
    assert sum(scored) - before == cost


def test_another_reference_costs_all_rows(folders, tokenizer, scored):
    first = run(folders, tokenizer)
    tiny_llama(tokenizer, seed=5).save_pretrained(folders / "policy")
    other = run(folders, tokenizer)
    assert sum(scored) == 32
    assert columns(first) != columns(other)


def test_a_killed_pass_goes_on_where_its_last_shard_ends(folders, tokenizer, scored, monkeypatch):
    monkeypatch.setattr(reference_cache, "SHARD_S", -1.0)  # a shard for each sequence
    score = mdpo.reference.frozen.score_reference

    def killed(*args):
        if sum(scored) == 10:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(mdpo.reference.frozen, "score_reference", killed)
    options = {"precompute_ref_batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        run(folders, tokenizer, **options)
    monkeypatch.setattr(mdpo.reference.frozen, "score_reference", score)
    shards = sorted((folders / "cache").glob("*/*.safetensors"))
    assert len(shards) == 10
    os.truncate(shards[0], 100)
    run(folders, tokenizer, **options)
    assert sum(scored) == 10 + 6 + 2  # six that were missing, and one that was damaged, on both sides of its pair


def test_equal_rows_are_scored_once(folders, tokenizer, scored):
    trainer = run(folders, tokenizer, agent_rows(4) * 2)
    assert sum(scored) == 8
    assert trainer.train_dataset[0][COLUMNS[0]] == trainer.train_dataset[4][COLUMNS[0]]


def test_what_both_sides_of_a_pair_begin_with_is_computed_once(folders, tokenizer, monkeypatch):
    computed, score = [], mdpo.reference.frozen.score_reference

    def watched(reference, policy, accelerator, batch, *args):
        computed.append(batch.input_ids.numel())
        return score(reference, policy, accelerator, batch, *args)

    monkeypatch.setattr(mdpo.reference.frozen, "score_reference", watched)
    rows = run(folders, tokenizer, precompute_ref_batch_size=3).train_dataset
    assert (
        0 < sum(computed) <= sum(rows["distinct"]) < 0.8 * sum(map(len, [*rows["chosen_ids"], *rows["rejected_ids"]]))
    )


def test_the_reference_leaves_memory(folders, tokenizer, monkeypatch):
    made = []
    build = mdpo.reference.frozen.build_reference

    def watched(*args):
        model = build(*args)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(mdpo.reference.frozen, "build_reference", watched)
    trainer = run(folders, tokenizer, ref_model_name_or_path=str(folders / "reference"))
    gc.collect()
    assert len(made) == 1 and made[0]() is None  # once for both sets
    trainer.train()
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)


def test_a_new_set_after_training_is_scored_by_the_reference_of_the_start(folders, tokenizer, scored):
    trainer = run(folders, tokenizer, learning_rate=1e-2)
    trainer.train()
    before = sum(scored)
    new = [{side: [*row[side][:3], {**row[side][3], "content": row[side][3]["content"] + " So."}]
            for side in ("chosen", "rejected")} for row in agent_rows(8)]  # fmt: skip
    trained = trainer.evaluate(Dataset.from_list(new))
    assert sum(scored) - before == 16
    assert abs(trained["eval_rewards/margins"]) > 1e-3  # against itself it would be 0
    by_object = own(folders / "object", tokenizer, tiny_llama(tokenizer), precompute_ref_log_probs=True)
    by_object.train()
    by_object.model.config._name_or_path = ""
    with refused("precompute_ref_log_probs", "ref_model"):
        by_object.evaluate(Dataset.from_list([{**row} for row in new]).select(range(4)).map(
            lambda r: {"chosen": r["chosen"][:3] + [{"role": "assistant", "content": "Once more."}]}))  # fmt: skip


def test_log_probs_that_are_not_finite_are_an_error(folders, tokenizer):
    model = tiny_llama(tokenizer, seed=0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(folders / "policy")
    with refused("reference log-probs", "of train: ", "row row:"):
        run(folders, tokenizer)
    assert not list((folders / "cache").glob("*/*.safetensors"))


def test_a_plain_config_keeps_them_beside_the_hubs_models(folders, tokenizer, scored, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(folders / "hub"))  # other tests fill the session's
    for _ in range(2):
        trainer_of(DPOTrainer, agent_rows(8), folders, tokenizer, precompute_ref_log_probs=True)
    assert sum(scored) == 16 and list((folders / "hub" / "mdpo-reference").rglob("*.safetensors"))


class Ranks:
    """What `precompute` asks of an accelerator, for one of two ranks that run one after the other."""

    device = torch.device("cpu")
    num_processes = 2
    is_main_process = False

    def __init__(self, process_index):
        self.process_index = process_index


def counting_collator(rows):
    """Batches whose log-probs are those of their ids, by `counting_score`; every token but the first is scored."""
    sides = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in rows]
    n, longest = len(rows), max(map(len, sides))
    ids = torch.tensor([side + [0] * (longest - len(side)) for side in sides])
    of_token = torch.tensor([i for i, side in enumerate(sides) for _ in side[1:]])
    column = torch.tensor([t for side in sides for t in range(1, len(side))])
    return {"input_ids": ids, "logp_position": of_token * longest + column - 1, "label": ids[of_token, column],
            "pair": of_token % n, "side": of_token // n, "row": torch.tensor([row["row"] for row in rows])}  # fmt: skip


def counting_score(batch):
    """Each token's id, and its sequence's first one as hundreds."""
    return (batch.label + 100 * batch.input_ids[batch.sequence_of_token, 0]).float()


def test_log_probs_of_a_batch_apart():
    batch = PairBatch.of(counting_collator([{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5], "row": 0},
                                            {"chosen_ids": [6], "rejected_ids": [7, 8, 9], "row": 1}]))  # fmt: skip
    found = by_sequence(batch, counting_score(batch).numpy())
    assert [x.tolist() for x in found] == [[102, 103], [405], [], [708, 709]]


def several_sequences():
    """Three rows. Row 0 has two sequences on its chosen side, row 1 has the second of them as its chosen side and
    the rejected side of row 0, row 2 three, one of them again."""
    a, b, c, d = [1, 11, 12], [2, 13], [3, 14, 15, 16], [4, 17]
    sides = [([a, b], [c]), ([b], [c]), ([d], [b, a, d])]
    rows = []
    for i, both in enumerate(sides):
        row = {"row": i}
        for side, parts in zip(("chosen", "rejected"), both, strict=True):
            row |= {f"{side}_ids": sum(parts, []), f"{side}_mask": [t > 0 for part in parts for t in range(len(part))],
                    f"{side}_lengths": [*map(len, parts)] if len(parts) > 1 else []}  # fmt: skip
        rows.append(row)
    return (
        Dataset.from_list(rows)
        .cast_column("chosen_mask", List(Value("uint8")))
        .cast_column("rejected_mask", List(Value("uint8")))
    )


WANTED = [([111, 112, 213], [314, 315, 316]), ([213], [314, 315, 316]), ([417], [213, 111, 112, 417])]


def test_a_sequence_is_scored_once_wherever_it_stands(tmp_path):
    rows, forwards = several_sequences(), []

    def score(batch):
        forwards.extend(batch.input_ids[:, 0].tolist())
        return counting_score(batch)

    for _ in range(2):
        cache = ReferenceCache(tmp_path)
        found = precompute(rows, score, counting_collator, 1, Accelerator(cpu=True), cache, "train", "identity")
        assert list(zip(found[COLUMNS[0]], found[COLUMNS[1]], strict=True)) == WANTED
        assert sorted(forwards) == [1, 2, 3, 4]
    five = Dataset.from_list([{"chosen_ids": [1, 5], "chosen_mask": [0, 1], "rejected_ids": [2, 20 + i],
                               "rejected_mask": [0, 1], "row": i} for i in range(5)])  # fmt: skip
    forwards.clear()
    found = precompute(five, score, counting_collator, 1, Accelerator(cpu=True), ReferenceCache(None), "train")
    assert sorted(forwards) == [1, 2, 2, 2, 2, 2] and found[COLUMNS[0]][:] == [[105]] * 5


def old_shard(path, keys, sides):
    """As versions before sequences wrote them: counts of both sides, log-probs pair by pair."""
    arrays = {
        "keys": keys,
        "counts": np.array([[len(side) for side in both] for both in sides], np.int32),
        "logps": np.array([x for both in sides for side in both for x in side], np.float32),
    }
    save_file(arrays, path, {"digest": reference_cache._digest(arrays)})


def test_pairs_of_an_older_shard_serve_where_sides_are_one_sequence(tmp_path):
    """Row 1 alone has one sequence on each side: its old entry serves both of them, and so in row 0. The key of row
    0's ids as if they were one text, which is another one, serves nothing."""
    rows, forwards = several_sequences(), []
    keys = pair_keys(rows, "identity")
    text = rows.remove_columns(["chosen_lengths", "rejected_lengths"])
    assert keys.tolist() == pair_keys(text, "identity").tolist()  # as they were: without lengths
    old_shard(tmp_path / "1.safetensors", keys[:2], [([1, 2, 3, 4], [5, 6, 7]), ([0.25], [0.5, 0.75, 1])])

    def score(batch):
        forwards.extend(batch.input_ids[:, 0].tolist())
        return counting_score(batch)

    found = precompute(
        rows, score, counting_collator, 1, Accelerator(cpu=True), ReferenceCache(tmp_path), "train", "identity"
    )
    assert sorted(forwards) == [1, 4]
    assert found[COLUMNS[0]][:] == [[111, 112, 0.25], [0.25], [417]]
    assert found[COLUMNS[1]][:] == [[0.5, 0.75, 1], [0.5, 0.75, 1], [0.25, 111, 112, 417]]


def test_keys_of_older_shards_are_unchanged():
    """A digest that the version before sequences gave (59df7d9)."""
    assert pair_keys(tokenized(), "a")[0].tobytes().hex() == OLD_KEY


def test_two_ranks_share_the_work_and_run_equally_often(tmp_path, monkeypatch):
    """9 sequences in batches of 4 are 3 batches: rank 1 repeats one of them, and keeps it not."""
    masks = {"chosen_mask": [0, 1], "rejected_mask": [0, 1]}
    rows = [{"chosen_ids": [i, 10 + i], "rejected_ids": [min(i, 3), 20], **masks, "row": i} for i in range(5)]
    calls, kept = {0: 0, 1: 0}, []
    for rank in (0, 1):

        def score(batch, rank=rank):
            calls[rank] += 1
            return counting_score(batch)

        monkeypatch.setattr(reference_cache, "_computed", lambda *args: kept.append(COMPUTED(*args)) or kept[-1])
        with pytest.raises(KeyError, match=f"{4 if rank == 0 else 5} sequences without"):
            precompute(
                Dataset.from_list(rows), score, counting_collator, 2, Ranks(rank), ReferenceCache(tmp_path), "train"
            )
        shutil.rmtree(tmp_path)
    assert calls == {0: 2, 1: 2}
    assert [[len(numbers) for numbers, *_ in half] for half in kept] == [[4, 1], [4]]
    numbers, counts, logps = (np.concatenate([piece[k] for half in kept for piece in half]) for k in range(3))
    assert counts.tolist() == [1] * 9
    wanted = {2 * i: 100.0 * i + 10 + i for i in range(5)} | {2 * i + 1: 100.0 * i + 20 for i in range(4)}
    assert dict(zip(numbers.tolist(), logps.tolist(), strict=True)) == wanted


def test_columns_are_in_the_order_of_the_rows_whatever_the_order_of_coming(monkeypatch):
    """Five rows of seven sequences: equal ones, an empty one, a side of none and one of two, a shard with sequences
    that nobody wants, pieces in blocks of one, and a set of which some rows are selected."""
    monkeypatch.setattr(reference_columns, "AT_ONCE", 1)
    monkeypatch.setattr(reference_columns, "ROWS", 2)
    keys = np.frombuffer(b"".join(KEYS[i] for i in (2, 0, 1, 2, 0, 1, 2)), np.uint8).reshape(-1, 16)
    per_side = np.array([[1, 0], [0, 1], [1, 0], [2, 0], [0, 2]])
    distinct = reference_columns.Distinct(keys)
    assert distinct.of_key.tolist() == [0, 1, 2, 0, 1, 2, 0] and distinct.first.tolist() == [0, 1, 2]
    values = {KEYS[0]: [0.5], KEYS[1]: [1.5, 1.25], KEYS[2]: []}
    columns = reference_columns.Columns.of(keys, per_side, 3, kept=False)
    unwanted = np.array([[9] * 16], np.uint8)
    shard = np.concatenate([unwanted, np.frombuffer(KEYS[1], np.uint8).reshape(1, 16)])
    columns.take(distinct.places(shard), np.array([2, 2]), np.array([7, 7, 1.5, 1.25], np.float32))
    assert columns.known.tolist() == [False, False, True]
    with pytest.raises(KeyError, match="2 sequences without"):
        columns.added_to(Dataset.from_dict({"row": range(5)}), distinct.of_key, per_side)
    pieces = [(np.array([i]), np.array([len(values[key])]), np.array(values[key], np.float32))
              for i, key in ((1, KEYS[0]), (0, KEYS[2]))]  # fmt: skip
    columns.take_from_all(pieces)
    rows = Dataset.from_dict({"row": range(10)}).select([1, 3, 5, 7, 9])
    found = columns.added_to(rows, distinct.of_key, per_side)
    assert found["row"][:] == [1, 3, 5, 7, 9]
    assert found[COLUMNS[0]][:] == [[], [], [1.5, 1.25], [0.5], []]
    assert found[COLUMNS[1]][:] == [[], [0.5], [], [], [1.5, 1.25]]
    assert found.features[COLUMNS[0]] == List(Value("float32"))
    assert Path(columns.path).exists() and found.cache_files[-1]["filename"] == str(columns.path)  # mapped


def thinking_rows():
    """Three pairs of two prompts, by hand: a chosen side of two sequences that share a beginning, which the third pair
    has too; and its rejected side is the first one's."""
    prompts = [[5, 6, 7, 8, 9], [5, 6, 40]]
    first, second = [*prompts[0], 11, 12, 13], [*prompts[0], 14, 15, 16, 17]
    other, rejected = [*prompts[1], 20, 21], [*prompts[0], 18]
    rows = []
    for i, (chosen, reject, prompt) in enumerate([([first, second], [rejected], 0), ([other], [[*prompts[1], 22]], 1),
                                                  ([second], [rejected, first], 0)]):  # fmt: skip
        row = {"row": i, "key": str(i), "prompt_key": str(prompt), "margin": None}
        for side, parts in (("chosen", chosen), ("rejected", reject)):
            masks = [[int(t >= len(prompts[prompt])) for t in range(len(part))] for part in parts]
            row |= {f"{side}_ids": sum(parts, []), f"{side}_mask": sum(masks, []), f"{side}_weights": [],
                    f"{side}_lengths": [*map(len, parts)] if len(parts) > 1 else []}  # fmt: skip
        rows.append(row)
    return Dataset.from_list(rows)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_log_probs_of_several_sequences_are_those_of_each_alone(size, packed, tmp_path):
    """Against the model's own logits of one sequence at a time; from the cache the same bits again. A mask of one token
    fewer has one number fewer."""
    model, rows, accelerator, forwards = tiny("Llama"), thinking_rows(), Accelerator(cpu=True), []
    collator = PackedCollator() if packed else PairCollator(0)
    layout = Layout(accelerator, 0)

    def score(batch):
        forwards.append(batch.input_ids.numel())
        with torch.no_grad():
            return score_tokens(model, layout.fit(model, batch)).logps

    def computed(rows):
        cache = ReferenceCache(tmp_path)
        return precompute(rows, score, collator, size, accelerator, cache, "train", "x")

    found = computed(rows)
    once = len(forwards)
    for row in rows:
        for side, column in zip(("chosen", "rejected"), COLUMNS, strict=True):
            lengths, logps = sequence_lengths(row, side), []
            for ids, mask in zip(*(split(row[f"{side}_{x}"], lengths) for x in ("ids", "mask")), strict=True):
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                logps += [logits[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
            torch.testing.assert_close(
                torch.tensor(found[row["row"]][column]), torch.tensor(logps), rtol=1e-4, atol=1e-5
            )
    again = computed(rows)
    assert len(forwards) == once and all(again[name][:] == found[name][:] for name in COLUMNS)
    assert once == {1: 2 if packed else 3, 4: 1}[size]  # 5 sequences; packed, the three of a row in one batch
    shorter = rows.map(lambda row: {"chosen_mask": [*row["chosen_mask"][:-1], 0]})
    assert [len(x) for x in computed(shorter)[COLUMNS[0]]] == [len(x) - 1 for x in found[COLUMNS[0]]]


def test_recipes_compute_the_reference_ahead():
    """But those whose reference is the policy without its adapter: no second model is held then."""
    recipes = sorted(ROOT.glob("recipes/*/dpo/config_*.yaml"))
    assert recipes
    for path in recipes:
        recipe = load_recipe([str(path)])
        assert recipe.training.precompute_ref_log_probs != recipe.model.use_peft, path


def test_rows_beyond_the_original_length_are_scored_in_each_run_and_apart(folders, tokenizer, monkeypatch):
    limit, lengths = 75, []
    score = mdpo.reference.frozen.score_reference

    def watched(reference, policy, accelerator, batch, *args):
        lengths.append(batch["lengths"])
        return score(reference, policy, accelerator, batch, *args)

    monkeypatch.setattr(mdpo.reference.frozen, "score_reference", watched)
    monkeypatch.setattr(mdpo.reference.frozen, "cached_length", lambda config: limit)
    run(folders, tokenizer)
    assert all(len({length > limit for length in batch}) == 1 for batch in lengths)
    first = sorted(length for batch in lengths for length in batch)
    assert len(first) == 18 and first[0] <= limit < first[-1]  # the last of 9 long ones twice, and of 7 others
    lengths.clear()
    run(folders, tokenizer)
    assert sorted(length for batch in lengths for length in batch) == [n for n in first if n > limit]
