"""A fake GPU for tests: fake tensors (shape, dtype and device without data) of a device beside the CPU.

torch's build for CPUs has no autograd for "cuda", so the device is torch's slot for backends from outside. On it an
operator whose tensors are on two devices fails, as does every operator that needs a value (`item`, `tolist`, `nonzero`,
an index by a mask, `bincount`): on a GPU those synchronize. Products and sums of two dtypes, which fake tensors accept,
`Strict` refuses.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from mdpo.types import PairBatch

NAME = "fakegpu"
ONE_DTYPE = ("mm", "addmm", "bmm", "baddbmm", "index_add", "index_add_", "index_copy", "index_copy_", "scatter_add")
ATTENTION = "scaled_dot_product"


def device() -> torch.device:
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME)
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return torch.device(NAME, 0)


class BlockingCopy(Exception):
    pass


class Strict(TorchDispatchMode):
    """Refuses what a GPU would, one operator of two dtypes, and a blocking copy from the CPU. `nonzero_calls` counts
    calls of `nonzero`, which the LM head's backward may make."""

    def __init__(self):
        super().__init__()
        self.nonzero_calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._opname
        if name in ("_to_copy", "copy_") and not (kwargs or {}).get("non_blocking") and not (args[2:] and args[2]):
            out = function(*args, **(kwargs or {}))
            if out.device.type == NAME and args[-1 if name == "copy_" else 0].device.type == "cpu":
                raise BlockingCopy(f"a tensor of {tuple(out.shape)} waits for the GPU on its way to it")
            return out
        if name == "nonzero":
            self.nonzero_calls += 1
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if name in ONE_DTYPE or ATTENTION in name:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            dtypes = {x.dtype for x in tensors}
            if len(dtypes) > 1 and "out_dtype" not in (kwargs or {}):
                raise TypeError(f"{name} of {sorted(map(str, dtypes))}")
        return function(*args, **(kwargs or {}))


class FakeGpu:
    """Inside this context tensors are fake; `strict` counts and refuses."""

    def __init__(self):
        self.device, self.mode, self.strict = device(), FakeTensorMode(), Strict()

    def __enter__(self):
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) is made on the CPU, then moved
        self.mode.__enter__()
        self.strict.__enter__()
        return self

    def __exit__(self, *error):
        self.strict.__exit__(*error)
        self.mode.__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lift)

    def model(self, model: nn.Module) -> nn.Module:
        """A meta model with its weights and buffers on the device."""
        converted: dict[int, torch.Tensor] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in converted:
                        with self.mode:
                            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                        is_weight = tensors is module._parameters
                        converted[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                    tensors[name] = tensor if tensor is None else converted[id(tensor)]
        return model

    def batch(self, batch: PairBatch) -> PairBatch:
        """A collator's batch as `Trainer._prepare_inputs` has it: tensors on the device."""
        fake = {name: self.mode.from_tensor(x) for name, x in batch.items() if isinstance(x, torch.Tensor)}
        with self.mode:
            return batch | {name: x.to(self.device, non_blocking=True) for name, x in fake.items()}
