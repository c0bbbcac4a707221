"""One side of benchmarks/bench_dpo.py in a process of its own: its trainer, its steps, its peak memory."""

import resource
import tempfile
import time

import workloads

WARM = 2  # warm-up steps of each side, not counted: the first pairs are the longest, so memory reaches its peak in them


def common_settings(side: str, options: dict, cuda: bool) -> dict:
    """Training arguments of a side. `micro` has its pairs in a micro-batch, where these are not all of a step."""
    micro = options.get("micro", {}).get(side, options["pairs"])
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": options["pairs"] // micro,
        "max_steps": options["steps"] + WARM,
        "train_sampling_strategy": "sequential",
        "learning_rate": options.get("learning_rate", 1e-6),
        "max_length": 8192,
        "bf16": in_half(options),
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "model_init_kwargs": {"dtype": options["dtype"], "attn_implementation": "sdpa"},
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 1,
    }


def in_half(options: dict) -> bool:
    return options.get("bf16", options["dtype"] == "bfloat16")


def trainer_of(side: str, folder: str, options: dict, cuda: bool):
    """trl.DPOTrainer, or ours with packed or padded batches."""
    from datasets import Dataset

    settings = common_settings(side, options, cuda)
    data = {"train_dataset": Dataset.from_list(options["rows"])}
    data["processing_class"] = workloads.tokenizer(options["model"], options.get("template"))
    if side == "trl":
        from trl import DPOConfig
        from trl import DPOTrainer as TheirTrainer

        return TheirTrainer(options["model"], args=DPOConfig(folder, **settings), **data)
    from dpo_trainer import DPOTrainer
    from mdpo.config.schema import MDPOConfig

    settings |= {"reference_cache_dir": f"{options['cache']}/{side}", "shared_prefix": side == "ours"}
    return DPOTrainer(options["model"], args=MDPOConfig(folder, **settings), **data)


def worker(pipe, side: str, options: dict) -> None:
    """One side's trainer. Trains a step for each "go" of the parent and sends its seconds; at the end, its metrics."""
    import torch
    from transformers import TrainerCallback

    import dpo_trainer  # noqa: F401  its seconds are not the set-up's

    torch.set_num_threads(options["threads"])
    cuda = torch.cuda.is_available()
    step_start = None

    class Turns(TrainerCallback):
        """A step lasts from its "go" until the next one could begin, so that fetching data counts."""

        def on_step_begin(self, *args, **kwargs):
            nonlocal step_start
            answer()
            pipe.recv()
            step_start = time.perf_counter()

        def on_train_end(self, *args, **kwargs):
            answer()

    def answer():
        if cuda:
            torch.cuda.synchronize()
        pipe.send(None if step_start is None else time.perf_counter() - step_start)

    with tempfile.TemporaryDirectory() as folder:
        setup_start = time.perf_counter()
        trainer = trainer_of(side, folder, options, cuda)
        trainer.add_callback(Turns())
        results = {"set-up": time.perf_counter() - setup_start}
        if side == "ours":
            results |= useful_work(trainer, options["pairs"])
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        results |= {"losses": [log["loss"] for log in logs], "num_tokens": [log["num_tokens"] for log in logs]}
    results["memory"] = torch.cuda.max_memory_allocated() if cuda else 1024 * peak_kb()
    pipe.send(results)


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def useful_work(trainer, pairs: int) -> dict[str, list[float]]:
    """For each step its distinct tokens, tokens of both sides, and useful FLOPs: each distinct token once, the LM head
    where a token is supervised, attention where a token sees another, two more for backward, nothing recomputed."""
    from mdpo.forward.forest import Forest

    config, tokens, both_sides, flops = trainer.model.config, [], [], []
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embeddings = {id(p): p for p in (trainer.model.get_input_embeddings().weight, trainer.model.lm_head.weight)}
    weights = sum(p.numel() for p in trainer.model.parameters() if p.ndim == 2 and id(p) not in embeddings)
    for batch in trainer.get_train_dataloader():
        forest = Forest(batch.runs)
        attended = sum(q * before + q * (q + 1) / 2 for q, before in zip(forest.sizes, forest.before, strict=True))
        n, scored = batch.input_ids.numel(), len(batch.logp_position)
        forward = 2 * n * weights + 2 * scored * config.hidden_size * config.vocab_size
        forward += 4 * attended * config.num_attention_heads * head_dim * config.num_hidden_layers
        tokens.append(n)
        both_sides.append(batch.n_tokens)
        flops.append(3 * forward)
    return {"tokens": tokens, "both": both_sides, "flops": flops}
