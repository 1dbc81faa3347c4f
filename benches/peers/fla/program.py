"""flash-linear-attention's gated delta rule as candidates: `program.py chunk|recurrent`.

What is called is fla.ops.gated_delta_rule; packed sequences go there as they are, with cu_seqlens. Where
FlashQLA or TileLang is installed, fla would hand the call on to it: switched off, so that its own Triton
kernels answer.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "optimized/src/doors"))

from karat_kernel import kernel, needs, serve, unfit

os.environ["FLA_FLASH_QLA"] = os.environ["FLA_TILELANG"] = "0"

with needs("pip install 'flash-linear-attention[cuda]' numpy"):
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

if not torch.cuda.is_available():
    unfit("torch.cuda.is_available() is False: Triton kernels need a GPU")

WAYS = {"chunk": chunk_gated_delta_rule, "recurrent": fused_recurrent_gated_delta_rule}
way = WAYS[sys.argv[1]]


@kernel("gated_delta_rule", framework="torch", device="cuda")
def gated_delta_rule(q, k, v, g, beta, state, cu_seqlens):
    # By name: between g and beta the one has two more.
    tokens = {name: x[None] for name, x in dict(q=q, k=k, v=v, g=g, beta=beta).items()}

    def call():
        o, after = way(
            **tokens,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=cu_seqlens,
        )
        return {"o": o[0], "state": after}

    return call


with torch.inference_mode():
    serve()
