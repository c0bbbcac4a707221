"""Every recipe under recipes/: what it says, what its header promises, and two steps of it on a small model."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from errors import refused
from repository import ROOT
from safetensors.torch import load_file
from tiny import agent_rows, tokenizer_for
from transformers import AutoConfig, AutoModelForCausalLM
from trl import get_peft_config
from twins import TEMPLATES, small_twin

import mdpo.config.precision
import mdpo.config.recipe
import run_dpo
from dpo_trainer import DPOTrainer
from mdpo.config.loop import read_loop
from mdpo.config.parsing import FIELDS
from mdpo.config.recipe import load_recipe
from mdpo.config.validation import check_options
from mdpo.data.rows import row_to_pair
from mdpo.masking.chat_template import ChatTemplate
from mdpo.masking.loss_mask import RenderSettings, tokenize_pair
from mdpo.memory.sharding import Sharding
from mdpo.rollouts.iterations import Iterations
from mdpo.types import sequence_lengths, split

RECIPES = sorted((ROOT / "recipes").glob("*/dpo/config_*.yaml"))
BILLIONS = {  # parameters as the models' authors give them
    "codegemma-7b-it": 8.54,
    "gemma-2-9b-it": 9.24,
    "gemma-7b-it": 8.54,
    "llama-3.1-8b": 8.03,
    "llama-3.3-70b": 70.55,
    "mistral-7b-v0.3": 7.25,
    "qwen2.5-7b": 7.62,
    "qwen3-30b-a3b": 30.53,
    "qwen3-8b": 8.19,
    "smollm2-135m": 0.1345,
}
LARGE = {"llama-3.3-70b": 70.55, "qwen3-30b-a3b": 3.35}  # several machines; billions of weights that a token meets
LAPTOP = ("full", "lora", "quickstart", "rpo", "margin", "turn_weights")
ITERATIONS = {f"config_iter{i}_{kind}_reference" for i in (2, 3) for kind in ("fixed", "moved")}
BATCH = re.compile(
    r"# Global batch: (\d+) pairs? per device x (\d+) accumulation x (\d+) (?:group of (\d+) )?\w+ = "
    r"(\d+) pairs a step\."
)


def name_of(path: Path) -> str:
    return f"{path.parts[-3]}-{path.stem.removeprefix('config_')}"


def header(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


@functools.cache
def command(path: Path) -> list[str]:
    """The words of the header's one command."""
    (line,) = [line[2:].strip() for line in header(path) if line.startswith("#   ")]
    return shlex.split(line)


