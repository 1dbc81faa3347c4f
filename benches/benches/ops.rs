//! Every op that the engine calls, alone, and how much of this machine's roof it reaches.
//!
//! `cargo bench -p benches --bench ops [-- FILTER]`. After each of Criterion's samples the machine's own
//! pace is sampled: a share is that of a sample's time and the paces right before and after it, and
//! what is shown is the median of these. Tables are left in `target/karat`.
#![expect(clippy::print_stdout, reason = "a program of its own that prints its table")]

use std::{error::Error, path::Path, time::Duration};

use benches::{
    clock::time,
    files::replace,
    host,
    roofline::{Bound, Machine, Summary, Turn},
};
use criterion::{Criterion, SamplingMode, Throughput};
use optimized::cpu::timed::{Cost, Piece, pieces};
use serde_json::{Value, json};

/// Seconds of a sample, at the least.
const LASTING: f64 = 0.04;

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .nresamples(1000)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let mut machine = None;
    let mut rows = Vec::new();
    for piece in pieces() {
        if let Some(summary) = measured(&mut criterion, &mut machine, &piece)? {
            println!("{}\n", line(&piece, &summary));
            rows.push((piece, summary));
        }
    }
    criterion.final_summary();
    if !rows.is_empty() {
        let table = table(&rows);
        println!("\n{table}");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("karat");
        let all: Vec<Value> = rows.iter().map(|(piece, summary)| told(piece, summary)).collect();
        replace(&folder.join("ops.md"), table.as_bytes())?;
        replace(&folder.join("ops.json"), serde_json::to_string_pretty(&all)?.as_bytes())?;
        println!("also in {}", folder.join("ops.{md,json}").display());
    }
    Ok(())
}

/// `None` of a piece that nobody asked for.
fn measured(
    criterion: &mut Criterion,
    machine: &mut Option<Machine>,
    piece: &Piece,
) -> Result<Option<Summary>, String> {
    let cost = &piece.cost;
    let (mut prepared, mut before, mut times) = (None, None, 1);
    // Calls of a sample, and how it went.
    let mut turns: Vec<(u64, Turn)> = Vec::new();
    let mut group = criterion.benchmark_group(piece.op);
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(match moved(cost) {
        0 => Throughput::Elements(piece.tokens as u64),
        bytes => Throughput::Bytes(bytes),
    });
    group.bench_function(format!("{}, {}", piece.case, piece.format), |bench| {
        let machine = machine.get_or_insert_with(Machine::new);
        let piece = prepared.get_or_insert_with(|| piece.prepare());
        bench.iter_custom(|calls| {
            let before_it = *before.get_or_insert_with(|| machine.pace(cost));
            // What sampling the pace takes counts against Criterion's time and leaves it few calls: a sample
            // is the mean of so many times these that it lasts.
            let ((), took) = time(|| (0..calls * times).for_each(|_| piece.run()));
            let after = machine.pace(cost);
            before = Some(after);
            let seconds = took.as_secs_f64() / (calls * times) as f64;
            turns.push((calls, Turn { seconds, before: before_it, after }));
            times = (LASTING / (seconds * calls as f64)).clamp(1.0, 1e6) as u64;
            Duration::from_secs_f64(seconds * calls as f64)
        });
    });
    group.finish();
    let Some(prepared) = prepared else { return Ok(None) };
    if !prepared.answered() {
        return Err(format!("{} {}: answers with no numbers", piece.op, piece.case));
    }
    // The last ones of equally many calls are Criterion's samples; before them it warms up.
    let calls = turns.last().map_or(0, |(calls, _)| *calls);
    let first = turns.iter().rposition(|(n, _)| *n != calls).map_or(0, |at| at + 1);
    let turns: Vec<Turn> = turns[first..].iter().map(|(_, turn)| *turn).collect();
    Ok(Some(Summary::of(cost, &turns)))
}

/// Bytes that a call moves: what is changed is read and written.
fn moved(cost: &Cost) -> u64 {
    cost.read + 2 * cost.changed
}

/// Time, GB/s, Gop/s, the roof and the share of it; nothing where there is nothing to say.
fn figures(cost: &Cost, summary: &Summary) -> [String; 5] {
    let seconds = summary.seconds.median;
    let pace = |work: u64| work as f64 / seconds / 1e9;
    let said = |work: u64| if work == 0 { String::new() } else { format!("{:.1}", pace(work)) };
    let time = if seconds < 1e-3 {
        format!("{:.1} µs", seconds * 1e6)
    } else {
        format!("{:.2} ms", seconds * 1e3)
    };
    let (roof, share) = summary.share.map_or_else(Default::default, |(share, bound)| {
        let (work, unit) = match bound {
            Bound::Memory => (moved(cost), "GB/s"),
            Bound::Products => (cost.operations, "Gop/s"),
        };
        let roof = format!("{:.0} {unit}", pace(work) / share.median);
        (roof, format!("{:.0} %", 100.0 * share.median))
    });
    [time, said(moved(cost)), said(cost.operations), roof, share]
}

fn line(piece: &Piece, summary: &Summary) -> String {
    let [time, bytes, operations, roof, share] = figures(&piece.cost, summary);
    let mut line = format!("{} ({}, {}): {time}", piece.op, piece.case, piece.format);
    for (figure, unit) in [(bytes, " GB/s"), (operations, " Gop/s"), (share, "")] {
        if !figure.is_empty() {
            line.extend([", ", &figure, unit]);
        }
    }
    if roof.is_empty() { line } else { format!("{line} of {roof}") }
}

fn table(rows: &[(Piece, Summary)]) -> String {
    let host = host();
    let mut table = format!(
        "{} threads of {} ({})\n\n| op | size | format | time | GB/s | Gop/s | roof | share |\n\
         |---|---|---|---|---|---|---|---|\n",
        rayon::current_num_threads(),
        host.cpu,
        host.features.join(" "),
    );
    for (piece, summary) in rows {
        let [time, bytes, operations, roof, share] = figures(&piece.cost, summary);
        let figures = [&time, &bytes, &operations, &roof, &share].map(String::as_str);
        let row = [&[piece.op, &piece.case, piece.format], &figures[..]].concat().join(" | ");
        table.extend(["| ", &row, " |\n"]);
    }
    table
}

fn told(piece: &Piece, summary: &Summary) -> Value {
    let Cost { read, changed, operations, .. } = piece.cost;
    let samples = |x: benches::speed::Samples| json!([x.min, x.median, x.max]);
    json!({
        "op": piece.op,
        "size": piece.case,
        "format": piece.format,
        "read": read,
        "changed": changed,
        "operations": operations,
        "seconds": samples(summary.seconds),
        "share": summary.share.map(|(share, _)| samples(share)),
        "bound": summary.share.map(|(_, bound)| match bound {
            Bound::Memory => "memory",
            Bound::Products => "products",
        }),
    })
}
