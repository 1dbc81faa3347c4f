import torch


def run(q, k, v, g, beta, state, cu_seqlens, eps):
    def norm(x):
        x = x.float()
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)

    group = v.shape[1] // k.shape[1]
    q_all = norm(q).repeat_interleave(group, 1) / q.shape[-1] ** 0.5
    k_all = norm(k).repeat_interleave(group, 1)
    o, new_state = torch.empty_like(v), state.clone()
    for s, start, end in zip(new_state, cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        for t in range(start, end):
            s *= g[t].exp()[:, None, None]
            d = beta[t].float()[:, None] * (v[t].float() - torch.einsum("hkv,hk->hv", s, k_all[t]))
            s += k_all[t][:, :, None] * d[:, None, :]
            o[t] = torch.einsum("hkv,hk->hv", s, q_all[t]).to(o.dtype)
    return o, new_state