def parts_of(values: dict, folder: Path) -> list[dict]:
    """Both views of a recipe, for a GPU and as this machine runs it: key -> value of all dataclasses."""
    folder.joinpath("recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe([str(folder / "recipe.yaml")])
    return [{f.name: getattr(part, f.name) for f in dataclasses.fields(part)} for part in recipe_parts(recipe)]


def recipe_parts(recipe):
    return recipe.model, recipe.data, recipe.training


def test_families_and_their_recipes():
    found = {}
    for path in RECIPES:
        found.setdefault(path.parts[-3], set()).add(path.stem)
    three = {"config_full", "config_lora", "config_qlora"}
    expected = {family: three - ({"config_qlora"} if family in LARGE else set()) for family in BILLIONS} | {
        "gemma-7b-it": three | ITERATIONS,
        "qwen3-8b": three | {"config_long"},
    }
    assert found == expected | {"smollm2-135m": {f"config_{name}" for name in LAPTOP}}


@pytest.fixture
def gpu(monkeypatch):
    """The view of a machine with GPUs and flash-attn: no value falls back."""
    monkeypatch.setattr(mdpo.config.recipe, "fit_to_machine", lambda values, notes: {**values, "use_cpu": True})


def idle_keys(values: dict, folder: Path) -> set[str]:
    """Those at their default, and those without which the run would be the same."""
    whole, idle = parts_of(values, folder), set()
    for key in set(values) - {"model_name_or_path", "dataset_mixer"}:  # refused without
        field = FIELDS[key]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        without = {name: value for name, value in values.items() if name != key}
        if values[key] == default or parts_of(without, folder) == whole:
            idle.add(key)
    return idle


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_key_does_something(path, gpu, tmp_path):
    """And what the header says of defaults is what they are."""
    values = load_recipe([str(path)]).written
    assert not idle_keys(values, tmp_path)
    (line,) = [line for line in header(path) if line.startswith("# Left at their defaults: ")]
    effective = {key: value for part in parts_of(values, tmp_path) for key, value in part.items()}
    for key, value in (item.split() for item in line.partition(": ")[2].split(", ")):
        assert key not in values and effective[key] == yaml.safe_load(value), key


def test_idle_keys_are_found(gpu, tmp_path):
    """beta at its default; bf16, which DPOConfig switches on by itself; and a list that is the default."""
    values = load_recipe([str(RECIPES[0])]).written | {"beta": 0.1, "bf16": True, "loss_type": ["sigmoid"]}
    assert idle_keys(values, tmp_path) == {"beta", "bf16", "loss_type"}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_it_loads_here_and_every_option_can_be_honored(path):
    recipe = load_recipe([str(path)])
    assert check_options(recipe.training, get_peft_config(recipe.model), recipe.values) == []
    assert all("bfloat16" in note or "flash" in note for note in recipe.notes)
    if recipe.model.load_in_4bit:
        assert recipe.model.use_peft


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_header_is_true(path, monkeypatch):
    """Its batch is that of the keys and the accelerate file; its command starts this recipe."""
    monkeypatch.chdir(ROOT)
    words, args = command(path), load_recipe([str(path)]).training
    launch = launch_command_parser().parse_args(words[2:])
    assert words[:2] == ["accelerate", "launch"] and launch.training_script == "run_dpo.py"
    sharding = Sharding.read(launch.config_file)
    (batch,) = [m for line in header(path) if (m := BATCH.fullmatch(line))]
    pairs, accumulation, processes, of_row, together = (int(number or 1) for number in batch.groups())
    assert (pairs, accumulation) == (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert (processes * of_row, of_row) == (sharding.processes, sharding.row_ranks)
    assert pairs * accumulation * processes == together
    assert load_recipe(launch.training_script_args).path.resolve() == path
    assert sharding.cpu == ("smollm2" in str(path))


def test_no_two_runs_share_a_folder():
    folders = [load_recipe([str(path)]).training.output_dir for path in RECIPES]
    assert len(set(folders)) == len(folders) > 20 and all(folder.startswith("outputs/") for folder in folders)


def test_iterations_follow_each_other():
    """Each starts from what the one before writes; references are the first model or, without a key, the policy."""
    dpo = ROOT / "recipes/gemma-7b-it/dpo"
    first = load_recipe([str(dpo / "config_full.yaml")])
    for kind in ("moved", "fixed"):
        before, sets = first, set()
        for i in (2, 3):
            recipe = load_recipe([str(dpo / f"config_iter{i}_{kind}_reference.yaml")])
            assert recipe.model.model_name_or_path == before.training.output_dir
            wanted = first.model.model_name_or_path if kind == "fixed" else None
            assert recipe.training.ref_model_name_or_path == wanted
            sets |= set(recipe.data.dataset_mixer)
            before = recipe
        assert len(sets) == 2


@pytest.mark.parametrize("family", BILLIONS)
def test_config_json_is_the_published_architecture(family):
    config = AutoConfig.from_pretrained(ROOT / "recipes" / family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    digits = 4 if family == "smollm2-135m" else 2
    assert round(count / 1e9, digits) == BILLIONS[family]


@pytest.mark.parametrize("family", BILLIONS)
def test_the_readme_names_every_recipe_and_command(family, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes" / family / "README.md").read_text(encoding="utf-8")
    mine = [path for path in RECIPES if path.parts[-3] == family]
    for path in mine:
        assert f"`dpo/{path.name}`" in text, path
        assert shlex.join(command(path)) in text, path
    commands = re.findall(r"^ *((?:accelerate launch|python) [^\n`]*)$", text, re.MULTILINE)
    for words in (shlex.split(line.split("    #")[0]) for line in commands):
        for word in words:
            if re.fullmatch(r"[\w./-]+\.(py|yaml)", word):
                assert (ROOT / word).is_file(), word
        if "run_dpo.py" in words:
            load_recipe(words[words.index("run_dpo.py") + 1 :])
    assert len(commands) >= len(mine)
    assert family in (ROOT / "README.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------- two steps of a small twin of each

MARGIN = 1.5  # of every row; one recipe reads it
FOUR_BIT = ("load_in_4bit", "use_bnb_nested_quant")  # bitsandbytes' kernels need a GPU


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """family -> folders of two models of it with different weights, made once."""

    @functools.cache
    def make(family: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(family)
        return small_twin(family, folder / "first", 0), small_twin(family, folder / "second", 1)

    return make


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps({**row, "margin": MARGIN}) + "\n" for row in agent_rows(24)))
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}


def trained(path: Path, policy: Path, reference: Path, pairs: Path, folder: Path) -> DPOTrainer:
    """The trainer after two steps of a recipe, with names of this machine in place of the hub's, and no 4 bits."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.joinpath("recipe.yaml").write_text("".join(line for line in lines if not line.startswith(FOUR_BIT)))
    recipe, flags = load_recipe([str(path)]), ["--max_steps=2", "--report_to=none", "--dataset_num_proc=1"]
    flags += ["--test_split_size=2"] if recipe.data.test_split_size else [f"--eval_dataset_mixer={{{pairs}: 0.1}}"]
    flags += [f"--ref_model_name_or_path={reference}"] if recipe.training.ref_model_name_or_path else []
    flags += [f"--model_name_or_path={policy}", f"--dataset_mixer={{{pairs}: 1.0}}", f"--output_dir={folder / 'out'}"]
    kept = []

    class Kept(DPOTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_dpo, "DPOTrainer", Kept)
        patched.setattr(mdpo.config.precision, "cpu_has_bf16", lambda: False)  # else steps this small are rounded away
        patched.setenv("ACCELERATE_MIXED_PRECISION", "no")
        run_dpo.main([str(folder / "recipe.yaml"), *flags])
    return kept[0]


def chosen_logp(folder: Path, row: dict) -> float:
    """Nats of the supervised tokens of a row's chosen side, by the model's plain forward of each of its sequences."""
    model, total = AutoModelForCausalLM.from_pretrained(folder), 0.0
    parts = (split(row[f"chosen_{field}"], sequence_lengths(row, "chosen")) for field in ("ids", "mask"))
    for ids, mask in zip(*parts, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        picked = logps.gather(-1, torch.tensor(ids)[1:, None])[:, 0]
        total += (picked * torch.tensor(mask[1:])).sum().item()
    return total


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if name_of(p) == "gemma-2-9b-it-full" else pytest.mark.slow) for p in RECIPES],
    ids=name_of,
)
def test_two_steps(path, twins, pairs, tmp_path):
    """As it is written, but for names and 4 bits. At the first step a reference that is the policy at the start gives
    no margin and ln 2, or -log sigmoid(-m) towards a margin m, and with RPO its term; one that is another model gives a
    margin."""
    recipe, (policy, reference) = load_recipe([str(path)]), twins(path.parts[-3])
    trainer = trained(path, policy, reference, pairs, tmp_path)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert trainer.state.global_step == len(logs) == 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in logs)
    other = recipe.training.ref_model_name_or_path is not None
    start = math.log1p(math.exp(recipe.training.margin_scale * MARGIN))
    start += recipe.training.nll_coefficient * logs[0].get("nll_loss", 0.0)
    start += (recipe.training.router_aux_loss_coef or 0.0) * logs[0].get("aux_loss", 0.0)
    assert (abs(logs[0]["loss"] - start) > 0.01) is other
    assert (abs(logs[0]["rewards/margins"]) > 0.01) is other
    ahead = "reference_chosen_logps" in trainer.train_dataset.column_names
    assert ahead is recipe.training.precompute_ref_log_probs
    if ahead:
        row = trainer.train_dataset[0]
        right, wrong = (chosen_logp(folder, row) for folder in ((reference, policy) if other else (policy, reference)))
        found = torch.tensor(row["reference_chosen_logps"]).sum().item()
        assert found == pytest.approx(right, rel=1e-4) and abs(found - wrong) > 1
    before, after = weights_of(policy), weights_of(tmp_path / "out")
    assert after and all(w.isfinite().all() for w in after.values())
    if recipe.model.use_peft:
        assert all("lora_" in name for name in after)
        assert any(w.any() for name, w in after.items() if "lora_B" in name)
        kinds, ranks = {name.split(".")[-3] for name in after}, {recipe.model.lora_r}
        if trainer.model.config.model_type == "qwen3_moe":  # 8 experts; the first matrix is gate_proj and up_proj
            assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "base_layer", "experts"}
            ranks |= {2 * 8 * recipe.model.lora_r, 8 * recipe.model.lora_r}
        else:
            assert kinds == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
        assert {w.shape[0] for name, w in after.items() if "lora_A" in name} == ranks
    else:
        assert before.keys() == after.keys() and any(not before[name].equal(after[name]) for name in before)


def test_twins_keep_what_is_peculiar(twins):
    """Else two steps of them would prove nothing about their families."""
    configs = {family: AutoConfig.from_pretrained(twins(family)[0]) for family in BILLIONS}
    assert {family for family, c in configs.items() if c.tie_word_embeddings} == {
        "gemma-7b-it", "codegemma-7b-it", "gemma-2-9b-it", "smollm2-135m",
    }  # fmt: skip
    gemma2 = configs["gemma-2-9b-it"]
    assert (gemma2.final_logit_softcapping, gemma2.attn_logit_softcapping) == (30.0, 50.0)
    assert gemma2.layer_types == ["sliding_attention", "full_attention"] and gemma2.sliding_window == 32
    wide = {family for family, c in configs.items() if getattr(c, "head_dim", 8) * 4 != c.hidden_size}
    assert wide == {"gemma-7b-it", "codegemma-7b-it", "gemma-2-9b-it", "qwen3-30b-a3b"}
    grouped = {family for family, c in configs.items() if c.num_key_value_heads < c.num_attention_heads}
    assert grouped == set(BILLIONS) - {"gemma-7b-it", "codegemma-7b-it"}
    assert configs["llama-3.1-8b"].rope_parameters["rope_type"] == "llama3"
    assert any("q_norm" in name for name in weights_of(twins("qwen3-8b")[0]))


def test_mistral_s_calls_and_results():
    """Calls and answers with their </s> are supervised, results and questions are not."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    user = {"role": "user", "content": "What is 1 + 2?"}

    def side(answer: str) -> list[dict]:
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "abcdefghi"}
        return [user, calling, result, {"role": "assistant", "content": answer}]

    tokenizer = tokenizer_for(*TEMPLATES["mistral-7b-v0.3"])
    pair = row_to_pair({"chosen": side("It is 3."), "rejected": side("It is 4.")})
    found = tokenize_pair(pair, ChatTemplate(tokenizer), RenderSettings(512))
    runs, ids = [], []
    for token, mask in [*zip(found.chosen_ids, found.chosen_mask, strict=True), (0, 0)]:
        if mask:
            ids.append(token)
        elif ids:
            runs.append(tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip())
            ids = []
    called = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "abcdefghi"}]<eos>'
    assert runs == [called, "It is 3.<eos>"]


