//! `karat calibrate`: what cases are off by themselves on this machine.

use benches::pairs::{
    both,
    verdict::{UNGATEABLE, quads},
};
use serde_json::json;

use crate::{
    bench::ops::jobs,
    exit::Exit,
    floors::{Floors, OfCase},
    gate::program,
    list::Selection,
    machine::Machine,
    out::Out,
    sampling::{self, Sampled, red_exit},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// ABBA quads of a launch
    #[arg(long, default_value_t = 60, value_name = "N", value_parser = clap::value_parser!(u32).range(4..=100_000))]
    quads: u32,
    /// Launches of each case: this build beside itself
    #[arg(long, default_value_t = 24, value_name = "N", value_parser = clap::value_parser!(u32).range(3..=1000))]
    launches: u32,
}

/// Launches that are judged together, and the most of them, where nobody says otherwise.
const TOGETHER: [usize; 2] = [3, 12];

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let jobs = jobs(&args.selection)?;
    let ids: Vec<String> = jobs.iter().map(benches::plan::Job::id).collect();
    let cases: Vec<&str> = ids.iter().map(String::as_str).collect();
    let here = Machine::here();
    let mut floors = Floors::kept()?;
    out.line(&here.name);
    let bar = out.bar(u64::from(args.launches) * cases.len() as u64, "calibrate", false);
    let builds = both(&program()?, Some(benches::host().threads));
    let sizes = (args.quads, args.launches);
    let found =
        sampling::calibrate(&cases, &builds, sizes, &mut floors, &here, &mut || bar.inc(1))?;
    bar.finish_and_clear();
    let mut rows = Vec::new();
    let mut exit = Exit::Ok;
    for case in cases {
        let Sampled { launches, red } = &found[case];
        let of = OfCase::new(args.quads as usize, &quads(launches));
        let [few, many] = TOGETHER.map(|n| of.together(n));
        let gateable = many <= UNGATEABLE;
        let why = red.as_ref().and_then(|red| red.sides.iter().find(|side| !side.passed()));
        exit = exit.gravest(red.as_ref().map_or(Exit::Ok, red_exit));
        let number = |x: f64| x.is_finite().then_some(x);
        out.json(&json!({
            "schema": "karat.result/1", "kind": "calibrate", "case": case, "floor": number(few),
            "floor_at_most_launches": number(many), "quads": args.quads, "launches": launches.len(),
            "ungateable": !gateable, "checked": why.map_or("passed", |side| &side.outcome),
            "why": why.and_then(|side| side.why.as_ref()),
        }));
        let share = |x: f64| format!("{:.2} %", 100.0 * x);
        rows.push(vec![
            case.to_owned(),
            why.map_or_else(|| share(few), |side| side.outcome.clone()),
            why.map_or_else(|| share(many), |side| side.why.clone().unwrap_or_default()),
            if gateable || why.is_some() { String::new() } else { "ungateable".to_owned() },
        ]);
    }
    out.table(&["case", "off by itself, 3 launches", "12 launches", ""], &rows);
    out.json(&json!({"schema": "karat.result/1", "kind": "summary", "rows": rows.len(), "exit": exit as u8}));
    Ok(exit)
}
