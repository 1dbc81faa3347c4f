"""Holds karat against the official code on checkpoints that nobody has seen before.

    python differential.py --karat target/release/karat [--configs 60] [--seed 1] [--only N] [--keep DIR]

Draws configs from a seed, writes each as a checkpoint (`save_pretrained`, or `karat synth` where
transformers cannot: FP8 and the MTP head), asks the official model in f32 and in double, asks
`karat logits` the same, and compares logits, hidden states, generated tokens, steps and the MTP head
by the rule of the recordings: relative RMS at most max(2e-5, 4 s), worst token max(1e-4, 4 w), where s
and w are the official f32 run's distance from the same code in double; with `--number f64` at most
max(1e-5, 2 s) and max(1e-4, 2 w). Then changes single fields of a config to something that karat does
not compute, and expects to read that field's name.

One line per config. Ends with 3 on a mismatch, 0 otherwise; what cannot be judged (a near tie in a
router or between two tokens) is said and counted, never silent.
"""

import argparse
import contextlib
import copy
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from common import distance, end, require_reference_kernels
from record import in_double, load_model, mtp_head, official_config, run, tensors_of

MISMATCH = 3
RULES = {"f32": (2e-5, 1e-4, 4.0), "f64": (1e-5, 1e-4, 2.0)}


class Unclear(Exception):
    """The official code itself cannot say which answer is right."""


class Mismatch(Exception):
    """karat says something else, or nothing."""


def draw(rng):
    """A config as keyword arguments, and how it is written and asked."""
    pick = lambda *choices: choices[int(rng.integers(len(choices)))]
    chance = lambda p: float(rng.random()) < p
    layers = pick(1, 2, 3, 4, 4, 5, 6, 8)
    hkv, hk, experts = pick(1, 1, 2, 3), pick(1, 2, 3, 4), pick(1, 2, 5, 8, 16, 31)
    head_dim = pick(4, 8, 10, 16, 20, 32, 49, 64, 98)
    writer = pick("save_pretrained", "save_pretrained", "save_pretrained", "fp8", "mtp")
    yarn = chance(0.3)
    # int(head_dim * part) is what is rotated; an odd number of channels turns one channel more.
    parts = [p for p in (0.1, 0.25, 0.3, 0.5, 0.75, 1.0, 2 / head_dim) if rotates(head_dim, p, even=yarn)]
    config = {
        "vocab_size": pick(11, 64, 97, 256, 300),
        "hidden_size": pick(8, 24, 33, 40, 64, 96),
        "num_hidden_layers": layers,
        "num_attention_heads": hkv * pick(1, 2, 3, 4, 8),
        "num_key_value_heads": hkv,
        "head_dim": head_dim,
        "linear_num_key_heads": hk,
        "linear_num_value_heads": hk * pick(1, 2, 3, 4),
        "linear_key_head_dim": pick(2, 4, 8, 12, 16, 32, 40),
        "linear_value_head_dim": pick(1, 4, 8, 12, 16, 24, 48),
        "linear_conv_kernel_dim": pick(1, 2, 3, 4, 4, 5, 6),
        "num_experts": experts,
        "num_experts_per_tok": min(experts, pick(1, 2, 3, 4, 10)),
        "norm_topk_prob": chance(0.7),
        "moe_intermediate_size": pick(1, 8, 13, 32),
        "shared_expert_intermediate_size": pick(3, 8, 16, 40),
        "intermediate_size": pick(5, 16, 48),
        "rms_norm_eps": pick(1e-6, 1e-6, 1e-5, 1e-3),
        "tie_word_embeddings": chance(0.25),
        "max_position_embeddings": pick(512, 4096),
        "bos_token_id": pick(None, 1),
        "eos_token_id": pick(None, 2, [2, 3]),
    }
    if chance(0.3):
        config["mlp_only_layers"] = sorted({int(i) for i in rng.integers(0, layers, size=2)})
    if chance(0.3):
        config["decoder_sparse_step"] = pick(2, 3)
    if chance(0.4):
        config["layer_types"] = [pick("linear_attention", "full_attention") for _ in range(layers)]
    elif chance(0.5):
        config["full_attention_interval"] = pick(1, 2, 3, 5)
    rope = {"rope_type": "default", "rope_theta": pick(100.0, 1e4, 5e6, 1e7), "partial_rotary_factor": pick(*parts)}
    if yarn:
        rope |= {"rope_type": "yarn", "factor": pick(1.0, 1.5, 4.0, 40.0)}
        original = pick(8, 32, 64)
        if chance(0.5):
            rope["original_max_position_embeddings"] = original
        else:
            # The older habit: the maximum is that of the training.
            config["max_position_embeddings"] = 256
        for key, value in {
            "beta_fast": pick(16.0, 32, 4),
            "beta_slow": pick(1, 2.0),
            "truncate": chance(0.5),
            "attention_factor": pick(1.0, 1.25),
            "mscale": pick(0.707, 1.0),
        }.items():
            if chance(0.3):
                rope[key] = value
        if "mscale" in rope and chance(0.7):
            rope["mscale_all_dim"] = pick(0.5, 1.0)
    config["rope_parameters"] = rope
    case = {
        "config": config,
        "writer": writer,
        "dtype": pick("f32", "f16", "bf16"),
        "dialect": pick("as written", "legacy", "rope_parameters"),
        "shard_bytes": pick(None, 20_000, 300_000),
        "fused": chance(0.2),
        "block": [pick(3, 8, 16, 128), pick(5, 8, 32, 128)],
        "seed": int(rng.integers(1 << 31)),
        "prompts": [],
    }
    for _ in range(2):
        case["prompts"].append(prompt(rng, pick, chance, config["vocab_size"], writer != "save_pretrained"))
    interval = config.get("full_attention_interval", 4)
    if "full_attention" not in config.get("layer_types", []) and ("layer_types" in config or layers < interval):
        # The official code cannot continue from a cache that holds linear layers only.
        for asked in case["prompts"]:
            asked.pop("split", None)
            if asked.pop("decode", None):
                asked["kind"] = "prefill"
    return case


