"""Gradients through a network that was loaded in inference mode, without copies of its weights.

Everything here is undone when its `with` ends, however it ends.
"""

import contextlib

import torch
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def ordinary(network):
    """In it, parameters and buffers that are inference tensors stand behind ordinary ones on the same memory.

    Autograd refuses to save an inference tensor for backward. Nothing is copied; no parameter collects a gradient.
    """
    replaced, frozen = [], []
    try:
        for module in network.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_inference():
                        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                        alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
                        if table is module._parameters:
                            alias = torch.nn.Parameter(alias, requires_grad=False)
                        table[name] = alias
                        replaced.append((table, name, alias, tensor))
        frozen += [p for p in network.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for table, name, alias, tensor in replaced:
            if table[name] is alias:  # the host may have moved or patched it meanwhile
                table[name] = tensor
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def norms_apart(network):
    """In it, a layer that adds to its input in place, as the host's text encoders do, leaves alone what its norms
    have saved for backward."""

    def apart(_, inputs):
        return inputs[0].clone(), *inputs[1:]

    norms = [m for m in network.modules() if isinstance(m, torch.nn.LayerNorm)]
    handles = [norm.register_forward_pre_hook(apart) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# What a block keeps for backward, in units of its input: a ResBlock two norms and two activations, a transformer
# twenty-odd tensors, most of them in its feed-forward part. Measured on SD 1.x's layout.
KEPT = {False: 5, True: 24}


def _cheapest(costs, budget):
    """As many keys of ``costs`` as fit in ``budget`` together, the cheapest first."""
    kept, spent = set(), 0
    for key, cost in sorted(costs.items(), key=lambda item: item[1]):
        spent += cost
        if spent > budget:
            break
        kept.add(key)
    return kept


@contextlib.contextmanager
def checkpointed(modules, is_transformer, budget):
    """In it, of ``modules`` only so many keep their activations for backward as fit in ``budget`` bytes; the others
    keep their inputs and compute the rest again. The first run tells their sizes, and all of them compute again.

    ``is_transformer(module)`` tells the two kinds of :data:`KEPT` apart.
    """
    theirs, costs, keeping = [], {}, None

    def cost(module, x):
        # Weights that are cast to another precision are kept as well.
        cast = sum(p.numel() for p in module.parameters() if p.dtype != x.dtype)
        return (KEPT[is_transformer(module)] * x.numel() + cast) * x.element_size()

    def wrapped(module, forward):
        def run(x, *args, **kwargs):
            nonlocal keeping
            if not torch.is_grad_enabled():
                return forward(x, *args, **kwargs)
            if module not in costs:
                costs[module] = cost(module, x)
            elif keeping is None:
                keeping = _cheapest(costs, budget)
            if keeping and module in keeping:
                return forward(x, *args, **kwargs)
            # Options are written to as the network runs; when it runs again they must say what they said here.
            args = [dict(a) if isinstance(a, dict) else a for a in args]
            kwargs = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}
            return checkpoint(forward, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    try:
        for module in modules:
            theirs.append((module, module.__dict__.get("forward")))
            module.forward = wrapped(module, module.forward)
        yield
    finally:
        for module, forward in theirs:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