# ----------------------------------------------------------------------------------- READMEs' numbers, and the scripts


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALLER = sorted(set(BILLIONS) - {"smollm2-135m"} - set(LARGE))  # trained on one machine


@pytest.mark.parametrize("family", SMALLER)
def test_the_readme_s_flops(family):
    """(2 + 4 + 2 + 2) N T and (2 + 2 + 2 + 2) N T of 32 · 1500 tokens, and hours at 989e12 a second and GPU."""
    text = (ROOT / "recipes" / family / "README.md").read_text(encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "recipes" / family))
    step = sum(p.numel() for p in model.parameters()) * 32 * 1500
    for factor, gpus in ((10, 8), (8, 1)):
        (found,) = re.findall(rf"\| {factor} N T = (\S+) \| (\S+) / MFU \|", text)
        assert float(found[0]) == pytest.approx(factor * step, rel=2e-3)
        assert float(found[1]) == pytest.approx(1000 * factor * step / (gpus * 989e12) / 3600, abs=0.006)


@pytest.mark.parametrize("family", SMALLER)
def test_the_readme_s_checkpoints(family):
    """16 bytes a weight; the planner's sizes; the recipes' intervals; and at 1 GB/s and an MFU of 0.4 no more than a
    twentieth of the time for files, with steps that take what the FLOPs above say."""
    text = (ROOT / "recipes" / family / "README.md").read_text(encoding="utf-8")
    planned = dict(re.findall(r"<!-- memory: config_(\w+)\.yaml .*?A checkpoint: ([\d.]+) GB", text, re.DOTALL))
    rows = re.findall(
        r"^\| (full|LoRA), \d GPUs? \| (?:16 N = )?([\d.]+) GB \| (\S+) s \| (\S+) s \| (\d+) steps \| (\S+) % \|$",
        text,
        re.MULTILINE,
    )
    flops = {"full": (10, 8), "LoRA": (8, 1)}
    assert [row[0] for row in rows] == list(flops)
    for name, *numbers in rows:
        gb, one, five, every, share = map(float, numbers)
        recipe = load_recipe([str(ROOT / f"recipes/{family}/dpo/config_{name.lower()}.yaml")])
        (step,) = re.findall(rf"\| {flops[name][0]} N T = (\S+) \|", text)
        seconds = float(step) / (flops[name][1] * 989e12 * 0.4)
        assert gb == float(planned[name.lower()]) and every == recipe.training.save_steps
        assert one == pytest.approx(gb, abs=0.6) and five == pytest.approx(gb / 5, abs=0.6)
        assert share == pytest.approx(100 * gb / (gb + every * seconds), abs=0.06) and share <= 5.05
        if name == "full":
            assert gb == pytest.approx(16 * BILLIONS[family], rel=2e-3)
            room = re.search(r"needs room for ([\d.]+) GB: two checkpoints and the next", text)
            assert float(room[1]) == pytest.approx(gb * (recipe.training.save_total_limit + 1), abs=0.2)


