"""How fast karat is beside llama.cpp and transformers: same weights, same threads, in turns.

    python peers.py --karat KARAT --model CHECKPOINT --gguf DIR --out FILE.jsonl
                    [--formats bf16,int8,int4] [--rounds 5] [--threads 2] [--prefill 512] [--decode 32]
                    [--depth 0] [--check 64] [--no-transformers] [--ik LLAMA_BENCH]
                    [--quiet 0.1 --wait 60] [--minutes M]

CHECKPOINT is what `karat synth --preset slice` wrote, DIR what `to_gguf.py` made of it. In every round
each engine is asked once, one after the other; a turn asks twice and counts the second time, of karat as of its
peers. Every turn of karat also samples what the machine reads and multiplies. Before the first round
(`--check`) each engine's logits of some tokens are held against those of karat in f32: what is timed is
the right model. ik_llama.cpp, whose own `llama-bench` `--ik` names, prints no logits and is timed alone. A turn in which other processes took more than `--quiet` of the processors is asked again
when they are quiet, for `--wait` seconds at most; what they took stands in every line. With `--minutes` no
round begins that would not end in time. FILE.jsonl has a line per turn; FILE.md the medians and, of the turns of one round, the
median of karat's speed over the peer's. Both are written when all rounds are done. Ends with 2 where
something cannot be asked, with 3 where an engine computes something else.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REFUSED, WRONG = 2, 3
# What of llama.cpp stands beside each format of karat; Q4_1, with scale and minimum of 32, is nearest to int4.
BESIDE = {"bf16": ["bf16"], "int8": ["q8_0"], "int4": ["q4_1", "q4_0", "q4_k_m"]}
# ik_llama.cpp over llama.cpp, same files, one machine without AMX: prefill of 512, decode at depth 0
# and, where it was measured, at 32768 (ik_llama.cpp 8337e4c, llama.cpp 0c1e57098, Zen 4, 2 threads).
IK = {
    "bf16": {"prefill": 554 / 249, 0: 21.2 / 24.0, 32768: 18.1 / 12.2},
    "q8_0": {"prefill": 630 / 199, 0: 49.5 / 38.0},
    "q4_0": {"prefill": 599 / 246, 0: 62.8 / 53.3, 32768: 43.9 / 12.0},
    "q4_k_m": {"prefill": 613 / 249, 0: 70.9 / 60.8},
}
# Of NMSE and of rows whose most likely token is another; four bits keep nothing of random weights.
RIGHT = {"bf16": (5e-3, 0.25), "int8": (3e-2, 0.5)}


def end(line, code=REFUSED):
    print(f"peers.py: {line}", file=sys.stderr)
    sys.exit(code)


class Anew:
    """A program that starts anew for every turn."""

    def spent(self):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def close(self):
        pass


class Karat(Anew):
    def __init__(self, args, number):
        self.args, self.number, self.name, self.format = args, number, "karat", number
        self.versions = {}

    def call(self, *more):
        args = self.args
        command = [args.karat, *more, "--model", args.model, "--threads", str(args.threads), "--format", "jsonl",
                   "--no-progress"]
        ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            said = (ran.stderr.strip() or ran.stdout.strip() or "nothing said").split("\n")[-1]
            end(f"karat {more[0]} ended with {ran.returncode}: {said}")
        return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]

    def turn(self):
        args = self.args
        said = self.call("bench", "--number", self.number, "--prefill", args.prefill, "--decode", args.decode,
                         "--depth", args.depth, "--rounds", 1)
        row = next((row for row in said if row.get("kind") == "bench"), None)
        if row is None:
            end("karat bench printed no result")
        median = lambda key: row[key] and row[key]["median"]
        speeds = {"prefill": median("prefill_tokens_per_second"), "decode": median("decode_tokens_per_second")}
        self.cpu = row["cpu"]
        roof = {key.split("_")[0]: row[key]["median"] for key in
                ("read_bytes_per_second", "f32_per_second", "bf16_per_second", "int8_per_second")}
        return {key: value for key, value in speeds.items() if value} | {"roof": roof, "traffic": row["traffic"]}

    def logits(self, tokens, folder, number=None):
        import numpy as np
        from safetensors.numpy import load_file, save_file

        asked, out = folder / "tokens.safetensors", folder / "karat.safetensors"
        save_file({"input_ids": np.array([tokens], dtype=np.int64)}, asked)
        self.call("logits", "--engine", "cpu", "--number", number or self.number, "--tokens", asked, "--out", out)
        return load_file(out)["logits"][0]


class Ik(Anew):
    """ik_llama.cpp by its llama-bench."""

    name = "ik_llama.cpp"

    def __init__(self, args, kind, path):
        self.args, self.format, self.path = args, kind, path
        self.versions = {}

    def asked(self, prompt, decode):
        # At a depth the prompt is fed first and not counted.
        depth = self.args.depth if decode else 0
        what = ["-p", 0, "-n", 0, "-gp", f"{depth},{decode}"] if depth else ["-p", prompt, "-n", decode]
        command = [self.args.ik, "-m", self.path, "-t", self.args.threads, *what, "-r", 1 if depth else 2, "-fa", 1,
                   "-o", "json"]
        ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
        try:
            row = json.loads(ran.stdout)[-1]
            self.versions["ik_llama.cpp"] = row["build_commit"]
            return row["samples_ts"][-1]
        except (ValueError, LookupError):
            said = (ran.stderr.strip() or "nothing said").split("\n")[-1]
            end(f"{self.name} {self.format}: ended with {ran.returncode}: {said}")

    def turn(self):
        prompt, decode = self.args.prefill, self.args.decode
        said = {"prefill": self.asked(prompt, 0) if prompt else None, "decode": self.asked(0, decode) if decode else None}
        return {key: value for key, value in said.items() if value}


class Peer:
    def __init__(self, args, name, kind, path):
        self.args, self.name, self.format = args, name, kind
        command = [sys.executable, Path(__file__).with_name("peer.py"), name, path, args.threads, args.depth,
                   args.gguf / f"depth-{args.depth}.state"]
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)
        self.versions = self.answer()["versions"]

    def answer(self):
        line = self.process.stdout.readline()
        said = json.loads(line) if line else {"error": "ended without an answer"}
        if "error" in said:
            end(f"{self.name} {self.format}: {said['error']}")
        return said

    def ask(self, **asked):
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            end(f"{self.name} {self.format}: ended before it was asked")
        return self.answer()

    def turn(self):
        for _ in range(2):
            said = self.ask(ask="turn", prefill=self.args.prefill, decode=self.args.decode)
        return said

    def logits(self, tokens, folder):
        import numpy as np

        out = folder / "peer.npy"
        self.ask(ask="logits", tokens=tokens, out=str(out))
        return np.load(out)

    def spent(self):
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            end(f"{self.name} {self.format}: ended")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self):
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()


def busy():
    """Seconds of all processors that processes, the system or other guests have taken."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others(work, spent):
    """What `work` says, and what share of the processors others took in the meantime."""
    start, all_before, own_before = time.monotonic(), busy(), spent()
    said = work()
    took = (time.monotonic() - start) * os.cpu_count()
    return said, max(0.0, (busy() - all_before) - (spent() - own_before)) / took


