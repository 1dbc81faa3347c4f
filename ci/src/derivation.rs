//! What a bound is made of, in words and for programs.

use benches::{judge::Derivation, report::number};
use golden::compare::derived::SPREADS;
use serde_json::{Value, json};

/// One line for the plan, two for each output.
pub(crate) fn lines(d: &Derivation) -> Vec<String> {
    let mut lines = vec![format!("  plan: {}", d.plan)];
    for part in &d.outputs {
        let Some(grid) = part.grid else {
            lines.push(format!("  bound of {}: equal, but for legal swaps", part.output));
            continue;
        };
        lines.push(format!(
            "  bound of {}: {SPREADS} x spread + half an ulp of {grid}; spread {:.1e}, half ulp {:.1e} of its RMS ({} runs)",
            part.output, part.spread, part.half_ulp, d.runs
        ));
        let dominant = part.dominant();
        let terms: Vec<String> = part
            .terms
            .iter()
            .map(|(name, spread)| {
                let mark = if dominant == Some(name.as_str()) { " (dominates)" } else { "" };
                format!("{name} {spread:.1e}{mark}")
            })
            .collect();
        lines.push(format!("    each source alone: {}", terms.join(" · ")));
    }
    lines
}

/// The same as JSON.
pub(crate) fn object(d: &Derivation) -> Value {
    let part = |part: &benches::judge::Part| {
        json!({
            "output": part.output,
            "output_type": part.grid.map(golden::plan::Grid::name),
            "spread": number(part.spread),
            "half_ulp": number(part.half_ulp),
            "dominant": part.dominant(),
            "terms": part.terms.iter().map(|(name, spread)| json!({"term": name, "spread": number(*spread)}))
                .collect::<Vec<_>>(),
        })
    };
    json!({"plan": d.plan.to_string(), "runs": d.runs, "factor": SPREADS,
        "outputs": d.outputs.iter().map(part).collect::<Vec<_>>()})
}
