//! Where results are from, and how they were found.

use maud::{Markup, html};

use super::page::{cell, table};
use crate::{
    runs::{Results, rows::Env},
    words,
};

/// Revision, machine and time in a line.
pub(super) fn line(results: &Results) -> Markup {
    let told: Vec<&Env> = results.runs.iter().filter(|run| run.told).map(|run| &run.env).collect();
    let mut lines: Vec<String> = Vec::new();
    for env in &told {
        let gpu = env.gpu.as_ref().map_or(String::new(), |gpu| format!(" · {gpu}"));
        let line = format!("{} · {} · {} threads{gpu}", revision(env), env.cpu, env.threads);
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    let first = told.iter().map(|env| env.time.as_str()).filter(|time| !time.is_empty()).min();
    let seconds: f64 =
        results.runs.iter().filter_map(|run| run.end.as_ref()).map(|end| end.seconds).sum();
    html! {
        @for line in lines.iter().take(6) { p.soft { (line) } }
        @if let Some(first) = first {
            p.soft { (first) @if 0.0 < seconds { " · " (format!("{seconds:.0} s")) " of work" } }
        }
        @if told.is_empty() { p.soft { "These results do not say from which machine they are." } }
    }
}

fn revision(env: &Env) -> String {
    let short = env.revision.as_deref().map(|revision| revision.get(..12).unwrap_or(revision));
    let dirty = if env.dirty == Some(true) { " with changes" } else { "" };
    short.map_or_else(|| format!("karat {}", env.version), |short| format!("{short}{dirty}"))
}

/// Every machine once, and every run.
pub(super) fn machines(results: &Results) -> Markup {
    let mut machines: Vec<&Env> = Vec::new();
    for run in results.runs.iter().filter(|run| run.told) {
        if !machines.iter().any(|env| env.fingerprint == run.env.fingerprint) {
            machines.push(&run.env);
        }
    }
    let facts = |env: &Env| {
        let gpu = env.gpu.as_ref().map(|gpu| {
            env.gpu_memory
                .map_or(gpu.clone(), |memory| format!("{gpu}, {}", words::bytes(memory as f64)))
        });
        [
            ("processor", env.cpu.clone()),
            ("threads", env.threads.to_string()),
            ("memory", words::bytes(env.memory as f64)),
            ("instruction sets", env.features.join(" ")),
            ("GPU", gpu.unwrap_or_else(|| "none that karat can use".to_owned())),
            ("system", format!("{} {}", env.os, env.arch)),
            ("fingerprint", env.fingerprint.clone()),
        ]
    };
    let runs: Vec<Vec<Markup>> = results
        .runs
        .iter()
        .filter(|run| run.told)
        .map(|run| {
            let env = &run.env;
            let took = run
                .end
                .as_ref()
                .map_or("did not end".to_owned(), |end| format!("{:.1} s", end.seconds));
            vec![
                html! { code { (env.command) } },
                cell(&env.time),
                cell(took),
                cell(run.rows.to_string()),
                cell(format!(
                    "{} {}",
                    run.exit() as u8,
                    format!("{:?}", run.exit()).to_lowercase()
                )),
                html! { code { (revision(env)) } },
                html! { code { (env.build) } },
                html! { code { (env.fingerprint.get(..6).unwrap_or_default()) } },
            ]
        })
        .collect();
    html! {
        @for env in &machines {
            (table(&["", ""], &facts(env).map(|(name, value)| vec![cell(name), cell(value)])))
        }
        @if machines.is_empty() { p.soft { "These results do not say from which machine they are." } }
        @if !runs.is_empty() {
            h3 { "Runs" }
            (table(&["command", "begun", "#took", "#rows", "exit", "revision", "build", "machine"], &runs))
        }
        @if let Some(env) = machines.first() {
            @if !env.settings.is_empty() {
                details {
                    summary { "settings that were in force" }
                    (table(&["setting", "value", "from"], &env.settings.iter()
                        .map(|s| vec![cell(&s.key), cell(&s.value), cell(&s.from)]).collect::<Vec<_>>()))
                }
            }
        }
    }
}

/// How numbers came to be.
pub(super) fn method() -> Markup {
    html! {
        p { b { "Right. " } "Every case is held element by element against a plain reference that is computed in f64 on the same rounded inputs. "
            "What an element may be off is derived and not typed in: the reference is run in stochastic arithmetic, which rounds at random wherever the "
            "precision plan of the candidate rounds; each element may be off by 7 spreads of these runs and half a unit in its last place. Sums of squares, worst "
            "tokens and bias are held as well. Twelve runs screen, 256 fresh ones decide. " i { "Use of the bound" } " is the largest error as a share of what was allowed; "
            "above 100 % a case has failed." }
        p { b { "Recordings " } "are answers of the official implementation. An f32 computation may be off by four times what that implementation differs from itself in double precision." }
        p { b { "Fast. " } "A case is timed only after it was checked, on drawn inputs of the model's own domain; samples are those that were taken. "
            "The roof is the least time that the bytes and operations of a case take at the pace of this machine, measured between the samples; " i { "share of the roof" }
            " is that time over the median. Times are compared on one machine only, and whether a difference is one is decided by "
            code { "karat gate" } ", not by this page." }
        p { b { "Skipped " } "is what this machine cannot run, " b { "unsupported " } "what a way to compute an op is not for: both are known before anything runs, and never counted as passed. " b { "Flaky " }
            "is what passed only when it was run again." }
        p { code { "karat explain bound" } " and " code { "karat explain OP/SPEC@VARIANT" } " say more; " code { "karat schema" } " describes the JSON lines that this page was made of." }
    }
}
