"""What this code takes from the inside of its libraries: names that no documentation promises, and methods of
transformers' Trainer that are replaced. An upgrade that changes one of them fails here, in a second and by name.

The tables are literal. That they are complete is read from the code itself, whatever files its trainers stand in.
"""

import ast
import inspect
import threading
from collections import defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel, Trainer
from transformers.integrations import deepspeed

ROOT = next(folder for folder in Path(__file__).parents if (folder / "dpo_trainer.py").exists())
# Of transformers' Trainer: methods that are replaced, and private ones that are called. Without annotations.
METHODS = {
    "__init__": "(self, model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, "
    "processing_class=None, model_init=None, compute_loss_func=None, compute_metrics=None, callbacks=None, "
    "optimizers=(None, None), optimizer_cls_and_kwargs=None, preprocess_logits_for_metrics=None)",
    "_evaluate": "(self, trial, ignore_keys_for_eval, skip_scheduler=False)",
    "_get_dataloader": "(self, dataset, description, batch_size, sampler_fn=None, is_training=False, "
    "dataloader_key=None)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_get_train_sampler": "(self, train_dataset=None)",
    "_init_training_state": "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, "
    "trial)",
    "_load_best_model": "(self)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_rng_state": "(self, checkpoint)",
    "_maybe_log_save_evaluate": "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, "
    "learning_rate=None)",
    "_prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
    "_prepare_input": "(self, data)",
    "_prepare_inputs": "(self, inputs)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
    "_run_epoch": "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
    "_save_rng_state": "(self, output_dir)",
    "_save_scaler": "(self, output_dir)",
    "_set_signature_columns_if_needed": "(self)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "create_model_card": "(self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, "
    "tasks=None, dataset_tags=None, dataset=None, dataset_args=None)",
    "evaluate": "(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')",
    "evaluation_loop": "(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, "
    "metric_key_prefix='eval')",
    "floating_point_ops": "(self, inputs)",
    "get_total_train_batch_size": "(self, args)",
    "log": "(self, logs, start_time=None)",
    "prediction_step": "(self, model, inputs, prediction_loss_only, ignore_keys=None)",
    "save_model": "(self, output_dir=None, _internal_call=False)",
    "train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
    "training_step": "(self, model, inputs, num_items_in_batch=None)",
}
FIELDS = {"_globalstep_last_logged", "_signature_columns", "_total_loss_scalar", "_tr_loss"}  # of a Trainer
# Replaced with parameters of our own: TRL's create_model_card is the one whose interface ours has.
OTHER_PARAMETERS = {"__init__", "create_model_card"}
# Attributes without an underscore, documented nowhere, of DeepSpeed's optimizers: name -> files that set it.
ZERO = ("deepspeed/runtime/zero/stage_1_and_2.py", "deepspeed/runtime/zero/stage3.py")
OF_DEEPSPEED = {"overflow": ZERO, "check_grad_overflow": ZERO[:1]}
# Other private names: name -> something that has it.
OTHERS = {
    "_C": torch,
    "_autograd": torch._C,
    "_top_saved_tensors_default_hooks": torch._C._autograd,
    "_dynamo": torch,
    "_buffers": torch.nn.Module(),
    "_compiled_call_impl": torch.nn.Module,
    "_forward_pre_hooks": torch.nn.Module(),
    "_modules": torch.nn.Module(),
    "_parameters": torch.nn.Module(),
    "_cdata": torch.UntypedStorage,
    "_version": torch.Tensor,
    "_DropoutNd": torch.nn.modules.dropout,
    "_get_default_store": torch.distributed.distributed_c10d,
    "_attn_implementation": PretrainedConfig(),
    "_name_or_path": PretrainedConfig(),
    "_hf_deepspeed_config_weak_ref": deepspeed,
    "_hf_peft_config_loaded": PreTrainedModel,
    "_is_stateful": PreTrainedModel,
    "_keys_to_ignore_on_save": PreTrainedModel,
    "_supports_attention_backend": PreTrainedModel,
    "_fingerprint": datasets.Dataset.from_dict({}),
    "_indices": datasets.Dataset.from_dict({}),
    "_run_exitfuncs": __import__("atexit"),
    "_exit": __import__("os"),
    "_shutdown": threading,
}
# Set on an instance, or taken out of **kwargs: name -> the file whose source has it.
IN_SOURCE = {
    "_weight_conversions": "transformers/core_model_loading.py",
    "_orig_mod": "torch/_dynamo/eval_frame.py",
    "_raise_exceptions_for_missing_entries": "transformers/utils/hub.py",
    "_model_name_or_path": "transformers/integrations/ggml.py",
    "_create_zero_param_parallel_group": "deepspeed/utils/groups.py",
    "_get_zero_param_intra_parallel_group": "deepspeed/utils/groups.py",
}
MODULES = {"torch._dynamo.exc", "torch._subclasses.fake_tensor", "torch.utils._python_dispatch", "torch.utils._pytree"}
OURS = {"_scoring_head"}  # put on models by this code: nothing of theirs may have such a name


def plain_signature(function) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def source(file: str) -> str:
    """Of an installed library, read and not imported: that takes seconds."""
    package, _, rest = file.partition("/")
    [folder] = find_spec(package).submodule_search_locations
    return Path(folder, rest).read_text(encoding="utf-8")


# ---- the code, read


@cache
def product_trees() -> dict[str, ast.Module]:
    folders = (ROOT / name for name in ("mdpo", "scripts", "benchmarks"))
    files = [ROOT / "run_dpo.py", ROOT / "dpo_trainer.py", *(f for folder in folders for f in folder.rglob("*.py"))]
    assert len(files) > 60
    return {str(f.relative_to(ROOT)): ast.parse(f.read_text(encoding="utf-8")) for f in files}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def classes(trees) -> list[ast.ClassDef]:
    return [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def trainer_classes(trees) -> list[ast.ClassDef]:
    """Every class that descends from a Trainer, by the names of its bases."""
    found, family = [], {"Trainer"}
    while grown := [c for c in classes(trees) if c not in found and bases(c) & family]:
        found += grown
        family |= {c.name for c in grown}
    return found


def bases(node: ast.ClassDef) -> set[str]:
    return {base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases}


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [part for part in node.body if isinstance(part, ast.FunctionDef)]


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def stored_on_self(tree: ast.AST) -> set[str]:
    stored = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return {n.attr for n in stored if is_self(n.value)}


@cache
def of_trainer() -> set[str]:
    """All that a Trainer has, on its class and once it is made."""
    return set(dir(Trainer)) | stored_on_self(ast.parse(inspect.getsource(Trainer)))


def taken_from_trainer(trees) -> set[str]:
    """Methods of Trainer that our trainers replace, and private names of it that stand behind any dot. Of `self` only
    inside trainers: elsewhere it is something else."""
    known, trainers = of_trainer(), trainer_classes(trees)
    taken = {m.name for node in trainers for m in methods(node) if m.name in known}
    inside = {id(n) for node in trainers for n in ast.walk(node)}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr in known:
                if id(node) in inside or not is_self(node.value):
                    taken.add(node.attr)
    return taken


def own_names(trees) -> set[str]:
    """Names that this code itself gives: functions, classes, variables, fields of `self`."""
    names = set()
    for tree in trees.values():
        names |= stored_on_self(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


ASKED_BY_NAME = ("getattr", "setattr", "hasattr", "delattr", "replaced", "setdefault")


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def private_elsewhere(trees) -> dict[str, list[str]]:
    """Private names of others: behind a dot, imported, or asked for by a string -> where."""
    places, own = defaultdict(list), own_names(trees)
    for file, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [a.name for a in node.names]
                names += [node.module] * any(map(private, (node.module or "").split(".")))
            elif isinstance(node, ast.Call) and called(node) in ASKED_BY_NAME:
                names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            elif isinstance(node, ast.Dict):  # keyword arguments
                names = [k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]
            for name in names:
                if name not in own and any(map(private, name.split("."))):
                    places[name].append(f"{file}:{node.lineno}")
    return places


# ---- the contract


def test_methods_of_trainer_have_these_parameters():
    found = {name: plain_signature(getattr(Trainer, name)) for name in METHODS if hasattr(Trainer, name)}
    assert found == METHODS


def test_trainers_have_these_fields():
    assert FIELDS <= stored_on_self(ast.parse(inspect.getsource(Trainer)))


@pytest.mark.parametrize("name", OF_DEEPSPEED)
def test_optimizers_of_deepspeed_have_this_field(name):
    for file in OF_DEEPSPEED[name]:
        assert name in stored_on_self(ast.parse(source(file))), file


@pytest.mark.parametrize("name", OTHERS)
def test_this_private_name_is_there(name):
    assert hasattr(OTHERS[name], name)


@pytest.mark.parametrize("name", IN_SOURCE)
def test_this_private_name_is_used_there(name):
    assert name in source(IN_SOURCE[name])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_this_private_module_is_there(name):
    assert source(name.replace(".", "/") + ".py")


@pytest.mark.parametrize("name", sorted(OURS))
def test_this_name_on_models_is_ours_alone(name):
    assert not hasattr(PreTrainedModel, name) and not hasattr(torch.nn.Module, name)


def test_the_tables_name_what_the_code_takes_from_trainer_and_no_more():
    """A field or method of ours that happens to have a private name of Trainer's is found here too."""
    taken = taken_from_trainer(product_trees())
    assert len(taken) > 20
    assert taken == set(METHODS) | FIELDS


def test_the_tables_name_every_other_private_name_and_no_more():
    places = private_elsewhere(product_trees())
    of_trainers = of_trainer()
    of_others = {name: where for name, where in places.items() if name not in of_trainers}
    tables = {*OTHERS, *IN_SOURCE, *MODULES, *OURS}
    assert {n: where for n, where in of_others.items() if n not in tables} == {}
    assert tables - set(of_others) - own_names(product_trees()) == set()


def test_a_replaced_method_takes_what_trainer_gives_it():
    """Every parameter of Trainer's by its own name or in **kwargs, and none besides that has no default."""
    checked = 0
    for node in trainer_classes(product_trees()):
        for method in methods(node):
            if method.name in OTHER_PARAMETERS or method.name not in METHODS:
                continue
            a, theirs = method.args, inspect.signature(getattr(Trainer, method.name)).parameters
            positional = [arg.arg for arg in (*a.posonlyargs, *a.args)]
            ours = {*positional, *(arg.arg for arg in a.kwonlyargs)}
            required = set(positional[: len(positional) - len(a.defaults)])
            required |= {arg.arg for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default is None}
            assert a.kwarg or set(theirs) <= ours, f"{node.name}.{method.name}"
            assert required <= set(theirs), f"{node.name}.{method.name}"
            checked += 1
    assert checked > 20


# ---- negative controls: the scan on code that takes what no table has

INTRUDER = """
class Base(transformers.Trainer):
    def _wrap_model(self, model, training=True): ...
class Low(Base):
    def train(self): self._memory_tracker = None; return self._own
class Guard:
    def on_step_end(self): self._save_checkpoint(1); return self.trainer._finish_current_push()
"""


def test_the_scan_finds_what_a_trainer_and_its_helpers_take():
    trees = {"intruder.py": ast.parse(INTRUDER)}
    assert [node.name for node in trainer_classes(trees)] == ["Base", "Low"]
    # and not Guard's own _save_checkpoint
    expected = {"_wrap_model", "train", "_memory_tracker", "_finish_current_push"}
    assert taken_from_trainer(trees) == expected


@pytest.mark.parametrize(
    "line, name",
    [
        ("from accelerate.utils import _hidden", "_hidden"),
        ("import x; x.y._hidden()", "_hidden"),
        ("from trl._secret import z", "trl._secret"),
        ("getattr(model, '_hidden', None)", "_hidden"),
        ("cached_file(**{'_hidden': 1})", "_hidden"),
    ],
)
def test_the_scan_finds_other_private_names(line, name):
    assert private_elsewhere({"a.py": ast.parse(line)}) == {name: ["a.py:1"]}


def test_a_changed_signature_is_noticed():
    def _save_checkpoint(self, model: object, trial=None) -> None: ...

    assert plain_signature(_save_checkpoint) == "(self, model, trial=None)" != METHODS["_save_checkpoint"]
