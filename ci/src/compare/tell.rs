//! How far two engines are apart, in words and for programs.

use benches::report::number;
use golden::compare::logits::{Check, Distance, Flip, Ratio, Spread};
use serde_json::{Value, json};

use super::Compared;
use crate::out::Out;

/// One comparison: a table and a verdict, or an object.
pub(crate) fn tell(out: &Out, compared: &Compared) {
    let Compared { prompt, tap, plan, noise, allowed, distance, .. } = compared;
    let name = prompt.as_ref().map_or((*tap).to_owned(), |prompt| format!("{prompt}/{tap}"));
    let (rule, kind) = plan.rule();
    out.line(&format!(
        "{name}: {} rows; plan {}: relative RMS {:.1e} = max({:.0e}, {} x {:.1e}), of a row {:.1e} = max({:.0e}, {} x {:.1e}), from the recorded noise ({kind})",
        distance.rows,
        plan.name(),
        allowed.rel_rms,
        rule.rel_rms,
        rule.noise,
        noise.rel_rms,
        allowed.worst_row,
        rule.worst_token,
        rule.noise,
        noise.worst_token,
    ));
    out.table(&["", "value", "n", "allowed", "used"], &rows(compared));
    out.line(if distance.ok() { "same" } else { "different" });
    out.json(&object(compared));
}

fn rows(compared: &Compared) -> Vec<Vec<String>> {
    let d = &compared.distance;
    let place = |row: usize| {
        let (i, column) = compared.places[row];
        format!("row {i}, column {column}")
    };
    let check = |what: &str| d.checks.iter().find(|check| check.what == what);
    let mut all = Vec::new();
    let mut add = |name: &str, value: String, n: Option<usize>, check: Option<&Check>| {
        let n = n.map_or(String::new(), |n| n.to_string());
        let (allowed, used) = check.map_or((String::new(), String::new()), |check| {
            let used = match check.value / check.allowed {
                _ if check.value == 0.0 => "0 %".to_owned(),
                used if check.ok() => format!("{:.3} %", 100.0 * used),
                used => format!("OVER: {used:.1}x"),
            };
            (format!("{:.2e}", check.allowed), used)
        });
        all.push(vec![name.to_owned(), value, n, allowed, used]);
    };
    let mean = |s: &Spread| with_error(format!("{:.3e}", s.mean), s.error);
    let absent = |why: &str| format!("absent: {why}");
    let bound = if d.whole.is_some() { "" } else { "at least " };
    let kl = "KL(want || got), nats";
    add(kl, format!("{bound}{}", mean(&d.kl)), Some(d.kl.n), check("mean KL"));
    add("  p99", format!("{bound}{:.3e}", d.kl.p99), None, None);
    add("  largest", format!("{bound}{:.3e}", d.kl.max), None, None);
    if let Some(row) = check("KL of a row") {
        add("  row nearest its limit", format!("{:.3e}", row.value), None, Some(row));
    }
    let share = |s: &Spread| with_error(format!("{:.4}", s.mean), s.error);
    add("top-1 agreement", share(&d.top1), Some(d.top1.n), None);
    add(&format!("top-{} agreement", d.k), share(&d.topk), Some(d.topk.n), None);
    let flips = format!("{} inside the margin, {} beyond", d.flips.legal, d.flips.illegal);
    add("flips", flips, Some(d.rows), check("illegal flips"));
    if let Some(Flip { row, want, got, margin, allowed }) = d.flips.widest {
        let widest = format!(
            "{want} -> {got} at {}: leads by {margin:.2e}, {allowed:.2e} is legal",
            place(row)
        );
        add("  widest", widest, None, None);
    }
    add(
        "  smallest margin of want",
        format!("{:.3e}", d.flips.smallest_margin),
        Some(d.rows),
        None,
    );
    match &d.delta_nll {
        Some(nll) => add("change of NLL, nats", mean(nll), Some(nll.n), None),
        None => add("change of NLL", absent("no next token is known on both sides"), None, None),
    }
    match &d.whole {
        Some(whole) => {
            let ratio = |r: &Ratio| with_error(format!("{:.3e}", r.value), r.error);
            let nmse = ratio(&whole.nmse);
            add("NMSE, of the variance within rows", nmse, Some(d.rows), None);
            add("relative RMS", ratio(&whole.rel_rms), Some(d.rows), check("relative RMS"));
            let worst = format!("{:.3e} at {}", whole.worst_row, place(whole.worst_row_at));
            add("  worst row", worst, None, check("worst row"));
        }
        None => add("NMSE, relative RMS", absent("they need every logit"), None, None),
    }
    if let Some(listed) = &d.listed {
        add(
            "log-probabilities, RMS, nats",
            format!("{:.3e}", listed.rms),
            Some(listed.n),
            check("log-probabilities"),
        );
        let worst = format!("{:.3e} at {}", listed.worst_row, place(listed.worst_row_at));
        add("  row nearest its limit", worst, None, check("log-probabilities of a row"));
        add("probability that is listed", share(&listed.covered), Some(listed.covered.n), None);
    }
    let first =
        d.first_not_finite.map_or(String::new(), |row| format!(", the first at {}", place(row)));
    add(
        "not finite",
        format!("{} rows{first}", d.not_finite),
        Some(d.rows),
        check("rows not finite"),
    );
    all
}