NUMBER = r"([\d.e+]+)"
STEP = rf"^\| (full|LoRA), (\d+) GPUs \| (8|10) [NA] T = {NUMBER} \| {NUMBER} s \| {NUMBER} GB \| {NUMBER} s \|$"
SAVED = rf"^\| (full|LoRA), \d+ GPUs \| {NUMBER} GB \| {NUMBER} GB \| {NUMBER} s \| (\d+) steps \| {NUMBER} % \|$"


@pytest.mark.parametrize("family", LARGE)
def test_the_readme_s_cost_on_several_machines(family):
    """FLOPs of the weights that a token meets; under ZeRO-3 all weights but a GPU's own go through the network for
    forward and backward of each micro-batch, and the gradients once; of a checkpoint 12 bytes a weight are the GPUs'
    own. Each interval costs at most a twentieth of the time."""
    text = (ROOT / "recipes" / family / "README.md").read_text(encoding="utf-8")
    planned = dict(re.findall(r"<!-- memory: config_(\w+)\.yaml .*?A checkpoint: ([\d.]+) GB", text, re.DOTALL))
    n, tokens, near = BILLIONS[family], 32 * 1500, functools.partial(pytest.approx, rel=0.03)
    steps, saved = (re.findall(row, text, re.MULTILINE) for row in (STEP, SAVED))
    assert [row[0] for row in steps] == [row[0] for row in saved] == ["full", "LoRA"]
    for (name, *numbers), (_, *sizes) in zip(steps, saved, strict=True):
        gpus, factor, flops, seconds, received, sent = map(float, numbers)
        recipe = load_recipe([str(ROOT / f"recipes/{family}/dpo/config_{name.lower()}.yaml")])
        batch = recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps
        assert batch * gpus == 32 and factor == (10 if name == "full" else 8)
        assert flops == near(factor * LARGE[family] * 1e9 * tokens)
        assert seconds == near(flops / (gpus * 989e12 * 0.4))
        passes = 3 if name == "full" else 2 * recipe.training.gradient_accumulation_steps
        assert received == near(passes * 2 * n * (1 - 1 / gpus))
        assert sent == pytest.approx(received / (50 if name == "full" else 450), abs=0.06)
        gb, own, five, every, share = map(float, sizes)
        assert gb == pytest.approx(float(planned[name.lower()]), abs=0.1) and every == recipe.training.save_steps
        assert own == near(12 / 14 * gb / gpus) and five == pytest.approx(gb / 5, abs=0.1)
        assert share == pytest.approx(100 * five / (five + every * max(seconds, sent)), abs=0.2) and share <= 5.05
        if name == "full":
            assert gb == near(14 * n) and f"needs room for {3 * gb:.0f} GB" in " ".join(text.split())
            pairs = 1e4 / (recipe.training.precompute_ref_batch_size * gpus)
            (found,) = re.findall(
                rf"costs {NUMBER} FLOPs, {NUMBER} s .*? {NUMBER} GB received by a GPU", " ".join(text.split())
            )
            assert float(found[0]) == near(2 * LARGE[family] * 1e9 * 1500 * 1e4)
            assert float(found[1]) == near(float(found[0]) / (gpus * 989e12 * 0.4))
            assert float(found[2]) == near(pairs * 2 * n * (1 - 1 / gpus))


