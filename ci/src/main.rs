//! May it pass? The command line of karat.
//!
//! A command's answer goes to stdout, everything else to stderr; how a run ends is one of the codes
//! of [`exit::Exit`].

#![allow(clippy::doc_markdown, reason = "doc comments of arguments are help texts")]

mod ab;
mod aside;
mod baseline;
mod bench;
mod bisect;
mod block;
mod calibrate;
mod ceilings;
mod changed;
mod chat;
mod check;
mod child;
mod compare;
mod config;
mod count;
mod derivation;
mod doctor;
mod ended;
mod env;
mod exit;
mod explain;
mod export;
mod files;
mod fit;
mod floors;
mod foreign;
mod formats;
mod gate;
mod generate;
mod golden_cmd;
mod history;
mod inspect;
mod invariance;
mod keeps;
mod kernel_cmd;
mod list;
mod logits;
mod machine;
mod merge;
mod mutate;
mod out;
mod paths;
mod policy;
mod ready;
mod record;
mod report;
mod resume;
mod runs;
mod same;
mod sampling;
mod sanitize;
mod scale;
mod schema;
mod support;
mod synth;
mod text;
mod told;
mod tour;
mod turns;
mod verdict;
mod watch;
mod words;

use std::{
    num::NonZeroUsize,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    process::ExitCode,
};

use benches::clock::Stopwatch;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{
    config::InForce,
    exit::{Exit, Failure, fail},
    out::{Format, Out},
    record::Record,
};

/// How pure is it? Correctness and performance reference tests for Qwen3-Next and everything that
/// computes it. Without a command: check everything here and say what is known.
#[derive(Debug, Parser)]
#[command(name = "karat", version)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Command>,
}

#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
#[derive(Debug, clap::Args)]
struct Global {
    /// How answers are written.
    #[arg(long, global = true, value_enum, default_value = "human", env = "KARAT_FORMAT")]
    format: Format,
    /// Leave remarks out.
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Say more.
    #[arg(short, long, global = true)]
    verbose: bool,
    /// Draw no progress bars.
    #[arg(
        long,
        global = true,
        env = "KARAT_NO_PROGRESS",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    no_progress: bool,
    /// Threads that work is spread over; all there are without it.
    #[arg(long, global = true, value_name = "N", env = "KARAT_THREADS")]
    threads: Option<NonZeroUsize>,
    /// Pin threads to a processor each.
    #[arg(long, global = true)]
    pin: bool,
    /// GPUs that the cuda engine spreads a model over
    #[arg(long, global = true, value_name = "N")]
    gpus: Option<NonZeroUsize>,
    /// Folder of libnvrtc, where the system does not find it by itself.
    #[arg(long, global = true, value_name = "DIR", env = "KARAT_NVRTC")]
    nvrtc: Option<PathBuf>,
    /// Where the verdict is written.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        default_value = verdict::DEFAULT,
        env = verdict::VARIABLE
    )]
    verdict: PathBuf,
    /// Also write the rows of a command that judges or measures to this file, as JSON lines
    #[arg(long, global = true, value_name = "FILE", env = "KARAT_RESULTS")]
    results: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Name the problems that a filter selects; nothing runs
    List(list::Args),
    /// Say what this machine is, what karat can do on it, and which settings are in force
    Doctor(doctor::Args),
    /// Hold every way to compute an op against the oracle and the recordings
    Check(check::Args),
    /// Say which way to compute which op in which type was checked, and how that went
    Support(support::Args),
    /// Feed one text in every way there is; each must have the answer of the plain way
    Paths(paths::Args),
    /// Ask again: other threads, another batch, another place in it
    Invariance(invariance::Args),
    /// Say where an engine or a kernel goes wrong: layer, op, head or expert, element
    Bisect(bisect::Args),
    /// Say how fast ways to compute ops are, or a model is, beside what the machine can do
    Bench(Box<bench::Args>),
    /// Say how the time and the memory of a token grow with the context, and whether they fall off a cliff
    Scale(scale::Args),
    /// Run turns of a problem; `gate`, `ab` and `calibrate` start such processes
    #[command(hide = true)]
    Turns(turns::Args),
    /// Two revisions beside each other, here and now: is anything slower, or wrong that was right?
    Ab(ab::Args),
    /// Say what cases are off by themselves on this machine
    Calibrate(calibrate::Args),
    /// What times and answers were: save, show, export
    Baseline(baseline::Args),
    /// Times over revisions: add, changepoints
    History(history::Args),
    /// Say whether anything is slower than in a baseline, or wrong that was right
    Gate(gate::Args),
    /// Say what a model loses in fewer bits, and whether that is what its formats have to lose
    Formats(formats::Args),
    /// Recordings of the official implementation: record, verify, status, diff, accept
    Golden(golden_cmd::Args),
    /// Compare logits of any other engine with a recording or another file
    Compare(compare::Args),
    /// Compute logits, hidden states, greedy continuations and MTP logits of a model
    Logits(logits::Args),
    /// Continue a text with a model's own tokenizer and chat template
    Generate(generate::Args),
    /// Run a foreign kernel; `check --kernel` starts such processes
    #[command(hide = true)]
    Child(child::Args),
    /// Kernels of other hands: new, inspect; what those of karat take of the GPU
    Kernel(kernel_cmd::Args),
    /// Encode, decode or apply the chat template, as JSON lines from standard input
    #[command(hide = true)]
    Tokenize(text::Args),
    /// Count a model's parameters, bytes, operations and memory
    Inspect(inspect::Args),
    /// Write a synthetic checkpoint in the official format
    Synth(synth::Args),
    /// Plant faults and count those found; draw honest kernels anew and count false alarms
    Mutate(mutate::Args),
    /// Run kernels under the sanitizers of CUDA: memcheck, racecheck, initcheck, synccheck
    Sanitize(sanitize::Args),
    /// Join the results of several runs, for example of the shards of one
    Merge(merge::Args),
    /// Write results as one HTML file that needs no network and no script
    Report(report::Args),
    /// Write results as other tools read them: JUnit, GitHub, Criterion, Bencher and others
    Export(export::Args),
    /// Print the JSON schema of results, goldens or verdicts
    Schema(schema::Args),
    /// Print completions for a shell
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Explain an exit code, an outcome, an op, a fill or a rule
    Explain(explain::Args),
}

