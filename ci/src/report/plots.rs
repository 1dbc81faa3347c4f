//! Which plots there are, and what is drawn in them.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::{
    cases::samples,
    page::{absent, cell, table},
    plot::{Axis, Draw, Series, context as at_context, contexts, figure},
};
use crate::runs::{
    Results,
    rows::{OpSpeed, ScaleFit, worse},
};

/// Series that colours and shapes can tell apart.
const MOST: usize = 6;

/// Pace against operations for each byte, and what memory and products allow.
pub(super) fn roofline(results: &Results) -> Markup {
    let fits = |row: &&OpSpeed| row.timed() && 0.0 < row.flops && 0.0 < row.bytes;
    let rows: Vec<&OpSpeed> = results.op_speeds.iter().filter(fits).collect();
    if rows.is_empty() {
        return absent(
            "No op with operations and bytes was timed:",
            "karat bench --set ci --results bench.jsonl",
        );
    }
    let mut machines: Vec<(String, Vec<&OpSpeed>)> = Vec::new();
    for row in rows {
        let env = &results.runs[row.run].env;
        let device = if row.variant.starts_with("cuda/") { env.gpu.clone() } else { None };
        let name = device.unwrap_or_else(|| env.cpu.clone());
        match machines.iter_mut().find(|(known, _)| *known == name) {
            Some((_, rows)) => rows.push(row),
            None => machines.push((name, vec![row])),
        }
    }
    html! { @for (name, rows) in &machines { (roofline_of(name, rows)) } }
}

fn roofline_of(machine: &str, rows: &[&OpSpeed]) -> Markup {
    let at = |row: &OpSpeed| ((row.flops / row.bytes).log10(), (row.flops / row.median_ns).log10());
    let mut by: Vec<(&str, Vec<(f64, f64)>)> = Vec::new();
    for row in rows {
        let name = if by.len() < MOST || by.iter().any(|(known, _)| *known == row.variant) {
            row.variant.as_str()
        } else {
            "others"
        };
        match by.iter_mut().find(|(known, _)| *known == name) {
            Some((_, points)) => points.push(at(row)),
            None => by.push((name, vec![at(row)])),
        }
    }
    // What the roof was when a case was timed follows from its share of it.
    let pace = |roof: &str, work: fn(&OpSpeed) -> f64| {
        let of = rows.iter().filter(|row| row.roof.as_deref() == Some(roof));
        let mut all: Vec<f64> = of
            .filter_map(|row| {
                Some(work(row) / row.median_ns / row.share_of_roof.filter(|share| 0.0 < *share)?)
            })
            .collect();
        all.sort_by(f64::total_cmp);
        (!all.is_empty()).then(|| all[all.len() / 2])
    };
    let (memory, products) = (pace("memory", |row| row.bytes), pace("products", |row| row.flops));
    let xs: Vec<f64> = rows.iter().map(|row| at(row).0).collect();
    let mut ys: Vec<f64> = rows.iter().map(|row| at(row).1).collect();
    ys.extend(products.map(f64::log10));
    let x = Axis::decades("operations for each byte that has to move", &xs);
    let (left, right) = (x.range.start, x.range.end);
    let roof = |x: f64| {
        let slope = memory.map_or(f64::INFINITY, |memory| x + memory.log10());
        slope.min(products.map_or(f64::INFINITY, f64::log10))
    };
    if memory.is_some() {
        ys.extend([
            roof(xs.iter().copied().fold(f64::INFINITY, f64::min)),
            roof(xs.iter().copied().fold(left, f64::max)),
        ]);
    }
    let y = Axis::decades("Gop/s", &ys);
    let (low, high) = (y.range.start, y.range.end);
    let mut series: Vec<Series> = Vec::new();
    if memory.is_some() || products.is_some() {
        let name = [
            memory.map(|m| format!("memory {m:.1} GB/s")),
            products.map(|p| format!("products {p:.0} Gop/s")),
        ];
        // Where it enters the plot, where it bends, and where it leaves.
        let begins = memory.map_or(left, |memory| left.max(low - memory.log10()));
        let bends = memory.zip(products).map(|(memory, products)| (products / memory).log10());
        let bends = bends.filter(|x| begins < *x && *x < right);
        let ends = match (memory, products) {
            (Some(memory), None) => right.min(high - memory.log10()),
            _ => right,
        };
        let points = [Some(begins), bends, Some(ends)].into_iter().flatten();
        let inside = points.map(|x| (x, roof(x))).collect();
        let name = format!("roof: {}", name.into_iter().flatten().collect::<Vec<_>>().join(", "));
        series.push(Series { name, draw: Draw::Limit, as_number: 0, points: inside });
    }
    series.extend(by.into_iter().enumerate().map(|(i, (name, points))| Series {
        name: name.to_owned(),
        draw: Draw::Points,
        as_number: i,
        points,
    }));
    let note = "each mark is a case; the roof is the median of what was measured around the cases that it bounds";
    figure(&format!("Roofline: {machine}"), &x, &y, &series, note)
}