def test_weights_that_a_token_meets():
    """Of the experts 8 of 128."""
    config = AutoConfig.from_pretrained(ROOT / "recipes/qwen3-30b-a3b")
    of_experts = config.num_hidden_layers * config.num_experts * 3 * config.moe_intermediate_size * config.hidden_size
    met = BILLIONS["qwen3-30b-a3b"] - of_experts / 1e9 * (1 - config.num_experts_per_tok / config.num_experts)
    assert LARGE == {"llama-3.3-70b": BILLIONS["llama-3.3-70b"], "qwen3-30b-a3b": pytest.approx(met, abs=0.01)}


FULL = [p for p in RECIPES if p.stem.endswith(("full", "reference")) and "smollm2" not in str(p)]


@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_full_recipes_reduce_gradients_once_a_step(path):
    """One micro-batch a step, 32 pairs of 8 GPUs; under DeepSpeed, without which bfloat16 has no master weights."""
    args, words = load_recipe([str(path)]).training, command(path)
    if path.parts[-3] in LARGE:
        sharding = Sharding.read(ROOT / words[words.index("--config_file") + 1])
        assert args.gradient_accumulation_steps == 1 and (sharding.stage, sharding.precision) == (3, "bf16")
        return
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.save_steps) == (4, 1, 2000)
    assert Sharding.read(ROOT / words[words.index("--config_file") + 1]) == Sharding(2, 8, precision="bf16")