/// A value and its standard error, where one is known.
fn with_error(value: String, error: Option<f64>) -> String {
    match error {
        Some(error) => format!("{value} ± {error:.1e}"),
        None => value,
    }
}

fn object(compared: &Compared) -> Value {
    let d: &Distance = &compared.distance;
    let spread = |s: &Spread| {
        json!({"n": s.n, "mean": number(s.mean), "standard_error": s.error.map(number),
            "p99": number(s.p99), "max": number(s.max)})
    };
    let place = |row: usize| json!([compared.places[row].0, compared.places[row].1]);
    let ratio = |r: Ratio| json!({"n": d.rows, "value": number(r.value), "standard_error": r.error.map(number)});
    json!({
        "schema": "karat.result/1", "kind": "compare", "ok": d.ok(),
        "prompt": compared.prompt, "tap": compared.tap, "plan": compared.plan.name(),
        "layout": if d.whole.is_some() { "logits" } else { "listed" },
        "rows": d.rows,
        "kl": spread(&d.kl), "kl_is": if d.whole.is_some() { "exact" } else { "at least" },
        "top1": spread(&d.top1), "topk": spread(&d.topk), "k": d.k,
        "legal_flips": d.flips.legal, "illegal_flips": d.flips.illegal,
        "smallest_margin": number(d.flips.smallest_margin),
        "widest_flip": d.flips.widest.map(|f| json!({"at": place(f.row), "want": f.want, "got": f.got,
            "margin": number(f.margin), "allowed": number(f.allowed)})),
        "delta_nll": d.delta_nll.as_ref().map(spread),
        "nmse": d.whole.map(|w| ratio(w.nmse)),
        "nmse_denominator": d.whole.map(|_| "sum (want - mean of the row)^2"),
        "rel_rms": d.whole.map(|w| ratio(w.rel_rms)),
        "worst_row": d.whole.map(|w| json!({"at": place(w.worst_row_at), "rel_rms": number(w.worst_row)})),
        "logprobs": d.listed.map(|l| json!({"n": l.n, "rms": number(l.rms), "covered": spread(&l.covered),
            "worst_row": {"at": place(l.worst_row_at), "rms": number(l.worst_row)}})),
        "not_finite": d.not_finite, "first_not_finite": d.first_not_finite.map(place),
        "noise": {"rel_rms": number(compared.noise.rel_rms), "worst_token": number(compared.noise.worst_token)},
        "checks": d.checks.iter().map(|c| json!({"what": c.what, "ok": c.ok(), "value": number(c.value),
            "allowed": number(c.allowed)})).collect::<Vec<_>>(),
    })
}