def rotates(head_dim, part, even):
    channels = int(head_dim * part)
    return 0 < channels and channels + channels % 2 <= head_dim and not (even and channels % 2)


def prompt(rng, pick, chance, vocab, mtp):
    b, t = pick(1, 1, 2, 3), pick(1, 2, 3, 5, 17, 63, 64, 65, 100, 131)
    asked = {"kind": "prefill", "input_ids": rng.integers(0, vocab, size=(b, t)).tolist()}
    if mtp and 1 < t and chance(0.7):
        return asked | {"kind": "mtp"}
    if chance(0.5):
        asked |= {"kind": "decode", "decode": pick(1, 3, 7)}
    if 1 < t and chance(0.4):
        cuts = sorted({int(c) for c in rng.integers(1, t, size=pick(1, 2, 4))})
        asked["split"] = [b - a for a, b in zip([0, *cuts], [*cuts, t])]
    if 1 < t and chance(0.4):
        pads = rng.integers(0, t, size=b)
        pads[0] = max(1, pads[0])
        asked["attention_mask"] = [[int(pad <= at) for at in range(t)] for pad in pads]
        ends = np.cumsum(asked.get("split", [t]))
        if any(piece == 1 and end <= pads.max() for piece, end in zip(asked.get("split", [t]), ends)):
            # The official code takes a lone column for a step of the decode, padding or not.
            del asked["split"]
    return asked


