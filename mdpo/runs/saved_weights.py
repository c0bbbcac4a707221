"""What a model's weight files contain: checked against the model when written, completely restored at a resume.

transformers 5 keeps some weights in other tensors than it writes (a mixture's experts are one tensor in memory and one
file entry each on disk), so names and shapes are compared, and values loaded, through its own conversion.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from transformers import conversion_mapping, core_model_loading, modeling_utils
from transformers.utils import logging

from mdpo.errors import UserError

LAYER = re.compile(r"^.*?\.\d+\.")  # what the names of a layer's weights begin with
Tensors = dict[str, torch.Tensor]


def check_saved(folder: str | Path, model) -> None:
    """Reads the headers of the safetensors files in `folder`: every weight that a checkpoint of `model` has to contain
    must be there in its full shape (a model sharded by ZeRO-3 may leave empty tensors, which only fail at loading).
    Raises UserError naming the first one."""
    weights_folder = _place(folder, model.active_adapters[0]) if hasattr(model, "peft_config") else folder
    with _opened(weights_folder) as files:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
    expected = expected_shapes(model)
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if wrong:
        name = wrong[0]
        written = f"as {list(shapes[name])} in place of {list(expected[name])}" if name in shapes else "not at all"
        raise UserError(
            f"{folder}: {len(wrong)} of {len(expected)} weights were not written whole, such as {name} ({written}). "
            "Under ZeRO-3 the accelerate file needs zero3_save_16bit_model: true.",
            key="weights",
        )


def expected_shapes(model) -> dict[str, tuple[int, ...]]:
    """Name in the files -> shape of every tensor that a checkpoint of `model` has to contain: tied weights once, of a
    PEFT model the trained adapter's. Raises UserError where a trained weight would be in none."""
    if hasattr(model, "peft_config"):
        return {name: tuple(weight.shape) for name, weight in _adapter_state(model).items()}
    state, ignored = _whole_state(model), set(model._keys_to_ignore_on_save or ())
    written = {name: weight for name, weight in state.items() if name not in ignored}
    saved = {id(weight) for weight in written.values()}
    _refuse_lost([n for n, weight in state.items() if id(weight) not in saved and weight.requires_grad], model)
    written = modeling_utils.remove_tied_weights_from_state_dict(written, model)
    converted = core_model_loading.revert_weight_conversion(model, written)
    return {name: tuple(weight.shape) for name, weight in converted.items()}


def _adapter_state(model) -> Tensors:
    """Name in the file -> meta tensor of the trained adapter, `modules_to_save` included."""
    name, state = model.active_adapters[0], _whole_state(model)
    trained = {n: weight for n, weight in state.items() if weight.requires_grad}
    if model.peft_config[name].is_prompt_learning:  # its file contains what the weights compute, not the weights
        return _of_adapter(model, name)
    # Frozen weights are left out as ZeRO-3's save does: of a targeted embedding PEFT may write the base layer too.
    adapter = get_peft_model_state_dict(model, trained, name, save_embedding_layers=False)
    saved = {id(weight) for weight in adapter.values()}
    _refuse_lost([n for n, weight in trained.items() if id(weight) not in saved], model)
    return adapter


def _of_adapter(model, adapter: str) -> Tensors:
    """Name in the file -> the model's own tensor."""
    return get_peft_model_state_dict(model, model.state_dict(keep_vars=True), adapter, save_embedding_layers=False)


def _refuse_lost(names: list[str], model) -> None:
    if names:
        raise UserError(
            f"{names[0]} and {len(names) - 1} more of the trained weights of {type(model).__name__} would be in no "
            "file of a checkpoint. Leave them out of training.",
            key="weights",
        )


def _whole_state(model) -> Tensors:
    """The model's weights and persistent buffers as meta tensors of their full shapes, under ZeRO-3 too; a tied weight
    is one tensor under several names."""
    meta: dict[int, torch.Tensor] = {}
    for tensor in _state(model).values():
        shape = getattr(tensor, "ds_shape", tensor.shape)
        if id(tensor) not in meta:
            meta[id(tensor)] = torch.empty(shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
    return {name: meta[id(tensor)] for name, tensor in _state(model).items()}


def _state(model) -> Tensors:
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}


