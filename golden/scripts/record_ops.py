"""Records the official functions and modules one by one, on inputs of the model's own domain.

Tensors are named <op>/<case>/in.<tensor> and <op>/<case>/out.<tensor> with the names, shapes and packed
layout of golden/src/ops/<op>.rs: the tokens of all sequences one after another, and their offsets.
"""

import datetime

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as m

from common import distance, producer, write_recording

EPS = 1e-6


class Recorder:
    def __init__(self):
        self.rng = np.random.default_rng(20261123)
        self.tensors, self.cases, self.noise = {}, [], {}

    def normal(self, *shape, mean=0.0, std=1.0):
        return torch.tensor(self.rng.normal(mean, std, shape).astype(np.float32))

    def uniform(self, low, high, *shape):
        return torch.tensor(self.rng.uniform(low, high, shape).astype(np.float32))

    def case(self, op, case, inputs, outputs, exact, **scalars):
        """`exact` are the same outputs of the same code in double."""
        for name, x in inputs.items():
            self.tensors[f"{op}/{case}/in.{name}"] = x.detach().numpy()
        for name, x in outputs.items():
            x = x.detach().numpy()
            self.tensors[f"{op}/{case}/out.{name}"] = x
            if x.dtype == np.float32:
                flat = lambda y: np.asarray(y, dtype=np.float64).reshape(len(y), -1)  # noqa: E731
                self.noise[f"{op}/{case}/{name}"] = {"f64": distance(flat(x), flat(exact[name].detach().numpy()))}
        self.cases.append({"op": op, "case": case, "scalars": {name: float(x) for name, x in scalars.items()}})


def double(x):
    return x.double() if x.is_floating_point() else x


def lengths(*sizes):
    return torch.tensor(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def norms(r):
    for case, n, d, std in (("domain", 7, 64, 1.0), ("tiny-rows", 5, 128, 1e-4), ("wide", 3, 2048, 3.0)):
        x, w = r.normal(n, d, std=std), r.normal(d, std=0.3)
        module = m.Qwen3NextRMSNorm(d, eps=EPS)
        module.weight.data = w
        out = module(x)
        # The module casts to f32 by itself: the same formula in double.
        wide = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS) * (1 + w.double())
        r.case("rms_norm", case, {"x": x, "weight": w}, {"o": out}, {"o": wide}, eps=EPS)
        z, w = r.normal(n, d), r.normal(d, mean=1.0, std=0.2)
        module = m.Qwen3NextRMSNormGated(d, eps=EPS)
        module.weight.data = w
        out = module(x, z)
        wide = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS) * w.double() * F.silu(z.double())
        r.case("rms_norm_gated", case, {"x": x, "z": z, "weight": w}, {"o": out}, {"o": wide}, eps=EPS)
        r.case("l2_norm", case, {"x": x}, {"o": m.l2norm(x, eps=EPS)}, {"o": m.l2norm(x.double(), eps=EPS)}, eps=EPS)


def conv(r):
    for case, b, t, c, w in (("t1", 1, 1, 8, 4), ("t2", 2, 2, 8, 4), ("t65", 1, 65, 12, 4), ("w3", 2, 9, 6, 3)):
        x, weight = r.normal(b, t, c), r.normal(c, w, std=0.5)

        def run(x, weight):
            return m.causal_conv1d_fn(x.transpose(1, 2), weight, None, activation="silu").transpose(1, 2)

        # The official state holds W columns with zeros before the start; the last W - 1 are the window.
        state = F.pad(x.transpose(1, 2), (w - 1, 0))[:, :, -(w - 1) :]
        inputs = {"x": x.reshape(b * t, c), "weight": weight, "state": torch.zeros(b, c, w - 1), "cu_seqlens": lengths(*[t] * b)}
        outputs = {"o": run(x, weight).reshape(b * t, c), "state": state}
        exact = {"o": run(x.double(), weight.double()).reshape(b * t, c), "state": state.double()}
        r.case("causal_conv1d", case, inputs, outputs, exact)
    # One token through the cached path.
    b, c, w = 3, 10, 4
    x, weight, window = r.normal(b, c, 1), r.normal(c, w, std=0.5), r.normal(b, c, w)

    def step(x, weight, window):
        window = window.clone()
        return m.causal_conv1d_update(x, window, weight, None, "silu")[:, :, 0], window[:, :, 1:]

    out, state = step(x, weight, window)
    wide, wide_state = step(x.double(), weight.double(), window.double())
    inputs = {"x": x[:, :, 0], "weight": weight, "state": window[:, :, 1:], "cu_seqlens": lengths(*[1] * b)}
    r.case("causal_conv1d", "update", inputs, {"o": out, "state": state}, {"o": wide, "state": wide_state})


