"""transformers' own gated delta rule as candidates: `program.py chunk` or `program.py recurrent`.

Nothing of it is copied here: the functions are imported from the installed package, and the official
code is what answers. They take one batch of equal lengths, [B, T, H, D]; karat's sequences are packed,
so each is handed over alone. See kernel-chunk.toml and kernel-recurrent.toml for the plans.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "optimized/src/doors"))

from karat_kernel import kernel, needs, serve

with needs("pip install torch transformers numpy"):
    import torch
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

WAYS = {"chunk": torch_chunk_gated_delta_rule, "recurrent": torch_recurrent_gated_delta_rule}
official = WAYS[sys.argv[1]]


@kernel("gated_delta_rule", framework="torch")
def gated_delta_rule(q, k, v, g, beta, state, cu_seqlens):
    cuts = cu_seqlens.tolist()
    spans = [(i, a, b) for i, (a, b) in enumerate(zip(cuts, cuts[1:])) if a < b]

    def call():
        o, states = torch.empty_like(v), state.clone()
        for i, start, end in spans:
            tokens = [x[None, start:end] for x in (q, k, v, g, beta)]
            got, after = official(
                *tokens,
                initial_state=state[i : i + 1],
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            o[start:end], states[i] = got[0], after[0]
        return {"o": o, "state": states}

    return call


with torch.inference_mode():
    serve()
