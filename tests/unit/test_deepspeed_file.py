"""A deepspeed_config_file: where it is looked for, what in it is refused at the start of a run, what is planned."""

import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import yaml
from errors import refused
from repository import ROOT

from mdpo.config.deepspeed_file import FIELDS, FILE, find_deepspeed_file, refuse_engine
from mdpo.memory.sharding import Sharding, secondary_line
from mdpo.memory.zero import LIVE, ZeroSizes

SHIPPED = "training_configs/zero3_plus_plus.json"
ENGINE = json.loads((ROOT / SHIPPED).read_text())


def engine(**zero) -> dict:
    return {**ENGINE, "zero_optimization": {**ENGINE["zero_optimization"], **zero}}


# ------------------------------------------------------------------------------------------------------ where it is


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder that is not the repository's, and what accelerate's launcher has passed on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FIELDS, "deepspeed_multinode_launcher,deepspeed_config_file,zero3_init_flag")
    monkeypatch.setenv(FILE, SHIPPED)
    return tmp_path


def test_the_repository_s_file_is_found_from_any_folder(elsewhere):
    find_deepspeed_file()
    assert os.environ[FILE] == str(ROOT / SHIPPED)


def test_a_file_of_the_working_folder_comes_first(elsewhere):
    (elsewhere / "training_configs").mkdir()
    (elsewhere / SHIPPED).write_text(json.dumps(engine()))
    find_deepspeed_file()
    assert os.environ[FILE] == str(elsewhere / SHIPPED)


def test_without_one_nothing_is_looked_for(monkeypatch):
    monkeypatch.delenv(FILE, raising=False)
    find_deepspeed_file()
    assert FILE not in os.environ


def test_a_file_that_is_nowhere_or_cannot_be_read(elsewhere, monkeypatch):
    monkeypatch.setenv(FILE, "training_configs/zero9.json")
    with refused("deepspeed_config_file", "zero9.json", elsewhere, ROOT, "accelerate file"):
        find_deepspeed_file()
    (elsewhere / "broken.json").write_text('{"zero_optimization": ')
    monkeypatch.setenv(FILE, "broken.json")
    with refused("deepspeed_config_file", elsewhere / "broken.json", "line 1"):
        find_deepspeed_file()
    (elsewhere / "broken.json").write_text('{"stage": 3}')
    with refused("deepspeed_config_file", elsewhere / "broken.json", "zero_optimization"):
        find_deepspeed_file()
    for wrong, key in (
        (engine(stage="auto"), "stage"),
        ({**engine(), "bf16": True}, "bf16"),
        (engine(offload_optimizer="cpu"), "offload_optimizer"),
    ):
        (elsewhere / "broken.json").write_text(json.dumps(wrong))
        with refused(key, elsewhere / "broken.json"):
            find_deepspeed_file()


@pytest.mark.parametrize("file", [SHIPPED, "none"])
def test_keys_that_accelerate_passes_over(file, elsewhere, monkeypatch):
    """They change nothing, in an accelerate file with a DeepSpeed file and in one without."""
    monkeypatch.setenv(FILE, file)
    monkeypatch.setenv(FIELDS, "zero3_init_flag,zero_hpz_partition_size")
    with refused("zero_hpz_partition_size", "deepspeed_config_file"):
        find_deepspeed_file()


@pytest.mark.parametrize("key", ["mixed_precision", "zero_stage", "zero3_save_16bit_model", "gradient_clipping"])
def test_keys_that_do_not_count_beside_it(key, elsewhere, monkeypatch):
    """accelerate refuses exactly these, with a list of all of them."""
    monkeypatch.setenv(FIELDS, f"deepspeed_config_file,{key}")
    with refused(key, "deepspeed_config_file"):
        find_deepspeed_file()
    from accelerate.utils import DeepSpeedPlugin

    with pytest.raises(ValueError, match="will be ignored"):
        DeepSpeedPlugin(hf_ds_config=engine())


# ------------------------------------------------------------------------------------- what a run is refused for


def arguments(configuration: dict | None, **more):
    own = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 1.0}
    plugin = None if configuration is None else SimpleNamespace(deepspeed_config=configuration)
    return SimpleNamespace(**{**own, "mixed_precision": "bf16", "world_size": 16, "deepspeed_plugin": plugin, **more})


NUMBERS = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0}