@pytest.mark.parametrize("family", BILLIONS)
def test_memory_tables_are_there_and_add_up(family):
    """One for each of full, long, LoRA and QLoRA, under the accelerate file of the recipe's own command."""
    text = (ROOT / "recipes" / family / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- memory: (\S+) (\S+) -->\n(.*?)<!-- memory end -->", text, re.DOTALL)
    mine = {p.name: p for p in RECIPES if p.parts[-3] == family}
    assert {name for name, _, _ in tables} == {n for n in mine if re.fullmatch(r"config_(full|long|q?lora)\.yaml", n)}
    for name, accelerate, table in tables:
        launch = launch_command_parser().parse_args(command(mine[name])[2:])
        assert Path(launch.config_file).name == accelerate
        *parts, together = (float(size) for size in re.findall(r"\| ([\d.]+) \|", table))
        assert re.search(
            r"^A checkpoint: [\d.]+ GB on disk, [\d.]+ s at 1 GB/s, [\d.]+ s at 5 GB/s", table, re.MULTILINE
        )
        assert len(parts) > 4 and sum(parts) == pytest.approx(together, abs=0.05 * len(parts))
        gpu = 80 if family in LARGE else {"full": 80, "long": 80, "lora": 40, "qlora": 24}[name[7:-5]]
        assert together < 0.9 * gpu


def test_a_stale_memory_table_is_named(tmp_path, monkeypatch):
    memory = script("dev/recipe_memory")
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    monkeypatch.setattr(memory, "table", lambda family, recipe, accelerate: f"| {recipe} {accelerate} |")
    readme = tmp_path / "recipes/one/README.md"
    readme.parent.mkdir(parents=True)
    (readme.parent / "config.json").write_text("{}")
    readme.write_text("# One\n<!-- memory: a.yaml b.yaml -->\nold\n<!-- memory end -->\nafter\n")
    with refused("README.md", "of one "):
        memory.main(["--check"])
    assert "old" in readme.read_text()
    memory.main([])
    expected = "# One\n<!-- memory: a.yaml b.yaml -->\n| a.yaml b.yaml |\n\n<!-- memory end -->\nafter\n"
    assert readme.read_text() == expected
    memory.main(["--check"])
    with refused("two", "config.json"):
        memory.main(["two"])
    readme.write_text("# One\n")
    with refused("README.md", readme, "<!-- memory: "):
        memory.main([])


@pytest.mark.slow
def test_memory_tables_are_what_the_planner_says():
    """Of two families here, as plans of adapters take long; `python -m scripts.dev.recipe_memory --check` does all."""
    script("dev/recipe_memory").main(["--check", "smollm2-135m", "mistral-7b-v0.3"])


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(BILLIONS) - {"smollm2-135m", "mistral-7b-v0.3"}))
def test_memory_tables_of_full_recipes_are_what_the_planner_says(family):
    memory = script("dev/recipe_memory")
    text = (ROOT / "recipes" / family / "README.md").read_text(encoding="utf-8")
    tables = [match for match in memory.TABLE.finditer(text) if match[2] == "config_full.yaml"]
    assert tables
    for match in tables:
        assert memory.table(family, match[2], match[3]) in match[0]


