//! `karat explain`: what a code, an outcome, an op, a fill or a rule means.

use benches::{filter::Filter, plan::plan, registry::ops};
use golden::Set;
use serde_json::json;

use crate::{
    derivation,
    exit::{Exit, refuse},
    files,
    out::Out,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// An exit code, an outcome, an op, a fill, a planted fault, a rule, or a case as `karat list` names it
    /// (op/spec@variant: where its bound comes from); without one, everything there is
    what: Option<String>,
}

/// Exit codes.
const EXITS: &[(&str, &str)] = &[
    ("0", "ok: all that was asked for passed"),
    ("1", "internal: a fault of karat itself; please report it"),
    (
        "2",
        "refused: usage, or refused input (argument, config, checkpoint, tokens, kernel.toml, results file). Never a skip",
    ),
    ("3", "wrong: numbers differ by more than is allowed"),
    ("4", "nothing selected: the filter names no problem"),
    ("5", "slower: a speed gate found a real slow-down, or karat scale a cliff"),
    ("6", "ambiguous: with --strict, the speed gate could not decide"),
    ("7", "baseline missing, or of another machine"),
    ("8", "recording missing, stale, damaged or of another checkpoint"),
    ("9", "machine unfit: no GPU, memory, disk full, unwritable output, missing tool"),
    ("10", "crashed or timed out"),
    ("11", "cheat: a kernel did what an honest one would not"),
    ("130", "interrupted"),
];

/// Outcomes and rules.
const WORDS: &[(&str, &str)] = &[
    ("passed", "every output within its bound; the only green outcome"),
    ("failed", "some output outside its bound"),
    (
        "mistrusted",
        "the case proves too little to be believed, for example because an input is not felt in any output",
    ),
    (
        "skipped",
        "known before anything ran: this machine cannot run it; the reason is told; never green",
    ),
    (
        "unsupported",
        "known before anything ran: this variant does not compute this problem; never green",
    ),
    ("crashed", "it panicked or its process died; the run went on"),
    ("timeout", "it did not end in time"),
    ("cheat", "an input was changed, a guard overwritten, a stale answer returned"),
    ("error", "it could not be run"),
    (
        "bound",
        "of an answer against the oracle: derived, never typed in. The reference runs in stochastic arithmetic, which rounds \
         at random wherever the precision plan of the candidate rounds; the spread of an element is the root mean square \
         distance of the runs from the oracle (f64). Each element may be off by 7 x the larger of its spread and the pooled \
         spread of its row (the last axis), plus half a unit in the last place of the type it is stored in. Sums hold as well: \
         squared errors of the whole, of every token and head within the 7-sigma point of what runs show; slope and mean of \
         the error (bias) within 6.4 standard deviations, level 1e-9. Twelve runs screen, 256 fresh ones decide. Integers \
         have to be equal; experts may be swapped where the margin of the router is below what it may be off, and the rest is \
         then held against the reference with these experts. `karat explain 'op/spec@variant'` and `karat check -v` say which \
         rounding of the plan makes a bound",
    ),
    (
        "plan",
        "how a candidate rounds: form, accumulator, factors of products and their sums, named intermediates, outputs, accuracy of elementary \
         functions. What is not declared is f32, so rounding that is not declared fails. Of logits of another engine \
         (karat compare --plan): f32 and f64 as in `rule`, bf16 at most twice as far off as the official bf16 run of the \
         recording, whole and worst row; from these two follow the mean divergence (r^2 m / 2 for errors of relative size r in \
         rows of mean square m), that of a row, the log-probabilities (r sqrt(2 m)) and the margin inside which the most likely \
         token may change (2 r sqrt(m))",
    ),
    (
        "config",
        "flags go before KARAT_* in the environment, that before karat.toml (of the current folder or the nearest one above), \
         that before what is built in. Keys are named after their flags: model, engine, number, set, device, filter, seeds, \
         memory-gib, python, threads, format, no-progress, verdict. `karat doctor` shows what is in force, and from where",
    ),
    (
        "felt",
        "one input is drawn anew, and every output that depends on it has to move beyond its bound, in some case of the set; a \
         pair that a fill cannot show is declared there, with the reason. What is not felt is mistrusted: a wrong input would \
         pass",
    ),
    (
        "rule",
        "of an f32 computation against a recording with noise s (relative RMS, official f32 against the same code in double) \
              and w (the same of its worst token): relative RMS at most max(2e-5, 4 s), worst token at most max(1e-4, 4 w); \
              of an f64 computation: max(1e-5, 2 s) and max(1e-4, 2 w). Of two forms of one reference in f64: relative RMS 1e-12",
    ),
    ("budget", "the largest share of an allowance that any output used; above 100 % fails"),
    (
        "path",
        "a way to feed one text: split=…, every=n, resume, rollback, together, prompt, packed, poisoned, fresh, left-pad, \
         decode, mtp; or a relation that needs no oracle: edit, heads, gate-one, alone. All have the answer of the plain way: to the \
         bit where that is claimed, else within the bound of the plan, from runs along the same path",
    ),
    (
        "claim",
        "what a variant or an engine promises of its bits: two runs, any batch, any cut. A difference inside the bound of \
         the plan is then a cheat; a larger one is wrong whatever was promised",
    ),
    (
        "recording",
        "what the official implementation answered, with its versions, hashes and own noise: golden/src/recording.rs",
    ),
];

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    if let Some(id) = args.what.as_deref().filter(|what| what.contains('/')) {
        return case(id, out);
    }
    let mut entries: Vec<(String, String)> = Vec::new();
    entries.extend(
        EXITS.iter().map(|(code, what)| ((*code).to_owned(), format!("exit code: {what}"))),
    );
    entries.extend(WORDS.iter().map(|(word, what)| ((*word).to_owned(), (*what).to_owned())));
    for op in ops() {
        let fills = op.fills().iter().map(|fill| fill.name).collect::<Vec<_>>().join(", ");
        let text = format!(
            "op with letters {}; variants {}; fills {fills}. Formula, shapes and source: golden/src/ops/{}.rs",
            op.letters().join("-"),
            op.variants().join(", "),
            op.name()
        );
        entries.push((op.name().to_owned(), text));
        for fill in op.fills() {
            let cites = if fill.cites.is_empty() {
                String::new()
            } else {
                format!(" ({})", fill.cites.join(" "))
            };
            entries.push((
                fill.name.to_owned(),
                format!("fill of {}: {}{cites}", op.name(), fill.why),
            ));
        }
    }
    for fault in benches::paths::FAULTS {
        let text = format!(
            "fault that can be planted around an engine (paths --plant, invariance --plant): {} ({})",
            fault.what, fault.cite
        );
        entries.push((fault.name.to_owned(), text));
    }
    for (name, cite) in benches::plants() {
        entries.push((
            name.to_owned(),
            format!("fault that can be planted in the model (golden verify --plant, paths --plant): {cite}"),
        ));
    }
    let wanted: Vec<_> = match &args.what {
        None => entries,
        Some(what) => entries.into_iter().filter(|(name, _)| name == what).collect(),
    };
    if wanted.is_empty() {
        return Err(refuse(format!(
            "explain {:?}: expected an exit code, an outcome, an op, a fill or a planted fault; `karat explain` names them",
            args.what.as_deref().unwrap_or("")
        )));
    }
    tell(wanted, out);
    Ok(Exit::Ok)
}

