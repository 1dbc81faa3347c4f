//! From a problem that fails to the smallest one that fails in the same way.

use crate::{plan::Job, registry::Spoil, report::Row};

/// The smallest failing problem that is found by halving letters, and how it fails; `None` if the job
/// does not fail. `go_on` is asked before every try.
pub fn smallest(
    job: &Job,
    plant: Option<Spoil>,
    go_on: &mut dyn FnMut(&Job) -> bool,
) -> Option<(Job, Row)> {
    let row = job.run(plant);
    if !row.outcome.is_red() {
        return None;
    }
    let kind = row.outcome.name();
    let mut best = (job.clone(), row);
    let mut fails = |sizes: &[usize]| -> Option<(Job, Row)> {
        let smaller = resized(job, sizes)?;
        if !go_on(&smaller) {
            return None;
        }
        let row = smaller.run(plant);
        (row.outcome.name() == kind).then_some((smaller, row))
    };
    let sizes: Vec<usize> = job.parsed.sizes.iter().map(|&(_, size)| size).collect();
    reduce(sizes, &mut |sizes| match fails(sizes) {
        None => false,
        Some(found) => {
            best = found;
            true
        }
    });
    Some(best)
}

/// The same job at other sizes, if that is a problem of the op which the kernel takes.
fn resized(job: &Job, sizes: &[usize]) -> Option<Job> {
    let letters: Vec<_> = job
        .parsed
        .sizes
        .iter()
        .zip(sizes)
        .map(|((letter, _), size)| format!("{letter}{size}"))
        .collect();
    let (_, rest) = job.spec.split_once(';').unwrap_or((&job.spec, ""));
    let rest = if rest.is_empty() { String::new() } else { format!(";{rest}") };
    let parsed = job.entry.parse(&format!("{}{rest}", letters.join("-"))).ok()?;
    if let Some(kernel) = &job.foreign
        && kernel.refuses(&parsed.sizes, parsed.dtype.parse().ok()?).is_some()
    {
        return None;
    }
    Some(Job { spec: parsed.canonical.clone(), parsed, ..job.clone() })
}

/// Makes sizes smaller, one letter after another, as long as `fails` says so: to 1, to the half, to
/// three quarters, … to one less. Ends where no letter can be less by any of these.
fn reduce(mut sizes: Vec<usize>, fails: &mut dyn FnMut(&[usize]) -> bool) -> Vec<usize> {
    loop {
        let before = sizes.clone();
        for at in 0..sizes.len() {
            'letter: loop {
                let now = sizes[at];
                let halves = (1..usize::BITS).map(|k| now - (now >> k)).take_while(|&n| n < now);
                for size in std::iter::once(1).chain(halves).filter(|&n| n < now) {
                    sizes[at] = size;
                    if fails(&sizes) {
                        continue 'letter;
                    }
                }
                sizes[at] = now;
                break;
            }
        }
        if sizes == before {
            return sizes;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::reduce;

    proptest! {
        /// Whatever fails from some sizes on shrinks to exactly these sizes.
        #[test]
        fn thresholds_are_found(least in prop::collection::vec(1_usize..200, 1..5),
                                more in prop::collection::vec(0_usize..2000, 5)) {
            let start: Vec<usize> = least.iter().zip(&more).map(|(a, b)| a + b).collect();
            let mut tries = 0;
            let found = reduce(start, &mut |sizes| {
                tries += 1;
                sizes.iter().zip(&least).all(|(size, least)| least <= size)
            });
            prop_assert_eq!(found, least);
            prop_assert!(tries < 1000, "{} tries", tries);
        }

        /// Where sizes fail that do not grow from a threshold, what is found fails, and one less of any
        /// letter does not.
        #[test]
        fn what_is_found_fails(start in prop::collection::vec(1_usize..500, 3), by in 2_usize..9) {
            let fails = |sizes: &[usize]| sizes.iter().sum::<usize>() % by != 0;
            prop_assume!(fails(&start));
            let found = reduce(start, &mut |sizes| fails(sizes));
            prop_assert!(fails(&found));
            for at in 0..3 {
                let mut less = found.clone();
                less[at] -= 1;
                prop_assert!(found[at] == 1 || !fails(&less));
            }
        }
    }
}