/// A line of a plot against the context.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
    /// Milliseconds of a token as a + b T + c T².
    fit: Option<ScaleFit>,
}

/// Tokens per second and memory against context.
pub(super) fn context(results: &Results) -> Markup {
    let [mut decode, mut prefill, mut states, mut held]: [Vec<Line>; 4] = Default::default();
    let line = |lines: &mut Vec<Line>, name: &str, at: (f64, f64)| match lines
        .iter_mut()
        .find(|line| line.name == name)
    {
        Some(line) => line.points.push(at),
        None => lines.push(Line { name: name.to_owned(), points: vec![at], fit: None }),
    };
    for row in results.model_speeds.iter().filter(|row| !row.engine.is_empty()) {
        let name = format!("{}{}", row.asked(), if row.fed { ", fed" } else { "" });
        let depth = row.depth as f64;
        if let Some(pace) = row.decode_tokens_per_second {
            line(&mut decode, &name, (depth, pace.median));
        }
        if let Some(pace) = row.prefill_tokens_per_second {
            line(&mut prefill, &name, (depth, pace.median));
        }
        let parts = ["state", "cache"].iter().filter_map(|part| row.memory_needed.get(*part));
        let bytes: u64 = parts.sum();
        if 0 < bytes {
            line(&mut states, &name, (depth, bytes as f64));
        }
        if let Some(peak) = row.peak_rss_bytes {
            line(&mut held, &name, (depth, peak as f64));
        }
    }
    for fit in &results.fits {
        let [a, b] = fit.token();
        for line in decode.iter_mut().filter(|line| line.name == fit.asked()) {
            line.fit = Some(ScaleFit { a, b, c: 0.0, exponent: None, residual: None });
        }
    }
    for row in &results.scales {
        let part = if row.part.is_empty() { String::new() } else { format!(" {}", row.part) };
        let name = format!("{}{part}", row.engine);
        let points =
            row.points.iter().map(|point| (point.context, 1e3 / point.ms_per_token)).collect();
        decode.push(Line { name: name.clone(), points, fit: row.fit.clone() });
        for point in &row.points {
            if let Some(bytes) = point.state_bytes {
                line(&mut states, &name, (point.context, bytes));
            }
            if let Some(bytes) = point.memory_bytes {
                line(&mut held, &name, (point.context, bytes));
            }
        }
    }
    let reference: Vec<_> =
        results.model_speeds.iter().filter(|row| row.engine.is_empty()).collect();
    if decode.is_empty() && prefill.is_empty() && reference.is_empty() {
        return absent(
            "No model was timed:",
            "karat bench --model DIR --depth 0,4096,32768 --results model.jsonl",
        );
    }
    html! {
        @if !decode.is_empty() { (plot("Tokens one by one", "tokens/s", &decode, 1.0)) (fits(results)) }
        @if !prefill.is_empty() { (plot("Tokens fed at once", "tokens/s", &prefill, 1.0)) }
        @if !states.is_empty() { (plot("Memory of states", "GiB", &states, f64::from(1 << 30))) }
        @if !held.is_empty() { (plot("Memory of the process", "GiB", &held, f64::from(1 << 30))) }
        @if !reference.is_empty() {
            (table(&["model, plain reference", "#prefill, tokens/s", "#decode, tokens/s"], &reference.iter().map(|row| {
                let number = |x: Option<f64>| cell(x.map_or("–".to_owned(), |x| format!("{x:.1}")));
                vec![html! { code { (row.model) } }, number(row.prefill_tokens_per_s), number(row.decode_tokens_per_s)]
            }).collect::<Vec<_>>()))
        }
        (raw(results))
    }
}