def delta_rule(r):
    plans = [(f"t{t}", 1, t, 2, 6, 12, 8, "domain") for t in (1, 2, 63, 64, 65, 130, 273)]
    plans += [("tiny-norm-k", 2, 65, 2, 4, 16, 16, "tiny"), ("remember", 1, 130, 2, 4, 16, 16, "remember")]
    plans += [("fresh", 2, 65, 2, 4, 16, 16, "fresh")]
    for case, b, t, hk, hv, k, v, fill in plans:
        scale = 1e-3 / np.sqrt(k) if fill == "tiny" else 1.0
        q, key = (torch.clamp(r.normal(b, t, hk, k, mean=0.1, std=0.5), min=-0.28) * scale for _ in range(2))
        value = r.normal(b, t, hv, v, std=0.5)
        rate = r.uniform(0.01, 16, hv)
        g = -rate * 0.05 * F.softplus(r.normal(b, t, hv, mean=1.0))
        if fill == "remember":
            g = r.uniform(-1e-4, 0, b, t, hv)
        beta = r.uniform(0.05, 0.95, b, t, hv)
        state = torch.zeros(b, hv, k, v) if fill == "fresh" else r.normal(b, hv, k, v, std=0.3)
        inputs = {
            "q": q.reshape(b * t, hk, k),
            "k": key.reshape(b * t, hk, k),
            "v": value.reshape(b * t, hv, v),
            "g": g.reshape(b * t, hv),
            "beta": beta.reshape(b * t, hv),
            "state": state,
            "cu_seqlens": lengths(*[t] * b),
        }
        # The official functions cast to f32 inside; in double the recurrence is written out.
        exact = recurrence(*(x.double() for x in (q, key, value, g, beta, state)))
        for name, function in (
            ("recurrent", m.torch_recurrent_gated_delta_rule),
            ("chunk", m.torch_chunk_gated_delta_rule),
        ):
            o, final = function(
                q, key, value, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
            )
            outputs = {"o": o.reshape(b * t, hv, v), "state": final}
            r.case("gated_delta_rule", f"{name}-{case}", inputs, outputs, exact, eps=EPS)


def recurrence(q, k, v, g, beta, state):
    b, t, hv, _ = v.shape
    group = hv // k.shape[2]
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS) for x in (q, k))
    q, k = (x.repeat_interleave(group, 2) for x in (q * q.shape[-1] ** -0.5, k))
    s, out = state.clone(), []
    for i in range(t):
        s = s * g[:, i].exp()[..., None, None]
        d = beta[:, i, :, None] * (v[:, i] - torch.einsum("bhkv,bhk->bhv", s, k[:, i]))
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, i], d)
        out.append(torch.einsum("bhkv,bhk->bhv", s, q[:, i]))
    return {"o": torch.stack(out, 1).reshape(b * t, hv, -1), "state": s}


def config(**fields):
    base = dict(
        vocab_size=32, hidden_size=48, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=6,
        linear_key_head_dim=12, linear_value_head_dim=8, linear_conv_kernel_dim=4, num_experts=12, num_experts_per_tok=3,
        moe_intermediate_size=20, shared_expert_intermediate_size=24,
    )  # fmt: skip
    c = Qwen3NextConfig(**{**base, **fields})
    c._attn_implementation = "eager"
    c._experts_implementation = "eager"
    return c


def fill(r, module, std=0.2):
    for name, parameter in module.named_parameters():
        parameter.data = r.normal(*parameter.shape, std=std)
        if name.endswith("A_log"):
            parameter.data = r.uniform(0.01, 16, *parameter.shape).log() - 2
        if isinstance(module, m.Qwen3NextGatedDeltaNet) and name == "norm.weight":
            parameter.data = r.normal(*parameter.shape, mean=1.0, std=0.2)
    return module.eval()


