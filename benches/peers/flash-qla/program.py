"""FlashQLA's chunked gated delta rule as a candidate: flash_qla.chunk_gated_delta_rule."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "optimized/src/doors"))

from karat_kernel import kernel, needs, serve, unfit

with needs("pip install flash-qla numpy"):
    import torch

    if not torch.cuda.is_available():
        unfit("torch.cuda.is_available() is False: TileLang kernels need a GPU")
    from flash_qla import chunk_gated_delta_rule


@kernel("gated_delta_rule", framework="torch", device="cuda")
def gated_delta_rule(q, k, v, g, beta, state, cu_seqlens):
    tokens = [x[None] for x in (q, k, v, g, beta)]
    cuts = cu_seqlens.int()

    def call():
        o, after = chunk_gated_delta_rule(
            *tokens,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=cuts,
        )
        return {"o": o[0], "state": after}

    return call


with torch.inference_mode():
    serve()
