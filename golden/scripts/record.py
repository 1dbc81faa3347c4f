"""Asks the official implementation and writes down what it says.

    python record.py --question Q.json --checkpoint DIR --out DIR [--stream] [--memory-gib 16]
    python record.py --ops --out DIR
    python record.py --make-checkpoint Q.json --out DIR

A question (schema karat.question/1) names a checkpoint and prompts; the answer (karat.golden/1) is a
folder with manifest.json and recording.safetensors, described in golden/src/recording.rs. Everything
runs in f32 on the CPU with eager attention, eager experts and the torch functions of the delta rule.
"""

import argparse
import copy
import datetime
import json
from pathlib import Path

import numpy as np

from common import (
    REFUSED,
    UNCERTAIN,
    blake3_file,
    distance,
    end,
    note,
    producer,
    require_reference_kernels,
    sketch,
    write_recording,
)


def read_question(path):
    question = json.loads(Path(path).read_text())
    if question.get("schema") != "karat.question/1":
        end(REFUSED, f"{path}: schema {question.get('schema')!r}, expected 'karat.question/1'")
    return question


def tensors_of(checkpoint):
    """Every tensor of a folder by name, lazily: name -> function returning it in f32, FP8 dequantised.

    Read, not mapped: pages of a map count as this process's memory, and the walk has a budget.
    """
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
    config = json.loads((checkpoint / "config.json").read_text())
    block = (config.get("quantization_config") or {}).get("weight_block_size") or [128, 128]
    where = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        where |= {name: (path, 8 + length, entry) for name, entry in header.items()}

    def read(name):
        path, start, entry = where[name]
        begin, stop = entry["data_offsets"]
        data = bytearray(stop - begin)
        with open(path, "rb", buffering=0) as file:
            file.seek(start + begin)
            view = memoryview(data)
            while view:
                view = view[file.readinto(view) :]
        return torch.frombuffer(data, dtype=types[entry["dtype"]]).reshape(entry["shape"])

    def load(name):
        x = read(name)
        if x.dtype == torch.float8_e4m3fn:
            scale = read(name + "_scale_inv").float()
            scale = scale.repeat_interleave(block[0], 0)[: x.shape[0]].repeat_interleave(block[1], 1)[:, : x.shape[1]]
            return x.float() * scale
        return x.float()

    return {name: (lambda name=name: load(name)) for name in where if not name.endswith("_scale_inv")}


def official_config(checkpoint):
    """The checkpoint's config for a model in f32: quantisation is undone while loading."""
    from transformers import Qwen3NextConfig

    raw = json.loads((checkpoint / "config.json").read_text())
    raw.pop("quantization_config", None)
    raw.pop("torch_dtype", None)
    raw.pop("dtype", None)
    config = Qwen3NextConfig(**raw)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def fused(prefix, config, load):
    """One layer's tensors under the module's own names: experts stacked, gate rows first."""
    import torch

    state = {}
    for name in load:
        if name.startswith(prefix) and ".mlp.experts." not in name:
            state[name[len(prefix) :]] = load[name]()
    if f"{prefix}mlp.experts.gate_up_proj" in load:
        for name in ("gate_up_proj", "down_proj"):
            state[f"mlp.experts.{name}"] = load[f"{prefix}mlp.experts.{name}"]()
    elif f"{prefix}mlp.experts.0.gate_proj.weight" in load:
        e, f, d = config.num_experts, config.moe_intermediate_size, config.hidden_size
        gate_up, down = torch.empty(e, 2 * f, d), torch.empty(e, d, f)
        for i in range(e):
            expert = f"{prefix}mlp.experts.{i}."
            gate_up[i, :f] = load[expert + "gate_proj.weight"]()
            gate_up[i, f:] = load[expert + "up_proj.weight"]()
            down[i] = load[expert + "down_proj.weight"]()
        state["mlp.experts.gate_up_proj"], state["mlp.experts.down_proj"] = gate_up, down
    return state