def quiet_turn(args, engine):
    """A turn that others disturb is asked again; the least disturbed one is taken."""
    until = time.monotonic() + args.wait
    best = None
    while True:
        # Two seconds of quiet before it, or no more time to wait for them.
        while time.monotonic() < until and args.quiet < others(lambda: time.sleep(2), lambda: 0.0)[1]:
            pass
        said, share = others(engine.turn, engine.spent)
        if best is None or share < best["others"]:
            best = {**said, "others": round(share, 3)}
        if share <= args.quiet or until <= time.monotonic():
            return best


def held(want, got):
    """How far logits are from others, as `karat compare` says it."""
    import numpy as np

    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(want), log_softmax(got)
    centred = want - want.mean(-1, keepdims=True)
    return {
        "nmse": float(((got - want).astype(np.float64) ** 2).sum() / (centred.astype(np.float64) ** 2).sum()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1": float((want.argmax(-1) == got.argmax(-1)).mean()),
    }


def check(args, engines, rows):
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
        tokens = np.random.default_rng(1).integers(0, vocab, args.check).tolist()
        want = next(e for e in engines if e.name == "karat").logits(tokens, folder, "f32")
        for engine in engines:
            if engine.name == Ik.name:
                continue
            got = engine.logits(tokens, folder)
            if got.shape != want.shape:
                end(f"{engine.name} {engine.format}: logits {got.shape}, not {want.shape}", WRONG)
            row = {"kind": "check", "engine": engine.name, "format": engine.format, "tokens": args.check,
                   **held(want, got)}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            ours = {"q8_0": "int8"}.get(engine.format, engine.format)
            if ours in RIGHT:
                nmse, flips = RIGHT[ours]
                if not (row["nmse"] <= nmse and 1 - row["top1"] <= flips):
                    end(f"{engine.name} {engine.format}: another model: NMSE {row['nmse']:.2g}, top-1 {row['top1']:.2f}",
                        WRONG)


def machine(args, cpu):
    flags = set()
    memory = 0.0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.split(":")[1].split())
        memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    except OSError:
        pass
    told = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if f in flags]
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": args.threads, "memory_gib": round(memory, 1),
            "kernel": platform.release(), "instructions": told}