fn main() -> ExitCode {
    let config = match config::here() {
        Ok(config) => config,
        Err(line) => {
            out::warn(&format!("karat: {line}"));
            return refused(&verdict::place(None), &line);
        }
    };
    let written = Cli::command();
    let parsed = config.layer(written.clone()).try_get_matches().and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches).map_err(|e| e.format(&mut written.clone()))?;
        Ok((cli, config.in_force(&written, &matches), engine(&matches)))
    });
    let (cli, settings, engine) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Help and version are answers; everything else is usage.
            let _ = error.print();
            if !error.use_stderr() {
                return Exit::Ok.into();
            }
            let text = error.to_string();
            let line = text.lines().next().unwrap_or("usage");
            return refused(&verdict::place(config.verdict()), line);
        }
    };
    if let Some(Command::Child(args)) = &cli.command {
        return child::run(args).into();
    }
    if let Some(Command::Turns(_)) = &cli.command {
        return turns::run(cli.global.threads).into();
    }
    out::listen();
    let watch = Stopwatch::new();
    let Global { format, quiet, verbose, no_progress, threads, pin, gpus, .. } = cli.global;
    if let Some(gpus) = gpus.filter(|gpus| 1 < gpus.get()) {
        if engine.as_deref() != Some("cuda") {
            let got =
                engine.map_or("a command without one".to_owned(), |engine| format!("{engine:?}"));
            let line = format!("--gpus {gpus}: expected --engine cuda, got {got}");
            out::warn(&format!("karat: {line}"));
            return refused(&cli.global.verdict, &line);
        }
        benches::use_gpus(gpus);
    }
    let Global { nvrtc, verdict, results, .. } = &cli.global;
    let judges = judges(cli.command.as_ref());
    let place = results.clone().filter(|_| judges);
    let told = match &cli.command {
        None => true,
        Some(Command::Check(args)) => args.tells(),
        Some(Command::Gate(args)) => args.tells(),
        Some(_) => false,
    };
    let rows = format == Format::Jsonl || place.is_some() || told;
    let head = (judges && rows).then(|| env::head(&settings, shard(&cli)));
    let record = Record::new(head, place);
    let out = Out { format, quiet, verbose, progress: !no_progress, record };
    if pin {
        if let Err(line) = benches::pin_threads(threads) {
            out::warn(&format!("karat: --pin: {line}"));
        }
    } else if let Some(threads) = threads {
        benches::use_threads(threads);
    }
    if let Some(folder) = nvrtc
        && let Err(line) = foreign::compiler_in(folder)
    {
        out::warn(&format!("karat: --nvrtc: {line}"));
    }
    if !judges && results.is_some() && std::env::var_os("KARAT_RESULTS").is_none() {
        out.note("--results: this command has none");
    }
    benches::kernels::keep_in(&files::cache_dir().join("kernels"));
    let (name, ended) = panic::catch_unwind(AssertUnwindSafe(|| run(&cli, &settings, &out)))
        .unwrap_or_else(|_| {
            ("panic", Err(fail(Exit::Internal, "a fault of karat itself; please report it")))
        });
    let (exit, line) = match ended {
        Ok(exit) => (exit, None),
        Err(error) => {
            let exit =
                error.downcast_ref::<Failure>().map_or(Exit::Internal, |failure| failure.exit);
            let exit = if out::interrupted() { Exit::Interrupted } else { exit };
            out::warn(&format!("karat: {error:#}"));
            (exit, Some(format!("{error:#}")))
        }
    };
    let (exit, line) = match out::lost() {
        Some(error) => {
            let lost = format!("standard output: {error}");
            out::warn(&format!("karat: {lost}"));
            (exit.gravest(Exit::Unfit), line.or(Some(lost)))
        }
        None => (exit, line),
    };
    let exit = if judges { close(&out, name, exit, line.as_deref(), &watch) } else { exit };
    if let Err(error) = verdict::write(verdict, name, exit, line.as_deref()) {
        out.note(&format!("karat: {}: {error}", verdict.display()));
    }
    exit.into()
}

