"""Records a model that does not fit: one decoder layer in memory at a time.

Every prompt is pushed through a layer before the next layer is loaded; only hidden states stay. The
same layer also runs in double for the self-noise, its experts widened one at a time. Prompts are fed
at once and without padding; splits, decoding and the MTP head need the whole model.
"""

import resource

import numpy as np
import torch
import torch.nn.functional as F
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
)

from common import REFUSED, UNCERTAIN, UNFIT, distance, end, note, sketch

BAND = 8192


class WideExperts(torch.nn.Module):
    """The official experts in double, each widened while it is used (the eager code, line by line)."""

    def __init__(self, experts):
        super().__init__()
        self.experts = [experts]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        experts = self.experts[0]
        final = torch.zeros_like(hidden_states)
        mask = F.one_hot(top_k_index, num_classes=experts.num_experts).permute(2, 1, 0)
        for i in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            i = i[0]
            position, token = torch.where(mask[i])
            gate, up = F.linear(hidden_states[token], experts.gate_up_proj[i].double()).chunk(2, dim=-1)
            out = F.linear(experts.act_fn(gate) * up, experts.down_proj[i].double())
            final.index_add_(0, token, out * top_k_weights[token, position, None])
        return final


def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def layer_gib(config, load, prefix):
    """Memory of one layer in f32, and of what is widened beside it."""
    experts = config.num_experts * 3 * config.moe_intermediate_size * config.hidden_size
    rest = 12 * config.hidden_size * (config.num_attention_heads * config.head_dim + config.hidden_size)
    return (4 * experts + 12 * rest) / 2**30 + 0.5