fn plot(title: &str, unit: &str, lines: &[Line], scale: f64) -> Markup {
    let lines = &lines[..lines.len().min(3 * MOST)];
    let all: Vec<(f64, f64)> = lines.iter().flat_map(|line| line.points.clone()).collect();
    let most = all.iter().map(|(context, _)| *context).fold(0.0, f64::max);
    let x = contexts(most);
    let y = Axis::linear(unit, &all.iter().map(|(_, y)| y / scale).collect::<Vec<_>>());
    let mut series = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let mut points: Vec<(f64, f64)> =
            line.points.iter().map(|(t, y)| (at_context(*t), y / scale)).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        if let Some(fit) = &line.fit {
            let curve = (0..=60).map(|k| x.range.end * f64::from(k) / 60.0).map(|at| {
                let tokens = 1024.0 * (at.exp2() - 1.0);
                (at, 1.0 / (fit.a + fit.b * tokens + fit.c * tokens * tokens))
            });
            let curve = curve
                .filter(|(at, y)| *at <= at_context(most) && x_holds(*y, scale, &all))
                .collect();
            series.push(Series {
                name: String::new(),
                draw: Draw::Line,
                as_number: i,
                points: curve,
            });
            series.push(Series {
                name: line.name.clone(),
                draw: Draw::Points,
                as_number: i,
                points,
            });
        } else {
            series.push(Series { name: line.name.clone(), draw: Draw::Both, as_number: i, points });
        }
    }
    let note = if lines.iter().any(|line| line.fit.is_some()) {
        "marks are medians, lines the fit of the time of a token"
    } else {
        "marks are medians"
    };
    figure(&format!("{title} against context"), &x, &y, &series, note)
}

/// Whether a fit stays where there are points to be compared with.
fn x_holds(y: f64, scale: f64, all: &[(f64, f64)]) -> bool {
    let most = all.iter().map(|(_, y)| y / scale).fold(0.0, f64::max);
    0.0 <= y && y <= 1.1 * most
}

/// How a token's time grows.
fn fits(results: &Results) -> Markup {
    let mut rows: Vec<Vec<Markup>> = results
        .fits
        .iter()
        .map(|fit| {
            let [a, b] = fit.token();
            vec![
                html! { code { (fit.asked()) } },
                cell(format!("{:.3}", 1e3 * a)),
                cell(format!("{:.3}", 1e9 * b)),
                cell("–"),
                cell("–"),
                cell(format!("{:+.1} % at {}", 100.0 * fit.furthest, fit.furthest_depth)),
                cell("–"),
            ]
        })
        .collect();
    rows.extend(results.scales.iter().filter_map(|row| {
        let fit = row.fit.as_ref()?;
        let number = |x: Option<f64>| cell(x.map_or("–".to_owned(), |x| format!("{x:.3}")));
        let cliffs =
            row.cliffs.as_ref().map_or("–".to_owned(), |cliffs| cliffs.len().to_string());
        Some(vec![
            html! { code { (row.engine) } " " (row.part) },
            cell(format!("{:.3}", 1e3 * fit.a)),
            cell(format!("{:.3}", 1e9 * fit.b)),
            cell(format!("{:.3e}", 1e9 * fit.c)),
            number(fit.exponent),
            cell(
                fit.residual
                    .map_or("–".to_owned(), |residual| format!("{:.1} %", 100.0 * residual)),
            ),
            cell(cliffs),
        ])
    }));
    let head = [
        "the time of a token as a + b T + c T²",
        "#a, ms",
        "#b, ns/token",
        "#c, ns/token²",
        "#exponent",
        "#off",
        "#cliffs",
    ];
    html! { @if !rows.is_empty() { (table(&head, &rows)) } }
}

/// The samples of models as they were taken.
fn raw(results: &Results) -> Markup {
    let rows: Vec<_> = results
        .model_speeds
        .iter()
        .filter(|row| !row.decode_samples.is_empty() || !row.prefill_samples.is_empty())
        .collect();
    let scales: Vec<_> = results
        .scales
        .iter()
        .filter(|row| row.points.iter().any(|point| !point.samples_ns.is_empty()))
        .collect();
    html! {
        @if !rows.is_empty() || !scales.is_empty() {
            details {
                summary { "samples as they were taken" }
                @for row in rows.iter().take(100) {
                    p { code { (row.asked()) } " after " (row.depth) " tokens" }
                    @if !row.prefill_samples.is_empty() { (samples("tokens/s at once", &row.prefill_samples)) }
                    @if !row.decode_samples.is_empty() { (samples("tokens/s one by one", &row.decode_samples)) }
                }
                @for row in scales.iter().take(20) {
                    @for point in &row.points {
                        p { code { (row.engine) } " after " (point.context) " tokens" }
                        (samples("ns", &point.samples_ns.concat()))
                    }
                }
            }
        }
    }
}

