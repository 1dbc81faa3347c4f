//! Every way to compute every op on every case of the `ci` set, one test each.

use std::process::ExitCode;

use benches::{filter::Filter, plan::plan, report::Outcome};
use golden::Set;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let jobs =
        plan(Set::Ci, &Filter::default(), None).expect("the sets hold problems of their ops");
    let trials = jobs.into_iter().map(|job| {
        // Known beforehand: a test that ignores itself while running would count as passed.
        let skipped = job.entry.skip(&job.spec, &job.variant).is_some();
        let trial = Trial::test(job.id(), move || {
            let row = job.entry.check(&job.spec, &job.variant, None);
            match row.outcome {
                Outcome::Passed(_) => Ok(()),
                other => Err(Failed::from(format!("{other:?}"))),
            }
        });
        trial.with_ignored_flag(skipped)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
