"""PyTorch's own functions as candidates: `program.py WAY cpu|cuda`.

What is called is public and named beside each way; what stands around it (cutting packed sequences, sorting
tokens by expert, masks) is done once for a problem and not timed. The kernel.toml files say how each rounds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "optimized/src/doors"))

from karat_kernel import kernel, needs, serve, unfit

with needs("pip install torch numpy"):
    import torch
    import torch.nn.functional as F

way, device = sys.argv[1:]
if device == "cuda" and not torch.cuda.is_available():
    unfit("torch.cuda.is_available() is False: no GPU, or a torch without CUDA")


def linear():
    """torch.nn.functional.linear."""

    @kernel("linear", framework="torch", device=device)
    def linear(x, weight):
        return lambda: F.linear(x, weight)


def rms_norm():
    """torch.nn.functional.rms_norm in f32, as the model's module computes, on weights from around one."""

    @kernel("rms_norm", framework="torch", device=device)
    def rms_norm(x, weight, eps, residual=None):
        scale = 1 + weight.float()

        def call():
            h = x if residual is None else x + residual
            o = F.rms_norm(h.float(), scale.shape, scale, eps).to(x.dtype)
            return {"o": o} if residual is None else {"o": o, "h": h}

        return call


def attention(backend=None):
    """torch.nn.functional.scaled_dot_product_attention, one call for all sequences of the same lengths."""
    from torch.nn.attention import sdpa_kernel

    @kernel("attention", framework="torch", device=device)
    def attention(q, k, v, cu_seqlens_q, cu_seqlens_k, gate=None):
        cuts = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
        spans = list(zip(*(zip(x, x[1:]) for x in cuts)))
        lengths = {(b - a, d - c) for (a, b), (c, d) in spans}
        # A batch is one call; what is ragged is one for each sequence.
        batch = len(spans) if len(lengths) == 1 and 0 not in next(iter(lengths)) else 1
        each = [((0, len(q)), (0, len(k)))] if 1 < batch else spans

        def split(x, a, b):
            return x[a:b].view(batch, -1, *x.shape[1:]).transpose(1, 2)

        calls = []
        for (a, b), (c, d) in each:
            if a == b:
                continue
            told = split(q, a, b), split(k, c, d), split(v, c, d)
            new, seen = told[0].shape[2], told[1].shape[2]
            if new in (1, seen):
                how = {"is_causal": new != 1}
            else:
                mask = torch.ones(new, seen, dtype=torch.bool, device=device)
                how = {"attn_mask": mask.tril(seen - new)}
            calls.append((told, how))

        def call():
            parts = []
            for told, how in calls:
                got = F.scaled_dot_product_attention(*told, enable_gqa=True, **how)
                parts.append(got.transpose(1, 2).flatten(0, 1))
            o = parts[0] if len(parts) == 1 else torch.cat(parts)
            return o if gate is None else o * gate.sigmoid()

        if backend is None:
            return call

        def chosen():
            with sdpa_kernel(backend):
                return call()

        return chosen


def attention_cudnn():
    """The same, cuDNN's kernel and no other."""
    from torch.nn.attention import SDPBackend

    attention(SDPBackend.CUDNN_ATTENTION)


def moe_loop():
    """One expert after another, as transformers' eager experts: linear, silu, index_add_."""

    @kernel("moe_experts", framework="torch", device=device)
    def moe_experts(x, ids, weights, gate_proj, up_proj, down_proj):
        users = [(e, *(ids == e).nonzero(as_tuple=True)) for e in ids.unique().tolist()]
        both = torch.cat([gate_proj, up_proj], dim=1)

        def call():
            o = torch.zeros_like(x)
            for e, token, slot in users:
                gate, up = F.linear(x[token], both[e]).chunk(2, dim=-1)
                got = F.linear(F.silu(gate) * up, down_proj[e])
                o.index_add_(0, token, (got * weights[token, slot, None]).to(x.dtype))
            return o

        return call


def moe_grouped():
    """torch.nn.functional.grouped_mm over tokens sorted by expert, as transformers' grouped experts."""
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        unfit(f"torch {torch.__version__} has no grouped_mm: pip install 'torch>=2.9'")

    @kernel("moe_experts", framework="torch", device=device)
    def moe_experts(x, ids, weights, gate_proj, up_proj, down_proj):
        order = ids.flatten().argsort(stable=True)
        back = order.argsort()
        tokens = order // ids.shape[1]
        ends = ids.flatten().bincount(minlength=len(gate_proj)).cumsum(0).int()
        both = torch.cat([gate_proj, up_proj], dim=1).transpose(1, 2)
        down = down_proj.transpose(1, 2)

        def call():
            gate, up = grouped(x[tokens], both, offs=ends).chunk(2, dim=-1)
            got = grouped(F.silu(gate) * up, down, offs=ends)
            got = got[back].view(*ids.shape, -1) * weights[..., None]
            return got.sum(dim=1).to(x.dtype)

        return call


WAYS = {
    "linear": linear,
    "rms-norm": rms_norm,
    "attention": attention,
    "attention-cudnn": attention_cudnn,
    "moe-loop": moe_loop,
    "moe-grouped": moe_grouped,
}
WAYS[way]()
with torch.inference_mode():
    serve()