@pytest.mark.slow
def test_the_loop_s_rollouts_run(twins, tmp_path, monkeypatch):
    """The first stages of a family's loop, on its small twin, with two samples of eight tokens."""
    monkeypatch.chdir(ROOT)
    twin, question = str(twins("gemma-2-9b-it")[0]), '{"question": "What is 1 + 2?", "answer": "3"}\n'
    (tmp_path / "questions.jsonl").write_text(question)
    loop = read_loop(Path("recipes/gemma-2-9b-it/loop.yaml"))
    files = dict.fromkeys(("tasks", "held_out_tasks"), str(tmp_path / "questions.jsonl"))
    loop = dataclasses.replace(loop, output_dir=str(tmp_path), sample={**loop.sample, "samples": 2}, **files)
    for stage, samples in ((Iterations(loop, twin).evaluated(0), {0}), (Iterations(loop, twin).sampled(1), {0, 1})):
        stage.folder.mkdir(parents=True)
        script("sample").main([*stage.command[2:], "--max_new_tokens=8"])
        saved = [json.loads(row) for row in (stage.folder / "trajectories.jsonl").read_text().splitlines()]
        assert {row["sample"] for row in saved} == samples
        assert saved[0]["messages"][0]["content"].startswith("Use Python and put the answer in \\boxed{}.")