def load_model(config, load):
    """The official model with every tensor in place; nothing may be missing or left over."""
    import torch
    from transformers import Qwen3NextForCausalLM

    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config)
    state = {"model.embed_tokens.weight": load["model.embed_tokens.weight"](), "model.norm.weight": load["model.norm.weight"]()}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        state |= {prefix + name: x for name, x in fused(prefix, config, load).items()}
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    state["lm_head.weight"] = state.get(head, None) if config.tie_word_embeddings else load[head]()
    model.load_state_dict(state, strict=True, assign=True)
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

    model.model.rotary_emb = Qwen3NextRotaryEmbedding(config)
    return model.eval()


def mtp_head(config, load):
    """The MTP head from official modules: two norms, fc, one full-attention layer, a norm."""
    import torch
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer, Qwen3NextRMSNorm

    one = copy.deepcopy(config)
    one.layer_types, one.num_hidden_layers = ["full_attention"], 1
    with torch.device("meta"):
        layer = Qwen3NextDecoderLayer(one, 0)
    layer.load_state_dict(fused("mtp.layers.0.", one, load), strict=True, assign=True)
    head = torch.nn.ModuleDict({"layer": layer})
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        head[name] = Qwen3NextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        head[name].weight = torch.nn.Parameter(load[f"mtp.{name}.weight"]())
    head["fc"] = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
    head["fc"].weight = torch.nn.Parameter(load["mtp.fc.weight"]())
    return head.eval()


class Routers:
    """What every router of a model chose, call by call."""

    def __init__(self, model):
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

        self.seen = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, Qwen3NextTopKRouter):
                layer = int(name.split(".")[2])
                self.handles.append(module.register_forward_hook(self.hook(layer)))

    def hook(self, layer):
        def keep(_module, _inputs, output):
            logits, _, ids = output
            self.seen.setdefault(layer, []).append((logits.detach().double().numpy(), ids.numpy()))

        return keep

    def close(self):
        for handle in self.handles:
            handle.remove()


def run(model, head, prompt, batch_times=1):
    """Every tap of one prompt, as numpy arrays [B, T, ...]; rows at padding are zero."""
    import torch
    from transformers import DynamicCache
    from transformers.masking_utils import create_causal_mask

    ids = torch.tensor(prompt["input_ids"])
    ids = ids.repeat(batch_times, 1)
    mask = torch.tensor(prompt["attention_mask"]).repeat(batch_times, 1) if "attention_mask" in prompt else None
    b, t = ids.shape
    position_ids = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    # The official cache cannot be asked for its length without a full-attention layer.
    cache = DynamicCache(config=model.config) if "full_attention" in model.config.layer_types else None
    if cache is None and ("split" in prompt or prompt["kind"] == "decode"):
        end(REFUSED, f"{prompt['id']}: the official code cannot go on from a cache without full-attention layers")
    routers = Routers(model)
    pieces = prompt.get("split") or [t]
    logits, hidden, at = [], [], 0
    with torch.no_grad():
        for piece in pieces:
            part = slice(at, at + piece)
            out = model(
                ids[:, part],
                attention_mask=None if mask is None else mask[:, : at + piece],
                position_ids=None if position_ids is None else position_ids[:, part],
                past_key_values=cache,
                use_cache=cache is not None,
                output_hidden_states=True,
            )
            logits.append(out.logits)
            hidden.append(out.hidden_states)
            at += piece
        keep = torch.ones(b, t, 1, dtype=ids.dtype) if mask is None else mask[:, :, None]
        taps = {"logits": (torch.cat(logits, 1) * keep).numpy()}
        layers = [torch.cat(parts, 1) for parts in zip(*hidden)]
        taps |= {f"hidden.{i}": (x * keep).numpy() for i, x in enumerate(layers)}
        for i, kind in enumerate(model.config.layer_types):
            if kind == "linear_attention" and cache is not None:
                conv = cache.get_conv_state(i, state_idx=0)
                taps[f"conv_state.{i}"] = conv[:, :, conv.shape[-1] - model.config.linear_conv_kernel_dim + 1 :].clone().numpy()
                taps[f"recurrent_state.{i}"] = cache.get_recurrent_state(i, state_idx=0).clone().numpy()
        routers.close()
        routing = {}
        for layer, calls in routers.seen.items():
            # Calls are [B * piece, E]: put the pieces of each row together.
            parts = [x.reshape(b, -1, x.shape[-1]) for x, _ in calls]
            chosen = [x.reshape(b, -1, x.shape[-1]) for _, x in calls]
            routing[layer] = (np.concatenate(parts, 1), np.concatenate(chosen, 1))
        if prompt["kind"] == "decode":
            last, steps, generated = taps["logits"][:, -1], [], []
            steps.append(last)
            for n in range(prompt["decode"]):
                token = torch.tensor(prompt["forced"][:, n] if "forced" in prompt else steps[-1].argmax(-1))
                generated.append(token.numpy())
                grown = None if mask is None else torch.cat([mask, mask.new_ones(b, n + 1)], 1)
                where = None if mask is None else position_ids[:, -1:] + n + 1
                out = model(token[:, None], attention_mask=grown, position_ids=where, past_key_values=cache, use_cache=True)
                steps.append(out.logits[:, -1].numpy())
            taps["step_logits"], taps["generated"] = np.stack(steps, 1), np.stack(generated, 1)
        if prompt["kind"] == "mtp":
            # Row t: the hidden state of token t after the final norm, the embedding of token t + 1.
            x = layers[-1][:, :-1]
            e = head["pre_fc_norm_embedding"](model.model.embed_tokens(ids[:, 1:]))
            u = head["fc"](torch.cat([e, head["pre_fc_norm_hidden"](x)], -1))
            where = torch.arange(t - 1)[None]
            causal = create_causal_mask(
                config=model.config, inputs_embeds=u, attention_mask=None, past_key_values=None, position_ids=where
            )
            y = head["layer"](
                u, position_embeddings=model.model.rotary_emb(u, where), attention_mask=causal, position_ids=where
            )
            taps["mtp_logits"] = model.lm_head(head["norm"](y)).numpy()
    return taps, routing


