//! Kernels to start from: small, plain and right, one per language and op.

/// Languages of [`files`].
pub const LANGUAGES: &[&str] = &["cuda", "c", "rust", "python"];

/// Ops that there is a kernel for, in every language.
pub const OPS: &[&str] = &["rms_norm", "gated_delta_rule"];

/// File names with their texts, if there is such a kernel.
pub fn files(language: &str, op: &str, name: &str) -> Option<Vec<(&'static str, String)>> {
    macro_rules! kernel {
        ($language:literal, $extension:literal) => {
            match op {
                "rms_norm" => {
                    include_str!(concat!("scaffold/", $language, "_rms_norm.", $extension))
                }
                "gated_delta_rule" => {
                    include_str!(concat!("scaffold/", $language, "_gated_delta_rule.", $extension))
                }
                _ => return None,
            }
            .to_owned()
        };
    }
    let mut files = match language {
        "c" => vec![("kernel.c", kernel!("c", "c")), ("karat.h", super::HEADER.to_owned())],
        "rust" => vec![
            ("src/lib.rs", kernel!("rust", "rs")),
            ("src/karat.rs", include_str!("scaffold/karat.rs").to_owned()),
            ("Cargo.toml", CARGO.to_owned()),
        ],
        "python" => vec![
            ("kernel.py", kernel!("python", "py")),
            ("karat_kernel.py", super::PYTHON.to_owned()),
        ],
        "cuda" => vec![("kernel.cu", kernel!("cuda", "cu"))],
        _ => return None,
    };
    let door = match language {
        "c" => C,
        "rust" => RUST,
        "python" => PYTHON,
        _ if op == "rms_norm" => CUDA_RMS_NORM,
        _ => CUDA_GATED_DELTA_RULE,
    };
    let manifest = format!(
        "\
# Check it:  karat check --kernel kernel.toml
# Every key: docs/kernels.md
name = \"{name}\"
abi = 1
implements = [\"{op}\"]

# Which problems it takes; the others are reported as unsupported.
[constraints]
dtype = [\"f32\"]

# How it rounds: the bound that it is held to follows from this. Nothing said is f32 everywhere.
[plan]
form = \"plain\"

[claims]
deterministic = true

{door}"
    );
    files.insert(0, ("kernel.toml", manifest));
    Some(files)
}

const C: &str = "\
# karat builds it when a source is newer than the library.
[build]
command = [\"cc\", \"-O2\", \"-shared\", \"-fPIC\", \"-o\", \"libkernel.so\", \"kernel.c\", \"-lm\"]
sources = [\"kernel.c\", \"karat.h\"]

[door]
kind = \"cabi\"
library = \"libkernel.so\"
";

const RUST: &str = "\
# karat builds it when a source is newer than the library.
[build]
command = [\"cargo\", \"build\", \"--release\", \"--quiet\", \"--target-dir\", \"target\"]
sources = [\"src/lib.rs\", \"src/karat.rs\", \"Cargo.toml\"]

[door]
kind = \"cabi\"
library = \"target/release/libkernel.so\"
";

const CARGO: &str = "\
[package]
name = \"kernel\"
version = \"0.1.0\"
edition = \"2024\"

[lib]
crate-type = [\"cdylib\"]

# A workspace of its own, wherever it lies.
[workspace]
";

const PYTHON: &str = "\
# {python} is the Python that `karat --python` or KARAT_PYTHON names; it needs numpy.
[door]
kind = \"process\"
command = [\"{python}\", \"kernel.py\"]
";

const CUDA_RMS_NORM: &str = "\
[door]
kind = \"cuda\"
source = \"kernel.cu\"

[[door.launch]]
op = \"rms_norm\"
entry = \"rms_norm\"
grid = [\"N\"]
block = [256]
args = [\"o\", \"h\", \"x\", \"residual\", \"weight\", \"eps:f32\", \"D\"]
";

const CUDA_GATED_DELTA_RULE: &str = "\
[door]
kind = \"cuda\"
source = \"kernel.cu\"

[[door.launch]]
op = \"gated_delta_rule\"
entry = \"gated_delta_rule\"
grid = [\"B * HV\"]
block = [\"min(V, 256)\"]
args = [
    \"o\", \"out.state\", \"q\", \"k\", \"v\", \"g\", \"beta\", \"in.state\", \"cu_seqlens\", \"eps:f32\",
    \"HK\", \"HV\", \"K\", \"V\",
]
";
