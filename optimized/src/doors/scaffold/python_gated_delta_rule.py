"""The gated delta rule, token by token. Per sequence and value head, with a state S: [K, V]:

    S <- exp(g) S,   d = beta (v - S' k),   S <- S + k d',   o = S' q

q, k: [N, HK, K], normalised here; v, o: [N, HV, V]; g, beta: [N, HV]; state: [B, HV, K, V];
cu_seqlens: [B + 1]. Value head h reads query and key head h / (HV / HK).
"""

import numpy as np

from karat_kernel import kernel, serve


def normalised(x, eps):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + np.float32(eps))


@kernel("gated_delta_rule")
def gated_delta_rule(q, k, v, g, beta, state, cu_seqlens, eps):
    group = v.shape[1] // k.shape[1]
    q = np.repeat(normalised(q, eps) / np.sqrt(np.float32(q.shape[-1])), group, axis=1)
    k = np.repeat(normalised(k, eps), group, axis=1)
    o, state = np.empty_like(v), state.copy()
    for s, start, end in zip(state, cu_seqlens, cu_seqlens[1:]):
        for t in range(start, end):
            s *= np.exp(g[t])[:, None, None]
            d = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", s, k[t]))
            s += k[t][:, :, None] * d[:, None, :]
            o[t] = np.einsum("hkv,hk->hv", s, q[t])
    return {"o": o, "state": state}


serve()