/// What computes, of a command that can be told.
fn engine(matches: &ArgMatches) -> Option<String> {
    match matches.subcommand() {
        Some((_, own)) => engine(own),
        None => matches.try_get_one::<String>("engine").ok().flatten().cloned(),
    }
}

/// Whether a command's rows are results, which begin and end as a run does.
fn judges(command: Option<&Command>) -> bool {
    match command {
        None => true,
        Some(Command::Golden(args)) => args.verifies(),
        Some(command) => matches!(
            command,
            Command::Check(_)
                | Command::Support(_)
                | Command::Paths(_)
                | Command::Invariance(_)
                | Command::Bisect(_)
                | Command::Bench(_)
                | Command::Formats(_)
                | Command::Compare(_)
                | Command::Mutate(_)
                | Command::Sanitize(_)
                | Command::Scale(_)
                | Command::Ab(_)
                | Command::Calibrate(_)
                | Command::Gate(_)
        ),
    }
}

/// The part of a run that was asked for.
fn shard(cli: &Cli) -> Option<list::Shard> {
    match &cli.command {
        Some(Command::Check(args)) => args.shard(),
        Some(Command::Paths(args)) => args.shard(),
        Some(Command::Invariance(args)) => args.shard(),
        Some(Command::Bench(args)) => args.shard(),
        Some(Command::Mutate(args)) => args.shard(),
        _ => None,
    }
}

/// The last row of a run. What cannot be written is told, and is a fault of the machine.
fn close(out: &Out, command: &str, exit: Exit, line: Option<&str>, watch: &Stopwatch) -> Exit {
    // What was refused found nothing: results that are there stay.
    if exit == Exit::Refused && !out.record.begun() {
        return exit;
    }
    let end = serde_json::json!({
        "schema": "karat.result/1", "kind": "end", "command": command, "exit": exit as u8, "line": line,
        "seconds": watch.elapsed().as_secs_f64(),
    });
    match out.end(&end, exit != Exit::Interrupted) {
        Ok(()) => exit,
        Err(line) => {
            out::warn(&format!("karat: {line}"));
            exit.gravest(Exit::Unfit)
        }
    }
}