def commit():
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        ran = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return ran.stdout.strip() or "unknown"


def of(rows, engine, kind, what):
    """By round."""
    mine = (row for row in rows if row["kind"] == "turn" and (row["engine"], row["format"]) == (engine, kind))
    return {row["round"]: row[what] for row in mine if what in row}


def shown(samples, digits=1):
    x = list(samples.values())
    if not x:
        return "-"
    return f"{statistics.median(x):.{digits}f} [{min(x):.{digits}f}..{max(x):.{digits}f}]"


def ratio(ours, theirs):
    both = [ours[r] / theirs[r] for r in ours if r in theirs]
    return f"{statistics.median(both):.2f}" if both else "-"


def table(args, rows, about):
    m = about["machine"]
    isa = ", ".join(m["instructions"])
    shares = [row["others"] for row in rows if row["kind"] == "turn"]
    disturbed = (f"Other processes took {100 * statistics.median(shares):.0f} % of the processors in a turn (median; at most "
                 f"{100 * max(shares):.0f} %; more than {100 * args.quiet:.0f} % in "
                 f"{sum(args.quiet < s for s in shares)} of {len(shares)} turns).")
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['memory_gib']} GiB, {isa}; Linux {m['kernel']}; "
        f"tree {about['commit']}, program with SHA-256 {about['sha256'][:12]}; "
        + "; ".join(f"{k} {v}" for k, v in about["versions"].items() if k != "system")
        + f". {disturbed}",
        "",
        f"Prefill of {args.prefill} tokens and decode of {args.decode}, depth {args.depth}, rounds in turns: "
        f"{args.rounds}; median tokens/s [least..most]; *karat over it*: median of the ratios of one round each.",
        "",
        "| format | engine | prefill | karat over it | decode | karat over it |",
        "|---|---|---|---|---|---|",
    ]
    for number in args.numbers:
        ours = [of(rows, "karat", number, what) for what in ("prefill", "decode")]
        lines.append(f"| {number} | karat | {shown(ours[0], 0)} | | {shown(ours[1])} | |")
        for engine, kind in about["beside"][number]:
            theirs = [of(rows, engine, kind, what) for what in ("prefill", "decode")]
            name = engine if engine == "transformers" else f"{engine} {kind}"
            lines.append(f"| {number} | {name} | {shown(theirs[0], 0)} | {ratio(ours[0], theirs[0])} "
                         f"| {shown(theirs[1])} | {ratio(ours[1], theirs[1])} |")
            if engine == "llama.cpp" and kind in IK and (Ik.name, kind) not in about["beside"][number]:
                # Scaled by the llama.cpp of this run, round by round.
                cells = []
                for i, key in enumerate(("prefill", args.depth)):
                    known = key != "prefill" or (args.depth == 0 and args.prefill == 512)
                    factor = IK[kind].get(key) if known else None
                    scaled = {r: x * factor for r, x in theirs[i].items()} if factor else {}
                    cells += [shown(scaled, 1 if i else 0), ratio(ours[i], scaled)]
                if any(cell != "-" for cell in cells):
                    lines.append(f"| {number} | ik_llama.cpp {kind}, scaled | {' | '.join(cells)} |")
    roofs = [row["roof"] for row in rows if "roof" in row]
    lines += ["", "| the machine between the turns | median [least..most] |", "|---|---|"]
    for key, what in (("read", "memory read, GB/s"), ("f32", "products of f32, Gop/s"),
                      ("bf16", "products of bf16 pairs, Gop/s"), ("int8", "products of bytes, Gop/s")):
        lines.append(f"| {what} | {shown({i: roof[key] / 1e9 for i, roof in enumerate(roofs)})} |")
    checks = [row for row in rows if row["kind"] == "check"]
    if checks:
        lines += ["", f"Logits of {args.check} tokens against karat in f32:", "",
                  "| engine | format | NMSE | KL, nats | top-1 |", "|---|---|---|---|---|"]
        lines += [f"| {c['engine']} | {c['format']} | {c['nmse']:.1e} | {c['kl']:.1e} | {c['top1']:.3f} |" for c in checks]
    return "\n".join(lines) + "\n"


