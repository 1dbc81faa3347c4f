//! `karat ab`: two revisions beside each other, on this machine, now.

mod revision;

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Stdio},
};

use benches::pairs::{Build, verdict::Verdict};
use serde_json::Value;

use crate::{
    exit::{Exit, fail, refuse},
    floors::Floors,
    list::Selection,
    machine::Machine,
    out::{self, Out},
    policy::Policy,
    sampling::{self, Answers, Plant, Row, Sampling, worse},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What it was: a revision of this repository, or a karat that is built
    a: String,
    /// What it is
    b: String,
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    sampling: Sampling,
    /// What may be slower, by how much, why and until when
    #[arg(long, value_name = "gate.toml")]
    policy: Option<std::path::PathBuf>,
    /// End with 6 where neither a change nor the same is shown
    #[arg(long)]
    strict: bool,
    /// Plant this in the second side: so much more work (0.05 is 5 %), or a fault of a variant
    #[arg(long, value_name = "SHARE|NAME")]
    plant: Option<Plant>,
    /// How revisions are built
    #[arg(long, value_enum, default_value = "release")]
    profile: revision::Profile,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let policy = args.policy.as_deref().map(Policy::read).transpose()?.unwrap_or_default();
    // Both are refused before the first is built.
    args.selection.filter()?;
    let a = revision::side(&args.a, args.profile, out)?;
    let b = revision::side(&args.b, args.profile, out)?;
    let plant = args.plant.clone().unwrap_or_default();
    let builds = builds([&a.program, &b.program], plant);
    let [of_a, of_b] = [listed(&a.program, &args.selection)?, listed(&b.program, &args.selection)?];
    if of_a.is_empty() && of_b.is_empty() {
        return Err(fail(Exit::Nothing, "nothing selected that can be timed, of either side"));
    }
    let here = Machine::here();
    out.line(&format!("A {}\nB {}\n{}", a.name, b.name, here.name));
    let both: Vec<&str> =
        of_b.iter().filter(|case| of_a.contains(*case)).map(String::as_str).collect();
    let mut floors = Floors::kept()?;
    let [a_twice, _] = &builds;
    let unknown: Vec<&str> = both
        .iter()
        .copied()
        .filter(|case| floors.of(&here, case, args.sampling.quads as usize).is_none())
        .collect();
    if !unknown.is_empty() {
        out.note(&format!(
            "{} cases are not calibrated: A runs beside itself first",
            unknown.len()
        ));
        let Sampling { quads, aa, .. } = args.sampling;
        let bar = out.bar(u64::from(aa) * unknown.len() as u64, "A beside A", false);
        let twice = [a_twice.clone(), a_twice.clone()];
        sampling::calibrate(&unknown, &twice, (quads, aa), &mut floors, &here, &mut || bar.inc(1))?;
        bar.finish_and_clear();
    }
    let quads = args.sampling.quads as usize;
    let floor = |case: &str, launches: usize| {
        floors.of(&here, case, quads).map_or(f64::NAN, |of| of.together(launches))
    };
    let (mut rows, sampled) =
        sampling::decide(&both, &builds, args.sampling, &floor, &policy, out)?;
    for row in &mut rows {
        let sampled = &sampled[&row.case];
        if let (Some(was), Some(is)) = (sampled.told(0), sampled.told(1))
            && let Some((verdict, reason, exit)) = worse(&Answers::from(was), &Answers::from(is))
        {
            *row = Row::without(&row.case, verdict, reason, exit);
        }
    }
    let one = |case: &String, reason: &str, exit| {
        Row::without(case, Verdict::Missing, reason.to_owned(), exit)
    };
    let gone = of_a.difference(&of_b).map(|case| one(case, "A has it, B does not", Exit::Wrong));
    let new = of_b.difference(&of_a).map(|case| one(case, "B has it, A does not", Exit::Ok));
    rows.extend(gone.chain(new));
    sampling::allow(&mut rows, &policy, out);
    sampling::tell(&rows, args.strict, out)
}

/// The two sides, something planted in the second.
pub(crate) fn builds(programs: [&Path; 2], plant: Plant) -> [Build; 2] {
    let threads = Some(benches::host().threads);
    let [a, b] = programs.map(|program| Build {
        program: program.to_owned(),
        threads,
        extra: 0.0,
        fault: None,
    });
    [a, Build { extra: plant.extra, fault: plant.fault, ..b }]
}

/// Ids that a build has for a filter and that can be timed.
fn listed(program: &Path, selection: &Selection) -> anyhow::Result<BTreeSet<String>> {
    let name = program.display();
    let output = Command::new(program)
        .args(["list", "--format", "jsonl", "--quiet", "--verdict", "/dev/null"])
        .args(selection.given())
        .stdin(Stdio::null())
        .output()
        .map_err(|e| fail(Exit::Unfit, format!("{name}: {e}")))?;
    if out::interrupted() {
        return Err(fail(Exit::Interrupted, "interrupted"));
    }
    match Exit::of(output.status.code()) {
        Some(Exit::Ok) => {}
        Some(Exit::Nothing) => return Ok(BTreeSet::new()),
        Some(Exit::Refused) => {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(refuse(format!("{name}: {}", said.lines().last().unwrap_or_default())));
        }
        _ => return Err(fail(Exit::Unfit, format!("{name}: is no karat: {}", output.status))),
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let all: Vec<String> = text
        .lines()
        .filter_map(|line| {
            let line: Value = serde_json::from_str(line).ok()?;
            line["case"].as_str().map(str::to_owned)
        })
        .collect();
    if all.is_empty() {
        return Err(fail(Exit::Unfit, format!("{name}: is no karat: it lists nothing")));
    }
    Ok(all.into_iter().filter(|case| !case.contains("@reference/")).collect())
}