/// A command line or a file of settings that cannot be read.
fn refused(verdict: &Path, line: &str) -> ExitCode {
    if let Err(error) = verdict::write(verdict, "usage", Exit::Refused, Some(line)) {
        out::warn(&format!("karat: {}: {error}", verdict.display()));
    }
    Exit::Refused.into()
}

/// Runs the command, and says which it was.
fn run(cli: &Cli, settings: &[InForce], out: &Out) -> (&'static str, anyhow::Result<Exit>) {
    // Markdown is for one matrix; elsewhere it would be neither a table nor a program's input.
    if out.format == Format::Md && !matches!(cli.command, Some(Command::Support(_))) {
        return (
            "usage",
            Err(fail(Exit::Refused, "--format md: only `karat support` writes Markdown")),
        );
    }
    match &cli.command {
        None => ("tour", tour::run(settings, out)),
        Some(Command::List(args)) => ("list", list::run(args, out)),
        Some(Command::Doctor(args)) => ("doctor", doctor::run(args, settings, out)),
        Some(Command::Child(args)) => ("child", Ok(child::run(args))),
        Some(Command::Turns(_)) => ("turns", Ok(turns::run(cli.global.threads))),
        Some(Command::Kernel(args)) => ("kernel", kernel_cmd::run(args, out)),
        Some(Command::Check(args)) => ("check", check::run(args, cli.global.results.as_ref(), out)),
        Some(Command::Support(args)) => ("support", support::run(args, out)),
        Some(Command::Paths(args)) => ("paths", paths::run(args, out)),
        Some(Command::Invariance(args)) => ("invariance", invariance::run(args, out)),
        Some(Command::Bisect(args)) => ("bisect", bisect::run(args, out)),
        Some(Command::Bench(args)) => ("bench", bench::run(args, out)),
        Some(Command::Scale(args)) => ("scale", scale::run(args, out)),
        Some(Command::Ab(args)) => ("ab", ab::run(args, out)),
        Some(Command::Calibrate(args)) => ("calibrate", calibrate::run(args, out)),
        Some(Command::Baseline(args)) => ("baseline", baseline::run(args, out)),
        Some(Command::History(args)) => ("history", history::run(args, out)),
        Some(Command::Gate(args)) => ("gate", gate::run(args, out)),
        Some(Command::Formats(args)) => ("formats", formats::run(args, out)),
        Some(Command::Golden(args)) => ("golden", golden_cmd::run(args, out)),
        Some(Command::Compare(args)) => ("compare", compare::run(args, out)),
        Some(Command::Logits(args)) => ("logits", logits::run(args, out)),
        Some(Command::Generate(args)) => ("generate", generate::run(args, out)),
        Some(Command::Tokenize(args)) => ("tokenize", text::run(args)),
        Some(Command::Inspect(args)) => ("inspect", inspect::run(args, out)),
        Some(Command::Synth(args)) => ("synth", synth::run(args, out)),
        Some(Command::Mutate(args)) => ("mutate", mutate::run(args, out)),
        Some(Command::Sanitize(args)) => ("sanitize", sanitize::run(args, out)),
        Some(Command::Merge(args)) => ("merge", merge::run(args, out)),
        Some(Command::Report(args)) => ("report", report::run(args, out)),
        Some(Command::Export(args)) => ("export", export::run(args, out)),
        Some(Command::Schema(args)) => ("schema", schema::run(args, out)),
        Some(Command::Completions { shell }) => ("completions", Ok(completions(*shell, out))),
        Some(Command::Explain(args)) => ("explain", explain::run(args, out)),
    }
}

fn completions(shell: clap_complete::Shell, out: &Out) -> Exit {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "karat", &mut text);
    let text = String::from_utf8_lossy(&text);
    out.text(&text);
    out.json(&serde_json::json!({
        "schema": "karat.result/1", "kind": "completions", "shell": shell.to_string(), "text": text,
    }));
    Exit::Ok
}