def rope(r):
    plans = [("default", {}, [0, 1, 2, 77, 4095]), ("far", {"rope_theta": 1e7}, [262143, 1048575, 131072])]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144, "rope_theta": 1e7}
    plans.append(("yarn", {"rope_parameters": {**yarn, "partial_rotary_factor": 0.25}}, [1, 262143, 1048575]))
    plans.append(("whole-head", {"partial_rotary_factor": 1.0}, [3, 1000]))
    for case, fields, positions in plans:
        c = config(head_dim=256 if case in ("far", "yarn") else 16, max_position_embeddings=262144, **fields)
        module = m.Qwen3NextRotaryEmbedding(c)
        where = torch.tensor([positions])
        x = r.normal(1, 2, len(positions), c.head_dim)

        def run(x):
            cos, sin = module(x, where)
            return m.apply_rotary_pos_emb(x, x, cos, sin)[0][0].transpose(0, 1)

        inputs = {"x": x[0].transpose(0, 1), "positions": where[0], "inv_freq": module.inv_freq}
        r.case("rope", case, inputs, {"o": run(x)}, {"o": run(x.double())}, attention_factor=module.attention_scaling)


def attention(r):
    for case, t, tk, hq, hkv, h in (("prefill", 65, 65, 4, 2, 16), ("decode", 1, 33, 8, 1, 32), ("continue", 5, 12, 6, 3, 8)):
        q, k, v = r.normal(1, hq, t, h), r.normal(1, hkv, tk, h), r.normal(1, hkv, tk, h)
        mask = torch.full((t, tk), float("-inf")).triu(tk - t + 1)[None, None]
        module = torch.nn.Module()
        module.num_key_value_groups, module.training = hq // hkv, False

        def run(q, k, v):
            return m.eager_attention_forward(module, q, k, v, mask.to(q.dtype), scaling=h**-0.5)[0][0]

        inputs = {name: x[0].transpose(0, 1) for name, x in (("q", q), ("k", k), ("v", v))}
        inputs |= {"cu_seqlens_q": lengths(t), "cu_seqlens_k": lengths(tk)}
        r.case("attention", case, inputs, {"o": run(q, k, v)}, {"o": run(*map(double, (q, k, v)))})


def experts(r):
    for case, renormalise, n in (("domain", True, 33), ("no-renormalise", False, 9)):
        c = config(norm_topk_prob=renormalise)
        block = fill(r, m.Qwen3NextSparseMoeBlock(c))
        x = r.normal(n, c.hidden_size)
        f = c.moe_intermediate_size
        wide = fill_like(block)
        logits, weights, ids = block.gate(x)
        exact_logits, exact_weights, exact_ids = wide.gate(x.double())
        assert (ids == exact_ids).all(), "a tie: choose another seed"
        scalars = {"top_k": c.num_experts_per_tok, "norm_topk_prob": renormalise}
        router = block.gate.weight.data
        r.case("moe_router", case, {"x": x, "weight": router}, {"ids": ids, "weights": weights, "logits": logits},
               {"weights": exact_weights, "logits": exact_logits}, **scalars)  # fmt: skip
        gate_up, down = block.experts.gate_up_proj.data, block.experts.down_proj.data
        stacked = {"gate_proj": gate_up[:, :f], "up_proj": gate_up[:, f:], "down_proj": down}
        o = block.experts(x, ids, weights)
        exact = wide.experts(x.double(), ids, weights.double())
        r.case("moe_experts", case, {"x": x, "ids": ids, "weights": weights, **stacked}, {"o": o}, {"o": exact})
        shared = {f"{name}_proj": getattr(block.shared_expert, f"{name}_proj").weight.data for name in ("gate", "up", "down")}
        gate = block.shared_expert_gate.weight.data

        def run(block, x):
            return torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)

        r.case("shared_expert", case, {"x": x, **shared, "gate": gate}, {"o": run(block, x)}, {"o": run(wide, x.double())})
        inputs = {"x": x, "router": router, **stacked, "shared_gate": gate}
        inputs |= {f"shared_{name}": w for name, w in shared.items()}
        outputs = {"o": block(x[None])[0], "ids": ids}
        r.case("moe_layer", case, inputs, outputs, {"o": wide(x.double()[None])[0]}, **scalars)


def fill_like(module):
    import copy

    return copy.deepcopy(module).double()


