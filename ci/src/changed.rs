//! `--changed-since REV`: which cases a diff can touch.
//!
//! A file of an op touches that op and what is made of it; one of a device, what runs there; one that
//! belongs to all, all. What is computed and judged nowhere (texts, tests, this crate) touches no case.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use benches::{foreign::Kernel, plan::Job, registry::ops};

use crate::exit::{Exit, fail, refuse};

#[derive(Debug, clap::Args)]
pub(crate) struct Since {
    /// Only cases that a change since this revision can touch: since the commit where HEAD left it, and
    /// what is not committed
    #[arg(long, value_name = "REV")]
    changed_since: Option<String>,
}

/// What each op is made of, in the reference or on the processor; that of a part is found from there.
const PARTS: &[(&str, &[&str])] = &[
    ("attention", &["linear", "rms_norm"]),
    ("attention_layer", &["attention", "linear", "rms_norm", "rope"]),
    ("causal_conv1d", &["linear"]),
    ("embedding", &["linear"]),
    ("fp8_dequant", &["linear"]),
    ("gated_delta_rule", &["gdn_layer", "l2_norm", "linear"]),
    ("gdn_gates", &["linear"]),
    (
        "gdn_layer",
        &["causal_conv1d", "gated_delta_rule", "gdn_gates", "l2_norm", "linear", "rms_norm_gated"],
    ),
    ("l2_norm", &["linear"]),
    ("lm_head", &["linear"]),
    (
        "model",
        &[
            "attention_layer",
            "embedding",
            "gdn_layer",
            "linear",
            "lm_head",
            "moe_layer",
            "mtp",
            "rms_norm",
        ],
    ),
    ("moe_experts", &["linear", "shared_expert"]),
    ("moe_layer", &["linear", "moe_experts", "moe_router", "shared_expert"]),
    ("moe_router", &["linear"]),
    ("mtp", &["attention_layer", "embedding", "linear", "lm_head", "moe_layer", "rms_norm"]),
    ("rms_norm", &["linear"]),
    ("rms_norm_gated", &["linear", "rms_norm"]),
    ("rope", &["linear"]),
    ("sampling", &["linear", "moe_router"]),
    ("shared_expert", &["linear", "moe_experts"]),
];

/// All that an op is made of, itself included.
fn made_of(op: &str) -> BTreeSet<&str> {
    let mut all = BTreeSet::from([op]);
    let mut left = vec![op];
    while let Some(next) = left.pop() {
        let parts =
            PARTS.iter().find(|(name, _)| *name == next).map_or(&[][..], |(_, parts)| parts);
        left.extend(parts.iter().filter(|part| all.insert(part)));
    }
    all
}

/// What a changed file can touch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Touch {
    /// This op and what is made of it; all without one.
    op: Option<String>,
    /// How names of variants begin; any way to compute without one.
    device: Option<&'static str>,
}

/// What changed.
#[derive(Debug)]
pub(crate) struct Changed {
    touches: BTreeSet<Touch>,
    /// Changed files, from the root of all.
    files: Vec<PathBuf>,
    since: String,
}

impl Since {
    /// What changed, if that was asked.
    pub(crate) fn find(&self, kernels: &[Arc<Kernel>]) -> anyhow::Result<Option<Changed>> {
        let Some(since) = &self.changed_since else { return Ok(None) };
        let top = PathBuf::from(git(Path::new("."), &["rev-parse", "--show-toplevel"], since)?);
        let ours = top.join("golden/src/ops").is_dir();
        if !ours && kernels.is_empty() {
            return Err(refuse(format!(
                "--changed-since: {} holds no sources of karat: expected its repository, or --kernel",
                top.display()
            )));
        }
        if since.starts_with('-') {
            return Err(refuse(format!("--changed-since {since}: expected a revision")));
        }
        let base = git(&top, &["merge-base", "--", since, "HEAD"], since)?;
        let mut names =
            git(&top, &["diff", "--name-only", "--no-renames", "-z", &base, "--"], since)?;
        names += &git(&top, &["ls-files", "--others", "--exclude-standard", "-z"], since)?;
        let names: Vec<&str> = names.split('\0').filter(|name| !name.is_empty()).collect();
        let touches = if ours {
            names.iter().filter_map(|name| touch(name)).collect()
        } else {
            BTreeSet::new()
        };
        let files = names.iter().map(|name| top.join(name)).collect();
        Ok(Some(Changed { touches, files, since: since.clone() }))
    }
}

