//! A failure block: what is wrong, where, by which bound, and what to type to see it again.

use std::{collections::BTreeMap, path::PathBuf};

use benches::report::{Outcome, Row};
use golden::compare::{Bound, Finding};

/// What to type to see a row again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Again {
    /// The fault that was planted.
    pub(crate) plant: Option<String>,
    /// Foreign kernels by the name of their variant.
    pub(crate) kernels: BTreeMap<String, PathBuf>,
    /// What they were allowed, where it is not what is allowed anyway.
    pub(crate) limits: String,
}

impl Again {
    /// The line for a job.
    pub(crate) fn typed(&self, id: &str) -> String {
        let mut line = format!("karat check '{id}'");
        let variant = id.rsplit_once('@').map_or("", |(_, variant)| variant);
        if let Some(file) = self.kernels.get(variant) {
            line = format!("{line} --kernel {}{}", quoted(&file.to_string_lossy()), self.limits);
        }
        if let Some(plant) = &self.plant {
            line = format!("{line} --plant {plant}");
        }
        line
    }
}

/// A path as a shell reads it back.
pub(crate) fn quoted(path: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./=-:,@+%~".contains(c);
    if !path.is_empty() && path.chars().all(plain) {
        path.to_owned()
    } else {
        format!("'{}'", path.replace('\'', "'\\''"))
    }
}

/// The first lines of a block: the outcome of what, and why.
pub(crate) fn head(outcome: &Outcome, id: &str) -> Vec<String> {
    let word = outcome.name().to_uppercase().replace("FAILED", "FAIL");
    let why = outcome.why().map(|why| format!("  {why}"));
    std::iter::once(format!("{word:<4} {id}")).chain(why).collect()
}

/// What is wrong, where, and how to see it again.
pub(crate) fn block(row: &Row, again: &Again) -> String {
    let mut lines = head(&row.outcome, &row.id());
    lines.extend(row.outcome.findings().iter().filter(|f| !f.ok).flat_map(told));
    lines.push(format!("  repro: {}", again.typed(&row.id())));
    lines.join("\n")
}

/// What is wrong with an output.
pub(crate) fn told(f: &Finding) -> Vec<String> {
    let at = f.at.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut lines = vec![format!(
        "  {} of {} elements of {} over, {} not finite",
        f.over, f.n, f.output, f.not_finite
    )];
    lines.push(format!(
        "  worst {}[{at}] got {:.6e} want {:.6e} err {:.1e} allowed {} ({:.1}x of what is allowed)",
        f.output,
        f.pair.1,
        f.pair.0,
        f.max_abs,
        if f.allowed.is_nan() { "by the row".to_owned() } else { format!("{:.1e}", f.allowed) },
        f.budget
    ));
    let kind = match f.bound {
        Bound::Derived { grid, .. } => grid.name(),
        _ => "f32",
    };
    lines.push(format!(
        "  rel-RMS {:.1e} of {:.1e} · worst {} {} at {:.1e} of {:.1e} · ULP({kind}) p99 {} max {}",
        f.rel_rms,
        f.rel_rms_allowed,
        f.worst_is,
        f.worst_token_at,
        f.worst_token,
        f.worst_token_allowed,
        f.ulp.0,
        f.ulp.1,
    ));
    if let Some(bias) = &f.bias
        && 1.0 < bias.used()
    {
        lines.push(format!(
            "  bias: {} of the {} is {:.1e}, allowed {:.1e}",
            bias.what, bias.part, bias.value, bias.allowed
        ));
    }
    lines.push(format!("  bound: {}", bound(f.bound)));
    if let Some(pattern) = &f.pattern {
        lines.push(format!("  pattern: {pattern}"));
    }
    lines
}

/// A bound in words.
pub(crate) fn bound(bound: Bound) -> String {
    match bound {
        Bound::Relative { rel_rms, worst_token } => {
            format!("rel-RMS {rel_rms:.1e}, row {worst_token:.1e}")
        }
        Bound::Twice { rel_rms, worst_token, runs } => {
            let of =
                if runs < 2 { String::new() } else { format!(", or the worst of {runs} runs") };
            format!("rel-RMS {rel_rms:.1e}, row {worst_token:.1e}: twice the emulated plan{of}")
        }
        Bound::Derived { runs, grid } => format!(
            "7 x spread of {runs} runs in stochastic arithmetic + half an ulp of {grid}; sums of squares; bias"
        ),
        Bound::Exact => "equal".to_owned(),
    }
}