def in_double(model):
    """The same model in double.

    A row of padding sees nothing but masked keys. The softmax runs in f32, where the mask of double
    is minus infinity and such a row NaN, which the next convolution hands to real tokens: the mask
    is that of f32.
    """
    import torch

    def keep_finite(_module, args, kwargs):
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"].clamp(min=torch.finfo(torch.float32).min)
        return args, kwargs

    wide = copy.deepcopy(model).double()
    for layer in wide.model.layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.register_forward_pre_hook(keep_finite, with_kwargs=True)
    return wide


def kept_rows(prompt):
    if "attention_mask" not in prompt:
        return None
    return np.array(prompt["attention_mask"]).reshape(-1) != 0


def noise_of(taps, others, prompt):
    """Distance of every float tap to the same tap of another run."""
    result = {}
    for name, x in taps.items():
        if name == "generated":
            continue
        whole = name.startswith(("logits", "hidden"))
        keep = kept_rows(prompt) if whole else None
        got, want = x, others[name]
        if name.startswith("recurrent_state"):
            # One row per sequence and head.
            got, want = (y.reshape(y.shape[0] * y.shape[1], -1) for y in (got, want))
        elif name.startswith("conv_state"):
            # One row per column of the window.
            got, want = (y.transpose(0, 2, 1) for y in (got, want))
        result[name] = distance(got, want, keep)
    return result