/// What git says.
fn git(folder: &Path, arguments: &[&str], since: &str) -> anyhow::Result<String> {
    let mut git = Command::new("git");
    let ran = git.current_dir(folder).args(arguments).stdin(Stdio::null()).output();
    let ran = ran.map_err(|e| fail(Exit::Unfit, format!("--changed-since {since}: git: {e}")))?;
    if ran.status.success() {
        let text = String::from_utf8_lossy(&ran.stdout);
        return Ok(text.trim_end_matches('\n').to_owned());
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    let said = said.lines().next().unwrap_or("no commit that both have; a shallow clone lacks it");
    Err(refuse(format!("--changed-since {since}: git {}: {said}", arguments[0])))
}

/// What a changed file can touch; nothing if no case.
fn touch(name: &str) -> Option<Touch> {
    let silent = [
        "docs/",
        ".ci/",
        ".github/",
        "ci/",
        "benches/tests/",
        "benches/benches/",
        "benches/peers/",
        "optimized/tests/",
        "golden/questions/",
        "golden/scripts/",
        "golden/fuzz/",
        "golden/checkpoints/",
    ];
    // Texts say nothing to a compiler, and recordings of whole models are asked by `golden verify`.
    let text = Path::new(name).extension().is_some_and(|end| end == "md");
    let of_models =
        name.starts_with("golden/recordings/") && !name.starts_with("golden/recordings/ops/");
    let silent = silent.iter().any(|folder| name.starts_with(folder)) || text || of_models;
    let own = ["LICENSE-APACHE", "LICENSE-MIT", ".gitignore", "rustfmt.toml"].contains(&name);
    if silent || own || name.ends_with("/tests.rs") {
        return None;
    }
    let (room, rest) = name.split_once("/src/").unwrap_or(("", name));
    let (device, rest) = match room {
        "kernels" => (Some("cuda/"), rest.trim_start_matches("hopper/")),
        "optimized" => match rest.split_once('/') {
            Some(("cpu", rest)) => (Some("cpu/"), rest),
            Some(("cuda", rest)) => (Some("cuda/"), rest),
            Some(("doors", _)) => (Some("foreign/"), ""),
            _ => (None, ""),
        },
        "golden" => (None, rest.strip_prefix("ops/").unwrap_or_default()),
        "reference" => (None, rest),
        "benches" => (None, rest.strip_prefix("sequence/").unwrap_or_default()),
        _ => (None, ""),
    };
    let stem = rest.split(['/', '.']).next().unwrap_or_default();
    let is =
        |op: &str| stem == op || stem.strip_prefix(op).is_some_and(|more| more.starts_with('_'));
    // An op may have several sources; the longest name that fits is meant.
    let names = ops().iter().map(|entry| entry.name()).filter(|op| is(op));
    let op = names.max_by_key(|op| op.len()).map(str::to_owned);
    Some(Touch { op, device })
}

impl Changed {
    /// Whether a change can touch this way to compute this op.
    pub(crate) fn touches(&self, op: &str, variant: &str) -> bool {
        self.touches.iter().any(|touch| {
            touch.device.is_none_or(|device| variant.starts_with(device))
                && touch.op.as_deref().is_none_or(|changed| made_of(op).contains(changed))
        })
    }

    /// Whether a change can touch a job.
    fn holds(&self, job: &Job) -> bool {
        let foreign = || {
            let file = &job.foreign.as_ref()?.manifest.file;
            let folder = file.canonicalize().ok()?.parent()?.to_owned();
            let inside = |file: &PathBuf| file.parent().is_some_and(|at| at.starts_with(&folder));
            Some(self.files.iter().any(inside))
        };
        self.touches(job.entry.name(), &job.variant) || foreign().unwrap_or(false)
    }

    /// Those of some jobs that a change can touch; none left is told.
    pub(crate) fn of(&self, jobs: Vec<Job>) -> anyhow::Result<Vec<Job>> {
        let left: Vec<Job> = jobs.into_iter().filter(|job| self.holds(job)).collect();
        if left.is_empty() {
            let files = self.files.len();
            return Err(fail(
                Exit::Nothing,
                format!(
                    "nothing selected: none of {files} files changed since {} touches a case",
                    self.since
                ),
            ));
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{PARTS, Touch, made_of, ops, touch};

    fn of(op: &str, device: Option<&'static str>) -> Touch {
        let op = (!op.is_empty()).then(|| op.to_owned());
        Touch { op, device }
    }

    #[test]
    fn a_file_touches_its_op_on_its_device() {
        for (name, want) in [
            ("reference/src/rms_norm.rs", Some(of("rms_norm", None))),
            ("reference/src/rms_norm_gated.rs", Some(of("rms_norm_gated", None))),
            ("golden/src/ops/gated_delta_rule.rs", Some(of("gated_delta_rule", None))),
            ("optimized/src/cpu/attention/blocks.rs", Some(of("attention", Some("cpu/")))),
            ("optimized/src/cuda/linear.rs", Some(of("linear", Some("cuda/")))),
            ("kernels/src/hopper/attention_prefill.cu", Some(of("attention", Some("cuda/")))),
            (
                "kernels/src/hopper/gated_delta_rule_few.cu",
                Some(of("gated_delta_rule", Some("cuda/"))),
            ),
            ("kernels/src/common/block.cuh", Some(of("", Some("cuda/")))),
            ("optimized/src/cpu/simd.rs", Some(of("", Some("cpu/")))),
            ("optimized/src/cpu.rs", Some(of("", None))),
            ("reference/src/real.rs", Some(of("", None))),
            ("benches/src/bound.rs", Some(of("", None))),
            ("Cargo.lock", Some(of("", None))),
            ("golden/recordings/ops/manifest.json", Some(of("", None))),
            ("docs/ops.md", None),
            ("README.md", None),
            ("ci/src/report.rs", None),
            ("golden/recordings/yarn/manifest.json", None),
        ] {
            assert_eq!(touch(name), want, "{name}");
        }
    }

    /// What sources name is what the table names: a diff touches no case that it leaves out.
    #[test]
    fn the_table_of_parts_is_that_of_the_sources() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let names: Vec<&str> = ops().iter().map(|op| op.name()).collect();
        let mut found = 0;
        for (op, parts) in PARTS {
            assert!(names.contains(op) && parts.iter().all(|part| names.contains(part)), "{op}");
        }
        for op in &names {
            for folder in ["reference/src", "optimized/src/cpu", "optimized/src/cuda"] {
                let mut texts =
                    vec![fs::read_to_string(root.join(folder).join(format!("{op}.rs")))];
                let inside = fs::read_dir(root.join(folder).join(op)).into_iter().flatten();
                texts.extend(inside.map(|entry| fs::read_to_string(entry.unwrap().path())));
                for text in texts.into_iter().flatten() {
                    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
                    for part in code.flat_map(|line| called(line, &names)) {
                        assert!(made_of(op).contains(part), "{folder}/{op}: {part}");
                        found += usize::from(part != *op);
                    }
                }
            }
        }
        assert!(50 < found, "{found}");
    }

    /// Names of ops that stand before `::` or a parenthesis.
    fn called<'a>(line: &str, names: &[&'a str]) -> Vec<&'a str> {
        let part = |c: char| c.is_alphanumeric() || c == '_';
        let is = |name: &&&str| {
            line.match_indices(**name).any(|(at, _)| {
                let after = &line[at + name.len()..];
                let before = &line[..at];
                !before.ends_with(part)
                    && !before.ends_with(['.', '"'])
                    && (after.starts_with("::") || after.starts_with('('))
                    && !before.ends_with("fn ")
            })
        };
        names.iter().filter(is).copied().collect()
    }
}