@pytest.mark.parametrize(
    ("configuration", "more"),
    [
        (None, {}),
        (engine(), {}),
        ({**engine(), **NUMBERS, "bf16": {"enabled": True}, "fp16": {"enabled": False}}, {}),
        ({k: v for k, v in engine().items() if k != "gradient_clipping"}, {"max_grad_norm": 0.0}),
        (engine(zero_quantized_weights=False, offload_optimizer={"device": "cpu", "super_offload": False}), {}),
        (engine(zero_hpz_partition_size=8), {"world_size": 2}),  # DeepSpeed takes the 2 that there are
        (engine(zero_hpz_partition_size=1, stage=2), {}),
        ({**engine(), "train_batch_size": 128, "curriculum_learning": {"enabled": False}, "tensor_parallel": {}}, {}),
    ],
)
def test_what_agrees_with_the_recipe(configuration, more):
    refuse_engine(arguments(configuration, **more))


@pytest.mark.parametrize(
    ("configuration", "key", "details"),
    [
        ({**engine(), "train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu", ("is 4", "is 2")),
        ({**engine(), "gradient_clipping": 0.5}, "gradient_clipping", ("is 0.5", "max_grad_norm is 1.0")),
        # Each without its key: DeepSpeed would not clip, and take each micro-batch as a step.
        ({k: v for k, v in engine().items() if k != "gradient_clipping"}, "gradient_clipping", ("missing",)),
        ({k: v for k, v in engine().items() if "accum" not in k}, "gradient_accumulation_steps", ("missing", "is 4")),
        ({**engine(), "train_batch_size": 64}, "train_batch_size", ("is 64", "is 128")),
        ({**engine(), "optimizer": {"type": "AdamW"}}, "optimizer", ("learning_rate",)),
        ({**engine(), "scheduler": {"type": "WarmupLR"}}, "scheduler", ("lr_scheduler_type",)),
        ({**engine(), "communication_data_type": "fp16"}, "communication_data_type", ("not been run",)),
        ({**engine(), "prescale_gradients": True}, "prescale_gradients", ("not been run",)),
        ({**engine(), "torch_autocast": {"enabled": True}}, "torch_autocast", ("not been run",)),
        (engine(zenflow={"topk_ratio": 0.1}), "zenflow", ("zero_optimization.zenflow",)),
        ({**engine(), "bf16": {"enabled": False}}, "bf16", ("is False", "computes in bf16")),
        ({**engine(), "fp16": {"enabled": True}}, "fp16", ("is True", "computes in bf16")),
        (engine(zero_quantized_weights=True), "zero_quantized_weights", ("8 bits", "not been run here")),
        (engine(zero_quantized_gradients=True), "zero_quantized_gradients", ("not been run here",)),
        (engine(zero_quantized_nontrainable_weights=True), "zero_quantized_nontrainable_weights", ("8 bits",)),
        (engine(offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload", ("GH200",)),
        (engine(stage=2), "zero_hpz_partition_size", ("8 has no effect", "ZeRO-2")),
        (engine(zero_hpz_partition_size=6), "zero_hpz_partition_size", ("6", "16 processes")),
        (engine(zero_hpz_partition_size="auto"), "zero_hpz_partition_size", ("auto",)),
        (engine(zero_hpz_partition_size=0), "zero_hpz_partition_size", ("0",)),
    ],
)
def test_what_is_refused(configuration, key, details):
    with refused(key, *details):
        refuse_engine(arguments(configuration))


def test_groups_stay_within_a_machine(monkeypatch, written):
    for of_machine, size, fits in ((8, 8, True), (8, 4, True), (4, 8, False), (8, 16, False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(of_machine))
        configuration = engine(zero_hpz_partition_size=size)
        path = written(configuration, num_machines=16 // of_machine)
        for read in (lambda c=configuration: refuse_engine(arguments(c)), lambda p=path: Sharding.read(p)):
            with nullcontext() if fits else refused("zero_hpz_partition_size", f"machines of {of_machine}"):
                read()


def test_deepspeed_itself_could_not_run_them_here():
    """The reasons that are given, in its own words, where there is no GPU."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.superoffload import superoffload_stage3 as stage3
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    with pytest.raises(ValueError, match="not been implemented"):
        CPU_Accelerator().create_op_builder("QuantizerBuilder").load()
    assert "only supports NVIDIA CUDA GPUs" in open(stage3.__file__).read()
    keys = {"zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"}
    assert keys <= set(DeepSpeedZeroConfig.model_fields)


# ---------------------------------------------------------------------------------------------------- a line of it


def test_what_a_run_says_of_it():
    plugin = SimpleNamespace(deepspeed_config=engine())
    assert "within 8 neighboring ranks" in secondary_line(plugin, 16)
    assert secondary_line(plugin, 8).startswith("warning: zero_hpz_partition_size: 8 are all 8 processes")
    plain = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3, "offload_param": None}})
    assert secondary_line(plain, 8) is secondary_line(None, 8) is None


# ------------------------------------------------------------------------------------------------------- its plan


@pytest.fixture
def written(tmp_path):
    """Writes an accelerate file with a DeepSpeed file, and returns its path."""

    def write(configuration: dict, **accelerate):
        (tmp_path / "engine.json").write_text(json.dumps(configuration))
        keys = {"deepspeed_config_file": str(tmp_path / "engine.json"), **accelerate.pop("deepspeed_config", {})}
        raw = {"distributed_type": "DEEPSPEED", "num_processes": 16, "num_machines": 2, "deepspeed_config": keys}
        (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump({**raw, **accelerate}))
        return tmp_path / "accelerate.yaml"

    return write


def test_the_shipped_file_is_planned(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    read = Sharding.read(ROOT / "training_configs/zero3_plus_plus_two_nodes.yaml")
    assert read == Sharding(3, 16, 2, secondary=8)
    assert str(read) == "16 GPUs on 2 machines, ZeRO-3, weights whole within 8 of them"


def test_every_size_is_read(written):
    """Numbers may be written as 5e7, which JSON takes for floats."""
    sizes = {
        "reduce_bucket_size": 5e7, "stage3_max_live_parameters": 3e8, "stage3_max_reuse_distance": 2e8,
        "sub_group_size": 1e8, "stage3_param_persistence_threshold": 10, "stage3_prefetch_bucket_size": 7,
    }  # fmt: skip
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu"}}
    path = written(engine(**sizes, **offload, overlap_comm=False, contiguous_gradients=True))
    wanted = ZeroSizes(50_000_000, 300_000_000, 200_000_000, 100_000_000, 10)
    assert Sharding.read(path) == Sharding(3, 16, 2, True, True, overlap=False, secondary=8, sizes=wanted)
    assert wanted.gathered == 300_000_000 and ZeroSizes(live=1).gathered == LIVE  # what is used again soon stays


def test_a_run_s_own_numbers_are_read_leniently():
    """Where memory ran out, "auto" may not have been filled in yet."""
    plugin = SimpleNamespace(deepspeed_config=engine(reduce_bucket_size="auto", offload_param=None))
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(
        state=state, num_processes=16, mixed_precision="bf16", device=SimpleNamespace(type="cuda")
    )
    assert Sharding.running(accelerator) == Sharding(3, 16, precision="bf16", secondary=8)


@pytest.mark.parametrize(
    ("configuration", "key", "detail"),
    [
        (engine(stage=1, zero_hpz_partition_size=1), "stage", "ZeRO-1"),
        (engine(offload_param={"device": "nvme"}), "offload_param", "nvme"),
        (engine(offload_optimizer={"device": "cpu", "ratio": 0.5}), "ratio", "offload_optimizer.ratio"),
        (engine(offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload", "super_offload"),
        (engine(zero_quantized_weights=True), "zero_quantized_weights", "False can"),
        (engine(contiguous_gradients=False), "contiguous_gradients", "True can"),
        (engine(reduce_bucket_size="auto"), "reduce_bucket_size", "auto"),
        (engine(zenflow={"topk_ratio": 0.1}), "zenflow", "zero_optimization.zenflow"),
        (engine(zero_hpz_partition_size=6), "zero_hpz_partition_size", "16 processes"),
        ({**engine(), "optimizer": {"type": "AdamW"}}, "optimizer", "engine.json"),
        ({**engine(), "bf16": {"bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads", "bf16."),
    ],
)
def test_what_cannot_be_planned_is_named(configuration, key, detail, written):
    with refused(key, detail):
        Sharding.read(written(configuration))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mixed_precision": "bf16"}, "mixed_precision"),
        ({"deepspeed_config": {"zero_stage": 3}}, "zero_stage"),
        ({"deepspeed_config": {"zero_hpz_partition_size": 4}}, "zero_hpz_partition_size"),
    ],
)
def test_keys_beside_it_are_refused_by_the_plan_too(changes, key, written):
    with refused(key, "accelerate.yaml"):
        Sharding.read(written(engine(), **changes))