def conversation(key: str, sample: int, correct: bool, ended: str = "done", **changes) -> dict:
    messages = [{"role": "user", "content": key}, {"role": "assistant", "content": f"{sample} {correct} {ended}"}]
    return {"key": key, "sample": sample, "messages": messages, "correct": correct, "ended": ended, **changes}


def paired(tmp_path, rows: list[dict], *flags: str) -> list[dict]:
    source, out = tmp_path / "conversations.jsonl", tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.unlink(missing_ok=True)
    script("pair_rollouts").main([str(source), "--out", str(out), *flags])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_right_is_paired_with_wrong(tmp_path, capsys):
    """Question a has 2 right and 3 wrong conversations, one of them twice and one cut: 4 pairs at most. b has no wrong
    one, c no right one that ended. Another question changes nothing for a."""
    a = [conversation("a", i, i < 2, "max turns" if i == 3 else "done") for i in range(4)]
    a += [conversation("a", 3, False, "max turns"), conversation("a", 5, False, "cut")]
    others = [conversation("b", 0, True), conversation("c", 0, False), conversation("c", 1, True, "cut")]
    rows = paired(tmp_path, a + others, "--pairs=all")
    said = {(row["chosen"][1]["content"], row["rejected"][1]["content"]) for row in rows}
    assert said == {(c, r) for c in ("0 True done", "1 True done") for r in ("2 False done", "3 False max turns")}
    assert [row["id"] for row in rows] == ["a-0", "a-1", "a-2", "a-3"] and len(row_to_pair(rows[0]).chosen) == 2
    assert capsys.readouterr().out.splitlines()[:7] == [
        "9 trajectories of 3 tasks",
        "  left out: 2 not ended by the policy",
        "  left out: 1 the same as an earlier one",
        "4 pairs of 1 tasks",
        "  without a pair: 2 tasks, fewer than two left",
        "  the chosen side is longer in 0 of 4 (0%)",
        f"{tmp_path / 'pairs.jsonl'}: 4 pairs",
    ]
    report = json.loads((tmp_path / "pairs.report.json").read_text())
    assert report == {
        **{"pairs_by": "all", "trajectories": 9, "tasks": 3, "paired": 1, "pairs": 4, "longer": 0},
        "left_out": {"not ended by the policy": 2, "the same as an earlier one": 1},
        "unpaired": {"fewer than two left": 2},
    }
    assert paired(tmp_path, others[:1] + a, "--pairs=all") == rows
    assert len(paired(tmp_path, a)) == 1 and paired(tmp_path, a) == paired(tmp_path, others + a)
    drawn = {json.dumps(paired(tmp_path, a, f"--seed={seed}")) for seed in range(30)}
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("rows", "flags", "key", "details"),
    [
        ([conversation("a", 0, True)], [], "tasks", ["1 tasks"]),
        ([{"key": "a"}], [], "trajectory", ["conversations.jsonl:1: ", "messages"]),
        ([conversation("a", 0, "yes")], [], "reward", ["conversations.jsonl:1: ", "'yes'"]),
        ([conversation("a", 0, True)], ["--max_pairs_per_prompt=0"], "max_pairs_per_prompt", ["0 "]),
        ([conversation("a", 0, True)], ["--length_matched"], "length_matched", ["random"]),
        ([conversation("a", 0, True)], ["--out=missing/pairs.jsonl"], "out", ["missing/pairs.jsonl", "no folder"]),
        ([conversation("a", 0, True)], ["--out=setup.cfg"], "out", ["setup.cfg", "there already"]),
    ],
)
def test_bad_conversations_are_named(tmp_path, monkeypatch, rows, flags, key, details):
    monkeypatch.chdir(ROOT)
    with refused(key, *details):
        paired(tmp_path, rows, *flags)
