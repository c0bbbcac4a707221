"""Counts what tensors would allocate, without allocating it: fake tensors (shape and dtype without data) go through
the real code. Only what has other code on a GPU is replaced: compiled functions and attention kernels."""

import contextlib
from weakref import ref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HALF = (torch.float16, torch.bfloat16)
PARTS = ("activations", "LM head", "gradients")


class Allocations(TorchDispatchMode):
    """Counts the bytes of live storages while it is entered, by PARTS. `peak` has them at the moment when their sum
    was highest. Storages that existed before, such as weights, have to be named in `known`, and count nothing."""

    def __init__(self, vocabulary: int, known: list[torch.Tensor]):
        super().__init__()
        self.vocabulary, self.paused = vocabulary, False
        self.now, self.peak = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
        self._live: dict[int, tuple] = {}  # address of a storage -> (weak reference, part, bytes)
        self._known = [tensor.untyped_storage() for tensor in known]  # kept alive, so that no address comes twice
        self._live |= {storage._cdata: (None, PARTS[0], 0) for storage in self._known}

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        if function is torch.ops.aten.nonzero.default:  # of data that is not there: at most, all
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        out = function(*args, **(kwargs or {}))
        if not self.paused:
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor)
        return out

    def add(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Counts the tensor's storage, under `part` where it is given, whatever it was counted under before."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live and part is None:
            return
        self._free(address)
        part = part or ("LM head" if self.vocabulary in tensor.shape else "activations")
        self._live[address] = (ref(storage, lambda _: self._free(address)), part, storage.nbytes())
        self.now[part] += storage.nbytes()
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)

    def _free(self, address: int) -> None:
        _, part, size = self._live.pop(address, (None, PARTS[0], 0))
        self.now[part] -= size


@contextlib.contextmanager
def replaced(module, name: str, value):
    """Within it the module's attribute is `value`."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


# ------------------------------------------------------------------------------------------------------------ stand-ins


class OnePass(torch.autograd.Function):
    """A compiled function of tensors: it saves its inputs and allocates its output; in backward, their gradients."""

    @staticmethod
    def forward(ctx, allocations: Allocations, function, *inputs):
        ctx.tensors = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
        allocations.paused = True
        try:
            out = function(*inputs)
        finally:
            allocations.paused = False
        allocations.add(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        return None, None, *(torch.empty_like(next(saved)) if tensor else None for tensor in ctx.tensors)


def norm_forward(allocations: Allocations):
    return lambda self, x: OnePass.apply(allocations, lambda x, weight: type(self).forward(self, x), x, self.weight)


def gated_forward(allocations: Allocations):
    """As mdpo.forward.compiled_ops has it: gate and up are saved, their product is recomputed in backward."""

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = OnePass.apply(allocations, lambda gate, up: self.act_fn(gate) * up, gate, up)
        if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return self.down_proj(inner)
        address, dtype = inner.untyped_storage()._cdata, inner.dtype

        def pack(tensor):
            return tensor.shape if tensor.untyped_storage()._cdata == address else tensor

        def unpack(saved):
            return saved if isinstance(saved, torch.Tensor) else torch.empty(saved, dtype=dtype)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.down_proj(inner)

    return forward


def varlen_kernel(flash: bool):
    """For mdpo.forward.packed_attention._varlen: torch's kernel supports neither soft-caps nor dropout."""

    def choose(query, value, dropout, softcap):
        size = query.size(-1)
        if query.dtype not in HALF or size > 256 or size % 8 or value.size(-1) != size:
            return None
        return _attend if flash or (softcap is None and not dropout) else None

    return choose


def _attend(query, key, value, forest, *_):
    index = torch.empty(sum(forest.key_sizes), dtype=torch.int64)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _Attention.apply(q, k.index_select(0, index), v.index_select(0, index))[None]


class _Attention(torch.autograd.Function):
    """Flash attention saves its inputs, its output and a float32 per query and head; its backward adds a float32 query
    gradient up and, where several heads share a key, makes the keys' gradients for each head first."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty(q.shape, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        sums = [torch.empty(q.shape, dtype=torch.float32)]
        if q.size(1) != k.size(1):
            sums += [torch.empty((k.size(0), *q.shape[1:]), dtype=k.dtype) for _ in range(2)]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
