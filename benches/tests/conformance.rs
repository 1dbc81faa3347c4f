//! Every way to compute every op on every case of the `ci` set, one test each.

use std::{collections::BTreeMap, io::Write, process::ExitCode};

use benches::{filter::Filter, plan::plan, report::Outcome};
use golden::Set;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let jobs =
        plan(Set::Ci, &Filter::default(), None).expect("the sets hold problems of their ops");
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    let trials = jobs.into_iter().map(|job| {
        // Known beforehand: a test that ignores itself while running would count as passed.
        let not_run = job.entry.not_run(&job.spec, &job.variant);
        let skipped = not_run.is_some();
        if let Some(why) = not_run.as_ref().and_then(Outcome::why) {
            *reasons.entry(format!("{}@{}: {why}", job.entry.name(), job.variant)).or_default() +=
                1;
        }
        let trial = Trial::test(job.id(), move || {
            let row = job.entry.check(&job.spec, &job.variant, None);
            match row.outcome {
                Outcome::Passed(_) => Ok(()),
                other => Err(Failed::from(format!("{other:?}"))),
            }
        });
        trial.with_ignored_flag(skipped)
    });
    let trials = trials.collect();
    for (what, count) in reasons {
        // libtest has no place for the reason of an ignored test.
        let _ = writeln!(std::io::stderr(), "ignored: {what} ({count} problems)");
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