def write(path, text):
    """Beside its place, then renamed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        end(f"{path}: {error}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--karat", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", default="bf16,int8,int4")
    for name, value in (("rounds", 5), ("threads", 2), ("prefill", 512), ("decode", 32), ("depth", 0), ("check", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("quiet", 0.1), ("wait", 60.0), ("minutes", float("inf"))):
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--ik", type=Path)
    args = parser.parse_args()
    args.numbers = args.formats.split(",")
    for number in args.numbers:
        if number not in BESIDE:
            end(f"{number}: there are {', '.join(BESIDE)}")
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            end(f"--{name}: at least 1")
    for name in ("prefill", "decode", "depth", "check", "quiet", "wait", "minutes"):
        if not 0 <= getattr(args, name):
            end(f"--{name}: not below 0")
    if 512 < args.check or 512 < args.prefill:
        end("--check, --prefill: 512 tokens at most")
    if not args.prefill and not args.decode:
        end("nothing to time: --prefill 0 --decode 0")
    if 4096 < (args.prefill + args.decode) * 2 * args.rounds and args.depth:
        end("--rounds: contexts grow by each turn; too many")
    if not os.access(args.karat, os.X_OK) or not args.karat.is_file():
        end(f"{args.karat}: not a program")
    if args.ik and not (os.access(args.ik, os.X_OK) and args.ik.is_file()):
        end(f"{args.ik}: not a program")
    if args.ik and args.depth and args.prefill:
        end("--ik: at a depth llama-bench times decoding alone: --prefill 0")
    if not (args.model / "config.json").is_file():
        end(f"{args.model}: no config.json")
    if args.out.suffix != ".jsonl" or not args.out.parent.is_dir():
        end(f"{args.out}: a file that ends in .jsonl, in a folder that exists")
    if not any((args.gguf / f"{kind}.gguf").is_file() for n in args.numbers for kind in BESIDE[n]):
        end(f"{args.gguf}: none of the files that to_gguf.py writes")
    return args


def main():
    args = arguments()
    # Whoever ends this ends the peers as well, and a shell that starts it behind itself has Ctrl-C ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    load = [os.getloadavg()[0]]
    engines, beside, rows = [], {}, []
    try:
        for number in args.numbers:
            engines.append(Karat(args, number))
            beside[number] = []
            if number == "bf16" and not args.no_transformers and args.depth == 0:
                beside[number].append(("transformers", "bf16"))
                engines.append(Peer(args, "transformers", "bf16", args.model))
            for kind in BESIDE[number]:
                path = args.gguf / f"{kind}.gguf"
                if path.is_file():
                    beside[number].append(("llama.cpp", kind))
                    engines.append(Peer(args, "llama.cpp", kind, path))
                    if args.ik:
                        beside[number].append((Ik.name, kind))
                        engines.append(Ik(args, kind, path))
                else:
                    print(f"peers.py: {path} is not there: left out", file=sys.stderr)
        if args.check and args.depth == 0:
            check(args, engines, rows)
        longest, began = 0.0, time.monotonic()
        for number in range(args.rounds):
            start = time.monotonic()
            if number and 60 * args.minutes < start - began + longest:
                print(f"peers.py: {number} rounds in {args.minutes:g} minutes", file=sys.stderr)
                args.rounds = number
                break
            for engine in engines:
                row = {"kind": "turn", "round": number, "engine": engine.name, "format": engine.format,
                       "depth": args.depth, **quiet_turn(args, engine), "load": os.getloadavg()[0], "at": time.time()}
                rows.append(row)
                print(json.dumps({k: row.get(k) for k in ("round", "engine", "format", "prefill", "decode", "others")}),
                      file=sys.stderr, flush=True)
            longest = max(longest, time.monotonic() - start)
        load.append(os.getloadavg()[0])
        cpu = next(engine.cpu for engine in engines if engine.name == "karat")
        versions = {k: v for engine in engines for k, v in engine.versions.items()}
        about = {"kind": "about", "machine": machine(args, cpu), "versions": versions, "commit": commit(),
                 "sha256": hashlib.sha256(args.karat.read_bytes()).hexdigest(), "beside": beside, "load": load,
                 "prefill": args.prefill, "decode": args.decode, "depth": args.depth, "rounds": args.rounds}
        write(args.out, "".join(json.dumps(row) + "\n" for row in [about, *rows]))
        text = table(args, rows, about)
        write(args.out.with_suffix(".md"), text)
        print(text, end="")
    except KeyboardInterrupt:
        end("interrupted", 130)
    finally:
        for engine in engines:
            engine.close()


if __name__ == "__main__":
    main()