def record(question, checkpoint, out):
    import torch

    config = official_config(checkpoint)
    load = tensors_of(checkpoint)
    model = load_model(config, load)
    head = mtp_head(config, load) if "mtp.fc.weight" in load else None
    wide, wide_head = in_double(model), copy.deepcopy(head).double() if head else None
    sdpa = copy.deepcopy(model)
    sdpa.config._attn_implementation = "sdpa"
    half, half_head = copy.deepcopy(model).bfloat16(), copy.deepcopy(head).bfloat16() if head else None
    tiers = {"logits": "full", "hidden": "full", "states": True, "routing": True, **question.get("tiers", {})}
    tensors, noise = {}, {}
    min_margin, router_noise, flips = float("inf"), 0.0, 0
    for prompt in question["prompts"]:
        note(f"{question['id']}: {prompt['id']}")
        taps, routing = run(model, head, prompt)
        if "generated" in taps:
            prompt = {**prompt, "forced": taps["generated"]}
        exact, exact_routing = run(wide, wide_head, prompt)
        keep = kept_rows(prompt)
        for layer, (logits, ids) in routing.items():
            want, want_ids = exact_routing[layer]
            e, a = logits.shape[-1], ids.shape[-1]
            flat, flat_ids = logits.reshape(-1, e), ids.reshape(-1, a)
            want, want_ids = want.reshape(-1, e)[: len(flat)], want_ids.reshape(-1, a)[: len(flat)]
            if keep is not None:
                rows = np.where(keep)[0]
                flat, flat_ids, want, want_ids = flat[rows], flat_ids[rows], want[rows], want_ids[rows]
            order = np.sort(flat, -1)[:, ::-1]
            margin = order[:, a - 1] - order[:, a] if a < e else np.full(len(flat), np.inf)
            router_noise = max(router_noise, float(np.abs(flat - want).max()))
            flips += int((np.sort(flat_ids, -1) != np.sort(want_ids, -1)).any(-1).sum())
            if margin.min() < min_margin:
                min_margin = float(margin.min())
                closest = f"prompt {prompt['id']}, layer {layer}, row {int(margin.argmin())}"
        kinds = {"f64": noise_of(taps, exact, prompt)}
        kinds["sdpa"] = noise_of(run(sdpa, head, prompt)[0], taps, prompt)
        repeated = {**prompt, "forced": np.tile(prompt["forced"], (4, 1))} if "forced" in prompt else prompt
        several, _ = run(model, head, repeated, batch_times=4)
        b = len(prompt["input_ids"])
        kinds["batch4"] = noise_of({name: x[:b] for name, x in several.items()}, taps, prompt)
        rounded, rounded_routing = run_bf16(half, half_head, prompt)
        kinds["bf16"] = noise_of(rounded, taps, prompt)
        name = prompt["id"]
        for tap, x in taps.items():
            if tap != "generated":
                noise[f"{name}/{tap}"] = {kind: values[tap] for kind, values in kinds.items()}
        s = max(values["rel_rms"] for values in kinds["f64"].values())
        if s > 1e-5:
            worst = max(kinds["f64"], key=lambda tap: kinds["f64"][tap]["rel_rms"])
            end(UNCERTAIN, f"{name}: {worst} is {s:.1e} from the same code in double, above 1e-5: choose another prompt or seed")
        tensors[f"{name}/input_ids"] = np.array(prompt["input_ids"], dtype=np.int64)
        if "attention_mask" in prompt:
            tensors[f"{name}/attention_mask"] = np.array(prompt["attention_mask"], dtype=np.int64)
        keep_taps(tensors, name, taps, routing, tiers, prompt)
        if question.get("bf16"):
            for tap, x in rounded.items():
                if tap == "logits" or tap.startswith("hidden."):
                    tensors[f"{name}/bf16.{tap}"] = x.astype(np.float32)
            for layer, (_, ids) in rounded_routing.items():
                tensors[f"{name}/bf16.routing.{layer}"] = ids.astype(np.int64)
    if min_margin < 10 * router_noise or flips:
        end(UNCERTAIN, f"{closest}: router margin {min_margin:.1e} is below ten times its noise {router_noise:.1e} ({flips} flips): choose another prompt or seed")
    finish(question, checkpoint, out, tensors, noise, {"min_margin": min_margin if np.isfinite(min_margin) else None, "noise": router_noise, "routing_flips": flips}, {})


def run_bf16(model, head, prompt):
    """The official code in bfloat16; its outputs widened."""
    import torch

    numpy = torch.Tensor.numpy
    try:
        torch.Tensor.numpy = lambda x: numpy(x.float() if x.dtype == torch.bfloat16 else x)
        return run(model, head, prompt)
    finally:
        torch.Tensor.numpy = numpy


