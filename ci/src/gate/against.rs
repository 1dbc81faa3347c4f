//! What is new against a baseline.

use std::collections::BTreeMap;

use benches::pairs::{
    both,
    verdict::{Verdict, apart, floor_apart},
};

use crate::{
    ab::builds,
    baseline,
    exit::{Exit, fail},
    floors::Floors,
    machine::Machine,
    out::Out,
    policy::Policy,
    runs::{rows::OpSpeed, times::Times},
    sampling::{self, Answers, Row, Sampled, worse},
};

use super::Args;

pub(super) fn run(name: &str, args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let policy = args.policy.as_deref().map(Policy::read).transpose()?.unwrap_or_default();
    let times = baseline::open(name)?;
    let here = Machine::here();
    same_machine(&times, &here)?;
    let mut kept: Vec<&OpSpeed> = times.rows.iter().collect();
    kept.retain(|row| args.filter.iter().all(|word| row.case.contains(word.as_str())));
    if kept.is_empty() {
        return Err(fail(Exit::Nothing, format!("{}: nothing selected", times.name)));
    }
    out.line(&here.name);
    let plant = args.plant.clone().unwrap_or_default();
    let program = super::program()?;
    let cases: Vec<&str> = kept.iter().map(|row| row.case.as_str()).collect();
    let (mut rows, sampled) = if let Some(was) = baseline::kept_program(name, &times) {
        let builds = builds([&was, &program], plant);
        let mut floors = Floors::kept()?;
        let quads = args.sampling.quads;
        let unknown: Vec<&str> = kept
            .iter()
            .filter(|row| row.outcome() == "passed")
            .map(|row| row.case.as_str())
            .filter(|case| floors.of(&here, case, quads as usize).is_none())
            .collect();
        if !unknown.is_empty() {
            out.note(&format!("{} cases are not calibrated: that comes first", unknown.len()));
            let aa = args.sampling.aa;
            let bar = out.bar(u64::from(aa) * unknown.len() as u64, "calibrate", false);
            let twice = both(&was, builds[0].threads);
            let step = &mut || bar.inc(1);
            sampling::calibrate(&unknown, &twice, (quads, aa), &mut floors, &here, step)?;
            bar.finish_and_clear();
        }
        let floor = |case: &str, launches: usize| {
            let of = floors.of(&here, case, quads as usize);
            of.map_or(f64::NAN, |of| of.together(launches))
        };
        sampling::decide(&cases, &builds, args.sampling, &floor, &policy, out)?
    } else {
        out.note(
            "its program is not kept beside it: times are compared with those that were taken then",
        );
        let [_, planted] = builds([&program, &program], plant);
        unpaired(&kept, &[planted.clone(), planted], args, &policy, out)?
    };
    for (row, was) in rows.iter_mut().zip(&kept) {
        let is = sampled.get(&was.case).and_then(|sampled| sampled.told(1));
        if let Some(is) = is
            && let Some((verdict, reason, exit)) = worse(&answers(was), &Answers::from(is))
        {
            *row = Row::without(&was.case, verdict, reason, exit);
        } else if row.launches == 0 {
            let reason = "the build of the baseline no longer has right answers".to_owned();
            *row = Row::without(&was.case, Verdict::Withheld, reason, Exit::Ok);
        }
    }
    // What could not be run here then, and cannot now, is no news.
    let before = rows.len();
    let mut then = kept.iter();
    rows.retain(|row| {
        let idle = |was: &&OpSpeed| ["skipped", "unsupported"].contains(&was.outcome());
        let still = row.reason.as_deref().is_some_and(|reason| reason.starts_with("not run"));
        !(then.next().is_some_and(idle) && still)
    });
    if rows.len() < before {
        out.line(&format!("not run, neither then nor now: {} cases", before - rows.len()));
    }
    if rows.is_empty() {
        return Err(fail(Exit::Unfit, "nothing that was selected can be run here"));
    }
    sampling::allow(&mut rows, &policy, out);
    sampling::tell(&rows, args.strict, out)
}

/// Times of another machine say nothing here.
fn same_machine(Times { name, env, .. }: &Times, here: &Machine) -> anyhow::Result<()> {
    if env.fingerprint == here.fingerprint {
        return Ok(());
    }
    let there = if env.machine.is_empty() { "another machine" } else { &env.machine };
    let why = format!("{name}: is of {there}; this is {}", here.name);
    Err(fail(Exit::Baseline, why))
}

/// What answers were when the baseline was made.
fn answers(was: &OpSpeed) -> Answers {
    Answers {
        outcome: was.outcome().to_owned(),
        why: was.why.clone(),
        budget: was.budget_used.unwrap_or(f64::INFINITY),
        plan: was.plan.clone(),
    }
}

/// Times against those that were kept, one after the other.
fn unpaired(
    kept: &[&OpSpeed],
    builds: &[benches::pairs::Build; 2],
    args: &Args,
    policy: &Policy,
    out: &Out,
) -> anyhow::Result<(Vec<Row>, BTreeMap<String, Sampled>)> {
    let cases: Vec<&str> = kept.iter().map(|row| row.case.as_str()).collect();
    let launches = args.sampling.launches;
    let bar = out.bar(u64::from(launches) * cases.len() as u64, "launches", false);
    let mut sampled = BTreeMap::new();
    let step = &mut || bar.inc(1);
    sampling::rounds(&cases, builds, args.sampling.quads, launches, &mut sampled, step)?;
    bar.finish_and_clear();
    let mut rows = Vec::new();
    for was in kept {
        let found = &sampled[&was.case].launches;
        let launches = was.launches.unwrap_or(1).max(1) as usize;
        let each = was.samples_ns.len().div_ceil(launches).max(1);
        let then: Vec<Vec<f64>> = was.samples_ns.chunks(each).map(<[f64]>::to_vec).collect();
        let now: Vec<Vec<f64>> = found
            .iter()
            .map(|launch| launch.sides.iter().flat_map(|side| side.ns.clone()).collect())
            .collect();
        if then.is_empty() || now.is_empty() {
            rows.push(Row::without(&was.case, Verdict::Withheld, String::new(), Exit::Ok));
            continue;
        }
        let floor = floor_apart(&then, now.len(), 0);
        let judged = apart(&then, &now, &policy.rule(&was.case, floor), 0);
        rows.push(Row { paired: false, ..Row::of(&was.case, judged, floor, &now) });
    }
    sampling::together(&mut rows);
    Ok((rows, sampled))
}
