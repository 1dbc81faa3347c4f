"""Writes a checkpoint of karat (safetensors, official names) as GGUF files that llama.cpp reads.

    python to_gguf.py CHECKPOINT OUT --llama-cpp VENDOR [--formats bf16,q8_0,q4_1,q4_0,q4_k_m] [--threads 2]

VENDOR is the folder vendor/llama.cpp of the source archive of llama-cpp-python (PyPI): its own converter
is run where it lies. A synthetic checkpoint has no tokenizer, so the files say that they have none and
tokens go in as numbers. The other formats are made from bf16 by llama.cpp's quantizer. As in karat, the
embedding stays bf16, and the head of the formats of four bits has eight.

Writes OUT/FORMAT.gguf for each format; what is there already is left. Ends with 2 where it cannot.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

REFUSED = 2
# Numbers of llama.h: enum llama_ftype, enum ggml_type.
FTYPES = {"q8_0": 7, "q4_0": 2, "q4_1": 3, "q4_k_m": 15}
Q8_0, BF16 = 8, 30


def end(line):
    print(f"to_gguf.py: {line}", file=sys.stderr)
    sys.exit(REFUSED)


def convert(checkpoint, path, vendor):
    """The official converter, for a model without a tokenizer."""
    for folder in (vendor / "gguf-py", vendor):
        sys.path.insert(0, str(folder))
    try:
        import gguf
        import torch
        from conversion import ModelBase, get_model_class
    except ImportError as error:
        end(f"{vendor}: {error}")

    class Untold(get_model_class("Qwen3NextForCausalLM")):
        model_arch = gguf.MODEL_ARCH.QWEN3NEXT
        # Nobody drafts in what is timed, and ik_llama.cpp takes the head's block for a layer.
        no_mtp = True

        def set_vocab(self):
            self._set_vocab_none()

        def set_gguf_parameters(self):
            super().set_gguf_parameters()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    logging.disable(logging.INFO)
    with torch.inference_mode():
        hparams = ModelBase.load_hparams(checkpoint, False)
        Untold(checkpoint, gguf.LlamaFileType.MOSTLY_BF16, path, hparams=hparams).write()


def quantize(bf16, path, kind, threads):
    """llama.cpp's own."""
    try:
        import llama_cpp as llama
    except (ImportError, FileNotFoundError, RuntimeError) as error:
        end(f"llama_cpp: {error}")
    # Held for as long as the library may call it.
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    llama.llama_backend_init()
    params = llama.llama_model_quantize_default_params()
    params.ftype = FTYPES[kind]
    params.nthread = threads
    params.output_tensor_type = Q8_0
    params.token_embedding_type = BF16
    code = llama.llama_model_quantize(str(bf16).encode(), str(path).encode(), params)
    if code != 0:
        raise RuntimeError(f"llama_model_quantize returned {code}")


def write(path, how):
    """Beside its place, then renamed."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.gguf")
    try:
        how(part)
        part.rename(path)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        end(f"{path.name}: {type(error).__name__}: {error}")
    finally:
        part.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="VENDOR")
    parser.add_argument("--formats", default="bf16,q8_0,q4_1,q4_0,q4_k_m")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    formats = args.formats.split(",")
    for kind in formats:
        if kind not in ("bf16", *FTYPES):
            end(f"{kind}: there are bf16, {', '.join(FTYPES)}")
    try:
        config = json.loads((args.checkpoint / "config.json").read_text())
        architecture = config["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        end(f"{args.checkpoint}: no config.json of a checkpoint: {error}")
    if architecture != "Qwen3NextForCausalLM":
        end(f"{args.checkpoint}: a {architecture}, not a Qwen3NextForCausalLM")
    if not (args.llama_cpp / "conversion").is_dir():
        end(f"{args.llama_cpp}: no folder conversion in it")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        end(f"{args.out}: {error}")
    bf16 = args.out / "bf16.gguf"
    # The others are made from it.
    if not bf16.exists():
        write(bf16, lambda part: convert(args.checkpoint, part, args.llama_cpp))
    for kind in formats:
        path = args.out / f"{kind}.gguf"
        if not path.exists():
            write(path, lambda part: quantize(bf16, part, kind, args.threads))
        print(f"{path}: {path.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