/// How much of what is allowed each layer uses, and what bisecting found.
pub(super) fn budget(results: &Results) -> Markup {
    // Layers of recorded models: the worst of all recordings, prompt by prompt.
    let mut by: BTreeMap<String, BTreeMap<u64, f64>> = BTreeMap::new();
    for row in &results.verified {
        let number = row.number.as_deref().unwrap_or("f32");
        let name = format!("{} {number}", row.engine.as_deref().unwrap_or("reference"));
        for f in &row.findings {
            let layer = f.tap.as_deref().and_then(|tap| tap.rsplit_once("hidden.")?.1.parse().ok());
            if let Some(layer) = layer {
                let worst = by.entry(name.clone()).or_default().entry(layer).or_insert(0.0);
                *worst = worse(*worst, f.budget_used);
            }
        }
    }
    let subjects: Vec<&str> = {
        let mut all: Vec<&str> = Vec::new();
        for part in results.parts.iter().filter(|part| part.op.is_none()) {
            if !all.contains(&part.subject.as_str()) {
                all.push(&part.subject);
            }
        }
        all
    };
    if by.is_empty() && subjects.is_empty() {
        return absent(
            "No layer of a model was judged:",
            "karat golden verify --results golden.jsonl",
        );
    }
    html! {
        @if !by.is_empty() { (layers(&by)) }
        @for subject in subjects.iter().take(6) { (walk(results, subject)) }
    }
}

fn layers(by: &BTreeMap<String, BTreeMap<u64, f64>>) -> Markup {
    // What is equal has no logarithm, and no mark.
    let share = |used: f64| if 0.0 < used { (100.0 * used).log10() } else { f64::NAN };
    let all: Vec<f64> =
        by.values().flat_map(|layers| layers.values()).map(|used| share(*used)).collect();
    let last = by.values().filter_map(|layers| layers.keys().last()).max().copied().unwrap_or(1);
    let every = last.div_ceil(12).max(1) as usize;
    let ticks = (0..=last).step_by(every).map(|layer| (layer as f64, layer.to_string()));
    let label = "after layer (0: embedding)".to_owned();
    let x = Axis { label, range: 0.0..last.max(1) as f64, ticks: ticks.collect() };
    let y = Axis::decades("share of the bound, %", &[&all[..], &[2.0]].concat());
    let mut series = vec![Series {
        name: "100 %: what is allowed".to_owned(),
        draw: Draw::Limit,
        as_number: 0,
        points: vec![(x.range.start, 2.0), (x.range.end, 2.0)],
    }];
    series.extend(by.iter().take(MOST).enumerate().map(|(i, (name, layers))| Series {
        name: name.clone(),
        draw: Draw::Both,
        as_number: i,
        points: layers.iter().map(|(layer, used)| (*layer as f64, share(*used))).collect(),
    }));
    figure(
        "Error budget by layer",
        &x,
        &y,
        &series,
        "the worst of all recordings and prompts, against the official implementation; what is equal to the bit has no mark",
    )
}

/// Error that a part got, added and left.
fn walk(results: &Results, subject: &str) -> Markup {
    let parts: Vec<_> =
        results.parts.iter().filter(|part| part.subject == subject && part.op.is_none()).collect();
    let log = |x: f64| if 0.0 < x && x.is_finite() { x.log10() } else { f64::NAN };
    let points = |of: fn(&crate::runs::rows::Part) -> Option<f64>| -> Vec<(f64, f64)> {
        parts.iter().enumerate().filter_map(|(i, part)| Some((i as f64, log(of(part)?)))).collect()
    };
    let all = [
        ("inherited", points(|part| part.inherited)),
        ("added here", points(|part| part.local)),
        ("left", points(|part| part.after)),
    ];
    let values: Vec<f64> =
        all.iter().flat_map(|(_, points)| points.iter().map(|(_, y)| *y)).collect();
    if !values.iter().any(|value| value.is_finite()) {
        return html! { p { code { (subject) } ": every part left what is right, to the bit." } };
    }
    let every = parts.len().div_ceil(8).max(1);
    let short = |name: &str| name.replace("layer ", "").replace("embedding", "emb");
    let ticks = parts
        .iter()
        .enumerate()
        .step_by(every)
        .map(|(i, part)| (i as f64, short(part.name.as_deref().unwrap_or("?"))));
    let x = Axis {
        label: "part of the model (numbers: layers)".to_owned(),
        range: 0.0..(parts.len().max(2) - 1) as f64,
        ticks: ticks.collect(),
    };
    let y = Axis::decades("relative RMS error", &values);
    let series: Vec<Series> = all
        .into_iter()
        .enumerate()
        .map(|(i, (name, points))| Series {
            name: name.to_owned(),
            draw: Draw::Both,
            as_number: i,
            points,
        })
        .collect();
    let wrong: Vec<&str> =
        parts.iter().filter(|part| !part.ok).filter_map(|part| part.name.as_deref()).collect();
    html! {
        (figure(&format!("Error walk: {subject}"), &x, &y, &series, "what a part got, what it added when it got what is right, and what it left"))
        @if !wrong.is_empty() { p.bad { "over its bound: " (wrong.join(", ")) } }
    }
}
