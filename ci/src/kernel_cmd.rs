//! `karat kernel`: kernels of other hands, new ones and what is known of one; and what those of karat take.

mod trace;

use std::path::PathBuf;

use benches::{
    foreign::{Entrance, Kernel, jobs, scaffold},
    kernels::Used,
    registry::ops,
};
use golden::{Dtype, Set};
use serde_json::json;

use crate::{
    exit::{Exit, fail, refuse},
    files,
    foreign::{self, Limits},
    out::Out,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write a small kernel that passes, to start from
    New(New),
    /// Say whether a kernel.toml is right, whether its door opens, and what would run
    Inspect(Inspect),
    /// Write problems as FlashInfer Trace definitions and workloads
    Export(trace::Export),
    /// Read FlashInfer Trace workloads as problems of karat
    Import(trace::Import),
    /// Compile karat's own CUDA kernels for all of their targets, on any machine with libnvrtc, and say
    /// what they take: registers, shared memory, stack, spills
    Resources(Resources),
}

#[derive(Debug, clap::Args)]
struct New {
    /// The language.
    #[arg(long, value_enum)]
    lang: Language,
    /// The op.
    #[arg(long, default_value = "rms_norm")]
    op: String,
    /// The folder to write; it must not be there, or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Language {
    /// CUDA C++, compiled by NVRTC.
    Cuda,
    /// C, as a shared library.
    C,
    /// Rust, as a shared library.
    Rust,
    /// Python with numpy; torch and Triton where they are installed.
    Python,
}

impl Language {
    fn name(self) -> &'static str {
        match self {
            Language::Cuda => "cuda",
            Language::C => "c",
            Language::Rust => "rust",
            Language::Python => "python",
        }
    }
}

#[derive(Debug, clap::Args)]
struct Inspect {
    /// The kernel.toml.
    file: PathBuf,
    #[command(flatten)]
    limits: Limits,
}

#[derive(Debug, clap::Args)]
struct Resources {
    /// Words that must be in the kernel's name
    filter: Vec<String>,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    match &args.command {
        Command::New(new) => write(new, out),
        Command::Inspect(inspect) => inspected(inspect, out),
        Command::Export(export) => trace::export(export, out),
        Command::Import(import) => trace::import(import, out),
        Command::Resources(resources) => used(resources, out),
    }
}

fn write(args: &New, out: &Out) -> anyhow::Result<Exit> {
    let New { lang, op, out: folder } = args;
    let name = format!("my-{}", op.replace('_', "-"));
    let texts = scaffold::files(lang.name(), op, &name).ok_or_else(|| {
        refuse(format!("--op {op}: expected one of {}", scaffold::OPS.join(", ")))
    })?;
    if let Ok(mut entries) = std::fs::read_dir(folder)
        && entries.next().is_some()
    {
        return Err(refuse(format!("{}: is not empty", folder.display())));
    }
    for (file, text) in &texts {
        let path = folder.join(file);
        files::replace(&path, text.as_bytes())
            .map_err(|e| fail(Exit::Unfit, format!("{}: {e}", path.display())))?;
        out.line(&path.display().to_string());
    }
    let manifest = folder.join("kernel.toml");
    out.json(&json!({
        "schema": "karat.result/1", "kind": "kernel_new", "language": lang.name(), "op": op, "file": manifest,
        "files": texts.iter().map(|(file, _)| file).collect::<Vec<_>>(),
    }));
    out.note(&format!("check it: karat check --kernel {}", manifest.display()));
    Ok(Exit::Ok)
}

fn used(args: &Resources, out: &Out) -> anyhow::Result<Exit> {
    let all = benches::kernels::resources(&args.filter)
        .map_err(|why| fail(Exit::Unfit, format!("kernels of karat: {why}")))?;
    if all.is_empty() {
        return Err(fail(
            Exit::Nothing,
            "nothing selected; without words every kernel is compiled",
        ));
    }
    let row = |used: &Used| {
        let Used { entry, build, target, registers, shared, stack, spilled } = used;
        out.json(&json!({
            "schema": "karat.result/1", "kind": "kernel_resources", "kernel": entry, "stored": build,
            "target": target, "registers": registers, "shared": shared, "stack": stack, "spilled": spilled,
        }));
        let mut row = vec![entry.clone(), build.clone(), (*target).to_owned()];
        row.extend([registers, shared, stack, spilled].map(ToString::to_string));
        row
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    out.table(&["kernel", "stored in", "target", "registers", "shared", "stack", "spilled"], &rows);
    Ok(Exit::Ok)
}

fn inspected(args: &Inspect, out: &Out) -> anyhow::Result<Exit> {
    let kernel = foreign::open(&args.file, &args.limits)??;
    let kernel = std::sync::Arc::new(kernel);
    let manifest = &kernel.manifest;
    let how = match &manifest.entrance {
        Entrance::Cabi { library, .. } => library.display().to_string(),
        Entrance::Process { command } => command.join(" "),
        Entrance::Cuda { file, .. } => file.display().to_string(),
    };
    let open = kernel.unfit.clone().map_or("opens".to_owned(), |why| format!("skipped: {why}"));
    let claims = kernel.claims();
    let promises =
        [("deterministic", claims.deterministic), ("batch_invariant", claims.batch_invariant)];
    let promises: Vec<_> =
        promises.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
    let mut lines = vec![
        ("name", kernel.variant()),
        ("implements", manifest.implements.join(", ")),
        ("door", format!("{}: {how}", manifest.door())),
        ("door is", open),
        ("constraints", manifest.constraints.to_string()),
        ("claims", if promises.is_empty() { "none".to_owned() } else { promises.join(", ") }),
    ];
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        lines.push(("plan", format!("{dtype}: {}", kernel.plan(dtype))));
    }
    for (name, set) in [("smoke", Set::Smoke), ("ci", Set::Ci), ("nightly", Set::Nightly)] {
        lines.push(("would run", format!("{name}: {}", counted(&kernel, set)?)));
    }
    for (what, value) in &lines {
        out.line(&format!("{what:<12} {value}"));
    }
    out.json(&json!({
        "schema": "karat.result/1", "kind": "kernel", "file": args.file, "name": manifest.name,
        "implements": manifest.implements, "door": manifest.door(), "unfit": kernel.unfit,
        "constraints": manifest.constraints.to_string(), "deterministic": claims.deterministic,
        "batch_invariant": claims.batch_invariant, "exit": 0,
    }));
    Ok(Exit::Ok)
}

/// Problems of a set by op: those it takes, and those it does not.
fn counted(kernel: &std::sync::Arc<Kernel>, set: Set) -> anyhow::Result<String> {
    let all = jobs(set, &benches::filter::Filter::default(), None, std::slice::from_ref(kernel))
        .map_err(refuse)?;
    let mut told = Vec::new();
    for op in ops() {
        let mine: Vec<_> = all.iter().filter(|job| job.entry.name() == op.name()).collect();
        let taken = mine
            .iter()
            .filter(|job| {
                let dtype = job.parsed.dtype.parse();
                dtype.is_ok_and(|dtype| kernel.refuses(&job.parsed.sizes, dtype).is_none())
            })
            .count();
        if !mine.is_empty() {
            let not = mine.len() - taken;
            let not = if not == 0 { String::new() } else { format!(", {not} unsupported") };
            told.push(format!("{taken} problems of {}{not}", op.name()));
        }
    }
    Ok(told.join("; "))
}