/// A case as it is listed: where the bound of each way to compute it comes from.
fn case(id: &str, out: &Out) -> anyhow::Result<Exit> {
    benches::bound::keep_in(&files::cache_dir().join("bounds"));
    let filter = Filter::new(&[id.to_owned()], None).map_err(refuse)?;
    let mut jobs = plan(Set::Nightly, &filter, None).map_err(refuse)?;
    jobs.retain(|job| job.id() == id || job.id().split('@').next() == Some(id));
    if jobs.is_empty() {
        return Err(refuse(format!(
            "explain {id:?}: expected a case as `karat list` names it: op/spec@variant"
        )));
    }
    for job in &jobs {
        let found = job.entry.derivation(&job.spec, &job.variant);
        let lines = match &found {
            Ok(found) => derivation::lines(found),
            Err(rule) => vec![format!("  {rule}")],
        };
        out.line(&format!("{}\n{}", job.id(), lines.join("\n")));
        out.json(&json!({"schema": "karat.result/1", "kind": "explain", "name": job.id(), "text": lines.join("\n"),
            "derivation": found.as_ref().ok().map(derivation::object)}));
    }
    Ok(Exit::Ok)
}

fn tell(wanted: Vec<(String, String)>, out: &Out) {
    for (name, text) in wanted {
        out.line(&format!("{name:<22} {text}"));
        out.json(
            &json!({"schema": "karat.result/1", "kind": "explain", "name": name, "text": text}),
        );
    }
}