@contextmanager
def _opened(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Name -> open file of every tensor in the folder's safetensors files."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _weight_files(folder)]
        yield {name: file for file in files for name in file.keys()}  # noqa: SIM118


def _weight_files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


# --------------------------------------------------------------------------------------------------------- loading


def load_weights(folder: str | Path, model) -> bool:
    """Puts a checkpoint into a model; False where its files are of another kind (an older Trainer's *.bin). Trainer
    itself only warns of tensors that it finds no place for. Raises UserError as below."""
    if not any(Path(folder).glob("**/*.safetensors")):
        return False
    (load_adapters if hasattr(model, "peft_config") else load_saved)(folder, model)
    return True


def load_saved(folder: str | Path, model) -> None:
    """Puts the files of a checkpoint into a whole (not sharded) model in place, a layer at a time. Raises UserError
    where a tensor of the files then is not in the model bit by bit, or a weight of the model is in no file."""
    shell, state, meta = _shell(model), _state(model), _whole_state(model)
    loaded, restored = set(), set()
    with _opened(folder) as files, torch.no_grad(), _without_bars():
        for names in _layers(state):
            expected = core_model_loading.revert_weight_conversion(model, {name: meta[name] for name in names})
            saved = {name: files[name].get_tensor(name) for name in expected if name in files}
            for name, value in _converted(model, shell, saved).items():
                state[name].copy_(value)
                loaded.add(id(state[name]))
            current = core_model_loading.revert_weight_conversion(model, {n: state[n].detach().cpu() for n in names})
            _refuse_differences(folder, saved, current)
            restored |= set(saved)
        missing = [name for name, weight in state.items() if id(weight) not in loaded]
        missing = [name for name in missing if name not in (model._keys_to_ignore_on_save or ())]
        if wrong := [*missing, *(set(files) - restored)]:
            reason = f"{wrong[0]} is not in both the model and its files."
            raise UserError(f"{folder} cannot be resumed from: {reason}", "resume_from_checkpoint")


def load_adapters(folder: str | Path, model) -> None:
    """Puts a checkpoint's files into the adapters of a PEFT model in place, all that have a file. PEFT's loader gives
    some tensors names that the model does not have (Laguna). Raises UserError as `load_saved` does."""
    for name, config in model.peft_config.items():
        adapter_folder = _place(folder, name)
        if not _weight_files(adapter_folder) and name not in model.active_adapters:
            continue
        if config.is_prompt_learning:  # its file contains what the weights compute, not the weights
            model.load_adapter(str(adapter_folder), name, is_trainable=name in model.active_adapters)
        with _opened(adapter_folder) as files, torch.no_grad():
            own = _of_adapter(model, name)
            saved = {key: files[key].get_tensor(key) for key in own if key in files}
            for key in () if config.is_prompt_learning else saved:
                own[key].copy_(saved[key])
            current = {key: weight.detach().cpu() for key, weight in _of_adapter(model, name).items()}
        if missing := [key for key in own if key not in saved]:
            reason = f"{adapter_folder} lacks {len(missing)} of the adapter's weights, such as {missing[0]}."
            raise UserError(reason, "weights")
        _refuse_differences(adapter_folder, saved, current)


def _place(folder: str | Path, adapter: str) -> Path:
    """Where PEFT keeps an adapter in a checkpoint."""
    return Path(folder) if adapter == "default" else Path(folder, adapter)


def _refuse_differences(folder, saved: Tensors, current: Tensors) -> None:
    wrong = [name for name, value in saved.items() if name not in current or not _same(current[name], value)]
    if wrong:
        raise UserError(
            f"{folder} cannot be resumed from: {wrong[0]} and {len(wrong) - 1} more are not in the model as they were "
            "saved. Is it of this architecture and dtype, and is transformers of the version that has written it?",
            key="resume_from_checkpoint",
        )


def _same(current: torch.Tensor, saved: torch.Tensor) -> bool:
    """Bit by bit; a model in a wider dtype than its file may have the same values."""
    if current.shape != saved.shape:
        return False
    bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (current.to(saved.dtype), saved))
    return torch.equal(*bits)


def _layers(state: Tensors) -> list[list[str]]:
    """The names of each layer, and of what is in none."""
    groups: dict[str, list[str]] = {}
    for name in state:
        prefix = LAYER.match(name)
        groups.setdefault(prefix.group() if prefix else "", []).append(name)
    return list(groups.values())


def _shell(model):
    """The model without data, on which transformers may put tensors of its own."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    memo = {
        key: torch.nn.Parameter(m, t.requires_grad) if isinstance(t, torch.nn.Parameter) else m
        for (key, m), t in zip(memo.items(), {id(t): t for t in tensors}.values(), strict=True)
    }
    return copy.deepcopy(model, memo)


def _converted(model, shell, saved: Tensors) -> Tensors:
    """The tensors of a file as the model's own, by name. `shell` is left without data."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not made by from_pretrained: as transformers does when it saves such a model
        mapping = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
        conversions = [part for part in mapping if not isinstance(part, core_model_loading.PrefixChange)]
    config = modeling_utils.LoadStateDictConfig(weight_mapping=copy.deepcopy(conversions))
    core_model_loading.convert_and_load_state_dict_in_model(shell, saved, config)
    values = {}
    for name, tensor in _state(shell).items():
        if not tensor.is_meta:
            values[name] = tensor.detach()
            owner, _, own = name.rpartition(".")
            setattr(
                shell.get_submodule(owner),
                own,
                torch.nn.Parameter(tensor.to("meta"), False)
                if isinstance(tensor, torch.nn.Parameter)
                else tensor.to("meta"),
            )
    return values


@contextmanager
def _without_bars():
    """transformers would draw a bar for each layer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
