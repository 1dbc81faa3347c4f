import torch


def run(q, k, v, gate, cu_seqlens_q, cu_seqlens_k):
    group = q.shape[1] // k.shape[1]
    o = torch.empty_like(q)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        k_all = k[k0:k1].float().repeat_interleave(group, 1)
        v_all = v[k0:k1].float().repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q[q0:q1].float(), k_all) / q.shape[-1] ** 0.5
        first = (k1 - k0) - (q1 - q0)
        ahead = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).triu(first + 1)
        p = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        seen = torch.einsum("hij,jhd->ihd", p, v_all)
        o[q0:q1] = (seen * gate[q0:q1].float().sigmoid()).to(o.dtype)
    return o