def legacy(config, official):
    """The same config as versions before 5.0 wrote it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = {"type" if official % 2 else "rope_type": kind, **rope} if kind != "default" else None
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    return config


def write(case, karat, folder):
    """The checkpoint, with a config.json in the dialect of the case."""
    config = copy.deepcopy(case["config"])
    if case["writer"] == "save_pretrained":
        save(case, config, folder)
        path = folder / "config.json"
        text = json.loads(path.read_text())
        if case["dialect"] == "legacy":
            text = legacy(text, case["seed"])
            if "full_attention_interval" in config:
                text["full_attention_interval"] = config["full_attention_interval"]
                del text["layer_types"]
        elif case["dialect"] == "rope_parameters":
            # Only what differs from the class: everything else is a default.
            from transformers import Qwen3NextConfig

            default = Qwen3NextConfig().to_dict()
            kept = {"model_type", "num_hidden_layers", "layer_types", "rope_parameters"}
            text = {k: v for k, v in text.items() if k in kept or v != default.get(k, ...)}
        path.write_text(json.dumps(text, indent=1))
        return
    source = folder.with_suffix(".json")
    text = config | {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    if case["dialect"] == "legacy":
        text = legacy(text, case["seed"])
    dtype = case["dtype"]
    if case["writer"] == "fp8":
        dtype = "fp8"
        text["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": case["block"]}
    source.write_text(json.dumps(text))
    command = [karat, "synth", "--config", source, "--dtype", dtype, "--seed", str(case["seed"] % 1000), "--out", folder, "--force"]
    if case["shard_bytes"]:
        command += ["--shard-size", str(case["shard_bytes"] / 1e9)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Mismatch(f"karat synth ended with {done.returncode}: {done.stderr.strip()}")


def save(case, config, folder):
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(case["seed"])
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**config))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("norm.weight"):
                x.add_(0.1 * torch.randn_like(x))
            elif name.endswith(("A_log", "dt_bias")):
                x.add_(torch.randn_like(x))
            elif 2 <= x.dim():
                x.mul_(5.0)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[case["dtype"]]
    extra = {"max_shard_size": case["shard_bytes"]} if case["shard_bytes"] else {}
    model.to(dtype).save_pretrained(folder, save_original_format=not case["fused"], **extra)


def official(case, folder):
    """The official model in f32 and its MTP head, by the official loader where it can."""
    import torch
    from transformers import Qwen3NextForCausalLM

    config, load = official_config(folder), tensors_of(folder)
    model = load_model(config, load)
    if case["writer"] == "save_pretrained":
        loaded, info = Qwen3NextForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
        )
        wrong = {key: value for key, value in info.items() if value}
        if wrong:
            raise Mismatch(f"from_pretrained: {wrong}")
        mine, theirs = model.state_dict(), loaded.state_dict()
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[name], x) for name, x in theirs.items()):
            raise Mismatch("the recorder's loader and from_pretrained read different weights")
        model = loaded.eval()
    return model, mtp_head(config, load) if "mtp.fc.weight" in load else None


def certain(got, want, routing, exact_routing, keep):
    """Refuses near ties of a router, and of two tokens that greedy decoding chooses between."""
    noise, margin, flips = 0.0, math.inf, 0
    for layer, (logits, ids) in routing.items():
        exact, exact_ids = exact_routing[layer]
        e, a = logits.shape[-1], ids.shape[-1]
        logits, ids, exact, exact_ids = logits.reshape(-1, e), ids.reshape(-1, a), exact.reshape(-1, e), exact_ids.reshape(-1, a)
        if keep is not None:
            logits, ids, exact, exact_ids = logits[keep], ids[keep], exact[keep], exact_ids[keep]
        order = np.sort(logits, -1)[:, ::-1]
        if a < e:
            margin = min(margin, float((order[:, a - 1] - order[:, a]).min()))
        noise = float(np.maximum(noise, np.abs(logits - exact).max()))
        flips += int((np.sort(ids, -1) != np.sort(exact_ids, -1)).any(-1).sum())
    if not 10 * noise <= margin or flips:
        raise Unclear(f"router margin {margin:.1e}, noise {noise:.1e}, {flips} flips")
    if "generated" in got:
        steps = got["step_logits"][:, :-1].astype(np.float64)
        order = np.sort(steps, -1)[..., ::-1]
        gap = float((order[..., 0] - order[..., 1]).min())
        noise = float(np.abs(steps - want["step_logits"][:, :-1]).max())
        if not 10 * noise <= gap:
            raise Unclear(f"two tokens {gap:.1e} apart, noise {noise:.1e}")


def ask(karat, folder, asked, number, work):
    from safetensors.numpy import load_file, save_file

    tensors = {"input_ids": np.array(asked["input_ids"], dtype=np.int64)}
    if "attention_mask" in asked:
        tensors["attention_mask"] = np.array(asked["attention_mask"], dtype=np.int64)
    save_file(tensors, work / "tokens.safetensors")
    command = [karat, "logits", "--model", folder, "--tokens", work / "tokens.safetensors", "--out", work / "said.safetensors"]
    command += ["--taps", "hidden", "--number", number]
    if "split" in asked:
        command += ["--split", ",".join(map(str, asked["split"]))]
    if "decode" in asked:
        command += ["--decode", str(asked["decode"])]
    if asked["kind"] == "mtp":
        command += ["--mtp"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Mismatch(f"karat logits ended with {done.returncode}: {done.stderr.strip()}")
    return load_file(work / "said.safetensors")


def compare(said, taps, exact, keep, number):
    """The largest share of an allowance; raises where one is exceeded."""
    floor, worst_floor, times = RULES[number]
    most = 0.0
    for name, want in taps.items():
        if "_state." in name:
            continue
        if name not in said:
            raise Mismatch(f"{name}: karat wrote none")
        got = said[name]
        if got.shape != want.shape:
            raise Mismatch(f"{name}: shape {got.shape}, official {want.shape}")
        if name == "generated":
            if (got != want).any():
                raise Mismatch(f"generated: {got.tolist()}, official {want.tolist()}")
            continue
        rows = keep if name == "logits" or name.startswith("hidden") else None
        if rows is not None and np.abs(got.reshape(-1, got.shape[-1])[~rows]).max(initial=0.0) != 0.0:
            raise Mismatch(f"{name}: rows at padding are not zero")
        noise, found = distance(want, exact[name], rows), distance(got, want, rows)
        for kind, least in (("rel_rms", floor), ("worst_token", worst_floor)):
            if not math.isfinite(noise[kind]):
                raise Unclear(f"{name}: the official code is not finite in double")
            allowed = max(least, times * noise[kind])
            if not found[kind] <= allowed:
                raise Mismatch(f"{name}: {number} {kind} {found[kind]:.2e}, allowed {allowed:.2e} (noise {noise[kind]:.1e})")
            most = max(most, found[kind] / allowed)
    return most


@contextlib.contextmanager
def without_islands():
    """Double everywhere, but for the table of rotations, which is f32 by definition.

    The official code computes norms, softmax and the delta rule in f32 whatever the model is in: two
    such runs share the error of these islands, and their distance says too little of the noise.
    """
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next as official

    class Double:
        float32 = float = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    table = official.Qwen3NextRotaryEmbedding
    forward, single = table.forward, torch.Tensor.float

    def in_single(*args, **kwargs):
        torch.Tensor.float = single
        try:
            return forward(*args, **kwargs)
        finally:
            torch.Tensor.float = torch.Tensor.double

    official.torch, torch.Tensor.float, table.forward = Double(), torch.Tensor.double, in_single
    try:
        yield
    finally:
        official.torch, torch.Tensor.float, table.forward = torch, single, forward


def judge(case, karat, folder, work):
    """Shares of the allowances used, by number type, and what was left out."""
    write(case, karat, folder)
    model, head = official(case, folder)
    wide, wide_head = in_double(model), copy.deepcopy(head).double() if head else None
    used, unclear = {"f32": 0.0, "f64": 0.0}, []
    for asked in case["prompts"]:
        taps, routing = run(model, head, asked)
        forced = asked | {"forced": taps["generated"]} if "generated" in taps else asked
        with without_islands():
            exact, exact_routing = run(wide, wide_head, forced)
        keep = np.array(asked["attention_mask"]).reshape(-1) != 0 if "attention_mask" in asked else None
        try:
            certain(taps, exact, routing, exact_routing, keep)
            for number in used:
                said = ask(karat, folder, asked, number, work)
                used[number] = max(used[number], compare(said, taps, exact, keep, number))
        except Unclear as reason:
            unclear.append(str(reason))
    return used, unclear


def words(case):
    c = case["config"]
    rope = c["rope_parameters"]
    prompts = [
        f"{len(p['input_ids'])}x{len(p['input_ids'][0])}"
        + (" padded" if "attention_mask" in p else "")
        + (f" in {len(p['split'])}" if "split" in p else "")
        + (f" +{p['decode']}" if "decode" in p else "")
        + (" mtp" if p["kind"] == "mtp" else "")
        for p in case["prompts"]
    ]
    kind = f"fp8 {case['block'][0]}x{case['block'][1]}" if case["writer"] == "fp8" else f"{case['writer']} {case['dtype']}"
    return (
        f"{kind}, {case['dialect']}, L{c['num_hidden_layers']} D{c['hidden_size']} HQ{c['num_attention_heads']}/{c['num_key_value_heads']}"
        f" H{c['head_dim']}*{rope['partial_rotary_factor']:.2f} {rope['rope_type']}"
        f" HV{c['linear_num_value_heads']}/{c['linear_num_key_heads']} K{c['linear_key_head_dim']} V{c['linear_value_head_dim']}"
        f" W{c['linear_conv_kernel_dim']} E{c['num_experts_per_tok']}/{c['num_experts']}; {'; '.join(prompts)}"
    )


# Fields that change the arithmetic to something karat does not compute, and the name to be read.
UNSUPPORTED = [
    ("attention_bias", True),
    ("hidden_act", "gelu"),
    ("use_sliding_window", True),
    ("sliding_window", 128),
    ("attention_sinks", True),
    ("attn_logit_softcapping", 50.0),
    ("some_future_field", 1),
    ("model_type", "qwen3_moe"),
    ("layer_types", ["sliding_attention"] * 2),
    *(
        ("rope_parameters", {"rope_type": kind, "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0, **more})
        for kind, more in (
            ("linear", {}),
            ("dynamic", {}),
            ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
            ("longrope", {"short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0]}),
        )
    ),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
]


def refusals(karat, work):
    """One line per field that karat takes without a word."""
    config = {
        **{"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 8, "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8},
        **{"linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        **{"shared_expert_intermediate_size": 8, "intermediate_size": 16},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }
    folder = work / "refused"
    case = {"seed": 1, "dtype": "f32", "shard_bytes": None, "fused": False}
    save(case, config, folder)
    written = json.loads((folder / "config.json").read_text())
    asked = {"kind": "prefill", "input_ids": [[1, 2, 3]]}
    ask(karat, folder, asked, "f32", work)
    wrong = []
    for field, value in UNSUPPORTED:
        (folder / "config.json").write_text(json.dumps(written | {field: value}))
        try:
            ask(karat, folder, asked, "f32", work)
            wrong.append(f"{field} = {json.dumps(value)}: accepted")
        except Mismatch as refused:
            if "ended with 2:" not in str(refused) or field not in str(refused):
                wrong.append(f"{field} = {json.dumps(value)}: {refused}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--karat", type=Path, required=True, help="the program")
    parser.add_argument("--configs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="one config, by its number")
    parser.add_argument("--keep", type=Path, help="keep checkpoints of mismatches here")
    args = parser.parse_args()
    require_reference_kernels()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not args.karat.is_file():
        end(2, f"{args.karat}: no such program")
    karat = args.karat.resolve()
    wrong = judged = left_out = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for i in range(args.configs) if args.only is None else [args.only]:
            case = draw(np.random.default_rng([args.seed, i]))
            checkpoint = work / f"{i:03}"
            try:
                used, unclear = judge(case, karat, checkpoint, work)
                judged += len(case["prompts"]) - len(unclear)
                left_out += len(unclear)
                said = f"ok    f32 {100 * used['f32']:5.1f} %, f64 {100 * used['f64']:5.1f} % of the bound"
                said += "".join(f"; left out: {reason}" for reason in unclear)
            except Mismatch as reason:
                wrong += 1
                said = f"WRONG {reason}"
                if args.keep:
                    args.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copytree(checkpoint, args.keep / checkpoint.name, dirs_exist_ok=True)
            print(f"{i:3} {words(case)}: {said}", flush=True)
            shutil.rmtree(checkpoint, ignore_errors=True)
        for line in refusals(karat, work):
            wrong += 1
            print(f"WRONG {line}")
    print(f"{judged} prompts judged, {left_out} left out, {len(UNSUPPORTED)} refusals tried, {wrong} wrong")
    sys.exit(MISMATCH if wrong else 0)


if __name__ == "__main__":
    main()