def keep_taps(tensors, name, taps, routing, tiers, prompt):
    for tap, x in taps.items():
        full = f"{name}/{tap}"
        if tap == "generated":
            tensors[full] = x.astype(np.int64)
        elif tap in ("logits", "step_logits", "mtp_logits"):
            keep_logits(tensors, name, tap, x, tiers["logits"])
        elif tap.startswith("hidden."):
            if tiers["hidden"] == "full":
                tensors[full] = x.astype(np.float32)
            elif tiers["hidden"] == "sketch":
                tensors[full + ".sketch"] = sketch(full, x)
        elif tiers["states"]:
            tensors[full] = x.astype(np.float32)
    if tiers["routing"]:
        for layer, (logits, ids) in routing.items():
            t = len(prompt["input_ids"][0])
            ids, logits = ids[:, :t], logits[:, :t]
            order = np.sort(logits, -1)[..., ::-1]
            a = ids.shape[-1]
            gap = order[..., a - 1] - order[..., a] if a < order.shape[-1] else np.full(ids.shape[:2], np.inf)
            tensors[f"{name}/routing.{layer}"] = ids.astype(np.int64)
            tensors[f"{name}/margin.{layer}"] = gap.astype(np.float32)


def keep_logits(tensors, name, tap, x, tier):
    if tier == "full" or tap != "logits":
        tensors[f"{name}/{tap}"] = x.astype(np.float32)
    elif tier == "topk":
        k = min(256, x.shape[-1])
        order = np.argsort(-x, -1, kind="stable")[..., :k]
        wide = x.astype(np.float64)
        top = wide.max(-1)
        tensors[f"{name}/topk.ids"] = order.astype(np.int64)
        tensors[f"{name}/topk.logits"] = np.take_along_axis(x, order, -1).astype(np.float32)
        tensors[f"{name}/logsumexp"] = top + np.log(np.exp(wide - top[..., None]).sum(-1))
    else:
        tensors[f"{name}/{tap}.sketch"] = sketch(f"{name}/{tap}", x)


def finish(question, checkpoint, out, tensors, noise, router, extra):
    names = sorted([*checkpoint.glob("*.safetensors"), *checkpoint.glob("config.json"), *checkpoint.glob("tokenizer.json")])
    files = [{"path": p.name, "bytes": p.stat().st_size, "blake3": blake3_file(p)} for p in names]
    by_name = {file["path"]: file["blake3"] for file in files}
    manifest = {
        "schema": "karat.golden/1",
        "id": question["id"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "why": question["why"],
        "reason": question.get("reason", "first recording"),
        "supersedes": None,
        "checkpoint": {
            **question["checkpoint"],
            "files": files,
            "config_blake3": by_name["config.json"],
            "tokenizer_blake3": by_name.get("tokenizer.json"),
            "repo": question["checkpoint"].get("repo"),
            "revision": question["checkpoint"].get("revision"),
        },
        "producer": producer("float32", extra),
        "prompts": [
            {
                "id": p["id"],
                "kind": p["kind"],
                "batch": len(p["input_ids"]),
                "tokens": len(p["input_ids"][0]),
                "split": p.get("split"),
                "decode": p.get("decode"),
                "padded": "attention_mask" in p,
            }
            for p in question["prompts"]
        ],
        "self_noise": noise,
        "router": router,
    }
    write_recording(out, tensors, manifest)


def make_checkpoint(question, out):
    """A checkpoint as `save_pretrained` writes it, with weights of the official initialisation."""
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(question["checkpoint"]["seed"])
    config = Qwen3NextConfig(**question["checkpoint"]["config"])
    model = Qwen3NextForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                # The official initialisation leaves norms at their neutral value; move them.
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() >= 2:
                parameter.mul_(5.0)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[question["checkpoint"]["dtype"]]
    model.to(dtype).save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stream", action="store_true", help="walk the model layer by layer")
    parser.add_argument("--memory-gib", type=float, default=16.0, help="budget of the walk")
    parser.add_argument("--ops", action="store_true", help="record the official functions, op by op")
    parser.add_argument("--make-checkpoint", metavar="Q.json")
    args = parser.parse_args()
    require_reference_kernels()
    if args.make_checkpoint:
        return make_checkpoint(read_question(args.make_checkpoint), args.out)
    if args.ops:
        from record_ops import record_ops

        return record_ops(args.out)
    if not args.question or not args.checkpoint:
        parser.error("--question and --checkpoint, or --ops, or --make-checkpoint")
    question = read_question(args.question)
    if args.stream:
        from record_stream import record_stream

        return record_stream(question, args.checkpoint, args.out, args.memory_gib)
    return record(question, args.checkpoint, args.out)


if __name__ == "__main__":
    main()