def layers(r):
    c = config()
    net = fill(r, m.Qwen3NextGatedDeltaNet(c, 0))
    for case, b, t in (("t1", 1, 1), ("t5", 2, 5), ("t65", 1, 65), ("t130", 1, 130)):
        x = r.normal(b, t, c.hidden_size)
        seen = {}

        def run(net, x, seen=None):
            cache = DynamicCache(config=c)
            official = m.torch_chunk_gated_delta_rule

            def spy(*args, **kwargs):
                if seen is not None:
                    seen.update(g=kwargs["g"], beta=kwargs["beta"])
                return official(*args, **kwargs)

            m.torch_chunk_gated_delta_rule = spy
            try:
                o = net(x, cache_params=cache)
            finally:
                m.torch_chunk_gated_delta_rule = official
            conv = cache.get_conv_state(0, state_idx=0)[:, :, -(c.linear_conv_kernel_dim - 1) :]
            state = cache.get_recurrent_state(0, state_idx=0)
            return {"o": o.reshape(b * t, -1), "conv_state": conv.clone(), "state": state.clone()}

        outputs = run(net, x, seen)
        wide_seen = {}
        exact = run(fill_like(net), x.double(), wide_seen)
        conv_dim = net.conv_dim
        zeros = {
            "conv_state": torch.zeros(b, conv_dim, c.linear_conv_kernel_dim - 1),
            "state": torch.zeros(b, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim),
        }
        inputs = {
            "x": x.reshape(b * t, -1),
            "in_proj_qkvz": net.in_proj_qkvz.weight.data,
            "in_proj_ba": net.in_proj_ba.weight.data,
            "conv1d": net.conv1d.weight.data[:, 0],
            "a_log": net.A_log.data,
            "dt_bias": net.dt_bias.data,
            "norm": net.norm.weight.data,
            "out_proj": net.out_proj.weight.data,
            **zeros,
            "cu_seqlens": lengths(*[t] * b),
        }
        r.case("gdn_layer", case, inputs, outputs, exact, eps=EPS, hk=c.linear_num_key_heads, hv=c.linear_num_value_heads)
        # What the module computed for its gates.
        ba = net.in_proj_ba(x).view(b, t, c.linear_num_key_heads, -1)
        group = c.linear_num_value_heads // c.linear_num_key_heads
        raw_b, raw_a = (y.reshape(b * t, -1) for y in torch.split(ba, [group, group], dim=3))
        inputs = {"a": raw_a, "b": raw_b, "a_log": net.A_log.data, "dt_bias": net.dt_bias.data}
        a, bb = raw_a.double(), raw_b.double()
        g = -net.A_log.data.double().exp() * F.softplus(a + net.dt_bias.data.double())
        outputs = {name: x.reshape(b * t, -1) for name, x in seen.items()}
        r.case("gdn_gates", case, inputs, outputs, {"g": g, "beta": bb.sigmoid()})
    block = fill(r, m.Qwen3NextAttention(c, 1))
    rotary = m.Qwen3NextRotaryEmbedding(c)
    for case, t in (("t1", 1), ("t7", 7), ("t65", 65)):
        x = r.normal(1, t, c.hidden_size)
        mask = torch.full((t, t), float("-inf")).triu(1)[None, None]

        def run(block, x):
            cache = DynamicCache(config=c)
            where = torch.arange(t)[None]
            o, _ = block(x, position_embeddings=rotary(x, where), attention_mask=mask.to(x.dtype), past_key_values=cache)
            k, v = cache.layers[1].keys, cache.layers[1].values
            return {"o": o[0], "k": k[0].transpose(0, 1), "v": v[0].transpose(0, 1)}

        empty = torch.zeros(0, c.num_key_value_heads, c.head_dim)
        inputs = {"x": x[0], **{f"{n}_proj": getattr(block, f"{n}_proj").weight.data for n in "qkvo"}}
        inputs |= {"q_norm": block.q_norm.weight.data, "k_norm": block.k_norm.weight.data, "k_cache": empty, "v_cache": empty}
        inputs |= {"cu_seqlens": lengths(t), "cu_seqlens_cache": lengths(0), "inv_freq": rotary.inv_freq}
        r.case("attention_layer", case, inputs, run(block, x), run(fill_like(block), x.double()), eps=EPS,
               attention_factor=1.0, hq=c.num_attention_heads, hkv=c.num_key_value_heads)  # fmt: skip


def record_ops(out):
    r = Recorder()
    with torch.no_grad():
        for part in (norms, conv, delta_rule, rope, attention, experts, layers):
            part(r)
    manifest = {
        "schema": "karat.golden/1",
        "id": "ops",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "why": "the official functions and modules one by one",
        "reason": "first recording",
        "supersedes": None,
        "checkpoint": {"source": "none"},
        "producer": producer("float32"),
        "prompts": [],
        "cases": r.cases,
        "self_noise": r.noise,
        "router": {},
    }
    write_recording(out, r.tensors, manifest)
