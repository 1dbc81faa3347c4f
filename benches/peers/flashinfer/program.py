"""FlashInfer's attention and gated delta rule as candidates: `program.py attention|gated_delta_rule`.

Attention is BatchPrefillWithRaggedKVCacheWrapper: `plan` once for a problem, `run` is the call, and torch
multiplies by the gate. The delta rule is flashinfer.gdn_prefill.chunk_gated_delta_rule, which takes decays
as they multiply and, whatever its argument of that name says, queries and keys that are unit vectors: torch
makes both within the call. States stand there with a value's channel before a key's: the one that is given is
turned once, the one that comes back when it is handed over.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "optimized/src/doors"))

from karat_kernel import kernel, needs, serve, unfit

with needs("pip install flashinfer-python numpy"):
    import torch

    if not torch.cuda.is_available():
        unfit("torch.cuda.is_available() is False: FlashInfer's kernels need a GPU")
    import flashinfer
    from flashinfer.gdn_prefill import chunk_gated_delta_rule


def attention():
    room = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")

    @kernel("attention", framework="torch", device="cuda")
    def attention(q, k, v, cu_seqlens_q, cu_seqlens_k, gate=None):
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(room, "NHD")
        wrapper.plan(
            cu_seqlens_q.int(),
            cu_seqlens_k.int(),
            q.shape[1],
            k.shape[1],
            q.shape[2],
            causal=True,
            q_data_type=q.dtype,
        )

        def call():
            o = wrapper.run(q, k, v)
            return o if gate is None else o * gate.sigmoid()

        return call


def gated_delta_rule():
    @kernel("gated_delta_rule", framework="torch", device="cuda")
    def gated_delta_rule(q, k, v, g, beta, state, cu_seqlens, eps):
        turned = state.transpose(-1, -2).contiguous()

        def unit(x):
            wide = x.float()
            return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)

        def call():
            o, after = chunk_gated_delta_rule(
                unit(q),
                unit(k),
                v,
                g=g.exp(),
                beta=beta.float(),
                initial_state=turned,
                output_final_state=True,
                cu_seqlens=cu_seqlens,
            )
            return {"o": o, "state": after.transpose(-1, -2)}

        return call


WAYS = {"attention": attention, "gated_delta_rule": gated_delta_rule}
WAYS[sys.argv[1]]()
with torch.inference_mode():
    serve()
