"""Where Python would wait for a GPU, counted on the CPU: every question about a tensor that comes from those of a step."""
import traceback
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASK = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount", "argwhere", "masked_scatter_backward"}
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
FETCH = {"tolist", "numpy", "__array__", "cpu"}                            # of all numbers at once: no operation of theirs is seen on the CPU
MAKE = {"tensor", "as_tensor", "new_tensor"}                               # on a device, from numbers of Python


class _Fetched(TorchFunctionMode):
    def __init__(self, waits: "Waits") -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        own = bool(args) and isinstance(args[0], Tensor) and self.waits.holds(args[0])
        if name in FETCH and own:
            return self.waits.note(name, func, args, kwargs)
        sent = name == "to" and not own and not kwargs.get("non_blocking") and any(isinstance(arg, torch.device) for arg in (*args, *kwargs.values()))
        if sent or name in MAKE and (own or kwargs.get("device") is not None):
            self.waits.note(name, func, args, kwargs)
        return func(*args, **kwargs)


class Waits(TorchDispatchMode):
    "`found` are the operations that would wait, with the line that asked. What comes from `tensors` is taken to be on a GPU."

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.found, self.kept, self.fetched = [], {}, _Fetched(self)
        for tensor in tensors:
            self.hold(tensor)

    def hold(self, tensor: Tensor) -> None:
        self.kept[tensor.untyped_storage()._cdata] = tensor                 # kept, so that no other takes its place

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.kept

    def note(self, name: str, func, args, kwargs):
        lines = [frame for frame in traceback.extract_stack() if "/medvis/" in frame.filename or "/transformers/models" in frame.filename]
        self.found.append(f"{name} at {lines[-1].filename.split('/')[-1]}:{lines[-1].lineno}" if lines else name)
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return func(*args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = any(map(self.holds, given))
        masks = name in INDEX and any(leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor))
        if held and (name in ASK or masks):
            self.note(name, lambda: None, (), {})
        out = func(*args, **kwargs)
        for made in tree_leaves(out) if held else ():
            if isinstance(made, Tensor):
                self.hold(made)
        return out

    def __enter__(self):
        self.fetched.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fetched.__exit__(*error)