def record_stream(question, checkpoint, out, memory_gib):
    from record import finish, fused, keep_logits, official_config, tensors_of

    config = official_config(checkpoint)
    load = tensors_of(checkpoint)
    need = layer_gib(config, load, "model.layers.0.") + 1.0
    if need > memory_gib:
        end(UNFIT, f"one layer needs about {need:.1f} GiB, --memory-gib is {memory_gib}")
    for prompt in question["prompts"]:
        if prompt["kind"] != "prefill" or "attention_mask" in prompt:
            end(REFUSED, f"{prompt['id']}: a layer-by-layer walk records unpadded prefills only")
    note(f"{question['id']}: layer by layer, about {need:.1f} GiB of {memory_gib} GiB")
    rotary = Qwen3NextRotaryEmbedding(config)
    tiers = {"logits": "topk", "hidden": "sketch", "states": False, "routing": True, **question.get("tiers", {})}
    ids = {p["id"]: torch.tensor(p["input_ids"]) for p in question["prompts"]}
    table = load["model.embed_tokens.weight"]()
    x = {name: F.embedding(rows, table) for name, rows in ids.items()}
    wide = {name: y.double() for name, y in x.items()}
    if not config.tie_word_embeddings:
        del table
    tensors, noise = {}, {}
    router_noise = 0.0
    # Of each prompt: its smallest margin, where that is, and how many tokens route otherwise in double.
    closest = {name: (float("inf"), "no router") for name in ids}
    flips = {name: 0 for name in ids}

    def tap(name, got, want):
        got = got.numpy()
        if tiers["hidden"] == "full":
            tensors[name] = got.astype(np.float32)
        elif tiers["hidden"] == "sketch":
            tensors[name + ".sketch"] = sketch(name, got)
        noise[name] = {"f64": distance(got, want.numpy())}

    with torch.no_grad():
        for i in range(config.num_hidden_layers):
            for name in ids:
                tap(f"{name}/hidden.{i}", x[name], wide[name])
            with torch.device("meta"):
                layer = Qwen3NextDecoderLayer(config, i)
            layer.load_state_dict(fused(f"model.layers.{i}.", config, load), strict=True, assign=True)
            layer.eval()
            seen = []
            gate = getattr(layer.mlp, "gate", None)
            if gate is not None:
                gate.register_forward_hook(lambda _m, _i, output: seen.append((output[0], output[2])))
            chosen = {}
            for name, rows in ids.items():
                x[name], chosen[name] = step(config, layer, rotary, i, x[name]), seen.pop() if seen else None
            # The same layer in double; its experts stay as they are and are widened one by one.
            if hasattr(layer.mlp, "experts"):
                # Nothing else may hold them: two layers at once would double the memory.
                layer.mlp.experts = WideExperts(layer.mlp.experts)
            layer.double()
            for name, rows in ids.items():
                wide[name] = step(config, layer, rotary, i, wide[name])
                if chosen[name] is None:
                    continue
                (logits, picks), (want, want_picks) = chosen[name], seen.pop()
                a, e = picks.shape[-1], logits.shape[-1]
                order = torch.sort(logits, -1, descending=True)[0]
                margin = order[:, a - 1] - order[:, a] if a < e else torch.full((len(order),), float("inf"))
                router_noise = max(router_noise, float((logits.double() - want).abs().max()))
                flips[name] += int((picks.sort(-1)[0] != want_picks.sort(-1)[0]).any(-1).sum())
                closest[name] = min(closest[name], (float(margin.min()), f"prompt {name}, layer {i}, row {int(margin.argmin())}"))
                if tiers["routing"]:
                    shape = ids[name].shape
                    tensors[f"{name}/routing.{i}"] = picks.reshape(*shape, a).numpy().astype(np.int64)
                    tensors[f"{name}/margin.{i}"] = margin.reshape(shape).numpy().astype(np.float32)
            del layer
            note(f"{question['id']}: layer {i + 1}/{config.num_hidden_layers}, peak {peak_gib():.1f} GiB")
        norm = Qwen3NextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        norm.weight = torch.nn.Parameter(load["model.norm.weight"]())
        head = table if config.tie_word_embeddings else load["lm_head.weight"]()
        for name, rows in ids.items():
            last, last_wide = norm(x[name]), norm(wide[name])
            tap(f"{name}/hidden.{config.num_hidden_layers}", last, last_wide)
            bands = range(0, config.vocab_size, BAND)
            logits = torch.cat([F.linear(last, head[at : at + BAND]) for at in bands], -1).numpy()
            exact = torch.cat([F.linear(last_wide, head[at : at + BAND].double()) for at in bands], -1).numpy()
            noise[f"{name}/logits"] = {"f64": distance(logits, exact)}
            tensors[f"{name}/input_ids"] = rows.numpy().astype(np.int64)
            keep_logits(tensors, name, "logits", logits, tiers["logits"])
    dropped = {}
    for name in ids:
        s, worst = max((kinds["f64"]["rel_rms"], tap) for tap, kinds in noise.items() if tap.startswith(f"{name}/"))
        margin, where = closest[name]
        why = None
        if s > 1e-5:
            why = f"{worst} is {s:.1e} from the same code in double, above 1e-5"
        if margin < 10 * router_noise or flips[name]:
            why = f"{where}: router margin {margin:.1e} is below ten times its noise {router_noise:.1e} ({flips[name]} flips)"
        if why is None:
            continue
        if not question.get("drop_uncertain"):
            end(UNCERTAIN, f"{why}: choose another prompt")
        note(f"{name} is left out: {why}")
        dropped[name] = why
    if len(dropped) == len(ids):
        end(UNCERTAIN, "every prompt was left out")
    question = {**question, "prompts": [p for p in question["prompts"] if p["id"] not in dropped]}
    tensors = {name: x for name, x in tensors.items() if name.split("/")[0] not in dropped}
    noise = {name: kinds for name, kinds in noise.items() if name.split("/")[0] not in dropped}
    min_margin, flips = min(closest[name][0] for name in ids if name not in dropped), 0
    router = {"min_margin": min_margin if np.isfinite(min_margin) else None, "noise": router_noise, "routing_flips": flips}
    finish(question, checkpoint, out, tensors, noise, router, {"stream": True, "memory_gib": memory_gib, "peak_gib": round(peak_gib(), 2), "left_out": dropped})
    if peak_gib() > memory_gib:
        end(UNFIT, f"peak memory {peak_gib():.1f} GiB was above the budget of {memory_gib} GiB")


def step(config, layer, rotary, index, x):
    positions = torch.arange(x.shape[1])[None]
    mask = None
    if config.layer_types[index] == "full_attention":
        mask = create_causal_mask(
            config=config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
        )
    return layer(x, position_embeddings=rotary(x, positions), attention_mask=mask, position_ids=positions)
